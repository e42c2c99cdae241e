"""Times as people write them in, Unix seconds out."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

from ping_llm.data.as_text import text_of

LAST_TIME_S = 253_402_300_799
"""9999-12-31T23:59:59Z: later times cannot be shown."""

_SECONDS = re.compile(r"\d+\.?\d*([eE]\+?\d+)?", re.ASCII)
_DIGITS_OF_A_DATE = {6: "%Y%m", 8: "%Y%m%d", 12: "%Y%m%d%H%M"}


def parse_time(value: Any) -> int:
    """Unix seconds of a datetime, a date (its first second), ISO 8601 text or a number; without a zone it is UTC.

    A number may be text. Where its digits are also those of a date, as in 20260104, it is neither: ValueError says so.
    """
    text = text_of(value)
    written = "" if text is None else text.strip()
    if _SECONDS.fullmatch(written):
        seconds = float(written)
        if _is_date(seconds):
            raise ValueError(f"{text!r} may be a date or seconds; write it like 2026-01-31T12:00:00Z")
        if not seconds <= LAST_TIME_S:
            raise ValueError(
                f"{text!r} is not a time in seconds between 1970 and 9999; of milliseconds give a thousandth"
            )
        return int(seconds)
    try:
        if "-" not in written.partition("T")[0] and "T" not in written:
            raise ValueError
        time = dt.datetime.fromisoformat(re.sub(r" ?(UTC|z)$", "+00:00", written))
    except ValueError:
        raise ValueError(f"{text!r} is not a time; write it like 2026-01-31T12:00:00Z") from None
    seconds = (time if time.tzinfo else time.replace(tzinfo=dt.UTC)).timestamp()
    if not 0 <= seconds <= LAST_TIME_S:
        raise ValueError(f"{text!r} is not a time between 1970 and 9999")
    return int(seconds)


def _is_date(seconds: float) -> bool:
    """Whether the digits of a number are those of a date of these centuries, with or without the time of day."""
    digits = str(int(seconds)) if seconds < 1e15 else ""
    form = _DIGITS_OF_A_DATE.get(len(digits))
    if form is None or not "1900" <= digits[:4] <= "2100":
        return False
    try:
        dt.datetime.strptime(digits, form)
    except ValueError:
        return False
    return True
