"""Words of a command line and commands by name in, the one that they name called, or what there is printed, out."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

import tyro


def dispatch(
    argv: list[str], commands: Mapping[str, Any], prog: str, parse_themselves: Collection[object] = ()
) -> int | None:
    """Calls the command that argv names; its options are the fields of its class or the parameters of its function, but for
    those that parse the rest of argv themselves."""
    if argv and argv[0] in commands:
        command = commands[argv[0]]
        if command in parse_themselves:
            return command(argv[1:])
        result = tyro.cli(command, args=argv[1:], prog=f"{prog} {argv[0]}")
        return result.run() if hasattr(result, "run") else result
    wide = max(map(len, commands))
    lines = [f"  {name:{wide}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()]
    usage = "\n".join([f"usage: {prog} COMMAND [OPTIONS]   (COMMAND --help says more)", "", *lines])
    if argv and argv[0] in ("-h", "--help"):
        return print(usage)
    if argv:
        raise ValueError(f"no command {argv[0]!r}; there are {', '.join(commands)}")
    print(usage, file=sys.stderr)
    raise SystemExit(2)
