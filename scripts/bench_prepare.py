"""Prints how fast `ping-llm prepare` is and what memory it takes, as ratios to other work on the same files in the same run.

    python scripts/bench_prepare.py [--quick] [--results N] [--json FILE]
    python scripts/bench_prepare.py --scale [--quick] [--results N] [--json FILE]

ratio_to_unpack       the whole command on .bz2 dumps with 2 workers / 2 processes that only unpack them with Python's bz2
parse_ratio_to_sagan  lines a second of CPU time, to columns of measurements / to objects of ripe.atlas.sagan
cpu_ratio_to_unpack   the same of CPU time, start of the processes included: what a busy machine does not blur
peak_rss_mb           of the largest process, on N results; peak_rss_tenth_mb on a tenth of them

--scale prepares 1, 10 and 100 times N results (300,000 if absent), packed by zstd, and prints a line for each: with buckets
by the size of the dump, and with 4 buckets, each cut into portions, as those of months are. `us_more` is the processor time,
in µs and of all processes, of each result more than at the scale before: where it grows, something is not linear. Then what
the shuffle costs: the time to write a piece of so many buckets, and to read a batch of one.

ripe.atlas.sagan is installed into a virtual environment of its own; where there is no package index, its ratio is null.
"""

from __future__ import annotations

import argparse
import bz2
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from ping_llm.cli import exit_code
from ping_llm.data.ingest.atlas import parse_results
from ping_llm.data.ingest.shuffle import read_portions, write_piece
from ping_llm.data.ingest.tasks import CHUNK_BYTES
from ping_llm.data.ingest.unpack import read_chunks
from ping_llm.data.synthetic.synthesize import synthesize
from ping_llm.system.files import try_file

