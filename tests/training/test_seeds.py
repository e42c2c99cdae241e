"""Initial weights and the order of the data have seeds of their own, and what is scored on val depends on neither."""

import dataclasses
from itertools import islice

import pytest
import torch
from training_runs import losses, make_config, run

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data.loader import training_batches, validation_windows


def first_loss(folder, **seeds) -> float:
    """On val, before the first step: of the initial weights alone."""
    config = dataclasses.replace(make_config(folder / str(seeds), total_steps=1), **seeds)
    run(config)
    return losses(config.train.run_dir)[0]["val_loss"]


def test_the_initial_weights_follow_their_seed_or_that_of_the_windows(tmp_path):
    of_windows, own = first_loss(tmp_path, seed=3), first_loss(tmp_path, seed=8, init_seed=3)
    assert own == of_windows == first_loss(tmp_path, seed=3, init_seed=3)
    assert len({of_windows, first_loss(tmp_path, seed=8), first_loss(tmp_path, seed=3, init_seed=4)}) == 3


@pytest.fixture
def config(rows_folder) -> Config:
    train = TrainConfig(batch_size=8, eval_windows=8)
    return Config(model=ModelConfig(seq_len=96), data=DataConfig(rows=rows_folder, windows_per_read=1), train=train)


def test_the_windows_of_training_follow_the_seed_and_those_of_val_none(config):
    def batch(seeds):
        return next(islice(training_batches(dataclasses.replace(config, **seeds), 0, torch.device("cpu")), 1))

    first = batch({"seed": 1})
    assert torch.equal(first, batch({"seed": 1, "init_seed": 7})) and not torch.equal(first, batch({"seed": 7}))
    of_val = [validation_windows(dataclasses.replace(config, seed=seed, init_seed=seed)) for seed in (0, 1)]
    assert torch.equal(*of_val)
