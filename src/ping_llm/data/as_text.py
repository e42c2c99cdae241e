"""Values and columns of any type in, the text that one writes for them out.

Every kind of table is read as text, so that the same rules (see text_values) apply to a number of JSON, of Parquet and of
pandas. A number becomes the shortest text that reads back as the same number, at its own width; one that is whole has no
fraction: pandas makes floats of integers that stand beside missing values, and 1.0 is then the same id as 1. (Text stays as
it is: in a CSV, 1.0 and 1 are two ids.) Times are in ISO 8601, with Z where they have a zone. Missing values of any library
are None. What is neither text, nor a number, nor a time, is refused by the name of its type.
"""

from __future__ import annotations

import datetime as dt
import decimal
import ipaddress
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Column: TypeAlias = "pa.Array | pa.ChunkedArray | Sequence[Any]"
"""A column as Arrow, or as Python values."""
Malformed = Callable[[int, str], None]
"""Is given the number of a row, from 1, that cannot be read, and why."""

_WHOLE = 2.0**53  # up to here every whole number is a float, and no two have the same
_TEXT_TYPES = (
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    uuid.UUID,
)


def text_of(value: Any) -> str | None:
    """The text of a value, None if it is missing; ValueError, with the name of its type, if it has none."""
    if value is None or type(value).__name__ in ("NaTType", "NAType"):  # of pandas, which may not be installed
        return None
    if isinstance(value, str):
        return str.__str__(value)  # of an enumeration too, the text
    if isinstance(value, np.ndarray) and not value.ndim:
        return text_of(value[()])
    if isinstance(value, bytes):
        return value.decode()  # UnicodeDecodeError is a ValueError
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer) and not isinstance(value, np.timedelta64):
        return str(int(value))
    if isinstance(value, float | np.floating):
        return _text_of_float(value)
    if isinstance(value, decimal.Decimal):
        return None if value.is_nan() else str(value)
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else _trimmed(str(value))
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            return _trimmed(value.isoformat())
        try:
            return _trimmed(value.astimezone(dt.UTC).replace(tzinfo=None).isoformat()) + "Z"
        except OverflowError:
            raise ValueError(f"{value} is outside of the years 1 to 9999") from None
    if isinstance(value, dt.date):
        return value.isoformat()
    if isinstance(value, _TEXT_TYPES):
        return str(value)
    raise ValueError(f"a {type(value).__name__} is neither text, nor a number, nor a time")


def text_column(column: Column, name: str, first_row: int = 1, malformed: Malformed | None = None) -> pa.Array:
    """A column (n,) as text, null where a value is missing.

    A value without text is a ValueError that names the column and the row, or null and told to `malformed`. A type of
    Arrow none of whose values has text is a ValueError.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        if isinstance(column, pa.ChunkedArray):  # too large for one
            return pa.concat_arrays([text_column(chunk, name, first_row, malformed) for chunk in column.chunks])
    if isinstance(column, pa.Array):
        return _text_of_array(column, name, first_row, malformed)
    try:
        return pa.array([v if v.__class__ is str else text_of(v) for v in column], pa.string())
    except (ValueError, pa.ArrowException):  # UnicodeEncodeError is one
        return pa.array(_row_by_row(column, name, first_row, malformed), pa.string())


def _row_by_row(values: Sequence[Any], name: str, first_row: int, malformed: Malformed | None) -> list[str | None]:
    """The texts of values of which at least one has none."""
    texts: list[str | None] = []
    for row, value in enumerate(values, first_row):
        try:
            text = text_of(value)
            if text is not None:
                text.encode()
        except ValueError as error:
            why = f"{name}: {'it is no UTF-8' if isinstance(error, UnicodeError) else error}"
            if malformed is None:
                raise ValueError(f"row {row}: {why}") from None
            malformed(row, why)
            text = None
        texts.append(text)
    return texts


def _text_of_array(array: pa.Array, name: str, first_row: int, malformed: Malformed | None) -> pa.Array:
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _text_of_array(array.dictionary_decode(), name, first_row, malformed)
    if pa.types.is_run_end_encoded(kind):
        return _text_of_array(pc.run_end_decode(array), name, first_row, malformed)
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return pa.array([value and str(value) for value in array.to_pylist()], pa.string())
        if kind.extension_name not in ("arrow.json", "arrow.bool8"):
            raise ValueError(f"{name} is of type {kind.extension_name}; make it text, a number or a time")
        return _text_of_array(array.storage, name, first_row, malformed)
    if pa.types.is_timestamp(kind):
        # Arrow keeps a time with a zone as UTC; to write it in its zone would need a database of zones.
        text = pc.replace_substring(array.cast(pa.timestamp(kind.unit)).cast(pa.string()), " ", "T")
        text = pc.replace_substring_regex(text, r"\.0+$|(\.\d*[1-9])0+$", r"\1")
        return pc.binary_join_element_wise(text, "Z", "") if kind.tz else text
    if pa.types.is_date(kind):
        return array.cast(pa.date32()).cast(pa.string())
    if pa.types.is_floating(kind):
        encoded = array.dictionary_encode()
        texts = pa.array([text_of(value) for value in encoded.dictionary.to_numpy(zero_copy_only=False)], pa.string())
        return texts.take(encoded.indices)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _text_of_bytes(array, name, first_row, malformed)
    plain = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_decimal, pa.types.is_null)
    if any(test(kind) for test in (*plain, pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return array.cast(pa.string())
    raise ValueError(f"{name} is of type {kind}; make it text, a number or a time")


def _text_of_bytes(array: pa.Array, name: str, first_row: int, malformed: Malformed | None) -> pa.Array:
    if pa.types.is_fixed_size_binary(array.type):
        array = array.cast(pa.binary())
    try:
        return array.cast(pa.string())  # checks that it is UTF-8
    except pa.ArrowInvalid:
        return pa.array(_row_by_row(array.to_pylist(), name, first_row, malformed), pa.string())


def _text_of_float(value: Any) -> str | None:
    number = float(value)
    if number != number:  # NaN
        return None
    if abs(number) < _WHOLE and number == int(number):
        return str(int(number))
    return float.__repr__(value) if isinstance(value, float) else str(value)


def _trimmed(time: str) -> str:
    """A time without zeros at the end of the fraction of its second."""
    return time.rstrip("0").removesuffix(".") if "." in time else time
