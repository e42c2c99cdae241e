"""Scalars of a training run in; lines of metrics.jsonl, a progress line and Weights & Biases out."""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ping_llm.config import FIELDS, Config, config_to_dict
from ping_llm.system.files import write_atomically
from ping_llm.training.metrics import METRICS_NAME, parse_line

SAMPLES_NAME = "samples.txt"
LINE_EVERY_S = 10.0


class RunLog:
    """A context manager; `write` takes what was measured after a step, `show_progress` how far the run is.

    `resumed_step` is the step of the checkpoint the run continues, None for a new run: later lines of metrics.jsonl
    belong to steps that are about to be repeated, and go.
    """

    def __init__(self, config: Config, resumed_step: int | None) -> None:
        self.run_dir = config.train.run_dir
        path = self.run_dir / METRICS_NAME
        _truncate(path, -1 if resumed_step is None else resumed_step)
        self.begun = self.last_line = time.monotonic()
        self.first_progress = self.progress = None
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
        try:
            self.file.close()
        except OSError:  # writes what a full disk did not take; that it did not was said
            pass
        finally:
            if self.wandb is not None:
                self.wandb.finish()

    def write(self, step: int, **scalars: float) -> None:
        """Records scalars measured after `step` steps; what is not finite becomes null."""
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._append(json.dumps({"step": step, **values}) + "\n")
        if self.wandb is not None:
            self.wandb.log(values, step=step)
        trained, validated = summary(scalars), validation_summary(scalars)
        if self.live is None:
            self._print_line(step, "  ".join(filter(None, (trained, validated))), always=bool(validated))
            return
        if validated:
            self.note(f"step {step:,}  {validated}")
        if trained:
            self.live.show(trained)

    def note(self, text: str) -> None:
        """Says something once."""
        if self.live is None:
            print(text, flush=True)
        else:
            self.live.print(text)

    def show_samples(self, step: int, text: str) -> None:
        """Shows what the model says by now, and adds it to samples.txt."""
        self.note(text)
        try:
            with (self.run_dir / SAMPLES_NAME).open("a") as file:
                file.write(f"step {step}\n{text}\n\n")
        except OSError as error:
            self.note(f"warning: {SAMPLES_NAME} misses the samples of step {step} ({error.strerror})")

    def show_progress(self, step: int, progress: float) -> None:
        """Moves the progress line; `progress` is the share of the run that is done."""
        self.first_progress = progress if self.first_progress is None else self.first_progress
        self.progress = progress
        if self.live is not None:
            self.live.advance(step, progress)

    def _append(self, line: str) -> None:
        """Adds to metrics.jsonl; a full disk costs lines of it, not the run."""
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            self.note(f"warning: {METRICS_NAME} misses a line ({error.strerror}); make room for the run folder")

    def _print_line(self, step: int, text: str, always: bool) -> None:
        """One line where no live one can be: after each evaluation, and else no more often than LINE_EVERY_S."""
        now = time.monotonic()
        if not always and now - self.last_line < LINE_EVERY_S:
            return
        self.last_line = now
        left = ""
        if self.progress is not None and self.first_progress < self.progress < 1:
            seconds = (now - self.begun) * (1 - self.progress) / (self.progress - self.first_progress)
            left = f"  {self.progress:.0%}, {seconds / 60:.1f} min left"
        print(f"step {step:,}  {text}{left}", flush=True)


class SilentLog:
    """A RunLog that says and writes nothing: that of every process but the main one."""

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, step: int, **scalars: float) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def show_samples(self, step: int, text: str) -> None:
        """Nothing."""

    def show_progress(self, step: int, progress: float) -> None:
        """Nothing."""


_SUMMARY = {
    "lr": "lr {:.2g}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "data_wait_share": "waits {:.1%}",
    "padding": "padding {:.1%}",
    "grad_norm": "gradient {:.2g}",
    "peak_memory_gb": "{:.1f} GB",
}


def summary(scalars: Mapping[str, float]) -> str:
    """What a line of training says: loss, bits a token of each field, rates; empty if nothing of it was measured."""
    if "loss" not in scalars:
        return ""
    bits = [
        f"{field} {nats / math.log(2):.2f}"
        for field in FIELDS
        if math.isfinite(nats := scalars.get(f"loss_{field}", math.nan))
    ]
    told = [form.format(scalars[name]) for name, form in _SUMMARY.items() if name in scalars]
    if scalars.get("skipped_steps"):
        told.append(f"{scalars['skipped_steps']:.0f} steps skipped")
    return "  ".join([f"loss {scalars['loss']:.4f}", f"bits a token: {' '.join(bits)}", *told])


_VALIDATION_SUMMARY = {
    "val_loss": "val: loss {:.4f}",
    "val_loss_rtt": "rtt {:.4f} nats",
    "val_rtt_bits": "{:.3f} bits per RTT",
    "val_median_rel_error": "median error {:.1%}",
}


def validation_summary(scalars: Mapping[str, float]) -> str:
    """What a line of an evaluation says; empty if there was none."""
    return "  ".join(form.format(scalars[name]) for name, form in _VALIDATION_SUMMARY.items() if name in scalars)


def _truncate(path: Path, last_step: int) -> None:
    """Drops the lines after a step, and those that are damaged, as the last one if it was cut while it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [(line, parse_line(line)) for line in lines if line.endswith("\n")]
    write_atomically(path, "".join(line for line, row in rows if row is not None and row["step"] <= last_step))


class _LiveLines:
    """Two lines on a terminal that change in place: how far the run is, and what its last step was like."""

    def __init__(self) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.task = self.bar.add_task("", total=1.0, step="0")
        self.live = Live(self.bar, refresh_per_second=4)

    def start(self) -> None:
        """Shows the lines."""
        self.live.start()

    def stop(self) -> None:
        """Leaves them as they are."""
        self.live.stop()

    def advance(self, step: int, progress: float) -> None:
        """Moves the bar."""
        self.bar.update(self.task, completed=min(1.0, progress), step=f"{step:,}")

    def show(self, text: str) -> None:
        """Puts a text under the bar."""
        from rich.console import Group
        from rich.text import Text

        self.live.update(Group(self.bar, Text(text)))

    def print(self, text: str) -> None:
        """Prints above the lines."""
        self.live.console.print(text, highlight=False, markup=False)


def _wandb_id(run_dir: Path) -> str:
    """The id of this run folder at Weights & Biases, drawn once: a continued run goes on in the same curves."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def _start_wandb(config: Config) -> Any:
    """A Weights & Biases run, None if it is disabled."""
    if config.train.wandb == "disabled":
        return None
    import wandb

    try:
        return wandb.init(
            project=config.train.wandb_project,
            name=config.train.run_dir.name,
            dir=config.train.run_dir,
            config=config_to_dict(config),
            mode=config.train.wandb,
            id=_wandb_id(config.train.run_dir),
            resume="allow",
        )
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'Weights & Biases did not start ({reason}); run "wandb login", or pass --train.wandb offline'
        ) from None
