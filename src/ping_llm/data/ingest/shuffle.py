"""Measurements in any order in, tables of whole groups out: pieces on disk, cut into buckets, lie between.

A bucket holds whole groups, by a hash of the group. Each piece holds a batch of every bucket, so what a shuffle costs grows
with pieces × buckets, and there are at most MAX_BUCKETS. A bucket that is too large for memory is cut into portions, at the
borders of groups: one after another they are the same rows as the bucket sorted at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from ping_llm.data.hashing import hash_below, hash_keys
from ping_llm.data.ingest import splits
from ping_llm.data.ingest.results import RESULT_SCHEMA
from ping_llm.data.measurement import ADDRESS_BYTES, as_text, binary_column, byte_matrix

MAX_BUCKETS = 256
PORTION_MEASUREMENTS = 1_000_000
"""Sorted at once where a bucket is cut; one is cut that holds half as many again. Each takes some 300 bytes meanwhile."""

SEEN_SCHEMA = pa.schema([("key", pa.binary(splits.KEY_BYTES)), ("address", pa.binary(ADDRESS_BYTES))])
_LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")
_GROUP_COLUMNS = ("probe_id", "src")  # decide the group of a measurement


def write_piece(path: Path, table: pa.Table, buckets: int) -> pa.Table:
    """Writes a table of RESULT_SCHEMA as one batch a bucket; gives the distinct (group, source address) pairs in it."""
    groups, src, addresses = _groups(table)
    bucket = hash_below(hash_keys(groups.keys, b"bucket/"), buckets)[groups.index]
    with pa.ipc.new_file(path, RESULT_SCHEMA, options=_LZ4) as piece:
        for part in _parts(table, bucket, buckets):
            piece.write_batch(part)
    group, source = np.divmod(np.unique(groups.index * len(addresses) + src), len(addresses))
    seen = {"key": binary_column(groups.keys[group]), "address": binary_column(addresses[source])}
    return pa.table(seen, schema=SEEN_SCHEMA)


def read_portions(inputs: Sequence[Path], bucket: int, scratch: Path) -> Iterator[pa.Table]:
    """The measurements of a bucket, with the number of their `input`, in tables of whole groups that ascend; one at least.

    `scratch` is a folder to be made, which is gone at the end.
    """
    tables, size = [], 0
    for table in _batches(inputs, bucket):
        tables.append(table)
        size += len(table)
        if 2 * size > 3 * PORTION_MEASUREMENTS:
            break
    else:
        yield pa.concat_tables(tables) if tables else _with_input(RESULT_SCHEMA.empty_table(), 0)
        return
    del tables
    cuts = _cuts(inputs, bucket)
    scratch.mkdir()
    paths = [scratch / f"portion-{number:05d}.arrow" for number in range(len(cuts) + 1)]
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(path, _BATCH_SCHEMA, options=_LZ4)) for path in paths]
        for table in _gathered(_batches(inputs, bucket)):
            groups, _, _ = _groups(table)
            portion = np.searchsorted(cuts, as_text(groups.keys), side="right")[groups.index]
            for writer, part in zip(writers, _parts(table, portion, len(paths)), strict=True):
                if part.num_rows:
                    writer.write_batch(part)
    for path in paths:
        with pa.memory_map(str(path)) as source:
            yield pa.ipc.open_stream(source).read_all()
        path.unlink()
    scratch.rmdir()


def ranked(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int64 indices into the (A, 16) distinct addresses of a column, ascending."""
    encoded = column.combine_chunks().dictionary_encode()
    addresses = byte_matrix(encoded.dictionary)
    order = np.argsort(as_text(addresses))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[encoded.indices.to_numpy()], addresses[order]


def _batches(inputs: Sequence[Path], bucket: int, columns: Sequence[str] = RESULT_SCHEMA.names) -> Iterator[pa.Table]:
    """The batches of one bucket from the pieces of all inputs, with the number of the input."""
    options = pa.ipc.IpcReadOptions(included_fields=[RESULT_SCHEMA.get_field_index(name) for name in columns])
    for number, folder in enumerate(inputs):
        for path in sorted(folder.glob("piece-*.arrow")):
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_file(source, options=options).get_batch(bucket)
            yield _with_input(pa.Table.from_batches([batch]), number)


def _with_input(table: pa.Table, number: int) -> pa.Table:
    return table.append_column("input", pa.array(np.full(len(table), number, dtype=np.int32)))


_BATCH_SCHEMA = _with_input(RESULT_SCHEMA.empty_table(), 0).schema


def _cuts(inputs: Sequence[Path], bucket: int) -> np.ndarray:
    """The first key of every portion but the first, as text: a portion holds PORTION_MEASUREMENTS and part of a group."""
    counts: list[pa.Table] = []
    for table in _gathered(_batches(inputs, bucket, _GROUP_COLUMNS)):
        groups, _, _ = _groups(table)
        counts.append(pa.table({"key": binary_column(groups.keys), "count": np.bincount(groups.index)}))
        counts = [
            pa.concat_tables(counts).group_by("key").aggregate([("count", "sum")]).rename_columns(["key", "count"])
        ]
    count = counts[0].sort_by("key").combine_chunks()
    before = np.cumsum(count["count"].to_numpy()) - count["count"].to_numpy()
    borders = np.flatnonzero(np.diff(before // PORTION_MEASUREMENTS)) + 1
    return as_text(byte_matrix(count["key"])[borders])


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of half PORTION_MEASUREMENTS and more: many small ones are slow."""
    waiting, size = [], 0
    for table in tables:
        waiting.append(table)
        size += len(table)
        if 2 * size >= PORTION_MEASUREMENTS:
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
    if size:
        yield pa.concat_tables(waiting)


def _groups(table: pa.Table) -> tuple[splits.Groups, np.ndarray, np.ndarray]:
    """The groups of n measurements, and their sources as (n,) indices into (A, 16) addresses, ascending."""
    src, addresses = ranked(table["src"])
    return splits.group_measurements(table["probe_id"].to_numpy(), src, addresses), src, addresses


def _parts(table: pa.Table, part: np.ndarray, parts: int) -> list[pa.RecordBatch]:
    """The rows of each of `parts` numbers, in their order; `part` (n,) holds that of each row."""
    batch = table.take(pa.array(np.argsort(part, kind="stable"))).combine_chunks().to_batches()[0]
    ends = np.cumsum(np.bincount(part, minlength=parts)).tolist()
    return [batch.slice(begin, end - begin) for begin, end in pairwise([0, *ends])]
