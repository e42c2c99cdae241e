"""Batches are pure functions of (seed, step): the same for any worker, process, restart and slicing."""

import dataclasses
import os
import pickle
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data.loader import training_batches, validation_windows
from ping_llm.data.pipeline import WindowBlocks, block_iterator
from ping_llm.data.rows import RowReader
from ping_llm.data.tokenization import decode

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(rows_folder) -> Config:
    return Config(
        model=ModelConfig(seq_len=128),
        data=DataConfig(rows=rows_folder, windows_per_read=3),
        train=TrainConfig(batch_size=8, eval_windows=16),
    )


def batches(config, start, count, **kwargs):
    iterator = training_batches(config, start, CPU, **kwargs)
    try:
        return torch.stack(list(islice(iterator, count)))
    finally:
        iterator.close()


def test_batches_hold_whole_measurements_and_differ_from_step_to_step(config):
    drawn = batches(config, 0, 7)
    assert drawn.shape == (7, 8, 129) and drawn.dtype == torch.int64
    for window in drawn.flatten(0, 1):
        assert decode(window[window >= 0].tolist())
    assert len({window.numpy().tobytes() for window in drawn.flatten(0, 1)}) == 56


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 30])
def test_a_loader_started_at_any_step_continues_the_same_batches(config, start):
    assert torch.equal(batches(config, start, 5), batches(config, 0, start + 5)[start:])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_processes_share_out_the_batches_of_one(config, world):
    whole = batches(config, 2, 4)
    shares = [batches(config, 2, 4, rank=rank, world=world) for rank in range(world)]
    assert torch.equal(torch.stack(shares, dim=2).flatten(1, 2), whole)


def test_world_must_divide_the_batch(config):
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes"):
        batches(config, 0, 1, rank=0, world=3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_do_not_change_the_batches(config, workers):
    parallel = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
    assert torch.equal(batches(parallel, 4, 9), batches(config, 4, 9))


def test_another_seed_gives_other_batches(config):
    assert not torch.equal(batches(config, 0, 1), batches(dataclasses.replace(config, seed=1), 0, 1))


def test_blocks_are_the_same_after_pickling(config):
    blocks = WindowBlocks(RowReader(config.data.rows, "train"), config, 8, 3)
    first = blocks[5]
    assert (pickle.loads(pickle.dumps(blocks))[5] == first).all()


def test_rows_are_read_in_proportion_to_the_windows_they_hold(config):
    blocks = WindowBlocks(RowReader(config.data.rows, "train"), config, 8, 3)
    reads = np.bincount([blocks.row_of_read(i) for i in range(3000)], minlength=40)
    weights = np.diff(blocks.cumulative, prepend=0)
    assert np.abs(reads - 3000 * weights).max() < 3  # an additive recurrence: nearly exact, not merely on average
    assert reads.min() > 0


def test_validation_windows_are_fixed_and_of_val(config):
    windows = validation_windows(config)
    assert windows.shape == (16, 129) and torch.equal(windows, validation_windows(config))
    assert not torch.equal(windows[:8], batches(config, 0, 1)[0])


def test_missing_rows_and_missing_parts_are_one_clear_error(config, tmp_path):
    absent = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=tmp_path))
    with pytest.raises(ValueError, match=r'no rows in .*; run "ping-llm prepare'):
        batches(absent, 0, 1)
    with pytest.raises(ValueError, match=r'holds no "test-s1" rows, only train'):
        RowReader(config.data.rows, "test-s1")


def test_closing_a_loader_early_leaves_nothing_behind(config):
    blocks = WindowBlocks(RowReader(config.data.rows, "train"), config, 8, 3)
    iterator = block_iterator(blocks, 0, workers=0, prefetch=2)
    next(iterator)
    iterator.close()


@pytest.mark.slow
def test_workers_end_themselves_when_the_trainer_is_killed(config, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "import multiprocessing, os, sys, time\n"
        "from ping_llm.config import Config, DataConfig, ModelConfig\n"
        "from ping_llm.data.pipeline import WindowBlocks, block_iterator\n"
        "from ping_llm.data.rows import RowReader\n"
        "if __name__ == '__main__':\n"
        "    config = Config(model=ModelConfig(seq_len=128), data=DataConfig(rows=sys.argv[1]))\n"
        "    blocks = WindowBlocks(RowReader(sys.argv[1], 'train'), config, 8, 3)\n"
        "    iterator = block_iterator(blocks, 0, workers=2, prefetch=1)\n"
        "    next(iterator)\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, script, config.data.rows], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) >= 2
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # a zombie has ended: only nobody has asked how
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
