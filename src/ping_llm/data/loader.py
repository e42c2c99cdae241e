"""Blocks of windows in, batches on the device out; exact resume from the number of steps taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ping_llm.config import Config, DataConfig
from ping_llm.data.pipeline import WindowBlocks, block_iterator
from ping_llm.data.rows import RowReader


def training_batches(
    config: Config, start_step: int, device: torch.device, rank: int = 0, world: int = 1
) -> Iterator[torch.Tensor]:
    """Endless batches from `start_step` on: (batch_size / world, line) int64 on the device, padding −1; see `windows_of`.

    Muted tokens are below that.
    """
    rows = RowReader(config.data.rows, "train")
    replay = RowReader(config.data.replay, "train") if config.data.replay else None
    blocks = WindowBlocks(rows, config, config.train.batch_size, config.data.windows_per_read, rank, world, replay)
    first_block, skipped = divmod(start_step, blocks.steps)
    iterator = block_iterator(blocks, first_block, config.data.workers, config.data.prefetch)
    try:
        steps = to_device(next(iterator), device)[skipped:]
        while True:
            yield from (step.long() for step in steps[:-1])
            last, steps = steps[-1], to_device(next(iterator), device)  # copied before the last one is trained on
            yield last.long()
    finally:
        iterator.close()


def windows_of(batch: torch.Tensor, data: DataConfig) -> list[torch.Tensor]:
    """The windows in the lines of a batch, (B, line): (B, seq_len + 1), and where there are short ones beside them those,
    (B · short_windows, short_len + 1), place by place."""
    if not data.short_windows:
        return [batch]
    tokens = data.short_len + 1
    long, short = batch.split([batch.shape[1] - data.short_windows * tokens, data.short_windows * tokens], dim=1)
    return [long, short.reshape(-1, tokens)]


def validation_windows(config: Config) -> torch.Tensor:
    """The fixed windows of val that every evaluation of a run scores: (eval_windows, seq_len + 1) int64, padding −1."""
    return fixed_windows(config, config.data.rows, "val", config.train.eval_windows)


def fixed_windows(config: Config, folder: Path, part: str, count: int) -> torch.Tensor:
    """`count` windows of a part of rows, (count, seq_len + 1) int64, padding −1; ValueError if the part is empty.

    They are the same for every recipe and every seed: drawn by the default shares, which augment nothing.
    """
    config = dataclasses.replace(config, data=DataConfig(rows=folder), seed=0)
    blocks = WindowBlocks(RowReader(folder, part), config, count, windows_per_read=1)
    return torch.from_numpy(blocks[0][0]).long()


def to_device(block: np.ndarray, device: torch.device) -> torch.Tensor:
    """An int16 block on the device: a quarter of the bytes of int64 cross the bus, from pinned memory, without a wait."""
    host = torch.from_numpy(block)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
