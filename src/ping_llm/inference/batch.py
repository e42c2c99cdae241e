"""A table of questions and one of earlier measurements in, a table of answers out, row for row.

A row that cannot be answered says why in the column `error`, and the others are answered. Questions are answered some at a
time, ordered so that those of one source and one context stand together; of their laws only the statistics are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import FAILED_RTT_MS
from ping_llm.inference.context import Context, as_table, parse_time
from ping_llm.inference.distribution import QUANTILES
from ping_llm.inference.distributions import RTTDistributions
from ping_llm.inference.history import columns_of
from ping_llm.inference.query import Endpoint, Query, SrcKnown, told_lengths

if TYPE_CHECKING:
    from ping_llm.inference.predictor import PingModel

CHUNK = 64  # rows answered together: as many laws, 33 MB, are held at once
ANSWER_COLUMNS = ("p_fail", "mean_ms", *(f"q{q:g}" for q in QUANTILES))
SCORE_COLUMNS = ("nll_nats", "crps_log", "pit")
LEAST_TOKENS = 8  # of a context measurement: start, a source of no bytes, a whole IPv4 destination, a failure
# Words of a column name that are taken for a slip, where the column itself is missing.
_HINTS = {
    "src_addr": ("src", "source"),
    "dst_addr": ("dst", "dest", "target"),
    "event_time": ("time",),
    "rtt": ("rtt", "latency"),
    "query_id": ("query",),
}

log = logging.getLogger(__name__)


def answer_table(
    model: PingModel,
    queries: object,
    context: object = None,
    src_known: SrcKnown = "auto",
    advance: Callable[[float], None] = lambda rows: None,
) -> pa.Table:
    """The law of the result of each question, in the order of the questions.

    `queries` is what `as_table` takes: columns src_addr and dst_addr (an address, a prefix, or null for any), optionally
    query_id, event_time, and rtt (ms, −1 = failed), by which the answer is scored. `context` has src_addr, dst_addr, rtt
    and, optionally, event_time and query_id: a row with a query_id is context of that question, and one without is context
    of every question of its source, if it is earlier. Columns out: query_id (the number of the row, if none was given),
    ANSWER_COLUMNS; SCORE_COLUMNS, if there is an rtt; and error, if some row is bad. `advance` is told of rows done.
    """
    questions = _Questions.parse(as_table(queries))
    told_lengths(src_known, Endpoint.parse("::1"))  # what no source can be told under is no matter of a row
    history = None if context is None else _History.parse(as_table(context), questions.ids)
    most = model.gpt.config.seq_len // LEAST_TOKENS + 1
    columns = np.full((len(questions), len(ANSWER_COLUMNS) + len(SCORE_COLUMNS)), np.nan)
    order, used = questions.order(), history is None
    for first in range(0, len(order), CHUNK):
        rows = order[first : first + CHUNK]
        answered, asked, place = questions.distinct(rows, history, most, src_known)
        used |= any(len(query.context) for query in asked)
        done = 0
        for laws in model.laws(asked, src_known):
            here = (place >= done) & (place < done + len(laws))
            which = answered[here]
            columns[which] = _statistics(laws, place[here] - done, questions.rtt_ms[which])
            done += len(laws)
        advance(len(rows))
    if not used:
        log.warning("no question is of a source of the context, at a later time; the context was not used")
    return questions.answers(columns)


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


@dataclass(frozen=True, eq=False)
class _Questions:
    """The rows of a table of questions; `errors` says what is wrong with those that cannot be answered."""

    query_id: pa.ChunkedArray | pa.Array
    ids: list[str | None] | None  # query_id as text, None if the table has none
    src: list[str | None]
    dst: list[str | None]
    time_s: list[int | None]
    rtt_ms: np.ndarray  # (n,) −1 = failed, NaN = not given
    scored: bool
    errors: dict[int, str]

    def __len__(self) -> int:
        return len(self.src)

    @classmethod
    def parse(cls, table: pa.Table) -> _Questions:
        if not table.num_rows:
            raise ValueError("there are no queries; give at least one row with src_addr and dst_addr")
        check_columns(table, "the table of queries")
        count, errors = table.num_rows, {}
        given = set(table.column_names)
        ids = _texts(table.column("query_id")) if "query_id" in given else None
        scored = "rtt" in given
        return cls(
            table.column("query_id") if ids else pa.array(range(count)),
            ids,
            _texts(table.column("src_addr")),
            _texts(table.column("dst_addr")),
            _times(table.column("event_time"), errors) if "event_time" in given else [None] * count,
            _rtts(table.column("rtt"), errors) if scored else np.full(count, np.nan),
            scored,
            errors,
        )

    def order(self) -> list[int]:
        """The rows to answer, those that may share a context or an answer one after the other."""
        ids = self.ids or [None] * len(self)

        def key(row: int) -> tuple:
            src, dst, time_s = self.src[row] or "", self.dst[row] or "", self.time_s[row]
            slow = _ends_within_byte(src) or _ends_within_byte(dst)
            return slow, src, -1 if time_s is None else time_s, ids[row] or "", dst

        return sorted((row for row in range(len(self)) if row not in self.errors), key=key)

    def distinct(
        self, rows: Sequence[int], history: _History | None, most: int, src_known: SrcKnown
    ) -> tuple[np.ndarray, list[Query], np.ndarray]:
        """Those of the rows that can be answered, (b,), the different questions they ask, and which each of them asks, (b,).

        What is wrong with the others goes into `errors`.
        """
        places: dict[tuple, int] = {}
        answered, asked, place = [], [], []
        for row in rows:
            try:
                key, query = self._query(row, history, most)
                if query.src is not None:
                    told_lengths(src_known, query.src)
            except ValueError as error:
                self.errors[row] = " ".join(str(error).split())
                continue
            if key not in places:
                places[key] = len(places)
                asked.append(query)
            answered.append(row)
            place.append(places[key])
        return np.array(answered, dtype=np.int64), asked, np.array(place, dtype=np.int64)

    def _query(self, row: int, history: _History | None, most: int) -> tuple[tuple, Query]:
        """The question of a row, with at most 2 × `most` measurements of context, and what is equal for equal questions."""
        src, dst, time_s = self.src[row], self.dst[row], self.time_s[row]
        if history is None:
            return (src, dst, time_s), Query.parse(src, dst, time_s)
        own = self.ids[row] if self.ids else None
        rows = history.rows(own, src, dst, time_s, most)
        return (src, dst, time_s, rows.tobytes()), Query.parse(src, dst, time_s, history.measurements.take(rows))

    def answers(self, columns: np.ndarray) -> pa.Table:
        """The table of the answers, from the columns (n, 12) that `_statistics` gives."""
        names = ANSWER_COLUMNS + (SCORE_COLUMNS if self.scored else ())
        arrays = [pa.array(column, from_pandas=True) for column in columns.T]  # NaN is null
        table = pa.table([self.query_id, *arrays[: len(names)]], names=["query_id", *names])
        if self.errors:
            messages = [self.errors.get(row) for row in range(len(self))]
            table = table.append_column("error", pa.array(messages, pa.string()))
        return table


@dataclass(frozen=True, eq=False)
class _History:
    """Measurements of any sources as context: those of one question, and those of every question of their source."""

    measurements: Context  # as given
    of_id: dict[str, np.ndarray]  # query_id → places of its measurements, in time order
    of_src: dict[bytes, np.ndarray]  # packed source → places of the measurements for all, in time order

    @classmethod
    def parse(cls, table: pa.Table, ids: list[str | None] | None) -> _History:
        """ValueError names the row that is wrong."""
        check_columns(table, "the context", ("src_addr", "dst_addr", "rtt"))
        own = _texts(table.column("query_id")) if "query_id" in table.column_names else [None] * len(table)
        if ids is None and any(own):
            raise ValueError("the context has a query_id, but the queries have none; give both or neither one")
        measurements = columns_of(table, "context row")
        time_s = measurements.time_s
        src = [address.tobytes() for address in measurements.src]
        of_id = _places([name or None for name in own])
        of_src = _places([None if name else address for name, address in zip(own, src, strict=True)])
        if time_s is not None:
            unordered = False
            for groups in (of_id, of_src):
                for name, places in groups.items():
                    unordered |= bool((np.diff(time_s[places]) < 0).any())
                    groups[name] = places[np.argsort(time_s[places], kind="stable")]
            if unordered:
                log.warning("the context is not in the order of event_time; it was put in order")
        if strange := of_id.keys() - set(ids or ()):
            rows = sum(len(of_id[name]) for name in strange)
            log.warning("%d rows of the context belong to no question: no query has their query_id", rows)
        return cls(measurements, of_id, of_src)

    def rows(self, query_id: str | None, src: str | None, dst: str | None, time_s: int | None, most: int) -> np.ndarray:
        """Places of the context of a question in time order, (m,): of what it may be told, the `most` recent
        measurements, and of its destination the `most` recent; more can never fit."""
        rows = self.of_id.get(query_id, _NO_ROWS)
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
            packed, places = self._sources
            covered = np.flatnonzero(end.covers(packed))
            rows = self._in_time_order(np.concatenate([_NO_ROWS, *(places[i] for i in covered)]))
        times = self.measurements.time_s
        return rows if time_s is None or times is None else rows[: np.searchsorted(times[rows], time_s, "left")]

    @cached_property
    def _sources(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Sources of measurements for all, (s, 16), and the places of each."""
        packed = np.frombuffer(b"".join(self.of_src), dtype=np.uint8).reshape(-1, 16)
        return packed, list(self.of_src.values())

    def _in_time_order(self, rows: np.ndarray) -> np.ndarray:
        rows = np.sort(rows)
        times = self.measurements.time_s
        return rows if times is None else rows[np.argsort(times[rows], kind="stable")]


