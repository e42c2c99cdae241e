"""The scores of the queries of a cell in; its line of results, its part of the long table, and the summaries out.

Every aggregate is weighted so that each source counts the same, however many queries it has. DuckDB makes the means of each
source out of the long table; the means over sources are made of these.
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

from ping_llm.eval.bootstrap import LEAST_CLUSTERS, Clusters, Estimate, Resamples, geometric_mean
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
from ping_llm.eval.queries import FAMILIES, NO_DRAW, VAL_SPLITS, Cell, SplitQueries, number_of
from ping_llm.system.files import move_atomically

INTERVALS = {50: ("q0.25", "q0.75"), 80: ("q0.1", "q0.9"), 90: ("q0.05", "q0.95")}
"""Of each central interval in percent, its quantiles."""

WITHIN_PERCENT = (10, 25)
PRIMARY_CONTEXTS = ((NO_DRAW, 0), ("other", 10))
"""Draw and k of the primary result: with five splits, ten numbers."""

MEANS = {name: name for name in ("nll_nats", "rtt_nll_nats", "rtt_bits", "crps_log", "fail_log_loss")}
MEANS |= {f"within_{percent}": f"(relative_error <= {percent / 100})::INT" for percent in WITHIN_PERCENT}
for _percent, (_low, _high) in INTERVALS.items():
    MEANS[f"coverage_{_percent}"] = f'CASE WHEN rtt >= 0 THEN (rtt BETWEEN "{_low}" AND "{_high}")::INT END'
    MEANS[f"width_{_percent}"] = f'CASE WHEN rtt >= 0 THEN ln("{_high}" / "{_low}") END'
MEANS |= {"fail_rate": "(rtt < 0)::INT", "fail_brier": "(p_fail - (rtt < 0)::INT) ** 2"}
"""SQL of what is averaged over the queries of a source, null for those that do not count."""

_FLOATS = ("p_fail", "nll_nats", "crps_log", "pit", *(f"q{level:g}" for level in QUANTILE_LEVELS))
SCHEMA = pa.schema(
    [("family", pa.string()), ("split", pa.string()), ("draw", pa.string()), ("k", pa.int8()), ("query", pa.int32())]
    + [("src_addr", pa.string()), ("dst_addr", pa.string())]
    + [("event_time", pa.timestamp("s", "UTC")), ("rtt", pa.float32()), ("method", pa.string())]
    + [(name, pa.float32()) for name in _FLOATS]
)
"""Of queries.parquet: a line for each query of each cell and each method that answered it."""


@dataclass(frozen=True, eq=False)
class CellScores:
    """Every method in one cell, over the queries that all of them answered."""

    family: str
    split: str
    draw: str
    k: int
    answered: int
    sources: int  # of answered queries, as are prefixes
    prefixes: int
    context_fitted: float  # measurements that a query was given, on average
    comparator: str | None  # the baseline that the ratios are to: of val the best one here
    best_baseline: str | None  # with the least CRPS in this cell, seen afterwards; None without an answer
    methods: dict[str, dict[str, Any]]  # see `aggregate` and `summarize_cell`
    baseline_crps: dict[str, float]  # over all queries that every baseline answered, however few a model did
    baseline_hosts: tuple[int, int]  # sources and prefixes of these that got an answer
    log_draws: dict[str, np.ndarray]  # (R,) of each method's CRPS, where there is an interval

    def to_json(self) -> dict[str, Any]:
        """All but the draws."""
        return {name: value for name, value in vars(self).items() if name != "log_draws"}


def make_resamples(splits: Sequence[SplitQueries], seed: int) -> Resamples:
    """The draws of the sources and the prefixes of all splits."""
    columns = [(split.recent.src_id, split.recent.prefix) for split in splits]
    sources, prefixes = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Resamples(sources, prefixes, seed)


def source_means(scores: pa.Table) -> dict[str, dict[str, np.ndarray]]:
    """Of each method of a long table its sources (s,), ascending, as `source`, and their MEANS; NaN where none counts."""
    columns = ", ".join(f"avg({sql}) AS {name}" for name, sql in MEANS.items())
    query = f"SELECT method, source, {columns} FROM scores GROUP BY method, source ORDER BY method, source"
    with duckdb.connect(config={"threads": 1}) as connection:  # one order of additions: equal scores have equal means
        found = connection.register("scores", scores).execute(query).fetchnumpy()
    methods = found.pop("method")
    columns_of = {name: np.ma.filled(values, np.nan) for name, values in found.items()}
    return {str(one): {name: v[methods == one] for name, v in columns_of.items()} for one in np.unique(methods)}


def aggregate(scores: Scores, source: np.ndarray, means: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One method's line of a report, from q scores, their sources (q,), and the means of each source."""
    columns, answered = scores.columns(), scores.rtt_ms >= 0
    weights, answers = source_weights(source), source_weights(source, answered)
    error, mean = columns["relative_error"], {}
    for name in MEANS:
        known = means[name][~np.isnan(means[name])]
        mean[name] = float(known.mean()) if len(known) else np.nan
    bins = np.clip((np.nan_to_num(scores.pit) * PIT_BINS).astype(int), 0, PIT_BINS - 1)
    histogram = np.bincount(bins, answers, PIT_BINS)
    return {
        "queries": len(source),
        "answered": int(answered.sum()),
        "sources": len(means["source"]),
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
    cell: Cell,
    scores: Mapping[str, Scores],
    kinds: Mapping[str, str],
    resamples: Resamples,
    comparator: str | None = None,
    context_fitted: float = 0.0,
) -> CellScores:
    """Aggregates over the queries that every method answered, which are the first ones of the cell.

    Ratios are of CRPS to the comparator's, and to that of the baseline that turned out best here. Without a comparator, in
    val, it is the baseline with the least CRPS over all queries that the baselines answered.
    """
    baselines = [name for name, kind in kinds.items() if kind == "baseline"]
    of_baselines, hosts = _macro_crps(cell, {name: scores[name] for name in baselines}, resamples)
    common = min(len(one.rtt_ms) for one in scores.values())
    queries = cell.queries.take(slice(common))
    scores = {name: Scores(*(column[:common] for column in vars(one).values())) for name, one in scores.items()}
    answered = np.flatnonzero(queries.rtt_ms >= 0)
    for name, one in scores.items():
        assert np.array_equal(one.rtt_ms, queries.rtt_ms), f"the answers of {name} are not those of the queries"
        assert np.array_equal(np.flatnonzero(np.isfinite(one.crps_log)), answered), f"{name} has no CRPS of some answer"
    means = source_means(long_table(scores, queries.src_id))
    lines = {name: aggregate(one, queries.src_id, means[name]) for name, one in scores.items()}
    clusters = Clusters(queries.src_id[answered], queries.prefix[answered], resamples)
    crps = {name: one.crps_log[answered] for name, one in scores.items()}
    best = min(baselines, key=lambda name: lines[name]["crps_log"]) if len(answered) and baselines else None
    comparator = comparator or min(of_baselines, key=of_baselines.__getitem__, default=None)
    log_draws = dict[str, np.ndarray]()
    if clusters.has_interval:
        log_draws = dict(zip(crps, clusters.log_means(np.stack(list(crps.values()), axis=1)).T, strict=True))
    for name, line in lines.items():
        if best is None or comparator is None:
            line |= dict.fromkeys(("crps_interval", "crps_ratio", "ratio_interval", "ratio_best"))
            continue
        draws = log_draws.get(name)
        log_ratio = None if draws is None else draws - log_draws[comparator]
        ratio = clusters.ratio(crps[name], crps[comparator], log_ratio)
        line |= {
            "crps_interval": clusters.mean(crps[name], draws).interval,
            "crps_ratio": ratio.value,
            "ratio_interval": ratio.interval,
            "ratio_best": line["crps_log"] / lines[best]["crps_log"],
        }
    return CellScores(
        *(cell.family, cell.split, cell.draw, cell.k, len(answered), len(clusters.sources), len(clusters.prefixes)),
        *(context_fitted, comparator, best, lines, of_baselines, hosts, log_draws),
    )


