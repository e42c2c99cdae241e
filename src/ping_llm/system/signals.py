"""Signals in, calls of a function out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def on_signals(numbers: Iterable[signal.Signals], act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act(number)` when a signal comes inside the block, then puts the handlers back.

    In any thread but the main one, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, lambda number, _: act(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
