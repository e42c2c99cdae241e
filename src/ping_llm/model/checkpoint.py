"""The state of a run in, a folder that survives any interruption out; and the other way round.

    runs/small/config.json                       format version and the resolved config
    runs/small/checkpoints/step-00000200/
        model.safetensors  optimizer.safetensors
        state.json                               format version, checksums of both, and the run's counters

The model's file holds the weights that answer. In a run that averages weights these are the averaged ones, and those that
training goes on from lie beside the optimiser's tensors.

A checkpoint is written aside, flushed to the disk and renamed, so a folder of that name is whole; older ones are removed
only after that. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ping_llm.config import Config, config_from_dict, config_to_dict
from ping_llm.model.gpt import GPT, unfilled
from ping_llm.system.files import sync, write_atomically

FORMAT_VERSION = 2  # 1 had three matrices for queries, keys and values; it is still read
CONFIG_NAME = "config.json"
STATE_NAME = "state.json"
MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
_ASIDE = ".partial"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and verified; tensors are on the CPU."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_config(run_dir: Path, config: Config) -> None:
    """Writes config.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    values = {"format_version": FORMAT_VERSION, "config": config_to_dict(config)}
    write_atomically(run_dir / CONFIG_NAME, json.dumps(values, indent=1) + "\n")


def load_config(run_dir: Path) -> Config | None:
    """The config of a run, None if the folder holds none; ValueError if a newer program wrote it or it is damaged."""
    path = Path(run_dir) / CONFIG_NAME
    if not path.exists():
        return None
    try:
        values = _read_json(path)["config"]
        if not isinstance(values, dict):
            raise _Damaged
    except (_Damaged, KeyError):
        if b'"model_type"' in path.read_bytes():
            raise ValueError(f"{run_dir} is an export, which is no run; name a run folder") from None
        raise ValueError(f"{path} is damaged; restore it or start a new run folder") from None
    return config_from_dict(values, str(path))


