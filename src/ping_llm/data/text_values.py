"""Text as people and programs write it in tables in, addresses, RTTs and times out: the one set of rules of all tables.

    address    an IPv4 or IPv6 address
    RTT        a number of ms, 0 or more, or −1 for a failed ping
    time       see times.parse_time: ISO 8601, or Unix seconds; without a zone it is UTC
    id         any text, compared as it is written

Empty text is a missing value, and so is NaN where a number or a time may stand. Spaces around an address, a number or a
time do not count. Everything else is an error of its row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.data.measurement import ADDRESS_BYTES, FAILED_RTT_MS, pack_address
from ping_llm.data.times import LAST_TIME_S, parse_time

Errors = dict[int, str]
"""What is wrong, by row from 0."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_PLAIN_RTT = r"^(-1|\d{1,15}|\d{1,9}\.\d{1,9})$"
_PLAIN_SECONDS = r"^\d{9,10}$"
_PLAIN_TIME = r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,9})?(Z|\+00:?00)?$"


def parse_rtt_ms(text: str) -> float:
    """An RTT in ms, −1 = failed; ValueError if it is neither."""
    is_number = _NUMBER.fullmatch(text.strip())
    rtt_ms = float(text) if is_number else float("nan")
    if not (0 <= rtt_ms < float("inf") or rtt_ms == FAILED_RTT_MS):
        raise ValueError(f"rtt {text if is_number else repr(text)} must be ms, or −1 for a failed ping")
    return rtt_ms


def is_missing(text: str | None) -> bool:
    """Whether a number or a time is not given."""
    return text is None or text.strip().lower() in ("", "nan")


def are_missing(column: pa.Array, numbers: bool = True) -> np.ndarray:
    """Where a number or a time or, if not `numbers`, an address is missing, (n,) bool."""
    blank = pc.match_substring_regex(column, r"^\s*(nan)?\s*$" if numbers else r"^\s*$", ignore_case=True)
    return pc.fill_null(blank, True).to_numpy(zero_copy_only=False)


def rtts_ms(column: pa.Array) -> tuple[np.ndarray, Errors]:
    """Text (n,) to RTTs in ms (n,) float64, NaN where one is missing or wrong, and what is wrong."""
    values, errors = _parse_distinct(column, parse_rtt_ms, float("nan"), _plain_rtts)
    return values.astype(np.float64), errors


def times_s(column: pa.Array) -> tuple[np.ndarray, Errors]:
    """Text (n,) to Unix seconds (n,) int64, −1 where one is missing or wrong, and what is wrong."""
    values, errors = _parse_distinct(column, parse_time, -1, _plain_times)
    return values.astype(np.int64), errors


def addresses(column: pa.Array) -> tuple[np.ndarray, Errors]:
    """Text (n,) to packed addresses (n, 16), zeros where one is missing or wrong, and what is wrong."""
    encoded, texts = _encode(column)
    packed = np.zeros((len(texts) + 1, ADDRESS_BYTES), dtype=np.uint8)
    wrong = {}
    for place, text in enumerate(texts):
        if text.strip():
            try:
                packed[place] = np.frombuffer(pack_address(text.strip()), dtype=np.uint8)
            except ValueError as error:
                wrong[place] = str(error)
    return packed[encoded], _by_row(encoded, wrong)


def _parse_distinct(
    column: pa.Array, parse: Callable[[str], Any], missing: Any, plain: Callable[[pa.Array], np.ndarray | None]
) -> tuple[np.ndarray, Errors]:
    """`parse` of every row, each distinct text once; `plain` does the same of all at once, or says None."""
    done = plain(column) if len(column) else np.zeros(0)
    if done is not None:
        return done, {}
    encoded, texts = _encode(column)
    values: list[Any] = [missing] * (len(texts) + 1)
    wrong = {}
    for place, text in enumerate(texts):
        if not is_missing(text):
            try:
                values[place] = parse(text)
            except ValueError as error:
                wrong[place] = str(error)
    return np.array(values)[encoded], _by_row(encoded, wrong)


def _encode(column: pa.Array) -> tuple[np.ndarray, list[str]]:
    """The place of each row (n,) among the distinct texts, of a null after the last, and those texts."""
    encoded = column.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    return encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False), texts


def _by_row(encoded: np.ndarray, wrong: dict[int, str]) -> Errors:
    if not wrong:
        return {}
    return {int(row): wrong[encoded[row]] for row in np.flatnonzero(np.isin(encoded, list(wrong)))}


def _plain_rtts(column: pa.Array) -> np.ndarray | None:
    """RTTs that are all written in the usual way; None if one is not."""
    if column.null_count or not pc.all(pc.match_substring_regex(column, _PLAIN_RTT)).as_py():
        return None
    return column.cast(pa.float64()).to_numpy()


def _plain_times(column: pa.Array) -> np.ndarray | None:
    """Times that are all written in one of the usual ways; None if one is not."""
    if column.null_count:
        return None
    if pc.all(pc.match_substring_regex(column, _PLAIN_SECONDS)).as_py():
        return column.cast(pa.int64()).to_numpy()
    if not pc.all(pc.match_substring_regex(column, _PLAIN_TIME)).as_py():
        return None
    try:
        seconds = pc.utf8_slice_codeunits(column, 0, 19).cast(pa.timestamp("s")).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:  # there is no such day
        return None
    return seconds if seconds.min() >= 0 and seconds.max() <= LAST_TIME_S else None
