"""Features of queries in, quantiles of log-RTT by gradient-boosted trees (LightGBM) out.

The trees learn from practice queries: of the last stretch of train, after learning from the rest without some sources,
destinations and pairs, so that they see how far each feature is to be trusted where a pair is new.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.data.measurement import is_ipv4
from ping_llm.eval.baselines.base import Baseline, bucket_keys, bucket_quantiles, evidence, remember
from ping_llm.eval.baselines.coordinates import VIVALDI_2D, VIVALDI_8D
from ping_llm.eval.baselines.factors import DMFSGD_METHOD, LOG_FACTORS
from ping_llm.eval.baselines.history import Backoff
from ping_llm.eval.baselines.neighbours import PREFIX_KNN, PROFILE_KNN
from ping_llm.eval.baselines.pairs import Pairs, hide
from ping_llm.eval.baselines.simple import ADDITIVE, DESTINATION_MEDIAN, SOURCE_MEDIAN, row_medians
from ping_llm.eval.columns import Measurements, Queries, QueryView, earlier_measurements, log_rtt, place_in_group
from ping_llm.eval.distribution import LEAST_WIDTH, QuantileDistributions, interpolate_rows
from ping_llm.eval.queries import COUNTS

if TYPE_CHECKING:
    import lightgbm

LEVELS = np.array([0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.98])
METHODS = (
    *(ADDITIVE, VIVALDI_2D, VIVALDI_8D, DMFSGD_METHOD, LOG_FACTORS, PROFILE_KNN, PREFIX_KNN),
    *(SOURCE_MEDIAN, DESTINATION_MEDIAN),
)
"""Whose predictions are features."""

HISTORY = 20
LATE_PERCENT = 25
"""Of the time span of each source, from which practice queries are drawn."""


@dataclass(frozen=True)
class TreeSettings:
    """How many trees of which size learn from how many practice queries."""

    trees: int = 500
    leaves: int = 255
    rate: float = 0.05
    least_leaf: int = 100
    practice_queries: int = 40_000
    practice_per_source: int = 150
    threads: int = 0  # 0 = all cores


class Features:
    """What the trees see, from methods learned on one table."""

    def __init__(self, train: Measurements, settings: dict[str, dict[str, Any]]) -> None:
        self.pairs, self._backoff = Pairs.of(train), Backoff(train)
        self._learned = [method.learn(train, **settings[method.name]) for method in METHODS]

    def __call__(self, view: QueryView) -> tuple[np.ndarray, np.ndarray]:
        """(q, F) float32 features, NaN = unknown, and (q,) the log-ms that the trees' output is added to."""
        predicted = np.stack([learned(view) for learned in self._learned], axis=1)
        history, level = self._backoff.history(view, HISTORY)
        recent = row_medians(history[:, :10], np.nan)
        base = np.where(level == 0, recent, np.median(predicted[:, :6], axis=1))
        of_source = self._context_features(view, predicted[:, 0])
        of_history = np.stack(
            [level, (~np.isnan(history)).sum(axis=1), history[:, 0] - base, recent - base, *_spread(history)], axis=1
        )
        kinds = evidence(self.pairs, view)
        hour = (view.time_s % 86_400 / 3600)[:, None]
        of_addresses = _address_features(view.addresses)
        addresses = [of_addresses[view.src_id], of_addresses[view.dst_id]]
        columns = [predicted, predicted - base[:, None], of_history, of_source, kinds, hour, *addresses]
        return np.concatenate(columns, axis=1).astype(np.float32), base

    def _context_features(self, view: QueryView, additive: np.ndarray) -> np.ndarray:
        """(q, 8): how many were given, answered, and to the destination, how long ago, and their RTTs."""
        log_ms, given = view.context_log_ms, view.context_dst_id >= 0
        if not log_ms.shape[1]:
            return np.concatenate([np.zeros((len(view), 3)), np.full((len(view), 5), np.nan)], axis=1)
        same = given & (view.context_dst_id == view.dst_id[:, None])
        age_s = np.where(given[:, 0], view.time_s - view.context_time_s[:, 0], np.nan)
        counts = (given.sum(axis=1), (~np.isnan(log_ms)).sum(axis=1), same.sum(axis=1))
        middle, lowest = row_medians(log_ms, np.nan), np.fmin.reduce(log_ms, axis=1)
        return np.stack([*counts, np.log1p(age_s), middle, middle - additive, lowest, log_ms[:, 0]], axis=1)


