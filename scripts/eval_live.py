"""Pings hosts from here, now, and prints what a model expected beside what came.

    python scripts/eval_live.py RUN --src MY_PUBLIC_ADDRESS HOST [HOST …] [--count 3] [--json FILE]

Each host is asked about after the pings of the hosts before it, as context.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ping_llm.eval.live import compare_live
from ping_llm.eval.report import lines_as_text
from ping_llm.inference.predictor import PingModel


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a trained model")
    parser.add_argument("hosts", nargs="+", metavar="HOST")
    parser.add_argument("--src", required=True, help="the public address of this machine")
    parser.add_argument("--count", type=int, default=3, help="pings of each host")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    lines = compare_live(PingModel.load(options.run, options.device), options.src, options.hosts, options.count)
    print(lines_as_text(lines))
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
