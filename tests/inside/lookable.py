"""Small models that learned nothing, and runs of them, to look into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ping_llm.config import Config, DataConfig, ModelConfig
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.model import PingModel
from ping_llm.model.checkpoint import save, save_config
from ping_llm.model.gpt import GPT


def config_of(field_aware: bool = False, **switches: Any) -> ModelConfig:
    fields = {"n_layer": 2, "n_embd": 32, "n_head": 2, "seq_len": 192, "prefix_rows": 64} | switches
    return ModelConfig(field_aware=field_aware, **fields)


def random_gpt(config: ModelConfig, seed: int = 0) -> GPT:
    gpt, generator = GPT(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return gpt


def lookable(field_aware: bool = False, **switches: Any) -> PingModel:
    """In double precision, so that what is compared differs by no rounding."""
    gpt = random_gpt(config_of(field_aware, **switches)).double()
    return PingModel(gpt, torch.device("cpu"), Calibration(), least_mass=0.0)


def write_run(folder: Path, rows: Path, field_aware: bool = False, losses: dict[int, float] | None = None) -> Path:
    """A run folder with a checkpoint for each step of `losses`, each of other weights."""
    model = config_of(field_aware)
    save_config(folder, Config(model=model, data=DataConfig(rows=rows)))
    for step, loss in (losses or {1: 1.0}).items():
        weights = {name: p.contiguous() for name, p in random_gpt(model, seed=step).state_dict().items()}
        save(folder, step, weights, {}, {"val_loss": loss})
    return folder
