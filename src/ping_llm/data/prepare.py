"""Dumps in, a folder of probe rows out: unpack, parse, group by probe, drop repeats, sort, split, write.

Two rounds of pure tasks over files (see tasks): one a dump, then one a bucket of probes. All scratch is in the folder
`.partial` of the output; a run that was killed goes on where it stopped. The result depends on the inputs and options alone:
not on the number of workers, nor on the order of the inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ping_llm.data.atlas import DROPPED_LINES, MAX_CLOCK_SKEW_S, Packets
from ping_llm.data.progress import cores, show_progress
from ping_llm.data.rows import FORMAT_VERSION, INDEX_NAME, MANIFEST_NAME, read_manifest, shard_name
from ping_llm.data.splits import PARTS, Split, SplitRule
from ping_llm.data.tasks import MapTask, ReduceTask, map_dump, merge_sources, reduce_bucket
from ping_llm.data.truth import TRUTH_NAME

PARTIAL_NAME = ".partial"
DUMP_SUFFIXES = (".bz2", ".gz", ".zst", ".json", ".jsonl", ".ndjson")
PLAN_NAME = "plan.json"
STDIN = "-"

BUCKET_MEASUREMENTS = 1_000_000
"""Aimed at; sorting and writing takes about 300 bytes each, and groups are of uneven size."""
MIN_BUCKETS = 4
RESULT_BYTES = {".bz2": 30, ".gz": 40, ".zst": 40}
"""Bytes that a result takes in a dump, from below; plain JSON takes 400. For the number of buckets only."""


@dataclass(frozen=True)
class Dump:
    """One input, as the manifest names it: equal dumps give equal rows."""

    path: Path
    name: str
    bytes: int
    sha256: str

    def identity(self) -> dict:
        """What tells a dump from another."""
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}


def prepare(
    inputs: Sequence[str | Path],
    out: Path | str,
    workers: int = 0,
    packets: Packets = "one",
    split: Split = "pingbench",
    shards: int = 0,
    keep_going: bool = False,
    max_clock_skew_s: int = MAX_CLOCK_SKEW_S,
) -> dict:
    """Turns Atlas dumps into probe rows in `out`; gives the manifest.

    inputs: dumps (.bz2, .gz, .zst, plain), folders of them, or "-" for standard input.
    workers: processes; 0 = one a core. shards: of each part; 0 = by the size of the inputs.
    keep_going: use what can be read of damaged dumps, and name them in the manifest.
    A folder that holds these rows already is left as it is. ValueError says what was wrong with an input or the folder.
    """
    out = Path(out)
    if workers < 0 or shards < 0 or max_clock_skew_s < 0:
        raise ValueError(f"{workers=}, {shards=} and {max_clock_skew_s=} must be 0 or more")
    partial = out / PARTIAL_NAME
    dumps = _read_inputs(inputs, partial, workers or cores())
    options = {"packets": packets, "split": split, "shards": shards, "max_clock_skew_s": max_clock_skew_s}
    plan = {"format_version": FORMAT_VERSION, "inputs": [dump.identity() for dump in dumps], "options": options}
    if (out / MANIFEST_NAME).exists():
        return _finished(out, plan)
    _begin(out, partial, plan)
    buckets = shards or _bucket_count(dumps, packets)
    rule = SplitRule() if split == "pingbench" else None
    with _pool(workers or cores(), len(dumps)) as pool:
        folders = [partial / f"input-{number:05d}" for number in range(len(dumps))]
        maps = [
            MapTask(dump.path, dump.name, folder, buckets, packets, max_clock_skew_s)
            for dump, folder in zip(dumps, folders, strict=True)
        ]
        map_reports = _run_maps(pool, maps, dumps, keep_going)
        merge_sources(folders, partial / "sources.arrow", rule or SplitRule())
        reduces = [
            ReduceTask(number, tuple(folders), partial / "sources.arrow", partial / f"bucket-{number:05d}", rule)
            for number in range(buckets)
        ]
        with show_progress("group, sort, split", buckets, "buckets") as advance:
            reduce_reports = _run(pool, reduce_bucket, reduces, lambda *_: advance(1))
    manifest = _manifest(plan, map_reports, reduce_reports, rule)
    manifest |= _publish([task.folder for task in reduces], out)
    _write_atomically(out / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(partial)
    return manifest


def summary(manifest: dict) -> str:
    """The counters and parts of a manifest as a table of text."""
    lines, measurements = manifest["lines"], manifest["measurements"]
    table = [("lines read", lines["read"], "")]
    table += [(f"  {name}", count, DROPPED_LINES.get(name, "")) for name, count in lines["counters"].items() if count]
    table += [(f"measurements {name}", count, "") for name, count in measurements.items()]
    table += [(f"  {part}", count, f"{manifest['rows'][part]:,} rows") for part, count in manifest["parts"].items()]
    text = [f"{name:<40} {count:>15,}  {note}".rstrip() for name, count, note in table]
    return "\n".join(text + [f"kept going: {entry['problem']}" for entry in manifest["inputs"] if "problem" in entry])


def _read_inputs(inputs: Sequence[str | Path], partial: Path, workers: int) -> list[Dump]:
    """Every input with its hash, in an order that does not depend on the one given."""
    if not inputs:
        raise ValueError("no input; name the dumps, for example dump/ping-*.bz2, or their folder")
    paths = {}
    for path in map(Path, inputs):
        if str(path) == STDIN:
            paths[_spool_stdin(partial)] = "stdin"
        elif path.is_dir():
            paths |= {dump.resolve(): dump.name for dump in _dumps_in(path)}
        elif not path.exists():
            raise ValueError(f"no file {path}; check the name")
        else:
            paths[path.resolve()] = path.name
    with ThreadPoolExecutor(workers) as threads:
        hashes = list(threads.map(_sha256, paths))
    dumps = [Dump(path, name, path.stat().st_size, h) for (path, name), h in zip(paths.items(), hashes, strict=True)]
    return sorted(dumps, key=lambda dump: (dump.name, dump.sha256))


def _dumps_in(folder: Path) -> list[Path]:
    """The files of a folder that are named like dumps; the truth of a synthetic one is none."""
    dumps = [path for path in folder.iterdir() if path.suffix in DUMP_SUFFIXES and path.name != TRUTH_NAME]
    if not dumps:
        raise ValueError(f"{folder} holds no dumps, that is, no files ending in {', '.join(DUMP_SUFFIXES)}")
    return dumps


def _spool_stdin(partial: Path) -> Path:
    """Standard input as a file, which another process can read and a second look can hash."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "stdin").open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return partial / "stdin"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None


