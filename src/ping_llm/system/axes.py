"""A matplotlib axis in, readable ticks out."""

from __future__ import annotations

from typing import Any


def label_log_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a log axis: evenly spread where it spans less than a factor of 5, else at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axis.set_major_locator(MaxNLocator(7) if high / low < 5 else LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")
