"""Probe rows in, blocks of token windows out: the grain graph. Element i is a pure function of (seed, i).

An element is a window and, with `data.short_windows`, short ones beside it, of the same row. A step takes `batch_size`
elements: element i stands at place i mod batch_size of step i div batch_size. `block_steps` consecutive steps are a block,
the unit of work of a loader process. Reading a large row costs more than drawing many windows from it, so a large row that
is read gives `windows_per_read` elements, all at one place of the batch and ROWS_IN_TURN steps apart: neighbouring steps
learn from different rows. Small rows are read anew for each. Rows are visited by additive recurrences over their weights:
whatever the weights, every stretch of the run covers all rows as evenly as the numbers allow. A share of the elements shows
other probes beside that of the row, and a share a synthetic Internet instead. A run that goes on from another one's weights
can take some places of the batch from the other one's rows.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import weakref
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ping_llm.config import Config
from ping_llm.data.mesh import DestinationIndex
from ping_llm.data.rows import ProbeRow, RowReader
from ping_llm.data.synthetic.internets import internet
from ping_llm.data.windows import Window, encode_windows, most_measurements, sample_window, windows_per_row
from ping_llm.system.processes import end_with_parent

LARGE_ROW_MEASUREMENTS = (
    10_000  # about 0.1 MB, which takes as long to read as a window takes to draw and encode: 0.1 ms
)
# At one place of the batch; a block takes as many times the memory, and a run begins with a whole block.
ROWS_IN_TURN = 4
WINDOWS_PER_INTERNET = 1024  # of all kinds, unless a block has more
_STREAMS = {"train": 0, "val": 1}
# Steps of the two recurrences, irrational and unrelated: were they related, the rows that one reaches in a block could
# depend on where the other stands.
_BLOCK_STEP = (5**0.5 - 1) / 2
_WINDOW_STEP = 2**0.5 - 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT_BYTES = -1, -3, 1 << 25  # of malloc.h; the most that every glibc takes


def block_steps(windows_per_read: int) -> int:
    """Steps in a block; rows that give one window each need no turns."""
    return windows_per_read * ROWS_IN_TURN if windows_per_read > 1 else 1


class Look(NamedTuple):
    """What a place of a batch shows of a row."""

    row: ProbeRow
    window: Window
    short: tuple[Window, ...]


class WindowBlocks:
    """Random access to blocks: self[b] is (steps, batch, line) int16, PADDING where a row ran out and below it where a token
    is muted. A line is a window of seq_len + 1 tokens, then the short ones, of short_len + 1 each: see `windows_of`.

    `batch` is this rank's share of the batch: every world-th window, beginning with window `rank`.
    """

    def __init__(
        self,
        rows: RowReader,
        config: Config,
        batch_size: int,
        windows_per_read: int,
        rank: int = 0,
        world: int = 1,
        replay: RowReader | None = None,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"train.batch_size={batch_size} must be a multiple of the {world} processes")
        self.replay: WindowBlocks | None = None
        self.replayed: set[int] = set()  # places of the batch whose windows are of the other rows
        if replay is not None:
            self.replay = WindowBlocks(replay, config, batch_size, windows_per_read, rank, world)
            count = config.data.replayed(batch_size)
            self.replayed = {(2 * number + 1) * batch_size // (2 * count) for number in range(count)}
        self.rows, self.data, self.tokens = rows, config.data, config.model.seq_len + 1
        self.short_tokens = config.data.short_len + 1
        self.seed = (config.seed, _STREAMS.get(rows.part, 2))
        self.batch_size, self.steps, self.rank, self.world = batch_size, block_steps(windows_per_read), rank, world
        self.rows_in_turn = self.steps // windows_per_read
        weights = windows_per_row(rows.measurements, rows.ipv6_measurements, self.tokens)
        large = rows.measurements >= LARGE_ROW_MEASUREMENTS
        self.order = np.argsort(~large, kind="stable")  # large rows first
        self.cumulative = np.cumsum(weights[self.order]) / weights.sum()
        self.large_share = self.cumulative[large.sum() - 1] if large.any() else 0.0
        self.index = DestinationIndex(rows) if config.data.mesh else None
        self.phase = np.random.default_rng(self.seed).random(2)

    def __len__(self) -> int:
        return 1 << 40  # training has no last window

    def __getitem__(self, block: int) -> np.ndarray:
        mine = range(self.rank, self.batch_size, self.world)
        line = self.tokens + self.data.short_windows * self.short_tokens
        out = np.empty((self.steps, len(mine), line), dtype=np.int16)
        for column, place in enumerate(mine):
            looks = self.draw(block, place)
            out[:, column, : self.tokens] = encode_windows([look.window for look in looks], self.tokens)
            if self.data.short_windows:
                short = encode_windows([window for look in looks for window in look.short], self.short_tokens)
                out[:, column, self.tokens :] = short.reshape(self.steps, -1)
        return out

    def draw(self, block: int, place: int) -> list[Look]:
        """The windows at `place` of the batches of a block."""
        if self.replay is not None and place in self.replayed:
            return self.replay.draw(block, place)
        first, steps_of = block * self.steps * self.batch_size + place, defaultdict[int, list[int]](list)
        for step, number in enumerate(self.row_numbers(block, place)):
            steps_of[number].append(step)
        elements = range(first, first + self.steps * self.batch_size, self.batch_size)
        drawn: dict[int, Look] = {}
        for number, steps in steps_of.items():
            rngs = [np.random.default_rng((*self.seed, elements[step])) for step in steps]
            for step, row, rng in zip(steps, self._rows_shown(number, elements[steps[0]], rngs), rngs, strict=True):
                drawn[step] = self._look(row, rng)
        return [drawn[step] for step in range(self.steps)]

    def _look(self, row: ProbeRow, rng: np.random.Generator) -> Look:
        window = sample_window(row, self.data, self.tokens, rng)
        short = (sample_window(row, self.data, self.short_tokens, rng) for _ in range(self.data.short_windows))
        return Look(row, window, tuple(short))

    def _rows_shown(self, number: int, element: int, rngs: list[np.random.Generator]) -> Iterator[ProbeRow]:
        """What the windows that row `number` gives at once look at, the first of them being `element`.

        All look at the row, all at a mesh of it and the same others, each at a selection of its own, or all at a synthetic
        Internet, at times of the row.
        """
        rng = np.random.default_rng((*self.seed, element, 1)) if self.data.mesh + self.data.synthetic else None
        kind = rng.random() if rng else 1.0
        if 0 <= kind - self.data.mesh < self.data.synthetic:
            times = int(self.rows.first_time_s[number]), int(self.rows.last_time_s[number])
            source = internet(*self.seed, element // max(WINDOWS_PER_INTERNET, self.steps * self.batch_size))
            yield from (source.row(*times, most_measurements(self.tokens), own) for own in rngs)
            return
        row = self.rows[number]
        mesh = self.index.mesh(number, row, rng) if self.index and rng and kind < self.data.mesh else None
        yield from (mesh.row(most_measurements(self.tokens), own) if mesh else row for own in rngs)

    def row_numbers(self, block: int, place: int) -> list[int]:
        """Which rows the windows at `place` of the batches of a block are of: large ones in turn, or small ones."""
        turns = np.arange(self.rows_in_turn)
        reads = (block * self.rows_in_turn + turns) * self.batch_size + place
        steps = block * self.steps + np.arange(self.steps)
        large = np.tile((self.phase[0] + reads * _BLOCK_STEP) % 1.0, self.steps // len(turns))  # (steps,)
        small = (self.phase[1] + (steps * self.batch_size + place) * _WINDOW_STEP) % 1.0
        share = self.large_share
        return self._rows_at(np.where(large < share, large, share + small * (1.0 - share)))

    def _rows_at(self, at: np.ndarray) -> list[int]:
        """The rows that lie at shares (n,), from 0 to 1, of all weights."""
        found = np.searchsorted(self.cumulative, at, "right")
        return self.order[np.minimum(found, len(self.order) - 1)].tolist()  # rounding may leave the last sum below 1


def block_iterator(
    blocks: WindowBlocks, first_block: int, workers: int, prefetch: int
) -> Generator[np.ndarray, None, None]:
    """Endless blocks from `first_block` on, made ahead by a thread or by `workers` processes.

    Closed, or at the latest when the program ends, it ends its processes and frees the memory that they shared.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads a flag of its own, which older versions of absl refuse before that

    dataset = grain.MapDataset.source(blocks)[first_block:]
    read_options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    iterable = dataset.to_iter_dataset(read_options)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        iterable = iterable.mp_prefetch(options, worker_init_fn=partial(_begin_worker, os.getpid()))
    generator = _iterate(iterable)
    # Runs before multiprocessing, imported above, ends the processes; after that their memory would stay behind.
    atexit.register(_close, weakref.ref(generator))
    return generator


def _iterate(iterable: Iterable[np.ndarray]) -> Generator[np.ndarray, None, None]:
    iterator: Any = iter(iterable)
    try:
        while True:
            yield np.array(next(iterator))  # a copy: what lies in shared memory is freed at once
    finally:
        iterator.close()


def _close(reference: weakref.ref) -> None:
    generator = reference()
    if generator is not None:
        generator.close()


def keep_buffers() -> None:
    """Has glibc keep the memory of a large row for the next: mapped anew, its page faults took 60 % of reading it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # else another libc
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 4 * _KEPT_BYTES)


def _begin_worker(trainer: int, *_: object) -> None:
    """Run first in a loader process. Signals that reach the whole group of processes are for the trainer: it may want a
    batch more before it saves, and ends its loaders itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(trainer)
    keep_buffers()
