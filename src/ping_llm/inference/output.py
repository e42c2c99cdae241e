"""Tables of answers in; files and JSON for programs, and tables for people, out."""

from __future__ import annotations

import datetime as dt
import io
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ping_llm.inference.context import read_table
from ping_llm.system.files import move_atomically

STANDARD = Path("-")  # standard input or output
_PROBABILITY = ("p_", "probability", "share")  # beginnings of the names of columns shown in percent
_MOST_ROWS = 40  # shown
_WIDTH = 160  # columns of text where there is no terminal to tell


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


def check_output(path: Path) -> None:
    """ValueError, before any work is done, if `write_table` could not write there."""
    if path != STANDARD and path.suffix not in _WRITERS:
        raise ValueError(f"{path}: a table is written as {', '.join(_WRITERS)}, or to - (standard output)")
    if path != STANDARD and not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")


def write_table(table: pa.Table, path: Path, suffix: str = ".csv") -> None:
    """Writes by the suffix of the name, complete or not at all; to standard output as CSV, or JSON as `suffix` says."""
    if path == STANDARD:
        text = io.BytesIO()
        _WRITERS[".jsonl" if suffix.startswith(".json") else ".csv"](table, text)
        sys.stdout.write(text.getvalue().decode())
        return
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        _WRITERS[path.suffix](table, file)
    move_atomically(aside, path)


def records(table: pa.Table) -> list[dict]:
    """Rows as JSON can say them: times as ISO 8601, and null for what is no finite number."""
    return [{name: _json_value(value) for name, value in row.items()} for row in table.to_pylist()]


def print_table(table: pa.Table, title: str, note: str = "") -> None:
    """Shows the first rows to a person; probabilities in percent."""
    from rich.console import Console
    from rich.table import Table

    shown = Table()
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        justify = "right" if pa.types.is_floating(kind) or pa.types.is_integer(kind) else "left"
        shown.add_column(name, justify=justify, overflow="fold")  # an address cut short would be none
    for row in table.slice(0, _MOST_ROWS).to_pylist():
        shown.add_row(*(_cell(name, value) for name, value in row.items()))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(title)
    console.print(shown)
    if table.num_rows > _MOST_ROWS:
        console.print(f"… and {table.num_rows - _MOST_ROWS:,} more; write them to a file with --output")
    if note:
        console.print(note, highlight=False)


def show(table: pa.Table, title: str, output: Path | None, as_json: bool, note: str = "", **more: object) -> None:
    """Writes the table to `output`; else prints one JSON object with `rows` and what is told in `more`, or a table."""
    if output is not None:
        write_table(table, output)
    elif as_json:
        print(json.dumps({"rows": records(table), **{name: _json_value(value) for name, value in more.items()}}))
    else:
        print_table(table, title, note)


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


def _write_json(table: pa.Table, file: io.IOBase) -> None:
    file.write(("[" + ",\n".join(map(json.dumps, records(table))) + "]\n").encode())


def _write_jsonl(table: pa.Table, file: io.IOBase) -> None:
    file.write("".join(json.dumps(row) + "\n" for row in records(table)).encode())


_WRITERS: dict[str, Callable[[pa.Table, io.IOBase], None]] = {
    ".parquet": pyarrow.parquet.write_table,
    ".csv": pyarrow.csv.write_csv,
    ".json": _write_json,
    ".jsonl": _write_jsonl,
}
