"""Earlier RTTs of the same pair in, the next one out: last seen, moving averages, a rolling median, and a distribution.

The history of a pair is what train holds of it from before the query's second, followed by what of the context is later. A
pair without one is answered from what its source's /24 (or /48) saw of the destination, then from the histories of either
with the destination's /24 (/48), then of the source with its /16 (/32), then by additive biases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from ping_llm.eval.baselines.base import Baseline, Learned, PointBaseline, PointMethod
from ping_llm.eval.baselines.pairs import Past
from ping_llm.eval.baselines.simple import Additive, row_medians
from ping_llm.eval.columns import Measurements, QueryView, first_true, pair_keys, prefix_ids
from ping_llm.eval.distribution import INNER_LEVELS, QuantileDistributions, pool

MEMORY = 100  # measurements of train that a history goes back
EXACT, NARROW, WIDE = (32, 128), (24, 48), (16, 32)  # IPv4 and IPv6 bits of an address that must agree
LEVELS = ((EXACT, EXACT), (NARROW, EXACT), (EXACT, NARROW), (NARROW, NARROW), (EXACT, WIDE))
"""Of source and destination, finest first."""

NO_HISTORY = len(LEVELS)


class Series:
    """The answered RTTs of each source prefix to each destination prefix, and what a query's history is."""

    def __init__(self, train: Measurements, source_bits: tuple[int, int], destination_bits: tuple[int, int]) -> None:
        rows = np.flatnonzero(train.rtt_ms >= 0)
        self._source, self._prefix = (prefix_ids(train.addresses, *bits) for bits in (source_bits, destination_bits))
        self._past = Past(self._key(train.src_id[rows], train.dst_id[rows]), train.time_s[rows])
        self._log_ms = np.append(train.log_ms[rows][self._past.order], np.nan)

    def history(self, view: QueryView, length: int) -> np.ndarray:
        """(q, length) log-ms of each query's history, most recent first, NaN = no more."""
        start, stop = self._past.before(self._key(view.src_id, view.dst_id), view.time_s)
        back = stop[:, None] - 1 - np.arange(min(length, MEMORY))
        trained = self._log_ms[np.where(back >= start[:, None], back, -1)]
        last_s = self._past.last_s(start, stop)
        same = (view.context_dst_id >= 0) & (self._prefix[view.context_dst_id] == self._prefix[view.dst_id][:, None])
        given = np.where(same & (view.context_time_s > last_s[:, None]), view.context_log_ms, np.nan)
        both = np.concatenate([given, trained], axis=1)
        return first_true(~np.isnan(both), both, length, np.nan)

    def _key(self, src_id: np.ndarray, dst_id: np.ndarray) -> np.ndarray:
        return pair_keys(self._source[src_id], self._prefix[dst_id])


class Backoff:
    """The history of the finest level that has one, and the additive prediction where none has."""

    def __init__(self, train: Measurements, levels: int = len(LEVELS)) -> None:
        self._series = [Series(train, *bits) for bits in LEVELS[:levels]]
        self.additive = Additive(train)

    def history(self, view: QueryView, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(q, length) log-ms, most recent first, and (q,) which of LEVELS it is of, or NO_HISTORY."""
        history, level = np.full((len(view), length), np.nan), np.full(len(view), NO_HISTORY)
        for i, series in enumerate(self._series):
            rows = np.flatnonzero(level == NO_HISTORY)
            found = series.history(view.take(rows), length)
            has = ~np.isnan(found[:, 0])
            history[rows[has]], level[rows[has]] = found[has], i
        return history, level


def learn_history(
    train: Measurements, length: int, summary: Callable[[np.ndarray], np.ndarray], levels: int = 1
) -> Learned:
    """The summary of (q, length) histories, of the pair alone or of coarser levels too; without one, additive biases."""
    backoff = Backoff(train, levels)

    def predict(view: QueryView) -> np.ndarray:
        history, level = backoff.history(view, length)
        return np.where(level < NO_HISTORY, summary(history), backoff.additive(view))

    return predict


def moving_average(history: np.ndarray, rate: float) -> np.ndarray:
    """(q,) exponential moving averages of (q, length) histories, most recent first; the first value starts one."""
    average = np.full(len(history), np.nan)
    for column in history.T[::-1]:
        step = np.where(np.isnan(average), column, average + rate * (column - average))
        average = np.where(np.isnan(column), average, step)
    return average


_MEDIAN = partial(row_medians, missing=np.nan)

LAST_SEEN = PointMethod("last_seen", partial(learn_history, length=1, summary=lambda history: history[:, 0]))
EMA_FAST, EMA_SLOW = (
    PointMethod(f"ema_{rate}", partial(learn_history, length=MEMORY, summary=partial(moving_average, rate=rate)))
    for rate in (0.3, 0.125)
)
ROLLING_MEDIAN = PointMethod("rolling_median_10", partial(learn_history, length=10, summary=_MEDIAN))
BACKOFF_MEDIAN = PointMethod(
    "backoff_median",
    partial(learn_history, summary=_MEDIAN, levels=len(LEVELS)),
    ({"length": 5}, {"length": 10}, {"length": 50}),
)


class PairHistory(Baseline):
    """Quantiles of the finest history of a query, pooled with residuals around its median.

    n values of the pair itself weigh n / (n + strength), those of a prefix nothing: other hosts' RTTs place the
    distribution, and its residuals say how well.
    """

    name = "pair_history"
    LENGTHS = (20, 50, 100)
    STRENGTHS = (2.0, 5.0, 15.0)

    def learn(self) -> dict[str, Any]:
        """Chooses, by CRPS on val, how many values of history to use and what they weigh."""
        self._around = PointBaseline(BACKOFF_MEDIAN)
        self._around.fit(self.task.train, self.task.val)
        self._backoff = Backoff(self.task.train)
        crps = {
            choice: sum(self._pooled(view, *choice).crps(y).mean() for view, y in self.task.choice_views)
            for choice in product(self.LENGTHS, self.STRENGTHS)
        }
        length, strength = min(crps, key=crps.__getitem__)
        return {"history": length, "strength": strength, "median_of": self._around.choices["length"]}

    def predict_distributions(self, view: QueryView) -> QuantileDistributions:
        """With the history and strength that were chosen."""
        return self._pooled(view, self.choices["history"], self.choices["strength"])

    def _pooled(self, view: QueryView, length: int, strength: float) -> QuantileDistributions:
        around = self._around.distributions(view)
        history, level = self._backoff.history(view, length)
        if not (level == 0).any():
            return around
        count = (~np.isnan(history)).sum(axis=1)
        own = np.where(level == 0, count / (count + strength), 0.0)
        blank = np.where(np.isnan(history[:, :1]), around.median[:, None], history)  # of weight 0
        everyone = np.maximum((~np.isnan(blank)).sum(axis=1), 1)
        return pool([empirical_distributions(blank, everyone), around], np.stack([own, 1 - own], axis=1))


def empirical_distributions(history: np.ndarray, count: np.ndarray) -> QuantileDistributions:
    """Of (q, length) log-ms with count (q,) numbers a row; the i-th smallest is the (i + ½)/count quantile."""
    ordered = np.sort(history, axis=1)  # NaN last
    place = np.clip(count[:, None] * INNER_LEVELS - 0.5, 0, count[:, None] - 1)  # (q, L − 2)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, count[:, None] - 1)
    low, high = np.take_along_axis(ordered, below, 1), np.take_along_axis(ordered, above, 1)
    return QuantileDistributions.from_quantiles(low + (place - below) * (high - low))
