"""A sweep file in; the list of its runs for a job array, and the numbers of those that are left, out.

    python -m ping_llm.launch.sweep_array SWEEP.toml [--out FOLDER]

slurm/submit calls it. It checks the sweep before any job starts, writes each run's config, and prints the path of a list
with a config a line, and what `sbatch --array` is given: `0,2-3`; nothing if all runs are done. A list is never changed, so
jobs of an earlier one that still wait find their runs.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ping_llm.launch.sweep import SweepRun, check_sweep, read_sweep
from ping_llm.system.exits import exit_code
from ping_llm.system.files import write_atomically


def write_list(runs: Sequence[SweepRun]) -> Path:
    """A file beside the runs with the path of each one's config a line; its name is a hash of them."""
    text = "".join(f"{run.write_config()}\n" for run in runs)
    path = runs[0].folder.parent / f"runs-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
    if not path.exists():
        write_atomically(path, text)
    return path


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as `sbatch --array` takes them: 0, 2, 3, 4 → `0,2-4`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)


def main(argv: Sequence[str]) -> int:
    """Prints the list and the numbers of the runs that are left; exit code 1 after one line that says what is wrong."""
    return exit_code(lambda: _print_left(argv))


def _print_left(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("slurm/submit sweep", allow_abbrev=False, add_help=False)
    parser.add_argument("file", type=Path, metavar="SWEEP.toml")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(list(argv))
    runs = read_sweep(options.file, options.out)
    if left := check_sweep(runs):
        print(write_list(runs), ranges([runs.index(run) for run in left]))
    else:
        print(f"all {len(runs)} runs in {runs[0].folder.parent} are done", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
