"""Prints how good a model is when only a prefix of the destination is told, and how it completes the prefix.

python scripts/eval_partial_ip.py RUN --data ROWS [--part test-s1] [--queries 200] [--top 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ping_llm.eval.conditionals import by_prefix_length, completion_hits, open_questions
from ping_llm.eval.report import lines_as_text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a trained model")
    parser.add_argument("--top", type=int, default=10, help="completions of a prefix that are looked at")
    parser.add_argument("--completions", type=int, default=30, help="queries that are completed")
    parser.add_argument("--data", type=Path, required=True, help="folder of rows")
    parser.add_argument("--part", default="test-s1")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    model, split = open_questions(
        options.run, options.data, options.part, options.queries, options.seed, options.device
    )
    lines = by_prefix_length(model, split.recent.told(0))
    print(lines_as_text(lines))
    completed = completion_hits(model, split.recent.take(slice(0, options.completions)), options.top)
    print(lines_as_text(completed))
    lines += completed
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
