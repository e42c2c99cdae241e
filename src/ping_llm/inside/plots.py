"""What was found within a model in, pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.config import FIELDS
from ping_llm.inside.attention import AGES, BYTES, AttentionByField
from ping_llm.inside.path import TokenPath
from ping_llm.inside.prefixes import PrefixMap
from ping_llm.system.axes import label_log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"structure": "#57606a", "src": "#1f6feb", "dst": "#d1660f", "time": "#1a7f37", "rtt": "#8250df"}
NAMES = {"src": "source", "dst": "destination", "rtt": "RTT"}
_GRID, _TRAIL, _TEXT = "#eaeef2", "#c8ced6", "#24292f"
_PANELS = 6  # depths or layers that are drawn, evenly spaced
_KINDS = {
    "embedding": "embedding of the prefix",
    "state": "stream after the prefix",
    "answer": "stream where the RTT is predicted",
}
_LABELS = 8  # prefixes of a map that are named
_DPI = 130


def plot_path(path: TokenPath, file: Path, title: str) -> Path:
    """A panel for each depth: the tokens of the measurement, and in grey where each was in the panel before."""
    from matplotlib.figure import Figure

    depths = _spread(len(path.places))
    columns = min(3, len(depths))
    rows = -(-len(depths) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.7 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low, high = path.places.reshape(-1, 2).min(axis=0), path.places.reshape(-1, 2).max(axis=0)
    margin = 0.06 * (high - low)
    for number, axes in enumerate(grid.flat):
        if number >= len(depths):
            axes.set_axis_off()
            continue
        depth = depths[number]
        axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        here, before = path.places[depth], path.places[depths[number - 1]] if number else None
        if before is not None:
            axes.plot(*np.stack([before, here]).transpose(2, 0, 1), color=_TRAIL, linewidth=0.8, zorder=1)
        for name, color in COLORS.items():
            chosen = [i for i, of in enumerate(path.fields) if of == name]
            axes.plot(
                *here[chosen].T, "o", color=color, markersize=4.5, label=NAMES.get(name, name) if chosen else None
            )
        axes.set_title("before block 1" if depth == 0 else f"after block {depth}", fontsize=10)
        _plain(axes)
    for axes in _number_lowest(grid, len(depths)):
        axes.set_xlabel(f"component 1 ({path.shares[0]:.0%} of the variance)", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"component 2 ({path.shares[1]:.0%})", fontsize=9)
    _legend(figure, grid, 5)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.draw_without_rendering()  # where names have room is known once all else has its place
    roles_first = sorted(range(len(path.names)), key=lambda i: (path.fields[i] != "structure", i))
    for depth, axes in zip(depths, grid.flat, strict=False):
        _label(axes, path.places[depth], path.names, roles_first, [COLORS[name] for name in path.fields])
    figure.savefig(file, dpi=_DPI)
    return file


def plot_attention(found: AttentionByField, file: Path, title: str) -> Path:
    """For byte 1 and byte 2 of the RTT a table of shares in percent: layers × the fields of three kinds of measurements."""
    from matplotlib.figure import Figure

    layers, fields = len(found.shares), len(FIELDS)
    figure = Figure(figsize=(11.4, 2 * (0.34 * (layers + 1) + 1.1) + 0.8), layout="constrained")
    groups = ("its own measurement", "earlier ones, same destination", "earlier ones, other destinations")
    for byte, axes in enumerate(figure.subplots(2, 1)):
        rows = np.concatenate([found.shares[:, byte], found.tokens[None, byte]])  # (L + 1, A, 2, F)
        own, earlier = rows[:, 0].sum(axis=1), rows[:, 1:].sum(axis=1)  # (L + 1, F), (L + 1, 2, F)
        percent = 100 * np.concatenate([own, earlier[:, 1], earlier[:, 0]], axis=1)
        _table(axes, percent, found.shares.max() * 100)
        axes.set_yticks(range(layers + 1), [*(f"layer {i + 1}" for i in range(layers)), "if all alike"], fontsize=9)
        axes.set_xticks(range(3 * fields), [NAMES.get(name, name) for name in FIELDS] * 3, fontsize=8)
        axes.axhline(layers - 0.5, color="white", linewidth=4)
        for group, text in enumerate(groups):
            axes.text(fields * (group + 0.5) - 0.5, -0.72, text, ha="center", va="bottom", fontsize=9, color=_TEXT)
            if group:
                axes.axvline(fields * group - 0.5, color="white", linewidth=5)
        axes.set_title(f"where {BYTES[byte]} of the RTT is predicted", fontsize=10, pad=24, loc="left")
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(file, dpi=_DPI)
    return file


def plot_ages(found: AttentionByField, file: Path, title: str) -> Path:
    """For layers, and for a head that looks at all tokens alike, shares in percent for byte 1: field × age."""
    from matplotlib.figure import Figure

    layers = _spread(len(found.shares), _PANELS - 1)
    panels = {f"layer {layer + 1}": found.shares[layer, 0] for layer in layers} | {"if all alike": found.tokens[0]}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.5 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    shares = {name: 100 * panel.sum(axis=1).T for name, panel in panels.items()}  # (F, A): over DESTINATIONS
    for axes, (name, percent) in zip(grid.flat, shares.items(), strict=False):
        _table(axes, percent, max(one.max() for one in shares.values()))
        axes.set_title(name, fontsize=10)
        axes.set_yticks(range(len(FIELDS)), [NAMES.get(field, field) for field in FIELDS], fontsize=9)
        axes.set_xticks(range(len(AGES)), AGES, fontsize=9)
    for axes in grid.flat[len(shares) :]:
        axes.set_axis_off()
    _number_lowest(grid, len(shares))
    figure.supxlabel("how many measurements before", fontsize=9)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(file, dpi=_DPI)
    return file


def plot_prefixes(maps: Sequence[PrefixMap], file: Path, title: str) -> Path:
    """A panel for each map: a point for each prefix, colored by the median RTT; those with the most replies are named."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    columns = 2 if len(maps) > 1 else 1
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.7 * rows + 0.6), layout="constrained")
    medians = np.concatenate([one.prefixes.median_ms for one in maps])
    low, high = np.quantile(medians, (0.02, 0.98))
    low, high = max(low, 1e-3), max(high, low * 1.01, 1.1e-3)
    norm = LogNorm(low, high)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, one in zip(grid.flat, maps, strict=False):
        replies = one.prefixes.replies
        sizes = 14 + 16 * np.log10(np.maximum(replies, 1))
        style: dict[str, Any] = {"cmap": "viridis_r", "norm": norm, "edgecolors": "white", "linewidths": 0.5}
        image = axes.scatter(*one.places.T, c=one.prefixes.median_ms, s=sizes, **style)
        family = {"ipv4": "IPv4", "ipv6": "IPv6"}[one.prefixes.ends[0].family]
        told = f"the nearest five explain {max(one.explained, 0):.0%} of the variance of log median RTT"
        axes.set_title(f"{len(replies)} prefixes of {family}: {_KINDS[one.of]}\n{told}", fontsize=9)
        axes.set_xlabel(f"component 1 ({one.shares[0]:.0%} of the variance)", fontsize=9)
        axes.set_ylabel(f"component 2 ({one.shares[1]:.0%})", fontsize=9)
        _plain(axes)
    for axes in grid.flat[len(maps) :]:
        axes.set_axis_off()
    of_rows = any(one.prefixes.replies.any() for one in maps)
    label = "median RTT (ms) in the rows" if of_rows else "median RTT (ms) that the model expects"
    bar = figure.colorbar(image, ax=grid, shrink=0.7, extend="both", label=label, pad=0.01)
    label_log_ticks(bar.ax.yaxis, low, high)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.draw_without_rendering()
    for axes, one in zip(grid.flat, maps, strict=False):
        names = [str(end) for end in one.prefixes.ends]
        order = np.argsort(-one.prefixes.replies, kind="stable")[:_LABELS].tolist()
        _label(axes, one.places, names, order, [_TEXT] * len(names))
    figure.savefig(file, dpi=_DPI)
    return file


