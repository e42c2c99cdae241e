"""The metrics of a training run in, pictures of its curves out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.system.axes import label_log_ticks
from ping_llm.system.files import try_folder
from ping_llm.training.metrics import COLUMNS, METRICS_NAME, Metrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS_NAME = "plots"
_TRAIN, _VAL, _SKIPPED, _BEST = "#1f6feb", "#d1660f", "#cf222e", "#57606a"
_BUCKETS = 700  # of a curve, two points each: about one a pixel
_MEAN_SHARE = 0.02  # of the lines of a run, to either side, go into the running mean
_FEW = 50  # points that are marked one by one
_MAX_NAME = 60  # characters of a run's name in a title
_TICK_STEPS = (1, 2, 2.5, 5, 10)
_COUNTS = {1e12: "trillions", 1e9: "billions", 1e6: "millions", 1e3: "thousands"}


@dataclass(frozen=True)
class _Panel:
    train: str = ""  # column of the training steps
    val: str = ""  # column of the evaluations
    log: bool = False
    smooth: bool = True  # the running mean is drawn over the faint values
    thousands: bool = False

    def curve(self, metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a column in the unit of the panel, without what its axis cannot show."""
        steps, values = metrics.known(name)
        shown = (values > 0) | (not self.log)
        scale = COLUMNS[self.train or self.val].scale
        return steps[shown], values[shown] * (scale / 1000 if self.thousands else scale)


_LOSSES = ("loss", "loss_src", "loss_dst", "loss_rtt", "loss_structure", "loss_time")
_PICTURES = {
    "loss": [_Panel(name, f"val_{name}", log=True) for name in _LOSSES],
    "validation": [_Panel(val="val_rtt_bits", log=True), _Panel(val="val_median_rel_error", log=True)],
    "optimizer": [_Panel("lr", smooth=False), _Panel("grad_norm", log=True)],
    "throughput": [_Panel("tokens_per_s", thousands=True), _Panel("mfu"), _Panel("data_wait_share")],
}


def plot_run(run_dir: Path, out: Path | None = None) -> list[Path]:
    """Draws the curves of a run as PNGs into `out`, the run's own plots folder if absent; gives their paths.

    What the run did not log is left out. ValueError: no such run, or nothing in it to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir)
    out = run_dir / PLOTS_NAME if out is None else Path(out)
    try_folder(out, *(f"{picture}.png" for picture in _PICTURES))
    name = run_dir.absolute().name
    name = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"
    paths = []
    for picture, all_panels in _PICTURES.items():
        panels = [p for p in all_panels if any(len(p.curve(metrics, name)[0]) for name in (p.train, p.val))]
        if panels:
            paths.append(out / f"{picture}.png")
            _draw(metrics, panels, f"{name}: {picture}", paths[-1], columns=3 if picture == "loss" else 1)
    if not paths:
        raise ValueError(f"{run_dir / METRICS_NAME} has no loss, no learning rate and no speed; nothing to draw")
    return paths


def thin(steps: np.ndarray, values: np.ndarray, buckets: int = _BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """At most two points a bucket of a curve (n,): its least and its largest value, in the order of their steps."""
    if len(steps) <= 2 * buckets:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), buckets)
    kept = np.unique([part[pick(values[part])] for part in parts for pick in (np.argmin, np.argmax)])
    return steps[kept], values[kept]


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean (n,) of the values (n,) around each; fewer at the start, where a loss falls steeply, and at the end."""
    places = np.arange(len(values))
    half = np.minimum(places, int(_MEAN_SHARE * len(values)))
    low, high = places - half, np.minimum(places + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[high] - sums[low]) / (high - low)


def _draw(metrics: Metrics, panels: list[_Panel], title: str, path: Path, columns: int) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (4.2 * columns, 3.1 * rows + 0.9) if columns > 1 else (8.4, 2.4 * rows + 1.3)
    figure = plt.figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1))
    first = None
    for i, panel in enumerate(panels):
        axes = first = figure.add_subplot(rows, columns, i + 1, sharex=first)
        _draw_panel(axes, metrics, panel)
        if i < columns:
            _label_tokens(axes, metrics)
        lowest = i + columns >= len(panels)
        axes.tick_params(labelbottom=lowest)
        axes.set_xlabel("step" if lowest else "")
    legends = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: line for lines, labels in legends for line, label in zip(lines, labels, strict=True)}
    figure.suptitle(title, fontsize=12, parse_math=False)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_panel(axes: Axes, metrics: Metrics, panel: _Panel) -> None:
    """The values of the training steps with their running mean, the evaluations, and the lowest loss of those."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    (steps, values), (val_steps, val_values) = (panel.curve(metrics, name) for name in (panel.train, panel.val))
    if len(steps):
        few = len(steps) <= _FEW
        smooth = panel.smooth and not few
        style: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if smooth else {"linewidth": 1.6}
        style |= {"label": "training" if panel.smooth else None, "marker": "o" if few else "", "markersize": 3}
        axes.plot(*thin(steps, values), color=_TRAIN, **style)
        if smooth:
            # On a log axis the mean of the logs: a spike weighs as much as it looks.
            mean = np.exp(running_mean(np.log(values))) if panel.log else running_mean(values)
            axes.plot(*thin(steps, mean), color=_TRAIN, linewidth=1.8, label="training, running mean")
        skipped = metrics.steps[metrics.skipped > 0]
        if panel.train == "grad_norm" and len(skipped):
            style = {"color": _SKIPPED, "markersize": 5, "label": f"skipped steps ({metrics.skipped.sum():,})"}
            style |= {"transform": axes.get_xaxis_transform(), "clip_on": False}  # at the bottom
            axes.plot(skipped, np.full(len(skipped), 0.03), "x", **style)
    if len(val_steps):
        style = {"marker": "o" if len(val_steps) <= _FEW else "", "markersize": 3, "linewidth": 0.9}
        axes.plot(val_steps, val_values, color=_VAL, label="validation", **style)
        best = metrics.best_step()
        if best is not None:
            axes.axvline(best, color=_BEST, linestyle="--", linewidth=1, label=f"lowest validation loss: step {best:,}")
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        label_log_ticks(axes.yaxis, low, high)
        if 5 <= high / low < 30:  # about as many numbers, whatever it spans
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        elif high / low > 3000:
            axes.yaxis.set_major_locator(LogLocator())
    else:
        top = max([*values, *val_values])
        axes.set_ylim(0, 1.08 * top if top > 0 else 1)
    last = max(metrics.steps[-1], 1)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=_TICK_STEPS))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    label = COLUMNS[panel.train or panel.val].label
    axes.set_ylabel(f"{label} (thousands)" if panel.thousands else label)
    axes.grid(color="#eaeef2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_tokens(axes: Axes, metrics: Metrics) -> None:
    """A second axis above: tokens trained so far, where they are known."""
    from matplotlib.ticker import MaxNLocator

    steps, tokens = (np.append(0, known) for known in metrics.known("tokens"))
    if tokens[-1] == 0:
        return
    unit = next((unit for unit in _COUNTS if tokens[-1] >= unit), 1)
    ticks = MaxNLocator(4, steps=_TICK_STEPS).tick_values(0, tokens[-1])
    ticks = ticks[ticks <= tokens[-1]]
    above = axes.secondary_xaxis("top")
    above.set_xticks(np.interp(ticks, tokens, steps), [f"{tick / unit:g}" for tick in ticks])
    above.set_xlabel(f"tokens ({_COUNTS[unit]})" if unit > 1 else "tokens", fontsize=9)
    above.tick_params(labelsize=8)
    above.spines["top"].set_color("#d0d7de")
