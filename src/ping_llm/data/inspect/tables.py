"""A summary of rows in, tables for a terminal out; no line is wider than 80 characters."""

from __future__ import annotations

import datetime as dt

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ping_llm.data.inspect.summary import MAX_GAP_S, QUANTILES, Summary, count_quantiles


def print_summary(summary: Summary, top: int) -> None:
    """Prints all that `Summary.to_json` holds."""
    console = Console(width=80, highlight=False)
    for table in (_counters(summary), _contents(summary), _families(summary), _spreads(summary), _busy(summary, top)):
        if table.row_count:
            console.print(table)
            console.print()


def _counters(summary: Summary) -> Table:
    """Where each line of the dumps went, and into which part its measurement."""
    lines, manifest = summary.manifest.get("lines"), summary.manifest
    table = _table("Lines and parts", "", "count", "share")
    if lines:
        counted = {"lines read": lines["read"], **{name: n for name, n in lines["counters"].items() if n}}
        for name, count in counted.items():
            _count_row(table, name if name == "lines read" else f"  {name}", count, lines["read"])
        table.add_section()
    parts = {name: count for name, count in manifest["parts"].items() if count}
    _count_row(table, "measurements", sum(parts.values()), sum(parts.values()))
    for name, count in parts.items() if len(parts) > 1 else ():
        _count_row(table, f"  {name}", count, sum(parts.values()))
    for problem in summary.problems:
        table.add_section()
        table.add_row(Text(problem, style="red"))
    return table


def _contents(summary: Summary) -> Table:
    tokens = summary.tokens_per_measurement()
    first, last = (dt.datetime.fromtimestamp(t, dt.UTC) for t in (summary.first_time_s, summary.last_time_s))
    table = _table("Contents", "", "")
    for name, value in {
        "from": f"{first:%Y-%m-%d %H:%M:%S} UTC",
        "to": f"{last:%Y-%m-%d %H:%M:%S} UTC ({(last - first).total_seconds() / 86_400:,.1f} days)",
        "packets": "one of each result" if summary.manifest.get("packets") == "one" else "all",
        "probes": f"{summary.probes:,}",
        "rows": f"{len(summary.row_measurements):,}",
        "source addresses": f"{len(summary.sources[1]):,}",
        "destination addresses": f"{len(summary.destinations[1]):,}",
        "tokens a measurement, timed": f"{tokens['timed']:.1f}",
        "tokens a measurement, untimed": f"{tokens['untimed']:.1f}",
    }.items():
        table.add_row(name, value)
    return table


def _families(summary: Summary) -> Table:
    """RTT percentiles and failures of each address family that was pinged."""
    table = _table("RTT in ms", "", "pings", "failed", *(f"{q * 100:g} %" for q in QUANTILES))
    for family, name in enumerate(("IPv4", "IPv6")):
        count = summary.measurements[family]
        if count:
            quantiles = summary.rtt_quantiles_ms(family) or [np.nan] * len(QUANTILES)
            table.add_row(name, f"{count:,}", f"{summary.failed[family] / count:.1%}", *map(_number, quantiles))
    return table


def _spreads(summary: Summary) -> Table:
    table = _table("Rows", "", *(f"{q * 100:g} %" for q in QUANTILES))
    table.add_row("measurements a row", *map(_number, np.quantile(summary.row_measurements, QUANTILES)))
    if summary.gaps_s.any():
        gaps = count_quantiles(summary.gaps_s, QUANTILES)
        table.add_row("seconds to the next one", *(f"{_number(g)}{'+' if g == MAX_GAP_S else ''}" for g in gaps))
    return table


def _busy(summary: Summary, top: int) -> Table:
    """The busiest sources above the busiest destinations: side by side, two IPv6 addresses would not fit."""
    table = _table("Busiest endpoints", "", "pings", "share")
    total, found = summary.measurements.sum(), summary.to_json(top)
    for title in ("sources", "destinations"):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for address, count in found[title]["top"].items():
            _count_row(table, f"  {address}", count, total)
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any((first, *columns)))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _count_row(table: Table, name: str, count: int, total: int) -> None:
    table.add_row(name, f"{count:,}", f"{count / total:.1%}")


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
