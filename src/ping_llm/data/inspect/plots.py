"""A summary of rows in, pictures out: RTTs, the IPv4 world, measurements over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.inspect.summary import Summary
from ping_llm.data.tokenization import decode_rtt
from ping_llm.system.axes import label_log_ticks

_FAMILIES = (("IPv4", "#1f6feb"), ("IPv6", "#d1660f"))
_RTT_BINS_AN_OCTAVE = 8
_EMPTY = "#eef0f2"


def plot_summary(summary: Summary, folder: Path, network_bits: int) -> list[Path]:
    """Draws all pictures of a summary into `folder`; gives their paths. Networks are IPv4 /8s or /16s."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    if not summary.rtt_codes.any():
        return [_plot_times(summary, folder / "over_time.png")]
    paths = [_plot_rtts(summary, folder / "rtt.png"), _plot_times(summary, folder / "over_time.png")]
    if summary.rtt_codes[0].any():
        paths.append(_plot_networks(summary, folder / f"ipv4_world_{network_bits}.png", network_bits))
    return paths


def hilbert_positions(numbers: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows, (n,) each, of the places (n,) on a Hilbert curve that fills a square of 2^order cells a side.

    It begins in the upper left corner and ends in the upper right one; a network of 4^k neighbours is a square.
    """
    x, y = np.zeros_like(numbers), np.zeros_like(numbers)
    for level in range(order):
        side = 1 << level
        quadrant = numbers >> (2 * level) & 3
        right, down = quadrant >> 1, (quadrant ^ quadrant >> 1) & 1
        turned = (down == 0) & (right == 1)
        x, y = np.where(turned, side - 1 - x, x), np.where(turned, side - 1 - y, y)
        x, y = np.where(down == 0, y, x), np.where(down == 0, x, y)
        x, y = x + side * right, y + side * down
    return x, y


def _plot_rtts(summary: Summary, path: Path) -> Path:
    """The distribution of the RTT of each family, on a log axis."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    codes_a_bin = 2048 // _RTT_BINS_AN_OCTAVE
    edges = decode_rtt(np.arange(0, summary.rtt_codes.shape[1] + 1, codes_a_bin))
    shown = np.zeros(len(edges) - 1, dtype=bool)
    for counts, failed, total, (name, color) in zip(
        summary.rtt_codes, summary.failed, summary.measurements, _FAMILIES, strict=True
    ):
        if not counts.any():
            continue
        share = 100 * counts.reshape(-1, codes_a_bin).sum(axis=1) / counts.sum()
        reached = np.cumsum(share)
        shown |= (reached > 0.1) & (reached - share < 99.9)
        median = float(decode_rtt(np.searchsorted(np.cumsum(counts), counts.sum() / 2)))
        label = f"{name}: {total:,} pings, median {median:.3g} ms, {failed / total:.1%} failed"
        density = share / np.diff(np.log2(edges))
        axes.stairs(density, edges, color=color, linewidth=1.6, label=label)
        axes.stairs(density, edges, color=color, alpha=0.12, fill=True)
        axes.axvline(median, color=color, linestyle="--", linewidth=1)
    first, last = np.flatnonzero(shown)[[0, -1]]
    axes.set_xscale("log")
    axes.set(xlim=(edges[first], edges[last + 1]), ylim=(0, None), xlabel="RTT (ms)", ylabel="replies (% an octave)")
    axes.set_title(f"RTTs of {_short_name(summary)}", fontsize=11)
    label_log_ticks(axes.xaxis, *axes.get_xlim())
    return _finish(figure, axes, path)


def _plot_times(summary: Summary, path: Path) -> Path:
    """Measurements of each family in equal stretches of time, one family upon the other."""
    import matplotlib.dates as dates
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    bins = summary.over_time.shape[1]
    edges_s = summary.over_time_start_s + summary.over_time_step_s * np.arange(bins + 1)
    unit_s, unit = (3600, "an hour") if summary.over_time_step_s < 86_400 else (86_400, "a day")
    edges = dates.date2num(edges_s.astype("datetime64[s]"))
    below = np.zeros(bins)
    for counts, (name, color) in zip(summary.over_time, _FAMILIES, strict=True):
        if counts.any():
            top = below + counts * unit_s / summary.over_time_step_s
            axes.stairs(top, edges, baseline=below, fill=True, color=color, label=name, linewidth=0)
            below = top
    axes.xaxis_date()
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(axes.xaxis.get_major_locator()))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(ylim=(0, None), xlim=(edges[0], edges[-1]), ylabel=f"measurements {unit}")
    axes.set_title(f"Measurements of {_short_name(summary)} over time", fontsize=11)
    return _finish(figure, axes, path)


def _plot_networks(summary: Summary, path: Path, bits: int) -> Path:
    """The median RTT to each IPv4 network, on a Hilbert curve: networks that share a prefix lie in one square."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    networks, medians = summary.network_medians(bits)
    side = 1 << (bits // 2)
    world = np.full((side, side), np.nan)
    x, y = hilbert_positions(networks, bits // 2)
    world[y, x] = medians
    low, high = np.quantile(medians, (0.02, 0.98))
    figure, axes = plt.subplots(figsize=(7.6, 6.8), layout="constrained")
    axes.set_facecolor(_EMPTY)
    high = max(high, low * 1.01)
    norm = LogNorm(low, high)
    extent = (0, 16, 16, 0)  # in /8s, whatever the networks are
    image = axes.imshow(world, norm=norm, cmap="viridis_r", interpolation="nearest", extent=extent)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, extend="both", label="median RTT (ms)")
    label_log_ticks(bar.ax.yaxis, low, high)
    axes.set_xticks(range(17), [])
    axes.set_yticks(range(17), [])
    axes.grid(color="white", linewidth=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    first_bytes = np.arange(256)
    for number, column, row in zip(first_bytes, *hilbert_positions(first_bytes, 4), strict=True):
        dark = bits == 8 and number in networks and norm(medians[networks == number][0]) > 0.5
        at = (column + 0.5, row + 0.5) if bits == 8 else (column + 0.08, row + 0.28)
        known = number in networks >> (bits - 8)
        color = "white" if dark else "#24292f" if known else "#a0a7b0"
        align, size = ("center", 7) if bits == 8 else ("left", 5)
        axes.text(*at, str(number), color=color, fontsize=size, ha=align, va="center")
    axes.set_title(
        f"Median RTT to IPv4 /{bits}s, {_short_name(summary)}\n(numbers: first byte of the address)", fontsize=11
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _short_name(summary: Summary) -> str:
    return Path(summary.name).absolute().name


def _finish(figure: Any, axes: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
