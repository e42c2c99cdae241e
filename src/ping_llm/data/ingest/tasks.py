"""The two kinds of task that `prepare` is made of: a dump in, pieces by bucket out; a bucket's pieces in, its shards out.

A task is a pure function of its arguments and of the files it names. It writes into a folder aside and renames it at the
end, so a folder under its final name is done, and a task that was killed is simply run again. A bucket holds whole groups,
by a hash of the group: a group's measurements can be sorted and split without looking at another bucket.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm.data.ingest import splits
from ping_llm.data.ingest.atlas import parse_results
from ping_llm.data.ingest.choices import Packets, Traceroute
from ping_llm.data.ingest.repeats import number_packets
from ping_llm.data.ingest.results import RESULT_SCHEMA
from ping_llm.data.ingest.shapes import parse_parquet, parse_text, shape_of, what_is_missing
from ping_llm.data.ingest.shuffle import SEEN_SCHEMA, ranked, read_portions, write_piece
from ping_llm.data.ingest.splits import DROPPED, PARTS, Groups, Sources, SplitRule, TimeCut
from ping_llm.data.ingest.unpack import DamagedDump, read_chunks, read_lines
from ping_llm.data.measurement import binary_column, byte_matrix
from ping_llm.data.rows import INDEX_NAME, INDEX_SCHEMA, ProbeRow, ShardWriter
from ping_llm.data.tokenization import clamped_rtts

CHUNK_BYTES = 64 << 20
"""Plain bytes parsed at once, some 140,000 results: the fixed cost of a query vanishes, and a worker's memory stays flat."""

REPORT_NAME = "report.json"
LOCK_NAME = "lock"  # beside the folders of the tasks
ASIDE = ".*.tmp"  # what follows the name of a folder while a task works on it
SOURCES_NAME = "sources.arrow"


@dataclass(frozen=True)
class MapTask:
    """Parse one dump into `folder`."""

    dump: Path
    name: str  # of the dump in messages and in the manifest
    folder: Path
    buckets: int
    packets: Packets
    max_clock_skew_s: int
    traceroute: Traceroute = "off"
    source: str | None = None  # the address of the source where the dump names none


@dataclass(frozen=True)
class ReduceTask:
    """Turn one bucket of the pieces in `inputs` into probe rows in `folder`."""

    bucket: int
    inputs: tuple[Path, ...]
    sources: Path
    folder: Path
    rule: SplitRule | None  # None: everything is train
    cut: TimeCut | None = None  # of all inputs, with a rule


def map_dump(task: MapTask) -> dict:
    """Lines to pieces; gives {"lines", "counters": of dropped lines and replies, "times": see `count_times`, "problem": why
    not all was read, or None}.

    OSError if the pieces cannot be written: then the task is not done.
    """
    if task.folder.exists():
        report = json.loads((task.folder / REPORT_NAME).read_text())
        if not report["problem"]:  # a disk that would not be read may be well again
            return report
        shutil.rmtree(task.folder)
    aside = _fresh_folder(task.folder)
    counters: Counter[str] = Counter()
    times: Counter[int] = Counter()
    lines, problem = 0, None
    seen = SEEN_SCHEMA.empty_table()
    try:
        for number, (read, table, counts) in enumerate(_parsed(task, aside / "chunk.ndjson")):
            lines += read
            counters.update(counts)
            times.update(splits.count_times(table["time_s"].to_numpy()))
            if table.num_rows:
                sources = write_piece(aside / f"piece-{number:05d}.arrow", table, task.buckets)
                seen = pa.concat_tables([seen, sources]).group_by(SEEN_SCHEMA.names).aggregate([])
    except DamagedDump as error:
        problem = str(error)
    problem = problem or _problem(task, lines, counters)
    _write_table(aside / SOURCES_NAME, seen)
    report = {"lines": lines, "counters": dict(counters), "times": dict(times), "problem": problem}
    return _finish(aside, task.folder, report)


def _problem(task: MapTask, lines: int, counters: Counter[str]) -> str | None:
    """Why a dump that was read to its end is none, or None if it is one; by the counters of its lines."""
    malformed, lines = counters["malformed_json"], lines - counters["blank_line"]
    if 2 * malformed <= lines:  # of an empty one too: a measurement may give nothing
        return None
    such, then = _malformed_line(task.dump), "get it again or leave it out"
    if malformed == lines:
        return f"{task.name} is no Atlas dump: none of its {lines:,} lines is a JSON result{such}; {then}"
    return (
        f"{task.name} is mostly no Atlas dump: {malformed:,} of its {lines:,} lines are no JSON results{such}; {then}"
    )


