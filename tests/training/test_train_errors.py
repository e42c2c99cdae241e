"""What a user can get wrong before and while training: one clear line, exit code 1, and nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_row, write_rows
from torch._dynamo.exc import BackendCompilerFailed
from training_runs import ENVIRONMENT, error_lines, finish, start, write_config

from ping_llm import cli
from ping_llm.model.checkpoint import load_latest
from ping_llm.training.objective import Objective

ROWS = [make_row(300, seed=i, probe_id=i) for i in range(3)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), {"train": ROWS, "val": ROWS[:1]}, shards=1)


@pytest.fixture
def error_of(tmp_path, capsys, monkeypatch):
    """The one line that `ping-llm train` ends with, on given rows and with given options."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # else the command sets them for good
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))

    def train(rows: Path, *options, **train_fields) -> str:
        fields = {"total_steps": 4, "checkpoint_every": 2} | train_fields
        config = write_config(tmp_path / "config.toml", rows, **fields)
        assert cli.main(["train", str(config), *map(str, options)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line[len("error: ") :]

    return train


def rows_of(folder: Path, **parts) -> Path:
    folder.mkdir()
    return write_rows(folder, parts, shards=1)


def test_rows_that_cannot_be_trained_on(tmp_path, error_of, rows):
    assert error_of(tmp_path / "none").startswith(f'no rows in {tmp_path / "none"}; run "ping-llm prepare')
    only_val = rows_of(tmp_path / "only-val", val=ROWS[:1])
    assert error_of(only_val).startswith(f'{only_val} holds no "train" rows, only val (300); prepare more measurements')
    only_train = rows_of(tmp_path / "only-train", train=ROWS)
    assert f'{only_train} holds no "val" rows, only train (900)' in error_of(only_train)
    newer = Path(shutil.copytree(rows, tmp_path / "newer"))
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    assert 'is of row format 99, this program reads 1 and 2; run "ping-llm prepare" again' in error_of(newer)
    damaged = Path(shutil.copytree(rows, tmp_path / "damaged"))
    (damaged / "index.parquet").unlink()
    assert 'delete the folder and run "ping-llm prepare" again' in error_of(damaged)


def test_options_that_do_not_fit(error_of, rows):
    assert error_of(rows, batch_size=6, grad_accum=4).endswith(
        "train.batch_size=6 must be a multiple of train.grad_accum=4; pass --train.batch-size 8"
    )
    nothing = {"total_steps": 0, "target_tokens": 0, "max_minutes": 0.0}
    assert "give one of train.total_steps, train.target_tokens and train.max_minutes" in error_of(rows, **nothing)
    assert "device 'tpu' must be auto, cpu or cuda" in error_of(rows, "--train.device", "tpu")


def test_a_process_of_several_that_torchrun_did_not_start(error_of, rows, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = error_of(rows)
    assert line.startswith("the processes of this run did not find each other (") and "with torchrun" in line


def test_a_run_folder_that_cannot_be_written(tmp_path, error_of, rows):
    (tmp_path / "file").write_text("kept")
    line = error_of(rows, "--train.run-dir", tmp_path / "file" / "run")
    assert line.startswith(
        f"the run folder {tmp_path / 'file' / 'run'} cannot be written (Not a directory); pass another"
    )
    assert (tmp_path / "file").read_text() == "kept"


def test_a_run_folder_of_another_run_is_left_as_it_is(tmp_path, error_of, rows, capsys):
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "config.toml", rows, total_steps=4, checkpoint_every=2)
    assert cli.main(["train", str(config)]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    line = error_of(rows, "--model.n-layer", 1, "--optim.muon-lr", 0.5)
    assert line == (
        f"{run_dir} holds a run with another model.n_layer, optim.muon_lr; pass another --train.run-dir, or what it had"
    )
    other = rows_of(tmp_path / "other", train=ROWS[:2], val=ROWS[:1])
    assert f"{run_dir} holds a run with another data.rows; " in error_of(other)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_model_that_cannot_be_compiled_is_one_line(error_of, rows, monkeypatch):
    def compile_first(self, *_):
        raise BackendCompilerFailed("inductor", RuntimeError("no working C++ compiler"), None)

    monkeypatch.setattr(Objective, "evaluate", compile_first)
    error = error_of(rows)
    assert error.startswith("the model cannot be compiled (") and "no working C++ compiler" in error
    assert error.endswith("install a C++ compiler (or set CXX to it), or pass --train.compile False")


def test_an_environment_that_wandb_refuses_is_one_line(tmp_path, rows, monkeypatch):
    """In a process of its own, as a command is: wandb reads its environment once in each."""
    monkeypatch.setitem(ENVIRONMENT, "WANDB_MODE", "sometimes")
    code, _, errors = finish(start(write_config(tmp_path / "config.toml", rows), "--train.wandb", "offline"))
    (line,) = error_lines(errors)
    assert code == 1 and "Weights & Biases did not start (" in line and "sometimes" in line


def test_exhausted_memory_and_hopeless_gradients_keep_the_last_checkpoint(tmp_path, error_of, rows, monkeypatch):
    backward, taken = Objective.backward, []

    def exhausted(self, tokens, *votes, **options):
        taken.append(len(taken))
        if len(taken) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return backward(self, tokens, *votes, **options)

    monkeypatch.setattr(Objective, "backward", exhausted)
    assert error_of(rows) == (
        "out of memory with micro-batches of 8 windows (train.batch_size=8, train.grad_accum=1); "
        "pass --train.grad-accum 2, for micro-batches of 4"
    )
    assert load_latest(tmp_path / "run").step == 2
    one_by_one = error_of(rows, "--train.grad-accum", 8, "--train.run-dir", tmp_path / "other")
    assert one_by_one.endswith("take a smaller model or a shorter model.seq_len")
    beside = ("--data.short-windows", 2, "--train.run-dir", tmp_path / "short")
    assert error_of(rows, "--train.grad-accum", 8, *beside).endswith("model.seq_len, or fewer data.short_windows")

    def hopeless(self, tokens, *votes, **options):
        result = backward(self, tokens, *votes, **options)
        self.model.head.weight.grad.fill_(float("nan"))
        return result

    monkeypatch.setattr(Objective, "backward", hopeless)
    line = error_of(rows, "--train.total-steps", 100, "--train.run-dir", tmp_path / "nan")
    assert line.startswith("the gradients of 20 steps in a row were not finite, up to step 20; ")
    assert all(weight.isfinite().all() for weight in load_latest(tmp_path / "nan").model.values())
