"""Tables of measurements in, their checked columns out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import ADDRESS_BYTES, byte_matrix
from ping_llm.data.text_table import TextTable, table_of
from ping_llm.data.text_values import Errors, addresses, are_missing, rtts_ms, times_s

Records: TypeAlias = Any
"""A table of Arrow, pandas or polars, a list of records, or a dict of columns: see data.in_memory."""

_REMEDIES = {
    "event_time": "; give it in every row, or in none",
    "rtt": "; it must be ms, or −1 for a failed ping",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Context:
    """Columns of measurements; as the context of a query, of one source and in time order where times are known.

    With `one_host` all its sources are addresses of one host, and count as one source. With `any_source` they may be other
    hosts than the source of the query; ValueError with both.
    """

    src: np.ndarray  # (n, 16) uint8
    dst: np.ndarray  # (n, 16) uint8
    rtt_ms: np.ndarray  # (n,) float64, −1 = failed
    time_s: np.ndarray | None  # (n,) int64
    one_host: bool = False
    any_source: bool = False

    def __post_init__(self) -> None:
        if self.one_host and self.any_source:
            raise ValueError(
                "one_host and any_source exclude each other: all sources are one host, or they may be several"
            )

    def __len__(self) -> int:
        return len(self.rtt_ms)

    @classmethod
    def parse(cls, measurements: object, one_host: bool = False, any_source: bool = False) -> Context:
        """The context that a table (see `columns_of`) holds; None holds none.

        Measurements out of time order are put in order, with a warning.
        """
        given = [] if measurements is None else measurements
        context = columns_of(given, "the context", "context row", one_host, any_source)
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
        return replace(self, src=self.src[rows], dst=self.dst[rows], rtt_ms=self.rtt_ms[rows], time_s=time_s)

    def time_order(self) -> np.ndarray:
        """The rows in time order, those of the same second and those without times in the order given, (n,)."""
        return np.argsort(np.zeros(len(self)) if self.time_s is None else self.time_s, kind="stable")


def warn_of_order(orders: Sequence[np.ndarray]) -> None:
    """Warns if the context was not given in time order: `orders` are the rows of each source or query in time order."""
    if any((np.diff(order) < 0).any() for order in orders):
        log.warning("the context is not in the order of event_time; it was put in order")


def columns_of(
    measurements: object,
    what: str = "the table",
    row_name: str = "row",
    one_host: bool = False,
    any_source: bool = False,
) -> Context:
    """The columns of a table (see `Records`), in its order: src_addr, dst_addr, rtt (ms, −1 = failed), maybe event_time.

    They may be of several sources. A time stands in every row or in none. ValueError names the column of `what`, or the
    row, as `row_name`, that is wrong.
    """
    table = measurements if isinstance(measurements, TextTable) else table_of(measurements)
    text = table.read_text(["src_addr", "dst_addr", "rtt", "event_time"])
    if not table.num_rows:
        nothing = np.zeros((0, ADDRESS_BYTES), dtype=np.uint8)
        return Context(nothing, nothing, np.zeros(0), None, one_host, any_source)
    for name in ("src_addr", "dst_addr", "rtt"):
        if name not in text.column_names:
            raise ValueError(f"{what} has no column {name}; it has {', '.join(table.names) or 'none'}")
    parsed: dict[str, np.ndarray] = {}
    errors: Errors = {}
    for name, parse in (("event_time", times_s), ("rtt", rtts_ms), ("dst_addr", addresses), ("src_addr", addresses)):
        column = (
            text.column(name).combine_chunks() if name in text.column_names else pa.nulls(text.num_rows, pa.string())
        )
        missing = are_missing(column, numbers=name in _REMEDIES)
        if name == "event_time" and missing.all():
            continue
        parsed[name], wrong = parse(column)
        errors |= {int(row): f"{name} is missing" + _REMEDIES.get(name, "") for row in np.flatnonzero(missing)} | wrong
    if errors:
        row = min(errors)
        raise ValueError(f"{row_name} {row + 1}: {errors[row]}")
    columns = (parsed["src_addr"], parsed["dst_addr"], parsed["rtt"], parsed.get("event_time"))
    return Context(*columns, one_host, any_source)
