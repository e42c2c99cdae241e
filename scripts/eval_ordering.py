"""Prints the log-likelihood of pings under every order of their fields: of a joint distribution all are equal.

python scripts/eval_ordering.py RUN --data ROWS [--part test-s1] [--queries 500] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ping_llm.eval.conditionals import open_questions
from ping_llm.eval.extras import order_consistency
from ping_llm.eval.report import lines_as_text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a trained model")
    parser.add_argument("--data", type=Path, required=True, help="folder of rows")
    parser.add_argument("--part", default="test-s1")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    model, split = open_questions(
        options.run, options.data, options.part, options.queries, options.seed, options.device
    )
    found = order_consistency(model, split.recent)
    lines = [{"order": order, "mean_log_prob_nats": mean} for order, mean in found["mean_log_prob"].items()]
    print(lines_as_text(lines))
    print(
        f"std over the orders, mean of {found['measurements']} pings: {found['std_nats']:.3f} nats (0.3 or less is good)"
    )
    lines.append({"order": "std", "mean_log_prob_nats": found["std_nats"]})
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
