"""The tables of a config out of a TOML file and the command line, and back to plain types."""

from __future__ import annotations

import dataclasses
import difflib
import io
import sys
import tomllib
import typing
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from cattrs import ClassValidationError, Converter, ForbiddenExtraKeysError

from ping_llm.config.sections import Config

T = TypeVar("T")

DIAL_HELP = (
    "--depth N, beside the file or in place of it, sets all that follows from the number of blocks: width, heads, tokens, "
    "batch, rates, weight decay and, by this machine's memory, micro-batches; options given explicitly stay. With it, "
    "--ratio R: tokens for each weight of the matrices and the head (12); or --target-flops F: FLOPs of the whole run."
)


def load_config(path: Path | str) -> Config:
    """Reads a TOML file over the defaults; ValueError names an unknown key, a wrong type or a value out of range."""
    return config_from_dict(read_toml(Path(path)), str(path))


def read_toml(path: Path, example: str = "configs/tiny.toml") -> dict[str, Any]:
    """The tables of a TOML file; ValueError if there is none, naming an `example`, or it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no config file {path}; {example} is one to start from") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a readable TOML file: {error}") from None


def parse_config(argv: list[str], prog: str, default: Config | None = None) -> Config:
    """`CONFIG.toml [--section.option value …]` in, the resolved config out; of a `default` without the file."""
    if default is None and argv and not argv[0].startswith("-"):
        default, argv = load_config(argv[0]), argv[1:]
    elif default is None and not ({"-h", "--help"} & set(argv)):
        raise ValueError(
            f"{prog} needs a config file as its first argument, for example configs/tiny.toml, or --depth N"
        )
    default, errors, title = default or Config(), io.StringIO(), f"Train a model on probe rows. {DIAL_HELP}"
    try:
        with redirect_stderr(errors):
            return tyro.cli(Config, default=default, args=argv, prog=f"{prog} CONFIG.toml", description=title)
    except SystemExit as stopped:
        error: BaseException | None = stopped
        while error is not None and type(error) is not ValueError:
            error = error.__context__
        if error is not None:  # of a check of these classes; tyro would show it in a box of many lines
            raise error from None
        print(errors.getvalue(), end="", file=sys.stderr)
        raise


def config_to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON types."""
    return _CONVERTER.unstructure(config)


def config_from_dict(values: dict[str, Any], source: str) -> Config:
    """The inverse of `config_to_dict`; keys that are absent keep their defaults. `source` names the file in errors."""
    return from_dict(values, Config, source)


def from_dict(values: dict[str, Any], kind: type[T], source: str) -> T:
    """A dataclass of plain types; ValueError names an unknown key and the nearest known one, or a wrong type or value."""
    try:
        return _CONVERTER.structure(values, kind)
    except ClassValidationError as error:
        raise ValueError(_explain(error, kind, values, source, "")) from None


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields of two configs that differ and that would change what is learned."""
    names = []
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            names += differing_fields(a, b, f"{f.name}.")
        elif a != b and not f.metadata.get("resumable"):
            names.append(f"{prefix}{f.name}")
    return names


def _exact(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


_CONVERTER = Converter(forbid_extra_keys=True)
for _kind in (int, bool, str):
    _CONVERTER.register_structure_hook(_kind, _exact)
_CONVERTER.register_structure_hook(float, lambda value, _: float(value) if type(value) is int else _exact(value, float))
_CONVERTER.register_structure_hook(Path, lambda value, _: Path(_exact(value, str)))


def _explain(error: Exception, kind: Any, value: Any, source: str, name: str) -> str:
    """In the user's words, why `value` is no `kind`; `name` is the dotted name of its key, "" for the whole config."""
    prefix = f"{name}." if name else ""
    if isinstance(error, ClassValidationError):
        of_keys, others = error.group_exceptions()
        if others:
            return _explain(others[0], kind, value, source, name)
        cause, key = of_keys[0]
        return _explain(cause, key.type, value[key.name], source, f"{prefix}{key.name}")
    if isinstance(error, ForbiddenExtraKeysError):
        key = next(key for key in value if key in error.extra_fields)
        known = [f.name for f in dataclasses.fields(kind)]
        inner = {
            own.name: f"{table}.{own.name}"
            for table, of_table in typing.get_type_hints(kind).items()
            if dataclasses.is_dataclass(of_table)
            for own in dataclasses.fields(of_table)
        }
        near = difflib.get_close_matches(key, known, n=1)
        near = near or [inner[one] for one in difflib.get_close_matches(key, inner, n=1)]
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
        return f"{source}: unknown key {prefix}{key}; {hint}"
    if dataclasses.is_dataclass(kind):
        return f"{source}: {name} must be a table, not {value!r}" if not isinstance(value, dict) else str(error)
    if typing.get_origin(kind) is Literal:
        return f"{source}: {name}={value!r} must be one of {', '.join(map(str, typing.get_args(kind)))}"
    items = "".join(f" of {one.__name__}" for one in typing.get_args(kind)) if typing.get_origin(kind) is list else ""
    return f"{source}: {name}={value!r} must be of type {getattr(kind, '__origin__', kind).__name__}{items}"
