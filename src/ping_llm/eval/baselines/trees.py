"""Features of queries in, quantiles of log-RTT by gradient-boosted trees (LightGBM) out.

The trees learn from practice queries, cross-fitted inside train: of the last stretch of train, after learning from the rest
without some sources, prefixes and pairs, so that they see how far each feature is to be trusted where a pair is new. They
stop where the loss on val is least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.data.measurement import is_ipv4, log_rtt
from ping_llm.eval.baselines.base import (
    Baseline,
    Learned,
    bucket_keys,
    bucket_quantiles,
    evidence,
    remember,
)
from ping_llm.eval.baselines.coordinates import VIVALDI_2D, VIVALDI_8D
from ping_llm.eval.baselines.factors import DMFSGD_METHOD, LOG_FACTORS
from ping_llm.eval.baselines.history import Backoff
from ping_llm.eval.baselines.neighbours import PREFIX_KNN, PROFILE_KNN
from ping_llm.eval.baselines.pairs import Pairs, hide, practice_queries
from ping_llm.eval.baselines.simple import ADDITIVE, DESTINATION_MEDIAN, SOURCE_MEDIAN, row_medians
from ping_llm.eval.columns import Measurements, Queries, QueryView, place_in_group
from ping_llm.eval.distribution import LEAST_WIDTH, QuantileDistributions, interpolate_rows

if TYPE_CHECKING:
    import lightgbm

LEVELS = np.array([0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.98])
METHODS = (
    *(ADDITIVE, VIVALDI_2D, VIVALDI_8D, DMFSGD_METHOD, LOG_FACTORS, PROFILE_KNN, PREFIX_KNN),
    *(SOURCE_MEDIAN, DESTINATION_MEDIAN),
)
"""Whose predictions are features."""

FOLDS = 2  # of practice queries, each with other units hidden
HISTORY = 20  # values of a pair that are looked at
LATE_PERCENT = 25  # of the time span of each source, from which practice queries are drawn
LEAST_TAIL = 0.01  # log-ms from the median to an outer quantile, for the slope of the tail beyond


@dataclass(frozen=True)
class TreeSettings:
    """How many trees of which size learn from how many practice queries."""

    trees: int = 500  # at most
    leaves: int = 255
    rate: float = 0.05
    least_leaf: int = 100
    practice_queries: int = 40_000
    practice_per_source: int = 150
    patience: int = 30  # trees without a lower loss on val, after which no more are made
    threads: int = 1  # on a busy machine threads that wait for each other take minutes; 0 = all cores


class Features:
    """What the trees see, from what METHODS learned from one table."""

    def __init__(self, train: Measurements, learned: list[Learned]) -> None:
        self.pairs, self._backoff, self._learned = Pairs.of(train), Backoff(train), learned

    def __call__(self, view: QueryView) -> tuple[np.ndarray, np.ndarray]:
        """(q, F) float32 features, NaN = unknown, and (q,) the log-ms that the trees' output is added to."""
        predicted = np.stack([learned(view) for learned in self._learned], axis=1)
        history, level = self._backoff.history(view, HISTORY)
        recent = row_medians(history[:, :10], np.nan)
        base = np.where(level == 0, recent, np.median(predicted[:, :6], axis=1))
        of_history = (level, (~np.isnan(history)).sum(axis=1), history[:, 0] - base, recent - base, *_spread(history))
        columns = [
            *(predicted, predicted - base[:, None], np.stack(of_history, axis=1)),
            *(_context_features(view, predicted[:, 0]), evidence(self.pairs, view)),
            (view.time_s % 86_400 / 3600)[:, None],
            *(_address_features(view.addresses)[ids] for ids in (view.src_id, view.dst_id)),
        ]
        return np.concatenate(columns, axis=1).astype(np.float32), base


