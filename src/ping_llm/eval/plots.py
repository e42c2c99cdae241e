"""The results of PingBench in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.eval.metrics import ERROR_LEVELS, PIT_BINS
from ping_llm.eval.queries import DRAWS, FAMILIES, NO_DRAW, VAL_SPLITS
from ping_llm.eval.report import cell_name, subject
from ping_llm.system.axes import label_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAR = ("test-s5", "external")  # splits far from the training data: their calibration has a picture of its own
SHOWN_K = 10  # of the primary result
_COLORS = {"global_median": "#bfc5cc", "pair_history": "#9a6700", "lightgbm": "#1a7f37", "stack": "#8250df"}
_COLORS |= {"true distribution": "#d1660f"}
_MODEL_COLORS = ("#1f6feb", "#bf3989", "#54aeff")
_TITLES = {
    "test-s1": "S1 pair, future",
    "test-s2": "S2 new pair",
    "test-s3": "S3 new source",
    "test-s4": "S4 new destination",
    "test-s5": "S5 both new",
    "external": "other rows",
}


def plot_results(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Draws what there is to draw as PNGs into a folder; gives their paths."""
    figures = {
        "primary": _primary(results),
        "ratio_by_cell": _ratios(results),
        "error_cdf": _error_cdfs(results),
        "error_by_k": _errors_by_k(results),
        "calibration": _calibration(results, far=False),
        "calibration_far": _calibration(results, far=True),
        "loss_per_field": _losses(results),
        "densities": _densities(results),
    }
    drawn = {out / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for path, figure in drawn.items():
        figure.savefig(path, dpi=120)
    return list(drawn)


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure, and (rows, columns) axes, of which `count` are drawn in."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for number, axis in enumerate(axes.flat):
        axis.spines[["top", "right"]].set_visible(False)
        if number >= count:
            axis.set_axis_off()
    return figure, axes


def _shown(results: Mapping[str, Any]) -> dict[str, str]:
    """Methods that are drawn, each with its color: the model, some baselines, and the true distribution."""
    methods = results["methods"]
    models = [name for name, one in methods.items() if one["kind"] == "model"]
    others = {name: color for name, color in _COLORS.items() if name in methods}
    return dict(zip(models, _MODEL_COLORS, strict=False)) | others


def _tested(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of pings that nothing was fitted on; those of val where there are no others."""
    cells = [cell for cell in results["cells"] if cell["family"] == FAMILIES[0]]
    return [cell for cell in cells if cell["split"] not in VAL_SPLITS] or cells


def _cells(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One of each split: those given SHOWN_K pings to other destinations."""
    return [cell for cell in _tested(results) if (cell["k"], cell["draw"]) == (SHOWN_K, "other")]


def _splits(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["split"] for cell in _tested(results)))


def _title(split: str) -> str:
    return _TITLES.get(split, split)


def _finish(figure: Figure, axes: np.ndarray, x: str = "", y: str = "", columns: int = 4) -> Figure:
    """Labels on the outer axes, and one legend for all."""
    for axis in axes[-1] if x else ():
        axis.set_xlabel(x)
    for axis in axes[:, 0] if y else ():
        axis.set_ylabel(y)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, **place)
    return figure


def _ratios(results: Mapping[str, Any]) -> Figure | None:
    """Split × cell: the CRPS ratio of the model, or without one of the stack, to the comparator."""
    name = subject(results) or ("stack" if "stack" in results["methods"] else None)
    if name is None:
        return None
    splits, columns = _splits(results), list(dict.fromkeys(map(cell_name, _tested(results))))
    if not splits:
        return None
    figure, ((axis,),) = _panels(1, 1, 2.6 + 0.78 * len(columns), 1.7 + 0.55 * len(splits))
    log_ratio = np.full((len(splits), len(columns)), np.nan)
    for cell in _tested(results):
        line, (row, column) = cell["methods"][name], (splits.index(cell["split"]), columns.index(cell_name(cell)))
        if line["crps_ratio"]:
            log_ratio[row, column] = np.log2(line["crps_ratio"])
            interval = line["ratio_interval"]
            text = f"{line['crps_ratio']:.2f}" + ("*" if interval and interval[1] < 1 else "")
            color = "white" if abs(log_ratio[row, column]) > 0.65 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
    axis.spines[:].set_visible(True)
    image = axis.imshow(log_ratio, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=9, rotation=30, ha="right")
    axis.set_yticks(range(len(splits)), map(_title, splits), fontsize=9)
    figure.suptitle(f"CRPS of {name}\n÷ the baseline that was best on val\n* = 95 % interval below 1", fontsize=11)
    bar = figure.colorbar(image, ticks=[-1, -0.5, 0, 0.5, 1], pad=0.01)
    bar.ax.set_yticklabels(["0.5", "0.7", "1", "1.4", "2"])
    return figure