def _malformed_line(dump: Path) -> str:
    """How the first line that is no JSON object begins and ends; empty where there is none at the begin of the dump."""
    for number, line in enumerate(next(read_lines(dump, []), b"").splitlines(), 1):
        try:
            is_object = isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            is_object = False
        if line.strip() and not is_object:
            shown = str(line[:30])[1:] + (f" … {str(line[-10:])[1:]}" if len(line) > 40 else "")
            return f", such as line {number}, {shown}"
    return ""


def reduce_bucket(task: ReduceTask) -> dict:
    """Pieces to shards; gives {"kept", "duplicate": lines, "parts", "dropped_…", "clamped_rtt": measurements}."""
    if task.folder.exists():
        return json.loads((task.folder / REPORT_NAME).read_text())
    aside = _fresh_folder(task.folder)
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        shards: dict[str, ShardWriter] = {}
        for table in read_portions(task.inputs, task.bucket, aside / "portions"):
            counts.update(_reduce(task, table, aside, shards, stack))
    report: dict[str, Any] = {name: counts[name] for name in ("kept", "duplicate", "dropped_repeated")}
    report["parts"] = {part: counts[part] for part in PARTS}
    report |= {name: counts[name] for name in ("dropped_held_out", "clamped_rtt")}
    index = [line for part in PARTS if part in shards for line in shards[part].index]
    pq.write_table(pa.Table.from_pylist(index, INDEX_SCHEMA), aside / INDEX_NAME)
    return _finish(aside, task.folder, report)


def _reduce(
    task: ReduceTask, table: pa.Table, folder: Path, shards: dict[str, ShardWriter], stack: ExitStack
) -> dict[str, int]:
    """Adds whole groups to the shards of their parts, in `folder`; gives the counts of the report, parts among them."""
    results = _sorted_results(table)
    first, repeated = results["first_of_line"], results["repeated"]
    counts = {"kept": int((first & ~repeated).sum()), "duplicate": int((first & repeated).sum())}
    counts["dropped_repeated"] = int(repeated.sum())
    results = results.take(~repeated)
    part = np.zeros(len(results["time_s"]), dtype=np.uint8)
    if task.rule and task.cut:
        sides = (results["src"], results.src_addresses, results["dst"], results.dst_addresses)
        groups = Groups(results["group"], results.group_keys)
        seen = pa.ipc.open_file(task.sources).read_all()
        sources = Sources(byte_matrix(seen["address"]), byte_matrix(seen["owner"]), seen["band"].to_numpy())
        part = splits.assign_parts(groups, results["time_s"], *sides, sources, task.rule, task.cut)
    names = (*PARTS, "dropped_held_out")
    counts |= dict(zip(names, np.bincount(part, minlength=len(names)).tolist(), strict=True))
    counts["clamped_rtt"] = clamped_rtts(results["rtt_ms"][part != DROPPED])
    _write_shards(folder, results, part, task.bucket, shards, stack)
    return counts


def merge_sources(inputs: Sequence[Path], path: Path, rule: SplitRule) -> None:
    """Every source address of all inputs, its owner and the band of its groups, in one file for all buckets."""
    seen = SEEN_SCHEMA.empty_table()
    for folder in inputs:  # one by one: they are about the same sources
        more = pa.ipc.open_file(folder / SOURCES_NAME).read_all()
        seen = pa.concat_tables([seen, more]).group_by(SEEN_SCHEMA.names).aggregate([])
    seen = seen.combine_chunks()
    sources = splits.collect_sources(byte_matrix(seen["key"]), byte_matrix(seen["address"]), rule)
    columns = {
        "address": binary_column(sources.addresses),
        "owner": binary_column(sources.owner),
        "band": pa.array(sources.band),
    }
    _write_table(path, pa.table(columns))


def _parsed(task: MapTask, scratch: Path) -> Iterator[tuple[int, pa.Table, dict[str, int]]]:
    """Of each chunk of a dump: its lines, their measurements, and the counters of the rest."""
    options = (task.packets, task.max_clock_skew_s, task.source)
    if rows := parse_parquet(task.dump, task.name, *options):
        return (yield from rows)
    chunks = read_chunks(task.dump, scratch, CHUNK_BYTES)
    first = next(chunks, 0)
    if not first:
        return
    if (shape := shape_of(scratch)) != "results":
        return (yield from parse_text(shape, task.dump, chain([first], chunks), scratch, task.name, *options))
    used, missing = 0, what_is_missing(scratch)
    for lines in chain([first], chunks):
        for read, table, counts in _parsed_lines(task, scratch, lines):
            used += len(table)
            yield read, table, counts
    if missing and not used:
        raise DamagedDump(f"{task.name} holds no {', no '.join(missing)}; leave it out")


