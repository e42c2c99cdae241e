"""Distributions and answers in, scores of each query out, as columns of one long table; and statistics of weighted scores.

Scores of RTTs are over answered queries, those of failures over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from ping_llm.data.tokenization import encode_rtt, rtt_code_edges_ms
from ping_llm.eval.columns import log_rtt
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

    def __len__(self) -> int:
        return len(self.rtt_ms)

    def first(self, count: int) -> Scores:
        """The scores of the first queries."""
        return Scores(*(getattr(self, column.name)[:count] for column in fields(self)))

    @property
    def answered(self) -> np.ndarray:
        """(q,) bool."""
        return self.rtt_ms >= 0

    @property
    def relative_error(self) -> np.ndarray:
        """(q,) |median − actual| / actual; NaN where the query failed."""
        with np.errstate(invalid="ignore"):
            actual = np.where(self.answered, np.maximum(self.rtt_ms, 1e-3), np.nan)
        return np.abs(self.quantiles_ms[:, QUANTILE_LEVELS.index(0.5)] - actual) / actual

    @property
    def rtt_nll_nats(self) -> np.ndarray:
        """(q,) −log density per log-ms given an answer; NaN where the query failed."""
        return np.where(self.answered, self.nll_nats + np.log1p(-clip_chance(self.p_fail)), np.nan)

    @property
    def rtt_bits(self) -> np.ndarray:
        """(q,) bits to tell the 16-bit code of the RTT given an answer; NaN where the query failed."""
        edges = np.log(rtt_code_edges_ms())
        code = encode_rtt(np.maximum(self.rtt_ms, 1e-3))
        return (self.rtt_nll_nats - np.log(edges[code + 1] - edges[code])) / np.log(2)

    @property
    def fail_log_loss(self) -> np.ndarray:
        """(q,) nats, of whether a query fails."""
        return log_loss(self.p_fail, ~self.answered)

    def error_quantiles(self, probe: np.ndarray) -> np.ndarray:
        """(50,) relative errors below which a share ERROR_LEVELS of the answered queries lies, sources weighing the same."""
        weights, error = source_weights(probe, self.answered), self.relative_error
        order = np.argsort(np.where(weights > 0, error, np.inf))[: int((weights > 0).sum())]
        if not len(order):
            return np.full(len(ERROR_LEVELS), np.nan)
        below = np.cumsum(weights[order])
        return error[order][np.searchsorted(below, ERROR_LEVELS * below[-1] * (1 - 1e-12))]


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


def long_table(scores: Mapping[str, Scores], probe: np.ndarray) -> pa.Table:
    """A line for each method and query, of a source `probe` (q,); NaN is null."""
    names = ("p_fail", "nll_nats", "crps_log", "pit", "relative_error", "rtt_nll_nats", "rtt_bits", "fail_log_loss")
    tables = []
    for method, of_method in scores.items():
        count = len(of_method)
        columns = {"rtt": of_method.rtt_ms} | {name: getattr(of_method, name) for name in names}
        columns |= {f"q{level:g}": of_method.quantiles_ms[:, i] for i, level in enumerate(QUANTILE_LEVELS)}
        arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
        of_query = {"query": pa.array(np.arange(count, dtype=np.int32)), "probe": pa.array(probe[:count])}
        tables.append(pa.table({"method": pa.repeat(method, count)} | of_query | arrays))
    return pa.concat_tables(tables)


def source_weights(probe: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """(q,) weights under which each source that has a counted query weighs 1; queries not counted weigh 0."""
    counted = np.ones(len(probe), dtype=bool) if counted is None else counted
    _, index = np.unique(probe, return_inverse=True)
    return np.where(counted, 1 / np.maximum(np.bincount(index, weights=counted), 1)[index], 0.0)


def weighted_quantile(values: np.ndarray, weights: np.ndarray, level: float) -> float:
    """The value at which half a share of weight either side of `level` meets; equal weights give the usual median."""
    used = weights > 0
    if not used.any():
        return np.nan
    order = np.argsort(values[used])
    x, w = values[used][order], weights[used][order]
    return float(np.interp(level * w.sum(), np.cumsum(w) - w / 2, x))


def ks_uniform(values: np.ndarray, weights: np.ndarray) -> float:
    """Kolmogorov–Smirnov distance of weighted values from the uniform distribution on 0 … 1; NaN without values."""
    used = weights > 0
    if not used.any():
        return np.nan
    order = np.argsort(values[used])
    x, after = values[used][order], np.cumsum(weights[used][order]) / weights[used].sum()
    return float(max((after - x).max(), (x - np.r_[0, after[:-1]]).max()))


def auc(chance: np.ndarray, happened: np.ndarray, weights: np.ndarray) -> float:
    """P(a case that happened had the greater chance than one that did not), ties half; NaN if there is only one kind."""
    _, rank = np.unique(chance, return_inverse=True)
    with_event = np.bincount(rank, weights * happened)
    without = np.bincount(rank, weights * ~happened)
    pairs = with_event.sum() * without.sum()
    below = np.cumsum(without) - without
    return float((with_event * (below + without / 2)).sum() / pairs) if pairs > 0 else np.nan
