"""Earlier RTTs of the same pair in, the next one out: last seen, moving averages, a rolling median, and their law.

The history of a pair is what train holds of it followed by what the context tells that is later. A pair without one is
answered from the source's history with the destination's /24 (or /48), then /16 (or /32), then by additive biases.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ping_llm.eval.baselines.base import (
    FOLDS,
    Learned,
    PointMethod,
    Prediction,
    ResidualLaws,
    Task,
    evidence,
    fold_predictions,
    task_of,
)
from ping_llm.eval.baselines.pairs import Pairs, find
from ping_llm.eval.baselines.simple import Additive, row_medians
from ping_llm.eval.columns import Measurements, Queries, QueryView, first_true, prefix_ids
from ping_llm.eval.law import INNER_LEVELS, QuantileLaws, pool

MEMORY = 100
"""Measurements of a pair that are kept."""

PREFIX_BITS = ((32, 128), (24, 48), (16, 32))
"""IPv4 and IPv6 bits of the destination that must agree, finest first."""


class Series:
    """The latest answered RTTs of each source to each destination prefix, and what a query's history is."""

    def __init__(self, train: Measurements, bits: tuple[int, int]) -> None:
        rows = np.flatnonzero(train.rtt_ms >= 0)
        self._prefix = prefix_ids(train.addresses, *bits)  # (a,)
        self._probes = np.unique(train.probe[rows])
        key = self._key(train.probe[rows], train.dst_id[rows])
        order = np.lexsort((train.time_s[rows], key))
        self._keys, start, count = np.unique(key[order], return_index=True, return_counts=True)
        self._end, self._count = start + count, count
        self._log_ms, self._time_s = train.log_ms[rows][order], train.time_s[rows][order]

    def history(self, view: QueryView, length: int) -> np.ndarray:
        """(q, length) log-ms of each query's history, most recent first, NaN = no more."""
        at = find(self._keys, self._key(view.probe, view.dst_id))
        known, newest = at >= 0, self._end[at] - 1
        back = np.arange(min(length, MEMORY))
        trained = np.where(
            known[:, None] & (back < self._count[at][:, None]),
            self._log_ms[np.maximum(newest[:, None] - back, 0)],
            np.nan,
        )
        last_s = np.where(known, self._time_s[newest], np.iinfo(np.int64).min)
        same = (view.context_dst_id >= 0) & (self._prefix[view.context_dst_id] == self._prefix[view.dst_id][:, None])
        told = np.where(same & (view.context_time_s > last_s[:, None]), view.context_log_ms, np.nan)
        both = np.concatenate([told, trained], axis=1)
        return first_true(~np.isnan(both), both, length, np.nan)

    def _key(self, probe: np.ndarray, dst_id: np.ndarray) -> np.ndarray:
        source = find(self._probes, probe)  # an unknown source has no series of its own: −1 shares none
        return np.where(source >= 0, (source.astype(np.int64) << 32) | self._prefix[dst_id], -1)


