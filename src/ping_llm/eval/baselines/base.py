"""A method that predicts one RTT in, a baseline that predicts a whole distribution out.

What is learned is learned from the train part alone. What is chosen, settings, residuals and weights, is chosen on the
queries of `val`: train holds none of them, and they are of every kind that the test parts hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from operator import itemgetter
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from ping_llm.data.measurement import log_rtt
from ping_llm.eval.baselines.failure import FailureChoice
from ping_llm.eval.baselines.pairs import Pairs, find
from ping_llm.eval.columns import Measurements, Queries, QueryView, Rows, prefix_ids
from ping_llm.eval.distribution import INNER_LEVELS, QuantileDistributions
from ping_llm.eval.queries import CHOICE_CONTEXTS, COUNTS

CHOICE_QUERIES = 4_000  # that a setting is chosen on; residuals are collected on all of `val`
LEAST_RESIDUALS = 100  # a bucket with fewer residuals is answered from a coarser one, as is one with few hosts
LEAST_HOSTS = (
    30  # sources, and destination prefixes, of what is fitted to a kind of query: one host stands for no other
)
Learned = Callable[[QueryView], np.ndarray]
"""A point method after learning: (q,) log-ms."""

USES_OF_CONTEXT = ({"moves_known": 0.0}, {"moves_known": 0.5}, {"moves_known": 1.0})
"""How far a known source's prediction goes from what was learned of it to what its context makes of it."""

