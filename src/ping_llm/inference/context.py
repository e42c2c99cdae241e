"""Earlier measurements of a source as a user gives them in, columns out."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import ADDRESS_BYTES, pack_addresses

LAST_TIME_S = 253_402_300_799
"""9999-12-31T23:59:59Z: later times cannot be shown."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Context:
    """Earlier measurements of one source, in time order where times are known."""

    src: np.ndarray  # (n, 16) uint8
    dst: np.ndarray  # (n, 16) uint8
    rtt_ms: np.ndarray  # (n,) float64
    time_s: np.ndarray | None  # (n,) int64

    def __len__(self) -> int:
        return len(self.rtt_ms)

    @classmethod
    def parse(cls, measurements: object) -> Context:
        """Takes a table (see `as_table`) or None, of src_addr, dst_addr, rtt (ms, −1 = failed) and maybe event_time.

        ValueError names the row that is wrong. Measurements out of time order are put in order, with a warning.
        """
        table = None if measurements is None else as_table(measurements)
        if table is None or not table.num_rows:
            nothing = np.zeros((0, ADDRESS_BYTES), dtype=np.uint8)
            return cls(nothing, nothing, np.zeros(0), None)
        for column in ("src_addr", "dst_addr", "rtt"):
            if column not in table.column_names:
                raise ValueError(f"the context has no column {column}; it has {', '.join(table.column_names)}")
        src, dst = (_addresses(table.column(name).to_pylist()) for name in ("src_addr", "dst_addr"))
        rtt_ms = np.array([_number(value) for value in table.column("rtt").to_pylist()])
        wrong = ~np.isfinite(rtt_ms) | ((rtt_ms < 0) & (rtt_ms != -1))
        if wrong.any():
            raise ValueError(f"context row {wrong.argmax() + 1}: rtt must be ms, or −1 for a failed ping")
        if "event_time" not in table.column_names:
            return cls(src, dst, rtt_ms, None)
        time_s = parse_times(table.column("event_time"))
        if (np.diff(time_s) < 0).any():
            log.warning("the context is not in the order of event_time; it was put in order")
        return cls(src, dst, rtt_ms, time_s).take(np.argsort(time_s, kind="stable"))

    @classmethod
    def of_measurements(cls, table: pa.Table | None) -> Context:
        """Takes a table of MEASUREMENT_SCHEMA, in time order."""
        if table is None:
            return cls.parse(None)
        src, dst = (
            np.frombuffer(b"".join(table.column(name).to_pylist()), dtype=np.uint8).reshape(-1, ADDRESS_BYTES)
            for name in ("src", "dst")
        )
        return cls(src, dst, table.column("rtt_ms").to_numpy().astype(np.float64), table.column("time_s").to_numpy())

    def take(self, rows: np.ndarray | slice) -> Context:
        """The measurements at `rows`, in that order."""
        time_s = None if self.time_s is None else self.time_s[rows]
        return Context(self.src[rows], self.dst[rows], self.rtt_ms[rows], time_s)


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


def parse_time(value: dt.datetime | dt.date | str | float) -> int:
    """Unix seconds of a datetime, a date (its first second), ISO 8601 text or a number; without a zone it is UTC."""
    if isinstance(value, str):
        try:
            value = dt.datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a time; write it like 2026-01-31T12:00:00Z") from None
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime.combine(value, dt.time())
    if isinstance(value, dt.datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=dt.UTC)).timestamp()
    if not isinstance(value, int | float) or not 0 <= value <= LAST_TIME_S:
        raise ValueError(f"{value!r} is not a time in seconds between 1970 and 9999; of milliseconds give a thousandth")
    return int(value)


def parse_times(column: pa.ChunkedArray) -> np.ndarray:
    """Unix seconds of a column of times, (n,) int64: `parse_time` of each; ValueError names the first that is none."""
    if pa.types.is_integer(column.type) and not column.null_count:
        time_s = column.to_numpy().astype(np.int64)
        for value in (time_s.min(), time_s.max()):
            parse_time(int(value))
        return time_s
    return np.array([parse_time(value) for value in column.to_pylist()], dtype=np.int64)


def read_table(path: Path | str) -> pa.Table:
    """A table of measurements or queries from .parquet, .csv, .json or .jsonl."""
    import duckdb

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}")
    readers = {".parquet": "read_parquet", ".csv": "read_csv", ".json": "read_json", ".jsonl": "read_json"}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path}: a table must be .parquet, .csv, .json or .jsonl")
    try:
        return duckdb.connect().sql(f"SELECT * FROM {reader}($path)", params={"path": str(path)}).to_arrow_table()
    except duckdb.Error as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _number(value: object) -> float:
    """NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _addresses(texts: list[str]) -> np.ndarray:
    packed, valid = pack_addresses(texts)
    if not valid.all():
        row = int((~valid).argmax())
        raise ValueError(f"context row {row + 1}: {texts[row]!r} is not an IPv4 or IPv6 address")
    return packed
