"""Files of tables and dumps in, tables out; and tables of answers in, files, JSON, or text for people out."""

from __future__ import annotations

import datetime as dt
import io
import json
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ping_llm.data.as_text import text_of
from ping_llm.data.in_memory import count_rows
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import MANIFEST_NAME, RowReader, read_manifest
from ping_llm.data.text_table import Number, open_table
from ping_llm.data.text_values import rtts_ms
from ping_llm.inference.distribution import QUANTILES, RTTDistribution
from ping_llm.inference.plots import Drawable
from ping_llm.inference.table import check_columns
from ping_llm.system.files import move_atomically, try_file
from ping_llm.system.streams import check_standard_output, print_data

TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".arrow", ".feather")
Table: TypeAlias = "pa.Table | dict[str, list[Any]]"
"""A table of Arrow or, as those of JSON are given, lists of values by the name of their column."""
PARQUET = b"PAR1"
STANDARD = Path("-")  # standard input or output
_PROBABILITY = ("p_", "probability", "share")  # beginnings of the names of columns shown in percent
_MOST_ROWS = 40  # shown
_WIDTH = 160  # columns of text where there is no terminal to ask


log = logging.getLogger(__name__)


def read_table(path: Path) -> Table:
    """A table of measurements or queries, with its values as they are written in the file."""
    if not path.exists() or path.is_dir():
        raise ValueError(f"no file {path}")
    if path.is_file() and path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path}: a table must be {', '.join(TABLE_SUFFIXES[:-1])} or {TABLE_SUFFIXES[-1]}")
    if path.is_file():
        from ping_llm.data.ingest.decompress import codec_of, foreign_format

        with path.open("rb") as file:
            begin = file.read(512)
        codec = codec_of(begin)
        kind = f"packed as {codec.suffix}" if codec else foreign_format(begin)
        if kind and not begin.startswith(PARQUET):
            raise ValueError(f"{path} is {kind}, which is not read as a table; unpack it first")
    return open_table(path).read_as_given()


def read_input(path: Path) -> tuple[Table, str]:
    """A table from a file, or, for `-`, from standard input in any of the formats; .jsonl if it is JSON, else .csv."""
    if path == STANDARD:
        given = getattr(sys.stdin, "buffer", None)
        content = given.read() if given else sys.stdin.read().encode()
        if not content.strip():
            raise ValueError("nothing came on standard input; give CSV with a header, or one JSON object a line")
        table = open_table(io.BytesIO(content), "standard input").read_as_given()
    else:
        table = read_table(path)
    return table, ".jsonl" if isinstance(table, dict) else ".csv"


def read_measurements(path: Path, keep_going: bool = False) -> Table:
    """The measurements of a table, a dump or a folder: src_addr, dst_addr, rtt, event_time. `keep_going`: see dump_table."""
    if path != STANDARD and not path.exists():
        raise ValueError(f"no file or folder {path}")
    if path == STANDARD or not (path.is_file() or path.is_dir()):
        from ping_llm.data.ingest.inputs import find_inputs, spooled

        with (
            tempfile.TemporaryDirectory(prefix="ping-llm-") as folder,
            spooled(find_inputs([path]), Path(folder)) as files,
        ):
            return _measurements(next(iter(files)), str(path), True, keep_going)
    return _measurements(path, str(path), path.suffix in TABLE_SUFFIXES and path.is_file(), keep_going)


def _measurements(path: Path, name: str, may_be_table: bool, keep_going: bool) -> Table:
    """Those of a file or a folder, with its `name` in messages."""
    if not may_be_table or _is_dump(path):
        return dump_table(path, keep_going)
    table = open_table(path, name).read_as_given()
    names = list(table) if isinstance(table, dict) else table.column_names
    check_columns(names, name, ("src_addr", "dst_addr", "rtt"))
    return _with_numbers(table)


def _is_dump(path: Path) -> bool:
    """Whether a file is packed, a log, or holds results of Atlas, and not a table: of a table a row has one RTT."""
    table = open_table(path)
    if table.format == "parquet":
        return "pings" in table.names
    words = ("src", "source", "dst", "dest", "rtt", "latency")
    is_table = any(word in name.lower() for name in table.names for word in words)
    if table.format != "json" or "rtt" in table.names:
        return bool(table.names) and not is_table
    return not is_table or bool({"result", "fw", "msm_id", "prb_id"} & set(table.names))


