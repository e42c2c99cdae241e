"""Results of train in, the chance that a ping fails out: by smoothed rates, and by gradient-boosted trees (LightGBM)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.eval.baselines.pairs import find
from ping_llm.eval.columns import Measurements, Queries, QueryView, earlier_measurements, prefix_ids

if TYPE_CHECKING:
    import lightgbm

STRENGTHS = (1.0, 4.0, 16.0, 64.0)
"""Pings that the coarser rate is worth; chosen on val."""

VAL_CONTEXTS = (0, 5, 30)
"""How many pings a query of val is given when something is chosen."""

PREFIX_BITS = ((24, 48), (16, 32))
"""IPv4 and IPv6 bits of the prefixes whose rates are features."""

RATE_STRENGTH = 4.0
"""Pings that the rate of all before is worth within a feature; the trees see the count beside it."""

HIDDEN_SHARE = 0.25
"""Of the pairs, sources and destination prefixes that practice queries leave out."""


class _Counts:
    """Failures and pings by key."""

    def __init__(self, key: np.ndarray, failed: np.ndarray, time_s: np.ndarray) -> None:
        self.keys, group = np.unique(key, return_inverse=True)
        self.failures = np.bincount(group, failed, len(self.keys))
        self.pings = np.bincount(group, minlength=len(self.keys)).astype(float)
        self.last_s = np.full(len(self.keys), np.iinfo(np.int64).min)
        np.maximum.at(self.last_s, group, time_s)

    def of(self, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Failures, pings, and the time of the latest, of each key; 0, 0 and the beginning of time if it is unknown."""
        at = find(self.keys, key)
        known = at >= 0
        zero, never = np.where(known, self.failures[at], 0.0), np.iinfo(np.int64).min
        return zero, np.where(known, self.pings[at], 0.0), np.where(known, self.last_s[at], never)


class FailureRates:
    """Smoothed failure rates; the context counts as history of its source.

    A pair's rate is shrunk to what its destination and its source say together, and these to the rate of all pings.
    """

    name = "failure_rates"

    def __init__(self) -> None:
        self.choices: dict[str, Any] = {}

    def fit(self, train: Measurements, val: Queries) -> None:
        """Counts train, and chooses how much the coarser rates weigh by the log-loss on val."""
        failed = train.rtt_ms < 0
        self._rate = (failed.sum() + 1) / (len(train) + 2)
        self._destinations = _Counts(train.dst_id, failed, train.time_s)
        self._sources = _Counts(train.probe, failed, train.time_s)
        self._probes = self._sources.keys
        self._pairs = _Counts(self._pair_key(train.probe, train.dst_id), failed, train.time_s)
        counts = [k for k in VAL_CONTEXTS if k <= val.context.shape[1]]
        views, happened = [val.told(k).view() for k in counts], val.rtt_ms < 0
        losses = [
            (sum(_log_loss(self._p_fail(view, pair, end), happened) for view in views), pair, end)
            for pair in STRENGTHS
            for end in STRENGTHS
        ]
        _, pair, end = min(losses)
        self.choices = {"pair_strength": pair, "end_strength": end}

    def p_fail(self, view: QueryView) -> np.ndarray:
        """(q,) the chance that each query fails."""
        return self._p_fail(view, self.choices["pair_strength"], self.choices["end_strength"])

    def _p_fail(self, view: QueryView, pair_strength: float, end_strength: float) -> np.ndarray:
        told, failed = view.context_dst_id >= 0, view.context_rtt_ms < 0
        ends = []
        for counts, key, counted in (
            (self._destinations, view.dst_id, np.zeros_like(told)),
            (self._sources, view.probe, told),
        ):
            failures, pings, last_s = counts.of(key)
            new = counted & (view.context_time_s > last_s[:, None])
            failures, pings = failures + (new & failed).sum(axis=1), pings + new.sum(axis=1)
            ends.append(_log_odds((failures + end_strength * self._rate) / (pings + end_strength)))
        prior = 1 / (1 + np.exp(_log_odds(self._rate) - ends[0] - ends[1]))  # both ends shift the odds
        failures, pings, last_s = self._pairs.of(self._pair_key(view.probe, view.dst_id))
        same = told & (view.context_dst_id == view.dst_id[:, None]) & (view.context_time_s > last_s[:, None])
        failures, pings = failures + (same & failed).sum(axis=1), pings + same.sum(axis=1)
        return (failures + pair_strength * prior) / (pings + pair_strength)

    def _pair_key(self, probe: np.ndarray, dst_id: np.ndarray) -> np.ndarray:
        source = find(self._probes, probe)
        return np.where(source >= 0, (source.astype(np.int64) << 32) | dst_id, -1)


