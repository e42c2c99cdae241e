"""Prints how good a model's RTT distribution is given both addresses and the time, or less.

python scripts/eval_conditional_rtt.py RUN --data ROWS [--part val-s1] [--queries 200] [--json FILE]
"""

from __future__ import annotations

import sys

import tyro

from ping_llm.cli import exit_code
from ping_llm.eval.conditionals import by_what_is_known, print_look
from ping_llm.eval.options import PartOptions


def main(argv: list[str] | None = None) -> None:
    print_look(tyro.cli(PartOptions, args=argv, description=__doc__), by_what_is_known)


if __name__ == "__main__":
    sys.exit(exit_code(main))
