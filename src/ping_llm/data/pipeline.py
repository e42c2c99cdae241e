"""Probe rows in, blocks of token windows out: the grain graph. Element i is a pure function of (seed, i).

A step takes `batch_size` windows: element i is window i mod batch_size of step i div batch_size. Reading a row costs
more than drawing a window from it, so a row that is read gives one window to each of `windows_per_read` consecutive
steps; the steps that share their reads are a block, the unit of work of a loader process. Rows are visited by an
additive recurrence over their weights: whatever the weights, every stretch of the run covers all rows as evenly as the
numbers allow.
"""

from __future__ import annotations

import os
import threading
import time

import numpy as np

from ping_llm.config import Config
from ping_llm.data.rows import ProbeRow, RowReader
from ping_llm.data.windows import encode_windows, sample_window, windows_per_row

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_STREAMS = {"train": 0, "val": 1}


class WindowBlocks:
    """Random access to blocks: self[b] is (windows_per_read, batch, seq_len + 1) int16, PADDING where a row ran out.

    `batch` is this rank's share of the batch: every world-th window, beginning with window `rank`.
    """

    def __init__(
        self, rows: RowReader, config: Config, batch_size: int, windows_per_read: int, rank=0, world=1
    ) -> None:
        if batch_size % world:
            raise ValueError(f"train.batch_size={batch_size} must be a multiple of the {world} processes")
        self.rows, self.data, self.tokens = rows, config.data, config.model.seq_len + 1
        self.seed = (config.seed, _STREAMS.get(rows.part, 2))
        self.batch_size, self.windows_per_read, self.rank, self.world = batch_size, windows_per_read, rank, world
        weights = windows_per_row(rows.measurements, rows.ipv6_measurements, self.tokens)
        self.cumulative = np.cumsum(weights) / weights.sum()
        self.phase = np.random.default_rng(self.seed).random()

    def __len__(self) -> int:
        return 1 << 40  # training has no last window

    def __getitem__(self, block: int) -> np.ndarray:
        mine = range(self.rank, self.batch_size, self.world)
        out = np.empty((self.windows_per_read, len(mine), self.tokens), dtype=np.int16)
        for column, place in enumerate(mine):
            row = self.rows[self.row_of_read(block * self.batch_size + place)]
            out[:, column] = self.windows(row, block, place)
        return out

    def row_of_read(self, read: int) -> int:
        """Which row the read-th read of the run takes."""
        return int(np.searchsorted(self.cumulative, (self.phase + read * _GOLDEN_RATIO) % 1.0, "right"))

    def windows(self, row: ProbeRow, block: int, place: int) -> np.ndarray:
        """The windows at `place` of the batches of a block: (windows_per_read, seq_len + 1)."""
        drawn = []
        for step in range(block * self.windows_per_read, (block + 1) * self.windows_per_read):
            rng = np.random.default_rng((*self.seed, step * self.batch_size + place))
            drawn.append(sample_window(row, self.data, self.tokens, rng))
        return encode_windows(row, drawn, self.tokens)


def block_iterator(blocks: WindowBlocks, first_block: int, workers: int, prefetch: int):
    """An endless grain iterator of blocks from `first_block` on, made ahead by a thread or by `workers` processes."""
    import grain

    dataset = grain.MapDataset.source(blocks)[first_block:]
    read_options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    iterable = dataset.to_iter_dataset(read_options)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return iter(iterable)


def _end_with_parent(_index: int, _workers: int) -> None:
    """Ends a loader process whose trainer was killed: nothing else would, and it would hold its memory for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