_NO_ROWS = np.zeros(0, dtype=np.int64)


def _places(names: Sequence[str | bytes | None]) -> dict[str | bytes, np.ndarray]:
    """The places where each name stands, ascending; None is no name."""
    places: dict[str | bytes, list[int]] = {}
    for place, name in enumerate(names):
        if name is not None:
            places.setdefault(name, []).append(place)
    return {name: np.array(rows) for name, rows in places.items()}


def _statistics(laws: RTTDistributions, which: np.ndarray, rtt_ms: np.ndarray) -> np.ndarray:
    """ANSWER_COLUMNS and SCORE_COLUMNS of the laws at `which` (b,) with the observed `rtt_ms` (b,), NaN = none; (b, 12)."""
    answers = np.column_stack([laws.p_fail, laws.mean, laws.quantile(np.array(QUANTILES))])[which]
    given = ~np.isnan(rtt_ms)
    scores = np.full((len(which), len(SCORE_COLUMNS)), np.nan)
    if given.any():
        laws = laws if np.array_equal(which, np.arange(len(laws))) else laws[which]  # a copy only where laws repeat
        observed = np.where(given, rtt_ms, FAILED_RTT_MS)
        scores = np.column_stack([-laws.log_density(observed), laws.crps(observed), laws.pit(observed)])
        scores[~given] = np.nan
    return np.column_stack([answers, scores])