class LightGBM(Baseline):
    """One booster a quantile, over the base of `Features`; levels corrected by where the answers of val fell between."""

    name = "lightgbm"

    def __init__(self, settings: TreeSettings | None = None) -> None:
        self.settings = settings or TreeSettings()

    def learn(self) -> dict[str, Any]:
        """Learns from practice queries, stops on val, and collects the levels there."""
        self._features = remember(Features(self.task.train, [self.task.learned(method) for method in METHODS]))
        views, answers = zip(*self.task.choice_views, strict=True)
        of_val = [(*self._features(view), y) for view, y in self.task.choice_views]
        self._boosters = _boost([self._practised(seed) for seed in range(FOLDS)], of_val, self.settings)
        self._quantiles = remember(self._predict)
        fallen = np.concatenate([_level_of(self._quantiles(view), y) for view, y in zip(views, answers, strict=True)])
        self._levels = bucket_quantiles(fallen, bucket_keys(self.task.choice_kinds), self.task.choice_hosts)
        return {"trees": [booster.best_iteration for booster in self._boosters]}

    def predict_distributions(self, view: QueryView) -> QuantileDistributions:
        """The quantiles at corrected levels."""
        levels = self._levels(bucket_keys(self.task.evidence(view)))
        return QuantileDistributions.from_quantiles(_value_at(self._quantiles(view), levels))

    def _predict(self, view: QueryView) -> np.ndarray:
        """(q, 9) log-ms at LEVELS, in order."""
        x, base = self._features(view)
        return np.sort(base[:, None] + np.stack([booster.predict(x) for booster in self._boosters], axis=1), axis=1)

    def _practised(self, seed: int) -> tuple[np.ndarray, ...]:
        """Features, bases and answers of the practice queries of one fold."""
        rest, queries = _practice(self.task.train, seed, self.settings)
        pairs, learned = Pairs.of(rest), []
        for method in METHODS:
            choice = self.task.choice(method)
            learned.append(choice.apply(method.learn(rest, **choice.setting), method, pairs))
        return (*Features(rest, learned)(queries.view()), log_rtt(queries.rtt_ms))


def _boost(
    practice: Sequence[tuple[np.ndarray, ...]], of_val: Sequence[tuple[np.ndarray, ...]], settings: TreeSettings
) -> list[lightgbm.Booster]:
    """One booster for each of LEVELS, of features, bases and answers."""
    import lightgbm

    x, base, y = (np.concatenate(column) for column in zip(*practice, strict=True))
    val_x, val_base, val_y = (np.concatenate(column) for column in zip(*of_val, strict=True))
    size = {"num_leaves": settings.leaves, "min_data_in_leaf": settings.least_leaf, "learning_rate": settings.rate}
    exact = {"deterministic": True, "force_col_wise": True, "seed": 0, "num_threads": settings.threads}
    parameters = {"objective": "quantile", "verbosity": -1} | size | exact
    boosters = []
    for level in LEVELS:
        data = lightgbm.Dataset(x, y - base)
        held = lightgbm.Dataset(val_x, val_y - val_base, reference=data)
        stop: list[Any] = [lightgbm.early_stopping(settings.patience, verbose=False)]
        boosters.append(
            lightgbm.train(parameters | {"alpha": level}, data, settings.trees, valid_sets=[held], callbacks=stop)
        )
    return boosters