def _finished(out: Path, plan: dict) -> dict:
    """The manifest that is there, if it is of the same plan."""
    manifest = read_manifest(out)
    identity = Dump.__dataclass_fields__.keys() - {"path"}
    there = [{name: entry[name] for name in entry if name in identity} for entry in manifest["inputs"]]
    shutil.rmtree(out / PARTIAL_NAME, ignore_errors=True)
    if {"inputs": there, "options": manifest["options"]} != {name: plan[name] for name in ("inputs", "options")}:
        raise ValueError(f"{out} holds the rows of other inputs or options; choose another --out or delete the folder")
    print(f"{out} already holds these rows; nothing to do", file=sys.stderr)
    return manifest


def _begin(out: Path, partial: Path, plan: dict) -> None:
    """Makes the scratch folder ready: with what an interrupted run of the same plan left in it, else empty."""
    shards = [path for part in PARTS for path in out.glob(f"{part}-?????-of-?????.arrayrecord")]
    if shards and not partial.exists():
        raise ValueError(f"{out} holds shards but no {MANIFEST_NAME}; choose another --out or delete the folder")
    text = json.dumps(plan, indent=1)
    there = partial / PLAN_NAME
    if not there.exists() or there.read_text() != text:
        for old in (*partial.glob("input-*"), *partial.glob("bucket-*")):
            shutil.rmtree(old)
    partial.mkdir(parents=True, exist_ok=True)
    for bucket in partial.glob("bucket-*"):  # killed while it published: some shards were moved out already
        if shards:
            shutil.rmtree(bucket)
    for shard in shards:
        shard.unlink()
    _write_atomically(there, text)


class _Inline(Executor):
    """Runs each task at once, in this process: one worker needs no other."""

    def submit(self, function: Callable, /, *args: object) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


def _pool(workers: int, tasks: int) -> Executor:
    """Processes are spawned: a fork would copy the threads' locks of DuckDB and Arrow."""
    return _Inline() if min(workers, tasks) == 1 else ProcessPoolExecutor(min(workers, tasks), get_context("spawn"))