def _spread(count: int, most: int = _PANELS) -> list[int]:
    """At most so many of the numbers 0 to count − 1, evenly spaced, the first and the last among them."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def _number_lowest(grid: np.ndarray, count: int) -> list[Axes]:
    """The lowest panels of each column, of the `count` that are drawn in, with numbers at their axes."""
    lowest = list(grid.flat[max(count - grid.shape[1], 0) : count])
    for axes in lowest:
        axes.tick_params(labelbottom=True)
    return lowest


def _table(axes: Axes, percent: np.ndarray, most: float) -> None:
    """A heat map with its numbers; the square root of a share is what its color shows."""
    from matplotlib.colors import PowerNorm

    axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, most), aspect="auto")
    for (row, column), value in np.ndenumerate(percent):
        text = "" if value < 0.05 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
        color = "white" if value > 0.45 * most else _TEXT
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _label(axes: Axes, places: np.ndarray, names: Sequence[str], order: Sequence[int], colors: Sequence[str]) -> None:
    """Names beside points, in this order; one that would lie on an earlier one is left out."""
    from matplotlib.patheffects import withStroke

    taken: list[Any] = []
    middle = np.mean(axes.get_xlim())
    for i in order:
        left = places[i][0] < middle or len(names[i]) < 8
        style: dict[str, Any] = {"fontsize": 7, "color": colors[i], "zorder": 3, "ha": "left" if left else "right"}
        style["path_effects"] = [withStroke(linewidth=2, foreground="white")]
        text = axes.annotate(names[i], places[i], (4 if left else -4, 3), textcoords="offset points", **style)
        box = text.get_window_extent().expanded(1.02, 1.05)
        if any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)


def _plain(axes: Axes) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _legend(figure: Figure, grid: np.ndarray, columns: int) -> None:
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, **place)