def _macro_crps(
    cell: Cell, scores: Mapping[str, Scores], resamples: Resamples
) -> tuple[dict[str, float], tuple[int, int]]:
    """The CRPS of each method over the queries that all of these answered, none without an answer; sources and prefixes."""
    common = min((len(one.rtt_ms) for one in scores.values()), default=0)
    queries = cell.queries.take(slice(common)).answered()
    if not len(queries):
        return {}, (0, 0)
    answered, clusters = cell.queries.rtt_ms[:common] >= 0, Clusters(queries.src_id, queries.prefix, resamples)
    crps = {name: clusters.macro_mean(one.crps_log[:common][answered]) for name, one in scores.items()}
    return crps, (len(clusters.sources), len(clusters.prefixes))


def comparator_of(cell: Cell, done: Sequence[CellScores], kinds: Mapping[str, str]) -> str | None:
    """The baseline with the least CRPS in the val cell that a cell of test corresponds to; None for a cell of val.

    Where that holds fewer than LEAST_CLUSTERS sources or prefixes, which decide nothing, the least geometric mean over all
    cells of val of the family, draw and k; without any, over those of the draw and k.
    """
    if cell.split in VAL_SPLITS:
        return None
    val = [one for one in done if one.split in VAL_SPLITS and (one.draw, one.k) == (cell.draw, cell.k)]
    val = [one for one in val if one.baseline_crps]
    family = [one for one in val if one.family == cell.family]
    same = [one for one in family if number_of(one.split) == number_of(cell.split)]
    cells = [one for one in same if min(one.baseline_hosts) >= LEAST_CLUSTERS] or family or val
    baselines = [name for name, kind in kinds.items() if kind == "baseline"]

    def log_crps(name: str) -> float:
        return float(np.mean([np.log(one.baseline_crps[name]) for one in cells]))

    return min(baselines, key=log_crps) if cells and baselines else None


