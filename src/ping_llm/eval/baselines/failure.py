"""Results of train in, the chance that a ping fails out: by smoothed rates, and by gradient-boosted trees (LightGBM).

Both count what train holds from before the query's second, and the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.eval.baselines.pairs import Past, practice_queries
from ping_llm.eval.columns import Measurements, Queries, QueryView, pair_keys, prefix_ids
from ping_llm.eval.distribution import log_loss
from ping_llm.eval.queries import CHOICE_CONTEXTS

if TYPE_CHECKING:
    import lightgbm

STRENGTHS = (1.0, 4.0, 16.0, 64.0)  # pings that the coarser rate is worth; chosen on val
PREFIX_BITS = ((24, 48), (16, 32))  # IPv4 and IPv6 bits of the prefixes whose rates are used
RATE_STRENGTH = 4.0  # pings that the rate of all before is worth within a feature; the trees see the count beside it
HIDDEN_SHARE = 0.25  # of the pairs, sources and destination prefixes that practice queries leave out


class FailureChoice:
    """Of smoothed rates and trees those that have the less log-loss on val; `choices` says which, and both losses."""

    def __init__(self, train: Measurements, val: Queries, settings: FailureTreeSettings | None = None) -> None:
        methods: list[FailureRates | FailureTrees] = [FailureRates(train, val), FailureTrees(train, val, settings)]
        views, failed = val.views(CHOICE_CONTEXTS), val.rtt_ms < 0
        losses = {one.name: _mean_loss([one.p_fail(view) for view in views], failed) for one in methods}
        chosen = min(methods, key=lambda one: losses[one.name])
        self.p_fail = chosen.p_fail
        self.choices: dict[str, Any] = {"p_fail": chosen.name} | chosen.choices
        self.choices |= {f"{name}_log_loss": round(loss, 4) for name, loss in losses.items()}


class FailureCounts:
    """Failures and pings by key, before a second."""

    def __init__(self, key: np.ndarray, failed: np.ndarray, time_s: np.ndarray) -> None:
        self._past = Past(key, time_s)
        self._failures = np.r_[0, np.cumsum(failed[self._past.order])]

    def before(self, key: np.ndarray, time_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Failures and pings of each key strictly before each second; 0 and 0 if the key is unknown."""
        start, stop = self._past.before(key, time_s)
        return self._failures[stop] - self._failures[start], stop - start

    def with_context(self, key: np.ndarray, view: QueryView, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same with those of the context that are `counted` (q, K) and later than all of these."""
        start, stop = self._past.before(key, view.time_s)
        new = counted & (view.context_time_s > self._past.last_s(start, stop)[:, None])
        failures = self._failures[stop] - self._failures[start] + (new & (view.context_rtt_ms < 0)).sum(axis=1)
        return failures, stop - start + new.sum(axis=1)


class FailureRates:
    """A pair's rate shrunk to what its endpoints say together, theirs to those of their prefixes, these to that of all."""

    name = "failure_rates"

    def __init__(self, train: Measurements, val: Queries) -> None:
        """Counts train, and chooses how much the coarser rates weigh by the log-loss on val."""
        failed, time_s = train.rtt_ms < 0, train.time_s
        self._prefix = prefix_ids(train.addresses, *PREFIX_BITS[0])
        self._all = FailureCounts(np.zeros(len(train), dtype=np.int64), failed, time_s)
        self._endpoints = [
            (FailureCounts(self._prefix[ids], failed, time_s), FailureCounts(ids, failed, time_s))
            for ids in (train.dst_id, train.src_id)
        ]
        self._pairs = FailureCounts(pair_keys(train.src_id, train.dst_id), failed, time_s)
        views = val.views(CHOICE_CONTEXTS)
        _, pair, endpoint = min(
            (_mean_loss([self.p_fail(view, *strengths) for view in views], val.rtt_ms < 0), *strengths)
            for strengths in product(STRENGTHS, STRENGTHS)
        )
        self.choices: dict[str, float] = {"pair_strength": pair, "endpoint_strength": endpoint}

    def p_fail(self, view: QueryView, pair_strength: float = 0, endpoint_strength: float = 0) -> np.ndarray:
        """(q,) the chance that each query fails; with other strengths, of the pair and of either address, than chosen."""
        if not pair_strength:
            pair_strength, endpoint_strength = self.choices.values()
        given = view.context_dst_id >= 0
        failures, pings = self._all.before(np.zeros(len(view), dtype=np.int64), view.time_s)
        rate = (failures + 1) / (pings + 2)
        odds = -_log_odds(rate)  # source and destination both shift the odds
        of_endpoints = (view.dst_id, np.zeros_like(given)), (view.src_id, given)
        for (prefixes, addresses), (ids, counted) in zip(self._endpoints, of_endpoints, strict=True):
            shrunk = _shrink(*prefixes.before(self._prefix[ids], view.time_s), rate, endpoint_strength)
            odds += _log_odds(_shrink(*addresses.with_context(ids, view, counted), shrunk, endpoint_strength))
        same = given & (view.context_dst_id == view.dst_id[:, None])
        counts = self._pairs.with_context(pair_keys(view.src_id, view.dst_id), view, same)
        return _shrink(*counts, 1 / (1 + np.exp(-odds)), pair_strength)


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

    def __init__(self, train: Measurements, val: Queries, settings: FailureTreeSettings | None = None) -> None:
        """Learns from train, and chooses the number of trees on val."""
        settings, failed = settings or FailureTreeSettings(), train.rtt_ms < 0
        self._rate = float((failed.sum() + 1) / (len(train) + 2))
        self.features, self._booster = FailureFeatures(train), None
        self.choices: dict[str, float] = {"trees": 0}
        if failed.all() or not failed.any() or not len(val):
            return
        x, y = [], []
        for rest, queries in _practice(train, settings.practice_queries):
            x.append(FailureFeatures(rest)(queries.view()))
            y.append(queries.rtt_ms < 0)
        views = val.views(CHOICE_CONTEXTS)
        val_x, val_y = np.concatenate([self.features(view) for view in views]), np.tile(val.rtt_ms < 0, len(views))
        booster = _boost(np.concatenate(x), np.concatenate(y), val_x, val_y, settings)
        least = log_loss(np.full(len(val_y), self._rate), val_y).mean()
        if log_loss(np.asarray(booster.predict(val_x)), val_y).mean() < least:
            self._booster, self.choices = booster, {"trees": booster.best_iteration}

    def p_fail(self, view: QueryView) -> np.ndarray:
        """(q,) the chance that each query fails."""
        if self._booster is None or not len(view):
            return np.full(len(view), self._rate)
        return np.asarray(self._booster.predict(self.features(view)))


class FailureFeatures:
    """(q, F) float32 features of queries, from what is known of a table of measurements."""

    def __init__(self, known: Measurements) -> None:
        prefixes = [prefix_ids(known.addresses, *bits).astype(np.int64) for bits in PREFIX_BITS]
        self._ids = [np.arange(len(known.addresses)), *prefixes]  # each (a,)
        failed = known.rtt_ms < 0
        self._all = FailureCounts(np.zeros(len(known), dtype=np.int64), failed, known.time_s)
        self._past = [FailureCounts(key, failed, known.time_s) for key in self._keys(known.src_id, known.dst_id)]

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
        return [pair_keys(src_id, dst_id), *(ids[dst_id] for ids in self._ids), *(ids[src_id] for ids in self._ids)]


def _rate_and_count(failures: np.ndarray, pings: np.ndarray, prior: np.ndarray) -> list[np.ndarray]:
    return [_shrink(failures, pings, prior, RATE_STRENGTH), np.log1p(pings)]


def _shrink(failures: np.ndarray, pings: np.ndarray, prior: np.ndarray, strength: float) -> np.ndarray:
    return (failures + strength * prior) / (pings + strength)


def _first(chosen: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """(q,) whether the latest of the chosen results (q, K) failed, NaN = none is chosen."""
    if not chosen.shape[1]:
        return np.full(len(chosen), np.nan)
    latest = chosen.argmax(axis=1)[:, None]
    return np.where(chosen.any(axis=1), np.take_along_axis(failed, latest, 1)[:, 0], np.nan)


def _practice(train: Measurements, count: int) -> Iterator[tuple[Measurements, Queries]]:
    """Measurements without some units, and queries of these units, given 0 … 30 earlier pings: once for each kind."""
    rng = np.random.default_rng(0xFA11)
    pair = pair_keys(train.src_id, train.dst_id)
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
        yield train.take(~hidden), practice_queries(train, rows, rng)


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


def _mean_loss(chances: list[np.ndarray], failed: np.ndarray) -> float:
    return float(np.mean([log_loss(chance, failed) for chance in chances]))
