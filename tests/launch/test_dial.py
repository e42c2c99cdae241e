"""Claims about the dial: what follows from a depth, by hand, and that explicit options stay."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from paths import CONFIGS

from ping_llm.cli import main
from ping_llm.config import Config, ModelConfig, OptimConfig, TrainConfig, load_config
from ping_llm.launch import dial as dial_module
from ping_llm.launch.dial import Dial, describe, fit_memory, parse_run, scaling_parameters, set_scale, set_shape
from ping_llm.launch.plan import activation_bytes, fixed_bytes
from ping_llm.model.gpt import flops_per_token
from ping_llm.system.hardware import memory_gb

D12 = 12 * 12 * 768**2 + 267 * 768  # 85,139,712 weights of matrices and head
D24 = 12 * 24 * 1536**2 + 267 * 1536  # 679,887,360


def turned(depth: int, **length) -> Config:
    config = Config()
    return set_scale(dataclasses.replace(config, model=set_shape(config.model, depth)), Dial(depth, **length))


def parsed(*argv) -> Config:
    return parse_run([str(word) for word in argv], "ping-llm train")


@pytest.mark.parametrize(
    ("depth", "width", "heads"), [(1, 128, 1), (2, 128, 1), (5, 384, 3), (6, 384, 3), (12, 768, 6), (24, 1536, 12)]
)
def test_width_is_64_for_each_block_in_whole_heads_of_128(depth, width, heads):
    model = set_shape(ModelConfig(), depth)
    assert (model.n_layer, model.n_embd, model.n_head) == (depth, width, heads)


def test_the_reference_is_learned_as_it_was_tuned():
    """12 tokens for each weight, 512 windows of 1,024 tokens in a step, the rates as they are, a decay of 0.28."""
    config = turned(12)
    assert scaling_parameters(config.model) == D12 == 85_139_712
    assert (config.train.target_tokens, config.train.total_steps) == (12 * D12, 0)
    assert (config.train.batch_size, config.train.grad_accum) == (512, 1)
    assert config.optim.weight_decay == pytest.approx(0.28)
    assert dataclasses.replace(config.optim, weight_decay=0.1) == OptimConfig()


def test_twice_as_deep_by_hand():
    """7.986 times the tokens: 2^(19 + 0.383 · 2.9974) = 2^20.148, so 2^20 tokens, rates times √2, and 0.28 · √2 / 7.986."""
    config, optim = turned(24), OptimConfig()
    assert scaling_parameters(config.model) == D24
    assert config.train.target_tokens == 12 * D24 and config.train.batch_size == 1024
    assert config.optim.muon_lr == pytest.approx(0.0282843, rel=1e-5)
    for name in ("adamw_lr", "embedding_lr", "head_lr"):
        assert getattr(config.optim, name) == pytest.approx(2**0.5 * getattr(optim, name))
    assert config.optim.weight_decay == pytest.approx(0.0495878, rel=1e-4)


def test_half_as_deep_by_hand():
    """10,719,360 weights, 0.1259 of the tokens: 2^17.855, so 2^18 tokens; √½ of the rates; 0.28 · √½ / 0.1259."""
    config = turned(6)
    assert config.train.target_tokens == 128_632_320 and config.train.batch_size == 256
    assert config.optim.muon_lr == pytest.approx(0.0141421, rel=1e-5)
    assert config.optim.weight_decay == pytest.approx(1.57256, rel=1e-4)


def test_a_ratio_or_a_number_of_flops_sets_the_length_and_all_that_follows_from_it():
    """Four times the tokens: 2^(19 + 0.766) = 2^19.766, so 2^20; 0.28 · √2 / 4."""
    long, flops = turned(12, ratio=48.0), flops_per_token(turned(12).model)
    assert long.train.target_tokens == 48 * D12 and long.train.batch_size == 1024
    assert long.optim.weight_decay == pytest.approx(0.28 * 2**0.5 / 4)
    assert turned(12, target_flops=48.0 * D12 * flops) == long


def test_the_batch_is_in_windows_of_the_sequence():
    config = Config(model=set_shape(ModelConfig(seq_len=256), 12))
    assert set_scale(config, Dial(12)).train.batch_size == 2048
    # 2^19 / 384 = 1,365.3: 21.3 times 64; rates and decay follow the tokens that are really in a batch
    odd = set_scale(Config(model=set_shape(ModelConfig(seq_len=384), 12)), Dial(12))
    assert odd.train.batch_size == 21 * 64
    assert odd.optim.muon_lr == pytest.approx(0.02 * (21 * 64 * 384 / 2**19) ** 0.5)
    assert [dial_module._whole_windows(windows) for windows in (0.3, 1.4, 5.0, 11.0, 70.0, 100.0)] == [
        1,
        1,
        4,
        8,
        64,
        128,
    ]


def test_without_a_file_the_run_has_a_folder_by_its_depth():
    config = parsed("--depth", 12)
    assert config == dataclasses.replace(
        turned(12), train=dataclasses.replace(turned(12).train, run_dir=Path("runs/d12"))
    )
    assert parsed("--depth=12", "--train.run-dir", "runs/mine").train.run_dir == Path("runs/mine")


def test_the_dial_stands_above_the_file_and_below_the_other_options(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(
        "[model]\nn_layer = 3\nn_embd = 96\nn_head = 3\nseq_len = 512\n[optim]\nmuon_lr = 0.04\n"
        "[train]\nbatch_size = 48\ngrad_accum = 3\ntotal_steps = 7\nmax_minutes = 5.0\nrun_dir = 'here'\n"
    )
    config = parsed(file, "--depth", 12, "--optim.head-lr", 0.1, "--train.max-minutes", 9)
    assert (config.model.n_layer, config.model.n_embd, config.model.seq_len) == (12, 768, 512)
    assert (config.train.batch_size, config.train.grad_accum, config.train.run_dir) == (1024, 1, Path("here"))
    assert (config.train.target_tokens, config.train.total_steps, config.train.max_minutes) == (12 * D12, 0, 9.0)
    assert (config.optim.muon_lr, config.optim.head_lr) == (pytest.approx(0.04), 0.1)  # that of the file is scaled
    assert parsed(file, "--depth", 12).train.max_minutes == 0


def test_an_explicit_number_of_heads_of_keys_stands_above_that_of_the_file(tmp_path):
    """Of the file's 4, the dial's 6 heads are no multiple."""
    file = tmp_path / "config.toml"
    file.write_text("[model]\nn_embd = 512\nn_head = 4\nn_kv_head = 4\n")
    assert parsed(file, "--depth", 12, "--model.n-kv-head", 3).model.kv_heads == 3
    assert parsed(file, "--depth", 12, "--model.n-kv-head", 0).model.kv_heads == 6
    with pytest.raises(ValueError, match=r"model\.n_head=6 must be a multiple of model\.n_kv_head=4"):
        parsed(file, "--depth", 12)


def test_what_follows_follows_from_explicit_options():
    wide = parsed("--depth", 6, "--model.n-embd", 640)
    assert (wide.model.n_layer, wide.model.n_head) == (6, 5)
    assert wide.train.target_tokens == 12 * (12 * 6 * 640**2 + 267 * 640)
    assert parsed("--depth", 6, "--model.n_embd=160").model.n_head == 1
    assert parsed("--depth", 6, "--model.n-head", 6).model.n_head == 6
    small = parsed("--depth", 12, "--train.batch-size", 128)  # 2^17 tokens
    assert small.train.batch_size == 128 and small.train.target_tokens == 12 * D12
    assert (small.optim.muon_lr, small.optim.weight_decay) == (pytest.approx(0.01), pytest.approx(0.14))
    short = parsed("--depth", 12, "--train.total-steps", 100)
    assert (short.train.total_steps, short.train.target_tokens, short.train.batch_size) == (100, 0, 512)
    assert short.optim.weight_decay == pytest.approx(0.28 * 12 * D12 / (100 * 2**19))
    brief = parsed("--depth", 12, "--train.total-steps", 3)
    assert brief.optim.weight_decay * brief.optim.muon_lr == pytest.approx(0.5)  # the rule would ask for 3.6
    assert parsed("--depth", 12, "--train.total-steps", 3, "--optim.muon-lr", 0).optim.weight_decay > 100
    given = parsed("--depth", 12, "--train.target-tokens", 48 * D12)
    assert given.train.target_tokens == 48 * D12 and given.optim == turned(12, ratio=48.0).optim
    kept = parsed("--depth", 24, "--optim.muon-lr", 0.02, "--optim.weight-decay", 0.1, "--train.grad-accum", 512)
    assert (kept.optim.muon_lr, kept.optim.weight_decay, kept.train.grad_accum) == (0.02, 0.1, 512)
    assert kept.optim.embedding_lr == pytest.approx(0.2 * 2**0.5)


def test_the_tokens_of_short_windows_are_of_the_batch_and_of_the_length():
    """Of as many tokens as a window of 1,024 they halve the windows of a step, and nothing else."""
    beside = ("--data.short-windows", 16, "--data.short-len", 64)
    config, alone = parsed("--depth", 12, *beside), parsed("--depth", 12)
    assert (config.train.batch_size, config.train.target_tokens) == (256, 12 * D12)
    assert config.optim == alone.optim and alone.train.batch_size == 512
    by_steps = ("--depth", 12, "--train.total-steps", 300, "--train.batch-size")
    assert parsed(*by_steps, 256, *beside).optim == parsed(*by_steps, 512).optim
    saved = 12 * 12 * 768 * (1024 - 64) / 2  # FLOPs of a token on average: those of short windows attend to 64
    flops = flops_per_token(config.model) - saved
    assert parsed("--depth", 12, "--target-flops", 12 * D12 * flops, *beside).train == config.train
    lines = describe(parsed(*by_steps, 256, *beside))
    assert lines[1].endswith(f"{300 * 2**19 * flops:.2e} FLOPs")
    assert lines[1].split()[:2] == ["length", f"{300 * 2**19:,}"]
    assert lines[2].endswith("256   windows of 1024 tokens, and 16 of 64 beside each: 524,288 tokens")


def test_the_reference_is_the_plain_model_of_depth_12():
    """Its 6 heads could not share the 4 of keys. With 4 heads of keys for 8: 11 · 16 · 1024² weights of matrices."""
    config = set_scale(Config(model=set_shape(ModelConfig(n_embd=512, n_head=4, n_kv_head=4), 16)), Dial(16))
    weights = 11 * 16 * 1024**2 + 267 * 1024
    assert config.train.target_tokens == 12 * weights
    batch = config.train.batch_size * 1024
    assert config.optim.weight_decay == pytest.approx(0.28 * (batch / 2**19) ** 0.5 * D12 / weights)


def test_a_run_of_next_to_nothing_has_a_length():
    assert turned(1, target_flops=1.0).train.target_tokens == 1


def test_without_the_dial_nothing_is_set():
    assert parsed(CONFIGS / "small.toml", "--optim.muon-lr", 0.01) == dataclasses.replace(
        load_config(CONFIGS / "small.toml"), optim=OptimConfig(muon_lr=0.01)
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--depth", "0"], "--depth 0 must be at least 1"),
        (["--depth", "deep"], "--depth invalid int value: 'deep'"),
        (["--depth"], "--depth expected one argument"),
        (["--depth", "2", "--ratio", "-1"], "--ratio -1.0 must be above 0 and finite"),
        (["--depth", "2", "--target-flops", "inf"], "--target-flops inf must be above 0 and finite"),
        (
            ["--depth", "2", "--ratio", "3", "--target-flops", "1e9"],
            "--ratio and --target-flops both say how long the run",
        ),
        (
            ["--depth", "2", "--ratio", "3", "--train.total-steps", "9"],
            "--ratio and --train.total-steps both say how long",
        ),
        (
            ["--depth", "2", "--train.target-tokens", "8", "--train.total-steps", "9"],
            "--train.target-tokens and --train.total-steps both say how long the run is; give one of them",
        ),
        (["--ratio", "3"], "--ratio goes with --depth"),
        (["configs/tiny.toml", "--target-flops", "1e18"], "--target-flops goes with --depth"),
        (
            ["--depth", "2", "--model.n-embd", "100", "--model.n-head", "3"],
            "model.n_embd=100 must be a multiple of model.n_h",
        ),
        (
            ["--depth", "2", "--train.grad-accum", "7"],
            "must be a multiple of train.grad_accum=7; pass --train.batch-size",
        ),
    ],
)
def test_a_dial_that_cannot_be_set_is_one_clear_line(capsys, argv, message):
    assert main(["train", *argv]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_plan_of_a_depth_says_what_is_set_and_what_it_takes(capsys):
    assert main(["plan", "--depth", "24", "--gpus", "2", "--gpu", "l4"]) == 0
    out = capsys.readouterr().out
    for said in (
        "24 blocks, 1536 wide, 12 heads of 128",
        "8,158,648,320",
        "679,887,360",
        "1,048,576 tokens",
        "0.02828",
    ):
        assert said in out
    assert "0.04959" in out and "hours" in out and "dollars" in out and out.rstrip().endswith("the batch fits")
    assert main(["plan", str(CONFIGS / "small.toml"), "--depth", "6", "--grad-accum", "256"]) == 0
    out = capsys.readouterr().out
    assert "6 blocks" in out and "a micro-batch of 1, compiled" in out
    assert "the batch fits, and so it would with --train.grad-accum 1" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "ping-llm plan needs a config file as its first argument, for example configs/tiny.toml, or --depth N"),
        (["--ratio", "3"], "--ratio goes with --depth"),
        (["--depth", "6", "--gpus", "3"], "train.batch_size=256 must be a multiple"),
        (["--depth", "6", "--grad-accum", "-2"], "--grad-accum -2 must be at least 1"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_clear_line(capsys, argv, message):
    assert main(["plan", *argv]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_training_takes_as_few_micro_batches_as_the_memory_asks_for(monkeypatch):
    """A machine whose half holds all that does not depend on the batch, and 20 windows in fp32, eagerly: of 64, 16."""
    config = Config(model=ModelConfig(n_layer=2, n_embd=128, n_head=1), train=TrainConfig(batch_size=64, device="cpu"))
    room = 20.5 * 2 * activation_bytes(config.model, compiled=False)
    monkeypatch.setattr(dial_module, "memory_gb", lambda _: 2 * (fixed_bytes(config.model) + room) / 1e9)
    assert fit_memory(config).train.grad_accum == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fit_memory(config).train.grad_accum == 4  # half of the windows, and half of the memory
    monkeypatch.setattr(dial_module, "memory_gb", lambda _: 0.0)
    assert fit_memory(config).train.grad_accum == 32  # it may fail; smaller pieces there are not


def test_micro_batches_are_fitted_for_training_only_and_unless_they_are_given(monkeypatch):
    monkeypatch.setattr(dial_module, "memory_gb", lambda _: 0.0)
    argv = ["--depth", "2", "--train.device", "cpu"]
    assert parsed(*argv).train.grad_accum == 1
    fitted = parse_run(argv, "ping-llm train", on_this_machine=True)
    assert fitted.train.grad_accum == fitted.train.batch_size
    assert parse_run([*argv, "--train.grad-accum", "2"], "ping-llm train", on_this_machine=True).train.grad_accum == 2


def test_the_memory_of_this_machine_is_known():
    assert 0.5 < memory_gb(torch.device("cpu")) < 1e5
