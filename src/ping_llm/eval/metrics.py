"""Laws and answers in, scores of each query out; scores in, one line of a cell out.

Every aggregate is weighted so that each source counts the same, however many queries it has; a bootstrap over sources
passes other weights. Scores of RTTs are over answered queries, those of failures over all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np

from ping_llm.data.tokenization import encode_rtt, rtt_code_edges_ms
from ping_llm.eval.columns import log_rtt
from ping_llm.eval.law import QuantileLaws

QUANTILE_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
INTERVALS = {50: (0.25, 0.75), 80: (0.1, 0.9), 90: (0.05, 0.95)}
"""Of each central interval in percent, its levels."""

WITHIN_PERCENT = (10, 25)
PIT_BINS = 20
LEAST_P_FAIL = 1e-6
"""Chances of failure are kept this far from 0 and 1, so that one surprise does not make a mean infinite."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What q predictions are judged by; of a failed query `crps_log` and `pit` are NaN."""

    rtt_ms: np.ndarray  # (q,) the answers, −1 = failed
    p_fail: np.ndarray  # (q,)
    nll_nats: np.ndarray  # (q,) −log of (1 − p_fail) · density per log-ms, or −log p_fail
    crps_log: np.ndarray  # (q,) log-ms
    pit: np.ndarray  # (q,)
    quantiles_ms: np.ndarray  # (q, 7) at QUANTILE_LEVELS, of an answered ping

    def __post_init__(self) -> None:
        for column in fields(self):
            if len(getattr(self, column.name)) != len(self.rtt_ms):
                raise ValueError(f"{column.name} has {len(getattr(self, column.name))} rows, not {len(self.rtt_ms)}")

    def __len__(self) -> int:
        return len(self.rtt_ms)

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
        return np.where(self.answered, self.nll_nats + np.log1p(-_clip_chance(self.p_fail)), np.nan)

    @property
    def rtt_bits(self) -> np.ndarray:
        """(q,) bits to tell the 16-bit code of the RTT given an answer; NaN where the query failed."""
        edges = np.log(rtt_code_edges_ms())
        code = encode_rtt(np.maximum(self.rtt_ms, 1e-3))
        return (self.rtt_nll_nats - np.log(edges[code + 1] - edges[code])) / np.log(2)


def score(laws: QuantileLaws, p_fail: np.ndarray, rtt_ms: np.ndarray) -> Scores:
    """The scores of q predictions: laws of an answered ping, chances of failure (q,), and the answers (q,)."""
    answered, log_ms = rtt_ms >= 0, log_rtt(rtt_ms)
    chance, at = _clip_chance(p_fail), np.where(answered, log_ms, 0.0)
    return Scores(
        rtt_ms=rtt_ms,
        p_fail=p_fail,
        nll_nats=np.where(answered, -laws.log_density(at) - np.log1p(-chance), -np.log(chance)),
        crps_log=np.where(answered, laws.crps(at), np.nan),
        pit=np.where(answered, laws.cdf(at), np.nan),
        quantiles_ms=np.exp(laws.quantile(np.array(QUANTILE_LEVELS))),
    )


