"""Scalars of a training run in; lines of metrics.jsonl, a progress line and Weights & Biases out."""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from ping_llm.config import Config, config_to_dict
from ping_llm.data.files import write_atomically

METRICS_NAME = "metrics.jsonl"
LINE_EVERY_S = 10.0


class RunLog:
    """A context manager; `write` takes what was measured after a step, `show_progress` how far the run is.

    `resumed_step` is the step of the checkpoint the run continues, None for a new run: later lines of metrics.jsonl
    belong to steps that are about to be repeated, and go.
    """

    def __init__(self, config: Config, resumed_step: int | None) -> None:
        path = config.train.run_dir / METRICS_NAME
        _truncate(path, -1 if resumed_step is None else resumed_step)
        self.begun = self.last_line = time.monotonic()
        self.first_progress = self.progress = None
        self.wandb = _start_wandb(config)
        self.file = path.open("a")
        self.bar, self.task = _progress_bar()

    def __enter__(self) -> RunLog:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def write(self, step: int, **scalars: float) -> None:
        """Records scalars measured after `step` steps; what is not finite becomes null."""
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=step)
        text = _summary(scalars)
        if self.bar is None:
            self._print_line(step, text, always="val_loss" in scalars)
        elif "val_loss" in scalars:
            self.bar.console.print(f"step {step:,}  {text}", highlight=False)
        else:
            self.bar.update(self.task, text=text)

    def note(self, text: str) -> None:
        """Says something once."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.console.print(text, highlight=False, markup=False)

    def show_progress(self, step: int, progress: float) -> None:
        """Moves the progress line; `progress` is the share of the run that is done."""
        self.first_progress = progress if self.first_progress is None else self.first_progress
        self.progress = progress
        if self.bar is not None:
            self.bar.update(self.task, completed=min(1.0, progress), step=f"{step:,}")

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


_SUMMARY = {
    "loss": "loss {:.4f}",
    "loss_rtt": "rtt {:.4f} nats",
    "val_loss": "val loss {:.4f}",
    "val_loss_rtt": "val rtt {:.4f} nats",
    "val_rtt_bits": "{:.3f} bits per RTT",
    "tokens_per_s": "{:,.0f} tokens/s",
}


def _summary(scalars: dict[str, float]) -> str:
    return "  ".join(form.format(scalars[name]) for name, form in _SUMMARY.items() if name in scalars)


def _truncate(path: Path, last_step: int) -> None:
    """Drops the lines after a step, and a line that was cut while it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= last_step]
    write_atomically(path, "".join(kept))


def _step_of(line: str) -> float:
    """Infinite for a line that is damaged."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _progress_bar() -> tuple[Any, Any]:
    """A live line on a terminal, (None, None) elsewhere."""
    if not sys.stdout.isatty():
        return None, None
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    return bar, bar.add_task("", total=1.0, step="0", text="")


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
