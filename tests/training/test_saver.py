"""Claims about checkpoints that a thread writes while training goes on."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from waiting import HANG_S

from ping_llm.model import checkpoint
from ping_llm.model.checkpoint import load_latest
from ping_llm.training.saver import Saver


def steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture
def slow_writes(monkeypatch):
    """Holds every write of a checkpoint up until the event is set, and counts how many are under way at once."""
    go, under_way, save = threading.Event(), [0, 0], checkpoint.save

    def write(*arguments):
        under_way[0] += 1
        under_way[1] = max(under_way)
        assert go.wait(HANG_S)
        time.sleep(0.01)
        folder = save(*arguments)
        under_way[0] -= 1
        return folder

    monkeypatch.setattr(checkpoint, "save", write)
    return go, under_way


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_a_save_returns_before_it_is_written_and_writes_what_was_then(tmp_path, slow_writes):
    weight, momentum = torch.ones(2, 3).T, torch.ones(4)  # of other strides than it will have on the disk
    with Saver(tmp_path, 2, print) as saver:
        saver.save(1, {"weight": weight}, {"momentum": momentum}, {"val_loss": 1.0})
        assert not (tmp_path / "checkpoints").exists() and threads() == ["checkpoint"]
        weight.zero_()
        momentum.zero_()
        slow_writes[0].set()
    loaded = load_latest(tmp_path)
    assert torch.equal(loaded.model["weight"], torch.ones(3, 2)) and torch.equal(
        loaded.optimizer["momentum"], torch.ones(4)
    )
    assert loaded.state["val_loss"] == 1.0 and not threads()


def test_saves_are_written_one_at_a_time_each_whole_and_pruned(tmp_path, slow_writes):
    slow_writes[0].set()
    weight = torch.empty(1000)
    with Saver(tmp_path, 2, print) as saver:
        for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, None)):
            saver.save(step, {"weight": weight.fill_(step)}, {"momentum": weight}, {"val_loss": val_loss})
            weight.fill_(-1)
            assert len(threads()) <= 1
    assert slow_writes[1] == [0, 1] and not threads()
    assert steps(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]  # the best and the last two
    for folder in (tmp_path / "checkpoints").iterdir():
        kept = load_file(folder / "model.safetensors")["weight"]
        assert (kept == int(folder.name[-1])).all()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")


def test_only_a_last_save_that_fails_fails_the_run(tmp_path, monkeypatch):
    notes, tensors = [], {"weight": torch.ones(3)}
    with Saver(tmp_path, 2, notes.append) as saver:
        saver.save(1, tensors, tensors, {})
        saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", full)
            saver.save(2, tensors, tensors, {})
            saver.wait()
        saver.save(3, tensors, tensors, {})
    assert steps(tmp_path) == ["step-00000001", "step-00000003"]
    expected = (
        "the checkpoint of step 2 could not be written (No space left on device); the last good one is step-00000001"
    )
    assert notes == [f"warning: {expected}, and training goes on"]

    monkeypatch.setattr(checkpoint, "save", full)
    expected = r"step 4 could not be written .* is step-00000003; make room in"
    with pytest.raises(OSError, match=expected), Saver(tmp_path, 2, notes.append) as saver:
        saver.save(4, tensors, tensors, {})
    assert load_latest(tmp_path).step == 3 and not threads()


def test_what_ended_the_training_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(ValueError, match="not finite"), Saver(tmp_path, 2, print) as saver:
        saver.save(1, {"weight": torch.ones(3)}, {}, {})
        raise ValueError("not finite")
    assert not threads()


def test_any_error_of_the_thread_ends_the_run_and_is_reported(tmp_path, monkeypatch):
    said = []

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(checkpoint, "_write_tensors", exhausted)
    with pytest.raises(MemoryError), Saver(tmp_path, 2, said.append) as saver:
        saver.save(1, {"w": torch.zeros(2)}, {}, {"val_loss": None})
    assert "step 1 could not be written (MemoryError())" in said[0]
