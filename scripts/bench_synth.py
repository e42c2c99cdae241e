"""Prints how fast synthetic results are drawn and written as JSON, as a ratio to json.dumps of the same results.

    python scripts/bench_synth.py [--quick] [--json FILE]

One process, before compression; json.dumps is given ready dictionaries, so drawing counts against us alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from ping_llm.cli import exit_code
from ping_llm.data.synthetic.synthesize import Dump
from ping_llm.data.synthetic.world import build_world
from ping_llm.system.files import try_file


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the results")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)

    schedule = {"start_s": 0, "end_s": 86_400, "interval_s": 3600, "measured_share": 0.7}
    dump = Dump(build_world(0, 100, 50) | {"schedule": schedule}, Path())
    list(dump.contents(0))  # the distributions of the pairs are made once, whatever the number of results
    writer = dump.writer

    started = time.perf_counter()
    lines = [
        line
        for i in range(1 if options.quick else dump.files)
        for part, _ in dump.contents(i)
        for line in writer.lines(part)
    ]
    ours_s = time.perf_counter() - started

    results = [json.loads(line) for line in lines]
    started = time.perf_counter()
    for result in results:
        json.dumps(result, separators=(",", ":"))
    dumps_s = time.perf_counter() - started

    report = {
        "results": len(lines),
        "results_per_s": round(len(lines) / ours_s),
        "json_dumps_results_per_s": round(len(lines) / dumps_s),
        "ratio_to_json_dumps": round(dumps_s / ours_s, 3),
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report))


if __name__ == "__main__":
    sys.exit(exit_code(main))
