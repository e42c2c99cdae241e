"""A seeded Internet in, an Atlas-shaped dump and its exact RTT distribution (truth.json) out.

Every probe pings a share of the targets and anchors every `interval_s`. The dump is a pure function of its arguments:
file i, block b draws from the generator seeded with (seed, i, b), so any number of workers writes the same bytes.
Packets of one result are independent draws of the distribution in truth.py. The lines also hold what it does not cover:

    results without packets     "connect failed", failed name resolution, "address not allowed": in place of any result,
                                whatever became of its packets, so leaving them out biases nothing
    errors that are losses      "sendto failed" in place of a lost packet
    noise around measurements   second replies (dup), unknown or unsynchronised clocks (lts), lines that come again in
                                the next file or only there, private or absent src_addr

A file spans 1 hour, as on Atlas, or up to a day so that it holds some 10,000 results.
"""

from __future__ import annotations

import bz2
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.synthetic.atlas_lines import CONNECT_FAILED, DNS_FAILED, NO_ERROR, NOT_ALLOWED, LineWriter, Results
from ping_llm.data.synthetic.truth import DAY_S, TRUTH_NAME, Paths, Truth, draw_packets, hash_uniform
from ping_llm.data.synthetic.world import build_world
from ping_llm.system.files import write_atomically
from ping_llm.system.processes import end_with_parent
from ping_llm.system.progress import cores, show_progress

PACKETS = 3
_HOUR_S = 3600
_FILE_RESULTS = 10_000  # a file of fewer spans more hours
_BLOCK_RESULTS = 50_000  # drawn and formatted at once: some 100 MB
_LATE_SHARE = 0.01  # of a file's last block: these lines are also, or only, in the next file
_DNS_FAILED_SHARE, _NOT_ALLOWED_SHARE = 0.003, 0.0005  # of the results of targets that have a name
_CONNECT_FAILED_SHARE = 0.0005  # of the results
_SENDTO_FAILED_SHARE = 0.02  # of the lost packets
_DUP_SHARE = 0.001  # of the packets
_LTS_UNKNOWN_SHARE, _LTS_UNSYNCED_SHARE = 0.003, 0.002  # of the results
# One word for each use of the hash; truth.py has those below 100.
_MEASURED, _PHASE, _HOPS, _LATE, _REPEATED = range(100, 105)


def synthesize(
    out: Path | str,
    probes: int = 100,
    targets: int = 50,
    days: float = 2.0,
    seed: int = 0,
    interval_s: int = 3600,
    workers: int = 0,
    start: str = "2026-01-01T00:00:00Z",
    measured_share: float = 0.7,
) -> dict[str, int]:
    """Writes `ping-YYYY-MM-DDTHH00.bz2` files and truth.json into `out` and returns what they hold.

    `measured_share` is the share of the targets that a probe pings. Progress goes to standard error.
    Counts: files, lines, results (distinct), repeated (lines − results), packets, lost, json_bytes (before compression).
    ValueError for arguments out of range and for a folder that holds another dump.
    """
    start_s = _check(probes, targets, days, seed, interval_s, workers, start, measured_share)
    world = build_world(seed, probes, targets)
    schedule = {"start_s": start_s, "end_s": start_s + round(days * DAY_S), "interval_s": interval_s}
    world["schedule"] = schedule | {"measured_share": measured_share}
    dump = Dump(world, Path(out))
    dump.out.mkdir(parents=True, exist_ok=True)
    path, text = dump.out / TRUTH_NAME, json.dumps(world, ensure_ascii=False, indent=1)
    if path.read_text() != text if path.exists() else any(dump.out.glob("ping-*.bz2")):
        raise ValueError(f"{out} holds another dump; name another folder, or delete this one first")
    write_atomically(path, text)
    counts: Counter[str] = Counter()
    with show_progress("synth", dump.results, "results") as advance:
        for counted in _write_all(dump, min(workers or cores(), dump.files)):
            counts.update(counted)
            advance(counted["results"])
    return {"files": dump.files, **counts}


