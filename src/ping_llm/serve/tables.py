"""The bytes of a file in, the measurements in it as rows of JSON out: by the rules of the command line."""

from __future__ import annotations

import datetime as dt
import io
from typing import Any

from ping_llm.data.ingest.decompress import codec_of, foreign_format
from ping_llm.data.measurement import format_address
from ping_llm.data.text_table import open_table
from ping_llm.inference.context import Context, columns_of
from ping_llm.serve.bodies import TooLarge

NAME = "the table"
_NAMED = 8  # columns, in a message
_COLUMNS = ("src_addr", "dst_addr", "rtt", "event_time")


def rows_of(content: bytes, most: int) -> list[dict[str, Any]]:
    """The rows of CSV, TSV or JSON in text, checked: src_addr, dst_addr, rtt (ms, −1 = failed) and, if given, event_time.

    ValueError says what is wrong with which row. Parquet and Arrow are refused, for some bytes of them may unpack to many.
    """
    begin = content[:512]
    codec = codec_of(begin)
    kind = f"packed as {codec.suffix}" if codec else foreign_format(begin)
    if begin.startswith((b"PAR1", b"ARROW1")):
        kind = "Parquet or Arrow"
    if kind:
        raise ValueError(f"{NAME} is {kind}; give CSV, TSV or JSON in plain text")
    if not content.strip():
        raise ValueError(f"{NAME} is empty; give CSV with a header, or one JSON object a line")
    table = open_table(io.BytesIO(content), NAME)
    missing = [name for name in _COLUMNS[:3] if name not in table.names]
    if missing:
        raise ValueError(f"{NAME} has no column {missing[0]}; it has {', '.join(table.names[:_NAMED]) or 'none'}")
    text = table.read_text(_COLUMNS)
    if text.num_rows > most:
        raise TooLarge(f"{text.num_rows:,} rows in a table, at most {most:,} are taken; leave out the oldest")
    return as_rows(columns_of(text, NAME))


def as_rows(measured: Context) -> list[dict[str, Any]]:
    """Measurements as rows of JSON."""
    src, dst = ([format_address(one.tobytes()) for one in end] for end in (measured.src, measured.dst))
    columns: dict[str, list[Any]] = {"src_addr": src, "dst_addr": dst, "rtt": measured.rtt_ms.tolist()}
    if measured.time_s is not None:
        columns["event_time"] = [iso(second) for second in measured.time_s.tolist()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def iso(time_s: float) -> str:
    """Unix seconds as ISO 8601."""
    return dt.datetime.fromtimestamp(time_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
