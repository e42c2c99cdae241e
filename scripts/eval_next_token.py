"""Prints how well a model tells each kind of token, and some windows colored by how surprising each token was.

python scripts/eval_next_token.py RUN --data ROWS [--part test-s1] [--windows 64] [--show 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ping_llm.checkpoint import load_model
from ping_llm.eval.report import lines_as_text
from ping_llm.eval.tokens import colored, part_windows, score_tokens
from ping_llm.inference.predictor import PingModel


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a trained model")
    parser.add_argument("--data", type=Path, required=True, help="folder of rows")
    parser.add_argument("--part", default="test-s1")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--show", type=int, default=1, help="windows that are printed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    model, (_, config, _) = PingModel.load(options.run, options.device), load_model(options.run)
    scores = score_tokens(model, part_windows(config, options.data, options.part, options.windows))
    for window in range(min(options.show, options.windows)):
        print(colored(scores, window) + "\n")
    lines = scores.table()
    print(lines_as_text(lines))
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
