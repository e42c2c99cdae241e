"""The metrics.jsonl and machine.json of a training run in, columns and machines out; and how people read the columns.

machine.json holds the facts of the machine that trained last, with `from_step`, the step after which it began, and
`earlier`, a list of such facts of the machines before it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ping_llm.config import FIELDS
from ping_llm.system.files import write_atomically

METRICS_NAME = "metrics.jsonl"
MACHINE_NAME = "machine.json"
_FIELD_NAMES = {"src": "source", "dst": "destination", "rtt": "RTT"}


class Column(NamedTuple):
    """How people read a column of metrics.jsonl."""

    label: str  # its name with the unit, in reports and on axes
    scale: float = 1.0  # from the column to that unit
    line: str = ""  # its form in a line of the log


COLUMNS = {
    "loss": Column("weighted loss (nats per token)"),
    **{f"loss_{name}": Column(f"{_FIELD_NAMES.get(name, name)} (nats per token)") for name in FIELDS},
    "loss_rtt1": Column("byte 1 of the RTT (nats)"),
    "loss_rtt2": Column("byte 2 of the RTT (nats)"),
    "lr": Column("learning rate of the matrices", line="lr {:.2g}"),
    "tokens_per_s": Column("tokens/s", line="{:,.0f} tokens/s"),
    "mfu": Column("model FLOPs\nutilisation (%)", 100.0, "MFU {:.1%}"),
    "data_wait_share": Column("time waiting\nfor data (%)", 100.0, "waits {:.1%}"),
    "padding": Column("padding (%)", 100.0, "padding {:.1%}"),
    "grad_norm": Column("gradient norm", line="gradient {:.2g}"),
    "peak_memory_gb": Column("peak memory (GB)", line="{:.1f} GB"),
}
COLUMNS |= {f"val_{name}": column for name, column in COLUMNS.items() if name.startswith("loss")}
COLUMNS |= {
    "val_loss": COLUMNS["loss"]._replace(line="val: loss {:.4f}"),
    "val_trained_loss": Column(
        "weighted loss of the weights\nnot averaged (nats per token)", line="not averaged {:.4f}"
    ),
    "val_loss_rtt": COLUMNS["loss_rtt"]._replace(line="rtt {:.4f} nats"),
    "val_rtt_bits": Column("bits per RTT", line="{:.3f} bits per RTT"),
    "val_median_rel_error": Column("median relative\nerror of the RTT (%)", 100.0, "median error {:.1%}"),
}


@dataclass(frozen=True)
class Metrics:
    """The lines of metrics.jsonl as columns, in the order of their steps."""

    steps: np.ndarray  # (n,) int64, each once
    columns: dict[str, np.ndarray]  # (n,) float64 each, NaN where a line has none or it was not finite
    skipped: np.ndarray  # (n,) steps skipped since the line before; in runs without a counter, by the gradient norm
    damaged: int  # lines that could not be read

    def known(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a column where it has one; (k,) each."""
        values = self.columns.get(name, np.full(len(self.steps), np.nan))
        finite = np.isfinite(values)
        return self.steps[finite], values[finite]

    def best_step(self) -> int | None:
        """The first step with the lowest validation loss; None if none was evaluated."""
        steps, losses = self.known("val_loss")
        return int(steps[losses.argmin()]) if len(losses) else None


def read_metrics(run_dir: Path) -> Metrics:
    """Reads metrics.jsonl; ValueError if there is none, or no line of it can be read."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f'no run folder {run_dir}; pass one that "ping-llm train" wrote')
    path = run_dir / METRICS_NAME
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        advice = 'pass a folder that "ping-llm train" wrote'
        raise ValueError(f"{path} cannot be read ({error.strerror}); {advice}") from None
    rows: dict[int, dict[str, Any]] = {}  # by step; of two lines of a step the later one counts
    parsed = [parse_line(line) for line in lines]
    for row in parsed:
        if row is not None:
            rows.setdefault(row["step"], {}).update(row)
    if not rows:
        raise ValueError(f"{path} holds no line yet; wait for the first evaluation of the run, or start it again")
    steps = sorted(rows)
    names = {name for row in rows.values() for name in row} - {"step"}
    columns = {name: np.array([_finite(rows[step].get(name)) for step in steps]) for name in sorted(names)}
    counts = columns.get("skipped_steps", np.array([np.nan]))
    if np.isnan(counts).all():
        skipped = np.array([int("grad_norm" in rows[step] and rows[step]["grad_norm"] is None) for step in steps])
    else:
        skipped = np.diff(np.fmax.accumulate(np.fmax(counts, 0)), prepend=0).astype(int)  # fmax ignores NaN
    return Metrics(np.array(steps), columns, skipped, parsed.count(None))


def parse_line(line: str) -> dict[str, Any] | None:
    """One line of metrics.jsonl, None if it is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and 0 <= step < 1 << 62 else None


def _finite(value: Any) -> float:
    """The value, or NaN if it is no finite number."""
    return value if type(value) in (int, float) and math.isfinite(value) else math.nan


def read_machines(run_dir: Path) -> list[dict[str, Any]]:
    """The facts of each machine that a run was on, in order; none without machine.json. ValueError if it is damaged."""
    path = run_dir / MACHINE_NAME
    try:
        facts = json.loads(path.read_bytes())
        return [*facts.pop("earlier", []), facts]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError):
        raise ValueError(f"{path} is damaged; remove it to go on without it") from None


def add_machine(machines: list[dict[str, Any]], facts: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The machines of a run that goes on after `step` on one with these facts; those whose steps are all lost are not of
    it, and one that goes on is the same one."""
    kept = [machine for machine in machines if machine.get("from_step", 0) < step]
    if kept and {**kept[-1], "from_step": 0} == {**facts, "from_step": 0}:
        return kept
    return [*kept, facts | {"from_step": step}]


def write_machines(run_dir: Path, machines: list[dict[str, Any]]) -> None:
    """Writes machine.json."""
    values = machines[-1] | {"earlier": machines[:-1]}
    write_atomically(run_dir / MACHINE_NAME, json.dumps(values, indent=1) + "\n")
