"""Claims about the switches of [optim]: other polynomials, rows of one length, AdamW alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ping_llm.config import ModelConfig, OptimConfig, config_from_dict
from ping_llm.model.gpt import GPT
from ping_llm.training.muon import NEWTON_SCHULZ, POLAR_EXPRESS, Matrix, Muon, orthogonalize
from ping_llm.training.optimizer import Optimizer

TINY = ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=64)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def give_gradients(model: GPT, seed: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = normal(*parameter.shape, seed=1000 * seed + number)


def model_and_optimizer(**switches) -> tuple[GPT, Optimizer]:
    model = GPT(TINY, generator=torch.Generator().manual_seed(0))
    return model, Optimizer(model, OptimConfig(**switches))


def best_quintic(least: float, most: float) -> np.ndarray:
    """The odd a·x + b·x³ + c·x⁵ that is nearest to 1 on [least, most]: Remez' exchange of its four extrema."""
    inner = np.array([3 * least + most, least + 3 * most]) / 4
    for _ in range(200):
        places = np.array([least, *inner, most])
        system = np.stack([places, places**3, places**5, [1, -1, 1, -1]], axis=1)
        *polynomial, _ = np.linalg.solve(system, np.ones(4))
        a, b, c = polynomial
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return np.array(polynomial)


def test_polar_express_follows_from_its_interval():
    """Each polynomial is the best for what the ones before leave of [0.001, 1]; an interval that begins below 0.02407 of its
    end is cut there, and the result is scaled to lie around 1: then no value is lifted too little for the next."""
    least, most = 1e-3, 1.0
    for number, found in enumerate(POLAR_EXPRESS):
        polynomial = best_quintic(max(least, 0.02407327424182761 * most), most)
        powers = np.array([1, 3, 5])
        ends = [(polynomial * end**powers).sum() for end in (least, most)]
        polynomial *= 2 / sum(ends)
        np.testing.assert_allclose(found * 1.01**powers, polynomial, rtol=1e-9, err_msg=str(number))
        least = (polynomial * least**powers).sum()
        most = 2 - least


def test_polar_express_lifts_all_singular_values_of_its_interval():
    ends = []
    for polynomials in (NEWTON_SCHULZ, POLAR_EXPRESS):
        x = np.geomspace(1e-3, 1, 10_000)
        for a, b, c in polynomials:
            x = a * x + b * x**3 + c * x**5
        ends.append((x.min(), x.max()))
    assert ends[1][0] > 0.84 and ends[1][1] < 1.13
    assert ends[0][0] < 0.5 and ends[0][1] > 1.2  # what the switch is for
    assert len(NEWTON_SCHULZ) == len(POLAR_EXPRESS)  # at the same cost


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 0.0), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(2, 80, 40), (2, 40, 80)])
def test_polar_express_ends_nearer_to_an_orthogonal_matrix(shape, dtype, slack):
    matrices = normal(*shape, seed=0)
    values = torch.linalg.svdvals(orthogonalize(matrices, dtype, POLAR_EXPRESS).float())
    jordan = torch.linalg.svdvals(orthogonalize(matrices, dtype).float())
    assert values.min() > 0.84 - slack and values.max() < 1.13 + slack
    assert (values - 1).square().mean() < (jordan - 1).square().mean() / 2


def test_orthogonalization_is_chosen_by_its_name():
    for name, polynomials in (("newton-schulz", NEWTON_SCHULZ), ("polar-express", POLAR_EXPRESS)):
        model, optimizer = model_and_optimizer(orthogonalization=name, weight_decay=0.0)
        optimizer.muon.dtype = torch.float32
        weight = model.blocks[0].mlp.up.weight
        give_gradients(model, 1)
        before, gradient = weight.detach().clone(), weight.grad.clone()
        optimizer.step(0.0, 0.0)
        step = 0.02 * 2 * orthogonalize(gradient[None], torch.float32, polynomials)[0]  # 128 × 32: √4
        torch.testing.assert_close(before - weight.detach(), step, rtol=1e-4, atol=1e-6)


