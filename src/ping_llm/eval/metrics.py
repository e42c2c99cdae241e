"""Distributions and answers in, scores of each query out, as columns of one long table; and statistics of weighted scores.

Scores of RTTs are over answered queries, those of failures over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ping_llm.data.measurement import log_rtt
from ping_llm.data.tokenization import encode_rtt, rtt_code_edges_ms
from ping_llm.eval.distribution import QuantileDistributions, clip_chance, log_loss

QUANTILE_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
PIT_BINS = 20
ERROR_LEVELS = np.linspace(0.02, 1, 50)


@dataclass(frozen=True, eq=False)
class Scores:
    """What q predictions are judged by; of a failed query `crps_log` and `pit` are NaN."""

    rtt_ms: np.ndarray  # (q,) the answers, −1 = failed
    p_fail: np.ndarray  # (q,)
    nll_nats: np.ndarray  # (q,) −log of (1 − p_fail) · density per log-ms, or −log p_fail
    crps_log: np.ndarray  # (q,) log-ms
    pit: np.ndarray  # (q,)
    quantiles_ms: np.ndarray  # (q, 7) at QUANTILE_LEVELS, of an answered ping

    def columns(self) -> dict[str, np.ndarray]:
        """Of the long table, (q,) each: these, and the log-loss in nats of whether a query fails; of answered queries, else
        NaN: |median − actual| / actual, −log density per log-ms, and the bits needed to code the 16-bit RTT of the RTT."""
        answered, edges = self.rtt_ms >= 0, np.log(rtt_code_edges_ms())
        actual, code = np.where(answered, self.rtt_ms, np.nan), encode_rtt(np.maximum(self.rtt_ms, 1e-3))
        actual = np.maximum(actual, 1e-3)
        nll_nats = np.where(answered, self.nll_nats + np.log1p(-clip_chance(self.p_fail)), np.nan)
        scores = {name: getattr(self, name) for name in ("p_fail", "nll_nats", "crps_log", "pit")}
        return {"rtt": self.rtt_ms, **scores} | {
            "relative_error": np.abs(self.quantiles_ms[:, QUANTILE_LEVELS.index(0.5)] - actual) / actual,
            "rtt_nll_nats": nll_nats,
            "rtt_bits": (nll_nats - np.log(edges[code + 1] - edges[code])) / np.log(2),
            "fail_log_loss": log_loss(self.p_fail, ~answered),
            **{f"q{level:g}": self.quantiles_ms[:, i] for i, level in enumerate(QUANTILE_LEVELS)},
        }


def score(distributions: QuantileDistributions, p_fail: np.ndarray, rtt_ms: np.ndarray) -> Scores:
    """The scores of q predictions: distributions of an answered ping, chances of failure (q,), and the answers (q,)."""
    answered, log_ms = rtt_ms >= 0, log_rtt(rtt_ms)
    chance, at = clip_chance(p_fail), np.where(answered, log_ms, 0.0)
    return Scores(
        rtt_ms=rtt_ms,
        p_fail=p_fail,
        nll_nats=np.where(answered, -distributions.log_density(at) - np.log1p(-chance), -np.log(chance)),
        crps_log=np.where(answered, distributions.crps(at), np.nan),
        pit=np.where(answered, distributions.cdf(at), np.nan),
        quantiles_ms=np.exp(distributions.quantile(np.array(QUANTILE_LEVELS))),
    )


def long_table(scores: Mapping[str, Scores], source: np.ndarray) -> pa.Table:
    """A line for each method and query, of a source (q,); NaN is null."""
    tables = []
    for method, of_method in scores.items():
        count = len(of_method.rtt_ms)
        table = pa.table({"query": np.arange(count, dtype=np.int32), "source": source[:count]})
        for name, values in ({"method": pa.repeat(method, count)} | of_method.columns()).items():
            table = table.append_column(name, pa.array(values, from_pandas=True))
        tables.append(table)
    return pa.concat_tables(tables)


def source_weights(source: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """(q,) weights under which each source that has a counted query weighs 1; queries not counted weigh 0."""
    counted = np.ones(len(source), dtype=bool) if counted is None else counted
    _, index = np.unique(source, return_inverse=True)
    return np.where(counted, 1 / np.maximum(np.bincount(index, weights=counted), 1)[index], 0.0)


def error_quantiles(error: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(50,) errors (q,) below which a share ERROR_LEVELS of the weight (q,) lies; NaN without weight."""
    x, w = _ascending(error, weights)
    if not len(x):
        return np.full(len(ERROR_LEVELS), np.nan)
    below = np.cumsum(w)
    return x[np.searchsorted(below, ERROR_LEVELS * below[-1] * (1 - 1e-12))]


def weighted_quantile(values: np.ndarray, weights: np.ndarray, level: float) -> float:
    """The value at which half a share of weight either side of `level` meets; equal weights give the usual median."""
    x, w = _ascending(values, weights)
    return float(np.interp(level * w.sum(), np.cumsum(w) - w / 2, x)) if len(x) else np.nan


def ks_uniform(values: np.ndarray, weights: np.ndarray) -> float:
    """Kolmogorov–Smirnov distance of weighted values from the uniform distribution on 0 … 1; NaN without values."""
    x, w = _ascending(values, weights)
    after = np.cumsum(w) / weights[weights > 0].sum()
    return float(max((after - x).max(), (x - np.r_[0, after[:-1]]).max())) if len(x) else np.nan


def _ascending(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that weigh something, in order, and their weights."""
    used = weights > 0
    order = np.argsort(values[used])
    return values[used][order], weights[used][order]


def auc(chance: np.ndarray, happened: np.ndarray, weights: np.ndarray) -> float:
    """P(a case that happened had the greater chance than one that did not), ties half; NaN if there is only one kind."""
    _, rank = np.unique(chance, return_inverse=True)
    with_event = np.bincount(rank, weights * happened)
    without = np.bincount(rank, weights * ~happened)
    pairs = with_event.sum() * without.sum()
    below = np.cumsum(without) - without
    return float((with_event * (below + without / 2)).sum() / pairs) if pairs > 0 else np.nan
