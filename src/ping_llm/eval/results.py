"""The scores of the queries of a cell in; its line of results, its Parquet file, and the headline over all cells out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm.data.measurement import format_address
from ping_llm.eval.bootstrap import SourceBootstrap, interval
from ping_llm.eval.metrics import QUANTILE_LEVELS, Aggregate, Scores, aggregate, source_means, source_weights
from ping_llm.eval.queries import Cell, SplitQueries
from ping_llm.system.files import move_atomically

LEAST_ANSWERED, LEAST_SOURCES = 50, 5
"""A cell with fewer is told, but does not count in the headline."""

ERROR_LEVELS = np.linspace(0.02, 1, 50)
_NEW_SOURCES = ("test-s3", "test-s5")


@dataclass(frozen=True, eq=False)
class MethodScores:
    """One method in one cell."""

    aggregate: Aggregate
    crps_interval: tuple[float, float]
    nll_interval: tuple[float, float]
    crps_ratio: float  # to the best baseline of the cell
    ratio_replicates: np.ndarray = field(repr=False)  # (R,)
    error_quantiles: tuple[float, ...] = field(repr=False)  # relative error at ERROR_LEVELS

    @property
    def ratio_interval(self) -> tuple[float, float]:
        """Of 95 %."""
        return interval(self.ratio_replicates)

    def to_json(self) -> dict[str, Any]:
        """All but the replicates."""
        names = ("crps_interval", "nll_interval", "crps_ratio", "ratio_interval", "error_quantiles")
        return asdict(self.aggregate) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class CellScores:
    """Every method in one cell, over the queries that all of them answered."""

    split: str
    draw: str
    k: int
    best_baseline: str
    methods: Mapping[str, MethodScores]

    @property
    def counts(self) -> bool:
        """Whether there are enough queries to say something."""
        line = self.methods[self.best_baseline].aggregate
        return line.answered >= LEAST_ANSWERED and line.sources >= LEAST_SOURCES

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        names = ("split", "draw", "k", "best_baseline", "counts")
        methods = {name: one.to_json() for name, one in self.methods.items()}
        return {name: getattr(self, name) for name in names} | {"methods": methods}


def make_bootstrap(splits: Sequence[SplitQueries], seed: int) -> SourceBootstrap:
    """The draws of the sources of all splits; new sources are drawn apart from the others."""
    sources = np.unique(np.concatenate([split.recent.probe for split in splits]))
    new = [split.recent.probe for split in splits if split.split in _NEW_SOURCES]
    stratum = np.isin(sources, np.concatenate(new)) if new else np.zeros(len(sources), dtype=bool)
    return SourceBootstrap.draw(sources, stratum, np.random.default_rng([seed, 0xB007]))


def summarize_cell(
    cell: Cell, scores: Mapping[str, Scores], kinds: Mapping[str, str], bootstrap: SourceBootstrap
) -> CellScores:
    """Aggregates over the queries that every method answered, which are the first ones of the cell."""
    common = min(len(one) for one in scores.values())
    scores = {name: first(one, common) for name, one in scores.items()}
    source = cell.queries.probe[:common]
    crps = {name: source_means(one.crps_log, source) for name, one in scores.items()}
    with np.errstate(invalid="ignore"):
        macro = {name: np.nanmean(means) if len(means) else np.nan for name, (_, means) in crps.items()}
    best = min((name for name, kind in kinds.items() if kind == "baseline"), key=macro.__getitem__)
    methods = {}
    for name, one in scores.items():
        sources, means = crps[name]
        methods[name] = MethodScores(
            aggregate(one, source),
            interval(bootstrap.means(sources, means)),
            interval(bootstrap.means(*source_means(one.nll_nats, source))),
            float(macro[name] / macro[best]),
            bootstrap.ratios(sources, means, crps[best][1]),
            tuple(error_quantiles(one, source)),
        )
    return CellScores(cell.split, cell.draw, cell.k, best, methods)


def first(scores: Scores, count: int) -> Scores:
    """The scores of the first queries."""
    return Scores(**{column.name: getattr(scores, column.name)[:count] for column in fields(scores)})


def error_quantiles(scores: Scores, source: np.ndarray) -> np.ndarray:
    """(50,) relative errors below which a share ERROR_LEVELS of the answered queries lies, each source weighing the same."""
    weights = source_weights(source, scores.answered)
    order = np.argsort(np.where(weights > 0, scores.relative_error, np.inf))
    order = order[: int((weights > 0).sum())]
    if not len(order):
        return np.full(len(ERROR_LEVELS), np.nan)
    below = np.cumsum(weights[order])
    return scores.relative_error[order][np.searchsorted(below, ERROR_LEVELS * below[-1] * (1 - 1e-12))]


def headline(cells: Sequence[CellScores], kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """For each method that is no baseline: the geometric mean of its CRPS ratios to each cell's best baseline, and how
    many cells it wins: where the upper bound of the ratio's interval is below 1. Draws are told apart: with pings of the
    same pair in the context the task is another."""
    counted = [cell for cell in cells if cell.counts]
    lines = {}
    for name in (name for name, kind in kinds.items() if kind != "baseline"):
        of_method = [cell.methods[name] for cell in counted]
        if not of_method:
            continue
        low, high = interval(np.exp(np.mean(np.log([one.ratio_replicates for one in of_method]), axis=0)))
        lines[name] = {
            "geometric_mean": geometric_mean([one.crps_ratio for one in of_method]),
            "by_draw": {
                draw: geometric_mean([cell.methods[name].crps_ratio for cell in counted if cell.draw == draw])
                for draw in sorted({cell.draw for cell in counted})
            },
            "interval": (low, high),
            "win_rate": float(np.mean([one.ratio_interval[1] < 1 for one in of_method])),
            "cells": len(counted),
            "cells_too_small": len(cells) - len(counted),
        }
    return lines


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp of the mean logarithm."""
    return float(np.exp(np.mean(np.log(ratios))))


