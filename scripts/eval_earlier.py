"""Prints how simple methods, and a model, do under the protocol by which the earlier implementation was scored.

    python scripts/eval_earlier.py --data ROWS [--run RUN] [--queries 5000] [--json FILE]

A run stands there like for like only if it learned from nothing but the protocol's own train measurements.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ping_llm.data.rows import read_manifest
from ping_llm.eval.columns import Measurements
from ping_llm.eval.earlier import EarlierProtocol, compare
from ping_llm.eval.script import run_script, script_parser


def answer(options: argparse.Namespace) -> list[dict]:
    parts = [part for part, count in read_manifest(options.data)["parts"].items() if count]
    protocol = EarlierProtocol.of(Measurements.from_rows(options.data, parts), options.seed)
    models = []
    if options.run:
        from ping_llm.eval.model import ModelMethod
        from ping_llm.inference.model import PingModel

        models = [ModelMethod(PingModel.load(options.run, options.device), "auto")]
    print(f"{protocol.nodes} nodes, {len(protocol.train):,} pings to learn from, {len(protocol.test):,} to ask")
    return compare(protocol, protocol.queries(options.queries, options.seed), models, options.seed)


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, run=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of rows")
    parser.add_argument("--run", type=Path, help="run folder of a trained model")
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    return run_script(parser, answer, argv)


if __name__ == "__main__":
    sys.exit(main())
