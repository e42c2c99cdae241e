"""Claims about Muon, AdamW and the groups."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ping_llm.config import ModelConfig, OptimConfig
from ping_llm.model.gpt import GPT
from ping_llm.training import muon as muon_module
from ping_llm.training.distributed import Ranks
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


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    matrices = normal(2, 24, 16, seed=0)
    torch.testing.assert_close(orthogonalize(scale * matrices, torch.float32), orthogonalize(matrices, torch.float32))


@pytest.mark.parametrize("shape", [(3, 80, 20), (3, 20, 80)])
def test_the_iterations_multiply_on_the_short_side(shape):
    """Five times: the Gram matrix and its product with x, 20·80·20 each, and its square, 20·20·20; two FLOPs each."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(normal(*shape, seed=0), torch.float32)
    assert counter.get_total_flops() == 5 * 3 * 2 * (2 * 20 * 80 * 20 + 20**3)


@pytest.mark.parametrize("native", [True, False])
def test_the_iterations_run_in_bf16_where_it_is_native(monkeypatch, native):
    monkeypatch.setattr(muon_module, "native_bf16", lambda _: native)
    dtype = torch.bfloat16 if native else torch.float32
    assert Muon({"weight": Matrix(nn.Parameter(torch.ones(4, 4)))}, 0.1).dtype == dtype
    assert orthogonalize(normal(1, 4, 4, seed=0), dtype).dtype == dtype


def test_each_process_sends_an_equal_share_of_the_matrices_of_a_shape():
    """Three matrices of a shape, two processes: the first sends two, the second one and zeros; all are used in order."""
    weights, sent = [normal(6, 4, seed=seed) for seed in range(3)], {}
    updates = normal(4, 6, 4, seed=9).to(
        torch.bfloat16
    )  # what the processes have computed together; the last is padding
    for rank in range(2):
        parameters = [nn.Parameter(weight.clone()) for weight in weights]
        ranks = types.SimpleNamespace(device=torch.device("cpu"), rank=rank, world=2)
        ranks.gather = lambda values, rank=rank: sent.setdefault(rank, values) is values and updates
        muon = Muon({str(i): Matrix(parameter) for i, parameter in enumerate(parameters)}, 0.5, ranks)
        muon.dtype = torch.bfloat16
        for i, parameter in enumerate(parameters):
            parameter.grad = normal(6, 4, seed=10 + i)
        muon.step(momentum=0.0, weight_decay=0.0)
        for parameter, weight, update in zip(parameters, weights, updates.float(), strict=False):
            torch.testing.assert_close(parameter.detach(), weight - 0.5 * 1.5**0.5 * update)
    gradients = torch.stack([normal(6, 4, seed=10 + i) for i in range(3)])
    assert {values.dtype for values in sent.values()} == {torch.bfloat16}
    assert torch.equal(sent[0], orthogonalize(gradients[:2], torch.bfloat16))
    assert torch.equal(sent[1], orthogonalize(torch.stack([gradients[2], torch.zeros(6, 4)]), torch.bfloat16))


def test_adamw_of_embedding_and_head_by_hand():
    """Three steps of m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², both corrected for their start at 0, and no decay."""
    config = OptimConfig(embedding_lr=0.3, head_lr=0.05, adam_beta1=0.7, adam_beta2=0.9, adam_eps=0.02)
    model = GPT(TINY)
    optimizer = Optimizer(model, config)
    assert optimizer.adamw.defaults["fused"]  # one pass over the memory
    for name in ("embedding", "head"):
        rate = getattr(config, f"{name}_lr") * (32 / 768) ** -0.5
        weight = getattr(model, name).weight
        expected, m, v = weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
        for step in range(1, 4):
            give_gradients(model.parameters(), step)
            m, v = 0.7 * m + 0.3 * weight.grad, 0.9 * v + 0.1 * weight.grad**2
            expected -= rate * (m / (1 - 0.7**step)) / ((v / (1 - 0.9**step)).sqrt() + 0.02)
            optimizer.adamw.step()
        torch.testing.assert_close(weight.detach(), expected)
        model, optimizer = (fresh := GPT(TINY)), Optimizer(fresh, config)


def test_the_processes_of_a_run_share_the_work_of_its_matrices():
    ranks = Ranks(torch.device("cpu"), rank=1, world=2)
    assert Optimizer(GPT(TINY), OptimConfig(), ranks).muon.ranks is ranks
    assert Optimizer(GPT(TINY), OptimConfig()).muon.ranks == Ranks(torch.device("cpu"))


def test_a_restored_optimizer_shares_no_memory_with_what_it_was_restored_from():
    first, second = (Optimizer(GPT(TINY), OptimConfig()) for _ in range(2))
    for number, group in enumerate(first.adamw.param_groups):
        give_gradients(group["params"], number)
    first.adamw.step()
    state = first.state_dict()
    second.load_state_dict(state)
    before = {name: value.clone() for name, value in second.state_dict().items()}
    for value in state.values():
        value.add_(1)
    assert before.keys() == state.keys()
    assert all(torch.equal(value, before[name]) for name, value in second.state_dict().items())


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
