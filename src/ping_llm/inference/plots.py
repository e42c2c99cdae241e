"""Distributions in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ping_llm.axes import label_log_ticks
from ping_llm.inference.distribution import RTTDistribution

_COLORS = ("#1f6feb", "#8250df", "#1a7f37", "#bf3989", "#57606a")
_TRUTH = "#d1660f"
_BINS = 120
_LEAST_BIN = 0.002  # in log-ms, four codes: the density is averaged over bins, finer ones would show single codes


def plot_rtt(laws: Mapping[str, RTTDistribution], path: Path, title: str, truth=None) -> None:
    """Draws the densities of one or several laws over log-RTT, each with median, 5–95 % band and P(fail).

    `truth`, if any, has `cdf`, `quantile`, `median` and `p_fail`, and is drawn beside them. Laws that fail with certainty
    have no density and are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {name: law for name, law in laws.items() if law.p_fail < 1}
    if not drawn:
        raise ValueError(f"{title}: every ping fails with certainty, so there is no RTT to draw")
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    edges = _bins([*drawn.values(), *([truth] if truth is not None else [])])
    for color, (name, law) in zip(_COLORS, drawn.items(), strict=False):
        axes.axvspan(law.quantile(0.05), law.quantile(0.95), color=color, alpha=0.08, linewidth=0)
        _draw(axes, law, name, edges, color)
    if truth is not None:
        _draw(axes, truth, "true law", edges, _TRUTH)
    axes.set_xscale("log")
    axes.set(xlabel="RTT (ms)", ylabel="density per log-ms", title=title, ylim=(0, None))
    label_log_ticks(axes.xaxis, *axes.get_xlim())
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bins(laws: list) -> np.ndarray:
    """Edges in ms of the bins that hold all but the outermost 1 % of every law; a tenth more is shown on either side."""
    low, high = np.log(min(law.quantile(0.01) for law in laws)), np.log(max(law.quantile(0.99) for law in laws))
    margin = max(0.1 * (high - low), 0.01)
    count = min(_BINS, int((high - low + 2 * margin) / _LEAST_BIN))
    return np.exp(np.linspace(low - margin, high + margin, count + 1))


def _draw(axes, law, name: str, edges: np.ndarray, color: str) -> None:
    density = np.diff([law.cdf(edge) for edge in edges]) / np.diff(np.log(edges))
    low, high = law.quantile(0.05), law.quantile(0.95)
    label = f"{name}: median {law.median:.4g} ms, 5–95 % {low:.4g}–{high:.4g} ms, P(fail) {law.p_fail:.1%}"
    axes.plot(np.sqrt(edges[:-1] * edges[1:]), density, color=color, linewidth=1.7, label=label)
    axes.axvline(law.median, color=color, linestyle="--", linewidth=1)
