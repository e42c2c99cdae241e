"""Claims about what is left of a run on the disk."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ping_llm.config import Config, ModelConfig
from ping_llm.model import checkpoint
from ping_llm.model.checkpoint import Saver, load_latest
from ping_llm.model.gpt import GPT

CONFIG = Config(model=ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=64))


def save_step(run_dir: Path, step: int, val_loss: float | None = None) -> Path:
    """A checkpoint whose weights are drawn with its step as the seed."""
    model = GPT(CONFIG.model, generator=torch.Generator().manual_seed(step))
    stacked = torch.arange(6.0).view(2, 3)
    optimizer = {"first": stacked[0], "second": stacked[1], "rng.cpu": torch.arange(5, dtype=torch.uint8)}
    return checkpoint.save(run_dir, step, model.state_dict(), optimizer, {"step": step, "val_loss": val_loss})


def steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def spoil(path: Path) -> None:
    """Flips one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_loaded(tmp_path):
    save_step(tmp_path, 7, 1.5)
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded.step == 7 and loaded.state["val_loss"] == 1.5
    weights = GPT(CONFIG.model, generator=torch.Generator().manual_seed(7)).state_dict()
    assert weights.keys() == loaded.model.keys()
    assert all(torch.equal(loaded.model[name], weights[name]) for name in weights)
    assert loaded.optimizer["second"].tolist() == [3, 4, 5]
    assert loaded.optimizer["rng.cpu"].dtype == torch.uint8


def test_a_folder_gets_its_name_only_after_all_in_it_is_on_the_disk(tmp_path, monkeypatch):
    steps_taken = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: steps_taken.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(Path, "rename", lambda self, to: steps_taken.append(f"{self} → {to}") or rename(self, to))
    folder = save_step(tmp_path, 3)
    aside = f"{folder}.partial"
    renamed = steps_taken.index(f"{aside} → {folder}")
    synced = [f"{aside}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
    assert {*synced, aside} <= set(steps_taken[:renamed])
    assert str(folder.parent) in steps_taken[renamed:]


def test_a_checkpoint_of_another_model_is_one_clear_error(tmp_path):
    save_step(tmp_path, 1)
    checkpoint.save_config(tmp_path, Config(model=ModelConfig(n_layer=1, n_embd=64, n_head=2, seq_len=64)))
    with pytest.raises(ValueError, match=r"does not fit the model of .*config\.json"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("text", ['{"format_version": 1, "config": [1]}', "[]", "{"])
def test_a_damaged_config_is_one_clear_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged; restore it"):
        checkpoint.load_config(tmp_path)


def test_an_empty_run_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.load_config(tmp_path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [spoil, lambda path: path.write_bytes(path.read_bytes()[:20]), Path.unlink])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, name, damage):
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    if (name, damage) == ("state.json", spoil):
        (newest / name).write_text("[]")  # a flipped bit may still be JSON
    else:
        damage(newest / name)
    assert checkpoint.load_latest(tmp_path).step == 1
    assert "step-00000002 is damaged" in caplog.text and len(caplog.records) == 1


def test_damaged_checkpoints_alone_are_one_clear_error(tmp_path):
    spoil(save_step(tmp_path, 1) / "model.safetensors")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        checkpoint.load_latest(tmp_path)


def test_a_save_that_is_cut_leaves_the_old_one(tmp_path, monkeypatch):
    save_step(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_step(tmp_path, 2)
    assert checkpoint.load_latest(tmp_path).step == 1
    save_step(tmp_path, 2)
    checkpoint.prune(tmp_path, keep=1)
    assert steps(tmp_path) == ["step-00000002"]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0), (5, None)):
        save_step(tmp_path, step, val_loss)
    checkpoint.prune(tmp_path, keep=2)
    assert steps(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


def test_inference_takes_the_best_else_the_newest(tmp_path):
    checkpoint.save_config(tmp_path, CONFIG)
    for step in (1, 2):
        save_step(tmp_path, step)
    assert checkpoint.load_model(tmp_path)[2]["step"] == 2
    for step, val_loss in ((3, 1.0), (4, 2.0)):
        save_step(tmp_path, step, val_loss)
    model, config, state = checkpoint.load_model(tmp_path)
    expected = GPT(CONFIG.model, generator=torch.Generator().manual_seed(3)).state_dict()
    assert state["step"] == 3 and config == CONFIG and not model.training
    assert all(map(torch.equal, model.state_dict().values(), expected.values()))
    spoil(tmp_path / "checkpoints/step-00000003/model.safetensors")
    assert checkpoint.load_model(tmp_path)[2]["step"] == 4


def test_a_folder_without_a_run_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r'no checkpoint in .*; run "ping-llm train" first'):
        checkpoint.load_model(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["config.json", "checkpoints/step-00000001/state.json"])
def test_a_newer_format_is_one_clear_error(tmp_path, name):
    checkpoint.save_config(tmp_path, CONFIG)
    save_step(tmp_path, 1)
    path = tmp_path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="is of format 99, this program reads 1; update ping-llm"):
        checkpoint.load_model(tmp_path)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    checkpoint.save_config(tmp_path, CONFIG)
    save_step(tmp_path, 1)

    def refuse(*_args, **_kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert checkpoint.load_latest(tmp_path).step == 1
    assert checkpoint.load_model(tmp_path)[2]["step"] == 1


@pytest.fixture
def slow_writes(monkeypatch):
    """Holds every write of a checkpoint up until the event is set, and counts how many are under way at once."""
    go, under_way, save = threading.Event(), [0, 0], checkpoint.save

    def write(*arguments):
        under_way[0] += 1
        under_way[1] = max(under_way)
        assert go.wait(20)
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
    told = "the checkpoint of step 2 could not be written (No space left on device); the last good one is step-00000001"
    assert notes == [f"warning: {told}, and training goes on"]

    monkeypatch.setattr(checkpoint, "save", full)
    told = r"step 4 could not be written .* is step-00000003; make room in"
    with pytest.raises(OSError, match=told), Saver(tmp_path, 2, notes.append) as saver:
        saver.save(4, tensors, tensors, {})
    assert load_latest(tmp_path).step == 3 and not threads()


def test_what_ended_the_training_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(ValueError, match="not finite"), Saver(tmp_path, 2, print) as saver:
        saver.save(1, {"weight": torch.ones(3)}, {}, {})
        raise ValueError("not finite")
    assert not threads()


def test_any_error_of_the_thread_ends_the_run_and_is_told(tmp_path, monkeypatch):
    said = []

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(checkpoint, "_write_tensors", exhausted)
    with pytest.raises(MemoryError), checkpoint.Saver(tmp_path, 2, said.append) as saver:
        saver.save(1, {"w": torch.zeros(2)}, {}, {"val_loss": None})
    assert "step 1 could not be written (MemoryError())" in said[0]


def test_a_counter_that_was_tampered_with_is_damage(tmp_path):
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    path = tmp_path / "checkpoints/step-00000002/state.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    assert checkpoint.load_latest(tmp_path).step == 1
