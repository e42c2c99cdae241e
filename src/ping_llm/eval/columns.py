"""Probe rows in, columns of measurements and of queries out.

A query is for the RTT of one measurement; up to K earlier measurements of the same source may be given with it. What a
predictor sees, `QueryView`, holds copies of what it may know and no reference to the table: answers are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from ping_llm.data.hashing import hash_keys
from ping_llm.data.measurement import KINDS, distinct_addresses, format_address, log_rtt, network_of
from ping_llm.data.rows import ProbeRow, RowReader, is_part_of

Rows = np.ndarray | slice
"""Places, a mask, or a slice."""


class _Columns:
    """What tables of columns over one shared table of addresses have in common."""

    def take(self, rows: Rows) -> Self:
        """The lines at `rows`; the table of addresses is shared."""
        columns = [f.name for f in fields(self) if f.name not in ("addresses", "parts")]  # type: ignore[arg-type]  # a dataclass
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Measurements(_Columns):
    """n measurements of any sources, as columns over one table of a distinct addresses."""

    src_id: np.ndarray  # (n,) int32, into addresses
    dst_id: np.ndarray  # (n,) int32, into addresses
    probe: np.ndarray  # (n,) int64, the source's group: RIPE Atlas prb_id, else negative and made of its address
    time_s: np.ndarray  # (n,) int64, Unix seconds
    rtt_ms: np.ndarray  # (n,) float32, −1 = failed
    kind: np.ndarray  # (n,) uint8, into KINDS
    part: np.ndarray  # (n,) int8, into parts
    addresses: np.ndarray  # (a, 16) uint8
    parts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.time_s)

    @classmethod
    def from_rows(cls, rows: Path | str, parts: Sequence[str]) -> Measurements:
        """All measurements of these parts of a folder of rows, part by part; ValueError if one holds none.

        The part "val" stands for all of val-s1 … val-s5.
        """
        parts = tuple(dict.fromkeys(held for name in parts for held in RowReader(rows, name).parts))
        return cls.concatenate([cls.from_row(row, part) for part in parts for row in RowReader(rows, part)])

    @classmethod
    def from_row(cls, row: ProbeRow, part: str) -> Measurements:
        """The measurements of one row of a part."""
        addresses = np.concatenate([row.src_addresses, row.dst_addresses])
        src_id, dst_id = row.src.astype(np.int32), len(row.src_addresses) + row.dst.astype(np.int32)
        probe = np.full(len(row), row.probe_id, dtype=np.int64)
        if row.probe_id < 0:
            high, low = (hash_keys(addresses, salt).astype(np.int64) for salt in (b"group/high", b"group/low"))
            probe = (-2 - ((high << 30) | (low >> 2)))[src_id]
        part_id = np.zeros(len(row), dtype=np.int8)
        return cls(src_id, dst_id, probe, row.time_s, row.rtt_ms, row.kind, part_id, addresses, (part,))

    @classmethod
    def concatenate(cls, tables: Sequence[Measurements]) -> Measurements:
        """The measurements of all tables, in order, over one table of addresses; parts keep their names."""
        addresses, place = distinct_addresses(np.concatenate([table.addresses for table in tables]))
        starts = np.cumsum([0] + [len(table.addresses) for table in tables])
        parts = tuple(dict.fromkeys(name for table in tables for name in table.parts))
        columns = []
        for start, table in zip(starts[:-1], tables, strict=True):
            part_ids = np.array([parts.index(name) for name in table.parts], dtype=np.int8)
            ids = place[start + table.src_id], place[start + table.dst_id]
            columns.append((*ids, table.probe, table.time_s, table.rtt_ms, table.kind, part_ids[table.part]))
        src, dst, probe, time_s, rtt_ms, kind, part = (np.concatenate(column) for column in zip(*columns, strict=True))
        return cls(src, dst, probe, time_s, rtt_ms, kind, part, addresses, parts)

    def of_part(self, name: str) -> Measurements:
        """The measurements of one part; "val" names all of val-s1 … val-s5."""
        return self.take(self.rows_of_part(name))

    def rows_of_part(self, name: str) -> np.ndarray:
        """Places of the measurements of one part; "val" names all of val-s1 … val-s5."""
        named = [place for place, part in enumerate(self.parts) if is_part_of(part, name)]
        if not named:
            raise ValueError(f'no part "{name}" here, only {", ".join(self.parts)}')
        return np.flatnonzero(np.isin(self.part, named))

    @cached_property
    def log_ms(self) -> np.ndarray:
        """(n,) float64, log of the RTT in ms; NaN where there was no answer."""
        return log_rtt(self.rtt_ms)

    @cached_property
    def prefix(self) -> np.ndarray:
        """(a,) which /24 (IPv4) or /48 (IPv6) each address lies in, counted from 0."""
        return prefix_ids(self.addresses, 24, 48)

    @cached_property
    def host(self) -> np.ndarray:
        """(a,) equal for the addresses that one probe used as a source, directly or through shared addresses."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        nodes = len(self.addresses)
        probes, probe = np.unique(self.probe, return_inverse=True)
        used = np.unique(np.stack([self.src_id.astype(np.int64), nodes + probe]), axis=1)
        shape = (nodes + len(probes),) * 2
        return connected_components(coo_array((np.ones(used.shape[1]), tuple(used)), shape), directed=False)[1][:nodes]


