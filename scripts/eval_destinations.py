"""Prints how well a model tells which destination answered, given source and RTT, beside popularity × RTT histogram.

python scripts/eval_destinations.py RUN --data ROWS [--part test-s1] [--queries 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys

from ping_llm.eval.baselines.destinations import DestinationBayes
from ping_llm.eval.destinations import destination_scores
from ping_llm.eval.extras import answered
from ping_llm.eval.queries import draw_val
from ping_llm.eval.script import question_parser, questions, run_script


def answer(options: argparse.Namespace) -> list[dict]:
    model, split = questions(options)
    table, bayes = split.recent.measurements, DestinationBayes()
    bayes.fit(table.of_part("train"), draw_val(table, 2000, options.seed))
    found = destination_scores(model, bayes, answered(split.recent, options.queries))
    lines = []
    for method in ("model", "destination_bayes"):
        rates = found[method]["hit_rate"]
        hits = {f"top {top} at /{bits}": share for bits, of in rates.items() for top, share in of.items()}
        lines.append({"method": method, "bits": found[method]["bits"]} | hits)
    return lines


def main(argv: list[str] | None = None) -> int:
    return run_script(question_parser(__doc__, queries=50), answer, argv)


if __name__ == "__main__":
    sys.exit(main())
