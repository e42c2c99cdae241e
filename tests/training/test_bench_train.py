"""scripts/bench_train.py runs where there is no GPU, and its numbers agree with each other."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from paths import CONFIGS, SCRIPTS
from torch._dynamo.exc import TorchDynamoException
from waiting import HANG_S

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig, load_config
from ping_llm.data.loader import windows_of
from ping_llm.model.gpt import flops_per_token

sys.path.append(str(SCRIPTS))  # as for the script itself
import profile_training as profiling
import train_variants

SCRIPT = SCRIPTS / "bench_train.py"
CPU = torch.device("cpu")
MODEL = ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=64)
CONFIG = Config(model=MODEL, train=TrainConfig(batch_size=2, precision="fp32"))
ONCE = profiling.Effort(rounds=1, steps=1, blocks=1, saves=1)


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("bench_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_quick_run_without_a_gpu_reports_everything(script, tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, "--quick", "--cases", "tiny", "variants", "--json", tmp_path / "bench.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    (case,) = report["cases"]
    headline = {key: case[key] for key in script.HEADLINE}
    assert json.loads(done.stdout[done.stdout.rindex("{") :]) == headline
    assert {key: report[key] for key in headline} == headline

    assert case["tokens_per_s"] == pytest.approx(4 * 256 / case["step_ms"] * 1e3)
    model = ModelConfig(n_layer=1, n_embd=160, n_head=2, seq_len=256, field_aware=True)
    assert case["mfu"] == pytest.approx(case["tokens_per_s"] * flops_per_token(model) / report["matmul"]["flops"])
    assert 0 < case["mfu"] < 1 and "matrix product" in report["mfu_of"]
    assert 0 < case["optimizer_share"] < 1 and 0 <= case["data_wait_share"] < 1
    assert 0.1 < case["peak_memory_gb"] < 20
    assert case["not_compiled"] or (case["compile_s"] > 0 and case["compiled_to_eager"] > 0)
    assert case["muon_to_torch"] > 0 and case["loader"]["fed_to_synthetic"] > 0 and case["save"]["held_ms"] > 0
    assert report["variants"]["ratios"]["as it is"] == 1
    shares = [kernel["share"] for kernel in case["profile"]["top"]]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1


def test_a_step_that_is_timed_is_a_step_of_the_run():
    training, tokens = profiling.new_training(CONFIG, CPU), profiling.synthetic_tokens(CONFIG, CPU)
    before = {name: weight.clone() for name, weight in training.model.named_parameters()}
    for _ in range(2):  # the first moves only what the zero-initialised matrices let through
        profiling.take_step(training, tokens)
    assert training.state.step == 2 and training.state.tokens == 2 * 2 * 64
    assert all(not torch.equal(weight, before[name]) for name, weight in training.model.named_parameters())
    assert all(weight.grad is None for weight in training.model.parameters())


def test_what_is_compared_takes_turns():
    calls = []
    seconds = profiling.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, 3, calls=2)
    assert calls == ["a", "a", "b", "b"] * 3 and set(seconds) == {"a", "b"}


def test_a_step_that_is_timed_has_the_short_windows_too(script):
    """Two places of 64 tokens and of 3 windows of 48."""
    config = dataclasses.replace(CONFIG, data=DataConfig(short_windows=3))
    tokens = profiling.synthetic_tokens(config, CPU)
    assert [part.shape for part in windows_of(tokens, config.data)] == [(2, 65), (6, 49)]
    training, case = profiling.profile_training(config, CPU, dataclasses.replace(ONCE, saves=0), 1e9)
    assert training.state.tokens % (2 * (64 + 3 * 48)) == 0
    assert case["tokens_per_s"] == pytest.approx(2 * (64 + 3 * 48) / case["step_ms"] * 1e3)


def test_the_largest_batch_is_the_power_of_two_that_the_plan_fits_into_the_memory(monkeypatch):
    """full: 18.6 GB whatever the batch, and 1.44 GB a window of a compiled step."""
    model = load_config(CONFIGS / "full.toml").model
    for memory_gb, windows in ((80, 32), (62, 26), (22, 1)):
        found = SimpleNamespace(total_memory=memory_gb * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=found: found)
        assert profiling.largest_batch(model, CPU) == 1 << (windows.bit_length() - 1)


def test_every_variant_is_a_step_that_learns_the_same(monkeypatch):
    """But for the form of its heads, each has the gradients of the step as it is."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    config, tokens, norms = CONFIG, profiling.synthetic_tokens(CONFIG, CPU), {}
    forms = {"as it is": train_variants.Variant()} | train_variants.variants(config, CPU)
    assert forms.pop("fp8").lacking
    for name, variant in forms.items():
        norms[name] = gradient_norm_of(variant, config, tokens)
    assert norms.pop("heads of 32") != pytest.approx(norms["as it is"], rel=1e-4)
    assert len(norms) == 9 and all(norm == pytest.approx(norms["as it is"], rel=1e-4) for norm in norms.values())