@dataclass(frozen=True, eq=False)
class QueryView(_Columns):
    """What a predictor may know of q queries; column j of the context is the j-th most recent measurement given."""

    src_id: np.ndarray  # (q,) int32, into addresses
    dst_id: np.ndarray  # (q,) int32
    time_s: np.ndarray  # (q,) int64
    context_dst_id: np.ndarray  # (q, K) int32, −1 = none
    context_time_s: np.ndarray  # (q, K) int64
    context_rtt_ms: np.ndarray  # (q, K) float32, −1 = failed, NaN = none
    addresses: np.ndarray  # (a, 16) uint8

    def __len__(self) -> int:
        return len(self.time_s)

    @cached_property
    def context_log_ms(self) -> np.ndarray:
        """(q, K) float64, log of the RTT in ms; NaN where there was no answer or no measurement."""
        return log_rtt(self.context_rtt_ms)


@dataclass(frozen=True, eq=False)
class Queries:
    """q queries with their answers: places in a table that holds the measurements queried and those given."""

    measurements: Measurements
    rows: np.ndarray  # (q,) places of the measurements queried
    context: np.ndarray  # (q, K) places of earlier measurements of the same source, most recent first; −1 = none

    def __post_init__(self) -> None:
        assert self.context.ndim == 2 and len(self.context) == len(self.rows), f"{self.context.shape}"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rtt_ms(self) -> np.ndarray:
        """(q,) the answers, −1 = failed."""
        return self.measurements.rtt_ms[self.rows]

    @property
    def src_id(self) -> np.ndarray:
        """(q,) the sources."""
        return self.measurements.src_id[self.rows]

    @property
    def dst_id(self) -> np.ndarray:
        """(q,) the destinations."""
        return self.measurements.dst_id[self.rows]

    @property
    def prefix(self) -> np.ndarray:
        """(q,) which /24 (IPv4) or /48 (IPv6) the destinations lie in."""
        return self.measurements.prefix[self.dst_id]

    @classmethod
    def concatenate(cls, queries: Sequence[Queries]) -> Queries:
        """All queries, in order; of one table, with contexts of one width."""
        rows, context = (np.concatenate([getattr(one, name) for one in queries]) for name in ("rows", "context"))
        return cls(queries[0].measurements, rows, context)

    def given(self, k: int) -> Queries:
        """The same queries, given the first k of their context."""
        return replace(self, context=self.context[:, :k])

    def take(self, rows: Rows) -> Queries:
        """The queries at `rows`."""
        return replace(self, rows=self.rows[rows], context=self.context[rows])

    def answered(self, count: int | None = None) -> Queries:
        """The first `count` queries that were answered; all of these if None."""
        return self.take(np.flatnonzero(self.rtt_ms >= 0)[:count])

    def views(self, counts: Sequence[int]) -> list[QueryView]:
        """The view given k measurements, for each of `counts` that the context holds."""
        return [self.given(k).view() for k in counts if k <= self.context.shape[1]]

    def view(self) -> QueryView:
        """The queries without their answers."""
        table, given = self.measurements, self.context >= 0
        return QueryView(
            src_id=self.src_id,
            dst_id=self.dst_id,
            time_s=table.time_s[self.rows],
            context_dst_id=np.where(given, table.dst_id[self.context], np.int32(-1)),
            context_time_s=np.where(given, table.time_s[self.context], 0),
            context_rtt_ms=np.where(given, table.rtt_ms[self.context], np.float32(np.nan)),
            addresses=table.addresses,
        )


