"""Pings hosts from here, now, and prints what a model expected beside what came.

    python scripts/eval_live.py RUN --src MY_PUBLIC_ADDRESS HOST [HOST …] [--count 3] [--json FILE]

Each host is asked about after the pings of the hosts before it, as context.
"""

from __future__ import annotations

import argparse
import sys

from ping_llm.eval.live import compare_live
from ping_llm.eval.script import run_script, script_parser
from ping_llm.inference.model import PingModel


def answer(options: argparse.Namespace) -> list[dict]:
    return compare_live(PingModel.load(options.run, options.device), options.src, options.hosts, options.count)


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("hosts", nargs="+", metavar="HOST")
    parser.add_argument("--src", required=True, help="the public address of this machine")
    parser.add_argument("--count", type=int, default=3, help="pings of each host")
    return run_script(parser, answer, argv)


if __name__ == "__main__":
    sys.exit(main())