def _with_numbers(table: Table) -> Table:
    """A table with the RTTs as numbers where they are text, as those of CSV are."""
    if isinstance(table, dict) or table.schema.field("rtt").type != pa.string():
        return table
    rtt_ms, errors = rtts_ms(table.column("rtt").combine_chunks())
    if errors:  # the reader of its measurements says which
        return table
    place = table.column_names.index("rtt")
    return table.set_column(place, "rtt", pa.array(rtt_ms, from_pandas=True))


def read_context(path: Path | None) -> Table | None:
    """The context that a file holds, None with a warning if that has no rows; ValueError if it can be no context."""
    if path is None:
        return None
    table, _ = read_input(path)
    if not count_rows(table):
        log.warning("%s holds no measurements: it is a context of nothing", path)
        return None
    names = list(table) if isinstance(table, dict) else table.column_names
    check_columns(names, f"the context {path}", ("src_addr", "dst_addr", "rtt"))
    return table


def dump_table(path: Path, keep_going: bool = False) -> pa.Table:
    """The measurements of an Atlas dump, a folder of dumps, or a folder of rows: src_addr, dst_addr, event_time, rtt.

    Damage is a ValueError or, with `keep_going`, a warning, and what can be read is used.
    """
    if (path / MANIFEST_NAME).is_file():
        return _rows_table(path)
    from ping_llm.data.ingest.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="ping-llm-") as scratch:
        manifest = prepare([path], Path(scratch) / "rows", split="none", keep_going=keep_going)
        for problem in (dump["problem"] for dump in manifest["inputs"] if "problem" in dump):
            log.warning("%s: what can be read of it is used", problem)
        return _rows_table(Path(scratch) / "rows")


def _rows_table(folder: Path) -> pa.Table:
    """All parts of a folder of rows, row by row."""
    tables = []
    for part in (part for part, count in read_manifest(folder)["parts"].items() if count):
        for row in RowReader(folder, part):
            src, dst = (
                pa.array([format_address(address.tobytes()) for address in addresses], pa.string())
                for addresses in (row.src_addresses, row.dst_addresses)
            )
            times = pa.array(row.time_s).cast(pa.timestamp("s", "UTC"))
            columns = {"src_addr": src.take(pa.array(row.src)), "dst_addr": dst.take(pa.array(row.dst))}
            columns |= {"event_time": times, "rtt": pa.array(row.rtt_ms.astype(np.float64))}
            tables.append(pa.table(columns))
    if not tables:
        raise ValueError(f"{folder} holds no measurements to score")
    return pa.concat_tables(tables)


def check_output(path: Path | None) -> None:
    """ValueError, before any work is done, if `write_table` could not write there."""
    if path is None:
        return
    if path == STANDARD:
        return check_standard_output()
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: a table is written as {', '.join(_WRITERS)}, or to - (standard output)")
    try_file(path)


def write_table(table: Table, path: Path, suffix: str = ".csv") -> None:
    """Writes by the suffix of the name, complete or not at all; to standard output as CSV, or JSON as `suffix` says."""
    if path == STANDARD:
        text = io.BytesIO()
        _WRITERS[".jsonl" if suffix.startswith(".json") else ".csv"](table, text)
        return print_data(text.getvalue().decode())
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        _WRITERS[path.suffix](table, file)
    move_atomically(aside, path)


def as_arrow(table: Table) -> pa.Table:
    """The table as one of Arrow; numbers of JSON as numbers, but for those that are ids, which stay as they are written."""
    if isinstance(table, pa.Table):
        return table
    return pa.table({name: _arrow_column(values, name) for name, values in table.items()})


def _arrow_column(values: list[Any], name: str) -> pa.Array:
    there = [value for value in values if value is not None]
    if there and all(isinstance(value, Number) for value in there):
        whole = all(len(value) < 19 and value.lstrip("-").isdigit() and str(int(value)) == value for value in there)
        if whole or name != "query_id":
            return pa.array([value and (int(value) if whole else float(value)) for value in values])
    if not any(isinstance(value, str | list | dict) for value in there):
        return pa.array(values)
    return pa.array([_json_text(v) if isinstance(v, list | dict) else text_of(v) for v in values], pa.string())


