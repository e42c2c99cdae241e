"""Prints how good a model's law of the RTT is when both ends are told, one alone, with and without the time.

python scripts/eval_conditional_rtt.py RUN --data ROWS [--part test-s1] [--queries 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys

from ping_llm.eval.conditionals import by_what_is_told
from ping_llm.eval.script import question_parser, questions, run_script


def answer(options: argparse.Namespace) -> list[dict]:
    model, split = questions(options)
    return by_what_is_told(model, split.recent)


def main(argv: list[str] | None = None) -> int:
    return run_script(question_parser(__doc__, queries=200), answer, argv)


if __name__ == "__main__":
    sys.exit(main())