class Backoff:
    """The history of the finest prefix that has one, and the additive prediction where none has."""

    def __init__(self, train: Measurements, levels: int = 3) -> None:
        self._series = [Series(train, bits) for bits in PREFIX_BITS[:levels]]
        self.additive = Additive(train)

    def history(self, view: QueryView, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(q, length) log-ms, most recent first, and (q,) the level of it: 0 … 2, 3 = there is none."""
        history = np.full((len(view), length), np.nan)
        level = np.full(len(view), 3)
        for i, series in enumerate(self._series):
            rows = np.flatnonzero(level == 3)
            if not len(rows):
                break
            found = series.history(view.take(rows), length)
            has = ~np.isnan(found[:, 0])
            history[rows[has]], level[rows[has]] = found[has], i
        return history, level


def _learn(train: Measurements, length: int, summary) -> Learned:
    """The summary of (q, length) histories of the pair alone; a pair without one is answered by additive biases."""
    backoff = Backoff(train, levels=1)

    def predict(view: QueryView) -> np.ndarray:
        history, level = backoff.history(view, length)
        return np.where(level < 3, summary(history), backoff.additive(view))

    return predict


def learn_last(train: Measurements) -> Learned:
    """The last RTT of the pair."""
    return _learn(train, 1, lambda history: history[:, 0])


def learn_ema(train: Measurements, rate: float) -> Learned:
    """The exponential moving average of the pair's log-RTTs; the first starts it."""

    def summary(history: np.ndarray) -> np.ndarray:
        average = np.full(len(history), np.nan)
        for column in history.T[::-1]:
            step = np.where(np.isnan(average), column, average + rate * (column - average))
            average = np.where(np.isnan(column), average, step)
        return average

    return _learn(train, MEMORY, summary)


def learn_rolling_median(train: Measurements, length: int = 10) -> Learned:
    """The median of the pair's last RTTs."""
    return _learn(train, length, lambda history: row_medians(history, np.nan))


LAST_SEEN = PointMethod("last_seen", learn_last)
EMA_FAST = PointMethod("ema_0.3", lambda train: learn_ema(train, 0.3))
EMA_SLOW = PointMethod("ema_0.125", lambda train: learn_ema(train, 0.125))
ROLLING_MEDIAN = PointMethod("rolling_median_10", learn_rolling_median)


def learn_backoff_median(train: Measurements, length: int) -> Learned:
    """The median of the finest history there is; without one, additive biases."""
    backoff = Backoff(train)

    def predict(view: QueryView) -> np.ndarray:
        history, level = backoff.history(view, length)
        return np.where(level < 3, row_medians(history, np.nan), backoff.additive(view))

    return predict


BACKOFF_MEDIAN = PointMethod("backoff_median", learn_backoff_median, ({"length": 5}, {"length": 10}, {"length": 50}))


class PairHistory:
    """Quantiles of the finest history of a query, pooled with a law of residuals around its median.

    n values of the pair itself weigh n / (n + strength), those of a prefix nothing: other hosts' RTTs place the law, and
    its residuals say how well.
    """

    name = "pair_history"
    LENGTHS = (20, 50, 100)
    STRENGTHS = (2.0, 5.0, 15.0)

    def __init__(self) -> None:
        self.choices: dict[str, Any] = {}

    def fit(self, train: Measurements, val: Queries) -> None:
        """Chooses, by CRPS on val, how many values of history to use and what they weigh."""
        task = task_of(train, val)
        self._residuals = ResidualLaws(*fold_predictions(task, BACKOFF_MEDIAN))
        fold = Backoff(task.folds[0])
        stride = max(1, len(task.val_views[0][0]) // 1000)
        views = [(view.take(slice(None, None, stride)), answer[::stride]) for view, answer in task.val_views[::2]]
        crps = {}
        for length in self.LENGTHS:
            for strength in self.STRENGTHS:
                choice = {"length": length, "strength": strength}
                crps[length, strength] = sum(
                    self._laws(task, fold, 0, view, **choice).crps(answer).mean() for view, answer in views
                )
        length, strength = min(crps, key=crps.get)
        self.choices = {"history": length, "strength": strength, "median_of": task.setting(BACKOFF_MEDIAN)["length"]}
        self._task, self._backoff = task, Backoff(train)
        self._folds = [fold, *(Backoff(task.folds[i]) for i in range(1, FOLDS))]

    def predict(self, queries: QueryView) -> Prediction:
        """The laws of queries."""
        return Prediction(self._chosen(None, self._backoff, queries), self._task.failure.p_fail(queries))

    def fold_laws(self, task: Task, fold: int, view: QueryView) -> QuantileLaws:
        """The laws as a model learned from a fold would give them."""
        return self._chosen(fold, self._folds[fold], view)

    def _chosen(self, fold: int | None, backoff: Backoff, view: QueryView) -> QuantileLaws:
        choice = {"length": self.choices["history"], "strength": self.choices["strength"]}
        return self._laws(self._task, backoff, fold, view, **choice)

    def _laws(
        self, task: Task, backoff: Backoff, fold: int | None, view: QueryView, length: int, strength: float
    ) -> QuantileLaws:
        pairs = Pairs.of(task.train if fold is None else task.folds[fold])
        around = self._residuals(task.learned(BACKOFF_MEDIAN, fold)(view), evidence(pairs, view))
        history, level = backoff.history(view, length)
        rows = np.flatnonzero(level == 0)
        if not len(rows):
            return around
        count = (~np.isnan(history[rows])).sum(axis=1)
        own = np.zeros(len(view))
        own[rows] = count / (count + strength)
        blank = np.where(np.isnan(history[:, :1]), around.median[:, None], history)  # of weight 0
        everyone = np.maximum((~np.isnan(blank)).sum(axis=1), 1)
        return pool([empirical_laws(blank, everyone), around], np.stack([own, 1 - own], axis=1))


def empirical_laws(history: np.ndarray, count: np.ndarray) -> QuantileLaws:
    """The laws of (q, length) log-ms with count (q,) numbers a row; the i-th smallest is the (i + ½)/count quantile."""
    ordered = np.sort(history, axis=1)  # NaN last
    place = np.clip(count[:, None] * INNER_LEVELS - 0.5, 0, count[:, None] - 1)  # (q, L − 2)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, count[:, None] - 1)
    low, high = np.take_along_axis(ordered, below, 1), np.take_along_axis(ordered, above, 1)
    return QuantileLaws.from_quantiles(low + (place - below) * (high - low))