def earlier_measurements(
    measurements: Measurements, rows: np.ndarray, count: int, other_destinations: bool = False
) -> np.ndarray:
    """(q, count) places of the latest measurements before each row's second, most recent first, −1 = none.

    They are of the row's source address and of its kind. With `other_destinations` those to the destination's /24 or /48,
    and to other addresses of its host, are passed over, in a reach of 8 · count.
    """
    series = measurements.src_id.astype(np.int64) * len(KINDS) + measurements.kind
    order = np.lexsort((measurements.time_s, series))
    ordered, time_s = series[order], measurements.time_s[order]
    is_first = np.r_[True, (np.diff(ordered) != 0) | (np.diff(time_s) != 0)]  # of its series in its second
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    found = np.full((len(rows), count), -1, dtype=np.int32)
    for start in range(0, len(rows), 20_000):  # bounds the memory at some tens of MB
        some = rows[start : start + 20_000]
        back = place[some][:, None] - 1 - np.arange(count * (8 if other_destinations else 1))  # (q, reach)
        earlier = order[np.maximum(back, 0)]
        usable = (back >= 0) & (series[earlier] == series[some][:, None])
        if other_destinations:
            for unit in (measurements.prefix, measurements.host):
                usable &= unit[measurements.dst_id[earlier]] != unit[measurements.dst_id[some]][:, None]
        found[start : start + len(some)] = first_true(usable, earlier, count)
    return found


def first_true(usable: np.ndarray, values: np.ndarray, count: int, missing: float = -1) -> np.ndarray:
    """(q, count) the first `count` of the values (q, m) of each row that are usable (q, m), then `missing`."""
    order = np.argsort(~usable, axis=1, kind="stable")[:, :count]
    kept = np.where(np.take_along_axis(usable, order, 1), np.take_along_axis(values, order, 1), missing)
    return np.pad(kept, ((0, 0), (0, count - kept.shape[1])), constant_values=missing)


def place_in_group(group: np.ndarray) -> np.ndarray:
    """(n,) how many of the same group (n,) come before each."""
    order = np.argsort(group, kind="stable")
    place = np.empty(len(group), dtype=np.int64)
    place[order] = np.arange(len(group)) - np.searchsorted(group[order], group[order])
    return place


def pair_keys(source: np.ndarray, destination: np.ndarray) -> np.ndarray:
    """One int64 for each source and destination, or prefix, ascending with both; −1 where either is not known."""
    return np.where((source >= 0) & (destination >= 0), (source.astype(np.int64) << 32) | destination, -1)


def prefix_ids(addresses: np.ndarray, ipv4_bits: int, ipv6_bits: int) -> np.ndarray:
    """(a,) which prefix of whole bytes each of (a, 16) addresses lies in, counted from 0 in ascending order."""
    return distinct_addresses(network_of(addresses, ipv4_bits, ipv6_bits))[1]


def address_texts(addresses: np.ndarray, places: np.ndarray) -> list[str]:
    """The texts of those of (a, 16) addresses at `places` (n,), each made once."""
    used, index = np.unique(places, return_inverse=True)
    return np.array([format_address(addresses[i].tobytes()) for i in used], dtype=object)[index].tolist()
