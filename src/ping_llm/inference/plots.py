"""Distributions in, pictures out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ping_llm.inference.distribution import RTTDistribution

_MODEL, _TRUTH = "#1f6feb", "#d1660f"
_BIN = 0.02  # width in log-ms of the bins that the density is averaged over: finer ones show single codes


def plot_rtt(distribution: RTTDistribution, path: Path, title: str, truth=None) -> None:
    """The density over log-RTT with median, 5–95 % band and P(fail); `truth`, if any, as a second curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    low, median, high = distribution.quantile(np.array([0.05, 0.5, 0.95]))
    span = distribution.quantile(np.array([0.002, 0.998]))
    if truth is not None:
        span = np.array([min(span[0], truth.quantile(0.002)), max(span[1], truth.quantile(0.998))])
    edges = np.arange(np.log(span[0]) - 3 * _BIN, np.log(span[1]) + 4 * _BIN, _BIN)
    density = np.diff(distribution.cdf(np.exp(edges))) / _BIN
    rtt_ms = np.exp((edges[:-1] + edges[1:]) / 2)

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axes.axvspan(low, high, color=_MODEL, alpha=0.1, linewidth=0, label=f"5–95 %: {low:.4g}–{high:.4g} ms")
    axes.plot(rtt_ms, density, color=_MODEL, linewidth=1.8, label=f"model, P(fail) = {distribution.p_fail:.2%}")
    axes.axvline(median, color=_MODEL, linestyle="--", linewidth=1.2, label=f"median: {median:.4g} ms")
    if truth is not None:
        true_density = np.diff([truth.cdf(value) for value in np.exp(edges)]) / _BIN
        axes.plot(rtt_ms, true_density, color=_TRUTH, linewidth=1.8, label=f"true law, P(fail) = {truth.p_fail:.2%}")
        axes.axvline(
            truth.median, color=_TRUTH, linestyle="--", linewidth=1.2, label=f"true median: {truth.median:.4g} ms"
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=8)
    axes.set(xlabel="RTT (ms)", ylabel="density per log-ms", title=title, ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
