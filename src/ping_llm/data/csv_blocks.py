"""Blocks of a CSV in, batches of its columns as bytes, exactly as written, out."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.csv

from ping_llm.data.as_text import Malformed

BLOCK_BYTES = 1 << 20

_PARSED_BYTES = 8 << 20  # of rows at once, and of one at most
_DELIMITERS = ",\t;|"
_END = "\x03"  # the character for the end of a text


def header_of(text: str) -> tuple[tuple[str, ...], str]:
    """The names in the line that a CSV begins with, and its delimiter; ValueError if that line is no CSV."""
    text = text.lstrip("\r\n")
    line = text.splitlines()[0] if text else ""
    delimiter = max(_DELIMITERS, key=line.count)
    try:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error as error:
        raise ValueError(f"the header cannot be read as CSV: {error}") from None
    return tuple(column.strip() for column in header), delimiter


def csv_batches(
    blocks: Iterator[bytes], name: str, width: int, wanted: Sequence[int], delimiter: str, malformed: Malformed | None
) -> Iterator[pa.RecordBatch]:
    """The wanted ones of the columns 0 to `width` − 1 as bytes, the header as first row."""
    bad: list[Any] = []

    def tell() -> None:
        for one in bad:
            why = f"it has {one.actual_columns} fields, the header {one.expected_columns}"
            if malformed is None:
                raise ValueError(f"{name}: row {one.number - 1}: {why}: {one.text[:80]!r}")
            malformed(one.number - 1, why)
        bad.clear()

    columns = [f"{place}" for place in range(width)]
    end = delimiter.join([f'"{_END}"'] * width)  # a last row: where a quote has no end, it is part of what is quoted
    source = BlockFile(chain(blocks, [f"\n{end}\n".encode()]))
    last = None
    try:
        for batch in _read_by_arrow(source, columns, wanted, delimiter, bad):
            tell()
            if last is not None:
                yield last
            last = batch
        tell()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name} cannot be read as CSV: {str(error).splitlines()[0]}") from None
    if last is not None and last.num_rows and last.column(0)[-1].as_py() == _END.encode():
        yield last.slice(0, last.num_rows - 1)
        return
    if last is not None:
        yield last
    raise ValueError(f"{name}: a quote has no end, and all rows after it are part of it; close it, or get it again")


def _read_by_arrow(
    source: BlockFile, columns: list[str], wanted: Sequence[int], delimiter: str, bad: list[Any]
) -> Iterator[pa.RecordBatch]:
    """The batches of a CSV; rows with another number of fields go into `bad`.

    Arrow reads ahead in a thread. If that lets go of an object of Python while Python ends, it aborts the process, whatever
    its exit code was to be. So it reads in one thread alone, which at the end is given something else to do, and has done
    it.
    """
    threads = pa.io_thread_count()

    def note(row: Any) -> str:
        bad.append(row)
        return "skip"

    pa.set_io_thread_count(1)
    try:
        yield from pyarrow.csv.open_csv(
            pa.PythonFile(io.BufferedReader(source, BLOCK_BYTES), mode="r"),
            pyarrow.csv.ReadOptions(column_names=columns, use_threads=False, block_size=_PARSED_BYTES),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.binary()),
                include_columns=[f"{place}" for place in wanted or [0]],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                null_values=[""],
            ),
        )
    finally:
        source.stop()
        nothing = pa.allocate_buffer(1)  # memory of Arrow, not of Python
        memoryview(nothing)[:] = b"x"
        pyarrow.csv.open_csv(pa.BufferReader(nothing))
        pa.set_io_thread_count(threads)


class BlockFile(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def stop(self) -> None:
        """Ends the file here."""
        self._blocks, self._rest = iter(()), memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)