@dataclass(frozen=True)
class FailureTreeSettings:
    """How many trees of which size learn from how many practice queries."""

    trees: int = 500
    leaves: int = 31
    rate: float = 0.05
    least_leaf: int = 100
    patience: int = 30
    practice_queries: int = 100_000
    threads: int = 1  # the fit takes seconds; on a busy machine threads that wait for each other take minutes; 0 = all


class FailureTrees:
    """LightGBM's chance of failure from the failure rates of what the query names, its context and the hour of day.

    Rates count what was measured strictly before the query. The trees learn from practice queries of train, whose rates
    leave the pair, the source, the destination's prefix or both endpoints out, so that the trees see how far each rate
    is to be trusted where something is new. They stop where the log-loss on val is least; if no tree lowers it, every
    query gets the rate of all pings.
    """

    name = "failure_trees"

    def __init__(self, settings: FailureTreeSettings | None = None) -> None:
        self.settings = settings or FailureTreeSettings()
        self.choices: dict[str, Any] = {}

    def fit(self, train: Measurements, val: Queries) -> None:
        """Learns from train, and chooses the number of trees on val."""
        failed = train.rtt_ms < 0
        self._rate = float((failed.sum() + 1) / (len(train) + 2))
        self._features, self._booster = _FailureFeatures(train), None
        self.choices = {"trees": 0}
        if failed.all() or not failed.any() or not len(val):
            return
        x, y = [], []
        for rest, queries in _practice(train, self.settings.practice_queries):
            x.append(_FailureFeatures(rest)(queries.view()))
            y.append(queries.rtt_ms < 0)
        counts = [k for k in VAL_CONTEXTS if k <= val.context.shape[1]]
        val_x = np.concatenate([self._features(val.told(k).view()) for k in counts])
        val_y = np.tile(val.rtt_ms < 0, len(counts))
        booster = _boost(np.concatenate(x), np.concatenate(y), val_x, val_y, self.settings)
        least = _log_loss(np.full(len(val_y), self._rate), val_y)
        if _log_loss(np.asarray(booster.predict(val_x)), val_y) < least:
            self._booster, self.choices = booster, {"trees": booster.best_iteration}

    def p_fail(self, view: QueryView) -> np.ndarray:
        """(q,) the chance that each query fails."""
        if self._booster is None or not len(view):
            return np.full(len(view), self._rate)
        return np.asarray(self._booster.predict(self._features(view)))