def save(
    run_dir: Path, step: int, model_state: dict[str, Tensor], optimizer_state: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Writes one checkpoint and returns its folder; `state` is plain JSON, its "val_loss" (nats) decides the best.

    The tensors lie on the CPU, each in memory of its own. An OSError leaves nothing behind.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    aside = folder.with_name(folder.name + _ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        sync(run_dir)
        files = {MODEL_NAME: model_state, OPTIMIZER_NAME: optimizer_state}
        checksums = {name: _write_tensors(aside / name, tensors) for name, tensors in files.items()}
        values = {"format_version": FORMAT_VERSION, "step": step, "sha256": checksums, **state}
        values["state_sha256"] = _json_sha256(values)
        (aside / STATE_NAME).write_text(json.dumps(values, indent=1) + "\n")
        sync(aside / STATE_NAME)
        sync(aside)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # what it takes may be what is missing
        raise
    shutil.rmtree(folder, ignore_errors=True)  # only a damaged one can stand here: a whole one would have been resumed
    aside.rename(folder)
    sync(folder.parent)
    return folder


def prune(run_dir: Path, keep: int) -> None:
    """Removes all checkpoints but the newest `keep` and the best."""
    folders = checkpoints(run_dir)
    best = _best(folders)
    for folder in folders[keep:]:
        if folder != best:
            shutil.rmtree(folder)
    for aside in (run_dir / "checkpoints").glob(f"step-*{_ASIDE}"):
        shutil.rmtree(aside)


def load_latest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None if there is none at all; a damaged one is passed over with a warning."""
    folders = checkpoints(Path(run_dir))
    if not folders:
        return None
    folder, state = _first_whole(folders, (MODEL_NAME, OPTIMIZER_NAME))
    return Checkpoint(state["step"], _read_weights(folder), load_file(folder / OPTIMIZER_NAME), state)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[GPT, Config, dict[str, Any]]:
    """A model for inference, its config and its counters.

    Of a run folder the best by validation loss, else the newest; or that of one checkpoint, RUN/checkpoints/step-….
    """
    path = Path(path)
    run_dir, folders = path, checkpoints(path)
    if not folders and (path / STATE_NAME).exists():
        folders, run_dir = [path.resolve()], path.resolve().parent.parent
    config = load_config(run_dir)
    if not folders:
        advice = 'run "ping-llm train" first'
        if path.name == "checkpoints" and checkpoints(path.parent):
            advice = f"name the run folder {path.parent}, or one of its checkpoints"
        raise ValueError(f"no checkpoint in {path}; {advice}")
    if config is None:
        raise ValueError(
            f"there is no {run_dir / CONFIG_NAME}, which says what model the checkpoints are of; restore it"
        )
    best = _best(folders)
    try:
        folder, state = _first_whole(sorted(folders, key=lambda folder: folder != best), (MODEL_NAME,))
    except ValueError:
        if run_dir == path:
            raise
        raise ValueError(f"{path} is damaged; restore it or name another checkpoint") from None
    model = unfilled(config.model)
    try:
        model.load_state_dict(_read_weights(folder), assign=True)
    except RuntimeError:  # its message has a line for each tensor
        raise ValueError(f"{folder} does not fit the model of {run_dir / CONFIG_NAME}; restore that file") from None
    return model.to(device).eval(), config, state


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders of the checkpoints, newest first."""
    return sorted((f for f in run_dir.glob("checkpoints/step-*") if f.suffix != _ASIDE), reverse=True)


class _Damaged(Exception):
    """A checkpoint that is not what was written."""


def _first_whole(folders: Sequence[Path], names: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """The first checkpoint whose files `names` are undamaged, and its state.json; ValueError if there is none."""
    for folder in folders:
        try:
            return folder, _verified_state(folder, names)
        except _Damaged as error:
            log.warning("%s is damaged (%s); trying another one", folder, error)
    run_dir = folders[0].parents[1]
    raise ValueError(f"every checkpoint in {run_dir} is damaged; restore one or start a new run folder")


def _best(folders: list[Path]) -> Path | None:
    """The checkpoint with the lowest validation loss; None if none was evaluated."""
    losses: dict[Path, float] = {}
    for folder in folders:
        with contextlib.suppress(_Damaged):
            val_loss = _verified_state(folder, ()).get("val_loss")
            if val_loss is not None and math.isfinite(val_loss):
                losses[folder] = val_loss
    return min(losses, key=lambda folder: losses[folder], default=None)


def _verified_state(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """state.json, after the checksums of the files `names`; _Damaged if one is wrong."""
    try:
        state = _read_json(folder / STATE_NAME)
        expected = state.pop("state_sha256", None)  # the first checkpoints had none
        if expected not in (None, _json_sha256(state)):
            raise _Damaged(f"{STATE_NAME} does not match its checksum")
        for name in names:
            if _sha256(folder / name) != state["sha256"][name]:
                raise _Damaged(f"{name} does not match its checksum")
    except OSError as error:
        raise _Damaged(f"{Path(error.filename).name} cannot be read") from None
    except (KeyError, TypeError):
        raise _Damaged(f"{STATE_NAME} is incomplete") from None
    return state


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint under today's names."""
    weights = load_file(folder / MODEL_NAME)
    for name in [name for name in weights if name.endswith(".attention.q.weight")]:
        prefix = name.removesuffix("q.weight")
        weights[f"{prefix}qkv.weight"] = torch.cat([weights.pop(f"{prefix}{part}.weight") for part in "qkv"])
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        raise _Damaged(f"{path.name} is no JSON") from None
    if not isinstance(values, dict) or not isinstance(values.get("format_version"), int):
        raise _Damaged(f"{path.name} has no format version")
    if values["format_version"] > FORMAT_VERSION:
        found = f"{path} is of format {values['format_version']}"
        raise ValueError(f"{found}, this program reads {FORMAT_VERSION}; update ping-llm")
    return values


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes a safetensors file and returns its hash; it is on the disk when this returns."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # which is no OSError, and keeps its number in its words
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    sync(path)
    return _sha256(path)


def _json_sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
