"""Run folders of models that learned nothing, whose answers differ nevertheless, and what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.inference.calibration import Calibration, Surprise
from ping_llm.inference.experts import Expert, Experts
from ping_llm.inference.familiar import Familiar
from ping_llm.model import checkpoint
from ping_llm.model.gpt import GPT

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 4, "seq_len": 128, "prefix_rows": 64}
SECRET = "secret-machine"  # in every path and name that must not get out
SOURCE = "192.0.2.7"


def random_gpt(config: ModelConfig) -> GPT:
    """With all weights at random: those that begin at 0 would hide what depends on them."""
    generator = torch.Generator().manual_seed(0)
    gpt = GPT(config, generator).eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return gpt


def random_run(folder: Path, **fields) -> Path:
    """A run folder of a model with such fields of [model], calibrated."""
    run, rows = folder / SECRET / "run", folder / SECRET / "rows"
    config = Config(
        model=ModelConfig(**TINY | fields),
        data=DataConfig(rows=rows, mesh=0.25),
        train=TrainConfig(run_dir=run, wandb_project=SECRET),
    )
    checkpoint.save_config(run, config)
    state = {"val_loss": 1.5, "rows_sha256": "ab" * 32, "tokens": 4096, "precision": "fp32"}
    saved = checkpoint.save(run, 40, random_gpt(config.model).state_dict(), {}, state)
    sha256 = json.loads((saved / checkpoint.STATE_NAME).read_text())["sha256"][checkpoint.MODEL_NAME]
    calibration(sha256).save(run)
    lines = [{"step": 20, "val_loss": 2.0, "val_rtt_bits": 12.0}, {"step": 40, "val_loss": 1.5, "val_rtt_bits": 11.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "machine.json").write_text(json.dumps({"host": SECRET, "from_step": 0}))
    manifest = {"inputs": [{"name": SECRET}, {"name": SECRET}], "parts": {"train": 1234, "val-s1": 50, "test-s1": 51}}
    manifest |= {"split": {"val_from_s": 1_767_225_600}}
    (run / "rows_manifest.json").write_text(json.dumps(manifest))
    return run


def calibration(sha256: str | None) -> Calibration:
    """One whose every part changes answers."""
    from conftest import make_row

    expert = Expert((-2.0, 0.0), (0.1, 0.2), ((0.0,) * 4, (1.0,) * 4))
    experts = Experts({"pair": expert}, ((0.5,) * 4,) * 2, {"pair": (0.25,) * 7})
    surprise = Surprise(300, (0.1, 1.0), (0.2, 0.5), 0.8, -0.1)
    shares = {"none": 0.05, "/8": 0.05, "/16": 0.1, "/24": 0.1, "all": 0.7}
    return Calibration(
        {"ipv4": shares}, {"ipv4": {"all": 1.0}}, Familiar.of_rows([make_row(20)]), experts, surprise, sha256
    )


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 267, shape, generator=torch.Generator().manual_seed(1))