class _Past:
    """Failures and pings by key before a time."""

    def __init__(self, key: np.ndarray, failed: np.ndarray, time_s: np.ndarray) -> None:
        self._keys, group = np.unique(key, return_inverse=True)
        self._first_s = int(time_s.min()) if len(time_s) else 0
        place = self._place(group, time_s)
        order = np.argsort(place, kind="stable")
        self._places, self._failures = place[order], np.r_[0, np.cumsum(failed[order])]

    def before(self, key: np.ndarray, time_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Failures and pings of each key strictly before each time; 0 and 0 if the key is unknown."""
        group = find(self._keys, key)
        start = np.searchsorted(self._places, self._place(group, np.full_like(time_s, self._first_s)))
        stop = np.where(group >= 0, np.searchsorted(self._places, self._place(group, time_s)), start)
        return self._failures[stop] - self._failures[start], stop - start

    def _place(self, group: np.ndarray, time_s: np.ndarray) -> np.ndarray:
        """Ascends by group, then by time."""
        return (group.astype(np.int64) << 32) + np.clip(time_s - self._first_s, 0, (1 << 32) - 1)


class _FailureFeatures:
    """(q, F) float32 features of queries, from what is known of a table of measurements."""

    def __init__(self, known: Measurements) -> None:
        prefixes = [prefix_ids(known.addresses, *bits).astype(np.int64) for bits in PREFIX_BITS]
        self._ids = [np.arange(len(known.addresses)), *prefixes]  # each (a,)
        failed = known.rtt_ms < 0
        self._all = _Past(np.zeros(len(known), dtype=np.int64), failed, known.time_s)
        self._past = [_Past(key, failed, known.time_s) for key in self._keys(known.src_id, known.dst_id)]

    def __call__(self, view: QueryView) -> np.ndarray:
        columns: list[np.ndarray] = []
        failures, pings = self._all.before(np.zeros(len(view), dtype=np.int64), view.time_s)
        prior = (failures + 1) / (pings + 2)  # not the rate of the whole table: that knows the answers
        for past, key in zip(self._past, self._keys(view.src_id, view.dst_id), strict=True):
            columns += _rate_and_count(*past.before(key, view.time_s), prior)
        destination, source = _log_odds(columns[2]), _log_odds(columns[2 + 2 * len(self._ids)])
        columns.append(destination + source - _log_odds(prior))
        given, failed = view.context_dst_id >= 0, view.context_rtt_ms < 0
        same = given & (view.context_dst_id == view.dst_id[:, None])
        for chosen in (given, same):
            columns += _rate_and_count((chosen & failed).sum(axis=1), chosen.sum(axis=1), prior)
            columns.append((chosen & failed).sum(axis=1))
            columns.append(_first(chosen, failed))
        columns += [same.any(axis=1), view.time_s % 86_400 / 3600]
        return np.stack(columns, axis=1).astype(np.float32)

    def _keys(self, src_id: np.ndarray, dst_id: np.ndarray) -> list[np.ndarray]:
        """Of the pair, the destination and its prefixes, the source and its prefixes."""
        pair = (src_id.astype(np.int64) << 32) | dst_id
        return [pair, *(ids[dst_id] for ids in self._ids), *(ids[src_id] for ids in self._ids)]


def _rate_and_count(failures: np.ndarray, pings: np.ndarray, prior: np.ndarray) -> list[np.ndarray]:
    return [(failures + RATE_STRENGTH * prior) / (pings + RATE_STRENGTH), np.log1p(pings)]


def _first(chosen: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """(q,) whether the latest of the chosen results (q, K) failed, NaN = none is chosen."""
    if not chosen.shape[1]:
        return np.full(len(chosen), np.nan)
    latest = chosen.argmax(axis=1)[:, None]
    return np.where(chosen.any(axis=1), np.take_along_axis(failed, latest, 1)[:, 0], np.nan)


def _practice(train: Measurements, count: int) -> Iterator[tuple[Measurements, Queries]]:
    """Measurements without some units, and queries of these units, given 0 … 30 earlier pings: once for each kind."""
    rng = np.random.default_rng(0xFA11)
    pair = (train.src_id.astype(np.int64) << 32) | train.dst_id
    prefix = prefix_ids(train.addresses, *PREFIX_BITS[0])[train.dst_id]
    hidden_pair, hidden_source, hidden_prefix = (_hidden(key, rng) for key in (pair, train.src_id, prefix))
    everything = np.ones(len(train), dtype=bool)
    for hidden, queried in (
        (~everything, everything),
        (hidden_pair, hidden_pair),
        (hidden_source, hidden_source & ~hidden_prefix),
        (hidden_prefix, hidden_prefix & ~hidden_source),
        (hidden_source | hidden_prefix, hidden_source & hidden_prefix),
    ):
        rows = np.sort(rng.permutation(np.flatnonzero(queried))[: count // 5])
        context = np.where(
            rng.random((len(rows), 1)) < 0.5,
            earlier_measurements(train, rows, max(VAL_CONTEXTS)),
            earlier_measurements(train, rows, max(VAL_CONTEXTS), other_destinations=True),
        )
        given = rng.choice([0, 1, 2, 5, 10, 30], (len(rows), 1))
        context = np.where(np.arange(context.shape[1]) < given, context, -1)
        yield train.take(~hidden), Queries(train, rows, context)


def _hidden(key: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) bool: rows of a share of the keys."""
    keys, group = np.unique(key, return_inverse=True)
    return (rng.random(len(keys)) < HIDDEN_SHARE)[group]


def _boost(
    x: np.ndarray, y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray, settings: FailureTreeSettings
) -> lightgbm.Booster:
    import lightgbm

    parameters = {
        "objective": "binary",
        "num_leaves": settings.leaves,
        "learning_rate": settings.rate,
        "min_data_in_leaf": settings.least_leaf,
        "num_threads": settings.threads,
        "deterministic": True,
        "force_col_wise": True,
        "seed": 0,
        "verbosity": -1,
    }
    data = lightgbm.Dataset(x, y)
    held = lightgbm.Dataset(val_x, val_y, reference=data)
    stop = lightgbm.early_stopping(settings.patience, verbose=False)
    return lightgbm.train(parameters, data, settings.trees, valid_sets=[held], callbacks=[stop])


def _log_odds(chance: np.ndarray | float) -> np.ndarray:
    return np.log(chance) - np.log1p(-chance)


def _log_loss(chance: np.ndarray, happened: np.ndarray) -> float:
    chance = np.clip(chance, 1e-6, 1 - 1e-6)
    return float(-np.where(happened, np.log(chance), np.log1p(-chance)).mean())
