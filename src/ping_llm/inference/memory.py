"""A folder of rows in, the measurements of a pair or of either end before a second out.

The measurements of one part lie sorted in a file of Arrow that is mapped into memory, not read: opening it takes no longer
for more of them. They stand by source, destination and time; two more orders are kept as places. A query is two or three
bisections and a look at what stands before, for any number of queries at once, and reaches no measurement of the query's
second or later.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import (
    FAILED_RTT_MS,
    as_text,
    binary_column,
    byte_matrix,
    distinct_addresses,
    log_rtt,
)
from ping_llm.data.rows import RowReader, manifest_sha256, read_manifest
from ping_llm.system.files import cache_folder, move_atomically

ANY_TIME = np.iinfo(np.int64).max
"""As the second of a query of no time: all measurements are earlier."""
_VERSION = 2  # of the file
_AT_ONCE = 1 << 22  # places that are looked up together: 32 MB a column

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Memory:
    """n measurements of a distinct addresses; queries name addresses as (q, 16) uint8 and seconds as (q,) int64.

    The columns stand by source, destination and time. Every query answers with places in them, (q, count) int64: of the
    measurements strictly before each second the latest, newest first, then −1. An address that is not held has none.
    """

    addresses: np.ndarray  # (a, 16) uint8, ascending
    src_id: np.ndarray  # (n,) int32, into addresses
    dst_id: np.ndarray  # (n,) int32
    time_s: np.ndarray  # (n,) int64, Unix seconds
    rtt_ms: np.ndarray  # (n,) float32, −1 = failed
    by_source: np.ndarray  # (n,) places by source and time
    by_destination: np.ndarray  # (n,) places by destination and time
    other_sources: bool = False  # whether those of other sources are evidence too: see evidence.py

    def __len__(self) -> int:
        return len(self.time_s)

    @classmethod
    def open(cls, rows: Path | str, part: str = "train") -> Memory:
        """The measurements of one part of a folder of rows; ValueError if it holds none, or is no such folder.

        Their sorted file is made on first use and kept in the folder, or among the user's caches if that cannot be written.
        It is made anew when the rows are.
        """
        read_manifest(rows)
        identity = hashlib.sha256(f"{_VERSION} {manifest_sha256(rows)}".encode()).hexdigest()
        folders, name = (Path(rows), cache_folder("memory")), f"memory-{part}-{identity[:16]}.arrow"
        for folder in folders:
            try:
                return cls._of_table(pa.ipc.open_file(pa.memory_map(str(folder / name))).read_all())
            except (OSError, pa.ArrowInvalid, KeyError):  # there is none, or it is damaged
                continue
        table = _sorted_table(RowReader(rows, part))
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write(table, folder / name)
            except OSError as error:
                log.info("%s cannot keep what is sorted of the rows (%s)", folder, error)
                continue
            if folder == Path(rows):
                for stale in set(folder.glob(f"memory-{part}-*.arrow")) - {folder / name}:
                    stale.unlink(missing_ok=True)  # who has it open keeps it
            return cls._of_table(pa.ipc.open_file(pa.memory_map(str(folder / name))).read_all())
        log.warning("neither %s nor %s can be written: the rows are sorted again each time they are opened", *folders)
        return cls._of_table(table)

    @classmethod
    def _of_table(cls, table: pa.Table) -> Memory:
        """KeyError if a column is missing; the arrays are views of the table."""
        dst = table.column("dst").chunk(0)
        names = ("src_id", "time_s", "rtt_ms", "by_source", "by_destination")
        columns: dict[str, Any] = {name: _values(table.column(name).chunk(0)) for name in names}
        return cls(addresses=byte_matrix(dst.dictionary), dst_id=_values(dst.indices), **columns)

    def ids(self, packed: np.ndarray) -> np.ndarray:
        """(q,) int64, where each of (q, 16) addresses stands among those held; −1 if it is not held."""
        known, wanted = as_text(self.addresses), as_text(packed)
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[place] == wanted, place, -1)

    def pair(self, src: np.ndarray, dst: np.ndarray, before_s: np.ndarray, count: int) -> np.ndarray:
        """Of the pair."""
        order = _Order(None, len(self))
        first, end = order.equal(self.dst_id, self.ids(dst), *order.equal(self.src_id, self.ids(src)))
        return order.latest(first, order.bisect(self.time_s, before_s, first, end), count)

    def of_source(self, src: np.ndarray, before_s: np.ndarray, count: int) -> np.ndarray:
        """Of the source, to any destination."""
        order = _Order(self.by_source, len(self))
        first, end = order.equal(self.src_id, self.ids(src))
        return order.latest(first, order.bisect(self.time_s, before_s, first, end), count)

    def to_destination(self, dst: np.ndarray, before_s: np.ndarray, count: int) -> np.ndarray:
        """Of any source, to the destination."""
        order = _Order(self.by_destination, len(self))
        first, end = order.equal(self.dst_id, self.ids(dst))
        return order.latest(first, order.bisect(self.time_s, before_s, first, end), count)

    def latest(self, sources: np.ndarray, dst: np.ndarray, before_s: int) -> np.ndarray:
        """(C, D) places of the latest of each of C sources, by id, to each of D destinations (D, 16), or −1."""
        C, D = len(sources), len(dst)
        src = self.addresses[np.repeat(sources, D)]
        return self.pair(src, np.tile(dst, (C, 1)), np.full(C * D, before_s), 1).reshape(C, D)

    def log_ms(self, places: np.ndarray) -> np.ndarray:
        """Logarithm of the RTTs in ms at places; NaN where there was no answer, or there is no place."""
        return log_rtt(np.where(places >= 0, self.rtt_ms[np.maximum(places, 0)], FAILED_RTT_MS))


@dataclass(frozen=True, eq=False)
class _Order:
    """n places in some order, and searches in it for q queries at once. Bounds within it are (q,) int64."""

    places: np.ndarray | None  # (n,); None is 0 … n − 1
    count: int

    def bisect(self, column: np.ndarray, value: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """(q,) where between `first` and `end` `column` (n,), which ascends there, reaches each value (q,), or `end`."""
        while (open_ := first < end).any():
            middle = (first + end) // 2
            place = np.minimum(middle, self.count - 1)
            below = open_ & (column[place if self.places is None else self.places[place]] < value)
            first, end = np.where(below, middle + 1, first), np.where(open_ & ~below, middle, end)
        return first

    def equal(
        self, column: np.ndarray, value: np.ndarray, first: np.ndarray | None = None, end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where between `first` and `end` (by default everywhere) a column has each value (q,): first and end, (q,)."""
        first = np.zeros(len(value), dtype=np.int64) if first is None else first
        end = np.full(len(value), self.count) if end is None else end
        return self.bisect(column, value, first, end), self.bisect(column, value + 1, first, end)

    def latest(self, first: np.ndarray, end: np.ndarray, count: int) -> np.ndarray:
        """(q, count) the last places from `first` to before `end`, the last one first, then −1."""
        found = np.full((len(first), count), -1, dtype=np.int64)
        step = max(1, _AT_ONCE // max(count, 1))
        for start in range(0, len(first), step):
            some = slice(start, start + step)
            at = end[some, None] - 1 - np.arange(count)
            place = np.maximum(at, 0)
            found[some] = np.where(at >= first[some, None], place if self.places is None else self.places[place], -1)
        return found


def _values(column: pa.Array) -> np.ndarray:
    """The numbers of a column without nulls, (n,), a view; `to_numpy` would import pandas first."""
    kind = np.dtype(column.type.to_pandas_dtype())
    return np.frombuffer(column.buffers()[1], kind)[column.offset : column.offset + len(column)]


def _sorted_table(rows: RowReader) -> pa.Table:
    """The measurements of rows, with all that `Memory` holds of them."""
    src, dst, time_s, rtt_ms, packed, held = [], [], [], [], [], 0
    for row in rows:
        src.append(held + row.src.astype(np.int64))
        dst.append(held + len(row.src_addresses) + row.dst.astype(np.int64))
        time_s.append(row.time_s)
        rtt_ms.append(row.rtt_ms.astype(np.float32))
        packed += [row.src_addresses, row.dst_addresses]
        held += len(row.src_addresses) + len(row.dst_addresses)
    addresses, place = distinct_addresses(np.concatenate(packed))
    columns = place[np.concatenate(src)], place[np.concatenate(dst)], np.concatenate(time_s), np.concatenate(rtt_ms)
    order = np.lexsort((columns[2], columns[1], columns[0]))
    src_id, dst_id, seconds, rtt = (column[order] for column in columns)
    small = np.int32 if len(order) < 1 << 31 else np.int64
    by_source, by_destination = (np.lexsort((seconds, ids)).astype(small) for ids in (src_id, dst_id))
    return pa.table(
        {
            "src_id": src_id,
            "dst": pa.DictionaryArray.from_arrays(pa.array(dst_id), binary_column(addresses)),
            "time_s": seconds,
            "rtt_ms": rtt,
            "by_source": by_source,
            "by_destination": by_destination,
        }
    )


def _write(table: pa.Table, path: Path) -> None:
    """Aside, under a name that no other process takes, and then in its place. OSError if it cannot be written."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        move_atomically(aside, path)
    finally:
        aside.unlink(missing_ok=True)