def gradient_norm_of(variant: train_variants.Variant, config: Config, tokens: torch.Tensor) -> float:
    """Of a model whose every weight matters."""
    with variant.replaced():
        training = profiling.new_training(variant.config(config), CPU)
        with torch.no_grad():
            for number, weight in enumerate(training.model.parameters()):
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
        training.objective.backward(tokens)
    return training.gradient_norm()


def test_the_step_in_fp8_learns_nearly_the_same(monkeypatch):
    """On a CPU that is taken for a GPU with FP8."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(train_variants.objective, "native_fp8", lambda _: True)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, n_embd=128))
    config, tokens = profiling.with_train(config, precision="bf16"), profiling.synthetic_tokens(config, CPU)
    fp8 = train_variants.variants(config, CPU)["fp8"]
    assert fp8.lacking is None
    norm, expected = (gradient_norm_of(form, config, tokens) for form in (fp8, train_variants.Variant()))
    assert norm != expected and norm == pytest.approx(expected, rel=0.05)


def test_the_optimizer_is_compiled_on_a_gpu_but_for_the_variant_without(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    monkeypatch.setattr(profiling, "resolve_compile_optimizer", lambda *_: True)  # as there
    without = train_variants.variants(CONFIG, CPU)["without the compiled optimiser"]
    for form, count in ((train_variants.Variant(), 2), (without, 0)):
        with form.replaced():
            profiling.new_training(CONFIG, CPU)
        assert len(compiled) == count
        compiled.clear()


def test_variants_that_this_machine_cannot_take_are_skipped_and_say_why():
    forms = train_variants.variants(load_config(CONFIGS / "small.toml"), CPU)
    lacking = {name: form.lacking for name, form in forms.items() if form.lacking}
    optimizer, choice, flash = "without the compiled optimiser", "attention: torch's choice", "attention: flash"
    assert {lacking.pop(name) for name in (optimizer, choice, flash)} == {"needs a GPU"}
    assert lacking.pop("fp8").startswith("train.precision=fp8 needs an NVIDIA GPU") and not lacking


def test_variants_are_timed_against_the_step_as_it_is(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    found = train_variants.variant_ratios(CONFIG, CPU, ONCE)
    assert found["ratios"]["as it is"] == 1 and len(found["ratios"]) == 11 and found["layers"] == 2
    assert found["skipped"].keys() == {name for name, ratio in found["ratios"].items() if ratio is None}
    assert len(found["skipped"]) == 4 and all(ratio > 0 for ratio in found["ratios"].values() if ratio is not None)


def test_a_machine_without_a_compiler_takes_eager_steps(monkeypatch):
    def forward(tokens):
        raise TorchDynamoException("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", lambda model, **options: forward)
    monkeypatch.setattr(profiling, "top_kernels", lambda *_: {})
    _, report = profiling.profile_training(profiling.with_train(CONFIG, compile=True), CPU, ONCE, matmul_flops=1e15)
    assert report["steps"] == "eager" and report["compiled_to_eager"] is None
    assert report["not_compiled"] == "no compiler" and report["tokens_per_s"] > 0


def test_the_update_is_timed_without_a_trace_in_the_gradients():
    training, tokens = profiling.new_training(CONFIG, CPU), profiling.synthetic_tokens(CONFIG, CPU)
    report = profiling.optimizer_times(training, tokens, step_s=10.0, effort=ONCE)
    assert report["optimizer_share"] == pytest.approx(report["optimizer"]["update_ms"] / 1e4)
    assert report["optimizer"]["muon_ms"] < 5000 and report["optimizer"]["overhead_share"] is None
    assert all(weight.grad is None for weight in training.model.parameters())


def test_steps_beside_a_save_are_counted_until_it_is_written():
    training, tokens = profiling.new_training(CONFIG, CPU), profiling.synthetic_tokens(CONFIG, CPU)
    report = profiling.save_times(training, tokens, ONCE)
    slower = report["steps_beside"] * (report["step_beside_to_alone"] - 1) / profiling.STEPS_BETWEEN_SAVES
    assert report["steps_beside"] >= 1 and report["held_ms"] > 0
    assert report["share"] > slower  # which leaves out what the loop is held


def test_backends_of_attention_that_cannot_run_have_no_ratio():
    ratios = profiling.attention_ratios(CONFIG, CPU, ONCE)
    assert set(ratios) == set(profiling.SDPA_BACKENDS)
    assert ratios["MATH"] > 0 and ratios["CUDNN_ATTENTION"] is None


def test_a_machine_without_a_loader_says_what_is_missing(script, monkeypatch, tmp_path):
    def without_grain(*_):
        raise ModuleNotFoundError(name="grain")

    monkeypatch.setattr(profiling, "profile_loader", without_grain)
    training = profiling.new_training(CONFIG, CPU)
    assert script.fed(training, tmp_path, ONCE) == {"skipped": "no module grain here"}


def test_what_was_not_measured_is_a_dash(script):
    case = {"mfu": 0.4567, "save": {"share": None}, "loader": {"skipped": "no module grain here"}}
    cells = [script.cell(case, *place) for place in (("mfu", "{:.1%}"), ("save.share", "{}"), ("loader.x", "{}"))]
    assert cells == ["45.7%", "–", "–"]
