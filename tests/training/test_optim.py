"""Claims about Muon, AdamW and the groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ping_llm.config import ModelConfig, OptimConfig
from ping_llm.model.gpt import GPT
from ping_llm.training.muon import Matrix, Muon, orthogonalize
from ping_llm.training.optimizer import Optimizer

TINY = ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=64)
SHAPES = [(48, 48), (96, 48), (48, 96), (48, 48), (96, 48)]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def give_gradients(parameters, seed: int) -> None:
    for number, parameter in enumerate(parameters):
        parameter.grad = normal(*parameter.shape, seed=1000 * seed + number)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.02), (torch.bfloat16, 0.01)])
def test_muon_equals_torch_muon_over_several_steps(dtype, tolerance):
    ours = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    start = [parameter.detach().clone() for parameter in ours]
    muon = Muon({str(i): Matrix(parameter) for i, parameter in enumerate(ours)}, initial_lr=0.02)
    muon.dtype = dtype
    oracle = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1)  # iterates in bf16
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        muon.step(momentum=0.9, weight_decay=0.1)
        oracle.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < tolerance * (b - before).norm()


@pytest.mark.parametrize("shape", [(1, 40, 40), (3, 80, 40), (2, 40, 80)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(normal(*shape, seed=0), torch.float32))
    # The smallest values of a random square matrix are too near 0 to be lifted in five iterations.
    assert values.max() < 1.25 and values.median() > 0.65
    if shape[1] != shape[2]:
        assert values.min() > 0.65


def test_a_matrix_without_gradient_does_not_disturb_its_batch():
    one = normal(1, 32, 16, seed=0)
    batch = orthogonalize(torch.cat([one, torch.zeros_like(one)]), torch.float32)
    torch.testing.assert_close(batch[:1], orthogonalize(one, torch.float32))
    assert not batch[1].any()


def test_weight_decay_is_decoupled_and_scaled_by_the_rate():
    weight = nn.Parameter(normal(8, 8, seed=0))
    before = weight.detach().clone()
    muon = Muon({"weight": Matrix(weight)}, initial_lr=0.5)
    weight.grad = torch.zeros_like(weight)
    muon.step(momentum=0.9, weight_decay=0.1)
    torch.testing.assert_close(weight.detach(), before * 0.95)


def test_every_parameter_is_in_one_group():
    model = GPT(TINY)
    model.stray = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError):
        Optimizer(model, OptimConfig())


def test_adamw_rates_follow_the_width_and_muon_does_not():
    config = OptimConfig(muon_lr=0.02, embedding_lr=0.2, head_lr=0.004)
    rates = Optimizer(GPT(ModelConfig(n_layer=1, n_embd=192, n_head=2, seq_len=64)), config).initial_lrs
    assert rates == pytest.approx({"matrices": 0.02, "embedding": 0.4, "head": 0.008})


def test_one_scale_sets_all_rates():
    optimizer = Optimizer(GPT(TINY), OptimConfig())
    optimizer.set_lrs(0.5)
    optimizer.set_lrs(0.25)  # of the peak, not of the last rate
    rates = [optimizer.muon.lr, *(group["lr"] for group in optimizer.adamw.param_groups)]
    assert rates == pytest.approx([0.25 * rate for rate in optimizer.initial_lrs.values()])


def test_queries_keys_and_values_are_orthogonalized_each_by_itself():
    model, start = GPT(TINY), GPT(TINY)
    start.load_state_dict(model.state_dict())
    optimizer = Optimizer(model, OptimConfig())
    optimizer.muon.dtype = torch.float32
    give_gradients(model.parameters(), 3)
    optimizer.step(0.9, 0.1)
    for block, before in zip(model.blocks, start.blocks, strict=True):
        parts = zip(
            *(weight.chunk(3) for weight in (block.attention.qkv.weight, before.attention.qkv.weight)), strict=True
        )
        for (after, weight), gradient in zip(parts, block.attention.qkv.weight.grad.chunk(3), strict=True):
            step = orthogonalize(gradient[None], torch.float32)[0]  # of whatever scale the gradient is
            torch.testing.assert_close(after, weight * (1 - 0.02 * 0.1) - 0.02 * step)
    names = {name for name in optimizer.state_dict() if name.startswith("muon.blocks.0.attention")}
    assert names == {f"muon.blocks.0.attention.{part}.weight.momentum" for part in ("q", "k", "v", "out")}


def test_a_restored_optimizer_takes_the_same_steps():
    model = GPT(TINY)
    optimizer = Optimizer(model, OptimConfig())
    for step in range(2):
        give_gradients(model.parameters(), step)
        optimizer.step(0.9, 0.1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}

    other = GPT(TINY)
    other.load_state_dict(weights)
    restored = Optimizer(other, OptimConfig())
    restored.load_state_dict(state)
    for m, o in ((model, optimizer), (other, restored)):
        give_gradients(m.parameters(), 7)
        o.step(0.9, 0.1)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert all(value.isfinite().all() for value in restored.state_dict().values())
    assert len(state) == 2 * 6 + 2 * 3  # a momentum for each matrix; step and two moments for embedding and head


def test_muon_step_by_hand():
    """One matrix: a Nesterov average, orthogonalised, times lr and √(rows / columns); the weight decays before."""
    weight, first, second = (normal(12, 4, seed=seed) for seed in range(3))
    parameter = nn.Parameter(weight.clone())
    muon = Muon({"weight": Matrix(parameter)}, initial_lr=0.5)
    muon.dtype = torch.float32
    average, expected = torch.zeros(12, 4), weight
    for gradient in (first, second):
        parameter.grad = gradient.clone()
        muon.step(momentum=0.8, weight_decay=0.1)
        average = 0.8 * average + 0.2 * gradient
        ahead = 0.8 * average + 0.2 * gradient
        expected = expected * (1 - 0.5 * 0.1) - 0.5 * 3**0.5 * orthogonalize(ahead[None], torch.float32)[0]
    torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter.grad, second)  # left as it was
