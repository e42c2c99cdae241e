"""Signals in, calls of a function out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def on_signals(numbers: Iterable[signal.Signals], act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act(number)` when a signal comes inside the block, then puts back the handlers that it did not change.

    In any thread but the main one, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        act(number)

    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)


def ignore_from_now_on(number: signal.Signals) -> None:
    """For a process that is ending by itself and has a last line to say; nothing in any thread but the main one."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, signal.SIG_IGN)
