"""Claims about the training loop: what it learns, how it stops, and how it continues."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_runs import (
    MODEL,
    Clock,
    assert_same_weights,
    losses,
    make_batches,
    make_config,
    make_windows,
    metrics,
    run,
)

from ping_llm.config import Config
from ping_llm.model.checkpoint import load_latest
from ping_llm.model.gpt import GPT
from ping_llm.system.hardware import pick_device
from ping_llm.training import trainer
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective


def interrupted_at(step: int, interrupt):
    """`make_batches`, but `interrupt()` is called while the batch of `step` is fetched, the first time."""
    calls = []

    def load_batches(config: Config, start_step: int, device: torch.device, rank: int, world: int):
        for current, batch in enumerate(make_batches(config, start_step, device, rank, world), start_step):
            if current == step and not calls:
                calls.append(interrupt())
            yield batch

    return load_batches


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Config:
    config = make_config(tmp_path_factory.mktemp("uninterrupted"))
    run(config)
    return config


def test_training_lowers_the_loss_of_every_field_it_can_predict(tmp_path):
    config = make_config(tmp_path, total_steps=60, eval_every=60, log_every=20)
    state = run(config)
    lines = metrics(config.train.run_dir)
    assert [line["step"] for line in lines] == [0, 20, 40, 60]
    assert lines[0]["val_loss"] == pytest.approx(math.log(267), abs=0.01)
    assert lines[-1]["val_loss"] < 1 and lines[-1]["val_loss_structure"] < 0.3 and lines[-1]["val_loss_dst"] < 0.3
    assert (state.step, state.samples_consumed, state.tokens) == (60, 480, 60 * 8 * 59)
    assert {"time_s", "loss", "loss_structure", "loss_src", "loss_dst", "loss_time", "loss_rtt", "lr", "grad_norm"} | {
        *("tokens_per_s", "padding", "data_wait_share", "skipped_steps", "val_loss_rtt", "val_rtt_bits")
    } <= lines[-1].keys()
    assert lines[-1]["loss_time"] is None  # no such target in these windows
    assert lines[1]["padding"] == pytest.approx(5 / 64)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_resumed_run_equals_uninterrupted(tmp_path, uninterrupted, number):
    """A signal during step 8: the step is finished, saved, and the run continues from there to the same bits."""
    config = make_config(tmp_path)
    handler = signal.getsignal(number)
    state = run(config, interrupted_at(7, lambda: os.kill(os.getpid(), number)))
    assert state.step == 8 and load_latest(tmp_path).step == 8
    assert signal.getsignal(number) is handler
    resumed = run(config)
    assert (resumed.step, resumed.samples_consumed, resumed.tokens) == (12, 96, 12 * 8 * 59)
    assert resumed.elapsed_s > state.elapsed_s > 0
    assert losses(config.train.run_dir) == losses(uninterrupted.train.run_dir)
    assert_same_weights(config.train.run_dir, uninterrupted.train.run_dir)


def test_a_crash_repeats_the_steps_after_the_last_checkpoint(tmp_path, uninterrupted):
    config = make_config(tmp_path)

    def crash():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(config, interrupted_at(9, crash))
    assert [line["step"] for line in metrics(config.train.run_dir)] == list(range(10)) and load_latest(
        tmp_path
    ).step == 6
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # a line that was being written
    run(config)
    assert losses(config.train.run_dir) == losses(uninterrupted.train.run_dir)
    assert_same_weights(config.train.run_dir, uninterrupted.train.run_dir)


def test_a_damaged_checkpoint_repeats_from_the_one_before(tmp_path, uninterrupted):
    config = make_config(tmp_path)
    run(config)
    with (tmp_path / "checkpoints/step-00000012/model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert run(config).step == 12
    assert losses(config.train.run_dir) == losses(uninterrupted.train.run_dir)
    assert_same_weights(config.train.run_dir, uninterrupted.train.run_dir)


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    before = (uninterrupted.train.run_dir / "metrics.jsonl").read_bytes()
    assert run(uninterrupted).step == 12
    assert (uninterrupted.train.run_dir / "metrics.jsonl").read_bytes() == before


def test_gradient_accumulation_weighs_tokens_not_micro_batches():
    tokens = make_windows(8, seed=0)
    tokens[4:, 20:] = -1  # the last windows hold far fewer targets
    gradients = []
    for grad_accum in (1, 4):
        model = GPT(MODEL, generator=torch.Generator().manual_seed(0))
        config = make_config(Path("unused"), grad_accum=grad_accum)
        Objective(config, model, Ranks(torch.device("cpu"))).backward(tokens)
        gradients.append(model.head.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_evaluation_is_sums_over_counts_of_all_windows():
    config = make_config(Path("unused"), batch_size=4)
    model = GPT(MODEL, generator=torch.Generator().manual_seed(0))
    model.head.weight.data *= 300
    windows = make_windows(10, seed=3)
    windows[8:, 30:] = -1
    values = Objective(config, model, Ranks(torch.device("cpu"))).evaluate(windows)
    with torch.no_grad():
        nats = F.cross_entropy(model(windows[:, :-1]).mT, windows[:, 1:], ignore_index=-1, reduction="none")
    assert values["val_loss"] == pytest.approx((nats.sum() / (windows[:, 1:] >= 0).sum()).item(), rel=1e-5)
    rtt = torch.zeros_like(nats, dtype=torch.bool)
    rtt[:, 8:59:12] = rtt[:, 9:59:12] = True  # bytes 9 and 10 of each measurement, as targets
    rtt |= windows[:, 1:] == 10
    rtt &= windows[:, 1:] >= 0
    results = 8 * 5 + 2 * 2  # the short windows end in their third measurement, before its result
    assert values["val_loss_rtt"] == pytest.approx((nats[rtt].sum() / rtt.sum()).item(), rel=1e-5)
    assert values["val_rtt_bits"] == pytest.approx((nats[rtt].sum() / results / math.log(2)).item(), rel=1e-5)


def poisoned(monkeypatch, steps) -> list[int]:
    """Makes the gradients of some steps, counted from 0, NaN; returns the list of steps taken, which grows."""
    taken, backward = [], Objective.backward

    def spoil(self, tokens, *votes, **options):
        result = backward(self, tokens, *votes, **options)
        if len(taken) in steps:
            self.forward.head.weight.grad[0, 0] = math.nan
        taken.append(len(taken))
        return result

    monkeypatch.setattr(Objective, "backward", spoil)
    return taken


def test_a_step_with_a_nan_gradient_changes_nothing_but_the_counters(tmp_path, monkeypatch):
    config = make_config(tmp_path, total_steps=6, checkpoint_every=1, keep_checkpoints=6)
    poisoned(monkeypatch, {3})
    state = run(config)
    assert state.step == 6 and state.skipped_steps == 1 and state.skipped_in_a_row == 0
    assert metrics(config.train.run_dir)[4]["grad_norm"] is None
    checkpoints = {}
    for step in (5, 4, 3):
        for newer in tmp_path.glob("checkpoints/*"):
            if newer.name > f"step-{step:08d}":
                newer.rename(tmp_path / f"{newer.name}-aside")
        checkpoints[step] = load_latest(tmp_path)
    for part in ("model", "optimizer"):
        before, after, later = (getattr(checkpoints[step], part) for step in (3, 4, 5))
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not all(torch.equal(after[name], later[name]) for name in after)


def test_twenty_nan_steps_in_a_row_end_the_run_and_keep_the_checkpoint(tmp_path, monkeypatch):
    config = make_config(tmp_path, total_steps=100, checkpoint_every=4, eval_every=100)
    taken = poisoned(monkeypatch, range(5, 100))
    with pytest.raises(
        ValueError, match="gradients of 20 steps in a row were not finite, up to step 25; the last"
    ) as end:
        run(config)
    assert "\n" not in str(end.value)
    assert len(taken) == 25
    kept = load_latest(tmp_path)
    assert kept.step == 24 and kept.state["skipped_in_a_row"] == 19
    assert all(value.isfinite().all() for value in kept.model.values())


def test_another_config_in_the_run_folder_is_refused_by_name(uninterrupted):
    other = dataclasses.replace(uninterrupted, model=dataclasses.replace(MODEL, n_layer=3), seed=5)
    with pytest.raises(ValueError, match=r"another model\.n_layer, seed; pass another --train\.run-dir"):
        run(other)


def test_a_time_budget_ends_the_run_with_an_evaluation_and_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "time", Clock())  # a step lasts two looks
    config = make_config(tmp_path, total_steps=10**6, max_minutes=0.5, eval_every=10**6, checkpoint_every=10**6)
    state = run(config)
    assert (state.elapsed_s, state.step) == (30, 16)  # how long a step took is known to all processes with the next
    assert load_latest(tmp_path).step == state.step and metrics(config.train.run_dir)[-1]["val_loss"] == state.val_loss


def test_the_last_rate_is_low_but_not_zero(uninterrupted):
    rates = [line["lr"] for line in metrics(uninterrupted.train.run_dir)[1:]]
    assert 0 < rates[-1] < 0.3 * max(rates) and max(rates) == pytest.approx(0.02)


def test_exhausted_memory_says_what_to_try(tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Objective, "backward", exhausted)
    with pytest.raises(ValueError, match=r"micro-batches of 4 windows .*; pass --train\.grad-accum 4"):
        run(make_config(tmp_path, grad_accum=2))


def test_batches_are_closed_when_the_run_ends(tmp_path):
    closed = []

    def load_batches(*given):
        try:
            yield from make_batches(*given)
        finally:
            closed.append(True)

    run(make_config(tmp_path, total_steps=1), load_batches)
    assert closed == [True]


def test_an_unknown_device_is_one_clear_error():
    with pytest.raises(ValueError, match="device 'tpu' must be auto, cpu or cuda"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device is visible; pass cpu or auto"):
            pick_device("cuda")


def test_a_run_is_not_continued_on_other_rows(tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "manifest.json").write_text('{"inputs": "a"}')
    config = make_config(tmp_path / "run", total_steps=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=rows))
    run(config)
    assert run(config).step == 2
    (rows / "manifest.json").write_text('{"inputs": "b"}')
    with pytest.raises(ValueError, match=r"holds a run with another data\.rows"):
        run(config)


def test_checkpoints_without_their_config_are_not_continued(tmp_path):
    config = make_config(tmp_path, total_steps=2)
    run(config)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints but no config\.json"):
        run(config)


def test_a_resumed_run_keeps_its_wandb_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "")  # is as if it were not set
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    run(make_config(tmp_path / "run", total_steps=1, wandb="offline"))
    run(make_config(tmp_path / "run", total_steps=1, wandb="offline"))
    ids = {path.name.split("-")[3] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "run" / "wandb_id").read_text()}


def test_wandb_without_a_key_suggests_offline(tmp_path, monkeypatch):
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"--train\.wandb offline"):
        run(make_config(tmp_path, wandb="online"))


def test_a_number_of_tokens_ends_the_run_and_stretches_the_schedule(tmp_path):
    config = make_config(tmp_path, total_steps=0, target_tokens=9 * 8 * 59 + 1, eval_every=100)
    state = run(config)
    assert (state.step, state.tokens) == (10, 10 * 8 * 59)  # the step that reaches it is the last
    rates = [line["lr"] for line in metrics(tmp_path)[1:]]
    assert rates[0] == pytest.approx(0.01 * 0.02) and max(rates) == rates[3] == pytest.approx(0.02)
    assert rates[-1] < rates[-2] < rates[-3] < 0.02
    assert "val_loss" in metrics(tmp_path)[-1] and load_latest(tmp_path).step == 10


def test_garbage_is_collected_between_runs_not_in_steps(tmp_path):
    seen = []

    def load_batches(*given):
        for batch in make_batches(*given):
            seen.append(gc.isenabled())
            yield batch

    run(make_config(tmp_path, total_steps=3), load_batches)
    assert seen == [False] * 3 and gc.isenabled() and gc.get_freeze_count() == 0
    with pytest.raises(RuntimeError, match="power cut"):
        run(
            make_config(tmp_path / "other"), interrupted_at(1, lambda: (_ for _ in ()).throw(RuntimeError("power cut")))
        )
    assert gc.isenabled()


def test_a_second_interrupt_ends_at_once(tmp_path):
    def interrupt_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(make_config(tmp_path), interrupted_at(8, interrupt_twice))
    assert load_latest(tmp_path).step == 6
    assert run(make_config(tmp_path)).step == 12


def test_lines_hold_what_was_promised(uninterrupted):
    lines = metrics(uninterrupted.train.run_dir)
    assert [line["step"] for line in lines] == list(range(13))
    always = {"step", "time_s", "tokens", "loss", "lr", "grad_norm", "skipped_steps", "tokens_per_s", "padding"}
    always |= {"data_wait_share", "peak_memory_gb", *(f"loss_{field}" for field in ("structure", "src", "dst", "rtt"))}
    for line in lines[1:]:
        assert always <= line.keys() and "mfu" not in line  # no data sheet gives the peak of a CPU
        assert line["tokens"] == line["step"] * 8 * 59 and line["lr"] > 0 and line["tokens_per_s"] > 0
        assert 0 <= line["data_wait_share"] < 1 and line["grad_norm"] > 0 and 0.01 < line["peak_memory_gb"] < 100
    times_s = [line["time_s"] for line in lines]
    assert times_s == sorted(times_s) and 0 < times_s[-1] < 60
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 6, 12]


def test_a_resumed_run_draws_the_random_numbers_that_an_uninterrupted_one_would(tmp_path):
    def random_batches(config, start_step, *_):
        while True:
            yield make_windows(config.train.batch_size, seed=int(torch.randint(10**6, ())))

    def stopped_in_step_8(config, start_step, *given):
        for step, batch in enumerate(random_batches(config, start_step, *given), start_step):
            if step == 7:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    whole, halves = make_config(tmp_path / "whole"), make_config(tmp_path / "halves")
    run(whole, random_batches)
    assert run(halves, stopped_in_step_8).step == 8
    run(halves, random_batches)
    assert losses(whole.train.run_dir) == losses(halves.train.run_dir)
    assert_same_weights(whole.train.run_dir, halves.train.run_dir)


def test_a_second_trainer_is_kept_out_of_a_run_folder_and_changes_nothing_in_it(tmp_path):
    config = make_config(tmp_path)
    files = [tmp_path / name for name in ("config.json", "machine.json")]

    def second():
        for file in files:
            file.write_text(file.read_text() + "\n\n")  # what only the first trainer can have written
        with pytest.raises(ValueError, match="another process writes to"):
            run(config)

    assert run(config, interrupted_at(3, second)).step == 12
    assert all(file.read_text().endswith("\n\n\n") for file in files)


def test_a_checkpoint_of_a_stopped_step_has_not_the_validation_loss_of_the_step_before(tmp_path):
    """Step 6 is evaluated; step 7, in which the run is stopped, is not."""

    def stopped_in_step_7(config, start_step, *given):
        for step in range(start_step, 100):
            if step == 6:
                signal.raise_signal(signal.SIGTERM)
            yield make_windows(config.train.batch_size, seed=step)

    run(make_config(tmp_path), stopped_in_step_7)
    states = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("checkpoints/*/state.json")}
    assert states["step-00000007"]["val_loss"] is None
    assert states["step-00000006"]["val_loss"] > 0


def test_the_folder_of_a_run_that_saved_nothing_yet_is_not_taken_over(tmp_path):
    run(make_config(tmp_path, total_steps=1))
    shutil.rmtree(tmp_path / "checkpoints")
    metrics_before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"another train\.total_steps"):
        run(make_config(tmp_path, total_steps=2))
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics_before
