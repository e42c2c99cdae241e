"""Batches are pure functions of (seed, step): the same for any worker, process, restart and slicing."""

import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import make_row, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_decoder import decode
from waiting import HANG_S

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data import pipeline
from ping_llm.data import tokenization as tk
from ping_llm.data.loader import training_batches, validation_windows, windows_of
from ping_llm.data.pipeline import WindowBlocks
from ping_llm.data.rows import RowReader
from ping_llm.data.windows import encode_windows, sample_window, window_fields

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


@pytest.mark.parametrize("start", [0, 1, 11, 12, 19, 30])
def test_a_loader_started_at_any_step_continues_the_same_batches(config, start):
    assert torch.equal(batches(config, start, 5), batches(config, 0, start + 5)[start:])


@settings(max_examples=12, deadline=None)
@given(world=st.sampled_from([1, 2, 4, 8]), start=st.integers(0, 10_000), seed=st.integers(0, 3))
def test_processes_share_out_the_batches_of_one_from_any_step(config, world, start, seed):
    config = dataclasses.replace(config, seed=seed)
    whole = batches(config, start, 4)
    shares = [batches(config, start, 4, rank=rank, world=world) for rank in range(world)]
    assert torch.equal(torch.stack(shares, dim=2).flatten(1, 2), whole)


def test_world_must_divide_the_batch(config):
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes"):
        batches(config, 0, 1, rank=0, world=3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_loader_processes_do_not_change_the_batches_of_any_rank(config, world, workers):
    parallel = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
    rank = (world + workers) % world
    share = batches(parallel, 4, 9, rank=rank, world=world)
    assert torch.equal(share, batches(config, 4, 9)[:, rank::world])


def test_another_seed_gives_other_batches(config):
    assert not torch.equal(batches(config, 0, 1), batches(dataclasses.replace(config, seed=1), 0, 1))


def test_element_i_is_drawn_from_its_row_by_seed_and_i_alone(config):
    blocks = WindowBlocks(RowReader(config.data.rows, "train"), config, 8, 3)
    for step, (number, (row, window, _)) in enumerate(zip(blocks.row_numbers(2, 5), blocks.draw(2, 5), strict=True)):
        rng = np.random.default_rng((config.seed, 0, (2 * 12 + step) * 8 + 5))
        alone = sample_window(blocks.rows[number], config.data, 129, rng)
        assert len(row) == blocks.rows.measurements[number] and (window.index == alone.index).all()
        assert (window.order == alone.order).all() and (window.dst_bytes == alone.dst_bytes).all()


def test_short_windows_stand_beside_each_window_and_are_of_its_row(config):
    """They are drawn after the window, which so is what it is without them."""
    beside = dataclasses.replace(config, data=dataclasses.replace(config.data, short_windows=3, short_len=60))
    rows = RowReader(config.data.rows, "train")
    alone, blocks = (WindowBlocks(rows, one, 8, 3) for one in (config, beside))
    drawn, shown = 0, 0
    for look in blocks.draw(2, 5):
        assert len(look.short) == 3 and all(window.index.max() < len(look.row) for window in look.short)
        fields = window_fields(look.short)
        assert {a.tobytes() for a in fields.dst} <= {a.tobytes() for a in look.row.dst_addresses}
        drawn += sum(len(window.index) for window in look.short)
        shown += (encode_windows(look.short, 61) == tk.MEASUREMENT_START).sum()
    assert 0.8 * drawn < shown <= drawn  # drawn for windows so short: of longer ones half would be cut off
    lines = torch.from_numpy(blocks[2])
    assert lines.shape == (12, 8, 129 + 3 * 61)
    long, short = windows_of(lines.flatten(0, 1), beside.data)
    assert torch.equal(long, torch.from_numpy(alone[2]).flatten(0, 1))
    assert short.shape == (12 * 8 * 3, 61) and torch.equal(short[:3].flatten(), lines[0, 0, 129:])
    assert len(short.unique(dim=0)) > 250  # windows of their own
    for window in short:  # whole measurements, the first of them with a time of its own if it has any
        tokens = window[window != tk.PADDING].numpy()
        assert tokens[0] == tk.MEASUREMENT_START and decode(tokens)
    assert [part is lines for part in windows_of(lines, config.data)] == [True]


def test_short_windows_do_not_depend_on_processes(config):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, short_windows=2))
    assert torch.equal(batches(config, 4, 9, rank=1, world=2), batches(config, 4, 9)[:, 1::2])


def test_blocks_are_the_same_after_pickling(config):
    blocks = WindowBlocks(RowReader(config.data.rows, "train"), config, 8, 3)
    first = blocks[5]
    assert (pickle.loads(pickle.dumps(blocks))[5] == first).all()


def row_shares(blocks, count):
    """Share of the windows of `count` blocks that are of each row."""
    numbers = [blocks.row_numbers(b, place) for b in range(count) for place in range(blocks.batch_size)]
    return np.bincount(np.ravel(numbers), minlength=len(blocks.rows)) / np.size(numbers)


