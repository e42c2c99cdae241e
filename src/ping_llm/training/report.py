"""A run folder in, its report.md out: what the run reached, how fast, on what machine, from what config."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.config import FIELDS, Config, config_from_dict, config_to_dict
from ping_llm.system.files import write_atomically
from ping_llm.training.log import MACHINE_NAME
from ping_llm.training.plots import Metrics, plot_run, read_metrics

REPORT_NAME = "report.md"
_CONFIG_NAME = "config.json"
_FIELD_NAMES = {"src": "source", "dst": "destination", "rtt": "RTT"}
_VALIDATION = {
    "val_loss": ("weighted loss (nats per token)", 1.0),
    **{f"val_loss_{name}": (f"{_FIELD_NAMES.get(name, name)} (nats per token)", 1.0) for name in FIELDS},
    "val_rtt_bits": ("bits per RTT", 1.0),
    "val_median_rel_error": ("median relative error of the RTT (%)", 100.0),
}
_SPEEDS = {
    "tokens_per_s": ("tokens/s", 1.0, ",.0f"),
    "mfu": ("model FLOPs utilisation (%)", 100.0, ".1f"),
    "data_wait_share": ("time waiting for data (%)", 100.0, ".2f"),
    "padding": ("padding (%)", 100.0, ".2f"),
}
_MACHINE_NAMES = {
    "device": "device",
    "processes": "processes",
    "host_cores": "cores of the host",
    "precision": "precision",
    "compiled": "compiled",
    "parameters": "parameters",
    "peak_flops": "peak of a device (TFLOP/s)",
    "torch": "PyTorch",
    "python": "Python",
}


def write_report(run_dir: Path) -> Path:
    """Writes report.md into a run folder, with its curves where matplotlib is installed; gives its path.

    All of it is read from metrics.jsonl, config.json and machine.json; what they do not tell is left out.
    ValueError: no run, or a file that is damaged.
    """
    run_dir = Path(run_dir)
    metrics, config = read_metrics(run_dir), _read_config(run_dir)
    machine = _read_object(run_dir / MACHINE_NAME, "remove it to report without it")
    sections = {
        "": _summary(metrics, config),
        "Validation": _validation(metrics),
        "Throughput": _throughput(metrics),
        "Machine": _machine(machine),
        "Curves": _curves(run_dir),
        "Config": _config(config),
    }
    text = f"# Run {run_dir.absolute().name}\n"
    for title, lines in sections.items():
        if lines:
            text += "\n" + (f"## {title}\n\n" if title else "") + "\n".join(lines) + "\n"
    path = run_dir / REPORT_NAME
    write_atomically(path, text)
    return path


def to_toml(values: dict[str, Any]) -> str:
    """A config as `config_to_dict` gives it, or a part of one, as TOML."""
    plain = [f"{key} = {_toml_value(value)}" for key, value in values.items() if not isinstance(value, dict)]
    blocks = ["\n".join(plain)] if plain else []
    for key, table in values.items():
        if isinstance(table, dict) and table:
            blocks.append(f"[{key}]\n" + "\n".join(f"{name} = {_toml_value(value)}" for name, value in table.items()))
    return "\n\n".join(blocks)


def _read_config(run_dir: Path) -> Config | None:
    path = run_dir / _CONFIG_NAME
    values = _read_object(path, "restore it, or remove it to report without it")
    if values is None:
        return None
    if not isinstance(values.get("config"), dict):
        raise ValueError(f"{path} is damaged; restore it, or remove it to report without it")
    return config_from_dict(values["config"], str(path))


def _read_object(path: Path, advice: str) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no such file."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged; {advice}")
    return values


def _summary(metrics: Metrics, config: Config | None) -> list[str]:
    """How long the run was, by its limits, and the best that it reached."""
    limits = (
        (config.train.total_steps, config.train.target_tokens, 60 * config.train.max_minutes) if config else (0, 0, 0)
    )
    ends = {"steps": (metrics.steps, _count), "tokens trained": (metrics.known("tokens")[1], _count)}
    ends["time in training steps"] = (metrics.known("time_s")[1], _duration)
    rows = [
        (label, form(values[-1]) + (f" (limit: {form(limit)})" if limit else ""))
        for (label, (values, form)), limit in zip(ends.items(), limits, strict=True)
        if len(values)
    ]
    best = metrics.best_step()
    if best is not None:
        rows.append(
            ("lowest validation loss", f"{_number(_at(metrics, 'val_loss', best))} nats per token, step {best:,}")
        )
        for name in ("val_rtt_bits", "val_median_rel_error"):
            label, scale = _VALIDATION[name]
            value = _at(metrics, name, best)
            rows += [(f"{label}, there", _number(value * scale))] if math.isfinite(value) else []
    if "skipped_steps" in metrics.columns or metrics.skipped.any():
        rows.append(("skipped steps (gradients not finite)", f"{metrics.skipped.sum():,}"))
    if metrics.damaged:
        rows.append(("damaged lines of metrics.jsonl, left out", f"{metrics.damaged:,}"))
    return _table(("", ""), rows)


def _validation(metrics: Metrics) -> list[str]:
    """The evaluation with the lowest loss beside the last one."""
    best, evaluated = metrics.best_step(), [name for name in _VALIDATION if len(metrics.known(name)[0])]
    if not evaluated:
        return []
    last = max(int(metrics.known(name)[0][-1]) for name in evaluated)
    shown = {f"lowest loss (step {best:,})": best} if best is not None else {}
    shown[f"last (step {last:,})"] = last
    rows = []
    for name in evaluated:
        label, scale = _VALIDATION[name]
        rows.append((label, *(_number(_at(metrics, name, step) * scale) for step in shown.values())))
    return _table(("", *shown), rows)


def _throughput(metrics: Metrics) -> list[str]:
    """Medians over the lines of the log: a slow first step, which compiles, does not weigh."""
    rows = []
    for name, (label, scale, form) in _SPEEDS.items():
        values = metrics.known(name)[1] * scale
        if len(values):
            rows.append((label, *(format(value, form) for value in np.quantile(values, (0.5, 0.05, 0.95)))))
    lines = _table(("", "median", "5 %", "95 %"), rows) if rows else []
    memory = metrics.known("peak_memory_gb")[1]
    if len(memory):
        lines += ["", f"Peak memory: {memory.max():.1f} GB."] if lines else [f"Peak memory: {memory.max():.1f} GB."]
    return lines


def _machine(machine: dict[str, Any] | None) -> list[str]:
    """Known entries first, by their names, others as they are called; null is unknown."""
    machine = {name: value for name, value in (machine or {}).items() if value is not None}
    if not machine:
        return []
    if isinstance(machine.get("peak_flops"), int | float):
        machine["peak_flops"] /= 1e12
    names = [name for name in _MACHINE_NAMES if name in machine] + sorted(machine.keys() - _MACHINE_NAMES.keys())
    return _table(("", ""), [(_MACHINE_NAMES.get(name, name), _text(machine[name])) for name in names])


def _curves(run_dir: Path) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return [f"`pip install 'ping-llm[plots]'`, then `ping-llm plot {run_dir}` draws them."]
    return [f"![{path.stem}]({path.relative_to(run_dir).as_posix()})" for path in plot_run(run_dir)]


def _config(config: Config | None) -> list[str]:
    """What differs from the defaults, then everything; both can be pasted into a config file."""
    if config is None:
        return []
    values, defaults = config_to_dict(config), config_to_dict(Config())
    changed = {name: _changed(value, defaults[name]) for name, value in values.items() if value != defaults[name]}
    head = ["Fields that differ from the defaults:", *_fenced(changed)] if changed else ["All fields are the defaults."]
    return [*head, "", "<details><summary>All fields</summary>", "", *_fenced(values), "", "</details>"]


def _changed(value: Any, default: Any) -> Any:
    """A value, or of a section the fields that are not the defaults."""
    return {key: v for key, v in value.items() if v != default[key]} if isinstance(value, dict) else value


def _fenced(values: dict[str, Any]) -> list[str]:
    return ["```toml", to_toml(values), "```"]


def _toml_value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)


def _at(metrics: Metrics, name: str, step: int) -> float:
    """The value of a column at a step, NaN if it was not logged there."""
    steps, values = metrics.known(name)
    found = values[steps == step]
    return float(found[0]) if len(found) else math.nan


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; the first column to the left, numbers to the right."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _number(value: float) -> str:
    """Four significant digits; empty for what is unknown."""
    return "" if math.isnan(value) else f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return _number(value) if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
