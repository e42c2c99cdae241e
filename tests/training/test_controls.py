"""Claims about the controls of training, watched inside the loop: each has its effect on the very step it is for."""

from __future__ import annotations

import dataclasses
import math
import signal

import pytest
import torch
from reference_gpt import plain_logits
from training_runs import MODEL, assert_same_weights, make_batches, make_config, make_windows, metrics, run

from ping_llm.config import Config, LossConfig, OptimConfig
from ping_llm.model.checkpoint import load_latest
from ping_llm.model.gpt import GPT
from ping_llm.model.loss import PARTS
from ping_llm.training.distributed import Ranks
from ping_llm.training.muon import orthogonalize
from ping_llm.training.objective import Objective
from ping_llm.training.optimizer import Optimizer
from ping_llm.training.run_state import RunState
from ping_llm.training.trainer import Training

CPU = torch.device("cpu")
OPTIM = OptimConfig(
    muon_lr=0.02, embedding_lr=0.3, head_lr=0.004, warmup_share=0.2, cooldown_share=0.4, final_lr_share=0.1,
    momentum_start=0.8, momentum_end=0.9, momentum_warmup_steps=4, weight_decay=0.1,
)  # fmt: skip
# Of 10 steps: a rise over the first two, a fall over the last four; to and from a tenth.
RATES = [0.1, 0.55, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325]
MOMENTA = [0.8, 0.825, 0.85, 0.875, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
DECAYS = [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01]
WIDTH_SCALE = (MODEL.n_embd / 768) ** -0.5


def config_of(run_dir, optim=OPTIM, loss=None, **train_fields) -> Config:
    config = make_config(run_dir, **{"total_steps": 10, "eval_every": 100, "checkpoint_every": 100} | train_fields)
    return dataclasses.replace(config, optim=optim, loss=loss or LossConfig())


@pytest.fixture
def steps(monkeypatch) -> list[tuple]:
    """What the optimiser is set to at the moment of each step: rates of matrices, embedding and head, momentum, decay."""
    seen, step = [], Optimizer.step

    def watched(self, momentum, weight_decay):
        rates = {group["name"]: group["lr"] for group in self.adamw.param_groups}
        seen.append((self.muon.lr, rates["embedding"], rates["head"], momentum, weight_decay))
        step(self, momentum, weight_decay)

    monkeypatch.setattr(Optimizer, "step", watched)
    return seen


def by_hand(first: int = 0) -> list:
    scales = (0.02, 0.3 * WIDTH_SCALE, 0.004 * WIDTH_SCALE)
    table = zip(RATES, MOMENTA, DECAYS, strict=True)
    return [pytest.approx((*(rate * scale for scale in scales), *rest)) for rate, *rest in table][first:]


def test_each_step_is_taken_at_the_rates_momentum_and_decay_of_its_schedule(tmp_path, steps):
    run(config_of(tmp_path))
    assert steps == by_hand()
    assert [line["lr"] for line in metrics(tmp_path)[1:]] == pytest.approx([0.02 * rate for rate in RATES])


def test_a_run_that_goes_on_takes_up_its_schedule_where_it_was(tmp_path, steps):
    def stopped_in_step_4(config, start_step, *given):
        for step, batch in enumerate(make_batches(config, start_step, *given), start_step):
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    assert run(config_of(tmp_path), stopped_in_step_4).step == 4
    steps.clear()
    run(config_of(tmp_path))
    assert steps == by_hand(4)


def test_a_run_by_tokens_has_the_rates_of_its_tokens(tmp_path, steps):
    """Of 10 steps of 8 windows with 60 or 55 targets each; after a step, the share of the tokens that are trained."""
    counts = [int((make_windows(8, seed)[:, 1:] >= 0).sum()) for seed in range(10)]
    run(config_of(tmp_path, total_steps=0, target_tokens=sum(counts)))
    done = [sum(counts[:step]) / sum(counts) for step in range(10)]
    assert [decay for *_, decay in steps] == pytest.approx([0.1 * (1 - share) for share in done])


def outspoken(model: GPT, std: float = 0.1) -> GPT:
    """The model with every weight drawn, so that every one has a gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


#          start, role, ×4 bytes, role, ×1 byte, role, ×2 bytes, and FAILED or a role that nothing follows
LAYOUT = ["structure", "structure", "src", "src", "src", "src", "structure", "dst", "structure", "rtt", "rtt"]


def loss_by_hand(model: GPT, tokens: torch.Tensor, weights: dict[str, float]) -> torch.Tensor:
    """The weighted mean over all targets of `make_windows`, one at a time."""
    log_p = plain_logits(model, tokens[:, :-1].clamp(min=0)).log_softmax(-1)
    total, weight_sum = torch.zeros(()), 0.0
    for window, row in zip(tokens.tolist(), log_p, strict=True):
        for place, target in enumerate(window[1:], 1):
            if target >= 0:
                weight = weights[[*LAYOUT, "rtt" if target == 10 else "structure"][place % 12]]
                total, weight_sum = total - weight * row[place - 1, target], weight_sum + weight
    return total / weight_sum


@pytest.mark.parametrize("grad_accum", [1, 4])
def test_the_gradient_is_that_of_the_weighted_mean_over_all_targets(tmp_path, grad_accum):
    weights = {"structure": 0.5, "src": 2.0, "dst": 0.0, "time": 7.0, "rtt": 3.0}
    model, tokens = outspoken(GPT(MODEL)), make_windows(8, seed=3)
    objective = Objective(config_of(tmp_path, loss=LossConfig(**weights), grad_accum=grad_accum), model, Ranks(CPU))
    sums, totals = objective.backward(tokens)
    expected = torch.autograd.grad(loss_by_hand(model, tokens, weights), list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert dict(zip(PARTS, totals.tolist(), strict=True))["rtt"] > 8 * 5 * 2
    loss = objective.means(sums.double(), totals)["loss"]
    assert loss == pytest.approx(loss_by_hand(model, tokens, weights).item(), rel=1e-5)


def test_the_logged_loss_of_a_run_is_weighted_by_the_config(tmp_path):
    """At step 1 the model is as it was made, so every field costs about ln 267; a run at huge weights logs no more."""
    weights = LossConfig(structure=0.0, src=0.0, dst=0.0, time=0.0, rtt=2.0)
    run(config_of(tmp_path, loss=weights, total_steps=2))
    for line in metrics(tmp_path)[1:]:
        assert line["loss"] == pytest.approx(line["loss_rtt"])
        assert line["loss_structure"] != pytest.approx(line["loss_rtt"], rel=1e-6)


def taken_step(tmp_path, gradients: float, **optim) -> tuple[GPT, GPT, float, torch.Tensor]:
    """A model before and after one step, whose every gradient is `gradients`, the norm that was found, and what the
    gradients of the head then were."""
    config = config_of(tmp_path, optim=dataclasses.replace(OPTIM, **optim))
    model, before, ranks = outspoken(GPT(MODEL)), outspoken(GPT(MODEL)), Ranks(CPU)
    training = Training(
        config, None, ranks, RunState("", step=2), model, Optimizer(model, config.optim), None, torch.empty(0), None
    )
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradients)
    norm = training.gradient_norm()
    clipped = model.head.weight.grad.clone()
    training.apply_gradients(norm, lr_scale=0.5, progress=0.25)
    assert all(parameter.grad is None for parameter in model.parameters())
    return before, model, norm, clipped


def test_a_gradient_that_is_too_long_is_scaled_down_to_the_limit(tmp_path):
    """n gradients of 3 have the norm 3·√n; cut to 0.6 each of them is 0.6 / √n."""
    count = sum(parameter.numel() for parameter in GPT(MODEL).parameters())
    *_, norm, clipped = taken_step(tmp_path, 3.0, grad_clip=0.6)
    assert norm == pytest.approx(3 * math.sqrt(count), rel=1e-4)
    torch.testing.assert_close(clipped, torch.full_like(clipped, 0.6 / math.sqrt(count)))
    *_, norm, clipped = taken_step(tmp_path, 1e-4, grad_clip=0.6)
    assert norm == pytest.approx(1e-4 * math.sqrt(count), rel=1e-4) and norm < 0.6
    assert torch.equal(clipped, torch.full_like(clipped, 1e-4))
    *_, clipped = taken_step(tmp_path, 3.0, grad_clip=0.0)  # never
    assert torch.equal(clipped, torch.full_like(clipped, 3.0))


def test_one_clipped_update_by_hand(tmp_path):
    """AdamW's first step is ε-close to the rate times g / (|g| + ε), so with a large ε it shows the length of g; Muon's
    first step is the rate times the orthogonal matrix nearest to g, after the decay."""
    count = sum(parameter.numel() for parameter in GPT(MODEL).parameters())
    before, after, *_ = taken_step(tmp_path, 3.0, grad_clip=0.6, adam_eps=0.01)
    g = 0.6 / math.sqrt(count)
    for name, peak in (("embedding", 0.3), ("head", 0.004)):
        step = getattr(before, name).weight - getattr(after, name).weight
        expected = 0.5 * peak * WIDTH_SCALE * g / (g + 0.01)
        torch.testing.assert_close(step, torch.full_like(step, expected), rtol=1e-3, atol=1e-7)
    old, new = (model.blocks[0].mlp.up.weight.detach() for model in (before, after))
    orthogonal = orthogonalize(torch.full_like(old, g)[None], torch.float32)[0]
    # Half of the peak rate, of a decay of 0.1 after a quarter of the run, and √(rows / columns) = 2
    torch.testing.assert_close(new, old * (1 - 0.01 * 0.075) - 0.01 * 2 * orthogonal, rtol=0, atol=2e-4)


def test_the_momentum_of_a_step_is_that_of_its_number(tmp_path):
    """After one step the average is (1 − momentum) times the gradient; step 2 of 4 is half way from 0.8 to 0.9."""
    config, model = config_of(tmp_path), outspoken(GPT(MODEL))
    optimizer = Optimizer(model, config.optim)
    training = Training(config, None, Ranks(CPU), RunState("", step=2), model, optimizer, None, torch.empty(0), None)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    training.apply_gradients(1.0, lr_scale=1.0, progress=0.0)
    for momentum in optimizer.muon.state_dict().values():
        torch.testing.assert_close(momentum, torch.full_like(momentum, 0.15 * 2.0))


def test_gradients_that_are_not_finite_change_nothing(tmp_path):
    for value in (math.nan, math.inf):
        before, after, norm, _ = taken_step(tmp_path, value)
        assert not math.isfinite(norm)
        assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))


def test_clipping_decides_the_steps_of_a_run(tmp_path):
    """The norms that are logged are those before clipping; a low limit and none lead to other weights."""
    runs = {clip: config_of(tmp_path / str(clip), dataclasses.replace(OPTIM, grad_clip=clip)) for clip in (1e-3, 0.0)}
    for config in runs.values():
        run(config)
    first, second = ([line["grad_norm"] for line in metrics(config.train.run_dir)[1:]] for config in runs.values())
    assert first[0] == second[0] > 1e-3 and first[1:] != second[1:]


# The softcap, with logits beyond it


@torch.no_grad()
def test_logits_beyond_the_softcap_are_those_of_tanh():
    """The head is ten times as loud: raw logits reach far beyond 3, where a clamp or none would be told apart."""
    config = dataclasses.replace(MODEL, softcap=3.0)
    capped, raw = (outspoken(GPT(each), std=1.0) for each in (config, dataclasses.replace(MODEL, softcap=1e9)))
    tokens = make_windows(2, seed=1)[:, :20]
    beyond = raw(tokens)
    assert (beyond.abs() > 6).float().mean() > 0.2 and (beyond.abs() < 2).float().mean() > 0.1
    torch.testing.assert_close(capped(tokens), 3 * torch.tanh(beyond / 3), rtol=1e-3, atol=2e-3)


def test_the_softcap_of_the_config_bounds_the_loss_of_a_step(tmp_path):
    """A logit is at most 1 and at least −1: no target can cost more than ln 267 + 2, nor less than ln 267 − 2."""
    config = config_of(tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, softcap=1.0))
    objective = Objective(config, outspoken(GPT(config.model), std=3.0), Ranks(CPU))
    sums, counts = objective.backward(make_windows(8, seed=0))
    means = (sums / counts)[counts > 0]
    assert (abs(means - math.log(267)) < 2).all() and (means > math.log(267) + 0.1).any()
    louder = dataclasses.replace(config, model=dataclasses.replace(MODEL, softcap=100.0))
    sums, counts = Objective(louder, outspoken(GPT(louder.model), std=3.0), Ranks(CPU)).backward(make_windows(8, 0))
    assert ((sums / counts)[counts > 0] > math.log(267) + 2).any()


# bf16, compiled; the graph is that of a real compilation, run without a C++ compiler


def test_a_compiled_model_in_bf16_has_the_gradients_of_an_eager_one(tmp_path, monkeypatch):
    torch._dynamo.reset()
    compiler, compiled = torch.compile, []

    def compile_to_aot(model, **options):
        compiled.append(options)
        return compiler(model, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_to_aot)
    gradients = {}
    for compile_it, precision in ((True, "bf16"), (False, "bf16"), (False, "fp32")):
        model = outspoken(GPT(MODEL))
        objective = Objective(config_of(tmp_path, compile=compile_it, precision=precision), model, Ranks(CPU))
        seen = []
        with model.blocks[1].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].dtype)):
            sums, _ = objective.backward(make_windows(8, seed=0))
        assert sums.dtype == torch.float32
        assert compile_it or set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        gradients[compile_it, precision] = {name: p.grad for name, p in model.named_parameters()}
    assert compiled == [{"dynamic": False}]
    for name, exact in gradients[False, "fp32"].items():
        eager, ours = gradients[False, "bf16"][name], gradients[True, "bf16"][name]
        assert ours.dtype == torch.float32
        assert (ours - eager).norm() < 0.02 * exact.norm(), name
        assert 1e-4 * exact.norm() < (ours - exact).norm() < 0.05 * exact.norm(), name  # bf16 indeed, and near


# Deterministic runs, and the precision a run began with


def test_a_deterministic_run_has_the_bits_of_any_run_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen, backward = [], Objective.backward

    def watched(self, *given, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return backward(self, *given, **options)

    monkeypatch.setattr(Objective, "backward", watched)
    for wanted in (True, False):
        run(config_of(tmp_path / str(wanted), deterministic=wanted, sample_every=5))
    assert seen == [True] * 10 + [False] * 10 and not torch.are_deterministic_algorithms_enabled()
    assert_same_weights(tmp_path / "True", tmp_path / "False")
    assert load_latest(tmp_path / "True").step == 10
