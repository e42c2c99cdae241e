"""Claims about the loss of a step and of val: sums over windows, micro-batches and processes, divided once."""

from __future__ import annotations

import dataclasses
import math
import types

import pytest
import torch
import torch.nn.functional as F
from training_runs import MODEL, make_config, make_windows

from ping_llm.config import FIELDS, DataConfig, LossConfig
from ping_llm.model.gpt import GPT
from ping_llm.model.loss import PARTS, field_losses, smoothing_cost
from ping_llm.training import objective as module
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective, resolve_precision

CPU = torch.device("cpu")
WEIGHTS = LossConfig(structure=0.5, src=2.0, dst=1.0, time=7.0, rtt=3.0)
SMOOTHED = dataclasses.replace(WEIGHTS, smoothing=3.0)


@pytest.fixture
def model() -> GPT:
    return outspoken(GPT(MODEL))


def outspoken(model: GPT) -> GPT:
    """With weights of which every one counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def objective_of(model, tmp_path, ranks=None, loss=WEIGHTS, **train_fields) -> Objective:
    config = dataclasses.replace(make_config(tmp_path, **train_fields), loss=loss)
    return Objective(config, model, ranks or Ranks(CPU))


def nats(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each target, (B, T); 0 where there is none."""
    logits = model(tokens[:, :-1].clamp(min=0))
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=-1, reduction="none")


def fields(tokens: torch.Tensor) -> torch.Tensor:
    """Of each target of `make_windows`, by its place in a measurement of 12 tokens; −1 for padding."""
    by_place = torch.tensor([0, 0, 1, 1, 1, 1, 0, 2, 0, 4, 4, 0])
    found = by_place[torch.arange(tokens.shape[1]) % 12].expand_as(tokens).clone()
    found[tokens == 10] = 4  # FAILED
    return found.masked_fill(tokens < 0, -1)[:, 1:]


