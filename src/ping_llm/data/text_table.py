"""A table of any format in, batches of its columns as text, exactly as written, out.

    CSV, TSV         UTF-8 (or UTF-16 with a mark); the delimiter (, tab ; |) is that of the header line
    JSON             objects one a line, one after another, or in an array; unneeded keys are passed over
    Parquet, Arrow   files of both kinds of Arrow; values are turned to text (see as_text)
    in memory        what in_memory takes

No type is guessed from the data: what a text means is decided by text_values. The format is recognised by the content of a
file, never by its name, and a name is never a pattern. A file is read in pieces, so it may be larger than memory:

    table = open_table(path)
    if {"src_addr", "dst_addr", "rtt"} <= set(table.names):
        for batch in table.batches(["src_addr", "dst_addr", "rtt", "event_time"]):
            rtt_ms, errors = rtts_ms(batch.column("rtt"))
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm.data import in_memory
from ping_llm.data.as_text import Column, Malformed, text_column
from ping_llm.data.csv_blocks import BLOCK_BYTES, BlockFile, csv_batches, header_of

Format = Literal["csv", "json", "parquet", "arrow", "memory"]
BATCH_ROWS = 50_000
"""Rows of a batch, at most."""
MOST_BYTES = 1 << 20
"""Of a header, and of a JSON object."""

_JSON_ROWS = 10_000
_GAP = re.compile(r"[\s,\[\]]*")
_STREAM_OF_ARROW = b"\xff\xff\xff\xff"
_Chunk = tuple[int, int, Mapping[str, Column]]  # number of the first row, from 1; how many rows; the columns
_Chunks = Callable[[Sequence[str] | None, Malformed | None], Iterator[_Chunk]]  # of some columns, or of all


class Number(str):
    """A number of JSON, as it is written there."""

    __slots__ = ()


@dataclass(frozen=True)
class TextTable:
    """A table that is read once, from its begin to its end.

    `names` are its columns; of JSON, the keys of its first 10,000 objects. A table in memory may be read again, and has a
    known number of rows.
    """

    format: Format
    names: tuple[str, ...]
    chunks: _Chunks
    num_rows: int | None = None

    def batches(self, columns: Sequence[str], malformed: Malformed | None = None) -> Iterator[pa.RecordBatch]:
        """Batches of at most BATCH_ROWS rows of exactly these columns, as text; null where one, or its value, is missing.

        A row that cannot be read is a ValueError with its number, from 1. With `malformed` it is told, and left out or, if
        only one of its values cannot be read, has null there; numbers are then of the rows that can be read.
        """
        schema = pa.schema([(name, pa.string()) for name in columns])
        for first_row, count, chunk in self.chunks(columns, malformed):
            found = [
                text_column(chunk[name], name, first_row, malformed) if name in chunk else pa.nulls(count, pa.string())
                for name in columns
            ]
            batch = pa.record_batch(found, schema=schema)
            yield from (batch.slice(at, BATCH_ROWS) for at in range(0, count, BATCH_ROWS))

    def read_text(self, columns: Sequence[str]) -> pa.Table:
        """All rows of those of the columns that the table has, as text."""
        here = [name for name in columns if name in self.names]
        return pa.Table.from_batches(self.batches(here), pa.schema([(name, pa.string()) for name in here]))

    def read_as_given(self) -> pa.Table | dict[str, list[Any]]:
        """All rows and columns, of the types of the format: of CSV text; of JSON lists, where a number is a Number."""
        if self.format == "csv":
            return self.read_text(self.names)
        chunks = [(count, chunk) for _, count, chunk in self.chunks(None, None)]
        if self.format != "json":
            tables = [pa.table(dict(chunk)) for _, chunk in chunks]
            if not tables:
                return pa.table({name: pa.array([], pa.string()) for name in self.names})
            return pa.concat_tables(tables)
        lists: dict[str, list[Any]] = {
            name: [] for name in dict.fromkeys(name for _, chunk in chunks for name in chunk)
        }
        for count, chunk in chunks:
            for name, values in lists.items():
                values.extend(chunk.get(name, [None] * count))
        return lists


def table_of(given: Any) -> TextTable:
    """A table in memory; ValueError if it is none."""
    given = in_memory.held(given)
    columns, count = in_memory.columns_of(given), in_memory.count_rows(given)

    def chunks(names: Sequence[str] | None, malformed: Malformed | None) -> Iterator[_Chunk]:
        yield 1, count, columns

    return TextTable("memory", tuple(columns), chunks, count)


def open_table(source: Path | BinaryIO | Iterable[bytes], name: str = "") -> TextTable:
    """A table in a file, an open file, or blocks of bytes of one (unpacked, say); `name` is that in messages.

    Of Parquet and Arrow only a path or a file that can be sought in will do. ValueError if there is no table in it.
    """
    if isinstance(source, Path):
        name = name or str(source)
        try:
            source = source.open("rb")
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from None
    file: Any = source if hasattr(source, "read") else io.BufferedReader(BlockFile(source), BLOCK_BYTES)
    name = name or "the table"
    head = file.read(BLOCK_BYTES)
    if head.startswith(b"PAR1"):
        return _parquet(_rewound(file, head), name)
    if head.startswith((b"ARROW1", _STREAM_OF_ARROW)):
        return _arrow(_rewound(file, head), name, stream=not head.startswith(b"ARROW1"))
    text = _utf8(chain([head], iter(lambda: file.read(BLOCK_BYTES), b"")))
    first = next(text)
    blocks = chain([first], text)
    return _json(blocks, name) if first.lstrip()[:1] in (b"{", b"[") else _csv(first, blocks, name)


def _csv(first: bytes, blocks: Iterator[bytes], name: str) -> TextTable:
    try:
        names, delimiter = header_of(first.decode("utf-8", "replace"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None

    def chunks(columns: Sequence[str] | None, malformed: Malformed | None) -> Iterator[_Chunk]:
        places = _places(names, columns, name)
        row = 0  # the header is read as a row
        for batch in (
            csv_batches(blocks, name, len(names), list(places.values()), delimiter, malformed) if names else ()
        ):
            batch = batch.slice(0 if row else 1)
            row = row or 1
            yield row, batch.num_rows, {column: batch.column(f"{place}") for column, place in places.items()}
            row += batch.num_rows

    return TextTable("csv", names, chunks)


def _json(blocks: Iterator[bytes], name: str) -> TextTable:
    items = _json_items(blocks)
    head = list(islice(items, _JSON_ROWS))
    names = dict.fromkeys(key for item in head if isinstance(item, dict) for key in item)

    def chunks(columns: Sequence[str] | None, malformed: Malformed | None) -> Iterator[_Chunk]:
        rest, first_row = chain(head, items), 1
        while some := list(islice(rest, _JSON_ROWS)):
            records = []
            for row, item in enumerate(some, first_row):
                if isinstance(item, dict):
                    records.append(item)
                elif malformed is None:
                    raise ValueError(f"{name}: row {row}: {item}")
                else:
                    malformed(row, str(item))
            keys = dict.fromkeys(key for record in records for key in record) if columns is None else columns
            yield first_row, len(records), {key: [record.get(key) for record in records] for key in keys}
            first_row += len(some)

    return TextTable("json", tuple(names), chunks)


def _json_items(blocks: Iterator[bytes]) -> Iterator[dict[str, Any] | ValueError]:
    """The objects of JSON that stand one after another or in an array; in place of what is none, what is wrong with it."""
    decode = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=_constant).raw_decode
    utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # what is not needed need be no UTF-8
    text, at, more, depth = "", 0, True, 0
    while True:
        gap = _GAP.match(text, at)
        assert gap, text
        depth += gap.group().count("[") - gap.group().count("]")
        at = end = gap.end()
        item: Any = None
        if at < len(text):
            try:
                item, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                item = ValueError(f"it is no JSON ({error})")
        elif not more:
            break
        if more and end in (at, len(text)) and len(text) - at <= MOST_BYTES:  # it may go on
            block = next(blocks, None)
            more = block is not None
            text, at = text[at:] + utf8.decode(block or b"", final=not more), 0
            continue
        at = end if end > at else text.find("\n", at) + 1 or len(text)
        yield item if isinstance(item, dict | ValueError) else ValueError("it is no JSON object")
    if depth:
        yield ValueError(
            "the array has no end: the file is cut off" if depth > 0 else "an array ends that has no begin"
        )


def _constant(text: str) -> Number | None:
    return None if text == "NaN" else Number(text)


def _parquet(file: BinaryIO, name: str) -> TextTable:
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        _refuse(name, error)
    names = tuple(parquet.schema_arrow.names)

    def chunks(columns: Sequence[str] | None, malformed: Malformed | None) -> Iterator[_Chunk]:
        wanted = list(_places(names, columns, name))
        yield from _arrow_chunks(parquet.iter_batches(BATCH_ROWS, columns=wanted), wanted, name)

    return TextTable("parquet", names, chunks)


def _arrow(file: BinaryIO, name: str, stream: bool) -> TextTable:
    try:
        opened = pa.ipc.open_stream(file) if stream else pa.ipc.open_file(file)
    except (pa.ArrowException, OSError) as error:
        _refuse(name, error)
    names = tuple(opened.schema.names)

    def chunks(columns: Sequence[str] | None, malformed: Malformed | None) -> Iterator[_Chunk]:
        batches = opened if stream else map(opened.get_batch, range(opened.num_record_batches))
        yield from _arrow_chunks(batches, list(_places(names, columns, name)), name)

    return TextTable("arrow", names, chunks)


def _arrow_chunks(batches: Iterable[pa.RecordBatch], wanted: Sequence[str], name: str) -> Iterator[_Chunk]:
    first_row = 1
    try:
        for batch in batches:
            yield first_row, batch.num_rows, {column: batch.column(column) for column in wanted}
            first_row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        _refuse(name, error)


def _places(names: Sequence[str], columns: Sequence[str] | None, table: str) -> dict[str, int]:
    """The place of each of the columns that there is; ValueError if one is there twice."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if columns is None or name in columns:
            if name in places:
                raise ValueError(f"{table} has the column {name} twice; rename one")
            places[name] = place
    return places


def _refuse(name: str, error: Exception) -> NoReturn:
    raise ValueError(f"{name} is cut off or corrupt ({str(error).partition(chr(10))[0]}); get it again") from None


def _rewound(file: BinaryIO, head: bytes) -> BinaryIO:
    """The file at its begin, in memory if it cannot go back there."""
    try:
        file.seek(0)
    except OSError:
        return io.BytesIO(head + file.read())
    return file


def _utf8(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Text as UTF-8 without a byte order mark; without one it is UTF-8 already."""
    first = next(blocks, b"")
    if not first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield first.removeprefix(codecs.BOM_UTF8)
        yield from blocks
        return
    utf16 = codecs.getincrementaldecoder("utf-16")("replace")
    for block in chain([first], blocks):
        yield utf16.decode(block).encode()