def test_rows_are_drawn_in_proportion_to_the_windows_they_hold(config):
    blocks = WindowBlocks(RowReader(config.data.rows, "train"), config, 8, 3)
    weights = np.diff(blocks.cumulative, prepend=0)
    shares = row_shares(blocks, 125)
    assert np.abs(shares - weights).max() < 3 / 12_000  # an additive recurrence: nearly exact, not merely on average


def test_a_large_row_serves_every_fourth_step_of_a_block_and_small_ones_a_window_each(config, monkeypatch):
    monkeypatch.setattr(pipeline, "LARGE_ROW_MEASUREMENTS", 2000)
    rows = RowReader(config.data.rows, "train")
    blocks = WindowBlocks(rows, config, 8, 3)
    large_turns = 0
    for place in range(8):
        numbers = blocks.row_numbers(5, place)
        for turn in range(4):
            if (rows.measurements[numbers[turn::4]] >= 2000).any():
                assert len(set(numbers[turn::4])) == 1
                large_turns += 1
    weights = np.empty(len(rows))
    weights[blocks.order] = np.diff(blocks.cumulative, prepend=0)
    assert 0.1 < blocks.large_share < 0.9 and 0 < large_turns < 32
    assert np.abs(row_shares(blocks, 1000) - weights).max() < 0.002
    assert blocks[5].shape == (12, 8, 129)


def test_neighbouring_steps_learn_from_different_large_rows():
    """128 windows a step: 16 steps show 512 rows, each at most 4 times, and no step shows a row of the one before."""

    class Rows:
        part, measurements, ipv6_measurements = "train", np.full(5000, 100_000), np.zeros(5000, int)

    blocks = WindowBlocks(Rows(), Config(), 128, 16)
    steps = np.array([blocks.row_numbers(0, place) for place in range(128)]).T  # (64, 128)
    assert len(np.unique(steps)) == 512 == len(np.unique(steps[:16]))
    assert np.unique(steps[:16], return_counts=True)[1].max() == 4
    assert all(not set(one) & set(other) for one, other in itertools.pairwise(steps))
    assert all(len(set(step)) == 128 for step in steps)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=30), st.integers(1, 20), st.integers(0, 1 << 30))
def test_every_window_has_a_row_whatever_the_sizes_of_the_rows(config, sizes, windows_per_read, block):
    class Rows:
        part, measurements, ipv6_measurements = "train", np.array(sizes), np.zeros(len(sizes), int)

    numbers = WindowBlocks(Rows(), config, 8, windows_per_read).row_numbers(block, 7)
    assert len(numbers) == (4 * windows_per_read if windows_per_read > 1 else 1) and set(numbers) <= set(
        range(len(sizes))
    )


def test_rows_that_are_all_large_serve_all_windows(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LARGE_ROW_MEASUREMENTS", 100)
    folder = write_rows(tmp_path, {"train": [make_row(200, i, probe_id=i) for i in range(4)]})
    blocks = WindowBlocks(RowReader(folder, "train"), config, 8, 3)
    assert blocks.large_share == 1.0 and row_shares(blocks, 50).min() > 0.2


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


_TRAINER = """\
import multiprocessing, sys, time
from ping_llm.config import Config, DataConfig, ModelConfig
from ping_llm.data.pipeline import WindowBlocks, block_iterator
from ping_llm.data.rows import RowReader
if __name__ == "__main__":
    folder, workers, end = sys.argv[1:]
    blocks = WindowBlocks(RowReader(folder, "train"), Config(model=ModelConfig(seq_len=128)), 8, 3)
    iterator = block_iterator(blocks, 0, workers=int(workers), prefetch=2)
    next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if end == "close":
        iterator.close()
    elif end == "raise":
        raise SystemExit(0)
    else:
        time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "end"), [(0, "close"), (2, "close"), (0, "raise"), (2, "raise")])
def test_a_loader_that_is_closed_or_left_ends_without_a_word(config, tmp_path, workers, end):
    (tmp_path / "trainer.py").write_text(_TRAINER)
    command = [sys.executable, tmp_path / "trainer.py", config.data.rows, str(workers), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0 and not done.stderr
    assert not any(_alive(int(pid)) for pid in done.stdout.split())


@pytest.mark.slow
def test_workers_end_themselves_when_the_trainer_is_killed(config, tmp_path):
    (tmp_path / "trainer.py").write_text(_TRAINER)
    command = [sys.executable, tmp_path / "trainer.py", config.data.rows, "2", "sleep"]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) >= 2
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + HANG_S
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in workers)


def test_a_worker_whose_trainer_died_before_it_began_ends_too():
    code = (
        "import time; from ping_llm.system.processes import end_with_parent\n"
        "end_with_parent(1 << 30, 0, 1)  # no process has this number\n"
        "time.sleep(3600)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=HANG_S).returncode == 1


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # a zombie has ended: only nobody has waited for it
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
