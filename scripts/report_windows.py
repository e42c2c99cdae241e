"""Prints what training windows of a folder of rows are like, by how many of their timestamps they show.

    python scripts/report_windows.py ROWS [--seq-len 1024] [--windows 4096] [--json FILE]

A delta is the time from one timestamped measurement of a window to the next. Built-in measurements have msm_id below
10,000; most repeat every 240 s. A dense window holds at least two thirds of the measurements that its span covers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ping_llm.cli import exit_code
from ping_llm.config import Config, DataConfig, ModelConfig
from ping_llm.data.pipeline import WindowBlocks
from ping_llm.data.rows import ProbeRow, RowReader
from ping_llm.data.tokenization import DELTA1_MAX_S, MEASUREMENT_START, PADDING
from ping_llm.data.windows import TIME_MODES, Window, encode_windows
from ping_llm.system.files import try_file

BATCH, STEPS = 64, 16
EARLIER = (1, 2, 5, 10, 30)
SPANS = (0.05, 0.25, 0.5, 0.75, 0.95)
BUILT_IN_BELOW = 10_000


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="folder that `ping-llm prepare` wrote")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4096, help="how many are drawn, at least")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)

    config = Config(model=ModelConfig(seq_len=options.seq_len), data=DataConfig())
    blocks = WindowBlocks(RowReader(options.rows, "train"), config, BATCH, STEPS)
    sums = {mode: defaultdict(list) for mode in (*TIME_MODES, "all")}
    for block in range(-(-options.windows // (BATCH * STEPS))):
        for place in range(BATCH):
            looks = blocks.draw(block, place)
            lines = encode_windows([look.window for look in looks], blocks.tokens)
            for look, line in zip(looks, lines, strict=True):
                seen = describe_window(look.row, look.window, line)
                for mode in (look.window.mode, "all"):
                    for name, values in seen.items():
                        sums[mode][name].append(values)
    report = {mode: describe(columns) for mode, columns in sums.items()}
    show(report)
    if options.json:
        known = {mode: {name: None if np.isnan(v) else v for name, v in of.items()} for mode, of in report.items()}
        options.json.write_text(json.dumps(known))


def describe_window(row: ProbeRow, window: Window, line: np.ndarray) -> dict[str, np.ndarray]:
    """What one window adds to the columns of the report."""
    padding = (line == PADDING).sum()
    k = int((line == MEASUREMENT_START).sum())
    index, timed = window.index[:k], window.timed[:k]
    deltas = np.diff(row.times(index[timed]))
    built_in = (row.msm_ids[row.msm[index[timed]]] < BUILT_IN_BELOW)[1:]
    dense = k >= 2 / 3 * (np.ptp(index) + 1)
    _, dst, counts = np.unique(row.dst[index], return_inverse=True, return_counts=True)
    columns = {
        "places": len(line),
        "padding": padding,
        "padding_of_short_rows": padding * (k == len(row)),
        "measurements": k,
        "span_s": np.ptp(row.times(index)),
        "deltas": deltas,
        "deltas_built_in": deltas[built_in],
        "deltas_dense_built_in": deltas[built_in & dense],
        "earlier": np.arange(k),
        "pair_given_before": len(dst) - len(counts),  # all but the first of each pair
    }
    return {name: np.atleast_1d(values) for name, values in columns.items()}


def describe(columns: dict[str, list]) -> dict[str, float]:
    """Shares, means and quantiles over all windows of a mode."""
    c = {name: np.concatenate(values) for name, values in columns.items()}
    places, measurements = c["places"].sum(), c["measurements"].sum()
    numbers = {
        "windows": len(c["places"]),
        "padding": c["padding"].sum() / places,
        "padding, rows too short": c["padding_of_short_rows"].sum() / places,
        "tokens a measurement": (places - c["padding"].sum()) / measurements,
        "measurements a window": c["measurements"].mean(),
    }
    for name in ("deltas", "deltas_built_in", "deltas_dense_built_in"):
        label = name.removeprefix("deltas").replace("_", " ").strip() or "all"
        numbers[f"1-byte deltas, {label}"] = (c[name] <= DELTA1_MAX_S).mean() if len(c[name]) else np.nan
    for q in SPANS:
        numbers[f"span in hours, {q * 100:g} %"] = np.quantile(c["span_s"], q) / 3600
    for k in EARLIER:
        numbers[f"measurements after ≥ {k} others"] = (c["earlier"] >= k).mean()
    numbers["measurements of a pair given before"] = c["pair_given_before"].sum() / measurements
    return {name: float(value) for name, value in numbers.items()}


def show(report: dict[str, dict[str, float]]) -> None:
    """A table with a column a mode."""
    table = Table("", *report)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in report["all"]:
        share = name.startswith(("padding", "1-byte", "measurements after", "measurements of"))
        values = [mode[name] for mode in report.values()]
        texts = [f"{v:.1%}" if share else f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values]
        table.add_row(name, *("–" if np.isnan(v) else text for v, text in zip(values, texts, strict=True)))
    Console(width=80).print(table)


if __name__ == "__main__":
    sys.exit(exit_code(main))