def _ends_within_byte(text: str) -> bool:
    """Whether this looks like a prefix that does not end on a byte: such a one is answered by itself."""
    length = text.rpartition("/")[2] if "/" in text else ""
    return length.isdigit() and int(length) % 8 > 0


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    return [None if value is None else str(value) for value in column.to_pylist()]


def _times(column: pa.ChunkedArray, errors: dict[int, str]) -> list[int | None]:
    """Unix seconds of each row, None where there is none; what is wrong goes into `errors`."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)  # Python knows no nanoseconds
    values = [None if value != value else value for value in column.to_pylist()]  # NaN is no time
    times: dict[object, int | ValueError | None] = {None: None, "": None}
    for value in set(values) - times.keys():
        try:
            times[value] = parse_time(value)
        except ValueError as error:
            times[value] = error
    found = [times[value] for value in values]
    errors |= {row: str(time_s) for row, time_s in enumerate(found) if isinstance(time_s, ValueError)}
    return found


def _rtts(column: pa.ChunkedArray, errors: dict[int, str]) -> np.ndarray:
    """RTTs in ms of each row, NaN where there is none; what is wrong goes into `errors`."""
    rtt_ms = np.full(len(column), np.nan)
    for row, value in enumerate(column.to_pylist()):
        if value is None or value == "":
            continue
        try:
            rtt_ms[row] = value
        except (TypeError, ValueError):
            rtt_ms[row] = np.inf
        if not (np.isfinite(rtt_ms[row]) and (rtt_ms[row] >= 0 or rtt_ms[row] == FAILED_RTT_MS)):
            errors[row] = f"rtt {value!r} must be ms, or −1 for a failed ping"
    return rtt_ms