def _parsed_lines(task: MapTask, path: Path, lines: int) -> Iterator[tuple[int, pa.Table, dict[str, int]]]:
    """A chunk; by halves where its values are too many for the memory of the database: a line of too many is malformed."""
    import duckdb

    try:
        yield lines, *parse_results(path, lines, task.packets, task.max_clock_skew_s, task.traceroute)
    except duckdb.OutOfMemoryException:
        if lines == 1:
            yield 1, RESULT_SCHEMA.empty_table(), {"malformed_json": 1}
            return
        half = path.with_name(f"{path.name}-")
        for begin, end in pairwise((0, lines // 2, lines)):
            with path.open("rb") as file, half.open("wb") as part:
                part.writelines(islice(file, begin, end))
            yield from _parsed_lines(task, half, end - begin)
        half.unlink()


@dataclass(frozen=True)
class _Results:
    """The packets of a bucket. Columns, (n,) each: _COLUMNS, `group` and `repeated`; src and dst index addresses."""

    columns: dict[str, np.ndarray]
    group_keys: np.ndarray
    src_addresses: np.ndarray
    dst_addresses: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def take(self, chosen: np.ndarray) -> _Results:
        """Those that an (n,) bool or an index chooses."""
        return replace(self, columns={name: column[chosen] for name, column in self.columns.items()})


_COLUMNS = ("probe_id", "msm_id", "time_s", "rtt_ms", "kind", "packet", "first_of_line", "input")


def _sorted_results(table: pa.Table) -> _Results:
    """By group, then time, then every column, so that the order in which the pieces came leaves no trace.

    `repeated` marks those that an earlier line gave already.
    """
    src, src_addresses = ranked(table["src"])
    dst, dst_addresses = ranked(table["dst"])
    columns = {name: table[name].to_numpy() for name in _COLUMNS} | {"src": src, "dst": dst}
    groups = splits.group_measurements(columns["probe_id"], src, src_addresses)
    when, pair = groups.index << 32 | columns["time_s"], dst << 32 | src
    identity = (pair, columns["msm_id"], when)
    same = (number_packets(columns["packet"], columns["rtt_ms"], columns["input"], identity), *identity)
    # RTTs as bits: −1 comes after every RTT
    order = np.lexsort((columns["first_of_line"], columns["kind"], columns["rtt_ms"].view(np.uint32), *same))
    repeated = np.zeros(len(order), dtype=bool)
    repeated[order[1:]] = np.logical_and.reduce([np.diff(column[order]) == 0 for column in same])
    columns |= {"group": groups.index, "repeated": repeated}
    return _Results(columns, groups.keys, src_addresses, dst_addresses).take(order)


def _write_shards(
    folder: Path, results: _Results, part: np.ndarray, bucket: int, shards: dict[str, ShardWriter], stack: ExitStack
) -> None:
    """Adds rows to the shard of each part that has measurements; a new one is opened, and closed with the stack."""
    for number, name in enumerate(PARTS):
        held = results.take(part == number)
        if not len(held["time_s"]):
            continue
        if name not in shards:
            shards[name] = stack.enter_context(ShardWriter(folder / f"{name}.arrayrecord", name, bucket))
        borders = np.flatnonzero(np.diff(held["group"], prepend=-1, append=-1))
        for begin, end in pairwise(borders.tolist()):
            names = ("time_s", "msm_id", "src", "dst", "rtt_ms", "kind")
            time_s, msm_id, src, dst, rtt_ms, kind = (held[column][begin:end] for column in names)
            addresses = held.src_addresses, held.dst_addresses
            probe_id = int(held["probe_id"][begin])
            shards[name].write(ProbeRow.from_codes(probe_id, time_s, msm_id, src, dst, rtt_ms, kind, *addresses))


def _write_table(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def _fresh_folder(folder: Path) -> Path:
    """An empty folder beside `folder`, in which a task works.

    Its name is new: a process of a killed run may go on for a second, and must not write into the folder of its successor.
    """
    for left in folder.parent.glob(folder.name + ASIDE):
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(folder.name + ASIDE.replace("*", uuid4().hex[:8]))
    aside.mkdir(parents=True)
    return aside


def _finish(aside: Path, folder: Path, report: dict) -> dict:
    """Gives the folder its final name; if the same task was finished elsewhere meanwhile, that one stays."""
    (aside / REPORT_NAME).write_text(json.dumps(report))
    try:
        aside.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(aside)
    return report
