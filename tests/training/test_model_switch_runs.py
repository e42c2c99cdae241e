"""Claims about runs of a model with every switch on."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from reference_gpt import plain_codewords
from switches import ALL, PLAIN
from training_runs import assert_same_weights, losses, make_batches, make_config, make_windows, run

from ping_llm.config import DataConfig
from ping_llm.data.tokenization import MUTED
from ping_llm.model.checkpoint import load_latest, load_model
from ping_llm.model.gpt import GPT
from ping_llm.training.codewords import learn_codewords
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective


def test_a_resumed_run_with_every_switch_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    """To the bit, and with weights that are averaged: what is left out of a step is a function of its number."""
    configs, steps, backward = [], [], Objective.backward
    noted = lambda self, *args, **options: steps.append(options["step"]) or backward(self, *args, **options)  # noqa: E731
    monkeypatch.setattr(Objective, "backward", noted)
    for name in ("whole", "resumed"):
        config = make_config(tmp_path / name, total_steps=6, checkpoint_every=3, eval_every=3, average=0.5)
        switches = ALL | {"n_head": 4, "field_aware": True, "prefix_rows": 64}
        configs.append(dataclasses.replace(config, model=dataclasses.replace(config.model, **switches)))
    whole, resumed = configs
    run(whole)

    def ends_at_4(config, start_step, device, rank, world):
        for number, batch in enumerate(make_batches(config, start_step, device, rank, world), start_step):
            if number == 4:
                raise RuntimeError("power cut")
            yield batch

    with pytest.raises(RuntimeError, match="power cut"):
        run(resumed, ends_at_4)
    assert load_latest(resumed.train.run_dir).step == 3
    run(resumed)
    assert losses(resumed.train.run_dir) == losses(whole.train.run_dir)
    assert_same_weights(resumed.train.run_dir, whole.train.run_dir)
    assert steps == [*range(6), *range(4), *range(3, 6)]  # each leaves something else out
    model, _, _ = load_model(whole.train.run_dir)
    assert (model.codewords.edges < model.codewords.edges[-1]).any()
    with torch.no_grad():
        assert model(make_windows(2, 0)[:, :30]).isfinite().all()


def test_a_dictionary_is_learned_from_the_first_windows_as_they_are_read_and_until_it_is_full():
    """Muted tokens as what they are, unread bytes of sources as 0, nothing across padding."""
    config = dataclasses.replace(PLAIN, lookup_rows=276, lookup_length=3, src_bits_ipv4=16)
    windows = [[0, 1, 211, 212, 213, 214, -1, -1], [0, MUTED - 8, MUTED - 60, 1, 211, 212, 216, 217], [0] * 8]
    model, given, closed = GPT(config), [], []

    def batches():
        try:
            for window in windows:
                given.append(window)
                yield torch.tensor([window])
        finally:
            closed.append(True)

    learn_codewords(model, DataConfig(), batches, Ranks(torch.device("cpu")))
    assert closed and given == windows[:2]
    expected = {(0, 1), (1, 211), (211, 212), (212, 11), (11, 11)}  # of the first window, then of the second
    expected |= {(0, 8), (8, 60), (60, 1), (1, 211, 212)}
    words = plain_codewords(model.codewords)
    assert {word for word in words if len(word) > 1} == expected


def test_no_codeword_reaches_from_a_window_into_the_short_ones_beside_it():
    """A line of three windows, of 6 tokens and of 47 each, which have no ten of tokens in common."""
    model, data = GPT(dataclasses.replace(PLAIN, lookup_rows=400)), DataConfig(short_windows=2, short_len=46)
    line = torch.tensor([[20] * 6 + [30, 31] * 23 + [32] + [40] * 47])
    learn_codewords(model, data, lambda: (line for _ in itertools.count()), Ranks(torch.device("cpu")))
    words = [word for word in plain_codewords(model.codewords) if len(word) > 1]
    assert (20, 20) in words and (30, 31) in words and (40, 40) in words
    assert not [word for word in words if len({token // 10 for token in word}) > 1]


def test_windows_that_never_fill_a_dictionary_are_read_no_longer_than_is_worth_it():
    model = GPT(dataclasses.replace(PLAIN, lookup_rows=300))
    batches = (torch.zeros(10, 65, dtype=torch.int64) for _ in range(40))
    learn_codewords(model, DataConfig(), lambda: batches, Ranks(torch.device("cpu")))
    words = plain_codewords(model.codewords)
    assert {len(word) for word in words} == set(range(1, 9)) and len(words) == 267 + 7


def test_a_model_without_tables_reads_no_windows():
    read: list[int] = []
    learn_codewords(GPT(PLAIN), DataConfig(), lambda: read.append(1), Ranks(torch.device("cpu")))
    assert not read
