"""Prints what fine-tuning the demo's model on 20 minutes of pings of another Internet changes: on that one, and on its own.

    make demo && python scripts/bench_finetune.py [--base RUN] [--json FILE] [--quick]

All weights and changes of low rank; with nothing mixed in, with the rows of the base, and with samples that it makes up. The
second Internet has other addresses. Run it where the base's config finds the rows that it names.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from ping_llm import cli
from ping_llm.cli import exit_code
from ping_llm.demo import INTERNET
from ping_llm.system.files import try_file
from ping_llm.training.finetune import finetune
from ping_llm.training.options import NONE, SAMPLES, FinetuneOptions
from ping_llm.training.report import FINETUNED

DEMO = Path("out/demo/run")
MINUTES, SEED = 20, 1
LORA = 8
CASES = {  # name → rank, what is mixed in; None: the rows that the base's config names
    "all weights": (0, NONE),
    "all weights, old rows mixed in": (0, None),
    "low rank": (LORA, NONE),
    "low rank, old rows mixed in": (LORA, None),
    "all weights, samples mixed in": (0, SAMPLES),
}
LIGHT = ("--train.eval-queries", "0", "--train.sample-every", "0")  # the table has its own; nothing is calibrated
QUICK = ("--train.total-steps", "4")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=DEMO, help=f"run folder ({DEMO})")
    parser.add_argument("--quick", action="store_true", help="four steps each")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)
    report: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        rows = second_internet(Path(scratch))
        for number, (name, (rank, replay)) in enumerate(CASES.items()):
            out, began = Path(scratch) / f"run{number}", time.perf_counter()
            mixed = {} if replay is None else {"replay": replay}
            chosen = FinetuneOptions(str(options.base), rows, out, lora=rank, **mixed)
            found = finetune(chosen, [*LIGHT, *(QUICK if options.quick else ())])
            if found is None:
                raise ValueError("stopped; run it again for the whole table")
            report[name] = numbers(found) | {"seconds": round(time.perf_counter() - began, 1)}
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


def second_internet(folder: Path) -> Path:
    """Rows of some minutes of pings of an Internet of the demo's size, but of another seed."""
    dump, rows, days = folder / "dump", folder / "rows", f"{MINUTES / 1440:.6f}"
    internet = [*INTERNET[: INTERNET.index("--days")], "--days", days, "--seed", str(SEED)]
    for command in (["synth", "--out", str(dump), *internet], ["prepare", str(dump), "--out", str(rows)]):
        if code := cli.main(command):
            raise SystemExit(code)
    return rows


def numbers(found: dict) -> dict[str, dict[str, list[float]]]:
    """Before and after of each value on val of the new and the old rows."""
    return {
        rows: {name: [found[rows][when][name] for when in ("before", "after")] for name in FINETUNED}
        for rows in ("new", "old")
    }


def print_table(report: dict[str, dict]) -> None:
    for name, one in report.items():
        for rows in ("new", "old"):
            error, bits = one[rows]["val_median_rel_error"], one[rows]["val_rtt_bits"]
            changed = f"{100 * error[0]:.2f} % → {100 * error[1]:.2f} % (× {error[1] / error[0]:.3f})"
            print(f"{name:32} {rows}  median error {changed}  bits per RTT {bits[0]:.2f} → {bits[1]:.2f}")
        print(f"{'':32} in {one['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(exit_code(main))
