"""Logs of `ping -D` in, fields of results out (see results): each line with the packets that it tells of.

    [1700000000.250000] 64 bytes from 198.51.100.20: icmp_seq=1 ttl=53 time=31.2 ms       a reply
    no answer yet for icmp_seq=2                                                          lost, unless a reply comes later
    [1700000003.350000] From 192.0.2.1 icmp_seq=3 Destination Host Unreachable            lost

A number that is missing between two others is a lost packet too, and so are the last ones, if the statistics at the end
say that they were sent. The time of a lost packet lies between those of its neighbours. A second reply is a duplicate. The
source is not in the file, unless ping was called with -I.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.data.ingest.results import MAX_RTT_MS, MAX_TIME_S, MIN_RTT_MS, measure_pings
from ping_llm.data.ingest.unpack import DamagedDump
from ping_llm.data.measurement import FAILED_RTT_MS

BEGIN = rb"PING |\[\d{6,}(?:\.\d+)?\] |\d+ bytes from |no answer yet for icmp_seq"
"""How such a file begins."""

_STAMP = r"^(?:\[(?P<stamp>\d+(?:\.\d+)?)\]\s*)?"
_ADDRESS = r"[0-9A-Fa-f:.]+"
_SEQ = r"(?:icmp_[sr]eq|seq)[= ](?P<seq>\d+)"
_HEADER = rf"^PING .*?\(?(?P<dst>{_ADDRESS})(?:%[^)\s]*)?\)+(?: from (?P<src>{_ADDRESS}))?"
_REPLY = (
    rf"{_STAMP}\d+ \S+ \S+ (?:.*\()?(?P<dst>[^\s()%]+?)(?:%[^)\s:]*)?\)?:? {_SEQ}\b(?P<rest>.*)$"  # in any language
)
_RTT = r"[=<](?P<rtt>\d+(?:\.\d+)?) ?ms\b"
_LOST = rf"{_STAMP}(?:no answer yet for|Request timeout for|From \S+(?: \([^)]*\))?:?) {_SEQ}(?P<rest>.*)$"
_NO_LOSS = r"^:? ?Redirect"  # the packet went on
_SENT = r"^(?P<sent>\d+) \S+ \S+, \d+ .*%"
_TEXT = r"^(?:PING |\^C|--- |rtt |round-trip |ping6?: |, pipe )"
_WRAP = 1 << 16
_RESTART = 1000  # a number so far below the one before is of another run; a late reply is closer
_MOST_LOST = 1 << 24  # in one gap: what is longer is a slip of the clock or of the file


@dataclass(frozen=True)
class _Lines:
    """The n lines of a log, (n,) each."""

    blank: np.ndarray
    header: np.ndarray
    text: np.ndarray  # without a packet, as it should be
    replied: np.ndarray
    lost: np.ndarray
    stamp: np.ndarray  # Unix seconds, NaN = none
    seq: np.ndarray
    rtt_ms: np.ndarray  # NaN = none
    sent: np.ndarray  # by the statistics, −1 = none
    dst: pa.Array
    src: pa.Array


def read_log(
    chunks: Iterator[int], scratch: Path, name: str, source: str | None
) -> Iterator[tuple[int, pa.Table, dict[str, int]]]:
    """Of a log whose chunks lie in `scratch` one after the other: its lines, their measurements, the counters of the rest.

    Memory grows by some 60 bytes a line. DamagedDump if the source or all times are missing.
    """
    parts, damage = [], None
    try:
        parts += [_parse(scratch.read_bytes()) for _ in chunks]
    except DamagedDump as error:
        damage = error
    if parts:
        fields = _fields(_joined(parts), source)
        missing = []
        if fields["src"].null_count == fields["from"].null_count == len(fields):
            missing.append("address of the source (give it with --source ADDRESS)")
        if not fields["timed"].to_numpy().any():
            missing.append("times (run ping with -D)")
        if missing:
            raise DamagedDump(f"{name} is a log of ping that holds no {', no '.join(missing)}; leave it out")
        yield len(fields), *measure_pings(fields, "all")
    if damage:
        raise damage


def _parse(text: bytes) -> _Lines:
    lines = pa.array(text.decode("utf-8", "replace").removesuffix("\n").split("\n"), pa.string())
    lines = pc.utf8_rtrim_whitespace(lines)
    header, reply, lost = (pc.extract_regex(lines, pattern) for pattern in (_HEADER, _REPLY, _LOST))
    sent = pc.extract_regex(lines, _SENT)
    replied, is_header = reply.is_valid(), header.is_valid()
    redirect = pc.match_substring_regex(_group(lost, "rest"), _NO_LOSS).fill_null(False)
    is_lost = pc.and_(pc.and_not(lost.is_valid(), redirect), pc.invert(replied))
    text_lines = pc.or_(pc.or_(pc.match_substring_regex(lines, _TEXT), redirect), sent.is_valid())
    rtt = pc.extract_regex(_group(reply, "rest"), _RTT)
    either = {name: pc.coalesce(_group(reply, name), _group(lost, name)) for name in ("stamp", "seq")}
    return _Lines(
        _bools(pc.equal(lines, "")),
        _bools(is_header),
        _bools(text_lines),
        _bools(replied),
        _bools(is_lost),
        _numbers(either["stamp"], np.nan),
        _numbers(either["seq"], -1).astype(np.int64),
        _numbers(_group(rtt, "rtt"), np.nan),
        _numbers(_group(sent, "sent"), -1).astype(np.int64),
        pc.coalesce(_group(header, "dst"), _group(reply, "dst")).dictionary_encode(),
        pc.if_else(pc.equal(_group(header, "src"), ""), None, _group(header, "src")).dictionary_encode(),
    )


def _joined(parts: list[_Lines]) -> _Lines:
    columns: dict[str, Any] = {}
    for name in vars(parts[0]):
        pieces = [getattr(part, name) for part in parts]
        texts = isinstance(pieces[0], pa.Array)
        columns[name] = pa.chunked_array(pieces).unify_dictionaries().combine_chunks() if texts else np.hstack(pieces)
    return _Lines(**columns)


def _fields(lines: _Lines, source: str | None) -> pa.Table:
    """Lines to fields (see results), and whether a line is `timed`: its packets have times."""
    count = len(lines.blank)
    run, starts = _runs(lines)
    line, number, time_s, rtt_ms = _packets(lines, run)
    order = np.lexsort((number, line))
    line, number, time_s, rtt_ms = (column[order] for column in (line, number, time_s, rtt_ms))
    timed = (time_s >= 1) & (time_s <= MAX_TIME_S)  # NaN is not
    offsets = pa.array(np.searchsorted(line, np.arange(count + 1)).astype(np.int32))
    lists = {"packets": rtt_ms, "times": np.where(timed, time_s, 0).astype(np.int64), "numbers": number % (1 << 31)}
    holds = np.isin(np.arange(count), line)
    untimed = np.isin(np.arange(count), line[~timed])
    line_time = np.zeros(count, dtype=np.int64)
    line_time[line[timed]] = time_s[timed].astype(np.int64)
    dst = _of_runs(lines, run, starts)
    dst = pc.if_else(lines.text, pc.fill_null_forward(dst), dst)  # what follows the statistics is of that run
    known = lines.blank | lines.text | lines.replied | lines.lost
    columns = {
        "blank_line": lines.blank,
        "malformed_json": ~known,
        "no_timestamp": untimed,
        "has_error": np.zeros(count, dtype=bool),
        "probe_id": np.full(count, -1),
        "msm_id": np.full(count, -1),
        "time_s": line_time,
        "src": lines.src.take(_first_of_runs(lines.header, run, starts)).cast(pa.string()),
        "from": pa.array([source], pa.string()).take(pa.array(np.zeros(count, dtype=np.int64))),
        "dst": lines.dst.take(dst).cast(pa.string()),
        "timed": holds & ~untimed,
    }
    columns |= {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()}
    return pa.table(columns)


def _runs(lines: _Lines) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the run of ping that each line is of, and where the runs begin."""
    start = lines.header.copy()
    start[0] = True
    start[np.flatnonzero(lines.sent[:-1] >= 0) + 1] = True
    counted = np.flatnonzero(lines.replied | lines.lost)
    step = _steps(lines.seq[counted])
    sent_s = lines.stamp[counted] - lines.rtt_ms[counted] / 1000
    later = sent_s[1:] > np.fmax.accumulate(sent_s)[:-1]  # so it is no late reply
    start[counted[1:][(step < -_RESTART) | (step < 0) & later]] = True
    return np.cumsum(start) - 1, np.flatnonzero(start)


