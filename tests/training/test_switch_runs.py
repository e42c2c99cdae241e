"""Claims about whole runs with the switches of [optim] and [train]: today's numbers without them, exact resume with each."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import assert_same_weights, losses, make_batches, make_config, make_windows, metrics, run

from ping_llm.config import Config, DataConfig, OptimConfig, TrainConfig, config_from_dict
from ping_llm.training import schedule, trainer
from ping_llm.training.objective import Objective
from ping_llm.training.trainer import _as_long_as_steps

GROWING = {"first_batch_size": 2, "batch_warmup_steps": 8}
SWITCHES = {  # all of them, in two runs
    "muon": (
        {
            "schedule": "linear",
            "weight_decay_schedule": "cosine",
            "orthogonalization": "polar-express",
            "equal_rows": True,
        },
        {"average_tail": 0.6, **GROWING},
    ),
    "adamw": (
        {"weight_decay": 1.0, "weight_decay_schedule": "constant", "matrices": "adamw", "grad_clip": 0.0},
        {"average_ema": 0.7, "grad_accum": 2},
    ),
}


def config_of(run_dir: Path, optim: dict, train: dict) -> Config:
    return dataclasses.replace(make_config(run_dir, sample_every=0, **train), optim=OptimConfig(**optim))


def stopped_in(step: int, load=make_batches):
    """Batches of a run that a signal stops in this step, counted from 1."""

    def load_batches(config, start, *given):
        fetched = schedule.windows_before(step - 1, config.train) // config.train.batch_size
        for number, batch in enumerate(load(config, start, *given), start):
            if number == fetched:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    return load_batches


def batches_beside_short_ones(config, start, *given):
    """Batch i is a function of i alone; two windows of 47 tokens beside each."""
    for number, batch in enumerate(make_batches(config, start, *given), start):
        beside = make_windows(2 * len(batch), seed=10**5 + number)[:, :47]
        yield torch.cat([batch, beside.reshape(len(batch), -1)], dim=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run(config_of(folder, {}, {}))
    return folder


def test_without_switches_the_numbers_are_what_they_were_before_there_were_any(plain):
    """Measured then, in fp32 on a CPU, where the run of today had the same bits; other CPUs round differently."""
    val = [line["val_loss"] for line in metrics(plain) if "val_loss" in line]
    assert val == pytest.approx([5.587769977, 2.909917589, 1.590034469], rel=1e-3)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_run_with_switches_resumes_to_the_bit(plain, tmp_path, name):
    optim, train = SWITCHES[name]
    whole, halves = (config_of(tmp_path / part, optim, train) for part in ("whole", "halves"))
    run(whole)
    assert abs(losses(whole.train.run_dir)[-1]["val_trained_loss"] - losses(plain)[-1]["val_loss"]) > 0.01
    assert run(halves, stopped_in(8)).step < 12
    state = run(halves)
    assert (state.step, state.samples_consumed) == (12, schedule.windows_before(12, halves.train))
    assert losses(halves.train.run_dir) == losses(whole.train.run_dir)
    assert_same_weights(halves.train.run_dir, whole.train.run_dir)


def test_a_run_with_short_windows_resumes_to_the_bit_while_its_batch_grows(tmp_path, monkeypatch):
    """In micro-batches, and with values left out of every window."""
    whole, halves = (config_of(tmp_path / part, {}, GROWING | {"grad_accum": 2}) for part in ("whole", "halves"))
    data, model = DataConfig(short_windows=2, short_len=46), dataclasses.replace(whole.model, dropout=0.2)
    whole, halves = (dataclasses.replace(config, data=data, model=model) for config in (whole, halves))
    read: list[DataConfig] = []
    monkeypatch.setattr(trainer, "learn_codewords", lambda _, data, *others: read.append(data))
    state = run(whole, batches_beside_short_ones)
    assert (state.samples_consumed, state.tokens) == (56, 56 * (59 + 2 * 46))
    assert all(line["padding"] == pytest.approx(5 / (64 + 2 * 46)) for line in metrics(whole.train.run_dir)[1:])
    assert read == [data]
    assert 0 < run(halves, stopped_in(6, batches_beside_short_ones)).step < 12
    assert run(halves, batches_beside_short_ones).tokens == state.tokens
    assert losses(halves.train.run_dir) == losses(whole.train.run_dir)
    assert_same_weights(halves.train.run_dir, whole.train.run_dir)


def test_micro_batches_train_as_the_large_batch_does(plain, tmp_path):
    """Gradients are sums over the tokens of a step, however they are cut: the same but for rounding."""
    run(config_of(tmp_path, {}, {"grad_accum": 4}))
    for ours, theirs in zip(losses(tmp_path), losses(plain), strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "loss_rtt", "val_loss", "tokens"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["step"], name)


# The rest is about batches that grow.


def test_sizes_of_a_growing_batch_by_hand():
    """Batches of 8 from 2 on, 8 steps for two sizes: 4 steps of 2 are one whole batch, 4 steps of 4 are two."""
    config = TrainConfig(batch_size=8, **GROWING)
    assert [schedule.batch_size(step, config) for step in range(10)] == [2, 2, 2, 2, 4, 4, 4, 4, 8, 8]
    assert [schedule.windows_before(step, config) for step in range(11)] == [0, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40]
    # A third of 40 steps at each size, in whole batches: 16 of an eighth, 12 of a quarter, 14 of a half.
    config = TrainConfig(batch_size=24, first_batch_size=3, batch_warmup_steps=40)
    sizes = [schedule.batch_size(step, config) for step in range(60)]
    assert [sizes.count(size) for size in (3, 6, 12)] == [16, 12, 14]


def test_a_batch_that_does_not_grow_is_as_large_as_it_is():
    config = TrainConfig(batch_size=8)
    assert {schedule.batch_size(step, config) for step in range(5)} == {8}
    assert [schedule.windows_before(step, config) for step in (0, 1, 1000)] == [0, 8, 8000]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 300), st.integers(0, 400))
def test_windows_before_a_step_are_the_sum_of_the_steps_before(first, doublings, steps, step):
    growing = {"first_batch_size": first, "batch_warmup_steps": steps} if doublings else {}
    config = TrainConfig(batch_size=first << doublings, **growing)
    sizes = [schedule.batch_size(i, config) for i in range(step + 1)]
    assert schedule.windows_before(step, config) == sum(sizes[:-1])
    assert sizes == sorted(sizes)
    done = schedule.windows_before(step, config) % config.batch_size
    assert done % sizes[-1] == 0 and done + sizes[-1] <= config.batch_size  # a step never takes of two batches


def test_a_growing_batch_learns_from_the_windows_of_whole_batches_in_their_order(tmp_path, monkeypatch):
    seen, backward = [], Objective.backward

    def watched(self, tokens, *votes, **options):
        seen.append(tokens.clone())
        return backward(self, tokens, *votes, **options)

    monkeypatch.setattr(Objective, "backward", watched)
    state = run(config_of(tmp_path, {}, GROWING))
    assert [len(tokens) for tokens in seen] == [2] * 4 + [4] * 4 + [8] * 4
    assert state.samples_consumed == 56 and state.tokens == 56 * 59
    assert torch.equal(torch.cat(seen), torch.cat([make_windows(8, seed=step) for step in range(7)]))
    assert all(line["padding"] == pytest.approx(5 / 64) for line in metrics(tmp_path)[1:])


@pytest.mark.parametrize("begun", range(10))
def test_the_windows_of_a_step_do_not_depend_on_processes_or_on_where_a_run_was_stopped(begun):
    config = make_config(Path("unused"), **GROWING)
    first = schedule.windows_before(begun, config.train) // 8

    def windows(rank: int, world: int) -> torch.Tensor:
        batches = make_batches(config, first, torch.device("cpu"), rank, world)
        return next(_as_long_as_steps(batches, begun, config.train, world))

    start, size = schedule.windows_before(begun, config.train), schedule.batch_size(begun, config.train)
    expected = torch.cat([make_windows(8, seed=step) for step in range(8)])[start : start + size]
    assert torch.equal(windows(0, 1), expected)
    both = torch.stack([windows(0, 2), windows(1, 2)], dim=1)
    assert torch.equal(both.flatten(0, 1), expected)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"first_batch_size": 8}, r"^train.first_batch_size=8 needs a train.batch_warmup_steps above 0 beside it$"),
        ({"batch_warmup_steps": 9}, r"^train.batch_warmup_steps=9 needs a train.first_batch_size above 0 beside it$"),
        (
            {"first_batch_size": 10, "batch_warmup_steps": 9},
            r"^train.first_batch_size=10 must be halves of train.batch_size=24: one of 12, 6, 3$",
        ),
        (
            {"first_batch_size": 24, "batch_warmup_steps": 9},
            r"^train.first_batch_size=24 must be halves of train.batch_size=24: one of 12, 6, 3$",
        ),
        (
            {"first_batch_size": 1, "batch_warmup_steps": 9, "batch_size": 7},
            r"^train.first_batch_size=1 must be halves of train.batch_size=7: left out, for no half of that is whole$",
        ),
    ],
)
def test_a_first_batch_that_cannot_grow_is_refused_in_one_line(train, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict({"train": {"batch_size": 24} | train}, "config.toml")


def test_a_first_batch_too_small_for_the_processes_is_refused_in_one_line():
    config = TrainConfig(batch_size=8, **GROWING)
    config.check_processes(2)
    with pytest.raises(
        ValueError, match=r"^train.first_batch_size=2 must be a multiple of the 4 processes; let the batch"
    ):
        config.check_processes(4)
