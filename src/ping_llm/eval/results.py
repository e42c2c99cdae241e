"""The scores of the queries of a cell in; its line of results, its part of the long table, and the headline out.

Every aggregate is weighted so that each source counts the same, however many queries it has. DuckDB makes the means of each
source out of the long table; the means over sources, and the bootstrap, are made of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm.eval.columns import address_texts
from ping_llm.eval.metrics import (
    PIT_BINS,
    QUANTILE_LEVELS,
    Scores,
    auc,
    error_quantiles,
    ks_uniform,
    long_table,
    source_weights,
    weighted_quantile,
)
from ping_llm.eval.queries import Cell, SplitQueries
from ping_llm.system.files import move_atomically

INTERVALS = {50: ("q0.25", "q0.75"), 80: ("q0.1", "q0.9"), 90: ("q0.05", "q0.95")}
"""Of each central interval in percent, its quantiles."""

WITHIN_PERCENT = (10, 25)
LEAST_ANSWERED, LEAST_SOURCES = 50, 5  # a cell with fewer is reported, but does not count in the headline
REPLICATES = 1000

MEANS = {name: name for name in ("nll_nats", "rtt_nll_nats", "rtt_bits", "crps_log", "fail_log_loss")}
MEANS |= {f"within_{percent}": f"(relative_error <= {percent / 100})::INT" for percent in WITHIN_PERCENT}
for _percent, (_low, _high) in INTERVALS.items():
    MEANS[f"coverage_{_percent}"] = f'CASE WHEN rtt >= 0 THEN (rtt BETWEEN "{_low}" AND "{_high}")::INT END'
    MEANS[f"width_{_percent}"] = f'CASE WHEN rtt >= 0 THEN ln("{_high}" / "{_low}") END'
MEANS |= {"fail_rate": "(rtt < 0)::INT", "fail_brier": "(p_fail - (rtt < 0)::INT) ** 2"}
"""SQL of what is averaged over the queries of a source, null for those that do not count."""

_NEW_SOURCES = ("test-s3", "test-s5")
_FLOATS = ("p_fail", "nll_nats", "crps_log", "pit", *(f"q{level:g}" for level in QUANTILE_LEVELS))
SCHEMA = pa.schema(
    [("split", pa.string()), ("draw", pa.string()), ("k", pa.int8()), ("query", pa.int32())]
    + [("src_addr", pa.string()), ("dst_addr", pa.string()), ("probe", pa.int64())]
    + [("event_time", pa.timestamp("s", "UTC")), ("rtt", pa.float32()), ("method", pa.string())]
    + [(name, pa.float32()) for name in _FLOATS]
)
"""Of queries.parquet: a line for each query of each cell and each method that answered it."""


@dataclass(frozen=True, eq=False)
class CellScores:
    """Every method in one cell, over the queries that all of them answered."""

    split: str
    draw: str
    k: int
    best_baseline: str
    counts: bool  # there are enough answers and sources to say something
    methods: dict[str, dict[str, Any]]  # see `aggregate` and `summarize_cell`
    ratio_replicates: dict[str, np.ndarray]  # (R,) of each method's CRPS to that of the best baseline


@dataclass(frozen=True, eq=False)
class SourceBootstrap:
    """How often each replicate drew each of S sources: a cluster bootstrap of the mean over sources.

    One draw serves every cell and method, so that what is compared in a draw is of the same sources.
    """

    sources: np.ndarray  # (S,) ascending
    counts: np.ndarray  # (R, S)

    @classmethod
    def draw(
        cls, sources: np.ndarray, stratum: np.ndarray, rng: np.random.Generator, replicates: int = REPLICATES
    ) -> SourceBootstrap:
        """With replacement, as many as there are in each stratum (S,): sources held out and others are drawn apart."""
        counts = np.zeros((replicates, len(sources)))
        for value in np.unique(stratum):
            inside = np.flatnonzero(stratum == value)
            counts[:, inside] = rng.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), replicates)
        return cls(sources, counts)

    def means(self, sources: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(R,) mean over the drawn ones of some sources (s,) of their values (s,); NaN values are left out."""
        known = ~np.isnan(values)
        counts = self.counts[:, np.searchsorted(self.sources, sources[known])]
        with np.errstate(invalid="ignore"):
            return counts @ values[known] / counts.sum(axis=1)


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """The bounds of 95 % of the replicates; a replicate that drew no source of a cell, NaN, is left out."""
    known = replicates[np.isfinite(replicates)]
    low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def make_bootstrap(splits: Sequence[SplitQueries], seed: int) -> SourceBootstrap:
    """The draws of the sources of all splits; new sources are drawn apart from the others."""
    sources = np.unique(np.concatenate([split.recent.probe for split in splits]))
    new = [split.recent.probe for split in splits if split.split in _NEW_SOURCES]
    stratum = np.isin(sources, np.concatenate(new)) if new else np.zeros(len(sources), dtype=bool)
    return SourceBootstrap.draw(sources, stratum, np.random.default_rng([seed, 0xB007]))


