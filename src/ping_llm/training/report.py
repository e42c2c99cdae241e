"""A run folder in, its report.md out: what the run reached, how fast, on what machine, from what config."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.config import Config, TrainConfig, config_to_dict
from ping_llm.model.checkpoint import load_config
from ping_llm.model.loss import PARTS
from ping_llm.system.files import write_atomically
from ping_llm.training.metrics import COLUMNS, Metrics, read_machines, read_metrics
from ping_llm.training.plots import plot_run

REPORT_NAME = "report.md"
FINETUNE_NAME = "finetune.json"  # what a run that began with the weights of another has learned and forgotten
FINETUNED = ("val_loss", "val_rtt_bits", "val_median_rel_error")
_VALIDATION = ("val_loss", *(f"val_loss_{name}" for name in PARTS), "val_rtt_bits", "val_median_rel_error")
_SPEEDS = {"tokens_per_s": ",.0f", "mfu": ".1f", "data_wait_share": ".2f", "padding": ".2f"}
_MACHINE_NAMES = {
    "host": "host",
    "device": "device",
    "processes": "processes",
    "host_cores": "cores of the host",
    "precision": "precision",
    "compiled": "compiled",
    "deterministic": "deterministic",
    "parameters": "parameters",
    "peak_flops": "peak of a device (TFLOP/s)",
    "torch": "PyTorch",
    "python": "Python",
}


def write_report(run_dir: Path) -> Path:
    """Writes report.md into a run folder, with its curves where matplotlib is installed; gives its path.

    All of it is read from metrics.jsonl, config.json and machine.json; what they do not hold is left out.
    ValueError: no run, or a damaged file.
    """
    run_dir = Path(run_dir)
    metrics, config = read_metrics(run_dir), load_config(run_dir)
    curves = [f"`pip install 'ping-llm[plots]'`, then `ping-llm plot {run_dir}` draws them."]
    if importlib.util.find_spec("matplotlib") is not None:
        curves = [f"![{path.stem}]({path.relative_to(run_dir).as_posix()})" for path in plot_run(run_dir)]
    sections = {
        "": _summary(metrics, config.train if config else None),
        "## Fine-tuning\n\n": _finetuning(run_dir),
        "## Validation\n\n": _validation(metrics),
        "## Throughput\n\n": _throughput(metrics),
        "## Machine\n\n": _machines(run_dir),
        "## Curves\n\n": curves,
        "## Config\n\n": _config(config) if config else [],
    }
    text = f"# Run {run_dir.absolute().name}\n"
    text += "".join("\n" + title + "\n".join(lines) + "\n" for title, lines in sections.items() if lines)
    write_atomically(run_dir / REPORT_NAME, text)
    return run_dir / REPORT_NAME


def to_toml(values: dict[str, Any]) -> str:
    """A config as `config_to_dict` gives it, or a part of one, as TOML."""

    def lines(table: dict[str, Any]) -> str:
        texts = {
            k: json.dumps(v, ensure_ascii=False) if isinstance(v, str | bool) else repr(v) for k, v in table.items()
        }
        return "\n".join(f"{key} = {text}" for key, text in texts.items())

    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    tables = {key: table for key, table in values.items() if isinstance(table, dict) and table}
    blocks = [lines(plain)] if plain else []
    return "\n\n".join([*blocks, *(f"[{key}]\n{lines(table)}" for key, table in tables.items())])


def _summary(metrics: Metrics, train: TrainConfig | None) -> list[str]:
    """How long the run was, by its limits, and the best that it reached."""
    lengths: list[tuple[str, np.ndarray, float, Callable[[float], str]]] = [
        ("steps", metrics.steps, train.total_steps if train else 0, "{:,.0f}".format),
        ("tokens trained", metrics.known("tokens")[1], train.target_tokens if train else 0, "{:,.0f}".format),
        ("time in training steps", metrics.known("time_s")[1], 60 * train.max_minutes if train else 0, _duration),
    ]
    rows = [
        (label, form(values[-1]) + (f" (limit: {form(limit)})" if limit else ""))
        for label, values, limit, form in lengths
        if len(values)
    ]
    best = metrics.best_step()
    if best is not None:
        rows.append(("lowest validation loss", f"{_at(metrics, 'val_loss', best)} nats per token, step {best:,}"))
        for name in ("val_rtt_bits", "val_median_rel_error"):
            if value := _at(metrics, name, best):
                rows.append((f"{COLUMNS[name].label}, there", value))
    if "skipped_steps" in metrics.columns or metrics.skipped.any():
        rows.append(("skipped steps (gradients not finite)", f"{metrics.skipped.sum():,}"))
    if metrics.damaged:
        rows.append(("damaged lines of metrics.jsonl, left out", f"{metrics.damaged:,}"))
    return _table(("", ""), rows)


def finetune_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of what finetune.json holds: the rows that val is of, what was measured there, its value before and after."""
    names = {"new": "the new rows", "old": "the old rows"}
    rows = []
    for key, name in names.items():
        if key not in found:
            continue
        if found[key].get("samples"):
            name = "samples of the base"
        before, after = found[key]["before"], found[key]["after"]
        for column in (column for column in FINETUNED if column in before and column in after):
            values = (_number(float(one[column]) * COLUMNS[column].scale) for one in (before, after))
            rows.append((name, " ".join(COLUMNS[column].label.split()), *values))
    return rows