WORKERS = 2
DAYS, PROBES, QUICK_PROBES = 1.0, 300, 150
RESULTS_A_DAY = 790_000  # about, of 300 probes and 50 targets
PREPARE = """
import json, resource, sys
from ping_llm.data.ingest.prepare import prepare
manifest = prepare([sys.argv[1]], sys.argv[2], workers=int(sys.argv[3]), shards=int(sys.argv[4]))
usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
peak_mb = round(max(usage.ru_maxrss for usage in usages) / 1024)
cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
print(json.dumps({"lines": manifest["lines"]["read"], "peak_rss_mb": peak_mb, "cpu_s": cpu_s}))
"""
SAGAN = """
import sys, time
from ripe.atlas.sagan import PingResult
lines = open(sys.argv[1]).read().splitlines()
started = time.process_time()
for line in lines:
    PingResult(line)
print(len(lines) / (time.process_time() - started))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fourth of the dump, and 400,000 results for the memory")
    parser.add_argument("--scale", action="store_true", help="time and memory at 1, 10 and 100 times the results")
    parser.add_argument("--results", type=int, help="results of the dump for the memory; 2,000,000 if absent")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)
    with tempfile.TemporaryDirectory() as folder:
        if options.scale:
            report = measure_scales(Path(folder), options.results or 300_000, (1, 2) if options.quick else (1, 10, 100))
        else:
            report = measure(Path(folder), options.quick, options.results or (400_000 if options.quick else 2_000_000))
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report))


def measure(folder: Path, quick: bool, large: int) -> dict:
    """All numbers; `folder` is empty and holds the dumps meanwhile."""
    dump = folder / "dump"
    results = synthesize(dump, probes=QUICK_PROBES if quick else PROBES, targets=50, days=DAYS)["results"]
    files = sorted(dump.glob("ping-*.bz2"))
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        list(pool.map(abs, range(100)))  # processes are up before the clock starts
        started = time.perf_counter()
        plain_bytes, unpack_cpu_s = map(sum, zip(*pool.map(unpack, files), strict=True))
        unpack_s = time.perf_counter() - started
    started = time.perf_counter()
    prepared = prepare(dump, folder / "rows")
    prepare_s = time.perf_counter() - started

    parse_per_s, sample = parse_rate(files, folder)
    sagan_per_s = sagan_rate(sample, folder)
    report = {
        "results": results,
        "unpacked_mb": round(plain_bytes / 1e6),
        "unpack_s": round(unpack_s, 2),
        "prepare_s": round(prepare_s, 2),
        "ratio_to_unpack": round(prepare_s / unpack_s, 2),
        "cpu_ratio_to_unpack": round(prepared["cpu_s"] / unpack_cpu_s, 2),
        "results_per_s": round(prepared["lines"] / prepare_s),
        "parse_results_per_s": round(parse_per_s),
        "sagan_results_per_s": sagan_per_s and round(sagan_per_s),
        "parse_ratio_to_sagan": sagan_per_s and round(parse_per_s / sagan_per_s, 1),
    }
    for name, count in (("tenth_", large // 10), ("", large)):
        repeat(files, folder / f"large-{name}", copies=max(round(count / results), 1))
        started = time.perf_counter()
        prepared = prepare(folder / f"large-{name}", folder / f"large-{name}rows")
        report[f"memory_{name}lines"] = prepared["lines"]
        report[f"memory_{name}s"] = round(time.perf_counter() - started, 1)
        report[f"peak_rss_{name}mb"] = prepared["peak_rss_mb"]
    return report


def measure_scales(folder: Path, results: int, scales: tuple[int, ...]) -> dict:
    """Time and memory of `prepare` at each scale, and what its shuffle costs; `folder` is empty."""
    days = max(results / RESULTS_A_DAY, 0.05)
    found = synthesize(folder / "dump", probes=PROBES, targets=50, days=days)["results"]
    files = sorted((folder / "dump").glob("ping-*.bz2"))
    report: dict = {"results": found}
    for shards in (0, 4):
        before = {"lines": 0, "cpu_s": 0.0}
        for scale in scales:
            dump = folder / f"scale-{scale}"
            if not dump.exists():
                repeat(files, dump, scale, days)
            started = time.perf_counter()
            prepared = prepare(dump, folder / "rows", shards)
            prepared["wall_s"] = round(time.perf_counter() - started, 1)
            more = (prepared["cpu_s"] - before["cpu_s"]) / (prepared["lines"] - before["lines"])
            prepared |= {"cpu_s": round(prepared["cpu_s"], 1), "us_more": round(1e6 * more, 2)}
            report[f"{scale}x" + (f" in {shards} buckets" if shards else "")] = before = prepared
            print(f"{scale}x, {shards or 'by size'}: {prepared}", flush=True)
            shutil.rmtree(folder / "rows")
    return report | shuffle_costs(folder / "scale-1", folder / "pieces")


def shuffle_costs(dump: Path, folder: Path) -> dict:
    """Milliseconds to write one piece of so many buckets, and µs to read each of its batches."""
    path = folder / "chunk.ndjson"
    folder.mkdir()
    lines = next(read_chunks(next(dump.iterdir()), path, CHUNK_BYTES))
    table, _ = parse_results(path, lines)
    costs: dict = {"piece_measurements": len(table)}
    for buckets in (4, 256, 6000):
        times = []
        for _ in range(3):
            started = time.process_time()
            write_piece(folder / "piece-00000.arrow", table, buckets)
            times.append(time.process_time() - started)
        costs[f"write_{buckets}_buckets_ms"] = round(1e3 * min(times), 1)
        read = range(0, buckets, max(buckets // 100, 1))
        started = time.process_time()
        for bucket in read:
            list(read_portions([folder], bucket, folder / "scratch"))
        costs[f"read_{buckets}_buckets_us_a_batch"] = round(1e6 * (time.process_time() - started) / len(read))
    return costs


def prepare(dump: Path, rows: Path, shards: int = 0) -> dict:
    """Runs `prepare` in processes of its own; its lines, and the peak of the largest of these processes."""
    command = [sys.executable, "-c", PREPARE, dump, rows, str(WORKERS), str(shards)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def unpack(path: Path) -> tuple[int, float]:
    """Bytes in a .bz2 file once unpacked, and the CPU time that this took."""
    started = time.process_time()
    with bz2.open(path) as file:
        size = sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))
    return size, time.process_time() - started


def parse_rate(files: list[Path], folder: Path) -> tuple[float, Path]:
    """Lines a second of CPU time of `parse_results`, over the chunks that `prepare` makes, and a file of 20,000 lines."""
    whole, sample = folder / "whole.bz2", folder / "sample.ndjson"
    whole.write_bytes(b"".join(path.read_bytes() for path in files))
    lines, seconds = 0, 0.0
    path = folder / "chunk.ndjson"
    for count in read_chunks(whole, path, CHUNK_BYTES):
        if not lines:
            with path.open() as file:
                sample.write_text("".join(islice(file, 20_000)))
            parse_results(path, count)  # opens the database
        started = time.process_time()
        parse_results(path, count)
        seconds += time.process_time() - started
        lines += count
    return lines / seconds, sample


def sagan_rate(sample: Path, folder: Path) -> float | None:
    """Lines a second of CPU time of ripe.atlas.sagan; None if it cannot be installed."""
    python = folder / "venv" / "bin" / "python"
    try:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, stdout=subprocess.DEVNULL)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "ripe.atlas.sagan"]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"ripe.atlas.sagan cannot be installed ({error}); its ratio is left out", file=sys.stderr)
        return None
    done = subprocess.run([python, "-c", SAGAN, sample], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def repeat(files: list[Path], folder: Path, copies: int, days: float = DAYS) -> None:
    """A dump of `copies` times the results of `files`, each copy as much later as the dump is long; fast to unpack."""
    folder.mkdir()
    plain = folder.with_name("plain.ndjson")
    if not plain.exists():
        plain.write_bytes(b"".join(bz2.decompress(path.read_bytes()) for path in files))
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        list(pool.map(partial(write_copy, plain, folder, days), range(copies)))


def write_copy(plain: Path, folder: Path, days: float, copy: int) -> None:
    """One .zst file of all results."""
    import zstandard

    shift_s = copy * round(days * 86_400)

    def later(match: re.Match) -> bytes:
        return b'"timestamp":%d' % (int(match[1]) + shift_s)

    packer, path = zstandard.ZstdCompressor(level=1), folder / f"copy-{copy:05d}.zst"
    with zstandard.open(path, "wb", packer) as out, plain.open("rb") as lines:
        while block := b"".join(lines.readlines(1 << 24)):
            out.write(re.sub(rb'"timestamp":(\d+)', later, block))


if __name__ == "__main__":
    sys.exit(exit_code(main))