class ScoreWriter:
    """Writes one Parquet file a cell, a row group a method: a context manager; the file is whole or not there."""

    def __init__(self, path: Path, cell: Cell) -> None:
        self.path, self.aside = path, path.with_name(f"{path.name}.tmp")
        table, rows = cell.queries.measurements, cell.queries.rows
        self._columns = {
            "split": _repeated(cell.split, len(rows)),
            "draw": _repeated(cell.draw, len(rows)),
            "k": pa.array(np.full(len(rows), cell.k, dtype=np.int8)),
            "query": pa.array(np.arange(len(rows), dtype=np.int32)),
            "src_addr": _addresses(table.addresses, table.src_id[rows]),
            "dst_addr": _addresses(table.addresses, table.dst_id[rows]),
            "probe": pa.array(table.probe[rows]),
            "event_time": pa.array(table.time_s[rows]).cast(pa.timestamp("s", "UTC")),
            "rtt": pa.array(table.rtt_ms[rows].astype(np.float32)),
        }
        self._writer = None

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        if kind is None:
            move_atomically(self.aside, self.path)
        else:
            self.aside.unlink(missing_ok=True)

    def write(self, method: str, scores: Scores) -> None:
        """Adds the scores of the first queries by one method; NaN is null."""
        columns = {name: column.slice(0, len(scores)) for name, column in self._columns.items()}
        columns["method"] = _repeated(method, len(scores))
        values = {name: getattr(scores, name) for name in ("p_fail", "nll_nats", "crps_log", "pit")}
        values |= {f"q{level:g}": scores.quantiles_ms[:, i] for i, level in enumerate(QUANTILE_LEVELS)}
        columns |= {name: pa.array(one.astype(np.float32), from_pandas=True) for name, one in values.items()}
        table = pa.table(columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.aside, table.schema, compression="zstd")
        self._writer.write_table(table)


def _repeated(text: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, dtype=np.int8)), pa.array([text]))


def _addresses(addresses: np.ndarray, places: np.ndarray) -> pa.DictionaryArray:
    used, index = np.unique(places, return_inverse=True)
    texts = pa.array([format_address(addresses[i].tobytes()) for i in used], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), texts)
