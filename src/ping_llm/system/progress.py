"""Work done in, progress on standard error out: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

LINE_EVERY_S = 10.0


def cores() -> int:
    """Those that this process may use: as many workers are the default."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def show_progress(title: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    """Gives a function to call with the units just done, of `total` in all."""
    done, begin = 0.0, time.monotonic()
    last = begin
    with _bar() if sys.stderr and sys.stderr.isatty() else nullcontext() as bar:
        task = bar and bar.add_task(title, total=total, text="")

        def advance(units: float) -> None:
            nonlocal done, last
            done += units
            now = time.monotonic()
            rate = done / max(now - begin, 1e-9)
            text = f"{done:,.0f} of {total:,.0f} {unit}, {rate:,.{0 if rate >= 100 else 1}f} {unit}/s"
            if bar:
                bar.update(task, completed=done, text=text)
            elif done >= total * (1 - 1e-9) or now - last >= LINE_EVERY_S:
                last = now
                left = f", {(total - done) / rate:,.0f} s left" if 0 < done < total else ""
                say(f"{title}: {text}{left}")

        yield advance


def say(line: str) -> None:
    """Prints a line on standard error; in a program whose standard error is closed, broken or full, it is lost."""
    with suppress(OSError, ValueError):  # ValueError: closed
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)


def by_part(advance: Callable[[float], None]) -> Callable[[Hashable, float], None]:
    """Gives a function to call, from any thread, with a part of the work and the units of it that are done by now."""
    shown: defaultdict[Hashable, float] = defaultdict(float)
    lock = threading.Lock()

    def reach(part: Hashable, units: float) -> None:
        with lock:
            gained = max(units - shown[part], 0.0)
            shown[part] += gained
            advance(gained)

    return reach


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
