"""Claims about several processes that train one model: real ones, over gloo on the loopback interface."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from training_runs import (
    MODEL,
    error_lines,
    finish,
    gang,
    last_step,
    losses,
    make_config,
    make_windows,
    metrics,
    start,
    wait_until,
    write_config,
)

from ping_llm.config import Config, DataConfig, LossConfig, load_config
from ping_llm.model.checkpoint import load_latest
from ping_llm.model.gpt import GPT
from ping_llm.training.distributed import processes
from ping_llm.training.muon import Matrix, Muon
from ping_llm.training.objective import Objective
from ping_llm.training.trainer import train
from ping_llm.training.validation import ValQueries

SHAPES = [(48, 48), (96, 48), (48, 96), (48, 48), (96, 48)]  # two, two and one: no number of processes divides them all
LOSS = LossConfig(rtt=3.0, smoothing=3.0)  # every cost of training
TOLERANCE = 1e-4  # of a loss, relative: sums are taken in another order, and bf16 inside Muon enlarges the difference


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other, beside other processes, would make all of them slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outspoken_model() -> GPT:
    """A model in which every weight has a gradient."""
    model, generator = GPT(MODEL), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def muon_steps() -> list[torch.Tensor]:
    """The matrices after three steps of Muon, shared by the processes of the environment."""
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    with processes("cpu") as ranks:
        muon = Muon({str(i): Matrix(matrix) for i, matrix in enumerate(matrices)}, initial_lr=0.02, ranks=ranks)
        muon.dtype = torch.float32
        for _ in range(3):
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=generator)
            muon.step(momentum=0.9, weight_decay=0.1)
    return [matrix.detach() for matrix in matrices]


def objective_answers(rows: Path) -> list[tuple]:
    """(sums, totals, gradients, exchanges of gradients) for 1 and 2 micro-batches and with short windows beside, then two
    evaluations."""
    answers, tokens = [], make_windows(12, seed=0)
    beside = torch.cat([tokens, make_windows(24, seed=2)[:, :47].reshape(12, -1)], dim=1)
    short = DataConfig(short_windows=2, short_len=46)
    tokens[5:, 20:] = -1  # later windows hold fewer targets
    with processes("cpu") as ranks:
        for grad_accum, data, lines in ((1, DataConfig(), tokens), (2, DataConfig(), tokens), (2, short, beside)):
            model, exchanges = outspoken_model(), []
            config = make_config(Path("unused"), batch_size=12, grad_accum=grad_accum)
            objective = Objective(dataclasses.replace(config, loss=LOSS, data=data), model, ranks)
            if objective.parallel is not None:
                objective.parallel.register_comm_hook(exchanges, counting_exchange)
            sums, totals = objective.backward(lines[ranks.rank :: ranks.world], float(ranks.rank + 1))
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            answers.append((ranks.sum(sums.double()), totals, gradients, len(exchanges)))
        val = make_windows(10, seed=1)  # shared unevenly
        val[7:, 30:] = -1
        config = Config(model=MODEL, data=DataConfig(rows=rows), train=make_config(Path("unused")).train)
        queries = ValQueries.load(config)
        answers.append(
            (objective.evaluate(val), {"error": queries.median_rel_error(objective, ranks)}, len(queries.queries))
        )
    return answers


def counting_exchange(exchanges, bucket):
    exchanges.append(bucket.index())
    tensor = bucket.buffer().div_(torch.distributed.get_world_size())
    return torch.distributed.all_reduce(tensor, async_op=True).get_future().then(lambda future: future.value()[0])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_muon_shared_by_processes_takes_the_same_steps(world):
    expected = muon_steps()
    for matrices in gang(world, muon_steps):
        for ours, alone in zip(matrices, expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_and_evaluations_do_not_depend_on_the_number_of_processes(rows_folder, world):
    alone = objective_answers(rows_folder)
    for rank, together in enumerate(gang(world, objective_answers, rows_folder)):
        for (sums, totals, gradients, _), (our_sums, our_totals, ours, exchanges) in zip(
            alone[:3], together[:3], strict=True
        ):
            assert exchanges == 1, rank  # however many micro-batches: those before the last are not sent
            torch.testing.assert_close(our_sums, sums, rtol=1e-5, atol=1e-8)
            assert torch.equal(our_totals[:-1], totals[:-1])  # counts of targets
            assert our_totals[-1] == sum(range(1, world + 1))  # the votes of all
            for name in gradients:
                assert (ours[name] - gradients[name]).norm() < 1e-5 * gradients[name].norm(), name
        (values, error, count), (our_values, our_error, our_count) = alone[3], together[3]
        assert our_values == pytest.approx(values, rel=1e-5, nan_ok=True) and our_count == count
        assert our_error == pytest.approx(error, rel=1e-4)


# The rest is about whole runs of `ping-llm train`, of 12 steps on the same rows.


@pytest.fixture(scope="module")
def alone(one_thread, rows_folder, tmp_path_factory) -> list[dict]:
    """What one process logs."""
    config = write_config(tmp_path_factory.mktemp("alone") / "config.toml", rows_folder)
    train(load_config(config))
    return losses(config.parent / "run")


def assert_same_course(lines: list[dict], expected: list[dict]) -> None:
    """Same steps, each once; the same windows in the same order; the same losses but for rounding."""
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected]
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "loss_structure", "loss_src", "loss_rtt", "val_loss", "val_loss_rtt", "padding", "lr"):
            if theirs.get(name) is not None:  # not every batch has a target of each field
                assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), (name, ours["step"])
    assert len({line["tokens"] for line in lines}) == len(lines)


@pytest.mark.slow
def test_two_processes_with_micro_batches_train_as_one_does(alone, rows_folder, tmp_path):
    config = write_config(tmp_path / "config.toml", rows_folder)
    code, out, errors = finish(start(config, "--train.grad-accum", 2, world=2))
    assert code == 0, errors
    assert_same_course(losses(tmp_path / "run"), alone)
    assert out.count("starts: ") == 1 and "2 processes" in out and out.count("report: ") == 1


@pytest.mark.slow
def test_four_processes_continue_the_run_of_one(alone, rows_folder, tmp_path):
    config = write_config(tmp_path / "config.toml", rows_folder)
    stopped_after(load_config(config), 5)
    code, out, errors = finish(start(config, world=4))
    assert code == 0 and "continues after step 5: " in out, errors
    assert_same_course(losses(tmp_path / "run"), alone)


def stopped_after(config: Config, step: int) -> None:
    """Trains in this process, and is stopped in the step before: processes signal each other when a step begins."""
    backward, taken, first = Objective.backward, itertools.count(1), load_latest(config.train.run_dir)
    before = step - 1 - (first.step if first else 0)

    def stop(self, *args, **options):
        if next(taken) == before:
            signal.raise_signal(signal.SIGTERM)
        return backward(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "backward", stop)
        assert train(config).step == step


def workers_of(torchrun: int) -> dict[int, int]:
    """Process ids of the processes that torchrun has started, by rank."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == torchrun:
                pairs = (pair.partition("=") for pair in (stat.parent / "environ").read_text().split("\0"))
                variables = {name: value for name, _, value in pairs}
                found[int(variables["RANK"])] = int(stat.parent.name)
        except (OSError, KeyError):  # ended meanwhile, or not yet a worker
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes by /proc")
def test_a_killed_process_ends_the_run_which_continues_and_stops_in_all_after_the_same_step(rows_folder, tmp_path):
    """One run of two processes: a kill, the same command, SIGTERM, and one process to the end; as if nothing had been."""
    limits = {"total_steps": 400, "checkpoint_every": 5, "eval_every": 400}
    config, run_dir = write_config(tmp_path / "config.toml", rows_folder, **limits), tmp_path / "run"
    process = start(config, world=2)
    try:
        wait_until(lambda: last_step(run_dir) >= 12, process)
        os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    finally:
        code, _, errors = finish(process)
    assert code != 0
    (line,) = error_lines(errors)
    assert "process 0 of 2 stops, because another one of this run ended" in line, errors
    kept = load_latest(run_dir).step
    assert kept >= 5 and kept % 5 == 0

    process = start(config, world=2)
    try:
        wait_until(lambda: last_step(run_dir) >= kept + 20, process)
        process.terminate()
    finally:
        code, out, errors = finish(process)
    assert f"continues after step {kept}: " in out, errors
    stopped = load_latest(run_dir).step
    assert f"stopped after step {stopped}; " in out and stopped == last_step(run_dir) < 400
    assert not error_lines(errors)

    alone = write_config(tmp_path / "alone.toml", rows_folder, **limits, run_dir=str(tmp_path / "alone"))
    stopped_after(load_config(alone), stopped + 3)
    stopped_after(load_config(config), stopped + 3)
    ours, theirs = metrics(run_dir), metrics(tmp_path / "alone")
    assert [line["step"] for line in ours] == list(range(stopped + 4))
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    assert [line["loss"] for line in ours[1:]] == pytest.approx([line["loss"] for line in theirs[1:]], rel=0.02)


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_one_clear_line(rows_folder, tmp_path):
    config = write_config(tmp_path / "config.toml", rows_folder, batch_size=7)
    code, _, errors = finish(start(config, world=2))
    assert code != 0
    expected = "error: train.batch_size=7 must be a multiple of train.grad_accum=1 times the 2 processes; "
    assert error_lines(errors) == [expected + "pass --train.batch-size 8"]
    assert not (tmp_path / "run").exists()
