"""A pipe, an old dump, or RIPE Atlas in, batches of lines as they come out.

Every feed gives (lines, marks): what was read, and marks that hold once those lines, and all before them, are committed.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
from itertools import islice
from pathlib import Path

from ping_llm.data.ingest.unpack import read_lines, whole_lines

Batch = tuple[list[bytes], dict[str, int]]
BATCH = 256
"""Lines of a batch, at most."""
WAIT_S = 0.5
"""How long a line may wait for others."""
_WAITING = 20_000  # lines, before those who bring more have to wait
_SORTED = 100_000  # lines of a dump that are put in order at once
_LONGEST_GAP_S = 86_400  # in a dump that is played
_BLOCK_BYTES = 1 << 16
_TIME = re.compile(rb'"timestamp"\s*:\s*"?(\d{1,10})')


class Inbox:
    """Lines of several threads, in the order in which they came; a thread that brings too many has to wait."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes | dict[str, int] | Exception | None] = queue.Queue(_WAITING)
        self._stopped = threading.Event()

    def put(self, item: bytes | dict[str, int] | Exception | None) -> None:
        """A line; marks that hold once it was taken; an error, or None, that ends the feed."""
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def stop(self) -> None:
        """From now on nothing is taken."""
        self._stopped.set()

    def pause(self, seconds: float) -> bool:
        """Waits, and says whether it was stopped."""
        return self._stopped.wait(seconds)

    @property
    def waiting(self) -> int:
        """Lines that were not taken yet."""
        return self._queue.qsize()

    def batches(self, stopped: Callable[[], bool]) -> Iterator[Batch]:
        """Until the feed ends or `stopped`; empty ones while nothing comes."""
        while not stopped():
            lines: list[bytes] = []
            marks: dict[str, int] = {}
            until = time.monotonic() + WAIT_S
            while len(lines) < BATCH and (left := until - time.monotonic()) > 0 and not stopped():
                try:
                    item = self._queue.get(timeout=min(left, 0.1))
                except queue.Empty:
                    continue
                if isinstance(item, bytes):
                    lines.append(item)
                elif isinstance(item, dict):
                    marks |= item
                else:
                    yield lines, marks
                    if item is not None:
                        raise item
                    return
            yield lines, marks


def start(name: str, inbox: Inbox, bring: Callable[[], None], ends: bool = False) -> None:
    """Runs what brings lines in a thread; its error ends the feed, and so does its end if it `ends`."""

    def run() -> None:
        try:
            bring()
        except Exception as error:
            inbox.put(error)
        else:
            if ends:
                inbox.put(None)

    threading.Thread(target=run, name=name, daemon=True).start()


def read_pipe(file: FileIO, inbox: Inbox) -> None:
    """Brings the lines of a pipe as they come, to its end."""
    for line in lines_of(iter(lambda: file.read(_BLOCK_BYTES), b"")):
        inbox.put(line)


def lines_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that blocks of bytes hold; one that is longer than a result can be is one that cannot be read."""
    for block in whole_lines(blocks):
        yield from (line + b"\n" for line in block.split(b"\n")[:-1])


def replay(
    dumps: Sequence[Path],
    speed: float,
    stopped: Callable[[], bool],
    size: int = BATCH,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Batch]:
    """The lines of old dumps, in order of time within 100,000 each, `speed` times as fast as they were measured.

    With `speed` 0 as fast as they can be taken. A gap of more than a day, as between two dumps, or where a probe's clock was
    wrong, is not waited for. ValueError, at the end, if a dump is damaged.
    """
    damage: list[str] = []
    begin, first_s = 0.0, 0
    last_s: int | None = None
    blocks = (block for dump in dumps for block in read_lines(dump, damage))
    lines = lines_of(blocks)
    while some := sorted(islice(lines, _SORTED), key=_time_of):
        for at in range(0, len(some), size):
            if stopped():
                return
            batch = some[at : at + size]
            time_s = _time_of(batch[-1])
            if speed and time_s:
                if last_s is None:
                    begin, first_s = clock(), next(filter(None, map(_time_of, batch)))
                if abs(time_s - (last_s or first_s)) > _LONGEST_GAP_S:
                    begin, first_s = clock(), time_s
                last_s = time_s
                while (left := (time_s - first_s) / speed - (clock() - begin)) > 0 and not stopped():
                    sleep(min(left, 0.2))
            yield batch, {}
    if damage:
        raise ValueError(damage[0])


def _time_of(line: bytes) -> int:
    """When a result was measured, by its line; 0 if it does not say."""
    found = _TIME.search(line)
    return int(found[1]) if found else 0
