"""Prints how well a model tells each kind of token, and some windows colored by how surprising each token was.

python scripts/eval_next_token.py RUN --data ROWS [--part test-s1] [--windows 64] [--show 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ping_llm.eval.script import run_script, script_parser
from ping_llm.eval.tokens import colored, part_windows, score_tokens
from ping_llm.inference.model import PingModel
from ping_llm.model.checkpoint import load_model


def answer(options: argparse.Namespace) -> list[dict]:
    model, (_, config, _) = PingModel.load(options.run, options.device), load_model(options.run)
    scores = score_tokens(model, part_windows(config, options.data, options.part, options.windows))
    for window in range(min(options.show, options.windows)):
        print(colored(scores, window) + "\n")
    return scores.table()


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of rows")
    parser.add_argument("--part", default="test-s1", help="part of the rows")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--show", type=int, default=1, help="windows that are printed")
    return run_script(parser, answer, argv)


if __name__ == "__main__":
    sys.exit(main())
