"""Claims about changes of low rank: their gradients, their steps, and that nothing but the optimiser knows of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ping_llm.config import Config, ModelConfig, OptimConfig, TrainConfig, config_from_dict
from ping_llm.model.gpt import GPT
from ping_llm.training.lora import SCALE, LowRank
from ping_llm.training.optimizer import Optimizer

MODEL = ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=64, field_aware=True, prefix_rows=64)
LORA = OptimConfig(matrices="adamw", lora_rank=3, adamw_lr=0.01, embedding_lr=0.05)
WINDOWS = torch.randint(11, 267, (4, 33), generator=torch.Generator().manual_seed(0))
WINDOWS[:, ::6] = 1  # sources of IPv4 begin


def learning_model() -> GPT:
    """Of random weights everywhere: a fresh model's output matrices are 0."""
    model, generator = GPT(MODEL, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def backward(model: nn.Module) -> None:
    logits = model(WINDOWS[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()


class Sum(nn.Module):
    """W₀ + s B A, as torch would hold it: the reference."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given + SCALE * self.b @ self.a


def test_gradients_of_the_factors_are_those_of_a_parametrized_model():
    model, reference = learning_model(), learning_model()
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and n.endswith("mlp.up.weight")}
    low_rank, sums = LowRank(matrices, 3), {}
    for name in matrices:
        low_rank.factors[f"{name}.b"].data.normal_(generator=torch.Generator().manual_seed(3))
        sums[name] = Sum(low_rank.factors[f"{name}.a"].data, low_rank.factors[f"{name}.b"].data)
        layer = reference.get_submodule(name.removesuffix(".weight"))
        nn.utils.parametrize.register_parametrization(layer, "weight", sums[name])
    low_rank.put()
    for one in (model, reference):
        backward(one)
    low_rank.take_gradients()
    assert len(sums) == 2
    for name, own in sums.items():
        torch.testing.assert_close(low_rank.factors[f"{name}.a"].grad, own.a.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(low_rank.factors[f"{name}.b"].grad, own.b.grad, rtol=1e-4, atol=1e-7)


def stepped(steps: int) -> tuple[GPT, GPT, Optimizer]:
    """A model before and after some steps of an optimiser with LoRA."""
    before, model = learning_model(), learning_model()
    optimizer = Optimizer(model, LORA)
    for _ in range(steps):
        backward(model)
        optimizer.step(momentum=0.9, weight_decay=0.0)
        model.zero_grad()
    return before, model, optimizer


def test_matrices_change_by_the_rank_prefixes_learn_and_all_else_stays_to_the_bit():
    before, model, _ = stepped(3)
    old, ranks = dict(before.named_parameters()), {}
    for name, weight in model.named_parameters():
        change = (weight - old[name]).detach()
        if name.startswith("blocks."):
            assert change.abs().max() > 0
            ranks[name] = int((torch.linalg.svdvals(change.double()) > 1e-5).sum())  # rounding of fp32 is below
        elif name == "fields.prefixes.weight":
            assert change.abs().max() > 0
        else:
            assert not change.any(), name
    assert len(ranks) == 8 and set(ranks.values()) == {3}


def test_the_first_step_moves_one_factor_alone():
    """The other's gradient is 0 while B is: of two steps of AdamW the first changes nothing through A."""
    _, _, optimizer = stepped(1)
    fresh = LowRank(dict(learning_model().blocks.named_parameters("blocks")), 3)
    for name, factor in optimizer.low_rank.factors.items():
        if name.endswith(".a"):
            torch.testing.assert_close(factor.data, fresh.factors[name].data, rtol=0, atol=1e-6)
        else:  # AdamW's first step is the rate in every place, and width scaling makes it larger
            moved = factor.abs()[factor.abs() > 0]
            rate = LORA.adamw_lr * (MODEL.n_embd / 768) ** -0.5
            torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)


def test_an_optimizer_goes_on_from_its_state_to_the_same_bits():
    _, model, optimizer = stepped(2)
    other = GPT(MODEL)  # what it began with is gone
    resumed = Optimizer(other, LORA)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    for one, by in ((model, optimizer), (other, resumed)):
        backward(one)
        by.step(momentum=0.9, weight_decay=0.01)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_decay_pulls_towards_the_given_matrices():
    before, model, optimizer = stepped(3)

    def changes() -> list[float]:
        both = zip(model.blocks.parameters(), before.blocks.parameters(), strict=True)
        return [(own - given).detach().norm().item() for own, given in both]

    larger = changes()
    for group in optimizer.adamw.param_groups:
        group["lr"] = 1.0
    for factor in optimizer.low_rank.factors.values():
        optimizer.adamw.state[factor]["exp_avg"].zero_()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(momentum=0.9, weight_decay=0.5)  # halves both factors
    assert changes() == [pytest.approx(change / 4, rel=1e-3) for change in larger]


def test_ranks_without_a_base_or_adamw_are_refused():
    with pytest.raises(ValueError, match=r"^optim.lora_rank=8 learns by AdamW; set optim.matrices to adamw$"):
        config_from_dict({"optim": {"lora_rank": 8}}, "config.toml")
    with pytest.raises(ValueError, match=r"^optim.lora_rank=3 changes given weights; name them: train.init_from$"):
        Config(optim=LORA)
    Config(optim=LORA, train=TrainConfig(init_from="runs/tiny"))
    large = OptimConfig(matrices="adamw", lora_rank=64)
    Config(ModelConfig(n_embd=96, n_head=2), optim=large, train=TrainConfig(init_from="runs/tiny"))
    with pytest.raises(
        ValueError, match=r"^optim.lora_rank=64 must be below model.n_embd=64: a change of that rank is any"
    ):
        Config(ModelConfig(n_embd=64, n_head=2), optim=large, train=TrainConfig(init_from="runs/tiny"))


def test_a_model_without_a_table_of_prefixes_learns_the_factors_alone():
    model = GPT(dataclasses.replace(MODEL, field_aware=False))
    names = {group["name"] for group in Optimizer(model, LORA).adamw.param_groups}
    assert names == {"matrices"} and not model.head.weight.requires_grad