def _finetuning(run_dir: Path) -> list[str]:
    """What became of the knowledge of the base, if the run began with one; none where that was not measured."""
    path = run_dir / FINETUNE_NAME
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text())
        said = f"Begun with `{found['base']}`, step {found['base_step']:,}."
        return [said, "", *_table(("val of", "", "before", "after"), finetune_rows(found))]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; delete it to go on without it") from None


def _validation(metrics: Metrics) -> list[str]:
    """The evaluation with the lowest loss beside the last one."""
    best, evaluated = metrics.best_step(), [name for name in _VALIDATION if len(metrics.known(name)[0])]
    if not evaluated:
        return []
    last = max(int(metrics.known(name)[0][-1]) for name in evaluated)
    shown = {f"lowest loss (step {best:,})": best} if best is not None else {}
    shown[f"last (step {last:,})"] = last
    rows = [(COLUMNS[name].label, *(_at(metrics, name, step) for step in shown.values())) for name in evaluated]
    return _table(("", *shown), rows)


def _throughput(metrics: Metrics) -> list[str]:
    """Medians over the lines of the log, so that a slow first step, which compiles, hardly counts."""
    rows = []
    for name, form in _SPEEDS.items():
        values = metrics.known(name)[1] * COLUMNS[name].scale
        if len(values):
            rows.append(
                (COLUMNS[name].label, *(format(value, form) for value in np.quantile(values, (0.5, 0.05, 0.95))))
            )
    lines = _table(("", "median", "5 %", "95 %"), rows) if rows else []
    memory = metrics.known("peak_memory_gb")[1]
    if len(memory):
        lines += [""] * bool(lines) + [f"Peak memory: {memory.max():.1f} GB."]
    return lines


def _machines(run_dir: Path) -> list[str]:
    """A column for each machine. Known entries first, by their names, others as they are called; null is unknown."""
    machines = read_machines(run_dir)
    steps = [machine.pop("from_step", 0) for machine in machines]
    names = dict.fromkeys([*_MACHINE_NAMES, *sorted(set().union(*machines))])
    rows = [
        (_MACHINE_NAMES.get(name, name), *(_fact(name, machine.get(name)) for machine in machines)) for name in names
    ]
    rows = [row for row in rows if any(row[1:])]
    head = [f"after step {step:,}" for step in steps] if len(machines) > 1 else [""]
    return _table(("", *head), rows) if rows else []


def _fact(name: str, value: Any) -> str:
    """An entry of machine.json as people read it; empty if it is unknown."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "peak_flops" and isinstance(value, int | float):
        value = value / 1e12
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else _number(value) if isinstance(value, float) else str(value)


def _config(config: Config) -> list[str]:
    """What differs from the defaults, then everything; both can be pasted into a config file."""
    values, defaults = config_to_dict(config), config_to_dict(Config())
    changed = {}
    for name, value in values.items():
        if isinstance(value, dict):
            changed[name] = {key: v for key, v in value.items() if v != defaults[name][key]}
        elif value != defaults[name]:
            changed[name] = value
    toml = to_toml(changed)
    head = (
        ["Fields that differ from the defaults:", "```toml", toml, "```"] if toml else ["All fields are the defaults."]
    )
    everything = ["```toml", to_toml(values), "```"]
    return [*head, "", "<details><summary>All fields</summary>", "", *everything, "", "</details>"]


def _at(metrics: Metrics, name: str, step: int) -> str:
    """The value of a column of val at a step, in the unit of its label; empty if it was not logged there."""
    steps, values = metrics.known(name)
    found = values[steps == step]
    return _number(float(found[0]) * COLUMNS[name].scale) if len(found) else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; the first column to the left, numbers to the right."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def _number(value: float) -> str:
    """Four significant digits."""
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