def source_means(scores: pa.Table) -> dict[str, dict[str, np.ndarray]]:
    """Of each method in a long table its sources (s,), ascending, as `probe`, and their MEANS; NaN where no query counts."""
    columns = ", ".join(f"avg({sql}) AS {name}" for name, sql in MEANS.items())
    query = f"SELECT method, probe, {columns} FROM scores GROUP BY method, probe ORDER BY method, probe"
    with duckdb.connect(config={"threads": 1}) as connection:  # one order of additions: equal scores have equal means
        found = connection.register("scores", scores).execute(query).fetchnumpy()
    methods = found.pop("method")
    columns_of = {name: np.ma.filled(values, np.nan) for name, values in found.items()}
    return {str(one): {name: v[methods == one] for name, v in columns_of.items()} for one in np.unique(methods)}


def aggregate(scores: Scores, probe: np.ndarray, means: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One method's line of a report, from q scores, their sources (q,), and the means of each source."""
    columns, answered = scores.columns(), scores.rtt_ms >= 0
    weights, answers = source_weights(probe), source_weights(probe, answered)
    error, mean = columns["relative_error"], {}
    for name in MEANS:
        known = means[name][~np.isnan(means[name])]
        mean[name] = float(known.mean()) if len(known) else np.nan
    bins = np.clip((np.nan_to_num(scores.pit) * PIT_BINS).astype(int), 0, PIT_BINS - 1)
    histogram = np.bincount(bins, answers, PIT_BINS)
    return {
        "queries": len(probe),
        "answered": int(answered.sum()),
        "sources": len(means["probe"]),
        # NLL of results, failures among them; of RTTs given an answer: density per log-ms, bits of the 16-bit code, log-ms
        **{name: mean[name] for name in ("nll_nats", "rtt_nll_nats", "rtt_bits", "crps_log")},
        "median_rel_error": weighted_quantile(error, answers, 0.5),
        "p90_rel_error": weighted_quantile(error, answers, 0.9),
        "within": {percent: mean[f"within_{percent}"] for percent in WITHIN_PERCENT},  # shares
        "coverage": {percent: mean[f"coverage_{percent}"] for percent in INTERVALS},  # shares
        "width_log": {percent: mean[f"width_{percent}"] for percent in INTERVALS},  # log-ms
        "pit_ks": ks_uniform(scores.pit, answers),  # largest distance of the PIT's CDF from the uniform one
        "pit_histogram": histogram / max(histogram.sum(), 1e-300),  # (20,) shares
        **{name: mean[name] for name in ("fail_rate", "fail_brier", "fail_log_loss")},  # base rate; score; nats
        "fail_auc": auc(scores.p_fail, ~answered, weights),  # NaN where all or none failed
        "error_quantiles": error_quantiles(error, answers),  # (50,)
    }


def summarize_cell(
    cell: Cell, scores: Mapping[str, Scores], kinds: Mapping[str, str], bootstrap: SourceBootstrap
) -> CellScores:
    """Aggregates over the queries that every method answered, which are the first ones of the cell."""
    common = min(len(one.rtt_ms) for one in scores.values())
    probe = cell.queries.probe[:common]
    scores = {name: Scores(*(column[:common] for column in vars(one).values())) for name, one in scores.items()}
    means = source_means(long_table(scores, probe))
    lines = {name: aggregate(one, probe, means[name]) for name, one in scores.items()}
    best = min((name for name, kind in kinds.items() if kind == "baseline"), key=lambda name: lines[name]["crps_log"])
    drawn = {
        name: {of: bootstrap.means(one["probe"], one[of]) for of in ("crps_log", "nll_nats")}
        for name, one in means.items()
    }
    ratios = {name: one["crps_log"] / drawn[best]["crps_log"] for name, one in drawn.items()}
    for name, replicates in drawn.items():
        lines[name] |= {
            "crps_interval": interval(replicates["crps_log"]),
            "nll_interval": interval(replicates["nll_nats"]),
            "crps_ratio": lines[name]["crps_log"] / lines[best]["crps_log"],
            "ratio_interval": interval(ratios[name]),
        }
    enough = lines[best]["answered"] >= LEAST_ANSWERED and lines[best]["sources"] >= LEAST_SOURCES
    return CellScores(cell.split, cell.draw, cell.k, best, enough, lines, ratios)


def headline(cells: Sequence[CellScores], kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """For each method that is no baseline: the geometric mean of its CRPS ratios to each cell's best baseline, and how
    many cells it wins: where the upper bound of the ratio's interval is below 1. Draws are reported apart: with pings of
    the same pair in the context the task is another."""
    counted = [cell for cell in cells if cell.counts]
    draws, lines = np.array([cell.draw for cell in counted]), {}
    for name in (name for name, kind in kinds.items() if kind != "baseline" and counted):
        ratios = np.array([cell.methods[name]["crps_ratio"] for cell in counted])
        replicates = np.array([cell.ratio_replicates[name] for cell in counted])  # (cells, R)
        lines[name] = {
            "geometric_mean": geometric_mean(ratios),
            "by_draw": {str(draw): geometric_mean(ratios[draws == draw]) for draw in np.unique(draws)},
            "interval": interval(np.exp(np.mean(np.log(replicates), axis=0))),
            "win_rate": float(np.mean([cell.methods[name]["ratio_interval"][1] < 1 for cell in counted])),
            "cells": len(counted),
            "cells_too_small": len(cells) - len(counted),
        }
    return lines


def geometric_mean(ratios: Sequence[float] | np.ndarray) -> float:
    """exp of the mean logarithm."""
    return float(np.exp(np.mean(np.log(ratios))))


@contextmanager
def score_writer(path: Path) -> Iterator[Callable[[Cell, Mapping[str, Scores]], None]]:
    """Writes the long table of a run, cell by cell; the file is whole or not there."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with pq.ParquetWriter(aside, SCHEMA, compression="zstd") as writer:
            yield lambda cell, scores: writer.write_table(_with_queries(cell, scores))
        move_atomically(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _with_queries(cell: Cell, scores: Mapping[str, Scores]) -> pa.Table:
    """The scores of a cell in the columns of SCHEMA."""
    lines, table = long_table(scores, cell.queries.probe), cell.queries.measurements
    rows = cell.queries.rows[lines["query"].to_numpy()]
    columns = {name: pa.repeat(getattr(cell, name), len(rows)) for name in ("split", "draw", "k")}
    columns |= {"event_time": pa.array(table.time_s[rows])} | dict(zip(lines.column_names, lines.columns, strict=True))
    for name, ids in (("src_addr", table.src_id), ("dst_addr", table.dst_id)):
        columns[name] = pa.array(address_texts(table.addresses, ids[rows]))
    return pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)
