"""Scalars of a training run in; lines of metrics.jsonl, a progress line and Weights & Biases out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ping_llm.config import FIELDS, Config, config_to_dict
from ping_llm.system.files import write_atomically
from ping_llm.training.metrics import COLUMNS, METRICS_NAME, parse_line

SAMPLES_NAME = "samples.txt"
LINE_EVERY_S = 10.0  # at most, where the output is no terminal, but for evaluations


class RunLog:
    """A context manager; `write` takes what was measured after a step, `show_progress` how far the run is.

    `resumed_step` is the step of the checkpoint the run continues, None for a new run: later lines of metrics.jsonl
    belong to steps that are about to be repeated, and are removed.
    """

    def __init__(self, config: Config, resumed_step: int | None) -> None:
        self.run_dir = config.train.run_dir
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path, last = self.run_dir / METRICS_NAME, -1 if resumed_step is None else resumed_step
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [(line, parse_line(line)) for line in lines if line.endswith("\n")]  # damaged ones, too, are dropped
        write_atomically(path, "".join(line for line, row in rows if row is not None and row["step"] <= last))
        self.begun = self.last_line = time.monotonic()
        self.first_progress: float | None = None
        self.progress = 0.0
        self.wandb = _start_wandb(config)
        self.file = path.open("a")
        self.live = _LiveLines() if sys.stdout.isatty() else None

    def __enter__(self) -> RunLog:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
        with contextlib.suppress(OSError):  # a full disk, which `write` has reported
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def write(self, step: int, **scalars: float) -> None:
        """Records scalars measured after `step` steps; what is not finite becomes null."""
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk: lines are lost, but the run goes on
            self.note(f"warning: {METRICS_NAME} misses a line ({error.strerror}); make room for the run folder")
        if self.wandb is not None:
            self.wandb.log(values, step=step)
        trained, validated = _training_summary(scalars), _summary(scalars, val=True)
        if self.live is None:
            now = time.monotonic()
            if validated or now - self.last_line >= LINE_EVERY_S:
                self.last_line = now
                left = ""
                if self.first_progress is not None and self.first_progress < self.progress < 1:
                    seconds = (now - self.begun) * (1 - self.progress) / (self.progress - self.first_progress)
                    left = f"  {self.progress:.0%}, {seconds / 60:.1f} min left"
                print(f"step {step:,}  {'  '.join(filter(None, (trained, validated)))}{left}", flush=True)
            return
        if validated:
            self.note(f"step {step:,}  {validated}")
        if trained:
            self.live.values = trained
            self.live.refresh()

    def note(self, text: str) -> None:
        """Prints a line that is not a measurement."""
        if self.live is None:
            print(text, flush=True)
        else:
            self.live.console.print(text, highlight=False, markup=False)

    def show_samples(self, step: int, text: str) -> None:
        """Prints samples of the model and adds them to samples.txt."""
        self.note(text)
        try:
            with (self.run_dir / SAMPLES_NAME).open("a", encoding="utf-8") as file:
                file.write(f"step {step}\n{text}\n\n")
        except OSError as error:
            self.note(f"warning: {SAMPLES_NAME} misses the samples of step {step} ({error.strerror})")

    def show_progress(self, step: int, progress: float) -> None:
        """Moves the progress line; `progress` is the share of the run that is done."""
        self.first_progress = progress if self.first_progress is None else self.first_progress
        self.progress = progress
        if self.live is not None:
            self.live.update(self.live.task, completed=min(1.0, progress), step=f"{step:,}")


class SilentLog:
    """A RunLog whose every method does nothing: that of all processes but the main one."""

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _summary(scalars: Mapping[str, float], val: bool) -> str:
    """What was measured of val, or in training, of the columns with a form; empty if nothing was."""
    columns = {name: column for name, column in COLUMNS.items() if column.line and name.startswith("val_") == val}
    return "  ".join(column.line.format(scalars[name]) for name, column in columns.items() if name in scalars)


def _training_summary(scalars: Mapping[str, float]) -> str:
    """Loss, bits a token of each field, rates; empty if no training step was measured."""
    if "loss" not in scalars:
        return ""
    nats = {field: scalars.get(f"loss_{field}", math.nan) for field in FIELDS}
    bits = " ".join(f"{field} {loss / math.log(2):.2f}" for field, loss in nats.items() if math.isfinite(loss))
    skipped = f"  {scalars['skipped_steps']:.0f} steps skipped" if scalars.get("skipped_steps") else ""
    return f"loss {scalars['loss']:.4f}  bits a token: {bits}  {_summary(scalars, val=False)}{skipped}"


class _LiveLines(Progress):
    """Two lines on a terminal that change in place: the progress of the run, and the values of its last step."""

    def __init__(self) -> None:
        left = (TimeRemainingColumn(), TextColumn("left"))
        bar = (TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self.values = ""
        super().__init__(*bar, *left, refresh_per_second=4)
        self.task = self.add_task("", total=1.0, step="0")

    def get_renderables(self) -> Iterable[RenderableType]:
        return [*super().get_renderables(), Text(self.values)] if self.values else super().get_renderables()


def _start_wandb(config: Config) -> Any:
    """A Weights & Biases run, None if it is disabled."""
    if config.train.wandb == "disabled":
        return None
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # set to nothing is not set; wandb takes it for a value, and a wrong one
    import wandb

    id_file = config.train.run_dir / "wandb_id"  # drawn once: a continued run goes on in the same curves
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    train, run_id = config.train, id_file.read_text()
    named: dict[str, Any] = {"project": train.wandb_project, "name": train.run_dir.name, "dir": train.run_dir}
    try:
        return wandb.init(config=config_to_dict(config), mode=train.wandb, id=run_id, resume="allow", **named)
    except (wandb.errors.Error, ValueError) as error:  # ValueError: of its settings, which are in the environment, too
        reason = ": ".join(line.strip() for line in str(error).splitlines()[:3])
        advice = 'run "wandb login", or pass --train.wandb offline'
        raise ValueError(f"Weights & Biases did not start ({reason}); {advice}") from None
