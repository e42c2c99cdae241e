"""Tables of any library in, their columns by name out; and new columns in, a table of the same kind out.

    kind       what is taken                                                  what comes out
    arrow      pyarrow.Table, RecordBatch, whatever hands out Arrow data      pyarrow.Table
    pandas     DataFrame                                                      DataFrame of the same index
    polars     DataFrame                                                      DataFrame
    records    a list of dicts; their keys together are the columns           list of dicts
    columns    a dict of lists, arrays or series of equal length              dict of lists

pandas and polars need not be installed: a table is recognised by its class, and made by that.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from ping_llm.data.as_text import Column

Kind = Literal["arrow", "pandas", "polars", "records", "columns"]


def kind_of(table: object) -> Kind:
    """ValueError if it is no table."""
    frames = {base.__module__.partition(".")[0] for base in type(table).__mro__ if base.__name__ == "DataFrame"}
    if "pandas" in frames:
        return "pandas"
    if "polars" in frames:
        return "polars"
    if hasattr(table, "__arrow_c_stream__") or hasattr(table, "__arrow_c_array__"):
        return "arrow"
    if isinstance(table, Mapping):
        return "columns"
    if isinstance(table, Sequence) and not isinstance(table, str | bytes):
        if all(isinstance(record, Mapping) for record in table):
            return "records"
        other = next(record for record in table if not isinstance(record, Mapping))
        raise ValueError(f"a {type(table).__name__} of {type(other).__name__} is no table; pass dicts, one a row")
    raise ValueError(f"a {type(table).__name__} is no table; pass one of Arrow, pandas or polars, or a list of dicts")


def columns_of(table: Any) -> dict[str, Column]:
    """The columns of a table by name, all of the same length; ValueError if it is none."""
    kind = kind_of(table)
    if kind == "records":
        keys = dict.fromkeys(name for record in table for name in record)
        return {str(name): [record.get(name) for record in table] for name in keys}
    if kind == "columns":
        columns = {str(name): _column(values, str(name)) for name, values in table.items()}
    else:
        if kind == "arrow" and not isinstance(table, pa.Table):
            table = _arrow_table(table)
        names = list(table.column_names if kind == "arrow" else table.columns)
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the table has the column {name} twice; rename one")
        if kind == "arrow":
            return {name: table.column(name) for name in names}
        columns = {str(name): _column(table[name], str(name)) for name in names}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns differ in length: {lengths}")
    return columns


def count_rows(table: Any) -> int:
    """Rows of a table."""
    kind = kind_of(table)
    if kind == "columns":
        return len(next(iter(table.values()))) if table else 0
    return table.num_rows if kind == "arrow" else len(table)


def held(table: Any) -> Any:
    """The table; as one of Arrow if it hands out Arrow data, which it may do only once."""
    return _arrow_table(table) if kind_of(table) == "arrow" else table


def taken(table: Any, rows: Sequence[int]) -> Any:
    """Those rows of a table, numbered from 0, in that order: a table of the same kind."""
    kind = kind_of(table)
    if kind == "columns":
        return {name: [values[row] for row in rows] for name, values in table.items()}
    if kind == "records":
        return [table[row] for row in rows]
    if kind == "pandas":
        return table.iloc[list(rows)]
    return table[list(rows)] if kind == "polars" else _arrow_table(table).take(pa.array(rows, pa.int64()))


def extended(given: Any, keep: Sequence[str], answers: pa.Table) -> Any:
    """The columns `keep` of a table as they are, then those of `answers`, of as many rows: a table of the same kind."""
    kind = kind_of(given)
    if kind == "records":
        kept = ({name: record.get(name) for name in keep} for record in given)
        return [own | row for own, row in zip(kept, answers.to_pylist(), strict=True)]
    if kind == "columns":
        return {name: given[name] for name in keep} | answers.to_pydict()
    if kind == "pandas":
        frame = answers.to_pandas()
        return given[list(keep)].assign(**{name: frame[name].array for name in frame})
    if kind == "polars":
        frame = sys.modules["polars"].from_arrow(answers)
        return given.select(list(keep)).hstack(frame) if keep else frame
    table = _arrow_table(given).select(list(keep))
    for name in answers.column_names:
        table = table.append_column(name, answers.column(name))
    return table


def _arrow_table(table: Any) -> pa.Table:
    if isinstance(table, pa.Table):
        return table
    try:
        return pa.table(table)
    except (pa.ArrowException, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"a {type(table).__name__} is no table ({reason}); pass one of Arrow or pandas") from None


def _column(values: Any, name: str) -> Column:
    """A column of any library as Arrow, or as Python values where one of Arrow would change or not take them."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise ValueError(
            f"the column {name} is a {type(values).__name__}; pass a list or an array, a value for each row"
        )
    kind = str(getattr(values, "dtype", "object"))
    if kind not in (
        "object",
        "Object",
        "category",
    ):  # of objects Arrow takes one type for all, and may cut a value to fit
        try:
            column = values.to_arrow() if hasattr(values, "to_arrow") else pa.array(values)
            return column if isinstance(column, pa.Array | pa.ChunkedArray) else list(values)
        except (pa.ArrowException, TypeError, ValueError, NotImplementedError):
            pass
    return list(values)
