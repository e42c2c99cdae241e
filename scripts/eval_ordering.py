"""Prints the log-likelihood of pings under every order of their fields: of a joint distribution all are equal.

python scripts/eval_ordering.py RUN --data ROWS [--part test-s1] [--queries 500] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys

from ping_llm.eval.extras import order_consistency
from ping_llm.eval.script import question_parser, questions, run_script


def answer(options: argparse.Namespace) -> list[dict]:
    model, split = questions(options)
    found = order_consistency(model, split.recent)
    lines = [{"order": order, "mean_log_prob_nats": mean} for order, mean in found["mean_log_prob"].items()]
    print(
        f"std over the orders, mean of {found['measurements']} pings: {found['std_nats']:.3f} nats (0.3 or less is good)"
    )
    return [*lines, {"order": "std", "mean_log_prob_nats": found["std_nats"]}]


def main(argv: list[str] | None = None) -> int:
    return run_script(question_parser(__doc__, queries=500), answer, argv)


if __name__ == "__main__":
    sys.exit(main())
