"""RTT distributions in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ping_llm.system.axes import label_log_ticks
from ping_llm.system.files import try_file

_COLORS = ("#1f6feb", "#8250df", "#1a7f37", "#bf3989", "#57606a", "#0e8a8a", "#9a6700", "#cf222e")
_TRUTH = "#d1660f"
_BINS = 80
_LEAST_BIN = 0.002  # in log-ms, four codes: the density is averaged over bins, finer ones would show single codes
_UNEVEN = 15  # ×; on a linear axis the flatter densities would vanish


class Drawable(Protocol):
    """The distribution of one result: `RTTDistribution` and the true one of a synthetic Internet are such."""

    @property
    def p_fail(self) -> float: ...
    @property
    def median(self) -> float: ...
    def cdf(self, rtt_ms: Any) -> Any: ...
    def quantile(self, q: Any) -> Any: ...


def check_picture(path: Path, distributions: int) -> None:
    """ValueError, or ModuleNotFoundError without matplotlib, before any work is done, if `plot_rtt` could not draw there."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{path}: a picture is drawn as .png, .svg, .pdf or one of {', '.join(sorted(kinds))}")
    if distributions > len(_COLORS):
        raise ValueError(f"{distributions} distributions are too many for one picture; draw at most {len(_COLORS)}")
    try_file(path)


def plot_rtt(shown: Mapping[str, Drawable], path: Path, title: str, truth: Drawable | None = None) -> None:
    """Draws the densities of one to eight distributions over log-RTT, each with median, 5–95 % filled and P(fail) in the
    legend, and the true one beside them, if it is given.

    Pings that fail with certainty have no density and stand in the legend alone. Where peaks differ by more than 15 ×,
    density is on a log axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if len(shown) > len(_COLORS):
        raise ValueError(
            f"{title}: {len(shown)} distributions are too many for one picture; draw at most {len(_COLORS)}"
        )
    if all(one.p_fail >= 1 for one in shown.values()):
        raise ValueError(f"{title}: every ping fails with certainty, so there is no RTT to draw")
    drawn = [(name, one, color) for color, (name, one) in zip(_COLORS, shown.items(), strict=False)]
    drawn += [("true distribution", truth, _TRUTH)] if truth is not None else []
    figure, axes = plt.subplots(figsize=(8, 4.2 + 0.2 * len(drawn)), layout="constrained")
    wide = max(len(name) for name, _, _ in drawn)
    peaks = [peak for name, one, color in drawn if (peak := _draw(axes, one, name.ljust(wide), color))]
    axes.set_xscale("log")
    axes.set(xlabel="RTT (ms)", ylabel="density per log-ms", ylim=(0, None))
    axes.set_title(title, fontsize=10)
    if max(peaks) > _UNEVEN * min(peaks):
        axes.set_yscale("log")
        axes.set_ylim(min(peaks) / 20, max(peaks) * 1.5)
    label_log_ticks(axes.xaxis, *axes.get_xlim())
    figure.legend(loc="outside lower left", frameon=False, prop={"family": "monospace", "size": 8})
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def log_density(one: Drawable) -> tuple[np.ndarray, np.ndarray]:
    """RTTs in ms, at most 80, around all but 1 % of the answers, and the density per log-ms given an answer, as averages
    over bins in whose middle they stand; (b,) each."""
    start, end = np.log(one.quantile(0.005)), np.log(one.quantile(0.995))  # a tenth more is shown on either side
    margin = max(0.1 * (end - start), 0.01)
    count = min(_BINS, int((end - start + 2 * margin) / _LEAST_BIN))
    edges = np.exp(np.linspace(start - margin, end + margin, count + 1))
    return np.sqrt(edges[:-1] * edges[1:]), np.diff(one.cdf(edges)) / np.diff(np.log(edges))


def _draw(axes: Any, one: Drawable, name: str, color: str) -> float:
    """Draws one distribution; its highest density, 0 if it has none."""
    if one.p_fail >= 1:
        axes.plot([], [], color=color, linewidth=1.7, label=f"{name}  always fails")
        return 0.0
    middle, density = log_density(one)
    low, high = one.quantile(0.05), one.quantile(0.95)
    label = f"{name}  median {one.median:>6.4g} ms   5–95 % {low:>6.4g} – {high:<6.4g} ms   P(fail) {one.p_fail:>5.1%}"
    axes.plot(middle, density, color=color, linewidth=1.7, label=label)
    inner = np.unique(np.concatenate([[low, high], middle[(middle > low) & (middle < high)]]))
    axes.fill_between(inner, np.interp(inner, middle, density), color=color, alpha=0.12, linewidth=0)
    axes.vlines(one.median, 0, np.interp(one.median, middle, density), color=color, linestyle="--", linewidth=1)
    return float(density.max())
