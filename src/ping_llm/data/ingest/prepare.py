"""Dumps in, a folder of probe rows out: unpack, parse, group by probe, drop repeats, sort, split, write.

Two rounds of pure tasks over files (see tasks): one a dump, then one a bucket of probes. All scratch is in the folder
`.partial` of the output; a run that was killed goes on where it stopped. The result depends on the inputs and options alone:
not on the number of workers, nor on the order of the inputs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ping_llm.data.ingest.choices import Packets, Split, Traceroute
from ping_llm.data.ingest.executors import ARRAY, LOCAL, check_executor, open_executor, run_tasks
from ping_llm.data.ingest.inputs import Dump, find_inputs, packed_suffix, read_inputs, spooled, streams
from ping_llm.data.ingest.plan import Plan, bucket_count, packed_share
from ping_llm.data.ingest.results import DROPPED_LINES, MAX_CLOCK_SKEW_S
from ping_llm.data.ingest.shuffle import MAX_BUCKETS
from ping_llm.data.ingest.splits import PARTS, SplitRule, TimeCut
from ping_llm.data.ingest.tasks import (
    ASIDE,
    CHUNK_BYTES,
    LOCK_NAME,
    MapTask,
    ReduceTask,
    map_dump,
    merge_sources,
    reduce_bucket,
)
from ping_llm.data.ingest.traceroute import REPLIES
from ping_llm.data.measurement import is_public, pack_addresses
from ping_llm.data.rows import FORMAT_VERSION, INDEX_NAME, MANIFEST_NAME, read_manifest, shard_name
from ping_llm.system.files import full_disk_is_one_line, move_atomically, write_atomically, write_lock
from ping_llm.system.progress import by_part, cores, show_progress

PARTIAL_NAME = ".partial"
IDENTITY_NAME = "identity.json"

WATCH_EVERY_S = 1.0
INLINE_S = 1.0  # what takes less is done in this process by default: to start others takes as long


@full_disk_is_one_line
def prepare(
    inputs: Sequence[str | Path],
    out: Path | str,
    workers: int = 0,
    packets: Packets = "one",
    split: Split = "pingbench",
    shards: int = 0,
    keep_going: bool = False,
    max_clock_skew_s: int = MAX_CLOCK_SKEW_S,
    executor: str | Executor = LOCAL,
    traceroute: Traceroute = "off",
    time_cut: TimeCut | None = None,
    source: str | None = None,
) -> dict[str, Any]:
    """Turns Atlas dumps into probe rows in `out`; gives the manifest.

    inputs: dumps, tables, logs of ping, plain or packed; pipes, folders, patterns like dump/*.bz2, "-" for standard input.
    workers: processes; 0 = one a core. shards: of each part, at most (256 are the most); 0 = by the size of the inputs.
    keep_going: use what can be read of damaged dumps and of those that are mostly no dumps, and name them in the manifest.
    traceroute: count and drop traceroutes, or measure their targets, or all hops (see traceroute.py).
    time_cut: when val and test begin, instead of where the quantiles of all measurements lie (see splits.py).
    source: the public address of the source, for inputs that name none: logs and tables of ping.
    executor: where the tasks run, by a name of executors.py, or an open one whose workers see the same folders.
    A folder that holds these rows already is left as it is. ValueError says what was wrong with an input or the folder, such
    as that another process writes there.
    """
    out = Path(out)
    if max_clock_skew_s < 0:
        raise ValueError(f"{max_clock_skew_s=} must be 0 or more")
    if time_cut:
        check_time_cut(time_cut, split)
    if source:
        check_source(source)
    if isinstance(executor, str):
        check_executor(executor)
    partial = out.absolute() / PARTIAL_NAME  # workers elsewhere may run in another folder
    named = find_inputs(inputs)
    if executor == ARRAY and streams(named):
        raise ValueError(f"{streams(named)[0]} can be read only once, and by no other job; name files")
    with _only_writer(out, partial), spooled(named, partial) as paths:
        plan = _plan(paths, workers, packets, shards, executor)
        dumps = read_inputs(paths)
        options: dict[str, Any] = {"packets": packets, "split": split, "shards": shards}
        options |= {"max_clock_skew_s": max_clock_skew_s, "traceroute": traceroute}
        options["time_cut"] = asdict(time_cut) if time_cut else None
        options |= {"source": source} if source else {}
        identity = {"format_version": FORMAT_VERSION, "inputs": [dump.identity() for dump in dumps], "options": options}
        if (out / MANIFEST_NAME).exists():
            return _finished(out, identity)
        _begin(out, partial, identity)
        manifest = _make_rows(out, partial, identity, dumps, plan, executor, keep_going, time_cut)
        shutil.rmtree(
            partial, ignore_errors=True
        )  # a process of a killed run may live for a second yet, and write there
        return manifest


def _make_rows(
    out: Path,
    partial: Path,
    identity: dict[str, Any],
    dumps: Sequence[Dump],
    plan: Plan,
    executor: str | Executor,
    keep_going: bool,
    time_cut: TimeCut | None,
) -> dict[str, Any]:
    """Runs all tasks and publishes the rows; gives the manifest."""
    options = identity["options"]
    rule = SplitRule() if options["split"] == "pingbench" else None
    with open_executor(executor, plan.workers) if isinstance(executor, str) else nullcontext(executor) as pool:
        folders = [partial / f"input-{number:05d}" for number in range(len(dumps))]
        names = ("packets", "max_clock_skew_s", "traceroute", "source")
        options_of_map = (plan.buckets, *map(options.get, names))
        maps = [MapTask(d.path, d.name, folder, *options_of_map) for d, folder in zip(dumps, folders, strict=True)]
        map_reports = _run_maps(pool, maps, dumps, keep_going)
        if all(map(_is_empty, map_reports)):
            who = (
                f"{dumps[0].name} is empty: it holds"
                if len(dumps) == 1
                else f"all {len(dumps)} inputs are empty: they hold"
            )
            raise ValueError(f"{who} no results; get others")
        merge_sources(folders, partial / "sources.arrow", rule or SplitRule())
        cut = time_cut or _time_cut(map_reports, rule) if rule else None
        reduces = [
            ReduceTask(number, tuple(folders), partial / "sources.arrow", partial / f"bucket-{number:05d}", rule, cut)
            for number in range(plan.buckets)
        ]
        with show_progress("group, sort, split", plan.buckets, "buckets") as advance:
            reduce_reports = run_tasks(pool, reduce_bucket, reduces, lambda *_: advance(1))
    manifest = _manifest(identity, map_reports, reduce_reports, rule, cut)
    manifest |= _publish([task.folder for task in reduces], out)
    write_atomically(out / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")
    return manifest


def check_time_cut(time_cut: TimeCut, split: Split) -> None:
    """ValueError if nothing can be cut there."""
    if split != "pingbench":
        raise ValueError(f'a time cut goes with the split "pingbench", not "{split}"')
    if time_cut.val_from_s >= time_cut.test_from_s:
        raise ValueError(f"{time_cut} must name two times, the earlier one first")


def check_source(source: str) -> None:
    """ValueError if it is not the address of a host on the public Internet."""
    packed, valid = pack_addresses([source])
    if not valid[0]:
        raise ValueError(f"--source {source} is not an IPv4 or IPv6 address")
    if not is_public(packed)[0]:
        raise ValueError(f"--source {source} is private or reserved; give the public address that others see")


def plan_rows(
    inputs: Sequence[str | Path], workers: int = 0, packets: Packets = "one", shards: int = 0, executor: str = LOCAL
) -> Plan:
    """What `prepare` of the same arguments would do; reads nothing but the sizes of the files, and writes nothing."""
    paths = find_inputs(inputs)
    if streams(paths):
        names = {"stdin": "standard input"}
        name = streams(paths)[0]
        raise ValueError(f"{names.get(name, name)} cannot be planned for, its size is not known; name files")
    return _plan(paths, workers, packets, shards, executor)


def summary(manifest: dict[str, Any]) -> str:
    """The counters and parts of a manifest as a table of text."""
    lines, measurements = manifest["lines"], manifest["measurements"]
    table = [("lines read", lines["read"], "")]
    table += [(f"  {name}", count, DROPPED_LINES.get(name, "")) for name, count in lines["counters"].items() if count]
    table += [(f"measurements {name}", count, REPLIES.get(name, "")) for name, count in measurements.items()]
    table += [(f"  {part}", count, f"{manifest['rows'][part]:,} rows") for part, count in manifest["parts"].items()]
    if empty := manifest.get("empty_inputs"):
        table.append(("empty inputs", empty, f"of {len(manifest['inputs']):,}"))
    text = [f"{name:<40} {count:>15,}  {note}".rstrip() for name, count, note in table]
    return "\n".join(text + [f"kept going: {entry['problem']}" for entry in manifest["inputs"] if "problem" in entry])


@contextmanager
def _only_writer(out: Path, partial: Path) -> Iterator[None]:
    """Keeps other processes from writing into `out`; at the end nothing is left of that but what was made meanwhile."""
    if (out / MANIFEST_NAME).exists() and not os.access(out, os.W_OK):
        yield  # nobody writes there
        return
    is_new = not out.exists()
    with write_lock(out, partial / LOCK_NAME):
        try:
            yield
        finally:
            with suppress(OSError):  # all of it is in use, or gone
                if [path.name for path in partial.iterdir()] == [LOCK_NAME]:
                    (partial / LOCK_NAME).unlink()
                    partial.rmdir()
                    if is_new:
                        out.rmdir()


def _plan(paths: dict[Path, str], workers: int, packets: Packets, shards: int, executor: str | Executor) -> Plan:
    """The plan for dumps at paths with names."""
    if workers < 0 or shards < 0:
        raise ValueError(f"{workers=} and {shards=} must be 0 or more")
    dumps = tuple((packed_suffix(path), path.stat().st_size) for path in paths)
    if isinstance(executor, str):
        check_executor(executor)
    name = executor if isinstance(executor, str) else type(executor).__name__
    buckets = min(shards, MAX_BUCKETS) or bucket_count(dumps, packets)
    plan = Plan(dumps, packets, buckets, workers or cores(), name)
    if not workers and name == LOCAL and plan.core_seconds < INLINE_S * plan.workers:
        return replace(plan, workers=1)
    return replace(plan, workers=min(plan.workers, max(len(dumps), plan.buckets)))


def _finished(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest that is there, if it is of the same plan."""
    manifest = read_manifest(out)
    there = [{name: entry[name] for name in ("name", "bytes", "sha256")} for entry in manifest["inputs"]]
    shutil.rmtree(out / PARTIAL_NAME, ignore_errors=True)
    if (there, manifest["options"]) != (identity["inputs"], identity["options"]):
        raise ValueError(f"{out} holds the rows of other inputs or options; choose another --out or delete the folder")
    print(f"{out} already holds these rows; nothing to do", file=sys.stderr)
    return manifest


def _begin(out: Path, partial: Path, identity: dict[str, Any]) -> None:
    """Makes the scratch folder ready: with what an interrupted run of the same plan left in it, else empty."""
    shards = [path for part in PARTS for path in out.glob(f"{part}-?????-of-?????.arrayrecord")]
    text = json.dumps(identity, indent=1)
    there = partial / IDENTITY_NAME
    if shards and not there.exists():
        raise ValueError(f"{out} holds shards but no {MANIFEST_NAME}; choose another --out or delete the folder")
    if not there.exists() or there.read_text() != text:
        for old in (*partial.glob("input-*"), *partial.glob("bucket-*")):
            shutil.rmtree(old)
    partial.mkdir(parents=True, exist_ok=True)
    for bucket in partial.glob("bucket-*"):  # killed while it published: some shards were moved out already
        if shards:
            shutil.rmtree(bucket)
    for shard in shards:
        shard.unlink()
    write_atomically(there, text)


def _run_maps(pool: Executor, tasks: Sequence[MapTask], dumps: Sequence[Dump], keep_going: bool) -> list[dict]:
    """Parses all dumps, the large ones first so that no worker ends alone with one; ValueError at the first damaged one."""
    order = sorted(range(len(tasks)), key=lambda i: (-dumps[i].bytes, i))
    with _map_progress(tasks, dumps) as finished:

        def done(i: int, report: dict[str, Any]) -> None:
            if report["problem"] and not keep_going:
                raise ValueError(f"{report['problem']}, or --keep-going with what can be read")
            finished(order[i])

        reports = run_tasks(pool, map_dump, [tasks[i] for i in order], done)
    return [report for _, report in sorted(zip(order, reports, strict=True), key=lambda pair: pair[0])]


@contextmanager
def _map_progress(tasks: Sequence[MapTask], dumps: Sequence[Dump]) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of a dump that is done; the progress of the others is seen by their pieces.

    That is an estimate, and stops short of the end: how well a dump is packed shows only there.
    """
    over = Event()
    scratch, numbers = tasks[0].folder.parent, {task.folder.name: i for i, task in enumerate(tasks)}
    with show_progress("unpack, parse", sum(dump.bytes for dump in dumps) / 1e6, "MB") as advance:
        reach = by_part(advance)

        def watch() -> None:
            while not over.wait(WATCH_EVERY_S):
                # Of the tasks that are at work, by the name that their folder will have
                written = Counter(piece.parent.name.partition(".")[0] for piece in scratch.glob(f"*{ASIDE}/piece-*"))
                for name, pieces in written.items():
                    dump = dumps[numbers[name]]
                    size = min(pieces * CHUNK_BYTES * packed_share(packed_suffix(dump.path)), 0.95 * dump.bytes)
                    reach(numbers[name], size / 1e6)

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield lambda i: reach(i, dumps[i].bytes / 1e6)
        finally:
            over.set()
            watcher.join()


def _is_empty(report: dict[str, Any]) -> bool:
    """Whether an input holds nothing, as where a measurement gave no results."""
    return not report["problem"] and report["lines"] == report["counters"].get("blank_line", 0)


def _time_cut(maps: Sequence[dict], rule: SplitRule) -> TimeCut | None:
    """Where train ends and where test begins, over all inputs; None where there are no measurements."""
    times: Counter[int] = Counter()
    for report in maps:
        times.update({int(step): count for step, count in report["times"].items()})  # of a file, its keys are text
    return rule.time_cut(times) if times else None


def _manifest(
    identity: dict[str, Any], maps: Sequence[dict], reduces: Sequence[dict], rule: SplitRule | None, cut: TimeCut | None
) -> dict[str, Any]:
    """The manifest but for what is known once the shards stand; ValueError if no measurement is left."""
    counters = {name: sum(report[name] for report in reduces) for name in ("kept", "duplicate")}
    counters |= {name: sum(report["counters"].get(name, 0) for report in maps) for name in DROPPED_LINES}
    read = sum(report["lines"] for report in maps)
    assert sum(counters.values()) == read, f"{counters} do not add up to {read} lines"
    parts = {part: sum(report["parts"][part] for report in reduces) for part in PARTS}
    if not any(parts.values()):
        became = ", ".join(f"{name} {count:,}" for name, count in counters.items() if count)
        raise ValueError(f"no measurement is left of {read:,} lines ({became}); prepare other dumps")
    measurements = {"written": sum(parts.values())}
    since_parsed = ("dropped_repeated", "dropped_held_out", "clamped_rtt")
    measurements |= {name: sum(report[name] for report in reduces) for name in since_parsed}
    if identity["options"]["traceroute"] != "off":
        measurements |= {name: sum(report["counters"].get(name, 0) for report in maps) for name in REPLIES}
    inputs = [
        entry | {"lines": report["lines"]} | ({"problem": report["problem"]} if report["problem"] else {})
        for entry, report in zip(identity["inputs"], maps, strict=True)
    ]
    return identity | {
        "inputs": inputs,
        "empty_inputs": sum(map(_is_empty, maps)),
        "packets": identity["options"]["packets"],
        "lines": {"read": read, "counters": counters},
        "measurements": measurements,
        "parts": parts,
        "split": rule.describe() | asdict(cut) if rule and cut else {"name": "none"},
    }


def _publish(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Moves the shards of all buckets to their places and writes the index; gives {"rows", "shards": {part: n}}.

    The shards of a part are numbered without gaps, though a bucket may hold nothing of it.
    """
    tables: list[pa.Table] = []
    rows: dict[str, int] = {}
    shards: dict[str, int] = {}
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
    move_atomically(out / f"{INDEX_NAME}.tmp", out / INDEX_NAME)
    return {"rows": rows, "shards": shards}
