"""Groups of runs in; a picture of their losses on val against tokens and against FLOPs out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ping_llm.eval.outcomes import Group, Outcome
from ping_llm.system.axes import label_log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f6feb", "#d1660f", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#0a7c86", "#57606a")
_STYLES = ("-", "--", ":", "-.")  # by turns, where colors are used again
_LOSSES = {"val_loss": "loss on val\n(nats per token)", "val_loss_rtt": "RTT on val\n(nats per token)"}
_COUNTS = {1e12: "trillions", 1e9: "billions", 1e6: "millions", 1e3: "thousands"}
_MAX_NAME = 60


def curve(outcome: Outcome, loss: str, against: str) -> tuple[np.ndarray, np.ndarray]:
    """Where a run was evaluated, in `tokens` or `flops`, and its losses there; without its beginning."""
    steps, values = outcome.metrics.known(loss)
    if against == "flops":
        places = np.array([outcome.flops(int(step)) for step in steps])
    else:
        known, tokens = outcome.metrics.known("tokens")
        places = np.interp(steps, known, tokens) if len(known) else np.zeros(len(steps))
    return places[places > 0], values[places > 0]


def mean_curve(group: Group, loss: str, against: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the runs of a group at the steps after which all of them were evaluated; their places are means too."""
    found = []
    for one in group.outcomes:
        places, values = curve(one, loss, against)
        steps = one.metrics.known(loss)[0]
        found.append(
            dict(zip(steps[len(steps) - len(places) :].tolist(), zip(places, values, strict=True), strict=True))
        )
    steps_of_all = sorted(set.intersection(*map(set, found)))
    points = np.array([[own[step] for step in steps_of_all] for own in found]).reshape(len(found), -1, 2)
    return points[..., 0].mean(axis=0), points[..., 1].mean(axis=0)


def plot_curves(groups: Sequence[Group], path: Path) -> bool:
    """Draws a PNG; whether any run was evaluated."""
    from matplotlib.figure import Figure

    losses = [name for name in _LOSSES if any(len(curve(o, name, "tokens")[0]) for g in groups for o in g.outcomes)]
    if not losses:
        return False
    figure = Figure(figsize=(10.4, 3.3 * len(losses) + 0.9), layout="constrained")
    grid = figure.subplots(len(losses), 2, squeeze=False, sharey="row", sharex="col")
    for axes_of_loss, loss in zip(grid, losses, strict=True):
        for axes, against in zip(axes_of_loss, ("tokens", "flops"), strict=True):
            _draw(axes, groups, loss, against, _unit(groups, loss, against))
        axes_of_loss[0].set_ylabel(_LOSSES[loss])
    for axes, against in zip(grid[-1], ("tokens", "flops"), strict=True):
        axes.set_xlabel(_name(against, _unit(groups, losses[-1], against)))
    lines, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    if any(len(group.outcomes) > 1 for group in groups):
        figure.suptitle("thin: runs; bold: their mean over seeds", fontsize=9, color="#57606a")
    figure.savefig(path, dpi=130)
    return True


def _draw(axes: Axes, groups: Sequence[Group], loss: str, against: str, unit: float) -> None:
    """A thin line for each run and a bold one for each group, on logarithmic axes."""
    shown: list[np.ndarray] = []
    for number, group in enumerate(groups):
        color = COLORS[number % len(COLORS)]
        style = _STYLES[number // len(COLORS) % len(_STYLES)]
        several = len(group.outcomes) > 1
        for outcome in group.outcomes if several else ():
            places, values = curve(outcome, loss, against)
            axes.plot(places / unit, values, color=color, linestyle=style, linewidth=0.8, alpha=0.35)
        places, values = mean_curve(group, loss, against)
        if not len(places):
            continue
        name = group.name if len(group.name) <= _MAX_NAME else f"{group.name[: _MAX_NAME - 1]}…"
        marker = "o" if len(places) <= 30 else ""
        axes.plot(
            places / unit, values, color=color, linestyle=style, linewidth=1.8, label=name, marker=marker, markersize=3
        )
        shown.append(places / unit)
    axes.set_xscale("log")
    axes.set_yscale("log")
    label_log_ticks(axes.yaxis, *axes.get_ylim())
    if shown:
        label_log_ticks(axes.xaxis, *axes.get_xlim())
    axes.grid(color="#eaeef2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(groups: Sequence[Group], loss: str, against: str) -> float:
    """What numbers on the axis are counted in, so that they are short."""
    last = max(
        (places[-1] for g in groups for o in g.outcomes if len(places := curve(o, loss, against)[0])), default=1.0
    )
    if against == "flops":
        return 10.0 ** (3 * (np.floor(np.log10(last)) // 3))
    return next((unit for unit in _COUNTS if last >= unit), 1.0)


def _name(against: str, unit: float) -> str:
    if against == "tokens":
        return f"tokens ({_COUNTS[unit]})" if unit in _COUNTS else "tokens"
    return f"FLOPs of training ($10^{{{round(np.log10(unit))}}}$)"