def _run(pool: Executor, function: Callable, tasks: Sequence, done: Callable[[int, dict], None]) -> list[dict]:
    """The reports of all tasks, in order; `done(i, report)` is called as each comes in, and may raise to stop the rest."""
    reports: list[dict] = [{}] * len(tasks)
    try:
        futures = {pool.submit(function, task): i for i, task in enumerate(tasks)}
        for future in as_completed(futures):
            i = futures[future]
            reports[i] = future.result()
            done(i, reports[i])
    except BrokenProcessPool:
        raise ValueError(
            "a worker was killed, most likely for want of memory; repeat the command with fewer --workers: it continues"
        ) from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return reports


def _run_maps(pool: Executor, tasks: Sequence[MapTask], dumps: Sequence[Dump], keep_going: bool) -> list[dict]:
    """Parses all dumps, the large ones first so that no worker ends alone with one; ValueError at the first damaged one."""
    order = sorted(range(len(tasks)), key=lambda i: (-dumps[i].bytes, i))
    with show_progress("unpack, parse", sum(dump.bytes for dump in dumps) / 1e6, "MB") as advance:

        def done(i: int, report: dict) -> None:
            if report["problem"] and not keep_going:
                raise ValueError(f"{report['problem']}, or --keep-going with what can be read")
            advance(dumps[order[i]].bytes / 1e6)

        reports = _run(pool, map_dump, [tasks[i] for i in order], done)
    return [report for _, report in sorted(zip(order, reports, strict=True), key=lambda pair: pair[0])]


def _manifest(plan: dict, maps: Sequence[dict], reduces: Sequence[dict], rule: SplitRule | None) -> dict:
    """The manifest but for what is known once the shards stand; ValueError if no measurement is left."""
    counters = {name: sum(report[name] for report in reduces) for name in ("kept", "duplicate")}
    counters |= {name: sum(report["counters"].get(name, 0) for report in maps) for name in DROPPED_LINES}
    read = sum(report["lines"] for report in maps)
    assert sum(counters.values()) == read, f"{counters} do not add up to {read} lines"
    parts = {part: sum(report["parts"][part] for report in reduces) for part in PARTS}
    if not any(parts.values()):
        used = ", ".join(f"{name} {count:,}" for name, count in counters.items() if count)
        raise ValueError(f"no measurement is left of {read:,} lines ({used}); prepare other dumps")
    dropped = sum(report["dropped_held_out_source"] for report in reduces)
    inputs = [
        entry | {"lines": report["lines"]} | ({"problem": report["problem"]} if report["problem"] else {})
        for entry, report in zip(plan["inputs"], maps, strict=True)
    ]
    return plan | {
        "inputs": inputs,
        "packets": plan["options"]["packets"],
        "lines": {"read": read, "counters": counters},
        "measurements": {"written": sum(parts.values()), "dropped_held_out_source": dropped},
        "parts": parts,
        "split": rule.describe() if rule else {"name": "none"},
    }


def _publish(folders: Sequence[Path], out: Path) -> dict:
    """Moves the shards of all buckets to their places and writes the index; gives {"rows", "shards": {part: n}}.

    The shards of a part are numbered without gaps, though a bucket may hold nothing of it.
    """
    tables, rows, shards = [], {}, {}
    indices = [pq.read_table(folder / INDEX_NAME) for folder in folders]
    for part in PARTS:
        held = [
            (folder, index) for folder, index in zip(folders, indices, strict=True) if part in index["part"].to_pylist()
        ]
        for shard, (folder, index) in enumerate(held):
            mine = index.filter(pc.equal(index["part"], part))
            number = pa.array([shard] * len(mine), pa.int32())
            tables.append(mine.set_column(index.column_names.index("shard"), "shard", number))
            (folder / f"{part}.arrayrecord").rename(out / shard_name(part, shard, len(held)))
        rows[part] = sum(len(table) for table in tables) - sum(rows.values())
        shards[part] = len(held)
    pq.write_table(pa.concat_tables(tables), out / f"{INDEX_NAME}.tmp")
    (out / f"{INDEX_NAME}.tmp").replace(out / INDEX_NAME)
    return {"rows": rows, "shards": shards}


def _bucket_count(dumps: Sequence[Dump], packets: Packets) -> int:
    """So many that a bucket fits well in memory; by the inputs alone, so that the shards are the same everywhere."""
    results = sum(dump.bytes / RESULT_BYTES.get(Path(dump.name).suffix, 400) for dump in dumps)
    return max(MIN_BUCKETS, round(results * (3 if packets == "all" else 1) / BUCKET_MEASUREMENTS))


def _write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
