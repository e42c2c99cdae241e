"""Models that learned nothing, as classes of transformers and as the folders with a tokenizer that they are loaded from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from exports import TINY, random_gpt
from transformers import PreTrainedModel

from ping_llm.config import Config, LossConfig, ModelConfig
from ping_llm.hf.export import as_transformers, quiet
from ping_llm.hf.tokenization import PingTokenizer
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.sources import Loaded
from ping_llm.model.gpt import GPT

KINDS: dict[str, dict[str, Any]] = {"nanochat": {}, "own": {"field_aware": True, "grammar": True}}
"""A plain model becomes transformers' own architecture, one with switches our classes."""


def small_gpt(**switches: Any) -> GPT:
    """The same in each call; every token has its chance after every other."""
    return random_gpt(ModelConfig(**TINY | switches))


def small_model(gpt: GPT, loss: LossConfig | None = None) -> PreTrainedModel:
    """A copy of the model, as transformers knows it."""
    gpt = copy.deepcopy(gpt)
    loaded = Loaded(gpt, Config(model=gpt.config, loss=loss or LossConfig()), Calibration(), {}, Path(), "small")
    with quiet():
        return as_transformers(loaded).eval()


def small_export(folder: Path, gpt: GPT) -> Path:
    """A folder with the model and the tokenizer."""
    with quiet():
        small_model(gpt).save_pretrained(folder)
    PingTokenizer(model_max_length=gpt.config.seq_len).save_pretrained(folder)
    return folder
