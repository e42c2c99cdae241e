"""Times as people write them in, Unix seconds out."""

from __future__ import annotations

import datetime as dt

LAST_TIME_S = 253_402_300_799
"""9999-12-31T23:59:59Z: later times cannot be shown."""


def parse_time(value: object) -> int:
    """Unix seconds of a datetime, a date (its first second), ISO 8601 text or a number; without a zone it is UTC."""
    if isinstance(value, str):
        try:
            value = dt.datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a time; write it like 2026-01-31T12:00:00Z") from None
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime.combine(value, dt.time())
    if isinstance(value, dt.datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=dt.UTC)).timestamp()
    if not isinstance(value, int | float) or not 0 <= value <= LAST_TIME_S:
        raise ValueError(f"{value!r} is not a time in seconds between 1970 and 9999; of milliseconds give a thousandth")
    return int(value)