def _practice(train: Measurements, seed: int, settings: TreeSettings) -> tuple[Measurements, Queries]:
    """Earlier measurements, some sources, prefixes and pairs hidden, and later answered queries, given 0 … 30."""
    rng = np.random.default_rng([seed, 0x7EE5])
    _, source, count = np.unique(train.src_id, return_inverse=True, return_counts=True)
    by_source, starts = train.time_s[np.argsort(source, kind="stable")], np.cumsum(count) - count
    first, last = np.minimum.reduceat(by_source, starts), np.maximum.reduceat(by_source, starts)
    late = 100 * (train.time_s - first[source]) > (100 - LATE_PERCENT) * (last - first)[source]
    shuffled = rng.permutation(np.flatnonzero(late & (train.rtt_ms >= 0)))
    few = shuffled[np.argsort(source[shuffled], kind="stable")]
    few = few[place_in_group(source[few]) < settings.practice_per_source]
    rows = np.sort(rng.permutation(few)[: settings.practice_queries // FOLDS])
    rest = train.take(~late) if (train.rtt_ms[~late] >= 0).any() else train
    return hide(rest, seed + 100), practice_queries(train, rows, rng)


def _context_features(view: QueryView, additive: np.ndarray) -> np.ndarray:
    """(q, 8): how many were given, answered, and to the destination, how long ago, and their RTTs."""
    log_ms, given = view.context_log_ms, view.context_dst_id >= 0
    if not log_ms.shape[1]:
        return np.repeat([[0.0] * 3 + [np.nan] * 5], len(view), axis=0)
    same = given & (view.context_dst_id == view.dst_id[:, None])
    age_s = np.where(given[:, 0], view.time_s - view.context_time_s[:, 0], np.nan)
    counts = (given.sum(axis=1), (~np.isnan(log_ms)).sum(axis=1), same.sum(axis=1))
    middle, lowest = row_medians(log_ms, np.nan), np.fmin.reduce(log_ms, axis=1)
    return np.stack([*counts, np.log1p(age_s), middle, middle - additive, lowest, log_ms[:, 0]], axis=1)


def _address_features(addresses: np.ndarray) -> np.ndarray:
    """(a, 7): the family, and the leading bytes: 4 of an IPv4 address, 6 of an IPv6 one."""
    ipv4 = is_ipv4(addresses)[:, None]
    bytes4 = np.concatenate([addresses[:, 12:].astype(float), np.full((len(addresses), 2), np.nan)], axis=1)
    return np.concatenate([ipv4, np.where(ipv4, bytes4, addresses[:, :6])], axis=1)


def _spread(history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (q, n) histories the range and the mean absolute step, NaN where there is one value or none."""
    wide = np.fmax.reduce(history, axis=1) - np.fmin.reduce(history, axis=1)
    step = np.abs(np.diff(history, axis=1))
    count = (~np.isnan(step)).sum(axis=1)
    mean = np.nansum(step, axis=1) / np.maximum(count, 1)
    return np.where(count > 0, wide, np.nan), np.where(count > 0, mean, np.nan)


def _knots(quantiles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The quantiles apart, their levels (q, 9), and (q,) log-ms in which the chance below, and above, the outer ones
    falls by e: as between these and the median."""
    knots = quantiles + LEAST_WIDTH * (LEVELS - 0.5)
    middle, span = knots[:, len(LEVELS) // 2], np.log(0.5 / LEVELS[0])
    low, high = (np.maximum(width, LEAST_TAIL) / span for width in (middle - knots[:, 0], knots[:, -1] - middle))
    return knots, np.broadcast_to(LEVELS, knots.shape), low, high


def _level_of(quantiles: np.ndarray, log_ms: np.ndarray) -> np.ndarray:
    """(q,) the level at which each answer falls: linear between quantiles, exponential tails."""
    knots, levels, low, high = _knots(quantiles)
    level = interpolate_rows(log_ms[:, None], knots, levels)[:, 0]
    below, above = log_ms - knots[:, 0], knots[:, -1] - log_ms
    level = np.where(below < 0, LEVELS[0] * np.exp(np.minimum(below, 0) / low), level)
    return np.where(above < 0, 1 - (1 - LEVELS[-1]) * np.exp(np.minimum(above, 0) / high), level)


def _value_at(quantiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(q, m) log-ms at levels (q, m): the inverse of `_level_of`."""
    knots, knot_levels, low, high = _knots(quantiles)
    inside, tiny = interpolate_rows(levels, knot_levels, knots), 1e-12
    below = np.log(np.clip(levels, tiny, LEVELS[0]) / LEVELS[0])  # 0 inside
    above = np.log(np.clip(1 - levels, tiny, 1 - LEVELS[-1]) / (1 - LEVELS[-1]))
    return inside + low[:, None] * below - high[:, None] * above
