"""Tables of measurements in, their checked columns out. Addresses, RTTs and times are parsed here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import ADDRESS_BYTES, FAILED_RTT_MS, byte_matrix, pack_address
from ping_llm.data.times import parse_time

Records: TypeAlias = "pa.Table | Sequence[dict[str, Any]]"
"""A table of Arrow, of pandas, or of records."""
Errors = dict[int, str]
"""What is wrong, by row."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Context:
    """Columns of measurements; as the context of a query, of one source and in time order where times are known.

    With `one_host` all its sources are addresses of one host, and count as one source.
    """

    src: np.ndarray  # (n, 16) uint8
    dst: np.ndarray  # (n, 16) uint8
    rtt_ms: np.ndarray  # (n,) float64, −1 = failed
    time_s: np.ndarray | None  # (n,) int64
    one_host: bool = False

    def __len__(self) -> int:
        return len(self.rtt_ms)

    @classmethod
    def parse(cls, measurements: object, one_host: bool = False) -> Context:
        """The context that a table (see `columns_of`) holds; None holds none.

        Measurements out of time order are put in order, with a warning.
        """
        context = columns_of([] if measurements is None else measurements, "the context", "context row", one_host)
        order = context.time_order()
        warn_of_order([order])
        return context.take(order)

    @classmethod
    def of_measurements(cls, table: pa.Table | None, one_host: bool = False) -> Context:
        """Takes a table of MEASUREMENT_SCHEMA, in time order."""
        if table is None:
            return cls.parse(None, one_host)
        src, dst = (byte_matrix(table.column(name)) for name in ("src", "dst"))
        rtt_ms, time_s = (table.column(name).to_numpy() for name in ("rtt_ms", "time_s"))
        return cls(src, dst, rtt_ms.astype(np.float64), time_s, one_host)

    def take(self, rows: np.ndarray | slice) -> Context:
        """The measurements at `rows`, in that order."""
        time_s = None if self.time_s is None else self.time_s[rows]
        return Context(self.src[rows], self.dst[rows], self.rtt_ms[rows], time_s, self.one_host)

    def time_order(self) -> np.ndarray:
        """The rows in time order, those of the same second and those without times in the order given, (n,)."""
        return np.argsort(np.zeros(len(self)) if self.time_s is None else self.time_s, kind="stable")


def warn_of_order(orders: Sequence[np.ndarray]) -> None:
    """Warns if the context was not given in time order: `orders` are the rows of each source or query in time order."""
    if any((np.diff(order) < 0).any() for order in orders):
        log.warning("the context is not in the order of event_time; it was put in order")


def columns_of(measurements: object, what: str = "the table", row_name: str = "row", one_host: bool = False) -> Context:
    """The columns of a table (see `as_table`), in its order: src_addr, dst_addr, rtt (ms, −1 = failed), maybe event_time.

    They may be of several sources. ValueError names the column of `what`, or the row, as `row_name`, that is wrong.
    """
    table = as_table(measurements)
    if not table.num_rows:
        nothing = np.zeros((0, ADDRESS_BYTES), dtype=np.uint8)
        return Context(nothing, nothing, np.zeros(0), None, one_host)
    parsers: dict[str, Callable[[Any], Any]] = {"src_addr": _packed, "dst_addr": _packed, "rtt": _result_ms}
    for name in parsers:
        if name not in table.column_names:
            raise ValueError(f"{what} has no column {name}; it has {', '.join(table.column_names)}")
    parsers |= {"event_time": parse_time} if "event_time" in table.column_names else {}
    columns = []
    for name, parse in parsers.items():
        values, errors = parse_column(table.column(name), parse)
        for row, error in errors.items():
            raise ValueError(f"{row_name} {row + 1}: {error}")
        columns.append(np.array(values))
    src, dst, rtt_ms, *time_s = columns
    return Context(src, dst, rtt_ms.astype(np.float64), time_s[0].astype(np.int64) if time_s else None, one_host)


def parse_column(column: pa.ChunkedArray | pa.Array, parse: Callable[[Any], Any]) -> tuple[list[Any], Errors]:
    """`parse` of every row, each distinct value parsed once; None, and an error, where that is a ValueError."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)  # Python knows no nanoseconds
    values = column.to_pylist()
    values = list(map(str, values)) if pa.types.is_nested(column.type) else values
    parsed: dict[Any, Any] = {}
    wrong: dict[Any, str] = {}
    for value in set(values):
        try:
            parsed[value] = parse(value)
        except ValueError as error:
            wrong[value] = str(error)
    errors = {row: wrong[value] for row, value in enumerate(values) if value in wrong} if wrong else {}
    return [parsed.get(value) for value in values], errors


def optional_rtt_ms(value: object) -> float:
    """An RTT in ms, −1 = failed, NaN = not given; ValueError if it is neither."""
    return float("nan") if value is None or value == "" else _result_ms(value)


def optional_time_s(value: object) -> int | None:
    """Unix seconds, None if not given; ValueError if it is no time."""
    return None if value is None or value == "" or value != value else parse_time(value)  # NaN is no time


def as_table(table: object) -> pa.Table:
    """A table of Arrow, pandas or whatever else hands out Arrow data; records, or columns, as dicts; ValueError if none."""
    if isinstance(table, pa.Table):
        return table
    try:
        if isinstance(table, Sequence) and not isinstance(table, str):
            return pa.Table.from_pylist(list(table))
        return pa.table(table)
    except (pa.ArrowException, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"a {type(table).__name__} is no table ({reason}); pass one of Arrow or pandas") from None


def _packed(text: object) -> np.ndarray:
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not an IPv4 or IPv6 address")
    return np.frombuffer(pack_address(text), dtype=np.uint8)


def _result_ms(value: Any) -> float:
    try:
        rtt_ms = float(value)
    except (TypeError, ValueError):
        rtt_ms = float("nan")
    if not (0 <= rtt_ms < float("inf") or rtt_ms == FAILED_RTT_MS):
        raise ValueError(f"rtt {value!r} must be ms, or −1 for a failed ping")
    return rtt_ms
