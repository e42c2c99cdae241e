"""A method that predicts one RTT in, a baseline that predicts a whole distribution out.

Nothing but the train part is learned from. What `val` decides are settings and residuals, and for both the method is
learned anew from train without some sources, destinations and pairs (`hide`), so that the queries of `val` are of every
kind that the test parts hold: a method that remembers pairs must not be chosen, or trusted, for what it remembers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ping_llm.eval.baselines.failure import FailureRates
from ping_llm.eval.baselines.pairs import Pairs, find, hide
from ping_llm.eval.columns import Measurements, Queries, QueryView, Rows, log_rtt
from ping_llm.eval.distribution import INNER_LEVELS, QuantileDistributions
from ping_llm.eval.queries import CHOICE_CONTEXTS, COUNTS

FOLDS = 2
CHOICE_QUERIES = 2_000  # that a setting is chosen on; residuals are collected on all of `val`
LEAST_RESIDUALS = 100  # a bucket with fewer residuals is answered from a coarser one
Learned = Callable[[QueryView], np.ndarray]
"""A point method after learning: (q,) log-ms."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is predicted of q results."""

    distributions: QuantileDistributions  # of an answered ping
    p_fail: np.ndarray  # (q,)


@dataclass(frozen=True, eq=False)
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
        self.val, self.answered_val = val, val.answered()
        self.learned_from = {None: train} | {fold: hide(train, fold) for fold in range(FOLDS)}
        self._pairs = {fold: Pairs.of(table) for fold, table in self.learned_from.items()}
        self.p_fail = remember(FailureRates(train, val).p_fail)
        self._choose, self._learn = cache(self._choose_setting), cache(self._learn_anew)

    @cached_property
    def val_views(self) -> list[tuple[QueryView, np.ndarray]]:
        """The answered queries of val given 0, 1, 2 … measurements, each beside its answers in log-ms."""
        return [(view, log_rtt(self.answered_val.rtt_ms)) for view in self.answered_val.views(COUNTS)]

    def learned(self, method: PointMethod, fold: int | None = None) -> Learned:
        """The method with the setting chosen for it, learned from the train part or from a fold of it."""
        return self._learn(method, self._choose(method), fold)

    def setting(self, method: PointMethod) -> dict[str, Any]:
        """Of the method's settings the one with the least error on val, each kind of query weighing the same."""
        return method.settings[self._choose(method)]

    def evidence(self, view: QueryView, fold: int | None = None) -> np.ndarray:
        """`evidence` for what was learned from the train part or from a fold of it."""
        return evidence(self._pairs[fold], view)

    def _choose_setting(self, method: PointMethod) -> int:
        if len(method.settings) == 1:
            return 0
        chosen = self.answered_val.take(slice(None, None, max(1, len(self.answered_val) // CHOICE_QUERIES)))
        views, answers, errors = chosen.views(CHOICE_CONTEXTS), log_rtt(chosen.rtt_ms), []
        kinds = np.concatenate([self.evidence(view, 0)[:, 0] for view in views])
        _, kind, count = np.unique(kinds, return_inverse=True, return_counts=True)
        for number in range(len(method.settings)):
            error = np.concatenate([np.abs(self._learn(method, number, 0)(view) - answers) for view in views])
            mean = np.bincount(kind, error) / count
            errors.append(np.log(mean[count >= min(30, count.max())] + 1e-4).mean())
        return int(np.argmin(errors))

    def _learn_anew(self, method: PointMethod, setting: int, fold: int | None) -> Learned:
        return remember(method.learn(self.learned_from[fold], **method.settings[setting]))


task_of = lru_cache(maxsize=1)(Task)
"""The task of these very objects, shared by all baselines that are fitted on them."""


def remember(learned: Learned) -> Learned:
    """The same predictions, made once for each view however many baselines build on them."""
    made: WeakKeyDictionary[QueryView, np.ndarray] = WeakKeyDictionary()

    def predict(view: QueryView) -> np.ndarray:
        if view not in made:
            made[view] = learned(view)
        return made[view]

    return predict


def evidence(pairs: Pairs, view: QueryView) -> np.ndarray:
    """(q, 2) int64: what is known of the queried pair (0 … 9), and how much of its source is given (0 … 3).

    The first is twice 0 if the pair was trained on, 1 if source and destination were, 2 the destination only, 3 the source
    only, 4 neither; and 1 more if the pair is in the context. The second is 0 for no answered measurement, 1 for 1 or 2,
    2 for up to 7, 3 for more.
    """
    answered = view.context_rtt_ms >= 0
    in_context = ((view.context_dst_id == view.dst_id[:, None]) & answered).any(axis=1)
    source, destination = find(pairs.probes, view.probe) >= 0, find(pairs.dst_ids, view.dst_id) >= 0
    kind = np.select([pairs.has_pair(view), source & destination, destination, source], [0, 1, 2, 3], 4)
    return np.stack([2 * kind + in_context, np.digitize(answered.sum(axis=1), (1, 3, 8))], axis=1)


def bucket_keys(kinds: np.ndarray) -> list[np.ndarray]:
    """Partitions by `evidence` (q, 2), the finer first."""
    return [kinds[:, 0] * 4 + kinds[:, 1], kinds[:, 0]]


class Buckets:
    """Numbers fitted to the cases of each bucket; a bucket with few cases answers from a coarser one, at last from all."""

    def __init__(self, keys: list[np.ndarray], least: int, fit: Callable[[Rows], np.ndarray]) -> None:
        """`keys` say the bucket of n cases in every partition (n,), the finest first; `fit` gives (m,) for some cases."""
        self._all, self._tables = fit(slice(None)), []
        for key in keys:
            distinct, count = np.unique(key, return_counts=True)
            self._tables.append({bucket: fit(key == bucket) for bucket in distinct[count >= least]})

    def __call__(self, keys: list[np.ndarray]) -> np.ndarray:
        """(q, m) for q cases in these buckets."""
        found = np.tile(self._all, (len(keys[0]), 1))
        for key, table in zip(keys[::-1], self._tables[::-1], strict=True):
            for bucket, fitted in table.items():
                found[key == bucket] = fitted
        return found


def bucket_quantiles(values: np.ndarray, keys: list[np.ndarray]) -> Buckets:
    """The quantiles at INNER_LEVELS of n values (n,) in these buckets."""
    return Buckets(keys, LEAST_RESIDUALS, lambda rows: np.quantile(values[rows], INNER_LEVELS))


class Baseline(ABC):
    """A predictor that learns from train and chooses its settings on val."""

    name: str
    choices: dict[str, Any]
    task: Task

    def fit(self, train: Measurements, val: Queries) -> None:
        """Learns, and chooses; nothing is done again for the same objects."""
        task = task_of(train, val)
        if getattr(self, "task", None) is not task:
            self.task = task
            self.choices = self.learn()

    def predict(self, view: QueryView) -> Prediction:
        """The distributions of queries, and their chances of failure."""
        return Prediction(self.distributions(view), self.task.p_fail(view))

    @abstractmethod
    def learn(self) -> dict[str, Any]:
        """Learns from the task; gives what was chosen."""

    @abstractmethod
    def distributions(self, view: QueryView, fold: int | None = None) -> QuantileDistributions:
        """Of queries, by what was learned from the train part, or from a fold of it."""


class PointBaseline(Baseline):
    """A point method whose residuals on val, by kind of query, context given and predicted RTT, make it a distribution."""

    def __init__(self, method: PointMethod) -> None:
        self.method, self.name = method, method.name

    def learn(self) -> dict[str, Any]:
        """Chooses the setting, and collects the errors on val of what was learned from each fold."""
        cases = [
            (self.task.learned(self.method, fold)(view), answers, self.task.evidence(view, fold))
            for fold, (view, answers) in product(range(FOLDS), self.task.val_views)
        ]
        predicted, actual, kinds = (np.concatenate(column) for column in zip(*cases, strict=True))
        self._edges = np.quantile(predicted, (0.25, 0.5, 0.75))
        self._residuals = bucket_quantiles(actual - predicted, self._keys(predicted, kinds))
        self.task.learned(self.method)
        return self.task.setting(self.method)

    def distributions(self, view: QueryView, fold: int | None = None) -> QuantileDistributions:
        """The residuals around the predictions."""
        predicted = self.task.learned(self.method, fold)(view)
        residuals = self._residuals(self._keys(predicted, self.task.evidence(view, fold)))
        return QuantileDistributions.from_quantiles(predicted[:, None] + residuals)

    def _keys(self, predicted: np.ndarray, kinds: np.ndarray) -> list[np.ndarray]:
        coarser = bucket_keys(kinds)
        return [coarser[0] * 4 + np.digitize(predicted, self._edges), *coarser]
