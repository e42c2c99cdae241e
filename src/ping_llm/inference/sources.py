"""The name of a model in, its weights, config and calibration out: a run folder, an exported folder, or a model of the hub.

    a folder                        a run, one checkpoint of it, or what `ping-llm export` wrote
    OWNER/NAME, OWNER/NAME@REVISION a model of the Hugging Face hub, downloaded once
    None                            the model that comes with the package

An exported folder is one of transformers: config.json, where the entry CONFIG_KEY holds the config of the run, and
model.safetensors. Beside them stand calibration.json and EXPORT_NAME, which says what the weights are a copy of and their
checksum. Reading one takes neither transformers nor any code that came with it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ping_llm.config import Config, config_from_dict
from ping_llm.inference.calibration import CALIBRATION_NAME, Calibration
from ping_llm.model.checkpoint import CONFIG_NAME, MODEL_NAME, load_model
from ping_llm.model.gpt import GPT, unfilled
from ping_llm.model.nanochat import from_nanochat
from ping_llm.system.files import file_sha256
from ping_llm.system.hub import NAME_PATTERN, download

EXPORT_NAME = "ping_llm.json"
CONFIG_KEY = "ping_llm"
EXPORT_VERSION = 1
NANOCHAT = "nanochat"
"""The `model_type` of exported folders whose weights are named as transformers' own architecture names them."""
FILES = (CONFIG_NAME, MODEL_NAME, CALIBRATION_NAME, EXPORT_NAME)
PRETRAINED = Path(__file__).parents[1] / "pretrained"

Source = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Loaded:
    """A model and what is known of it."""

    gpt: GPT
    config: Config
    calibration: Calibration
    state: Mapping[str, Any]  # of the checkpoint: step, val_loss, rows_sha256; of an export, those of its run
    folder: Path
    name: str  # for people


def load(source: Source, device: torch.device | str = "cpu") -> Loaded:
    """The model of a source; ValueError, one line, if there is none, or it is damaged or cannot be fetched.

    Weights are fp32, whatever they are kept in. A calibration that was fitted for other weights is left out, with a warning.
    """
    folder, name = locate(source), name_of(source)
    exported = _read_json(folder / CONFIG_NAME).get(CONFIG_KEY) if (folder / CONFIG_NAME).is_file() else None
    if exported is not None:
        return _load_export(folder, name, device)
    gpt, config, state = load_model(folder, device)
    return Loaded(gpt, config, Calibration.load_for(folder, state["sha256"][MODEL_NAME]), state, folder, name)


def locate(source: Source) -> Path:
    """The folder of a source, on this machine; a model of the hub is downloaded if it is not there yet.

    Text that names a folder is that folder. Text of the form OWNER/NAME is of the hub, unless a folder OWNER is there: then
    it is a folder, too. A Path is always a folder.
    """
    if source is None:
        if not (PRETRAINED / CONFIG_NAME).is_file():
            raise ValueError(
                "no model comes with this installation; name one: a run folder, a folder that ping-llm export wrote, or "
                "OWNER/NAME of the Hugging Face hub"
            )
        return PRETRAINED
    if is_of_hub(source):
        return download(str(source), FILES, EXPORT_NAME)
    return Path(source)


def is_of_hub(source: Source) -> bool:
    """Whether a source is one of the hub; see `locate`."""
    if not isinstance(source, str) or not re.fullmatch(NAME_PATTERN, source):
        return False
    return not Path(source).exists() and not Path(Path(source).parts[0]).is_dir()


def is_export(folder: Path) -> bool:
    """Whether a folder is an exported one."""
    return (folder / CONFIG_NAME).is_file() and CONFIG_KEY in _read_json(folder / CONFIG_NAME)


def name_of(source: Source) -> str:
    """What people call a source."""
    if source is None:
        return "pretrained"
    return str(source) if is_of_hub(source) else Path(source).resolve().name


def _load_export(folder: Path, name: str, device: torch.device | str) -> Loaded:
    values = _read_json(folder / CONFIG_NAME)
    about, told = values[CONFIG_KEY], _read_json(folder / EXPORT_NAME) if (folder / EXPORT_NAME).is_file() else {}
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise ValueError(f"{folder / CONFIG_NAME} is damaged; restore it, or export or download it again")
    for version in (about.get("format_version"), told.get("format_version", EXPORT_VERSION)):
        if not isinstance(version, int) or version > EXPORT_VERSION:
            found = f"{folder} is an export of format {version}"
            raise ValueError(f"{found}, this program reads {EXPORT_VERSION}; update ping-llm")
    config = config_from_dict(about["config"], str(folder / CONFIG_NAME))
    config = replace(
        config, data=replace(config.data, rows=folder / "rows")
    )  # none: an export does not say where they are
    sha256 = file_sha256(folder / MODEL_NAME)
    if told and told.get("sha256") != sha256:
        raise ValueError(
            f"{folder / MODEL_NAME} is not what was exported; export or download it again, or, if you trained it on, "
            f"delete {EXPORT_NAME} and {CALIBRATION_NAME}"
        )
    gpt = read_weights(folder, config, values.get("model_type") == NANOCHAT)
    has_own = (folder / CALIBRATION_NAME).exists()  # else that of a run which the folder lies in would be taken
    calibration = Calibration.load_for(folder, sha256) if has_own else Calibration()
    return Loaded(gpt.to(device).eval(), config, calibration, about.get("state", {}), folder, name)


def read_weights(folder: Path, config: Config, nanochat: bool) -> GPT:
    """The model of an exported folder, on the CPU in fp32; ValueError if its weights are not those of the config."""
    gpt = unfilled(config.model)
    try:
        named = load_file(folder / MODEL_NAME)
        weights = from_nanochat(named, config.model, gpt.embedding.num_embeddings) if nanochat else _own(named)
        gpt.load_state_dict({key: _fp32(weight) for key, weight in weights.items()}, assign=True)
    except (RuntimeError, KeyError, SafetensorError):  # messages with a line for each tensor
        raise ValueError(
            f"{folder / MODEL_NAME} does not hold the weights of {folder / CONFIG_NAME}; export it again"
        ) from None
    return gpt


def _own(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of GPT, of what transformers' classes around it save."""
    return {name.removeprefix("model.").removeprefix("gpt."): weight for name, weight in named.items()}


def _fp32(weight: Tensor) -> Tensor:
    return weight.float() if weight.is_floating_point() else weight


def _read_json(path: Path) -> dict[str, Any]:
    """ValueError if a file is damaged."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged; restore it, or export or download it again")
    return values
