"""A dump of any shape in, measurements and counters out, chunk by chunk.

The shape is recognised by the content: Parquet, lines of Atlas results, a log of ping, or a table as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import pyarrow as pa

from ping_llm.data.ingest.choices import Packets
from ping_llm.data.ingest.ping_log import BEGIN, read_log
from ping_llm.data.ingest.tables import is_parquet, is_typed, parse_rows, read_rows
from ping_llm.data.ingest.text_tables import columns_of, read_text_rows
from ping_llm.data.ingest.unpack import DamagedDump, read_lines
from ping_llm.data.text_table import header_of, open_table

Parsed = Iterator[tuple[int, pa.Table, dict[str, int]]]
"""Of each chunk of a dump: its lines, their measurements, and the counters of the rest."""
Shape = Literal["results", "log", "table"]

_BEGIN = re.compile(BEGIN)
_LINES = 100  # that may show the shape
_HEADER_NAME = re.compile(r"(#?[A-Za-z_][\w .()\[\]/%#-]*)?")  # pandas gives its index no name
_NEEDED = {
    "address of the source (src_addr or from)": ("src_addr", "srcaddr", "from"),
    "address of the destination (dst_addr)": ("dst_addr", "addr"),
    "time (timestamp)": ("timestamp", "event_time", "start_time"),
    "RTT (result, or rtt)": ("result", "rtt", "min"),
}
_OF_ATLAS = ("fw", "msm_id")


def shape_of(head: Path) -> Shape:
    """The shape of a dump that is no Parquet, by its first lines, one a line."""
    lines = list(islice(_lines(head), _LINES))
    if any(_BEGIN.match(line) for line in lines[:5]):
        return "log"
    keys = next((keys for line in lines if (keys := _keys(line))), None)
    if keys is not None:
        return "table" if "rtt" in keys and "result" not in keys else "results"
    return "table" if lines and _is_header(lines[0].decode("utf-8", "replace")) else "results"


def what_is_missing(head: Path) -> list[str]:
    """What no JSON object among the first lines has, though a ping needs it; nothing if one is an Atlas result."""
    keys = set(chain.from_iterable(_keys(line) or () for line in islice(_lines(head), _LINES)))
    if not keys or keys.intersection(_OF_ATLAS):
        return []
    return [what for what, names in _NEEDED.items() if not keys.intersection(names)]


def parse_parquet(path: Path, name: str, packets: Packets, max_clock_skew_s: int, source: str | None) -> Parsed | None:
    """The rows of a Parquet file; None if it is none."""
    if not is_parquet(path):
        return None
    if is_typed(path):
        return ((len(rows), *parse_rows(rows, packets)) for rows in read_rows(path))
    return _table(path, name, packets, max_clock_skew_s, source)


def parse_text(
    shape: Shape,
    path: Path,
    chunks: Iterable[int],
    scratch: Path,
    name: str,
    packets: Packets,
    max_clock_skew_s: int,
    source: str | None,
) -> Parsed:
    """A log, from its chunks in `scratch`, or a table as text."""
    if shape == "log":
        yield from read_log(iter(chunks), scratch, name, source)
        return
    scratch.unlink()
    damage: list[str] = []
    yield from _table(read_lines(path, damage), name, packets, max_clock_skew_s, source)
    if damage:
        raise DamagedDump(damage[0])


def _table(
    given: Path | Iterable[bytes], name: str, packets: Packets, max_clock_skew_s: int, source: str | None
) -> Parsed:
    try:
        table = open_table(given, name)
    except ValueError as error:
        raise DamagedDump(str(error)) from None
    yield from read_text_rows(table, name, packets, max_clock_skew_s, source)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.strip())


def _keys(line: bytes) -> set[str] | None:
    """Of a JSON object that is a line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return set(value) if isinstance(value, dict) else None


def _is_header(line: str) -> bool:
    """Whether a line names columns, one of them of an RTT or an address."""
    try:
        names, _ = header_of(line)
    except ValueError:
        return False
    if len(names) < 2 or not any(names) or not all(map(_HEADER_NAME.fullmatch, names)):
        return False
    columns = columns_of(names)
    return bool(columns.packets or {"src", "dst"} & columns.of.keys() or "rtt" in line.lower())
