"""Tables of measurements and of queries in, queries with their contexts out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import ADDRESS_BYTES
from ping_llm.data.text_table import TextTable
from ping_llm.data.text_values import Errors, rtts_ms, times_s
from ping_llm.inference.context import Context, columns_of, warn_of_order
from ping_llm.inference.query import Endpoint, Query, SrcKnown, check_context, known_lengths

# Words of a column name that are taken for a slip, where the column itself is missing.
_HINTS = {
    "src_addr": ("src", "source"),
    "dst_addr": ("dst", "dest", "target"),
    "event_time": ("time",),
    "rtt": ("rtt", "latency"),
    "query_id": ("query",),
}
_EVERY = b""  # stands for every source of a context of one host, or of any source
_NO_ROWS = np.zeros(0, dtype=np.int64)
_Name = TypeVar("_Name", str, bytes)

log = logging.getLogger(__name__)


def check_columns(names: Sequence[str], what: str, needed: Sequence[str] = ("src_addr", "dst_addr")) -> None:
    """ValueError if a needed column is missing, or another one looks like a slip for one that is."""
    for known, hints in _HINTS.items():
        if known in names:
            continue
        slip = next((name for name in names if any(hint in name.lower() for hint in hints)), None)
        if slip is not None:
            raise ValueError(f"{what} has an unknown column {slip}; did you mean {known}?")
        if known in needed:
            raise ValueError(f"{what} has no column {known}; it has {', '.join(names) or 'none'}")


class History:
    """Measurements of many sources; of each, the last `length` earlier ones of the same source.

    Those of the same second are not earlier. Where no times are known, those that stand before it are. Measurements of
    one host (see `Context`) are of one source.
    """

    def __init__(self, measured: Context, length: int) -> None:
        count = len(measured)
        src = np.zeros(count, dtype=np.int64)  # (n,) number of the source
        if not measured.one_host:
            src = np.unique(measured.src.view(f"V{ADDRESS_BYTES}").ravel(), return_inverse=True)[1].ravel()
        time_s = np.arange(count) if measured.time_s is None else measured.time_s
        self.measured = measured
        self.order = np.lexsort((time_s, src))  # (n,) rows by source, then time
        src, time_s = src[self.order], time_s[self.order]
        places = np.arange(count)
        same_second = np.append(False, (np.diff(src) == 0) & (np.diff(time_s) == 0))[:count]
        end = np.maximum.accumulate(
            np.where(same_second, 0, places)
        )  # (n,) of the earlier ones: the first of its second
        self._first, self._end = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)  # by row
        self._first[self.order] = np.maximum(np.searchsorted(src, src), end - length)
        self._end[self.order] = end

    def queries(self, rows: Iterable[int]) -> list[Query]:
        """The queries for the results of the measurements `rows`, each with the earlier ones as context, the latest last."""
        measured = self.measured
        return [
            Query(
                Endpoint.whole(measured.src[row].tobytes()),
                Endpoint.whole(measured.dst[row].tobytes()),
                None if measured.time_s is None else int(measured.time_s[row]),
                measured.take(self.order[self._first[row] : self._end[row]]),
            )
            for row in rows
        ]


class QueryRow(NamedTuple):
    """A query as it is given in a table, each None if it is not.

    `query_id` is text, and compared as it is written.
    """

    src: str | None
    dst: str | None
    time_s: int | None
    query_id: str | None


@dataclass(frozen=True, eq=False)
class QueryTable:
    """The rows of a table of queries; `errors` says what is wrong with those that cannot be answered."""

    rows: list[QueryRow]
    rtt_ms: np.ndarray  # (n,) −1 = failed, NaN = not given
    errors: Errors

    @classmethod
    def parse(cls, table: TextTable) -> QueryTable:
        """ValueError if a column is missing; what is wrong with a row goes into `errors`."""
        text = table.read_text(["src_addr", "dst_addr", "event_time", "rtt", "query_id"])
        if not table.num_rows:
            raise ValueError("there are no queries; give at least one row with src_addr and dst_addr")
        check_columns(table.names, "the table of queries")
        src, dst, ids = (_texts(text, name) for name in ("src_addr", "dst_addr", "query_id"))
        seconds, wrong_times = times_s(_column(text, "event_time"))
        rtt_ms, wrong_rtts = rtts_ms(_column(text, "rtt"))
        times = [None if second < 0 else int(second) for second in seconds]
        ends = ([one and (one.strip() or None) for one in column] for column in (src, dst))
        return cls(list(map(QueryRow, *ends, times, ids)), rtt_ms, wrong_times | wrong_rtts)

    def order(self) -> list[int]:
        """The rows to answer, those that may share a context or an answer one after the other."""

        def key(row: int) -> tuple[bool, str, int, str, str]:
            src, dst, time_s, query_id = self.rows[row]
            lengths = ((text or "").partition("/")[2] for text in (src, dst))
            # Answered by itself; three digits are enough, as 8 divides 1000, and Python refuses to read thousands
            slow = any(length.isdecimal() and int(length[-3:]) % 8 > 0 for length in lengths)
            return slow, src or "", -1 if time_s is None else time_s, query_id or "", dst or ""

        return sorted((row for row in range(len(self.rows)) if row not in self.errors), key=key)

    def distinct(
        self, rows: Sequence[int], contexts: ContextTable | None, most: int, src_known: SrcKnown
    ) -> tuple[np.ndarray, list[Query], np.ndarray]:
        """Those of the rows that can be answered, (b,), the different queries among them, and the query of each, (b,).

        A query gets at most 3 × `most` measurements as context. What is wrong with the other rows goes into `errors`.
        """
        queries: dict[tuple[object, ...], Query] = {}
        places: dict[tuple[object, ...], int] = {}
        valid, place = [], []
        for row in rows:
            src, dst, time_s, _ = self.rows[row]
            try:
                own = _NO_ROWS if contexts is None else contexts.rows(self.rows[row], most)
                context = None if contexts is None else contexts.measurements.take(own)
                source, destination = (Endpoint.parse(text) if text else None for text in (src, dst))
                query = Query.of(source, destination, time_s, context)
                if query.src is not None:
                    known_lengths(src_known, query.src)
            except ValueError as error:
                self.errors[row] = " ".join(str(error).split())
                continue
            key = src, dst, time_s, own.tobytes()
            queries.setdefault(key, query)
            place.append(places.setdefault(key, len(places)))
            valid.append(row)
        return np.array(valid, dtype=np.int64), list(queries.values()), np.array(place, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class ContextTable:
    """Measurements as context: those of one query, and those of every later query of their source.

    Where all are of one host, or may be of any source (see `Context`), those are of every later query that names a source.
    """

    measurements: Context  # in time order
    of_id: dict[str, np.ndarray]  # query_id → places of its measurements, ascending
    of_src: dict[
        bytes, np.ndarray
    ]  # packed source → places of the measurements for all, ascending; of one host or any source: all under b""

    @classmethod
    def parse(
        cls, table: TextTable, queries: Sequence[QueryRow], one_host: bool = False, any_source: bool = False
    ) -> ContextTable:
        """ValueError names the row that is wrong; `queries` are those with a query_id."""
        check_columns(table.names, "the context", ("src_addr", "dst_addr", "rtt"))
        measurements = columns_of(table, "the context", "context row", one_host, any_source)
        given = _texts(table.read_text(["src_addr", "query_id"]), "query_id")
        if any(given) and not queries:
            raise ValueError("the context has a query_id, but the queries have none; give both or neither one")
        order = measurements.time_order()
        measurements, own = measurements.take(order), [given[row] or None for row in order]
        sources = [_EVERY if one_host or any_source else address.tobytes() for address in measurements.src]
        src = [None if name else source for name, source in zip(own, sources, strict=True)]
        of_id, of_src = _places(own), _places(src)
        warn_of_order([order[rows] for rows in (*of_id.values(), *of_src.values())])
        if unknown := of_id.keys() - {query.query_id for query in queries}:
            count = sum(len(of_id[name]) for name in unknown)
            log.warning("%d rows of the context belong to no query: none has their query_id", count)
        return cls(measurements, of_id, of_src)

    def rows(self, query: QueryRow, most: int) -> np.ndarray:
        """Places of the context of a query in time order, (m,): of what may be given, the `most` recent measurements, of its
        destination the `most` recent and, beside other sources, of its source; more can never fit.

        ValueError if one of those of its query_id is of another source, or not earlier.
        """
        own = self.of_id.get(query.query_id or "", _NO_ROWS)
        if query.src:
            check_context(self.measurements.take(own), Endpoint.parse(query.src), query.time_s)
        rows = np.concatenate([own, self._earlier(query.src, query.time_s)])
        rows.sort(kind="stable")
        early, kept = rows[:-most], [rows[-most:]]
        if len(early) and query.dst:
            kept.append(early[Endpoint.parse(query.dst).covers(self.measurements.dst[early])][-most:])
        if len(early) and query.src and self.measurements.any_source:
            kept.append(early[Endpoint.parse(query.src).covers(self.measurements.src[early])][-most:])
        return np.unique(np.concatenate(kept))

    def _earlier(self, src: str | None, time_s: int | None) -> np.ndarray:
        """Places of the measurements for all of a source before a time, ascending."""
        if not src:
            return _NO_ROWS
        endpoint, times = Endpoint.parse(src), self.measurements.time_s
        if self.measurements.one_host or self.measurements.any_source:
            rows = self.of_src.get(_EVERY, _NO_ROWS)
        elif endpoint.is_prefix:
            covered = endpoint.covers(np.frombuffer(b"".join(self.of_src), np.uint8).reshape(-1, ADDRESS_BYTES))
            rows = np.sort(np.concatenate([_NO_ROWS, *compress(self.of_src.values(), covered)]))
        else:
            rows = self.of_src.get(endpoint.packed, _NO_ROWS)
        return rows if time_s is None or times is None else rows[: np.searchsorted(times[rows], time_s, "left")]


def _places(names: Sequence[_Name | None]) -> dict[_Name, np.ndarray]:
    """The places where each name stands, ascending; None is no name."""
    places: dict[_Name, list[int]] = {}
    for place, name in enumerate(names):
        if name is not None:
            places.setdefault(name, []).append(place)
    return {name: np.array(rows) for name, rows in places.items()}


def _column(text: pa.Table, name: str) -> pa.Array:
    """A column of a table of text, nulls if there is none."""
    return text.column(name).combine_chunks() if name in text.column_names else pa.nulls(text.num_rows, pa.string())


def _texts(text: pa.Table, name: str) -> list[str | None]:
    """Those of a column, None where one is missing."""
    return _column(text, name).to_pylist()
