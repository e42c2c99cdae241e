"""A method that predicts one RTT in, a baseline that predicts a whole law out.

Nothing but the train part is learned from. What `val` decides are settings and residuals, and for both the method is
learned anew from train without some sources, destinations and pairs (`hide`), so that the queries of `val` are of every
kind that the test parts hold: a method that remembers pairs must not be chosen, or trusted, for what it remembers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ping_llm.eval.baselines.failure import FailureRates
from ping_llm.eval.baselines.pairs import Pairs, hide
from ping_llm.eval.columns import Measurements, Queries, QueryView, log_rtt
from ping_llm.eval.law import INNER_LEVELS, QuantileLaws

FOLDS = 2
CONTEXT_COUNTS = (0, 1, 2, 5, 10, 30)
"""How many measurements a query is told when residuals are collected."""

CHOICE_QUERIES = 2_000
CHOICE_CONTEXTS = (0, 5, 30)
"""What a setting is chosen on; residuals are collected on all of `val`."""

LEAST_RESIDUALS = 100
"""A bucket with fewer residuals is answered from a coarser one."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The laws of q results."""

    laws: QuantileLaws  # of an answered ping
    p_fail: np.ndarray  # (q,)

    @property
    def point_log_ms(self) -> np.ndarray:
        """(q,) the median of an answer."""
        return self.laws.median


class Baseline(Protocol):
    """What PingBench asks of a predictor."""

    name: str
    choices: dict[str, Any]

    def fit(self, train: Measurements, val: Queries) -> None: ...

    def predict(self, queries: QueryView) -> Prediction: ...


class Learned(Protocol):
    """A point method after learning: (q,) log-ms."""

    def __call__(self, view: QueryView) -> np.ndarray: ...


@dataclass(frozen=True)
class PointMethod:
    """How to learn a point method from measurements, and the settings to choose among."""

    name: str
    learn: Callable[..., Learned]  # learn(train, **setting)
    settings: tuple[dict[str, Any], ...] = ({},)


