"""A run folder, an exported one or a model of the hub in, what a run that goes on from its weights must know out.

The run folder of the new run keeps all but the weights in base.json, so it needs the old one no more once it has begun.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ping_llm.config import Config, differing_fields
from ping_llm.data.rows import MANIFEST_NAME, RowReader, manifest_sha256
from ping_llm.inference.familiar import Familiar
from ping_llm.inference.sources import is_export, load
from ping_llm.model.checkpoint import MODEL_NAME, checkpoints
from ping_llm.model.gpt import GPT
from ping_llm.system.files import file_sha256, write_atomically

BASE_NAME = "base.json"
# Of what a run learns from, and of what is mixed in: evaluations use none of these measurements.
ROWS_MANIFEST_NAME, REPLAY_MANIFEST_NAME = "rows_manifest.json", "replay_manifest.json"
_WITHOUT_WEIGHTS = {"dropout", "stochastic_depth"}  # switches of [model] that may differ


@dataclass(frozen=True)
class Base:
    """What a run begins with."""

    source: str  # train.init_from
    step: int
    model_sha256: str  # of the file of the weights
    inputs: dict[str, str]  # the files that it and the runs before it learned from: hash → name
    familiar: Familiar | None  # what it has met, None if that is not known

    def save(self, run_dir: Path) -> None:
        """Writes base.json."""
        values: dict[str, Any] = {"source": self.source, "step": self.step, "model_sha256": self.model_sha256}
        values |= {"inputs": self.inputs, "met": self.familiar.to_json() if self.familiar else None}
        write_atomically(run_dir / BASE_NAME, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, run_dir: Path) -> Base | None:
        """That of a run folder, None if its run began with weights of its own; ValueError if it is damaged."""
        path = run_dir / BASE_NAME
        try:
            values = json.loads(path.read_text())
            familiar = None if values["met"] is None else Familiar.of_json(values["met"])
            return cls(values["source"], values["step"], values["model_sha256"], dict(values["inputs"]), familiar)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged; restore it, or start a new run folder") from None


@dataclass(frozen=True)
class Given:
    """A base with its model and its config."""

    base: Base
    model: GPT
    config: Config
    rows_sha256: str  # of the rows that it learned from, "" if that is not known
    run_dir: Path  # or the folder of an export

    def learned(self, rows: Path) -> bool:
        """Whether these are the rows that it learned from."""
        return bool(self.rows_sha256) and manifest_sha256(rows) == self.rows_sha256


def read_base(source: str, device: torch.device | str = "cpu") -> Given:
    """The model of a run folder, a checkpoint, an exported folder or the hub, as a base; ValueError if there is none."""
    loaded = load(source, device)
    state, folder = loaded.state, loaded.folder
    sha256 = state["sha256"][MODEL_NAME] if "sha256" in state else file_sha256(folder / MODEL_NAME)  # of an export
    run_dir = folder if checkpoints(folder) or is_export(folder) else folder.resolve().parents[1]
    inputs = learned_from(run_dir, loaded.config)
    base = Base(source, state.get("step", 0), sha256, inputs, loaded.calibration.familiar)
    return Given(base, loaded.gpt, loaded.config, state.get("rows_sha256", ""), run_dir)


def wanted_base(config: Config) -> tuple[Base, dict[str, Tensor]] | tuple[None, None]:
    """That of a run that has not begun, with the weights; None if it has, or begins with weights of its own.

    ValueError if there is no such model, or it is one of another shape.
    """
    source = config.train.init_from
    if not source or checkpoints(config.train.run_dir):
        return None, None
    given = read_base(source)
    if differing := sorted(set(differing_fields(given.config.model, config.model)) - _WITHOUT_WEIGHTS):
        values = ", ".join(f"model.{name}={getattr(given.config.model, name)}" for name in differing)
        raise ValueError(f"the model of train.init_from={source} has {values}; set that, or take another one")
    return given.base, given.model.state_dict()


def read_kept(path: Path) -> dict[str, Any]:
    """The manifest of rows that a run folder keeps, {} if it keeps none; ValueError if it is damaged."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged; restore it: it is a copy of the manifest.json of the rows")
    return values


def learned_from(run_dir: Path, config: Config) -> dict[str, str]:
    """The input files, hash → name, of all rows that a run and the runs before it learned from, as far as they are known."""
    manifest = read_kept(run_dir / ROWS_MANIFEST_NAME) or read_kept(config.data.rows / MANIFEST_NAME)
    return learned_beside(run_dir) | inputs_of(manifest)


def learned_beside(run_dir: Path) -> dict[str, str]:
    """Those of all rows but `data.rows`: of what was mixed in, and of the runs before it."""
    base = Base.load(run_dir)
    return inputs_of(read_kept(run_dir / REPLAY_MANIFEST_NAME)) | (base.inputs if base else {})


def inputs_of(manifest: dict[str, Any]) -> dict[str, str]:
    """The input files of a manifest of rows, hash → name."""
    return {one["sha256"]: one["name"] for one in manifest.get("inputs", ()) if one.get("sha256")}


def met(config: Config, src_bytes: tuple[int, int]) -> Familiar:
    """What a run has met: in its rows, in those mixed in, and what its base had."""
    folders = [config.data.rows, *([Path(config.data.replay)] if config.data.replay else [])]
    found = [Familiar.of_rows(RowReader(folder, "train"), src_bytes) for folder in folders]
    base = Base.load(config.train.run_dir)
    return union([*found, *([base.familiar] if base and base.familiar else [])])


def union(several: Iterable[Familiar]) -> Familiar:
    """What any of them has met; they read as many bytes of sources."""
    known = list(several)
    assert len({one.src_bytes for one in known}) == 1, "models that read sources alike"
    src, dst = (np.unique(np.concatenate([getattr(one, role) for one in known])) for role in ("src", "dst"))
    return Familiar(src, dst, known[0].src_bytes)
