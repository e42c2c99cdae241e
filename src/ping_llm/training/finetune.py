"""A trained run and new rows in, a run that goes on from its weights out, and what became of old and new knowledge.

The run is one like any other, by the one trainer: its config names the base in `train.init_from`, and in `data.replay` what
is mixed in so that the base's network is not forgotten.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ping_llm.config import Config, OptimConfig, parse_config
from ping_llm.data.loader import fixed_windows
from ping_llm.data.rows import RowReader, is_part_of, read_manifest
from ping_llm.inference.model import PingModel
from ping_llm.model.checkpoint import checkpoints, load_model
from ping_llm.model.gpt import GPT
from ping_llm.system.files import try_folder, write_atomically
from ping_llm.system.hardware import pick_device
from ping_llm.training.base import Base, read_base
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective
from ping_llm.training.options import AUTO, NONE, SAMPLES, FinetuneOptions
from ping_llm.training.overlap import check_rows
from ping_llm.training.report import FINETUNE_NAME, FINETUNED, finetune_rows, write_report
from ping_llm.training.samples import sample_rows
from ping_llm.training.trainer import train
from ping_llm.training.validation import ValQueries

REPLAY_NAME = "replay"  # folder of the samples in the run folder
RATES = ("muon_lr", "adamw_lr", "embedding_lr", "head_lr")
RATE_SHARE = 0.3  # of the base's rates, unless they are of fine-tuning already
LORA_RATE = 0.0015  # of the factors, before width scaling
REPLAY_SHARE = 0.5  # of the windows
PASSES, LEAST_STEPS = 2, 200  # over the new rows; steps at least
MOST_STEPS_SHARE = 0.25  # of the steps that the base has taken
TOKENS = 16, 40  # of a measurement of IPv4 and of IPv6
EVALUATIONS = 4  # over the run
WINDOWS, QUERIES = 256, 400  # of val, of the table before and after


@dataclass(frozen=True)
class Plan:
    """What a fine-tuning is: a run, and the rows whose val says what it has learned and forgotten."""

    config: Config
    base: Base
    new: Path
    old: Path | None  # rows of the base, or samples of it; None if neither is at hand


def finetune(options: FinetuneOptions, overrides: Sequence[str] = ()) -> dict[str, Any] | None:
    """Trains, and prints and reports the losses of old and new val before and after; None if a signal stopped the run.

    `overrides` are options of `ping-llm train`. ValueError before anything is trained: no such run or rows, an option that
    does not fit, or rows whose held-out parts the base has learned, or the other way round (overlap.py).
    """
    plan, out = prepare(options, overrides), options.out
    if train(plan.config).progress(plan.config.train) < 1:
        return None
    found = compare(plan)
    write_atomically(out / FINETUNE_NAME, json.dumps(found, indent=1) + "\n")
    show(found)
    print(f"report: {write_report(out)}")
    return found


def prepare(options: FinetuneOptions, overrides: Sequence[str]) -> Plan:
    """Checks everything, writes samples if they are wanted, and decides on the config of the run."""
    base, rows, out = options.base, options.rows, options.out
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("finetune is one process; train the config of its report.md by torchrun -m ping_llm.train")
    for part in ("train", "val"):
        RowReader(rows, part)
    if checkpoints(out) and Base.load(out) is None:
        raise ValueError(f"{out} holds a run that did not begin with another one; name a new folder with --out")
    given = read_base(base)
    named = [] if options.replay in (AUTO, NONE, SAMPLES) else [Path(options.replay)]
    own = next((one for one in (given.config.data.rows, *named) if given.learned(one)), None)
    check_rows(rows, given.base, own, given.run_dir)
    replay = own if options.replay == AUTO else named[0] if named else None
    made_up = replay is None and options.replay != NONE
    if replay is not None:
        RowReader(replay, "train")
    default = default_config(given.config, given.base.step, base, rows, out, options.lora)
    if folder := out / REPLAY_NAME if made_up else replay:
        data = dataclasses.replace(default.data, replay=str(folder), replay_share=REPLAY_SHARE)
        default = dataclasses.replace(default, data=data)
    config = parse_config(list(overrides), "ping-llm train", default)  # whose help has these options
    for name in ("run_dir", "init_from"):
        if getattr(config.train, name) != getattr(default.train, name):
            raise ValueError(f"RUN and --out say what train.{name} is; leave it out")
    if config.data.rows != rows:
        raise ValueError("ROWS says what data.rows is; leave it out")
    if made_up and not checkpoints(out):
        try_folder(out)
        device = pick_device(config.train.device)
        print(f"{base} makes up measurements, to be reminded of what it knows", flush=True)
        model = PingModel(given.model.to(device), device)
        sample_rows(model, out / REPLAY_NAME, given.base.model_sha256, config.seed)
    olds = [own, *([Path(config.data.replay)] if config.data.replay else [])]
    return Plan(config, given.base, rows, next((one for one in olds if one and _has_val(one)), None))


def default_config(theirs: Config, taken: int, base: str, rows: Path, out: Path, lora: int = 0) -> Config:
    """The config of a run from a base that took so many steps: its own, but for lower rates, a length by the new rows,
    and another seed, so that windows that are mixed in are others than the base has learned."""
    share = 1.0 if theirs.train.init_from else RATE_SHARE
    changed: dict[str, Any] = {name: share * getattr(theirs.optim, name) for name in RATES}
    changed |= {"weight_decay": 0.0, "lora_rank": lora}
    if lora:
        changed |= {"matrices": "adamw", "orthogonalization": "newton-schulz", "equal_rows": False}
        changed |= {"adamw_lr": LORA_RATE}
    elif theirs.optim.lora_rank:
        changed |= {"matrices": "muon"}  # as before its base was changed by a low rank
    optim = dataclasses.replace(theirs.optim, **changed)
    steps = _steps(rows, taken, theirs)
    each = -(-steps // EVALUATIONS)
    train_fields: dict[str, Any] = {"run_dir": out, "init_from": base, "device": "auto", "wandb": "disabled"}
    train_fields |= {"total_steps": steps, "target_tokens": 0, "max_minutes": 0.0}
    train_fields |= {"first_batch_size": 0, "batch_warmup_steps": 0, "eval_every": each, "checkpoint_every": each}
    return dataclasses.replace(
        theirs,
        data=dataclasses.replace(theirs.data, rows=rows, replay="", replay_share=0.0),
        optim=optim,
        train=dataclasses.replace(theirs.train, **train_fields),
        seed=theirs.seed + 1,
    )


def _steps(rows: Path, taken: int, theirs: Config) -> int:
    """Steps that show each new measurement PASSES times, within bounds; half of the windows may be others."""
    reader = RowReader(rows, "train")
    ipv6 = int(reader.ipv6_measurements.sum())
    tokens = TOKENS[0] * (int(reader.measurements.sum()) - ipv6) + TOKENS[1] * ipv6
    new = theirs.train.batch_size * theirs.place_tokens * (1 - REPLAY_SHARE)  # tokens a step
    return max(LEAST_STEPS, min(round(PASSES * tokens / new), int(MOST_STEPS_SHARE * taken)))


def compare(plan: Plan) -> dict[str, Any]:
    """Losses and the error on val of the new and the old rows, of the base and of the run's best checkpoint.

    ValueError if the base is no longer what the run began with.
    """
    config, run_dir = plan.config, plan.config.train.run_dir
    began = Base.load(run_dir)
    if began is None or began.model_sha256 != plan.base.model_sha256:
        raise ValueError(
            f"{plan.base.source} is another model than when {run_dir} began; restore it for the comparison"
        )
    device = pick_device(config.train.device)
    models = {"before": read_base(plan.base.source, device).model, "after": load_model(run_dir, device)[0]}
    found: dict[str, Any] = {"base": plan.base.source, "base_step": plan.base.step}
    for name, folder in (("new", plan.new), ("old", plan.old)):
        if folder is not None:
            own = measured_on(config, folder)
            scores = {when: measure(model, own, device) for when, model in models.items()}
            found[name] = {"rows": str(folder), "samples": folder == run_dir / REPLAY_NAME, **scores}
    return found


def measured_on(config: Config, rows: Path) -> Config:
    """What models are measured by: nothing of it depends on how they were trained, but for the weights of the fields."""
    data = dataclasses.replace(config.data, rows=rows, replay="", replay_share=0.0)
    train = dataclasses.replace(config.train, init_from="", compile=False, eval_windows=WINDOWS, eval_queries=QUERIES)
    train = dataclasses.replace(train, precision="bf16" if train.precision == "fp8" else train.precision)
    return dataclasses.replace(config, data=data, optim=OptimConfig(), train=train)


def measure(model: GPT, config: Config, device: torch.device) -> dict[str, float]:
    """The values of FINETUNED on val of the rows of a config, of fixed windows and fixed pings."""
    ranks = Ranks(device)
    objective, queries = Objective(config, model, ranks), ValQueries.load(config)
    values = objective.evaluate(fixed_windows(config, config.data.rows, "val", WINDOWS))
    if queries is not None:
        values["val_median_rel_error"] = queries.median_rel_error(objective, ranks)
    return {name: values[name] for name in FINETUNED if name in values}


def show(found: dict[str, Any]) -> None:
    """Prints the table of before and after."""
    table = Table("val of", "", "before", "after", title="What fine-tuning changed")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in finetune_rows(found):
        table.add_row(*row)
    Console().print(table)


def _has_val(rows: Path) -> bool:
    return any(is_part_of(part, "val") and count for part, count in read_manifest(rows)["parts"].items())
