"""Claims about runs in FP8, as a CPU can take them: which machines and models may, and that they learn, save and resume."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from training_runs import assert_same_weights, losses, make_batches, make_config, make_windows, metrics, run

from ping_llm.config import Config, ModelConfig, TrainConfig, config_from_dict, parse_config
from ping_llm.model.checkpoint import load_latest, load_model
from ping_llm.model.gpt import GPT
from ping_llm.training import objective
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective, resolve_precision
from ping_llm.training.trainer import Feed, train

CPU = torch.device("cpu")
WIDE = ModelConfig(n_layer=1, n_embd=128, n_head=2, seq_len=64)


def wide(run_dir: Path = Path("unused"), **train_fields) -> Config:
    return Config(model=WIDE, train=dataclasses.replace(make_config(run_dir).train, **train_fields))


def restless() -> GPT:
    """A model whose every weight matters."""
    model, generator = GPT(WIDE), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture
def with_fp8(monkeypatch):
    """A device that multiplies FP8."""
    monkeypatch.setattr(objective, "native_fp8", lambda _: True)


def test_fp8_is_refused_in_one_line_where_the_device_has_none(tmp_path):
    with pytest.raises(ValueError, match=r"^train.precision=fp8 needs an NVIDIA GPU of capability 8\.9 or more \(.*$"):
        run(wide(tmp_path, precision="fp8"))
    assert not (tmp_path / "config.json").exists()


def test_fp8_on_a_cpu_is_refused_before_rows_are_read(tmp_path):
    feed = Feed(make_batches, lambda config: pytest.fail("read"), lambda config: None)
    with pytest.raises(ValueError, match=r"^train.precision=fp8 needs an NVIDIA GPU"):
        train(wide(tmp_path / "run", precision="fp8"), feed)
    assert not (tmp_path / "run").exists()


def test_auto_is_never_fp8(with_fp8):
    assert resolve_precision("fp8", CPU) == "fp8" and resolve_precision("auto", CPU) in ("bf16", "fp32")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"n_embd": 120},
            r"needs a model.n_embd of at least 128, a multiple of 16, not 120; pass --train.precision bf16",
        ),
        (
            {"n_embd": 200},
            r"needs a model.n_embd of at least 128, a multiple of 16, not 200; pass --train.precision bf16",
        ),
        (
            {"n_embd": 160, "seq_len": 264},
            r"model.seq_len that is a multiple of 16, not 264; pass --train.precision bf16",
        ),
    ],
)
def test_models_whose_products_do_not_fit_fp8_are_refused_in_one_line(tmp_path, model, message):
    with pytest.raises(ValueError, match=rf"^train.precision=fp8 needs a .*{message.removeprefix('needs a ')}$"):
        config_from_dict({"model": model, "train": {"precision": "fp8"}}, "config.toml")
    (tmp_path / "config.toml").write_text("")
    options = [f"--model.{name.replace('_', '-')}={value}" for name, value in model.items()]
    with pytest.raises(ValueError, match=message):
        parse_config([str(tmp_path / "config.toml"), "--train.precision=fp8", *options], "ping-llm train")
    assert Config(model=ModelConfig(n_embd=128, n_head=2), train=TrainConfig(precision="fp8")).train.precision == "fp8"


def test_short_windows_that_do_not_fit_fp8_are_refused_in_one_line():
    fields = {"model": {"n_embd": 160}, "train": {"precision": "fp8"}, "data": {"short_windows": 1}}
    message = (
        r"^train.precision=fp8 needs a data.short_len that is a multiple of 16, not 60; pass --train.precision bf16$"
    )
    with pytest.raises(ValueError, match=message):
        config_from_dict(fields | {"data": {"short_windows": 1, "short_len": 60}}, "config.toml")
    assert config_from_dict(fields, "config.toml").data.short_len == 48
    assert config_from_dict(fields | {"data": {"short_len": 60}}, "config.toml").train.precision == "fp8"


def gradients(precision: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of a step, and the sums of its losses."""
    model = restless()
    sums, _ = Objective(wide(precision=precision), model, Ranks(CPU)).backward(make_windows(8, seed=0))
    return {name: parameter.grad for name, parameter in model.named_parameters()}, sums


