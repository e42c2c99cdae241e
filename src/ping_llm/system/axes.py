"""A matplotlib axis in, readable ticks out."""

from __future__ import annotations

from typing import Any


def label_log_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a log axis: evenly spread where it spans less than a factor of 5, else at 1, 2 and 5; over more than
    three decades at the decades alone."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    marks = (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
    axis.set_major_locator(MaxNLocator(7) if high / low < 5 else LogLocator(subs=marks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:,.0f}")