def _primary(results: Mapping[str, Any]) -> Figure | None:
    """The ten numbers, with their intervals, of each method that is no baseline."""
    summary = results["primary"]
    kinds = {name: one["kind"] for name, one in results["methods"].items()}
    shown = {name: color for name, color in _shown(results).items() if kinds[name] != "baseline"}
    if not shown or not summary["cells"]:
        return None
    names = [f"{_title(cell['split'])}, {cell_name(cell)}" for cell in summary["cells"]]
    figure, ((axis,),) = _panels(1, 1, 8.4, 1.6 + 0.42 * len(names))
    for number, (name, color) in enumerate(shown.items()):
        ratios, place = summary["methods"][name], np.arange(len(names)) + 0.18 * (number - (len(shown) - 1) / 2)
        for y, interval in zip(place, ratios["interval"], strict=True):
            if interval:
                axis.plot(interval, [y, y], color=color, linewidth=1.4, alpha=0.7)
        axis.plot(ratios["ratio"], place, "o", color=color, markersize=5, label=name)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", ylim=(len(names) - 0.5, -0.5), title="CRPS ÷ that of the baseline that was best on val")
    axis.set_yticks(range(len(names)), names, fontsize=9)
    label_log_ticks(axis.xaxis, *axis.get_xlim())
    axis.grid(alpha=0.25, axis="x")
    return _finish(figure, np.array([[axis]]))


def _error_cdfs(results: Mapping[str, Any]) -> Figure | None:
    cells = _cells(results)
    if not cells:
        return None
    figure, axes = _panels(len(cells), 3, 4.2, 3.3)
    for axis, cell in zip(axes.flat, cells, strict=False):
        for name, color in _shown(results).items():
            errors = np.array(cell["methods"][name]["error_quantiles"], dtype=float)
            axis.plot(np.maximum(errors, 1e-4), ERROR_LEVELS, color=color, linewidth=1.6, label=name)
        axis.set(xscale="log", xlim=(1e-3, 10), ylim=(0, 1), title=_title(cell["split"]))
        axis.set_xticks([1e-3, 1e-2, 0.1, 1, 10], ["0.1 %", "1 %", "10 %", "100 %", "1000 %"])
        axis.grid(alpha=0.25)
    figure.suptitle(f"Relative error of the predicted median, given {SHOWN_K} pings to other destinations", fontsize=11)
    return _finish(figure, axes, y="share of queries below")


def _errors_by_k(results: Mapping[str, Any]) -> Figure | None:
    splits = _splits(results)
    if not splits:
        return None
    figure, axes = _panels(2 * len(splits), len(splits), 3.4, 2.9)
    for split, both in zip(splits, axes.T, strict=True):
        for axis, draw in zip(both, DRAWS, strict=True):
            cells = [one for one in _tested(results) if one["split"] == split and one["draw"] in (NO_DRAW, draw)]
            for name, color in _shown(results).items():
                errors = [100 * (cell["methods"][name]["median_rel_error"] or np.nan) for cell in cells]
                axis.plot(range(len(cells)), errors, "o-", color=color, markersize=3.5, linewidth=1.6, label=name)
            axis.set_yscale("log")
            axis.set_xticks(range(len(cells)), [cell["k"] for cell in cells])
            axis.set_title(f"{_title(split)}, {draw}", fontsize=10)
            axis.grid(alpha=0.25)
        low, high = np.transpose([axis.get_ylim() for axis in both])
        for axis in both:
            axis.set_ylim(low.min(), high.max())
            label_log_ticks(axis.yaxis, low.min(), high.max())
    return _finish(figure, axes, "earlier pings given", "median relative error (%)")