def test_gradients_in_fp8_are_near_those_of_bf16_and_reach_every_weight(with_fp8):
    (expected, expected_sums), (ours, sums) = gradients("bf16"), gradients("fp8")
    assert sums.nansum().item() == pytest.approx(expected_sums.nansum().item(), rel=0.02) and not torch.equal(
        sums, expected_sums
    )
    for name in expected:
        assert ours[name].dtype == torch.float32 and ours[name].any(), name
        assert 0 < (ours[name] - expected[name]).norm() < 0.15 * expected[name].norm(), name


def test_only_the_matrices_of_the_blocks_learn_in_fp8(with_fp8):
    model = GPT(WIDE)
    assert not any(getattr(module, "fp8", False) for module in model.modules())
    Objective(wide(precision="fp8"), model, Ranks(CPU))
    found = {name for name, module in model.named_modules() if getattr(module, "fp8", False)}
    assert found == {f"blocks.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}
    Objective(wide(precision="bf16"), model, Ranks(CPU))
    assert not any(getattr(module, "fp8", False) for module in model.modules())


def test_evaluations_of_a_model_that_learns_in_fp8_are_in_bf16(with_fp8):
    model = restless()
    values = [
        Objective(wide(precision=precision), model, Ranks(CPU)).evaluate(make_windows(8, 0))["val_loss"]
        for precision in ("bf16", "fp8")
    ]
    assert values[0] == values[1]


def test_a_run_in_fp8_learns_resumes_to_the_bit_and_keeps_fp32_weights(tmp_path, with_fp8):
    whole, halves = (wide(tmp_path / name, precision="fp8", total_steps=30) for name in ("whole", "halves"))
    run(whole)

    def crash_after_step_20(config, start_step, *given):
        for number, batch in enumerate(make_batches(config, start_step, *given), start_step):
            if number == 20:
                raise RuntimeError("power cut")
            yield batch

    with pytest.raises(RuntimeError, match="power cut"):
        run(halves, crash_after_step_20)
    assert load_latest(halves.train.run_dir).step == 18
    state = run(halves)
    assert state.precision == "fp8" and state.skipped_steps == 0 and state.loss_scale == 1
    assert_same_weights(whole.train.run_dir, halves.train.run_dir)
    assert losses(whole.train.run_dir) == losses(halves.train.run_dir)
    first, last = metrics(whole.train.run_dir)[0], metrics(whole.train.run_dir)[-1]
    assert first["val_loss"] == pytest.approx(math.log(267), abs=0.01) and last["val_loss"] < 2.5
    checkpoint = load_latest(whole.train.run_dir)
    tensors = checkpoint.model | {name: t for name, t in checkpoint.optimizer.items() if not name.startswith("rng")}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    model, config, _ = load_model(whole.train.run_dir)  # as inference does, on a machine without FP8
    assert config.train.precision == "fp8" and not any(getattr(module, "fp8", False) for module in model.modules())


def test_a_compiled_step_in_fp8_is_one_graph_and_equals_the_eager_one(monkeypatch, with_fp8):
    torch._dynamo.reset()
    counters.clear()
    eager, eager_sums = gradients("fp8")
    counter, compiler = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiler(model, backend=counter, **options))
    config = wide(precision="fp8", compile=True)
    model = restless()
    compiled = Objective(config, model, Ranks(CPU))
    for _ in range(2):
        model.zero_grad()
        compiled.evaluate(make_windows(10, 0))
        sums, _ = compiled.backward(make_windows(8, seed=0))
    assert counter.frame_count == 2 and not counters["graph_break"]
    assert any("Product" in str(node.target) or "autograd_function" in str(node.target) for node in nodes(counter))
    assert sums.nansum().item() == pytest.approx(eager_sums.nansum().item(), rel=1e-3)
    for name, parameter in model.named_parameters():
        # A bf16 sum in another order may be rounded to another value of e5m2, a quarter larger.
        assert (parameter.grad - eager[name]).norm() < 0.05 * eager[name].norm(), name


def nodes(counter: CompileCounterWithBackend) -> list[torch.fx.Node]:
    return [node for graph in counter.graphs for node in graph.graph.nodes]
