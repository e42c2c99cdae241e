"""Files of tables and dumps in, tables out; and tables of answers in, files, JSON, or text for people out."""

from __future__ import annotations

import datetime as dt
import io
import json
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ping_llm.data.measurement import format_address
from ping_llm.data.rows import MANIFEST_NAME, RowReader, read_manifest
from ping_llm.inference.distribution import QUANTILES, RTTDistribution
from ping_llm.inference.plots import Drawable
from ping_llm.inference.table import check_columns
from ping_llm.system.files import move_atomically, try_file
from ping_llm.system.streams import check_standard_output, print_data

_READERS = {".parquet": "read_parquet", ".csv": "read_csv", ".json": "read_json", ".jsonl": "read_json"}  # of DuckDB
STANDARD = Path("-")  # standard input or output
_PROBABILITY = ("p_", "probability", "share")  # beginnings of the names of columns shown in percent
_MOST_ROWS = 40  # shown
_WIDTH = 160  # columns of text where there is no terminal to ask


log = logging.getLogger(__name__)


def read_table(path: Path) -> pa.Table:
    """A table of measurements or queries from .parquet, .csv, .json or .jsonl."""
    import duckdb

    if not path.is_file():
        raise ValueError(f"no file {path}")
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: a table must be .parquet, .csv, .json or .jsonl")
    query = f"SELECT * FROM {_READERS[path.suffix]}($path)"
    try:
        return duckdb.connect().sql(query, params={"path": str(path)}).to_arrow_table()
    except duckdb.Error as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def read_input(path: Path) -> tuple[pa.Table, str]:
    """A table from a file, or, for `-`, from CSV or JSON on standard input; and the suffix that names its format."""
    if path != STANDARD:
        return read_table(path), path.suffix
    text = sys.stdin.read()
    if not text.strip():
        raise ValueError("nothing came on standard input; give CSV with a header, or one JSON object a line")
    suffix = ".jsonl" if text.lstrip()[0] in "[{" else ".csv"
    with tempfile.TemporaryDirectory(prefix="ping-llm-") as scratch:
        file = Path(scratch) / f"input{suffix}"
        file.write_text(text)
        try:
            return read_table(file), suffix
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), "standard input")) from None


def read_measurements(path: Path) -> pa.Table:
    """The measurements of a table, a dump or a folder: src_addr, dst_addr, rtt, event_time."""
    is_table = path == STANDARD or (path.suffix in _READERS and not path.is_dir())
    if path.suffix in (".json", ".jsonl") and path.is_file():
        with path.open("rb") as file:
            is_table = b'"result"' not in file.read(1 << 16)  # an Atlas result holds one for each packet
    if is_table:
        table, _ = read_input(path)
        if "pings" not in table.column_names:
            check_columns(table, str(path), ("src_addr", "dst_addr", "rtt"))
            return table
    if not path.exists():
        raise ValueError(f"no file or folder {path}")
    return dump_table(path)


def read_context(path: Path | None) -> pa.Table | None:
    """The context that a file holds, None with a warning if that has no rows; ValueError if it can be no context."""
    if path is None:
        return None
    table = read_table(path)
    if not table.num_rows:
        log.warning("%s holds no measurements: it is a context of nothing", path)
        return None
    check_columns(table, f"the context {path}", ("src_addr", "dst_addr", "rtt"))
    return table


def dump_table(path: Path) -> pa.Table:
    """The measurements of an Atlas dump, a folder of dumps, or a folder of rows: src_addr, dst_addr, event_time, rtt."""
    if (path / MANIFEST_NAME).is_file():
        return _rows_table(path)
    from ping_llm.data.ingest.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="ping-llm-") as scratch:
        prepare([str(path)], Path(scratch) / "rows", split="none", keep_going=True)
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


def write_table(table: pa.Table, path: Path, suffix: str = ".csv") -> None:
    """Writes by the suffix of the name, complete or not at all; to standard output as CSV, or JSON as `suffix` says."""
    if path == STANDARD:
        text = io.BytesIO()
        _WRITERS[".jsonl" if suffix.startswith(".json") else ".csv"](table, text)
        return print_data(text.getvalue().decode())
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        _WRITERS[path.suffix](table, file)
    move_atomically(aside, path)


def records(table: pa.Table) -> list[dict]:
    """Rows as JSON can say them: times as ISO 8601, and null for what is no finite number."""
    return [{name: _json_value(value) for name, value in row.items()} for row in table.to_pylist()]


def show(table: pa.Table, title: str, output: Path | None, as_json: bool, note: str = "", **more: object) -> None:
    """Writes the table to `output`; else prints one JSON object with `rows` and `more`, or the first rows to a person,
    probabilities in percent."""
    if output is not None:
        return write_table(table, output)
    if as_json:
        return print_json({"rows": records(table), **{name: _json_value(value) for name, value in more.items()}})
    from rich.console import Console
    from rich.table import Table

    shown = Table()
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


_WRITERS: dict[str, Callable[[pa.Table, io.IOBase], object]] = {
    ".parquet": pyarrow.parquet.write_table,
    ".csv": pyarrow.csv.write_csv,
    ".json": lambda table, file: file.write(("[" + ",\n".join(map(json.dumps, records(table))) + "]\n").encode()),
    ".jsonl": lambda table, file: file.write("".join(json.dumps(row) + "\n" for row in records(table)).encode()),
}