def records(table: Table) -> list[dict]:
    """Rows as JSON can say them: times as ISO 8601, and null for what is no finite number."""
    rows = table.to_pylist() if isinstance(table, pa.Table) else _rows(table)
    return [{name: _json_value(value) for name, value in row.items()} for row in rows]


def _rows(lists: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))


def show(table: Table, title: str, output: Path | None, as_json: bool, note: str = "", **more: object) -> None:
    """Writes the table to `output`; else prints one JSON object with `rows` and `more`, or the first rows to a person,
    probabilities in percent."""
    if output is not None:
        return write_table(table, output)
    if as_json:
        return print_json(rows_json(table, **more))
    from rich import table as rich_table
    from rich.console import Console

    table = as_arrow(table)
    shown = rich_table.Table()
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        is_number = pa.types.is_floating(kind) or pa.types.is_integer(kind)
        shown.add_column(name, justify="right" if is_number else "left", overflow="fold")  # a cut address would be none
    for row in table.slice(0, _MOST_ROWS).to_pylist():
        shown.add_row(*(_cell(name, value) for name, value in row.items()))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(title)
    console.print(shown)
    if table.num_rows > _MOST_ROWS:
        console.print(f"… and {table.num_rows - _MOST_ROWS:,} more; write them to a file with --output")
    if note:
        console.print(note, highlight=False)


def rows_json(table: Table, **more: object) -> dict[str, Any]:
    """A table as one object of JSON: its `rows`, and `more`."""
    return {"rows": records(as_arrow(table)), **{name: _json_value(value) for name, value in more.items()}}


def print_json(value: object) -> None:
    """One line for programs."""
    print(json.dumps(value))


def print_distributions(
    shown: Mapping[str, RTTDistribution], title: str, true: Drawable | None, context_given: int
) -> None:
    """One table, a column for each distribution and for the true one, and a line on how the answers came about."""
    from rich.console import Console
    from rich.table import Table

    columns: dict[str, Drawable] = {**shown, **({} if true is None else {"true distribution": true})}
    table = Table()
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row("P(no answer)", *(f"{one.p_fail:.2%}" for one in columns.values()))
    for q in QUANTILES:
        name = "median" if q == 0.5 else f"{q:.0%} quantile"
        table.add_row(name, *("" if one.p_fail >= 1 else f"{one.quantile(q):.4g} ms" for one in columns.values()))
    found = list(shown.values())
    used = sorted({one.context_measurements for one in found})
    kept = f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}"
    kept = f"{kept} of {context_given}" if used[0] < context_given else kept
    note = (
        f"{max(one.forward_passes for one in found)} forward passes over {kept} earlier measurements; "
        f"{min(one.total_probability for one in found):.4%} of the raw probability lay on valid results"
    )
    if len(found) == 1 and len(found[0].src_weights) > 1:
        note += "\nknown of the source: " + ", ".join(f"{name} {w:.1%}" for name, w in found[0].src_weights.items())
    Console().print(title, table, note, sep="\n")


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4%}" if name.startswith(_PROBABILITY) else f"{value:.4g}"
    return f"{value:%Y-%m-%d %H:%M:%S}" if isinstance(value, dt.datetime) else str(value)


def _json_value(value: object) -> object:
    if isinstance(value, dt.datetime):
        return value.isoformat().replace("+00:00", "Z")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_text(value: Any) -> str:
    """JSON, in which a number is as it was written."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {_json_text(one)}" for name, one in value.items()) + "}"
    return "[" + ", ".join(map(_json_text, value)) + "]" if isinstance(value, list) else json.dumps(value)


_WRITERS: dict[str, Callable[[Table, io.IOBase], object]] = {
    ".parquet": lambda table, file: pyarrow.parquet.write_table(as_arrow(table), file),
    ".csv": lambda table, file: pyarrow.csv.write_csv(as_arrow(table), file),
    ".json": lambda table, file: file.write(("[" + ",\n".join(map(_json_text, records(table))) + "]\n").encode()),
    ".jsonl": lambda table, file: file.write("".join(_json_text(row) + "\n" for row in records(table)).encode()),
}
