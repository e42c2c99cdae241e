"""A table of measurements in, its checked columns and what stands before each measurement out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import ADDRESS_BYTES, is_ipv4, pack_addresses
from ping_llm.inference.context import Context, as_table, parse_time
from ping_llm.inference.query import Endpoint, Query


def columns_of(measurements: object, row_name: str = "row") -> Context:
    """The measurements of a table, or of records, in their order: src_addr, dst_addr, rtt (ms, −1 = failed), event_time.

    ValueError names the row, as `row_name`, that is wrong. event_time may be missing. They may be of several sources.
    """
    table = as_table(measurements)
    if not table.num_rows:
        return Context.parse(None)
    for column in ("src_addr", "dst_addr", "rtt"):
        if column not in table.column_names:
            raise ValueError(f"the measurements have no column {column}; they have {', '.join(table.column_names)}")
    src, dst = (_addresses(table.column(name), row_name) for name in ("src_addr", "dst_addr"))
    rtt_ms = _numbers(table.column("rtt"))
    wrong = ~np.isfinite(rtt_ms) | ((rtt_ms < 0) & (rtt_ms != -1))
    if wrong.any():
        raise ValueError(f"{row_name} {wrong.argmax() + 1}: rtt must be ms, or −1 for a failed ping")
    time_s = _times(table.column("event_time"), row_name) if "event_time" in table.column_names else None
    return Context(src, dst, rtt_ms, time_s)


class History:
    """Measurements of many sources; of each, the last `length` of the same source before it.

    Before is by time, of the same second by the order given, or by that order where no times are known.
    """

    def __init__(self, measured: Context, length: int) -> None:
        count = len(measured)
        _, src = np.unique(
            measured.src.view(f"V{ADDRESS_BYTES}").ravel(), return_inverse=True
        )  # (n,) number of the source
        src = src.ravel()
        time_s = np.zeros(count) if measured.time_s is None else measured.time_s
        self.measured = measured
        self.order = np.lexsort((time_s, src))  # (n,) rows by source, then time; lexsort keeps the order of equals
        place = np.empty(count, dtype=np.int64)
        place[self.order] = np.arange(count)
        first = np.searchsorted(src[self.order], src)  # (n,) place of the first of the same source
        self._place, self._first = place, np.maximum(first, place - length)
        self._widths = np.where(is_ipv4(np.stack([measured.src, measured.dst], axis=1)), 4, 16)  # (n, 2) bytes

    def before(self, row: int) -> Context:
        """The measurements before one, the latest last."""
        return self.measured.take(self.order[self._first[row] : self._place[row]])

    def queries(self, rows: Iterable[int]) -> list[Query]:
        """What is asked to foresee the results of the measurements `rows`."""
        measured = self.measured
        return [
            Query(
                Endpoint(measured.src[row].tobytes(), int(self._widths[row, 0])),
                Endpoint(measured.dst[row].tobytes(), int(self._widths[row, 1])),
                None if measured.time_s is None else int(measured.time_s[row]),
                self.before(row),
            )
            for row in rows
        ]


def _addresses(column: pa.ChunkedArray, row_name: str) -> np.ndarray:
    """(n, 16) uint8; each distinct text is read once."""
    encoded = column.combine_chunks()
    encoded = encoded if pa.types.is_dictionary(encoded.type) else encoded.dictionary_encode()
    packed, valid = pack_addresses(encoded.dictionary.to_pylist())
    index = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    wrong = ~np.append(valid, False)[index]  # null is −1, the last
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{row_name} {row + 1}: {column[row].as_py()!r} is not an IPv4 or IPv6 address")
    return packed[index]


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) float64; NaN for what is no number."""
    try:
        return column.cast(pa.float64()).to_numpy().astype(np.float64)
    except pa.ArrowInvalid:  # some text is no number
        return np.array([_number(value) for value in column.to_pylist()])


def _number(value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _times(column: pa.ChunkedArray, row_name: str) -> np.ndarray:
    """(n,) int64 Unix seconds."""
    kind = column.type
    if (pa.types.is_integer(kind) or pa.types.is_timestamp(kind)) and not column.null_count:
        if pa.types.is_timestamp(kind):
            column = column.cast(pa.timestamp("s", kind.tz), safe=False)
        time_s = column.cast(pa.int64()).to_numpy()
        if time_s.min() >= 0:
            return time_s
    times = []
    for row, value in enumerate(column.to_pylist()):
        try:
            times.append(parse_time(value))
        except ValueError as error:
            raise ValueError(f"{row_name} {row + 1}: {error}") from None
    return np.array(times, dtype=np.int64)
