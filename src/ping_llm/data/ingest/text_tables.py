"""Tables as text in, measurements out: CSV, JSON lines and what else text_table reads.

    a packet a row    src_addr, dst_addr, event_time, rtt (ms, −1 = failed)      as `batch` and `score` take them
    Atlas, exploded   the fields of a result, with `rtt`, `x` or `error` of one of its packets
    Atlas, flattened  the fields of a result, with result0rtt, result0x, result1rtt …
    ping's CSV        date, ip, rtt: the source is that of --source

Every row is counted as a line is (see results). What a text means is decided by text_values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.data.ingest.choices import Packets
from ping_llm.data.ingest.results import MAX_RTT_MS, MAX_TIME_S, MIN_RTT_MS, RESULT_SCHEMA, measure_pings
from ping_llm.data.ingest.unpack import DamagedDump
from ping_llm.data.measurement import FAILED_RTT_MS
from ping_llm.data.text_table import TextTable
from ping_llm.data.text_values import rtts_ms, times_s

_NAMES = {
    "src": ("src_addr", "srcaddr"),
    "from": ("from",),
    "dst": ("dst_addr", "addr", "ip"),
    "time": ("event_time", "start_time", "timestamp", "datetime", "date", "time"),
    "prb_id": ("prb_id",),
    "msm_id": ("msm_id",),
    "lts": ("lts",),
    "type": ("type",),
    "dup": ("dup",),
}
"""What may be in a table, and the columns it may be in, the first that there is; capitals do not count."""
_PACKET = ("rtt", "x", "error")
_PACKET_OF_RESULT = re.compile(r"result[._\[]?(\d+)\]?[._]?(rtt|x|error|dup)")
_NEEDED = {"dst": "address of the destination (dst_addr)", "time": "time (event_time)"}
_SOURCE = "address of the source (src_addr, or --source ADDRESS)"
_LOST = "sendto failed"
_WHOLE = r"^-?\d{1,18}(\.0*)?$"


@dataclass(frozen=True)
class _Columns:
    """Which columns of a table are read: that of each of _NAMES, and those of its packets by number and what they hold."""

    of: dict[str, str]
    packets: dict[int, dict[str, str]]
    a_row_is_a_packet: bool

    def names(self) -> list[str]:
        """All of them."""
        return list(
            dict.fromkeys([*self.of.values(), *(name for one in self.packets.values() for name in one.values())])
        )


def columns_of(names: Sequence[str]) -> _Columns:
    """Where a table with columns of such names holds what."""
    known = {name.strip().lower(): name for name in reversed(names)}
    of = {what: known[name] for what, names in _NAMES.items() for name in reversed(names) if name in known}
    packets: dict[int, dict[str, str]] = {}
    for name in names:
        if found := _PACKET_OF_RESULT.fullmatch(name.strip().lower()):
            packets.setdefault(int(found[1]), {})[found[2]] = name
    if packets:
        return _Columns(of, packets, False)
    own = {what: known[what] for what in _PACKET if what in known}
    return _Columns(of, {0: own} if own else {}, True)


def missing_in(names: Sequence[str], source: str | None) -> list[str]:
    """What a table needs and does not have."""
    columns = columns_of(names)
    missing = [] if source or {"src", "from"} & columns.of.keys() else [_SOURCE]
    missing += [text for what, text in _NEEDED.items() if what not in columns.of]
    return missing + ([] if any("rtt" in one for one in columns.packets.values()) else ["RTT (rtt)"])


def read_text_rows(
    table: TextTable, name: str, packets: Packets, max_clock_skew_s: int, source: str | None
) -> Iterator[tuple[int, pa.Table, dict[str, int]]]:
    """Of each batch of a table: its rows, their measurements, the counters of the rest; DamagedDump if it is another table.

    Rows of one packet each are all kept, whatever `packets` says.
    """
    if missing := missing_in(table.names, source):
        raise DamagedDump(
            f"{name} is a table with no {', no '.join(missing)}: it has {', '.join(table.names)}; leave it out"
        )
    columns = columns_of(table.names)
    unreadable: list[int] = []

    def malformed(row: int, why: str) -> None:
        if why.startswith("it "):  # not one of its values, but the row
            unreadable.append(row)

    try:
        for batch in table.batches(columns.names(), malformed):
            fields = _fields(pa.table(batch), columns, max_clock_skew_s, source)
            result, counts = measure_pings(fields, packets, rows_are_packets=columns.a_row_is_a_packet)
            counted = Counter(counts) + Counter(malformed_json=len(unreadable))
            rows = batch.num_rows + len(unreadable)
            unreadable.clear()
            yield rows, result, dict(counted)
    except ValueError as error:
        raise error if isinstance(error, DamagedDump) else DamagedDump(f"{error}") from None
    if unreadable:
        yield len(unreadable), RESULT_SCHEMA.empty_table(), {"malformed_json": len(unreadable)}


def _fields(rows: pa.Table, columns: _Columns, max_clock_skew_s: int, source: str | None) -> pa.Table:
    """Rows as text to fields (see results)."""
    count = len(rows)

    def text(what: str) -> pa.Array:
        """What is not empty, without spaces around it."""
        if what not in columns.of:
            return pa.nulls(count, pa.string())
        return _given(rows[columns.of[what]].combine_chunks())

    time_s, _ = times_s(text("time"))
    lists, has_error = _packet_lists(rows, columns, _whole(text("dup")) > 0)
    kind, lts = text("type"), text("lts")
    skew_s = _whole(lts)
    origin = text("from") if {"src", "from"} & columns.of.keys() else pa.array([source] * count, pa.string())
    return pa.table(
        {
            "malformed_json": _all_empty(rows),
            "traceroute_off": pc.equal(kind, "traceroute").fill_null(False),
            "not_ping": pc.not_equal(kind, "ping").fill_null(False),
            "no_timestamp": (time_s < 1) | (time_s > MAX_TIME_S),
            "unsynced_clock": lts.is_valid().to_numpy(zero_copy_only=False)
            & ((skew_s < 0) | (skew_s > max_clock_skew_s)),
            "has_error": has_error,
            "probe_id": np.maximum(_whole(text("prb_id")), -1),
            "msm_id": _whole(text("msm_id")),
            "time_s": time_s,
            "src": text("src"),
            "from": origin,
            "dst": text("dst"),
            "packets": lists,
        }
    )


def _packet_lists(rows: pa.Table, columns: _Columns, duplicates: np.ndarray) -> tuple[pa.ListArray, np.ndarray]:
    """The RTTs of each row's packets, and whether one has an error, by the rules of JSON.

    `duplicates`: of a result in which some replies are second ones. Where nothing says which, none is known to be a first.
    """
    rtts, known, has_error = [], [], np.zeros(len(rows), dtype=bool)
    for number in sorted(columns.packets):
        names = columns.packets[number]
        text = {what: _given(rows[name].combine_chunks()) for what, name in names.items()}
        none = pa.nulls(len(rows), pa.string())
        rtt_ms, _ = rtts_ms(text.get("rtt", none))
        error = text.get("error", none)
        replied = (rtt_ms >= MIN_RTT_MS) & (rtt_ms <= MAX_RTT_MS)
        lost = pc.or_(text.get("x", none).is_valid(), pc.starts_with(error, _LOST).fill_null(False))
        lost = (rtt_ms == FAILED_RTT_MS) | lost.to_numpy(zero_copy_only=False)
        second = _whole(text["dup"]) > 0 if "dup" in text else duplicates
        rtts.append(np.where(replied, rtt_ms, FAILED_RTT_MS))
        known.append((replied | lost) & ~second)
        has_error |= error.is_valid().to_numpy(zero_copy_only=False)
    chosen = np.stack(known, axis=1)  # (rows, packets)
    offsets = np.append(0, np.cumsum(chosen.sum(axis=1))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.stack(rtts, axis=1)[chosen])), has_error


def _given(column: pa.Array) -> pa.Array:
    """Text without spaces around it; null where nothing is given."""
    column = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.is_in(pc.utf8_lower(column), pa.array(["", "nan"])), None, column)


def _whole(column: pa.Array) -> np.ndarray:
    """Text (n,) to integers, −1 where it is none; pandas writes 7.0 in a column in which one is missing."""
    digits = pc.if_else(pc.match_substring_regex(column, _WHOLE), column, None)
    digits = pc.replace_substring_regex(digits, r"\..*$", "")
    return digits.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)


def _all_empty(rows: pa.Table) -> np.ndarray:
    return np.logical_and.reduce(
        [~_given(column.combine_chunks()).is_valid().to_numpy(False) for column in rows.columns]
    )