class TreeQuantiles:
    """One booster a quantile; they predict the rest over the base of `Features`."""

    def __init__(
        self, train: Measurements, chosen: dict[str, dict[str, Any]], settings: TreeSettings, folds: int = 2
    ) -> None:
        practice = [_practice(train, seed, settings, settings.practice_queries // folds) for seed in range(folds)]
        learned = []
        for earlier, queries in practice:
            x, base = Features(earlier, chosen)(queries.view())
            learned.append((x, log_rtt(queries.rtt_ms) - base))
        x, y = (np.concatenate(column) for column in zip(*learned, strict=True))
        self._boosters = [_boost(x, y, level, settings) for level in LEVELS]
        self._features = Features(train, chosen)

    def quantiles(self, view: QueryView, trees: int) -> np.ndarray:
        """(q, 9) log-ms at LEVELS, in order."""
        x, base = self._features(view)
        rest = [booster.predict(x, num_iteration=trees) for booster in self._boosters]
        return np.sort(base[:, None] + np.stack(rest, axis=1), axis=1)


class LightGBM(Baseline):
    """Tree quantiles whose levels are corrected by where the answers of val fell between them."""

    name = "lightgbm"

    def __init__(self, settings: TreeSettings | None = None) -> None:
        self.settings = settings or TreeSettings()

    def learn(self) -> dict[str, Any]:
        """Chooses the number of trees by the pinball loss on val, and collects the levels; from fold 0 alone."""
        chosen = {method.name: self.task.setting(method) for method in METHODS}
        fold, views = TreeQuantiles(self.task.learned_from[0], chosen, self.settings), self.task.val_views
        counts = sorted({max(1, self.settings.trees * share // 10) for share in (1, 2, 5, 10)})
        predicted = {trees: [fold.quantiles(view, trees) for view, _ in views] for trees in counts}
        losses = {
            trees: np.mean([_pinball(one, y) for one, (_, y) in zip(quantiles, views, strict=True)])
            for trees, quantiles in predicted.items()
        }
        trees = min(losses, key=losses.__getitem__)
        fallen = np.concatenate([_level_of(one, y) for one, (_, y) in zip(predicted[trees], views, strict=True)])
        kinds = np.concatenate([self.task.evidence(view, 0) for view, _ in views])
        self._levels = bucket_quantiles(fallen, bucket_keys(kinds))
        model = TreeQuantiles(self.task.learned_from[None], chosen, replace(self.settings, trees=trees))
        self._quantiles = {
            learned: remember(lambda view, one=one: one.quantiles(view, trees))  # type: ignore[misc]  # bound early
            for learned, one in ((None, model), (0, fold))
        }
        return {"trees": trees, "trained_trees": self.settings.trees}

    def distributions(self, view: QueryView, fold: int | None = None) -> QuantileDistributions:
        """The quantiles at corrected levels; of the folds there is the first alone."""
        levels = self._levels(bucket_keys(self.task.evidence(view, fold)))
        return QuantileDistributions.from_quantiles(_value_at(self._quantiles[fold](view), levels))


def _practice(train: Measurements, seed: int, settings: TreeSettings, count: int) -> tuple[Measurements, Queries]:
    """Earlier measurements, some sources, destinations and pairs hidden, and later answered queries, given 0 … 30."""
    rng = np.random.default_rng([seed, 0x7EE5])
    _, source = np.unique(train.probe, return_inverse=True)
    first, last = np.full(source.max() + 1, np.iinfo(np.int64).max), np.zeros(source.max() + 1, dtype=np.int64)
    np.minimum.at(first, source, train.time_s)
    np.maximum.at(last, source, train.time_s)
    late = 100 * (train.time_s - first[source]) > (100 - LATE_PERCENT) * (last - first)[source]
    shuffled = rng.permutation(np.flatnonzero(late & (train.rtt_ms >= 0)))
    by_source = shuffled[np.argsort(source[shuffled], kind="stable")]
    few = by_source[place_in_group(source[by_source]) < settings.practice_per_source]
    rows = np.sort(rng.permutation(few)[:count])
    half = rng.random(len(rows)) < 0.5
    context = np.where(
        half[:, None],
        earlier_measurements(train, rows, max(COUNTS)),
        earlier_measurements(train, rows, max(COUNTS), other_destinations=True),
    )
    given = rng.choice(COUNTS, len(rows))
    context = np.where(np.arange(context.shape[1]) < given[:, None], context, -1)
    rest = train.take(~late) if (train.rtt_ms[~late] >= 0).any() else train
    return hide(rest, seed + 100), Queries(train, rows, context)


def _boost(x: np.ndarray, y: np.ndarray, level: float, settings: TreeSettings) -> lightgbm.Booster:
    import lightgbm

    size = {"num_leaves": settings.leaves, "min_data_in_leaf": settings.least_leaf, "learning_rate": settings.rate}
    exact = {"deterministic": True, "force_col_wise": True, "seed": 0, "num_threads": settings.threads}
    parameters = {"objective": "quantile", "alpha": level, "verbosity": -1} | size | exact
    return lightgbm.train(parameters, lightgbm.Dataset(x, y), settings.trees)


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


def _pinball(quantiles: np.ndarray, answers: np.ndarray) -> float:
    over = answers[:, None] - quantiles
    return float(np.maximum(LEVELS * over, (LEVELS - 1) * over).mean())


def _tail_widths(quantiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q,) log-ms in which the chance beyond the outer quantiles falls by e: as between these and the median."""
    middle = quantiles[:, len(LEVELS) // 2]
    span = np.log(0.5 / LEVELS[0])
    floor = 0.01
    return np.maximum(middle - quantiles[:, 0], floor) / span, np.maximum(quantiles[:, -1] - middle, floor) / span


def _level_of(quantiles: np.ndarray, log_ms: np.ndarray) -> np.ndarray:
    """(q,) the level at which each answer falls: linear between quantiles, exponential tails."""
    knots = quantiles + LEAST_WIDTH * (LEVELS - 0.5)
    level = interpolate_rows(log_ms[:, None], knots, np.broadcast_to(LEVELS, knots.shape))[:, 0]
    low, high = _tail_widths(knots)
    below, above = log_ms - knots[:, 0], knots[:, -1] - log_ms
    level = np.where(below < 0, LEVELS[0] * np.exp(np.minimum(below, 0) / low), level)
    return np.where(above < 0, 1 - (1 - LEVELS[-1]) * np.exp(np.minimum(above, 0) / high), level)


def _value_at(quantiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(q, m) log-ms at levels (q, m): the inverse of `_level_of`."""
    knots = quantiles + LEAST_WIDTH * (LEVELS - 0.5)
    inside = interpolate_rows(levels, np.broadcast_to(LEVELS, knots.shape), knots)
    low, high = (width[:, None] for width in _tail_widths(knots))
    tiny = 1e-12
    below = np.log(np.clip(levels, tiny, LEVELS[0]) / LEVELS[0])  # 0 inside
    above = np.log(np.clip(1 - levels, tiny, 1 - LEVELS[-1]) / (1 - LEVELS[-1]))
    return inside + low * below - high * above
