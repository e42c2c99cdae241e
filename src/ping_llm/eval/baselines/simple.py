"""Training measurements in, a global median, one per source, one per destination, and additive biases out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from ping_llm.eval.baselines.base import Learned, PointMethod
from ping_llm.eval.baselines.pairs import Pairs, find, group_medians
from ping_llm.eval.columns import Measurements, QueryView, prefix_ids

SHRINK = 5.0  # a bias from n pairs is taken n / (n + 5)
CELLS = 20_000_000  # numbers in the largest array that is made at once
SWEEPS = 20


def learn_global(train: Measurements) -> Learned:
    """The median of all answered measurements."""
    median = float(np.nanmedian(train.log_ms))
    return lambda view: np.full(len(view), median)


def learn_source(train: Measurements) -> Learned:
    """The median of the source; of a source that is not in train that of the context; else the global one."""
    rows = np.flatnonzero(train.rtt_ms >= 0)
    pairs, overall = Pairs.of(train), float(np.nanmedian(train.log_ms))
    medians = group_medians(train.log_ms[rows], find(pairs.probes, train.probe[rows]), len(pairs.probes))

    def predict(view: QueryView) -> np.ndarray:
        source = find(pairs.probes, view.probe)
        return np.where(source >= 0, medians[source], row_medians(view.context_log_ms, overall))

    return predict


def learn_destination(train: Measurements) -> Learned:
    """The median over the measurements of the destination, else of its /24 or /48, else /16 or /32, else of all."""
    rows = np.flatnonzero(train.rtt_ms >= 0)
    median_of = np.full(len(train.addresses), float(np.nanmedian(train.log_ms)))
    for bits in ((16, 32), (24, 48), (32, 128)):
        ids = prefix_ids(train.addresses, *bits)
        known, group = np.unique(ids[train.dst_id[rows]], return_inverse=True)
        of_prefix = np.full(ids.max() + 1, np.nan)
        of_prefix[known] = group_medians(train.log_ms[rows], group, len(known))
        median_of = np.where(np.isnan(of_prefix[ids]), median_of, of_prefix[ids])  # (a,)
    return lambda view: median_of[view.dst_id]


class Additive:
    """log RTT = mean + bias of the source + bias of the destination, each shrunk; new sources are placed by context."""

    def __init__(self, train: Measurements) -> None:
        self.pairs = pairs = Pairs.of(train)
        self.mean = float(pairs.log_ms.mean())
        self.source_bias, self.destination_bias = np.zeros(len(pairs.probes)), np.zeros(len(pairs.dst_ids))
        for _ in range(SWEEPS):
            rest = pairs.log_ms - self.mean - self.source_bias[pairs.source]
            self.destination_bias = _shrunk_mean(pairs.destination, rest, len(pairs.dst_ids))
            rest = pairs.log_ms - self.mean - self.destination_bias[pairs.destination]
            self.source_bias = _shrunk_mean(pairs.source, rest, len(pairs.probes))

    def without_source(self, dst_id: np.ndarray) -> np.ndarray:
        """Mean plus the bias of the destination, 0 for a new one; any shape."""
        destination = find(self.pairs.dst_ids, dst_id)
        return self.mean + np.where(destination >= 0, self.destination_bias[destination], 0.0)

    def __call__(self, view: QueryView) -> np.ndarray:
        source = find(self.pairs.probes, view.probe)
        rest = view.context_log_ms - self.without_source(view.context_dst_id)
        given = ~np.isnan(rest)
        from_context = np.where(given, rest, 0.0).sum(axis=1) / (given.sum(axis=1) + SHRINK)
        return self.without_source(view.dst_id) + np.where(source >= 0, self.source_bias[source], from_context)


class Placing(ABC):
    """A method that knows sources and destinations, and places a new source by its context; else a fallback answers."""

    pairs: Pairs
    fallback: Learned
    width = 128  # numbers that one measurement of a context takes, about

    @abstractmethod
    def of_known(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """(q,) log-ms from known sources to known destinations."""

    @abstractmethod
    def of_new(self, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """(q,) log-ms to known destinations, after contexts: destinations, log-ms, and which of these count, (q, K)."""

    def __call__(self, view: QueryView) -> np.ndarray:
        source, destination = find(self.pairs.probes, view.probe), find(self.pairs.dst_ids, view.dst_id)
        there = find(self.pairs.dst_ids, view.context_dst_id)
        given = (there >= 0) & ~np.isnan(view.context_log_ms)
        predicted = np.full(len(view), np.nan)
        known = np.flatnonzero((source >= 0) & (destination >= 0))
        predicted[known] = self.of_known(source[known], destination[known])
        new = np.flatnonzero((source < 0) & (destination >= 0) & given.any(axis=1))
        for part in chunks(len(new), self.width * max(given.shape[1], 1)):
            rows = new[part]
            predicted[rows] = self.of_new(there[rows], view.context_log_ms[rows], given[rows], destination[rows])
        return np.where(np.isnan(predicted), self.fallback(view), predicted)


def chunks(count: int, width: int) -> Iterator[slice]:
    """0 … count in stretches whose arrays (rows, width) have about CELLS numbers at most."""
    size = max(1, CELLS // max(width, 1))
    return (slice(start, start + size) for start in range(0, count, size))


def row_medians(values: np.ndarray, missing: float | np.ndarray) -> np.ndarray:
    """(q,) medians of the numbers of each row of (q, K), `missing` where there are none."""
    if not values.shape[1]:
        return np.broadcast_to(missing, len(values)).astype(float)
    ordered = np.sort(values, axis=1)  # NaN last
    count = (~np.isnan(ordered)).sum(axis=1)
    low = np.take_along_axis(ordered, np.maximum((count - 1) // 2, 0)[:, None], 1)[:, 0]
    high = np.take_along_axis(ordered, np.minimum(count // 2, values.shape[1] - 1)[:, None], 1)[:, 0]
    return np.where(count > 0, (low + high) / 2, missing)


def _shrunk_mean(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    return np.bincount(group, values, groups) / (np.bincount(group, minlength=groups) + SHRINK)


GLOBAL_MEDIAN = PointMethod("global_median", learn_global)
SOURCE_MEDIAN = PointMethod("source_median", learn_source)
DESTINATION_MEDIAN = PointMethod("destination_median", learn_destination)
ADDITIVE = PointMethod("additive", Additive)
