"""Claims about what is left of a run on the disk."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ping_llm.config import Config, ModelConfig, config_to_dict
from ping_llm.model import checkpoint
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
        patch.setattr(checkpoint, "_json_sha256", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
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


def test_inference_takes_the_one_checkpoint_that_is_named(tmp_path, monkeypatch):
    checkpoint.save_config(tmp_path, CONFIG)
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save_step(tmp_path, step, val_loss)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "checkpoints/step-00000003", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "checkpoints")
    named = {
        1: ("step-00000001", tmp_path / "checkpoints/step-00000001"),
        3: (tmp_path / "elsewhere", "step-00000003/"),
    }
    for step, paths in named.items():
        for path in paths:
            model, config, state = checkpoint.load_model(path)
            assert state["step"] == step and config == CONFIG
            expected = GPT(CONFIG.model, generator=torch.Generator().manual_seed(step)).state_dict()
            assert all(map(torch.equal, model.state_dict().values(), expected.values()))
    monkeypatch.chdir("step-00000001")
    assert checkpoint.load_model(".")[2]["step"] == 1
    assert checkpoint.load_model("../..")[2]["step"] == 2


def test_a_named_checkpoint_that_is_damaged_is_not_replaced_by_another(tmp_path):
    checkpoint.save_config(tmp_path, CONFIG)
    for step in (1, 2):
        save_step(tmp_path, step)
    spoil(tmp_path / "checkpoints/step-00000001/model.safetensors")
    with pytest.raises(ValueError, match=r"step-00000001 is damaged; restore it or name another checkpoint"):
        checkpoint.load_model(tmp_path / "checkpoints/step-00000001")


def test_a_folder_without_a_run_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r'no checkpoint in .*; run "ping-llm train" first'):
        checkpoint.load_model(tmp_path / "nothing")
    save_step(tmp_path, 1)
    with pytest.raises(ValueError, match=r"there is no .*config\.json, which says what model"):
        checkpoint.load_model(tmp_path / "checkpoints/step-00000001")
    with pytest.raises(ValueError, match=r"no checkpoint in .*; name the run folder .*, or one of its checkpoints"):
        checkpoint.load_model(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["config.json", "checkpoints/step-00000001/state.json"])
def test_a_newer_format_is_one_clear_error(tmp_path, name):
    checkpoint.save_config(tmp_path, CONFIG)
    save_step(tmp_path, 1)
    path = tmp_path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="is of format 99, this program reads 2; update ping-llm"):
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


def test_a_counter_that_was_tampered_with_is_damage(tmp_path):
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    path = tmp_path / "checkpoints/step-00000002/state.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    assert checkpoint.load_latest(tmp_path).step == 1


def test_a_checkpoint_with_three_matrices_for_queries_keys_and_values_is_read(tmp_path):
    """As format 1 had them; the optimiser's state has kept its names."""
    folder = save_step(tmp_path, 1)
    expected = checkpoint.load_latest(tmp_path)
    weights = dict(expected.model)
    fused = weights.pop("blocks.0.attention.qkv.weight")
    for number, part in enumerate("qkv"):
        weights[f"blocks.0.attention.{part}.weight"] = fused[32 * number : 32 * (number + 1)].clone()
    state = {"step": 1, "val_loss": None}
    checkpoint.save(tmp_path, 1, weights, expected.optimizer, state)
    for path, values in ((folder / "state.json", {}), (tmp_path / "config.json", {"config": config_to_dict(CONFIG)})):
        values = values or json.loads(path.read_text())
        values.pop("state_sha256", None)  # the first checkpoints had none
        path.write_text(json.dumps(values | {"format_version": 1}))
    assert load_file(folder / "model.safetensors").keys() == weights.keys()
    old, (model, _, _) = checkpoint.load_latest(tmp_path), checkpoint.load_model(tmp_path)
    for found in (old.model, model.state_dict()):
        assert found.keys() == expected.model.keys()
        assert all(torch.equal(found[name], expected.model[name]) for name in found)
    tokens = torch.arange(11, 61)[None]
    assert torch.equal(model(tokens), GPT(CONFIG.model, generator=torch.Generator().manual_seed(1))(tokens))