class Dump:
    """The files of one dump: which results each holds, drawn and written one file at a time."""

    def __init__(self, world: dict[str, Any], out: Path) -> None:
        self.world, self.out, self.truth, self.seed = world, out, Truth(world), world["seed"]
        self.schedule, measurements = world["schedule"], world["measurements"]
        self.pairs = self._measured_pairs()
        interval_s, span_s = self.schedule["interval_s"], self.schedule["end_s"] - self.schedule["start_s"]
        # (P,) of each pair: seconds after the start at which it is first measured; TTL of the replies, 64 less the hops; and
        # whether the target is resolved by name
        self.phase_s = (hash_uniform(self.seed, _PHASE, *self.pairs) * interval_s).astype(np.int64)
        self.ttl = 64 - (6 + 18 * hash_uniform(self.seed, _HOPS, *self.pairs)).astype(np.int64)
        self.named = np.array([m["dst_name"] != m["dst_addr"] for m in measurements])[self.pairs[1]]
        hourly = len(self.pairs[0]) * _HOUR_S / interval_s
        # Seconds that a file spans, and parts of it that are equal in time
        self.file_s = _HOUR_S * next((h for h in (1, 2, 3, 4, 6, 8, 12) if h * hourly >= _FILE_RESULTS), 24)
        self.blocks = -(-len(self.pairs[0]) * self.file_s // (interval_s * _BLOCK_RESULTS))
        self.files = -(-span_s // self.file_s)
        self.results = int((-((self.phase_s - span_s) // interval_s)).sum())  # a line that comes again counts once

    def _measured_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) probe and (P,) measurement indices of the pairs that are measured."""
        probes, measurements = self.world["probes"], self.world["measurements"]
        probe_id = np.array([probe["probe_id"] for probe in probes])
        msm_id = np.array([measurement["msm_id"] for measurement in measurements])
        chosen = hash_uniform(self.seed, _MEASURED, probe_id[:, None], msm_id) < self.schedule["measured_share"]
        ipv6 = np.array([measurement["ip_version"] == 6 for measurement in measurements])
        chosen &= np.array([probe["ipv6"] is not None for probe in probes])[:, None] | ~ipv6
        column = {m["dst_addr"]: i for i, m in enumerate(measurements)}
        for i, probe in enumerate(probes):  # a probe does not ping itself
            chosen[i, [column[a] for a in (probe["ipv4"], probe["ipv6"]) if a in column]] = False
        probe, measurement = np.nonzero(chosen)
        if not len(probe):
            raise ValueError("no probe measures any target; choose more of them or a larger measured_share")
        return probe, measurement

    @cached_property
    def paths(self) -> Paths:
        """The parameters of each pair."""
        probe, measurement = (index.tolist() for index in self.pairs)
        measurements = self.world["measurements"]
        sources = [(p["ipv4"], p["ipv6"]) for p in self.world["probes"]]
        src = [sources[i][measurements[j]["ip_version"] == 6] for i, j in zip(probe, measurement, strict=True)]
        return self.truth.paths(src, [measurements[j]["dst_addr"] for j in measurement])

    @cached_property
    def writer(self) -> LineWriter:
        return LineWriter(self.world["probes"], self.world["measurements"], self.schedule["interval_s"])

    def path(self, i: int) -> Path:
        """ping-YYYY-MM-DDTHH00.bz2, named after the first second of file i."""
        first = datetime.fromtimestamp(self.schedule["start_s"] + i * self.file_s, UTC)
        return self.out / f"ping-{first:%Y-%m-%dT%H}00.bz2"

    def write(self, i: int) -> Counter[str]:
        """Writes file i aside and renames it."""
        path, compressor = self.path(i), bz2.BZ2Compressor()
        counts: Counter[str] = Counter()
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                for results, new in self.contents(i):
                    text = "\n".join([*self.writer.lines(results), ""]).encode()
                    file.write(compressor.compress(text))
                    lost = int((results.rtt_ms[new] < 0).sum())
                    counts.update(lines=len(results), results=int(new.sum()), repeated=int((~new).sum()))
                    counts.update(packets=PACKETS * int(new.sum()), lost=lost, json_bytes=len(text))
                file.write(compressor.flush())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return counts

    def contents(self, i: int) -> Iterator[tuple[Results, np.ndarray]]:
        """The results of file i in parts of bounded size, and a bool each: False where an earlier file has the line."""
        if i:
            late, repeated = self._late(i - 1)
            if len(late):
                yield late, ~repeated
        for block in range(self.blocks):
            pair, time_s, is_late = self._scheduled(i, block)
            results = self._draw(pair[~is_late], time_s[~is_late], np.random.default_rng([self.seed, i, block]))
            yield results.take(np.argsort(results.stored_s, kind="stable")), np.ones(len(results), dtype=bool)
        late, repeated = self._late(i)
        if repeated.any():
            yield late.take(np.flatnonzero(repeated)), np.ones(repeated.sum(), dtype=bool)

    def _late(self, i: int) -> tuple[Results, np.ndarray]:
        """Results of file i that the next file holds, and whether file i holds them as well."""
        pair, time_s, is_late = self._scheduled(i, self.blocks - 1)
        pair, time_s = pair[is_late], time_s[is_late]
        results = self._draw(pair, time_s, np.random.default_rng([self.seed, i, self.blocks]))
        return results, hash_uniform(self.seed, _REPEATED, pair, time_s) < 0.5

    def _scheduled(self, i: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) pair and time in Unix seconds of every result of a block, and whether it is uploaded late."""
        start_s, end_s, interval_s = (self.schedule[name] for name in ("start_s", "end_s", "interval_s"))
        edges = [min(i * self.file_s + self.file_s * b // self.blocks, end_s - start_s) for b in (block, block + 1)]
        first, stop = (-((self.phase_s - edge) // interval_s) for edge in edges)  # the rounds from `first` up to `stop`
        rounds = stop - first
        pair = np.repeat(np.arange(len(rounds)), rounds)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(rounds) - rounds, rounds)
        time_s = start_s + self.phase_s[pair] + (first[pair] + within) * interval_s
        may_be_late = block == self.blocks - 1 and i < self.files - 1
        is_late = hash_uniform(self.seed, _LATE, pair, time_s) < (_LATE_SHARE if may_be_late else 0)
        return pair, time_s, is_late

    def _draw(self, pair: np.ndarray, time_s: np.ndarray, rng: np.random.Generator) -> Results:
        """Results of n pairs and times: packets by their distribution, then what surrounds them."""
        n, shape = len(pair), (len(pair), PACKETS)
        columns = (np.broadcast_to(column[:, None], shape) for column in self.paths.take(pair).at(time_s))
        p_fail, floor_ms, scale_ms, tail = columns
        rtt_ms = np.round(draw_packets(p_fail, floor_ms, scale_ms, tail, rng), 6)
        lost = rtt_ms < 0
        error = np.where(rng.random(n) < _CONNECT_FAILED_SHARE, CONNECT_FAILED, NO_ERROR)
        luck = np.where(self.named[pair], rng.random(n), 1)
        error[luck < _DNS_FAILED_SHARE + _NOT_ALLOWED_SHARE] = NOT_ALLOWED
        error[luck < _DNS_FAILED_SHARE] = DNS_FAILED
        erroneous = (error != NO_ERROR)[:, None]
        # A second reply to a lost packet came after the probe gave up, 1 s after it was sent.
        dup_ms = np.where(lost, 1000.0, rtt_ms) + rng.exponential(np.where(lost, 500.0, 1.0))
        lts_s, luck = rng.integers(0, 400, n), rng.random(n)
        lts_s = np.where(luck < _LTS_UNSYNCED_SHARE, rng.integers(10_000, 1_000_000, n), lts_s)
        return Results(
            probe=self.pairs[0][pair],
            measurement=self.pairs[1][pair],
            time_s=time_s,
            stored_s=time_s + 5 + rng.exponential(90, n).astype(np.int64),
            lts_s=np.where(luck > 1 - _LTS_UNKNOWN_SHARE, -1, lts_s),
            ttl=self.ttl[pair],
            ttr_ms=np.round(rng.lognormal(3, 1, n), 6),
            rtt_ms=np.where(erroneous, -1, rtt_ms),
            dup_ms=np.where((rng.random(shape) < _DUP_SHARE) & ~erroneous, np.round(dup_ms, 6), -1),
            sendto_failed=lost & ~erroneous & (rng.random(shape) < _SENDTO_FAILED_SHARE),
            error=error,
        )


def _check(
    probes: int, targets: int, days: float, seed: int, interval_s: int, workers: int, start: str, measured_share: float
) -> int:
    """The start in Unix seconds; ValueError for an argument out of range."""
    least = {"probes": (probes, 2), "targets": (targets, 1), "seed": (seed, 0), "interval_s": (interval_s, 1)}
    for name, (value, low) in (least | {"workers": (workers, 0)}).items():
        if value < low:
            raise ValueError(f"{name}={value} must be at least {low}")
    if seed >= 1 << 63:
        raise ValueError(f"seed={seed} must be below 2^63")
    if not days * DAY_S >= 1:
        raise ValueError(f"days={days} must be more than 0")
    if not 0 < measured_share <= 1:
        raise ValueError(f"measured_share={measured_share} must be above 0 and at most 1")
    try:
        moment = datetime.fromisoformat(start)
    except ValueError:
        raise ValueError(f"start={start!r} is no ISO 8601 time; write it like 2026-01-01T00:00:00Z") from None
    start_s = int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp())
    if start_s % _HOUR_S:
        raise ValueError(f"start={start!r} must be a full hour: files are named by it")
    return start_s


def _write_all(dump: Dump, workers: int) -> Iterator[Counter[str]]:
    """The counts of every file, as they are written by this process or by several."""
    if workers == 1:
        yield from map(dump.write, range(dump.files))
        return
    context = get_context("spawn")  # a fork would copy the locks of threads that the caller may run
    with ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
        yield from pool.map(partial(_write_in_worker, dump.out), range(dump.files))


def _write_in_worker(out: Path, i: int) -> Counter[str]:
    return _dump_of_worker(out).write(i)


@cache
def _dump_of_worker(out: Path) -> Dump:
    return Dump(Truth.load(out).world, out)
