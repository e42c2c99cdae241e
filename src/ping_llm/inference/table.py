"""Tables of measurements and of queries in, queries with their contexts out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import ADDRESS_BYTES
from ping_llm.inference.context import Context, Errors, columns_of, optional_rtt_ms, optional_time_s, parse_column
from ping_llm.inference.query import Endpoint, Query, SrcKnown, known_lengths

# Words of a column name that are taken for a slip, where the column itself is missing.
_HINTS = {
    "src_addr": ("src", "source"),
    "dst_addr": ("dst", "dest", "target"),
    "event_time": ("time",),
    "rtt": ("rtt", "latency"),
    "query_id": ("query",),
}
_NO_ROWS = np.zeros(0, dtype=np.int64)
_Name = TypeVar("_Name", str, bytes)

log = logging.getLogger(__name__)


def check_columns(table: pa.Table, what: str, needed: Sequence[str] = ("src_addr", "dst_addr")) -> None:
    """ValueError if a needed column is missing, or another one looks like a slip for one that is."""
    for known, hints in _HINTS.items():
        if known in table.column_names:
            continue
        slip = next((name for name in table.column_names if any(hint in name.lower() for hint in hints)), None)
        if slip is not None:
            raise ValueError(f"{what} has an unknown column {slip}; did you mean {known}?")
        if known in needed:
            raise ValueError(f"{what} has no column {known}; it has {', '.join(table.column_names) or 'none'}")


class History:
    """Measurements of many sources; of each, the last `length` of the same source before it.

    Before is by time, of the same second by the order given, or by that order where no times are known.
    """

    def __init__(self, measured: Context, length: int) -> None:
        count = len(measured)
        _, src = np.unique(measured.src.view(f"V{ADDRESS_BYTES}").ravel(), return_inverse=True)
        src = src.ravel()  # (n,) number of the source
        time_s = np.zeros(count) if measured.time_s is None else measured.time_s
        self.measured = measured
        self.order = np.lexsort((time_s, src))  # (n,) rows by source, then time; lexsort keeps the order of equals
        place = np.empty(count, dtype=np.int64)
        place[self.order] = np.arange(count)
        first = np.searchsorted(src[self.order], src)  # (n,) place of the first of the same source
        self._place, self._first = place, np.maximum(first, place - length)

    def queries(self, rows: Iterable[int]) -> list[Query]:
        """The queries for the results of the measurements `rows`, each with those before it as context, the latest last."""
        measured = self.measured
        return [
            Query(
                Endpoint.whole(measured.src[row].tobytes()),
                Endpoint.whole(measured.dst[row].tobytes()),
                None if measured.time_s is None else int(measured.time_s[row]),
                measured.take(self.order[self._first[row] : self._place[row]]),
            )
            for row in rows
        ]


@dataclass(frozen=True, eq=False)
class QueryTable:
    """The rows of a table of queries; `errors` says what is wrong with those that cannot be answered."""

    query_id: pa.ChunkedArray | pa.Array
    ids: list[str | None] | None  # query_id as text, None if the table has none
    src: list[str | None]
    dst: list[str | None]
    time_s: list[int | None]
    rtt_ms: np.ndarray  # (n,) −1 = failed, NaN = not given
    scored: bool
    errors: Errors

    def __len__(self) -> int:
        return len(self.src)

    @classmethod
    def parse(cls, table: pa.Table) -> QueryTable:
        """ValueError if a column is missing; what is wrong with a row goes into `errors`."""
        if not table.num_rows:
            raise ValueError("there are no queries; give at least one row with src_addr and dst_addr")
        check_columns(table, "the table of queries")
        given = set(table.column_names)
        nothing: list[Any] = [None] * table.num_rows
        ids = _texts(table.column("query_id")) if "query_id" in given else None
        time_s, wrong_time = (
            parse_column(table.column("event_time"), optional_time_s) if "event_time" in given else (nothing, {})
        )
        rtt_ms, wrong_rtt = parse_column(table.column("rtt"), optional_rtt_ms) if "rtt" in given else (nothing, {})
        return cls(
            table.column("query_id") if ids else pa.array(range(table.num_rows)),
            ids,
            _texts(table.column("src_addr")),
            _texts(table.column("dst_addr")),
            time_s,
            np.array(rtt_ms, dtype=np.float64),
            "rtt" in given,
            wrong_time | wrong_rtt,
        )

    def order(self) -> list[int]:
        """The rows to answer, those that may share a context or an answer one after the other."""
        ids = self.ids or [None] * len(self)

        def key(row: int) -> tuple[bool, str, int, str, str]:
            src, dst, time_s = self.src[row] or "", self.dst[row] or "", self.time_s[row]
            slow = _ends_within_byte(src) or _ends_within_byte(dst)
            return slow, src, -1 if time_s is None else time_s, ids[row] or "", dst

        return sorted((row for row in range(len(self)) if row not in self.errors), key=key)

    def distinct(
        self, rows: Sequence[int], contexts: ContextTable | None, most: int, src_known: SrcKnown
    ) -> tuple[np.ndarray, list[Query], np.ndarray]:
        """Those of the rows that can be answered, (b,), the different queries among them, and the query of each, (b,).

        A query gets at most 2 × `most` measurements as context. What is wrong with the other rows goes into `errors`.
        """
        places: dict[tuple[object, ...], int] = {}
        valid, queries, place = [], [], []
        for row in rows:
            src, dst, time_s = self.src[row], self.dst[row], self.time_s[row]
            try:
                own, context = _NO_ROWS, None
                if contexts is not None:
                    own = contexts.rows(self.ids[row] if self.ids else None, src, dst, time_s, most)
                    context = contexts.measurements.take(own)
                query = Query.parse(src, dst, time_s, context)
                if query.src is not None:
                    known_lengths(src_known, query.src)
            except ValueError as error:
                self.errors[row] = " ".join(str(error).split())
                continue
            key = src, dst, time_s, own.tobytes()
            if key not in places:
                places[key] = len(places)
                queries.append(query)
            valid.append(row)
            place.append(places[key])
        return np.array(valid, dtype=np.int64), queries, np.array(place, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class ContextTable:
    """Measurements of any sources as context: those of one query, and those of every later query of their source."""

    measurements: Context  # as given
    of_id: dict[str, np.ndarray]  # query_id → places of its measurements, in time order
    of_src: dict[bytes, np.ndarray]  # packed source → places of the measurements for all, in time order

    @classmethod
    def parse(cls, table: pa.Table, ids: list[str | None] | None) -> ContextTable:
        """ValueError names the row that is wrong; `ids` are those of the queries."""
        check_columns(table, "the context", ("src_addr", "dst_addr", "rtt"))
        own = _texts(table.column("query_id")) if "query_id" in table.column_names else [None] * len(table)
        if ids is None and any(own):
            raise ValueError("the context has a query_id, but the queries have none; give both or neither one")
        measurements = columns_of(table, "the context", "context row")
        src = [None if name else address.tobytes() for name, address in zip(own, measurements.src, strict=True)]
        of_id, of_src = _places([name or None for name in own]), _places(src)
        time_s, places = measurements.time_s, [*of_id.values(), *of_src.values()]
        if time_s is not None and any((np.diff(time_s[rows]) < 0).any() for rows in places):
            log.warning("the context is not in the order of event_time; it was put in order")
            for rows in places:
                rows[:] = rows[np.argsort(time_s[rows], kind="stable")]
        if unknown := of_id.keys() - set(ids or ()):
            count = sum(len(of_id[name]) for name in unknown)
            log.warning("%d rows of the context belong to no query: none has their query_id", count)
        return cls(measurements, of_id, of_src)

    def rows(self, query_id: str | None, src: str | None, dst: str | None, time_s: int | None, most: int) -> np.ndarray:
        """Places of the context of a query in time order, (m,): of what may be given, the `most` recent measurements,
        and of its destination the `most` recent; more can never fit."""
        rows = self.of_id.get(query_id or "", _NO_ROWS)
        shared = self._earlier(src, time_s) if src else _NO_ROWS
        if len(shared):
            rows = self._in_time_order(np.concatenate([rows, shared])) if len(rows) else shared
        if len(rows) <= most or not dst:
            return rows[-most:]
        early, late = rows[:-most], rows[-most:]
        same = early[Endpoint.parse(dst).covers(self.measurements.dst[early])]
        return np.concatenate([same[-most:], late])

    def _earlier(self, src: str, time_s: int | None) -> np.ndarray:
        """Places of the measurements for all of a source before a time, in time order."""
        end = Endpoint.parse(src)
        if not end.is_prefix:
            rows = self.of_src.get(end.packed, _NO_ROWS)
        else:
            covered = np.flatnonzero(end.covers(self._sources))
            places = list(self.of_src.values())
            rows = self._in_time_order(np.concatenate([_NO_ROWS, *(places[i] for i in covered)]))
        times = self.measurements.time_s
        return rows if time_s is None or times is None else rows[: np.searchsorted(times[rows], time_s, "left")]

    @cached_property
    def _sources(self) -> np.ndarray:
        """Sources of measurements for all, (s, 16)."""
        return np.frombuffer(b"".join(self.of_src), dtype=np.uint8).reshape(-1, 16)

    def _in_time_order(self, rows: np.ndarray) -> np.ndarray:
        rows = np.sort(rows)
        times = self.measurements.time_s
        return rows if times is None else rows[np.argsort(times[rows], kind="stable")]


def _places(names: Sequence[_Name | None]) -> dict[_Name, np.ndarray]:
    """The places where each name stands, ascending; None is no name."""
    places: dict[_Name, list[int]] = {}
    for place, name in enumerate(names):
        if name is not None:
            places.setdefault(name, []).append(place)
    return {name: np.array(rows) for name, rows in places.items()}


def _ends_within_byte(text: str) -> bool:
    """Whether this looks like a prefix that does not end on a byte: such a one is answered by itself."""
    length = text.rpartition("/")[2] if "/" in text else ""
    return length.isdigit() and int(length) % 8 > 0


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    return [None if value is None else str(value) for value in column.to_pylist()]
