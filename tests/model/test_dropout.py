"""Claims about what is left out of a step that learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import SMALL, random_tokens
from training_runs import make_config, make_windows

from ping_llm.config import ModelConfig
from ping_llm.model.dropout import dropped, window_keys
from ping_llm.model.gpt import GPT
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective

CPU = torch.device("cpu")


def awake(config: ModelConfig) -> GPT:
    model, generator = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_the_values_is_left_out_and_the_mean_stays(share):
    x = torch.ones(4, 100, 250)
    y = dropped(x, share, window_keys(0, 0, 4, 0, 1, CPU), site=3)
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
    for axes in ((1, 2), (0, 2), (0, 1)):  # of each window, each token, each channel
        deviation = (share / (1 - share) / (1e5 / y.mean(axes).numel())) ** 0.5
        assert ((y.mean(axes) - 1).abs() < 5 * deviation).all()


def test_draws_of_windows_sites_steps_and_seeds_are_independent():
    x, keys = torch.ones(1, 100, 100), window_keys(0, 0, 2, 0, 1, CPU)
    others = [
        (keys[1:], 0),
        (keys[:1], 1),
        (window_keys(0, 1, 2, 0, 1, CPU)[:1], 0),
        (window_keys(1, 0, 1, 0, 1, CPU), 0),
    ]
    first = dropped(x, 0.5, keys[:1], 0) > 0
    for other, site in others:
        same = (first == (dropped(x, 0.5, other, site) > 0)).float().mean()
        assert same.item() == pytest.approx(0.5, abs=0.025)  # five deviations
    assert torch.equal(first, dropped(x, 0.5, keys[:1], 0) > 0)


def test_the_first_draws_of_a_window_by_hand():
    """SplitMix64 of a start: the j-th draw is the finaliser of start + j · γ; 24 bits of it against the share."""

    def mix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return (value ^ value >> 31) % 2**63

    gamma = 0x9E3779B97F4A7C15
    key = mix((mix(mix(5) + 7) + 2 * gamma) % 2**64)  # seed 5, step 7, window 2 of 4
    assert window_keys(5, 7, 4, 0, 1, CPU)[2] == key
    start = mix(key + 6)
    kept = [mix((start + j * gamma) % 2**64) % 2**24 >= 0.25 * 2**24 for j in range(12)]
    y = dropped(torch.ones(1, 3, 4), 0.25, torch.tensor([key]), site=6)
    assert (y.flatten() > 0).tolist() == kept and 0 < sum(kept) < 12


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(1, 5), st.sampled_from([1, 2, 3, 4]))
def test_a_window_has_the_same_key_in_whichever_process(seed, step, each, world):
    whole = window_keys(seed, step, each * world, 0, 1, CPU)
    for rank in range(world):
        assert torch.equal(window_keys(seed, step, each * world, rank, world, CPU), whole[rank::world])
    assert len(whole.unique()) == len(whole)


@torch.no_grad()
@pytest.mark.parametrize("switch", ["dropout", "stochastic_depth"])
def test_nothing_is_left_out_without_keys_and_something_with_them(switch):
    model, tokens, keys = awake(dataclasses.replace(SMALL, **{switch: 0.5})), random_tokens(3, 20), torch.arange(3)
    assert model.training and torch.equal(model(tokens), awake(SMALL)(tokens))
    some = model(tokens, keys=keys)
    assert not torch.equal(some, model(tokens)) and torch.equal(some, model(tokens, keys=keys))
    alone = torch.cat([model(tokens[row : row + 1], keys=keys[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(some, alone, atol=1e-5, rtol=1e-5)  # whatever else is in the batch


@torch.no_grad()
def test_windows_that_pass_a_block_by_are_as_they_were_and_deeper_blocks_are_passed_by_more_often():
    model, tokens = awake(dataclasses.replace(SMALL, stochastic_depth=0.6)), random_tokens(200, 3)
    streams = []
    hooks = [
        block.register_forward_hook(lambda _, given, gave: streams.append((given[0], gave))) for block in model.blocks
    ]
    model(tokens, keys=window_keys(0, 0, 200, 0, 1, CPU))
    for hook in hooks:
        hook.remove()
    passed = [(before == after).all(dim=(1, 2)) for before, after in streams]
    assert [each.float().mean().item() for each in passed] == pytest.approx([0.3, 0.6], abs=0.12)


def test_a_block_that_is_not_passed_by_adds_more():
    """Of a block whose attention adds 1 everywhere, 1 / (1 − 0.5) = 2 is added."""
    model = GPT(dataclasses.replace(SMALL, n_layer=1, stochastic_depth=0.5))
    block, x = model.blocks[0], torch.randn(40, 5, 32, generator=torch.Generator().manual_seed(0))
    added = block._learning(torch.ones_like(x), window_keys(0, 0, 40, 0, 1, CPU), 0)
    assert sorted(added.unique().tolist()) == [0, 2] and (added == added[:, :1, :1]).all()


@pytest.mark.parametrize("pieces", [2, 4])
def test_micro_batches_leave_out_what_the_whole_batch_does(pieces):
    gradients = []
    for grad_accum, step in ((1, 3), (pieces, 3), (1, 4)):
        config = make_config(Path("unused"), grad_accum=grad_accum)
        model = awake(dataclasses.replace(SMALL, dropout=0.3, stochastic_depth=0.3))
        Objective(config, model, Ranks(CPU)).backward(make_windows(8, 0), step=step)
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    whole, accumulated, later = gradients
    assert (whole - accumulated).norm() < 1e-5 * whole.norm()
    assert (whole - later).norm() > 0.1 * whole.norm()


def test_evaluations_leave_nothing_out():
    config, windows = make_config(Path("unused")), make_windows(8, 1)
    values = [
        Objective(config, awake(dataclasses.replace(SMALL, dropout=share)), Ranks(CPU)).evaluate(windows)
        for share in (0.0, 0.5)
    ]
    assert values[0] == pytest.approx(values[1], nan_ok=True)