def source_weights(source: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """(q,) weights under which each source that has a counted query weighs 1; queries not counted weigh 0."""
    counted = np.ones(len(source), dtype=bool) if counted is None else counted
    _, index = np.unique(source, return_inverse=True)
    return np.where(counted, 1 / np.maximum(np.bincount(index, weights=counted), 1)[index], 0.0)


@dataclass(frozen=True)
class Aggregate:
    """One cell of a report: a split, a number of measurements told, a draw, and a predictor. Macro over sources."""

    queries: int
    answered: int
    sources: int
    nll_nats: float  # of results, failures among them
    rtt_nll_nats: float  # of RTTs given an answer, density per log-ms
    rtt_bits: float  # per RTT given an answer, of its 16-bit code
    crps_log: float  # log-ms
    median_rel_error: float
    p90_rel_error: float
    within: dict[int, float]  # percent: share
    coverage: dict[int, float]  # percent of the interval: share
    width_log: dict[int, float]  # percent of the interval: mean width in log-ms
    pit_ks: float  # largest distance of the PIT's CDF from the uniform one
    pit_histogram: tuple[float, ...] = field(repr=False)  # 20 shares
    fail_rate: float = np.nan  # the base rate
    fail_brier: float = np.nan
    fail_log_loss: float = np.nan  # nats
    fail_auc: float = np.nan  # NaN where all or none failed


def aggregate(scores: Scores, source: np.ndarray, source_counts: np.ndarray | None = None) -> Aggregate:
    """The cell of q scores whose queries have these sources (q,).

    `source_counts` (q,) is how often a bootstrap drew each query's source; without it, once.
    """
    drawn = np.ones(len(scores)) if source_counts is None else source_counts
    everything = source_weights(source) * drawn
    answers = source_weights(source, scores.answered) * drawn
    if not everything.sum():
        raise ValueError("no queries to aggregate; evaluate a part that holds measurements")
    error = scores.relative_error
    histogram = np.bincount(
        np.clip((np.nan_to_num(scores.pit) * PIT_BINS).astype(int), 0, PIT_BINS - 1), answers, PIT_BINS
    )
    low_high = {
        percent: [scores.quantiles_ms[:, QUANTILE_LEVELS.index(level)] for level in levels]
        for percent, levels in INTERVALS.items()
    }
    return Aggregate(
        queries=len(scores),
        answered=int(scores.answered.sum()),
        sources=len(np.unique(source)),
        nll_nats=weighted_mean(scores.nll_nats, everything),
        rtt_nll_nats=weighted_mean(scores.rtt_nll_nats, answers),
        rtt_bits=weighted_mean(scores.rtt_bits, answers),
        crps_log=weighted_mean(scores.crps_log, answers),
        median_rel_error=weighted_quantile(error, answers, 0.5),
        p90_rel_error=weighted_quantile(error, answers, 0.9),
        within={percent: weighted_mean(error <= percent / 100, answers) for percent in WITHIN_PERCENT},
        coverage={
            percent: weighted_mean((low <= scores.rtt_ms) & (scores.rtt_ms <= high), answers)
            for percent, (low, high) in low_high.items()
        },
        width_log={percent: weighted_mean(np.log(high / low), answers) for percent, (low, high) in low_high.items()},
        pit_ks=ks_uniform(scores.pit, answers),
        pit_histogram=tuple((histogram / max(histogram.sum(), 1e-300)).tolist()),
        fail_rate=weighted_mean(~scores.answered, everything),
        fail_brier=weighted_mean((scores.p_fail - ~scores.answered) ** 2, everything),
        fail_log_loss=weighted_mean(_log_loss(scores.p_fail, ~scores.answered), everything),
        fail_auc=auc(scores.p_fail, ~scores.answered, everything),
    )


def source_means(values: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct sources, ascending, and the mean of each over its values (q,) that are not NaN (NaN if none is)."""
    distinct, index = np.unique(source, return_inverse=True)
    counted = ~np.isnan(values)
    total = np.bincount(index, np.where(counted, values, 0.0), len(distinct))
    with np.errstate(invalid="ignore"):
        return distinct, total / np.bincount(index, counted, len(distinct))


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Σ w x / Σ w over weights above 0; NaN if there are none."""
    used = weights > 0
    return float(np.average(values[used], weights=weights[used])) if used.any() else np.nan


def weighted_quantile(values: np.ndarray, weights: np.ndarray, level: float) -> float:
    """The value at which half a share of weight either side of `level` meets; equal weights give the usual median."""
    used = weights > 0
    if not used.any():
        return np.nan
    order = np.argsort(values[used])
    x, w = values[used][order], weights[used][order]
    return float(np.interp(level * w.sum(), np.cumsum(w) - w / 2, x))


def ks_uniform(values: np.ndarray, weights: np.ndarray) -> float:
    """Kolmogorov–Smirnov distance of weighted values from the uniform law on 0 … 1; NaN without values."""
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


def _log_loss(chance: np.ndarray, happened: np.ndarray) -> np.ndarray:
    chance = _clip_chance(chance)
    return -np.where(happened, np.log(chance), np.log1p(-chance))


def _clip_chance(chance: np.ndarray) -> np.ndarray:
    return np.clip(chance, LEAST_P_FAIL, 1 - LEAST_P_FAIL)