def _steps(seq: np.ndarray) -> np.ndarray:
    """From each number to the next, which begins again at 0 after 65,535."""
    return (np.diff(seq) + _WRAP // 2) % _WRAP - _WRAP // 2


def _first_of_runs(chosen: np.ndarray, run: np.ndarray, starts: np.ndarray) -> pa.Array:
    """For each line the first chosen one of its run; null if there is none."""
    where = np.full(len(starts), -1)
    lines = np.flatnonzero(chosen)[::-1]
    where[run[lines]] = lines
    return pa.array(where[run], mask=where[run] < 0)


def _of_runs(lines: _Lines, run: np.ndarray, starts: np.ndarray) -> pa.Array:
    """For each line, that which names the destination of its run: the header or, without one, the first reply."""
    return pc.coalesce(*(_first_of_runs(chosen, run, starts) for chosen in (lines.header, lines.replied)))


def _packets(lines: _Lines, run: np.ndarray) -> tuple[np.ndarray, ...]:
    """The line that tells of each packet, its number, time in seconds (NaN = unknown) and RTT in ms."""
    counted = np.flatnonzero(lines.replied | lines.lost)
    first_of_run = np.flatnonzero(np.diff(run[counted], prepend=-1))
    parts = [np.zeros((4, 0))]
    last_line = np.append(np.flatnonzero(np.diff(run)), len(run) - 1)  # of each run
    for begin, end in zip(first_of_run, np.append(first_of_run[1:], len(counted)), strict=True):
        mine = counted[begin:end]
        number = lines.seq[mine[0]] + np.append(0, np.cumsum(_steps(lines.seq[mine])))
        own_run = run[mine[0]]
        all_of_run = slice(last_line[own_run - 1] + 1 if own_run else 0, last_line[own_run] + 1)
        parts.append(_packets_of_run(lines, mine, number, lines.header[all_of_run].any(), last_line[own_run]))
    line, number, time_s, rtt_ms = np.hstack(parts)
    return line.astype(np.int64), number.astype(np.int64), time_s, rtt_ms


def _packets_of_run(lines: _Lines, mine: np.ndarray, number: np.ndarray, whole: np.bool_, last_line: int) -> np.ndarray:
    """(4, m): as `_packets`, of the lines `mine`, whose packets have a `number` that never begins again.

    `whole`: the log holds the beginning of the run.
    """
    # Of each packet the first reply or, without one, the first line that says that it is lost
    order = np.lexsort((mine, ~lines.replied[mine], number))
    chosen = order[np.diff(number[order], prepend=-_WRAP) != 0]
    line, there = mine[chosen], number[chosen]
    rtt_ms = np.where(lines.replied[line], lines.rtt_ms[line], FAILED_RTT_MS)
    first = min(1, there[0]) if whole and there[0] < _WRAP // 2 else there[0]
    sent = lines.sent[last_line]
    end = max(there[-1] + 1, first + sent) if whole and sent <= there[-1] + _MOST_LOST else there[-1] + 1
    missing = np.setdiff1d(np.arange(first, end), there, assume_unique=True)
    after = np.searchsorted(there, missing)
    told_by = np.append(line, last_line)[after]
    stamped = np.isfinite(lines.stamp[line]) & (lines.replied[line] | ~lines.replied[mine].any())
    every = np.hstack([there, missing])
    time_s = _times(every, there[stamped], lines.stamp[line[stamped]])
    time_s[: len(there)][stamped] = lines.stamp[line[stamped]]
    packets = np.vstack([np.hstack([line, told_by]), every, time_s, np.hstack([rtt_ms, 0 * missing + FAILED_RTT_MS])])
    rtt_ms = packets[3]
    return packets[:, (rtt_ms == FAILED_RTT_MS) | (rtt_ms >= MIN_RTT_MS) & (rtt_ms <= MAX_RTT_MS)]


def _times(number: np.ndarray, known: np.ndarray, stamp: np.ndarray) -> np.ndarray:
    """When packets were sent, by the stamps of those that are known, ascending; before and after them as far apart."""
    if not len(known):
        return np.full(len(number), np.nan)
    steps = np.diff(stamp) / np.diff(known)
    step = float(np.median(steps)) if len(steps) else 1.0
    before, after = np.minimum(number - known[0], 0), np.maximum(number - known[-1], 0)
    return np.interp(number, known, stamp) + (before + after) * step


def _group(found: pa.StructArray, name: str) -> pa.StringArray:
    return pc.struct_field(found, name)


def _bools(column: pa.BooleanArray) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def _numbers(texts: pa.StringArray, none: float) -> np.ndarray:
    """What is no number of a double is `none` too; an empty group of a match is an empty text."""
    return (
        pc.if_else(pc.equal(texts, ""), None, texts).cast(pa.float64()).fill_null(none).to_numpy(zero_copy_only=False)
    )
