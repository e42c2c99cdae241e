"""Distributions in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ping_llm.inference.distribution import RTTDistribution

_COLORS = ("#1f6feb", "#8250df", "#1a7f37", "#bf3989", "#57606a")
_TRUTH = "#d1660f"
_BIN = 0.02  # width in log-ms of the bins that the density is averaged over: finer ones show single codes


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
    _label_ticks(axes)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bins(laws: list) -> np.ndarray:
    """Edges in ms of the bins that hold all but the outermost 0.2 % of every law."""
    low, high = (np.log([law.quantile(q) for law in laws]) for q in (0.002, 0.998))
    return np.exp(np.arange(low.min() - 3 * _BIN, high.max() + 4 * _BIN, _BIN))


def _draw(axes, law, name: str, edges: np.ndarray, color: str) -> None:
    density = np.diff([law.cdf(edge) for edge in edges]) / _BIN
    low, high = law.quantile(0.05), law.quantile(0.95)
    label = f"{name}: median {law.median:.4g} ms, 5–95 % {low:.4g}–{high:.4g} ms, P(fail) {law.p_fail:.1%}"
    axes.plot(np.sqrt(edges[:-1] * edges[1:]), density, color=color, linewidth=1.7, label=label)
    axes.axvline(law.median, color=color, linestyle="--", linewidth=1)


def _label_ticks(axes) -> None:
    """Plain numbers at 1, 2, 5 of each decade, and at every digit where the axis spans less than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    digits = (1, 2, 5) if high / low > 10 else tuple(range(1, 10))
    axes.xaxis.set_major_locator(LogLocator(subs=digits))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