def test_equal_rows_by_hand():
    """Rows of length 5 and 13 count the same; a row of zeros stays one. Orthogonal rows are the step already."""
    weight = nn.Parameter(torch.zeros(3, 4))
    muon = Muon({"w": Matrix(weight)}, initial_lr=1.0, orthogonalization="polar-express", equal_rows=True)
    muon.dtype = torch.float32
    weight.grad = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 5.0, 12.0], [0.0, 0.0, 0.0, 0.0]])
    gradient = weight.grad.clone()
    muon.step(momentum=0.0, weight_decay=0.0)
    rows = torch.tensor([[0.6, 0.8, 0.0, 0.0], [0.0, 0.0, 5 / 13, 12 / 13], [0.0, 0.0, 0.0, 0.0]])
    step = -weight.detach()
    assert step.norm(dim=1).tolist() == pytest.approx([step[0].norm().item()] * 2 + [0.0], rel=1e-4)
    torch.testing.assert_close(step / step.norm(dim=1, keepdim=True).clamp(min=1e-9), rows)
    assert torch.equal(weight.grad, gradient)


def test_equal_rows_do_not_depend_on_the_scale_of_a_row():
    steps = []
    for scale in (1.0, 1e-4):
        weight = nn.Parameter(torch.zeros(6, 8))
        muon = Muon({"w": Matrix(weight)}, initial_lr=1.0, equal_rows=True)
        muon.dtype = torch.float32
        weight.grad = normal(6, 8, seed=0)
        weight.grad[2] *= scale
        muon.step(momentum=0.0, weight_decay=0.0)
        steps.append(weight.detach().clone())
    torch.testing.assert_close(*steps)


def test_adamw_alone_takes_the_steps_of_torch_with_the_decay_of_the_matrices():
    model, optimizer = model_and_optimizer(matrices="adamw", adamw_lr=0.003)
    other = GPT(TINY, generator=torch.Generator().manual_seed(0))
    assert optimizer.muon is None
    width_scale = (32 / 768) ** -0.5
    assert optimizer.initial_lrs["matrices"] == pytest.approx(0.003 * width_scale)
    theirs = torch.optim.AdamW(other.blocks.parameters(), 0.003 * width_scale, (0.8, 0.95), 1e-10, weight_decay=0.0)
    for step, decay in enumerate((0.2, 0.1, 0.0)):
        give_gradients(model, step)
        give_gradients(other, step)
        head = model.head.weight.detach().clone()
        optimizer.set_lrs(0.5)
        optimizer.step(momentum=0.9, weight_decay=decay)
        theirs.param_groups[0] |= {"lr": 0.5 * 0.003 * width_scale, "weight_decay": decay}
        theirs.step()
        moments = optimizer.adamw.state[model.head.weight]
    for ours, expected in zip(model.blocks.parameters(), other.blocks.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    # The last step's decay was 0; that of the head always is.
    undecayed = moments["exp_avg"] / (1 - 0.8**3) / ((moments["exp_avg_sq"] / (1 - 0.95**3)).sqrt() + 1e-10)
    torch.testing.assert_close(model.head.weight.detach(), head - 0.5 * optimizer.initial_lrs["head"] * undecayed)


def test_adamw_alone_does_not_decay_embedding_and_head():
    model, optimizer = model_and_optimizer(matrices="adamw")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step(0.9, 0.5)
    kept = 1 - 0.5 * optimizer.initial_lrs["matrices"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (kept if name.startswith("blocks") else 1.0))


def test_adamw_alone_is_restored_under_the_names_of_its_parameters():
    (model, first), (other, second) = (model_and_optimizer(matrices="adamw") for _ in range(2))
    give_gradients(model, 1)
    first.step(0.9, 0.1)
    other.load_state_dict(model.state_dict())
    state = {name: value.clone() for name, value in first.state_dict().items()}
    assert len(state) == 3 * (2 * 4 + 2)  # step and two moments; the query, key and value matrix is one
    assert "adamw.blocks.1.mlp.up.weight.exp_avg_sq" in state and "adamw.head.step" in state
    second.load_state_dict(state)
    for one, optimizer in ((model, first), (other, second)):
        give_gradients(one, 7)
        optimizer.step(0.9, 0.1)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(
    ("switch", "name"), [({"equal_rows": True}, "equal_rows"), ({"orthogonalization": "polar-express"}, "orthogonal")]
)
def test_switches_of_muon_without_it_are_refused_in_one_line(switch, name):
    message = rf"^optim\.{name}.* is of Muon; with optim\.matrices=adamw leave it out$"
    with pytest.raises(ValueError, match=message):
        config_from_dict({"optim": {"matrices": "adamw"} | switch}, "config.toml")