KINDS = 10  # of `evidence` on the pair


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is predicted of q results."""

    distributions: QuantileDistributions  # of an answered ping
    p_fail: np.ndarray  # (q,)


@dataclass(frozen=True, eq=False)
class PointMethod:
    """How to learn a point method from measurements; the settings to choose among, and for each kind of query the uses."""

    name: str
    learn: Callable[..., Callable[..., np.ndarray]]  # learn(train, **setting)(view, **use)
    settings: tuple[dict[str, Any], ...] = ({},)
    uses: tuple[dict[str, Any], ...] = ({},)


@dataclass(frozen=True)
class Choice:
    """A setting of a point method, and for each kind of query which of its uses."""

    setting: dict[str, Any]
    uses: tuple[int, ...]

    def apply(self, learned: Callable[..., np.ndarray], method: PointMethod, pairs: Pairs) -> Learned:
        """What was learned with the setting, used as chosen; `pairs` say of which kind a query is."""

        def predict(view: QueryView) -> np.ndarray:
            used = np.array(self.uses)[evidence(pairs, view)[:, 0]]
            predicted = np.empty(len(view))
            for use in np.unique(used):
                rows = np.flatnonzero(used == use)
                predicted[rows] = learned(view.take(rows), **method.uses[use])
            return predicted

        return predict

    def describe(self, method: PointMethod) -> dict[str, Any]:
        """The setting, and by name of what may be used otherwise its value for each kind."""
        return self.setting | {name: [method.uses[use][name] for use in self.uses] for name in method.uses[0]}


class Task:
    """Train and val with all that baselines share: pairs, chances of failure, what was learned and predicted already."""

    def __init__(self, train: Measurements, val: Queries) -> None:
        if not len(val.answered()):
            raise ValueError("no answered queries of val to choose settings on; prepare more measurements")
        self.train, self.val, self.answered_val = train, val, val.answered()
        self.pairs, self.failure = Pairs.of(train), FailureChoice(train, val)
        self.p_fail = remember(self.failure.p_fail)
        self._choose, self._used = cache(self._choose_setting), cache(self._use)

    @cached_property
    def val_views(self) -> list[tuple[QueryView, np.ndarray]]:
        """The answered queries of val given 0, 1, 2 … measurements, each beside its answers in log-ms."""
        return [(view, log_rtt(self.answered_val.rtt_ms)) for view in self.answered_val.views(COUNTS)]

    @cached_property
    def choice_views(self) -> list[tuple[QueryView, np.ndarray]]:
        """Some of these queries, given 0, 5 and 30."""
        some = self.answered_val.take(slice(None, None, max(1, len(self.answered_val) // CHOICE_QUERIES)))
        return [(view, log_rtt(some.rtt_ms)) for view in some.views(CHOICE_CONTEXTS)]

    @cached_property
    def val_kinds(self) -> np.ndarray:
        """(n, 2) `evidence` of all `val_views`, in order."""
        return np.concatenate([self.evidence(view) for view, _ in self.val_views])

    @cached_property
    def val_hosts(self) -> Hosts:
        """Of all `val_views`, in order."""
        return Hosts.of([view for view, _ in self.val_views])

    @cached_property
    def choice_kinds(self) -> np.ndarray:
        """(n, 2) `evidence` of all `choice_views`, in order."""
        return np.concatenate([self.evidence(view) for view, _ in self.choice_views])

    @cached_property
    def choice_hosts(self) -> Hosts:
        """Of all `choice_views`, in order."""
        return Hosts.of([view for view, _ in self.choice_views])

    def learned(self, method: PointMethod) -> Learned:
        """The method with the setting and uses chosen for it."""
        return self._used(method)

    def choice(self, method: PointMethod) -> Choice:
        """What has the least error on val, each kind of query weighing the same."""
        return self._choose(method)[0]

    def evidence(self, view: QueryView) -> np.ndarray:
        """`evidence` of queries, given what train holds."""
        return evidence(self.pairs, view)

    def _use(self, method: PointMethod) -> Learned:
        choice, learned = self._choose(method)
        return remember(choice.apply(learned, method, self.pairs))

    def _choose_setting(self, method: PointMethod) -> tuple[Choice, Callable[..., np.ndarray]]:
        """The choice, and what was learned with its setting."""
        if len(method.settings) == len(method.uses) == 1:
            return Choice(method.settings[0], (0,) * KINDS), method.learn(self.train, **method.settings[0])
        kind = self.choice_kinds[:, 0]
        count, found = np.bincount(kind, minlength=KINDS), []
        many = np.isin(np.arange(KINDS), well_founded(kind, self.choice_hosts))
        many = many if many.any() else count == count.max()
        for setting in method.settings:
            learned, errors = method.learn(self.train, **setting), []
            for use in method.uses:
                error = np.concatenate([np.abs(learned(view, **use) - answers) for view, answers in self.choice_views])
                errors.append(np.log(np.bincount(kind, error, KINDS)[many] / count[many] + 1e-4))  # (kinds,)
            uses = np.full(KINDS, np.argmin(np.mean(errors, axis=1)))  # of kinds with few queries
            uses[many] = np.argmin(errors, axis=0)
            found.append((np.min(errors, axis=0).mean(), Choice(setting, tuple(uses.tolist())), learned))
        return min(found, key=itemgetter(0))[1:]


task_of = lru_cache(maxsize=1)(Task)
"""The task of these very objects, shared by all baselines that are fitted on them."""


T = TypeVar("T")


def remember(learned: Callable[[QueryView], T]) -> Callable[[QueryView], T]:
    """The same predictions, made once for each view however many baselines build on them."""
    made: WeakKeyDictionary[QueryView, T] = WeakKeyDictionary()

    def predict(view: QueryView) -> T:
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
    source, destination = find(pairs.src_ids, view.src_id) >= 0, find(pairs.dst_ids, view.dst_id) >= 0
    kind = np.select([pairs.at(view) >= 0, source & destination, destination, source], [0, 1, 2, 3], 4)
    return np.stack([2 * kind + in_context, np.digitize(answered.sum(axis=1), (1, 3, 8))], axis=1)


@dataclass(frozen=True)
class Hosts:
    """Of n cases the sources, and the /24 or /48 of the destinations, (n,) ids."""

    source: np.ndarray
    prefix: np.ndarray

    @classmethod
    def of(cls, views: Sequence[QueryView]) -> Hosts:
        """Of the queries of all views, in order; they share their addresses."""
        prefix = prefix_ids(views[0].addresses, 24, 48)
        columns = [(view.src_id, prefix[view.dst_id]) for view in views]
        return cls(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def well_founded(key: np.ndarray, hosts: Hosts, least: int = 0) -> np.ndarray:
    """The buckets, of n cases in the buckets `key` (n,), with enough cases, sources and prefixes to fit something to them.

    Enough are LEAST_HOSTS of either, or half of all where there are not twice as many.
    """
    buckets, place, count = np.unique(key, return_inverse=True, return_counts=True)
    enough = count >= least
    for ids in (hosts.source, hosts.prefix):
        _, number = np.unique(ids, return_inverse=True)
        pairs = np.unique(np.stack([place, number]), axis=1)
        enough &= np.bincount(pairs[0], minlength=len(buckets)) >= min(LEAST_HOSTS, (number.max() + 1) / 2)
    return buckets[enough]


def bucket_keys(kinds: np.ndarray) -> list[np.ndarray]:
    """Partitions by `evidence` (q, 2), the finer first; the last one puts all queries with a new endpoint together."""
    return [kinds[:, 0] * 4 + kinds[:, 1], kinds[:, 0], np.minimum(kinds[:, 0] // 2, 2)]


class Buckets:
    """Numbers fitted to the cases of each bucket; one with few cases or hosts answers from a coarser one, or from all."""

    def __init__(self, keys: list[np.ndarray], hosts: Hosts, least: int, fit: Callable[[Rows], np.ndarray]) -> None:
        """`keys` say the bucket of n cases in every partition (n,), the finest first; `fit` gives (m,) for some cases."""
        self._all, self._tables = fit(slice(None)), []
        for key in keys:
            self._tables.append({bucket: fit(key == bucket) for bucket in well_founded(key, hosts, least)})

    def __call__(self, keys: list[np.ndarray]) -> np.ndarray:
        """(q, m) for q cases in these buckets."""
        found = np.tile(self._all, (len(keys[0]), 1))
        for key, table in zip(keys[::-1], self._tables[::-1], strict=True):
            for bucket, fitted in table.items():
                found[key == bucket] = fitted
        return found


def bucket_quantiles(values: np.ndarray, keys: list[np.ndarray], hosts: Hosts) -> Buckets:
    """The quantiles at INNER_LEVELS of n values (n,) in these buckets."""
    return Buckets(keys, hosts, LEAST_RESIDUALS, lambda rows: np.quantile(values[rows], INNER_LEVELS))


class Baseline(ABC):
    """A predictor that learns from train and chooses its settings on val."""

    name: str
    choices: dict[str, Any]
    task: Task
    distributions: Callable[[QueryView], QuantileDistributions]

    def fit(self, train: Measurements, val: Queries) -> None:
        """Learns, and chooses; nothing is done again for the same objects."""
        task = task_of(train, val)
        if getattr(self, "task", None) is not task:
            self.task, self.distributions = task, remember(self.predict_distributions)
            self.choices = self.learn()

    def predict(self, view: QueryView) -> Prediction:
        """The distributions of queries, and their chances of failure."""
        return Prediction(self.distributions(view), self.task.p_fail(view))

    @abstractmethod
    def learn(self) -> dict[str, Any]:
        """Learns from the task; gives what was chosen."""

    @abstractmethod
    def predict_distributions(self, view: QueryView) -> QuantileDistributions:
        """Of queries; `distributions` makes them once for each view."""


class PointBaseline(Baseline):
    """A point method whose residuals on val, by kind of query, context given and predicted RTT, make it a distribution."""

    def __init__(self, method: PointMethod) -> None:
        self.method, self.name = method, method.name

    def learn(self) -> dict[str, Any]:
        """Chooses the setting, and collects the errors on val."""
        learned, views = self.task.learned(self.method), self.task.val_views
        predicted = np.concatenate([learned(view) for view, _ in views])
        actual = np.concatenate([answers for _, answers in views])
        self._edges = np.quantile(predicted, (0.25, 0.5, 0.75))
        keys = self._keys(predicted, self.task.val_kinds)
        self._residuals = bucket_quantiles(actual - predicted, keys, self.task.val_hosts)
        return self.task.choice(self.method).describe(self.method)

    def predict_distributions(self, view: QueryView) -> QuantileDistributions:
        """The residuals around the predictions."""
        predicted = self.task.learned(self.method)(view)
        residuals = self._residuals(self._keys(predicted, self.task.evidence(view)))
        return QuantileDistributions.from_quantiles(predicted[:, None] + residuals)

    def _keys(self, predicted: np.ndarray, kinds: np.ndarray) -> list[np.ndarray]:
        coarser = bucket_keys(kinds)
        return [coarser[0] * 4 + np.digitize(predicted, self._edges), *coarser]