def bytes_of_rtts(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets of `make_windows` are bytes 1 and bytes 2."""
    place = torch.arange(tokens.shape[1]).expand_as(tokens)[:, 1:] % 12
    return tuple((place == number) & (tokens[:, 1:] >= 0) for number in (9, 10))


def test_precision_is_the_given_one_or_that_of_the_device(model, tmp_path, monkeypatch):
    for native, auto in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(module, "native_bf16", lambda device, native=native: device == CPU and native)
        assert [resolve_precision(name, CPU) for name in ("auto", "fp32", "bf16", "fp16")] == [
            auto,
            "fp32",
            "bf16",
            "fp16",
        ]
        assert objective_of(model, tmp_path, precision="auto").precision == auto
        config = make_config(tmp_path, precision="auto")
        assert Objective(config, model, Ranks(CPU), "fp16").precision == "fp16"  # as the run began


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_forward_pass_is_of_the_precision(model, tmp_path, precision, dtype):
    with objective_of(model, tmp_path, precision=precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_sums_and_counts_are_those_of_each_field(model, tmp_path):
    tokens = make_windows(8, seed=1)
    sums, totals = objective_of(model, tmp_path, grad_accum=2).backward(tokens, 1.0, 2.0**24 + 1)
    cost, field = nats(model, tokens), fields(tokens)
    for number in range(5):
        assert sums[number].item() == pytest.approx(cost[field == number].sum().item(), rel=1e-4)
        assert totals[number] == (field == number).sum()
    byte1, byte2 = bytes_of_rtts(tokens)
    assert sums[5:].tolist() == pytest.approx([cost[byte1].sum().item(), cost[byte2].sum().item()], rel=1e-4)
    assert totals[5:7].tolist() == [byte1.sum(), byte2.sum()] and byte1.sum() == 40
    assert totals[7:].tolist() == [1.0, 2.0**24 + 1] and totals.dtype == torch.float64 and not sums.requires_grad


@pytest.mark.parametrize("grad_accum", [1, 4])
def test_the_cost_of_smoothing_weighs_as_the_rtt(model, tmp_path, grad_accum):
    """Over micro-batches with unequal numbers of targets; what is reported is plain cross-entropy."""
    tokens = make_windows(8, seed=2)
    tokens[5:, 22:] = -1  # byte 2 is cut off
    targets = tokens[:, 1:]
    read = fields(tokens).clamp(min=0).to(torch.uint8)
    logits = model(tokens[:, :-1].clamp(min=0))
    weights = torch.tensor([0.5, 2.0, 1.0, 7.0, 3.0, 0.0, 0.0])
    sums, counts = field_losses(logits, targets, read)
    added = smoothing_cost(logits, targets, read, 3.0)
    cost = ((weights * sums).sum() + 3 * added) / (weights * counts).sum()
    expected = torch.autograd.grad(cost, model.head.weight)[0]
    found, totals = objective_of(model, tmp_path, loss=SMOOTHED, grad_accum=grad_accum).backward(tokens)
    torch.testing.assert_close(model.head.weight.grad, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found, sums.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(totals, counts.double()) and added.abs() > 0.9


def test_without_smoothing_the_order_of_values_costs_no_time(model, tmp_path, monkeypatch):
    tokens, deviations = make_windows(8, seed=2), []
    monkeypatch.setattr(module, "smoothing_cost", lambda *given: deviations.append(given[3]) or torch.zeros(()))
    objective_of(model, tmp_path).backward(tokens)
    assert not deviations
    objective_of(model, tmp_path, loss=SMOOTHED).backward(tokens)
    assert deviations == [3.0]


def test_evaluations_are_plain_whatever_training_adds(model, tmp_path):
    tokens = make_windows(8, seed=2)
    plain = objective_of(model, tmp_path).evaluate(tokens)
    values = objective_of(model, tmp_path, loss=SMOOTHED).evaluate(tokens)
    assert values == pytest.approx(plain, nan_ok=True, rel=1e-9)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_gradients_add_up_and_are_scaled(model, tmp_path, loss_scale):
    tokens, weights = make_windows(8, seed=2), torch.tensor([0.5, 2.0, 1.0, 7.0, 3.0, 0.0])
    weight = weights[fields(tokens)]
    expected = torch.autograd.grad((nats(model, tokens) * weight).sum() / weight.sum(), model.head.weight)[0]
    step = objective_of(model, tmp_path)
    for times in (1, 2):
        step.backward(tokens, loss_scale=loss_scale)
        torch.testing.assert_close(model.head.weight.grad / loss_scale, times * expected, rtol=1e-4, atol=1e-7)


def test_a_step_is_worked_through_in_micro_batches_of_all_its_windows(model, tmp_path):
    seen = []
    with model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape)):
        objective_of(model, tmp_path, grad_accum=4).backward(make_windows(8, seed=0))
    assert seen == [(2, 64)] * 4


SHORT = DataConfig(short_windows=2, short_len=47)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_short_windows_are_targets_among_the_others_and_see_only_themselves(model, tmp_path, grad_accum):
    tokens, beside = make_windows(4, seed=5), make_windows(8, seed=6)[:, :48]
    beside[3, 20:] = -1
    seen = []
    config = dataclasses.replace(make_config(tmp_path, batch_size=4, grad_accum=grad_accum), loss=SMOOTHED, data=SHORT)
    with model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape)):
        lines = torch.cat([tokens, beside.reshape(4, -1)], dim=1)
        sums, totals = Objective(config, model, Ranks(CPU)).backward(lines)
    each = 4 // grad_accum
    assert seen == [(2 * each, 47)] * grad_accum + [(each, 64)] * grad_accum
    found = model.head.weight.grad.clone()
    model.zero_grad()
    step = objective_of(model, tmp_path, loss=SMOOTHED, batch_size=8)
    together = torch.cat([tokens, F.pad(beside, (0, tokens.shape[1] - 48), value=-1)])
    step.micro_batch = len(together)
    expected, counts = step.backward(together)
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
    assert totals.tolist() == counts.tolist()
    torch.testing.assert_close(found, model.head.weight.grad, rtol=1e-4, atol=1e-7)


def test_what_is_left_out_of_a_short_window_is_its_own_whatever_the_micro_batch(tmp_path):
    """Two equal windows of a place lose other values, and all are the same in one micro-batch and in four."""
    config = make_config(tmp_path, batch_size=4)
    config = dataclasses.replace(config, data=SHORT, model=dataclasses.replace(MODEL, dropout=0.5))
    lines = torch.cat([make_windows(4, seed=5), make_windows(4, seed=6)[:, :48].repeat(1, 2)], dim=1)
    gradients, given = [], []
    for grad_accum in (1, 4):
        model = outspoken(GPT(config.model))
        one = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum=grad_accum))
        with model.register_forward_pre_hook(lambda _, __, named: given.append(named["keys"]), with_kwargs=True):
            Objective(one, model, Ranks(CPU)).backward(lines, step=3)
        gradients.append(model.head.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert torch.equal(torch.cat([given[0], given[1]]), torch.cat([given[2 + i] for i in range(8)]))
    assert given[0].shape == (8,) and len(torch.cat(given[:2]).unique()) == 12


class Twin:
    """One of two processes with the same windows: every sum is twice as large."""

    device, rank, world, is_main = CPU, 1, 2, False

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.mul_(2)


def test_the_gradient_of_a_process_is_its_share_before_the_mean_over_processes(model, tmp_path, monkeypatch):
    """Of two processes with equal windows each has the gradient of the whole, as DDP takes the mean; it exchanges once."""
    synced = []

    class Parallel(torch.nn.Module):
        def __init__(self, inner, device_ids, **options):
            super().__init__()
            self.inner = inner
            assert device_ids is None and options == {"gradient_as_bucket_view": True, "broadcast_buffers": False}

        def forward(self, tokens):
            synced.append("exchanged")
            return self.inner(tokens)

        def no_sync(self):
            synced.append("not")
            return module.nullcontext()

    monkeypatch.setattr(module, "DistributedDataParallel", Parallel)
    tokens = make_windows(4, seed=3)
    objective_of(model, tmp_path, loss=SMOOTHED, grad_accum=2).backward(tokens.repeat(2, 1))
    alone = model.head.weight.grad.clone()
    model.zero_grad()
    step = objective_of(model, tmp_path, Twin(), SMOOTHED, grad_accum=2)
    assert step.micro_batch == 2
    step.backward(tokens)
    torch.testing.assert_close(model.head.weight.grad, alone, rtol=1e-4, atol=1e-7)
    assert synced == ["not", "exchanged", "exchanged"]
    assert step.forward_alone is model and step.forward is step.parallel


def test_evaluation_is_of_all_windows_and_leaves_no_gradient(model, tmp_path):
    """10 windows in parts of 8: the last part is smaller."""
    tokens = make_windows(10, seed=4)
    values = objective_of(model, tmp_path).evaluate(tokens)
    cost, field = nats(model, tokens).detach().double(), fields(tokens)
    means = {name: cost[field == number].mean().item() for number, name in enumerate(FIELDS)}
    weight = torch.tensor([0.5, 2.0, 1.0, 7.0, 3.0, 0.0], dtype=torch.float64)[field]
    assert values.keys() == {"val_loss", "val_rtt_bits", *(f"val_loss_{name}" for name in PARTS)}
    assert values["val_loss"] == pytest.approx(((cost * weight).sum() / weight.sum()).item(), rel=1e-5)
    for name in ("structure", "src", "dst", "rtt"):
        assert values[f"val_loss_{name}"] == pytest.approx(means[name], rel=1e-5)
    for name, of_byte in zip(("rtt1", "rtt2"), bytes_of_rtts(tokens), strict=True):
        assert values[f"val_loss_{name}"] == pytest.approx(cost[of_byte].mean().item(), rel=1e-5)
    assert math.isnan(values["val_loss_time"])  # these windows have no times
    # A measurement has two tokens of an RTT, and, where it says FAILED, too, a third that is counted as one run with them.
    assert values["val_rtt_bits"] == pytest.approx((cost * (field == 4)).sum().item() / 50 / math.log(2), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_processes_share_the_windows_of_an_evaluation(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DistributedDataParallel", lambda inner, *_, **__: inner)
    seen = []
    with model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        objective_of(model, tmp_path, Twin()).evaluate(tokens := make_windows(10, seed=5))
    assert torch.equal(torch.cat(seen), tokens[1::2, :-1].clamp(min=0))
    seen.clear()
    idle = types.SimpleNamespace(
        device=CPU, rank=1, world=2, sum=lambda values: seen.append(values.dtype) or values + 1
    )
    objective_of(model, tmp_path, idle).evaluate(tokens[:1])
    assert seen == [torch.float64]  # one exchange, and no pass


@pytest.mark.parametrize(("world", "compiled"), [(1, True), (1, False), (2, True)])
def test_what_is_compiled_has_one_shape(model, tmp_path, monkeypatch, world, compiled):
    """The last part of val is filled up with padding then; over several processes evaluations take the bare model."""
    made, shapes = [], []
    monkeypatch.setattr(module, "DistributedDataParallel", lambda inner, *_, **__: ("parallel", inner))
    monkeypatch.setattr(torch, "compile", lambda inner, **options: made.append((inner, options)) or ("compiled", inner))
    ranks = Twin() if world == 2 else None
    step = objective_of(model, tmp_path, ranks, compile=compiled)
    if not compiled:
        assert step.forward is step.forward_alone is model and not made
    elif world == 2:
        assert step.forward == ("compiled", ("parallel", model)) and step.forward_alone == ("compiled", model)
    else:
        assert step.forward == step.forward_alone == ("compiled", model)
    assert all(options == {"dynamic": False} for _, options in made)
    step.forward_alone = lambda tokens: shapes.append(tuple(tokens.shape)) or model(tokens)
    values = step.evaluate(make_windows(11, seed=6))
    if world == 1:
        assert len(made) == compiled
        step.compiled = False
        assert values == pytest.approx(step.evaluate(make_windows(11, seed=6)), nan_ok=True)
        shapes = shapes[:2]
    size = step.micro_batch
    assert shapes == ([(8, 64), (8, 64)] if compiled else [(8, 64), (3, 64)]) if world == 1 else [(size, 64)] * 2


def test_a_batch_that_cannot_be_dealt_is_refused(model, tmp_path):
    ranks = types.SimpleNamespace(device=CPU, rank=0, world=3)
    with pytest.raises(ValueError, match="times the 3 processes"):
        objective_of(model, tmp_path, ranks)


def test_hosts_of_a_network_teach_a_model_that_reads_networks_the_same(tmp_path):
    model, tokens = GPT(dataclasses.replace(MODEL, src_bits_ipv4=24)), make_windows(2, seed=0)
    host = torch.arange(tokens.shape[1]) % 12 == 5  # the last byte of a source
    assert (tokens[:, host] >= 11).any()
    objective = objective_of(model, tmp_path)
    sums = [objective.backward(torch.where(host & (tokens >= 11), byte, tokens))[0] for byte in (11, 40)]
    assert torch.equal(sums[0], sums[1])
    inputs, targets, _ = objective.targets(tokens)
    read = torch.where(host & (tokens >= 11), 11, tokens)
    assert torch.equal(targets, read[:, 1:]) and torch.equal(inputs, read[:, :-1].clamp(min=0))
