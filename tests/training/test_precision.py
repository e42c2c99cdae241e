"""Claims about number formats and compilation: they change how fast a model learns, not what."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import MODEL, Clock, losses, make_config, make_windows, metrics, run

from ping_llm.model.checkpoint import load_latest
from ping_llm.model.gpt import GPT
from ping_llm.training import run_state, trainer
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective
from ping_llm.training.run_state import FIRST_LOSS_SCALE, LOSS_SCALE_STEPS, RunState

CPU = torch.device("cpu")


def gradients(precision: str, loss_scale: float) -> dict[str, torch.Tensor]:
    """Of a model whose every weight matters, after `loss_scale` is divided out."""
    model, generator = GPT(MODEL), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    objective = Objective(make_config(Path("unused"), precision=precision), model, Ranks(CPU))
    objective.backward(make_windows(8, seed=0), loss_scale=loss_scale)
    return {name: parameter.grad / loss_scale for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_gradients_in_low_precision_are_near_those_of_fp32(precision, tolerance):
    expected = gradients("fp32", 1.0)
    ours = gradients(precision, FIRST_LOSS_SCALE if precision == "fp16" else 1.0)
    for name in expected:
        assert (ours[name] - expected[name]).norm() < tolerance * expected[name].norm(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_lowers_the_loss(tmp_path, precision):
    state = run(make_config(tmp_path, precision=precision, total_steps=30, eval_every=30, log_every=30))
    first, last = metrics(tmp_path)
    assert first["val_loss"] == pytest.approx(math.log(267), abs=0.01) and last["val_loss"] < 2.5
    assert state.skipped_steps == 0 and all(
        weight.dtype == torch.float32 for weight in load_latest(tmp_path).model.values()
    )


def test_the_loss_scale_halves_after_an_overflow_and_doubles_after_many_steps_without():
    config, state = make_config(Path("unused")), RunState.new("", "fp16")
    assert state.loss_scale == 2**15 and RunState.new("", "bf16").loss_scale == 1

    def step(overflow: bool) -> float:
        state.count(config, 1, 0.0, skipped=overflow)
        state.adapt_loss_scale()
        return state.loss_scale

    assert [step(True), step(True), step(False)] == [2**14, 2**13, 2**13]
    assert {step(False) for _ in range(LOSS_SCALE_STEPS - 2)} == {2**13}
    assert step(False) == 2**14
    assert step(True) == 2**13
    assert {step(False) for _ in range(LOSS_SCALE_STEPS - 1)} == {2**13} and step(False) == 2**14
    for _ in range(40):
        step(True)
    assert state.loss_scale == 1


def test_a_run_in_fp16_finds_its_loss_scale_and_keeps_it_when_it_continues(tmp_path, monkeypatch):
    """With a scale that overflows, the first steps are skipped, each with half of it; then it learns."""
    monkeypatch.setattr(run_state, "FIRST_LOSS_SCALE", 2.0**30)
    config = make_config(tmp_path, precision="fp16", total_steps=40, eval_every=40, checkpoint_every=40)
    state = run(config)
    assert 1 <= state.skipped_steps < 20 and state.loss_scale == 2.0 ** (30 - state.skipped_steps)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines[1:] if line["grad_norm"] is None] == list(range(1, state.skipped_steps + 1))
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 1
    assert load_latest(tmp_path).state["loss_scale"] == state.loss_scale == run(config).loss_scale


def test_the_minutes_of_a_run_do_not_count_the_step_that_compiles(tmp_path, monkeypatch):
    """Else the rates of a short run would never rise."""

    def compiled(model, **_):
        def forward(tokens):
            if torch.is_grad_enabled() and not calls:
                clock.now += 1000
                calls.append("compiled")
            return model(tokens)

        calls = []
        return forward

    clock = Clock()
    monkeypatch.setattr(trainer, "time", clock)
    monkeypatch.setattr(torch, "compile", compiled)
    state = run(make_config(tmp_path, compile=True, total_steps=3))
    assert clock.now > 1000 and metrics(tmp_path)[-1]["time_s"] == 4  # two steps of two looks each
    assert state.elapsed_s == 2  # how long a step took is known to all processes with the next


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="torch.compile needs a C++ compiler"
)
def test_a_compiled_model_trains_as_an_eager_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    courses = []
    for compiled in (False, True):
        config = make_config(tmp_path / str(compiled), total_steps=3, eval_every=3, eval_windows=10, compile=compiled)
        config = dataclasses.replace(config, model=dataclasses.replace(MODEL, n_layer=1))
        run(config)
        courses.append(losses(config.train.run_dir))
    for eager, compiled in zip(*courses, strict=True):
        assert compiled.keys() - {"padding"} == eager.keys() - {"padding"}  # the step that compiles has no rates
        for name in {"loss", "loss_rtt", "val_loss", "grad_norm"} & eager.keys():
            assert compiled[name] == pytest.approx(eager[name], rel=1e-3), name
    assert list((tmp_path / "compiled").rglob("*.so"))  # it was compiled indeed
