"""Prints how good a model is when only a prefix of the destination is told, and how it completes the prefix.

python scripts/eval_partial_ip.py RUN --data ROWS [--part test-s1] [--queries 200] [--top 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys

from ping_llm.eval.conditionals import by_prefix_length, completion_hits
from ping_llm.eval.script import question_parser, questions, run_script


def answer(options: argparse.Namespace) -> list[dict]:
    model, split = questions(options)
    lines = by_prefix_length(model, split.recent.told(0))
    return [*lines, *completion_hits(model, split.recent.take(slice(0, options.completions)), options.top)]


def main(argv: list[str] | None = None) -> int:
    parser = question_parser(__doc__, queries=200)
    parser.add_argument("--top", type=int, default=10, help="completions of a prefix that are looked at")
    parser.add_argument("--completions", type=int, default=30, help="queries that are completed")
    return run_script(parser, answer, argv)


if __name__ == "__main__":
    sys.exit(main())
