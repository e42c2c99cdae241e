"""Claims about averaged weights: what they are by hand, what they are used for, and that a run goes on from them."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from training_runs import (
    MODEL,
    assert_same_weights,
    finish,
    losses,
    make_batches,
    make_config,
    make_windows,
    metrics,
    run,
    start,
    val_windows,
    write_config,
)

from ping_llm.config import config_from_dict
from ping_llm.model.checkpoint import load_latest, load_model
from ping_llm.model.gpt import GPT
from ping_llm.training import trainer
from ping_llm.training.averaging import WeightAverage, load_trained
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective
from ping_llm.training.optimizer import Optimizer

CPU = torch.device("cpu")


def averages(values: list[float], **kind: float) -> list[float]:
    """The average after each step of a model of one weight, which has these values."""
    model, found = nn.Linear(1, 1, bias=False), []
    average = WeightAverage(model, **kind)
    for step, value in enumerate(values, 1):
        nn.init.constant_(model.weight, value)
        average.update(step, step / len(values))
        found.append(average.weights["weight"].item())
    return found


def test_averages_by_hand():
    """The way to the weights is 1, 1/2, 1/3, 1/4 for a share of 1, and 1, 1, 2/3, 1/2 for a half."""
    values = [10.0, 20.0, 30.0, 40.0]
    assert averages(values, share=1.0) == pytest.approx([10, 15, 20, 25])  # plain means
    assert averages(values, share=0.5) == pytest.approx([10, 20, 80 / 3, 100 / 3])
    assert averages(values, share=0.25) == [10, 20, 30, 40]  # the latest quarter of up to 4 steps is one step


def test_an_exponential_average_by_hand():
    """The way is 1, 1/2, and then 0.4: what is kept is 0.6, and less as long as there are fewer than 2.5 steps."""
    assert averages([10.0, 20.0, 30.0, 40.0], ema=0.6) == pytest.approx([10, 15, 21, 28.6])
    assert averages([10.0, 20.0, 30.0], ema=1.0) == pytest.approx([10, 15, 20])


def test_the_average_of_a_tail_by_hand():
    """Half of six steps: the first three are themselves, of the others it is the plain mean."""
    values = [10.0, 20.0, 30.0, 40.0, 60.0, 110.0]
    assert averages(values, tail=0.5) == pytest.approx([10, 20, 30, 40, 50, 70])
    assert averages(values, tail=1.0)[-1] == pytest.approx(45)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 1.0), st.integers(200, 600))
def test_the_mean_age_of_the_weights_is_about_the_share_of_the_steps(share, steps):
    """Weights that are the number of their step: the average is the mean number."""
    mean_age = 1 - averages([float(step) for step in range(1, steps + 1)], share=share)[-1] / steps
    assert mean_age == pytest.approx(share / (1 + share), abs=2 / steps)


def model_of(seed: int) -> GPT:
    return GPT(MODEL, generator=torch.Generator().manual_seed(seed))


def test_the_model_has_the_average_for_a_while_in_its_own_memory_and_then_its_weights_to_the_bit():
    model = model_of(0)
    average = WeightAverage(model, 1.0)
    model.load_state_dict(model_of(1).state_dict())
    before, where = model.state_dict(), [parameter.data_ptr() for parameter in model.parameters()]
    before = {name: weight.clone() for name, weight in before.items()}
    with pytest.raises(KeyError), average.in_use():
        assert all(map(torch.equal, model.state_dict().values(), model_of(0).state_dict().values()))
        assert [parameter.data_ptr() for parameter in model.parameters()] == where
        raise KeyError  # an evaluation that fails
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_compiled_evaluation_is_of_the_average(monkeypatch, tmp_path):
    torch._dynamo.reset()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiler(model, backend="aot_eager", **options))
    model, windows = model_of(0), make_windows(8, seed=0)
    average = WeightAverage(model, 1.0)
    with torch.no_grad():
        average.weights["head.weight"].normal_(generator=torch.Generator().manual_seed(0))
    compiled = Objective(make_config(tmp_path, compile=True), model, Ranks(CPU))
    before = compiled.evaluate(windows)
    with average.in_use():
        found = compiled.evaluate(windows)
    model.load_state_dict(average.weights)
    eager = Objective(make_config(tmp_path), model, Ranks(CPU))
    assert found == pytest.approx(eager.evaluate(windows), rel=1e-5, nan_ok=True)
    assert abs(found["val_loss"] - before["val_loss"]) > 0.1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a plain run and of one that averages, and the weights of the latter after each step."""
    plain, averaged = (make_config(tmp_path_factory.mktemp(name), **more) for name, more in VARIANTS.items())
    run(plain)
    seen, step = [], Optimizer.step

    def watched(self, *given):
        step(self, *given)
        seen.append([parameter.detach().clone() for group in self.adamw.param_groups for parameter in group["params"]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", watched)
        run(averaged)
    return plain.train.run_dir, averaged.train.run_dir, seen


VARIANTS = {"plain": {}, "averaged": {"average": 0.5}}
KINDS = {"ema": {"average_ema": 0.7}, "tail": {"average_tail": 0.6}}


def test_averaging_changes_nothing_of_what_is_learned(runs):
    plain, averaged, _ = runs
    for ours, theirs in zip(losses(averaged), losses(plain), strict=True):
        assert {k: v for k, v in ours.items() if "val" not in k} == {k: v for k, v in theirs.items() if "val" not in k}
    first, second = load_latest(plain), load_latest(averaged)
    assert all(torch.equal(second.optimizer[f"trained.{name}"], weight) for name, weight in first.model.items())
    assert all(torch.equal(second.optimizer[name], tensor) for name, tensor in first.optimizer.items())
    assert second.optimizer.keys() == first.optimizer.keys() | {f"trained.{name}" for name in first.model}


def test_the_checkpoint_answers_with_the_average_and_its_validation_loss_is_of_that(runs):
    """Of a share of a half, step i of t counts 2 (i − 1) / (t (t − 1)) once t is 2 or more."""
    _, folder, seen = runs
    for step in (6, 12):
        file = folder / f"checkpoints/step-{step:08d}/model.safetensors"
        counts = torch.arange(step) * 2 / (step * (step - 1))
        for place, name in enumerate(("embedding.weight", "head.weight")):
            expected = sum(count * weights[place] for count, weights in zip(counts, seen[:step], strict=True))
            torch.testing.assert_close(load_file(file)[name], expected, rtol=1e-4, atol=1e-6)
    model, config, state = load_model(folder)
    assert state["step"] == 12 and state["val_loss"] == metrics(folder)[-1]["val_loss"]
    values = Objective(config, model, Ranks(CPU)).evaluate(val_windows(config))
    assert values["val_loss"] == pytest.approx(state["val_loss"], rel=1e-6)


def test_what_is_logged_of_the_weights_that_are_trained_is_what_a_plain_run_logs(runs):
    plain, averaged, _ = runs
    logged = [line["val_trained_loss"] for line in metrics(averaged) if "val_loss" in line]
    assert logged == [line["val_loss"] for line in metrics(plain) if "val_loss" in line]
    assert not any("val_trained_loss" in line for line in metrics(plain))


def test_either_weights_can_be_loaded(runs):
    plain, averaged, _ = runs
    expected = load_latest(plain).model
    for path in (averaged, averaged / "checkpoints/step-00000012"):
        model, config, state = load_trained(path)
        assert state["step"] == 12 and config.train.average == 0.5
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert not torch.equal(load_model(averaged)[0].head.weight, expected["head.weight"])
    with pytest.raises(ValueError, match="averages no weights; load its model as it is"):
        load_trained(plain)


def test_trained_weights_are_loaded_beside_a_dictionary_that_is_no_weight(tmp_path):
    config = make_config(tmp_path, total_steps=2, average=1.0)
    run(dataclasses.replace(config, model=dataclasses.replace(config.model, lookup_rows=300)))
    (trained, *_), (averaged, *_) = load_trained(tmp_path), load_model(tmp_path)
    assert torch.equal(trained.codewords.edges, averaged.codewords.edges)
    assert not torch.equal(trained.head.weight, averaged.head.weight)


def test_damaged_trained_weights_are_not_loaded(tmp_path):
    run(make_config(tmp_path, total_steps=1, average=0.5))
    with (tmp_path / "checkpoints/step-00000001/optimizer.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"00000000")
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is damaged; restore it or load the averaged weights"):
        load_trained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_averages_are_of_the_weights_of_their_steps(runs, tmp_path, kind):
    """Of the tail of 0.6, steps 5 to 12 count alike. An ema of 0.7 is a plain mean of three steps, then keeps 0.7."""
    run(make_config(tmp_path, **KINDS[kind]))
    heads, expected = [weights[1] for weights in runs[2]], None
    for step, head in enumerate(heads, 1):
        way = max(0.3, 1 / step) if kind == "ema" else 1 / max(1, step - 4)
        expected = head if expected is None else expected + way * (head - expected)
    torch.testing.assert_close(load_latest(tmp_path).model["head.weight"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "both", [("average", "average_ema"), ("average", "average_tail"), ("average_ema", "average_tail")]
)
def test_two_averages_are_refused_in_one_line(both):
    message = rf"^train\.{both[0]}=0\.5 and train\.{both[1]}=0\.5 are averages of the same weights; leave one$"
    with pytest.raises(ValueError, match=message):
        config_from_dict({"train": dict.fromkeys(both, 0.5)}, "config.toml")


def stopped_in_step_8(config, start_step, *given):
    for step, batch in enumerate(make_batches(config, start_step, *given), start_step):
        if step == 7:
            signal.raise_signal(signal.SIGTERM)
        yield batch


def test_a_run_that_averages_resumes_to_the_bit(runs, tmp_path):
    config = make_config(tmp_path, **VARIANTS["averaged"])
    assert run(config, stopped_in_step_8).step == 8
    assert run(config).step == 12
    assert losses(tmp_path) == losses(runs[1])
    assert_same_weights(tmp_path, runs[1])


def test_samples_are_of_the_average(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        trainer, "describe", lambda model, *_, **__: seen.append(model.head.weight.detach().clone()) or ""
    )
    run(make_config(tmp_path, sample_every=12, **VARIANTS["averaged"]))
    assert len(seen) == 1 and torch.equal(seen[0], load_latest(tmp_path).model["head.weight"])


def test_a_run_is_not_continued_with_another_average(runs):
    with pytest.raises(ValueError, match=r"another train\.average"):
        run(make_config(runs[0], average=0.1))


@pytest.mark.slow
def test_processes_evaluate_the_same_average(rows_folder, tmp_path):
    lines = []
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        config = write_config(tmp_path / str(world) / "config.toml", rows_folder, average=0.5)
        code, _, errors = finish(start(config, world=world))
        assert code == 0, errors
        lines.append(metrics(config.parent / "run")[-1])
    assert lines[1]["val_loss"] == pytest.approx(lines[0]["val_loss"], rel=1e-4)