def summaries(cells: Sequence[CellScores]) -> dict[str, dict[str, Any]]:
    """Of the test cells, or of val where there are no others: "primary", the ten numbers for pings; "repeat", the cells
    whose context may hold the pair itself; "target", the ten numbers for the targets of traceroutes. See `summarize`.
    """
    tested = [cell for cell in cells if cell.split not in VAL_SPLITS] or cells
    tested = [cell for cell in tested if cell.best_baseline is not None]
    ten = [cell for cell in tested if (cell.draw, cell.k) in PRIMARY_CONTEXTS]
    pings, targets = ([cell for cell in ten if cell.family == family] for family in FAMILIES)
    repeat = [cell for cell in tested if cell.draw == "recent" and cell.family == FAMILIES[0]]
    return {"primary": summarize(pings), "repeat": summarize(repeat), "target": summarize(targets)}


def summarize(cells: Sequence[CellScores]) -> dict[str, Any]:
    """The cells, and of each method its CRPS ratios to their comparators and to their best baselines, (C,), with intervals,
    and the geometric mean of the former, whose draws are the same in all cells."""
    names = ("family", "split", "draw", "k", "comparator", "best_baseline", "answered", "sources", "prefixes")
    found: dict[str, Any] = {"cells": [{name: getattr(cell, name) for name in names} for cell in cells], "methods": {}}
    least = min((min(cell.sources, cell.prefixes) for cell in cells), default=0)
    for method in cells[0].methods if cells else ():
        lines = [cell.methods[method] for cell in cells]
        ratios = [Estimate(line["crps_ratio"], line["ratio_interval"]) for line in lines]
        draws = [cell.log_draws[method] - cell.log_draws[cell.comparator or ""] for cell in cells if cell.log_draws]
        mean = geometric_mean(ratios, draws, least)
        found["methods"][method] = {
            "ratio": [one.value for one in ratios],
            "interval": [one.interval for one in ratios],
            "ratio_best": [line["ratio_best"] for line in lines],
            "geometric_mean": mean.value,
            "geometric_mean_interval": mean.interval,
        }
    return found


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
    lines, table = long_table(scores, cell.queries.src_id), cell.queries.measurements
    rows = cell.queries.rows[lines["query"].to_numpy()]
    columns = {name: pa.repeat(getattr(cell, name), len(rows)) for name in ("family", "split", "draw", "k")}
    columns |= {"event_time": pa.array(table.time_s[rows])} | dict(zip(lines.column_names, lines.columns, strict=True))
    for name, ids in (("src_addr", table.src_id), ("dst_addr", table.dst_id)):
        columns[name] = pa.array(address_texts(table.addresses, ids[rows]))
    return pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)