class Task:
    """Train and val with all that baselines share: folds, failure rates, what was learned and predicted already."""

    def __init__(self, train: Measurements, val: Queries) -> None:
        if not len(val):
            raise ValueError("no queries of val to choose settings on; prepare more measurements")
        self.train, self.val = train, val
        self.folds = [hide(train, seed) for seed in range(FOLDS)]
        self.failure = FailureRates()
        self.failure.fit(train, val)
        self._learned: dict = {}
        self._settings: dict[str, dict] = {}

    @cached_property
    def answered_val(self) -> Queries:
        """The queries of val that were answered."""
        return self.val.take(np.flatnonzero(self.val.rtt_ms >= 0))

    @cached_property
    def val_views(self) -> list[tuple[QueryView, np.ndarray]]:
        """The answered queries of val told 0, 1, 2 … measurements, each beside its answers in log-ms."""
        counts = [k for k in CONTEXT_COUNTS if k <= self.val.context.shape[1]]
        return [(self.answered_val.told(k).view(), log_rtt(self.answered_val.rtt_ms)) for k in counts]

    def learned(self, method: PointMethod, fold: int | None = None) -> Learned:
        """The method with the setting chosen for it, learned from the train part or from a fold of it."""
        return self._learn(method, self.setting(method), fold)

    def setting(self, method: PointMethod) -> dict[str, Any]:
        """Of the method's settings the one with the least error on val, each kind of query weighing the same."""
        if method.name not in self._settings:
            errors = [0.0]
            if len(method.settings) > 1:
                errors = [self._choice_error(self._learn(method, setting, 0)) for setting in method.settings]
            self._settings[method.name] = method.settings[int(np.argmin(errors))]
        return self._settings[method.name]

    def _choice_error(self, learned: Learned) -> float:
        stride = max(1, len(self.answered_val) // CHOICE_QUERIES)
        chosen = self.answered_val.take(np.arange(0, len(self.answered_val), stride))
        counts = [k for k in CHOICE_CONTEXTS if k <= self.val.context.shape[1]]
        errors, kinds = [], []
        for view in (chosen.told(k).view() for k in counts):
            errors.append(np.abs(learned(view) - log_rtt(chosen.rtt_ms)))
            kinds.append(evidence(Pairs.of(self.folds[0]), view)[:, 0])
        error, (_, kind, count) = np.concatenate(errors), _kinds(np.concatenate(kinds))
        mean = np.bincount(kind, error) / count
        return float(np.log(mean[count >= min(30, count.max())] + 1e-4).mean())

    def _learn(self, method: PointMethod, setting: dict, fold: int | None) -> Learned:
        key = (method.name, fold, *sorted(setting.items()))
        if key not in self._learned:
            train = self.train if fold is None else self.folds[fold]
            self._learned[key] = remember(method.learn(train, **setting))
        return self._learned[key]


@lru_cache(maxsize=1)
def task_of(train: Measurements, val: Queries) -> Task:
    """The task of these very objects, shared by all baselines that are fitted on them."""
    return Task(train, val)


def remember(learned: Learned) -> Learned:
    """The same predictions, made once for each view however many baselines build on them."""
    made: WeakKeyDictionary = WeakKeyDictionary()

    def predict(view: QueryView) -> np.ndarray:
        if view not in made:
            made[view] = learned(view)
        return made[view]

    return predict


def _kinds(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.unique(kinds, return_inverse=True, return_counts=True)


def evidence(pairs: Pairs, view: QueryView) -> np.ndarray:
    """(q, 2) int64: what is known of the pair asked for (0 … 9), and how much is told of its source (0 … 3).

    The first is twice 0 if the pair was trained on, 1 if both ends were, 2 the destination only, 3 the source only,
    4 neither; and 1 more if the pair is in the context. The second is 0 for no answered measurement, 1 for 1 or 2,
    2 for up to 7, 3 for more.
    """
    answered = view.context_rtt_ms >= 0
    told = ((view.context_dst_id == view.dst_id[:, None]) & answered).any(axis=1)
    source, destination = pairs.source_of(view.probe) >= 0, pairs.destination_of(view.dst_id) >= 0
    kind = np.select([pairs.has_pair(view), source & destination, destination, source], range(4), 4)
    return np.stack([2 * kind + told, np.digitize(answered.sum(axis=1), (1, 3, 8))], axis=1)


class BucketQuantiles:
    """Quantiles at INNER_LEVELS of values in buckets; a bucket with few values answers from a coarser one."""

    def __init__(self, values: np.ndarray, keys: list[np.ndarray]) -> None:
        """From n values (n,), and the bucket of each in every partition (n,), the finest partition first."""
        self._tables = []
        for key in keys:
            distinct, group, count = _kinds(key)
            full = np.flatnonzero(count >= LEAST_RESIDUALS)
            self._tables.append({int(distinct[i]): np.quantile(values[group == i], INNER_LEVELS) for i in full})
        self._all = np.quantile(values, INNER_LEVELS)

    def __call__(self, keys: list[np.ndarray]) -> np.ndarray:
        """(q, L − 2) of queries in these buckets."""
        quantiles = np.tile(self._all, (len(keys[0]), 1))
        missing = np.ones(len(quantiles), dtype=bool)
        for key, table in zip(keys, self._tables, strict=True):
            for value in np.unique(key[missing]):
                if int(value) in table:
                    rows = missing & (key == value)
                    quantiles[rows] = table[int(value)]
                    missing &= ~rows
        return quantiles


class ResidualLaws:
    """The laws around predictions, by kind of query, history told and predicted RTT."""

    def __init__(self, predicted: np.ndarray, actual: np.ndarray, kinds: np.ndarray) -> None:
        """From n predictions (n,), answers (n,) in log-ms, and what `evidence` says of the queries (n, 2)."""
        self._edges = np.quantile(predicted, (0.25, 0.5, 0.75))
        self._residuals = BucketQuantiles(actual - predicted, self._keys(predicted, kinds))

    def __call__(self, predicted: np.ndarray, kinds: np.ndarray) -> QuantileLaws:
        """The laws around q predictions (q,)."""
        return QuantileLaws.from_quantiles(predicted[:, None] + self._residuals(self._keys(predicted, kinds)))

    def _keys(self, predicted: np.ndarray, kinds: np.ndarray) -> list[np.ndarray]:
        coarser = bucket_keys(kinds)
        return [coarser[0] * 4 + np.digitize(predicted, self._edges), *coarser]


def bucket_keys(kinds: np.ndarray) -> list[np.ndarray]:
    """Partitions by `evidence` (q, 2), the finer first."""
    return [kinds[:, 0] * 4 + kinds[:, 1], kinds[:, 0]]


class PointBaseline:
    """A point method whose residuals on val make it a law."""

    def __init__(self, method: PointMethod) -> None:
        self.method, self.name = method, method.name
        self.choices: dict[str, Any] = {}

    def fit(self, train: Measurements, val: Queries) -> None:
        """Chooses the setting, collects residuals, learns from all of train."""
        task = task_of(train, val)
        self.choices = task.setting(self.method)
        self._residuals = ResidualLaws(*fold_predictions(task, self.method))
        self._pairs, self._failure = Pairs.of(train), task.failure
        self._learned = task.learned(self.method)

    def predict(self, queries: QueryView) -> Prediction:
        """The laws of queries."""
        laws = self._residuals(self._learned(queries), evidence(self._pairs, queries))
        return Prediction(laws, self._failure.p_fail(queries))

    def fold_laws(self, task: Task, fold: int, view: QueryView) -> QuantileLaws:
        """The laws as a model learned from a fold would give them."""
        return self._residuals(task.learned(self.method, fold)(view), evidence(Pairs.of(task.folds[fold]), view))


def fold_predictions(task: Task, method: PointMethod) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions on val by each fold, (n,) log-ms, with answers (n,) and `evidence` (n, 2)."""
    predicted, actual, kinds = [], [], []
    for fold in range(FOLDS):
        pairs, learned = Pairs.of(task.folds[fold]), task.learned(method, fold)
        for view, answers in task.val_views:
            predicted.append(learned(view))
            actual.append(answers)
            kinds.append(evidence(pairs, view))
    return np.concatenate(predicted), np.concatenate(actual), np.concatenate(kinds)
