"""Prints how well a model tells which destination answered, given source and RTT, beside popularity × RTT histogram.

python scripts/eval_destinations.py RUN --data ROWS [--part test-s1] [--queries 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ping_llm.eval.baselines.destinations import DestinationBayes
from ping_llm.eval.conditionals import open_questions
from ping_llm.eval.destinations import destination_scores
from ping_llm.eval.extras import answered
from ping_llm.eval.queries import SplitQueries
from ping_llm.eval.report import lines_as_text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a trained model")
    parser.add_argument("--data", type=Path, required=True, help="folder of rows")
    parser.add_argument("--part", default="test-s1")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    model, split = open_questions(
        options.run, options.data, options.part, options.queries, options.seed, options.device
    )
    table, bayes = split.recent.measurements, DestinationBayes()
    bayes.fit(table.of_part("train"), SplitQueries.draw(table, "val", 2000, options.seed).mixed())
    found = destination_scores(model, bayes, answered(split.recent, options.queries))
    lines = []
    for method in ("model", "destination_bayes"):
        rates = found[method]["hit_rate"]
        hits = {f"top {top} at /{bits}": share for bits, of in rates.items() for top, share in of.items()}
        lines.append({"method": method, "bits": found[method]["bits"]} | hits)
    print(lines_as_text(lines))
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