def _calibration(results: Mapping[str, Any], far: bool) -> Figure | None:
    """Above how often the answer lies below each quantile, below the histogram of the PIT."""
    cells = [cell for cell in _cells(results) if (cell["split"] in FAR) == far]
    if not cells:
        return None
    figure, axes = _panels(2 * len(cells), max(2, len(cells)), 3.6, 3.0)
    edges = np.linspace(0, 1, PIT_BINS + 1)
    for column, cell in enumerate(cells):
        reliability, histogram = axes.flat[column], axes.flat[len(cells) + column]
        reliability.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
        histogram.axhline(1, color="black", linewidth=0.8, linestyle=":")
        for name, color in _shown(results).items():
            if name != "global_median":
                shares = np.array(cell["methods"][name]["pit_histogram"], dtype=float)
                reliability.plot(edges, np.r_[0, np.cumsum(shares)], color=color, linewidth=1.6, label=name)
                histogram.stairs(shares * PIT_BINS, edges, color=color, linewidth=1.4)
        reliability.set_title(_title(cell["split"]), fontsize=11)
        reliability.set(xlim=(0, 1), ylim=(0, 1), xlabel="quantile")
        histogram.set(xlim=(0, 1), ylim=(0, None), xlabel="PIT")
    axes.flat[0].set_ylabel("share of answers below")
    axes.flat[len(cells)].set_ylabel("density (1 = calibrated)")
    where = " far from the training data" if far else ""
    figure.suptitle(f"Calibration{where}, given {SHOWN_K} pings to other destinations", fontsize=11)
    return _finish(figure, axes, columns=4 if len(cells) > 2 else 2)


def _losses(results: Mapping[str, Any]) -> Figure | None:
    losses = results.get("loss_per_field")
    if not losses:
        return None
    from matplotlib import colormaps

    names = list(dict.fromkeys(name for line in losses.values() for name in line))
    figure, ((axis,),) = _panels(1, 1, 8, 3.6)
    width = 0.8 / len(losses)
    for number, (part, line) in enumerate(losses.items()):
        at = np.arange(len(names)) + (number - (len(losses) - 1) / 2) * width
        color = colormaps["viridis"](0.9 * number / max(1, len(losses) - 1))
        axis.bar(at, [line.get(name, np.nan) for name in names], width * 0.92, color=color, label=part)
    axis.set_xticks(range(len(names)), [{"src": "source", "dst": "destination", "rtt": "RTT"}.get(n, n) for n in names])
    axis.set(ylabel="nats a token", title="Loss per field, fields in any order, as in training")
    axis.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def _densities(results: Mapping[str, Any]) -> Figure | None:
    examples = results.get("examples")
    if not examples:
        return None
    figure, axes = _panels(len(examples), 2, 5.6, 2.5)
    for axis, example in zip(axes.flat, examples, strict=False):
        at = np.asarray(example["rtt_ms_at"])
        for (name, density), color in zip(example["density"].items(), (_MODEL_COLORS[0], "#8250df"), strict=False):
            axis.plot(at, density, color=color, linewidth=1.5, label=name)
            axis.fill_between(at, np.asarray(density, dtype=float), color=color, alpha=0.1, linewidth=0)
        axis.axvline(example["rtt_ms"], color="#d1660f", linewidth=1.4, linestyle="--", label="observed")
        axis.set(xscale="log", ylim=(0, None), xlim=(at[0], at[-1]))
        label_log_ticks(axis.xaxis, at[0], at[-1])
        axis.set_title(f"{_title(example['split'])}: {example['title']}", fontsize=9)
    return _finish(figure, axes, "RTT (ms)", "density per log-ms")
