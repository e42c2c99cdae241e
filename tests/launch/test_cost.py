"""Claims about what a run will take, against numbers by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from paths import CONFIGS

from ping_llm.config import Config, ModelConfig, OptimConfig, TrainConfig, load_config
from ping_llm.launch.plan import GPU, PRICES, activation_bytes, fewest_pieces, fixed_bytes, plan_cost
from ping_llm.model.gpt import GPT, flops_per_token, parameter_count
from ping_llm.training.averaging import WeightAverage
from ping_llm.training.optimizer import Optimizer

SMALL, FULL = load_config(CONFIGS / "small.toml"), load_config(CONFIGS / "full.toml")
ROUND = GPU("round", memory_gb=100, dollars_per_hour=2.0, peak_flops=1e15)


def with_train(config: Config, **fields) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def test_hours_and_dollars_by_hand():
    """small: 6 · (12·640²·20 + 267·640 + 28·640) + 12·20·640·1024 FLOPs a token, and in ten blocks 6 · (640² + 12·5) of
    value embeddings and their gates: 772,822,800; 20,000 steps of 128 × 1,024 tokens."""
    plan = plan_cost(SMALL, ROUND, gpus=4, mfu=0.5)
    tokens_per_s = 4 * 0.5e15 / 772_822_800
    assert plan.tokens == 20_000 * 128 * 1024 and plan.tokens_per_s == pytest.approx(tokens_per_s)
    assert plan.hours == pytest.approx(2_621_440_000 / tokens_per_s / 3600)
    assert plan.dollars == pytest.approx(4 * 2.0 * plan.hours)


def test_more_gpus_are_faster_at_the_same_price():
    one, eight = (plan_cost(SMALL, ROUND, gpus) for gpus in (1, 8))
    assert one.hours == pytest.approx(8 * eight.hours) and one.dollars == pytest.approx(eight.dollars)
    assert (one.micro_batch, eight.micro_batch) == (128, 16)


def test_the_nearest_limit_ends_the_run():
    assert plan_cost(with_train(SMALL, target_tokens=131_072_000), ROUND, 1).steps == 1000
    assert plan_cost(with_train(SMALL, target_tokens=10**12), ROUND, 1).steps == 20_000
    assert plan_cost(with_train(SMALL, total_steps=0, target_tokens=10**12), ROUND, 1).tokens == 10**12


def test_weights_and_optimizer_by_hand():
    """One block of width 64: 12·64² = 49,152 weights of matrices at 14 bytes, 2·267·64 of the vocabulary at 18; Muon's
    largest stack holds 4·64² weights at 8 bytes."""
    assert fixed_bytes(ModelConfig(n_layer=1, n_embd=64, n_head=2)) == 14 * 49_152 + 18 * 34_176 + 8 * 16_384


FIELD_AWARE = ModelConfig(n_layer=1, n_embd=64, n_head=2, field_aware=True, prefix_rows=1024)


def test_the_tables_of_fields_count_with_both_moments_of_adamw_by_hand():
    """11 roles of 18 places, 1,024 prefixes, 28 features of values: 1,250 vectors of 64 at 18 bytes."""
    plain = dataclasses.replace(FIELD_AWARE, field_aware=False)
    assert fixed_bytes(FIELD_AWARE) - fixed_bytes(plain) == 18 * 1_250 * 64
    assert fixed_bytes(dataclasses.replace(FIELD_AWARE, prefix_rows=2048)) - fixed_bytes(FIELD_AWARE) == 18 * 1024 * 64


def test_a_growing_batch_takes_more_steps_for_the_same_tokens_by_hand():
    """128 windows from 32 on, 8 steps: 4 of 32 and 4 of 64 are 384 windows, of which whole batches take 3 steps."""
    growing = with_train(SMALL, first_batch_size=32, batch_warmup_steps=8)
    by_steps = plan_cost(with_train(growing, total_steps=100), ROUND, 1)
    assert (by_steps.steps, by_steps.tokens) == (100, (384 + 92 * 128) * 1024)
    by_tokens = plan_cost(with_train(growing, total_steps=0, target_tokens=by_steps.tokens), ROUND, 1)
    assert (by_tokens.steps, by_tokens.tokens) == (pytest.approx(100), by_steps.tokens)
    assert by_tokens.hours == by_steps.hours


@pytest.mark.parametrize(("short_windows", "passes"), [(4, 1), (32, 2)])
def test_short_windows_count_and_have_passes_of_their_own_by_hand(short_windows, passes):
    """Of 64 tokens beside 1,024: four are a quarter more and fit where a window does, 32 take twice its memory."""
    config = dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, short_windows=short_windows, short_len=64))
    plan, alone = (plan_cost(one, ROUND, 1) for one in (config, SMALL))
    assert plan.tokens == alone.tokens * (1 + short_windows / 16)
    attended = 12 * SMALL.model.n_layer * SMALL.model.n_embd * (1024 - 64)  # FLOPs that a token of a short window saves
    share, flops = short_windows / (16 + short_windows), flops_per_token(SMALL.model)
    assert plan.tokens_per_s == pytest.approx(alone.tokens_per_s * flops / (flops - share * attended))
    assert plan.largest_micro_batch == pytest.approx(alone.largest_micro_batch / passes, abs=1)
    by_tokens = plan_cost(with_train(config, total_steps=0, target_tokens=int(plan.tokens)), ROUND, 1)
    assert by_tokens.steps == pytest.approx(plan.steps)


def test_more_micro_batches_than_needed_are_said():
    lines = plan_cost(with_train(SMALL, grad_accum=4), ROUND, 1).lines
    assert lines[-1].endswith("the batch fits, and so it would with --train.grad-accum 1")
    assert plan_cost(SMALL, ROUND, 1).lines[-1].endswith("the batch fits")


@pytest.mark.parametrize(("windows", "largest", "pieces"), [(128, 200, 1), (128, 100, 2), (96, 40, 3), (7, 3, 7)])
def test_the_fewest_micro_batches_by_hand(windows, largest, pieces):
    assert fewest_pieces(windows, largest) == pieces


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("field_aware", [False, True])
def test_weights_gradients_moments_and_averages_are_as_large_as_the_plan_counts(field_aware, averaged):
    """Beside the bf16 copies and Muon's stack, and the 53 rows by which the vocabulary's two tables are padded."""
    config = dataclasses.replace(FIELD_AWARE, field_aware=field_aware)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = Optimizer(model, OptimConfig())
    optimizer.step(0.9, 0.0)
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *optimizer.state_dict().values()]
    held += WeightAverage(model, 0.1).weights.values() if averaged else []
    counted = fixed_bytes(config, averaged) - 2 * parameter_count(config) - 8 * 4 * 64**2
    steps = 4 * len(optimizer.adamw.param_groups)  # AdamW counts them in fp32
    assert sum(tensor.nbytes for tensor in held) == counted + (20 if averaged else 16) * 2 * 53 * 64 + steps


def test_adamw_alone_keeps_two_moments_of_all_weights_and_no_stack():
    model = GPT(FIELD_AWARE)
    optimizer = Optimizer(model, OptimConfig(matrices="adamw"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.9, 0.0)
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *optimizer.state_dict().values()]
    counted = fixed_bytes(FIELD_AWARE, adamw=True) - 2 * parameter_count(FIELD_AWARE)
    steps = 4 * sum(len(group["params"]) for group in optimizer.adamw.param_groups)
    assert sum(tensor.nbytes for tensor in held) == counted + 16 * 2 * 53 * 64 + steps


def test_fp8_is_planned_as_bf16_and_says_so():
    config = with_train(FULL, precision="fp8")
    bf16, fp8 = plan_cost(FULL, GPU.named("h100"), 8), plan_cost(config, GPU.named("h100"), 8)
    assert fp8.lines[:-1] == bf16.lines and "its gain has not been measured" in fp8.lines[-1]
    assert (fp8.hours, fp8.largest_micro_batch) == (bf16.hours, bf16.largest_micro_batch)
    with pytest.raises(
        ValueError, match=r"^train.precision=fp8 needs a GPU that multiplies it, which a100 does not; take"
    ):
        plan_cost(config, GPU.named("a100"), 8)


def test_averaged_weights_take_four_bytes_a_parameter_of_the_room_for_batches():
    """On a GPU with room for one window of full.toml and 1,000 bytes, if nothing is averaged."""
    used = fixed_bytes(FULL.model) + activation_bytes(FULL.model)
    gpu = dataclasses.replace(ROUND, memory_gb=(used + 1000) / 0.92 / 1e9)
    plain, averaged = (plan_cost(with_train(FULL, average=share), gpu, gpus=8) for share in (0.0, 0.1))
    assert (plain.largest_micro_batch, averaged.largest_micro_batch) == (1, 0)
    more = fixed_bytes(FULL.model, averaged=True) - fixed_bytes(FULL.model)
    assert more == 4 * parameter_count(FULL.model)


def test_the_largest_batch_is_the_largest_that_fits():
    plan = plan_cost(SMALL, ROUND, gpus=1)
    room = 0.92 * 100e9 - fixed_bytes(SMALL.model)
    assert plan.largest_micro_batch == int(room // activation_bytes(SMALL.model)) and plan.fits == (
        plan.largest_micro_batch >= 128
    )


def test_activations_by_hand_and_more_of_them_where_nothing_is_compiled():
    """small: 1,024 tokens of 20 blocks of 640 channels at 38 bytes compiled and 48 eager, and 267 logits at 10."""
    assert activation_bytes(SMALL.model) == 1024 * (38 * 20 * 640 + 10 * 267) == 500_807_680
    assert activation_bytes(SMALL.model, compiled=False) == 1024 * (48 * 20 * 640 + 10 * 267) == 631_879_680
    for choice, kind, size in (
        ("auto", "compiled", 500_807_680),
        (True, "compiled", 500_807_680),
        (False, "eager", 631_879_680),
    ):
        plan = plan_cost(with_train(SMALL, compile=choice), ROUND, gpus=1)
        assert plan.largest_micro_batch == int((92e9 - fixed_bytes(SMALL.model)) // size)
        assert sum(line.endswith(f"a micro-batch of 128, {kind}") for line in plan.lines) == 1


def test_activations_of_switches_by_hand():
    """small: two bytes more of each of 20 blocks with dropout, six for an eager SwiGLU, 41 or 35 of each of two tables."""
    token = 1024 * 640
    for switches, compiled, eager in (
        ({"dropout": 0.1}, 2 * 20 * token, 2 * 20 * token),
        ({"mlp": "swiglu"}, 0, 6 * 20 * token),
        ({"lookup_rows": 1000}, 2 * 41 * token, 2 * 35 * token),
    ):
        model = dataclasses.replace(SMALL.model, **switches)
        more = [activation_bytes(model, how) - activation_bytes(SMALL.model, how) for how in (True, False)]
        assert more == [compiled, eager]


@pytest.mark.parametrize(("gpu", "pieces"), [("l40s", 4), ("l4", 64)])
def test_a_batch_that_does_not_fit_is_cut_as_advised(gpu, pieces):
    """full.toml takes two micro-batches of 32 windows on each of 8 GPUs."""
    plan = plan_cost(FULL, GPU.named(gpu), gpus=8)
    assert not plan.fits and any(line.endswith(f"--train.grad-accum {pieces}") for line in plan.lines)
    assert plan_cost(with_train(FULL, grad_accum=pieces), GPU.named(gpu), gpus=8).fits
    assert not plan_cost(with_train(FULL, grad_accum=pieces // 2), GPU.named(gpu), gpus=8).fits


def test_the_configs_fit_the_machines_that_their_first_line_names():
    assert plan_cost(FULL, GPU.named("h100"), gpus=8).fits and plan_cost(SMALL, GPU.named("h100"), gpus=1).fits


def test_every_gpu_of_the_price_table_is_known():
    for name in ("a100", "H100", "h200", "b200", "l40s", "l4"):
        gpu = GPU.named(name)
        assert gpu.dollars_per_hour > 0 and gpu.peak_flops > 1e14 and gpu.memory_gb >= 24
    assert PRICES.is_file()


@pytest.mark.parametrize(
    ("change", "gpus", "mfu", "message"),
    [
        ({}, 3, 0.4, "times the 3 processes"),
        ({}, 0, 0.4, "gpus=0 must be at least 1"),
        ({}, 1, 1.2, "mfu=1.2 must be a share"),
        ({"total_steps": 0, "max_minutes": 5.0}, 1, 0.4, "give train.total_steps or train.target_tokens"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(change, gpus, mfu, message):
    with pytest.raises(ValueError, match=message):
        plan_cost(with_train(Config(train=TrainConfig(batch_size=64)), **change), ROUND, gpus, mfu)


def test_an_unknown_gpu_names_those_that_are_known():
    with pytest.raises(ValueError, match=r"no price of 'k80', only of a100, h100"):
        GPU.named("k80")
