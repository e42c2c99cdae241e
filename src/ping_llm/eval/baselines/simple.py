"""Training measurements in, a global median, one per source, one per destination, and additive biases out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from ping_llm.eval.baselines.base import USES_OF_CONTEXT, Learned, PointMethod
from ping_llm.eval.baselines.pairs import Pairs, SourceBackoff, find, group_medians
from ping_llm.eval.columns import Measurements, QueryView, prefix_ids

SHRINK = 5.0  # a bias from n pairs is taken n / (n + 5)
CELLS = 20_000_000  # numbers in the largest array that is made at once
SWEEPS = 20


def learn_global(train: Measurements) -> Learned:
    """The median of all answered measurements."""
    median = float(np.nanmedian(train.log_ms))
    return lambda view: np.full(len(view), median)


def learn_source(train: Measurements) -> Learned:
    """The median of the source; of one that is not in train that of its /24 or /48, else of the context, else of all."""
    median_of = _medians_by_prefix(train, train.src_id, ((24, 48), (32, 128)), np.nan)
    overall = float(np.nanmedian(train.log_ms))

    def predict(view: QueryView) -> np.ndarray:
        known = median_of[view.src_id]
        return np.where(np.isnan(known), row_medians(view.context_log_ms, overall), known)

    return predict


def learn_destination(train: Measurements) -> Learned:
    """The median over the measurements of the destination, else of its /24 or /48, else /16 or /32, else of all."""
    overall = float(np.nanmedian(train.log_ms))
    median_of = _medians_by_prefix(train, train.dst_id, ((16, 32), (24, 48), (32, 128)), overall)
    return lambda view: median_of[view.dst_id]


class Additive:
    """log RTT = mean + bias of the source + bias of the destination, each shrunk; the context moves the source's.

    A source that is not in train starts from the mean bias of its /24 or /48, else from 0.
    """

    def __init__(self, train: Measurements) -> None:
        self.pairs = pairs = Pairs.of(train)
        self.mean = float(pairs.log_ms.mean())
        source_bias, self.destination_bias = np.zeros(len(pairs.src_ids)), np.zeros(len(pairs.dst_ids))
        for _ in range(SWEEPS):
            rest = pairs.log_ms - self.mean - source_bias[pairs.source]
            self.destination_bias = _shrunk_mean(pairs.destination, rest, len(pairs.dst_ids))
            rest = pairs.log_ms - self.mean - self.destination_bias[pairs.destination]
            source_bias = _shrunk_mean(pairs.source, rest, len(pairs.src_ids))
        self.backoff = SourceBackoff(pairs.src_ids, train.addresses)
        self._bias = self.backoff.extend(source_bias)
        self._bias[-1] = 0.0

    def bias_of(self, src_id: np.ndarray) -> np.ndarray:
        """(q,) of sources, before any context."""
        return self._bias[self.backoff.rows(src_id)]

    def without_source(self, dst_id: np.ndarray) -> np.ndarray:
        """Mean plus the bias of the destination, 0 for a new one; any shape."""
        destination = find(self.pairs.dst_ids, dst_id)
        return self.mean + np.where(destination >= 0, self.destination_bias[destination], 0.0)

    def __call__(self, view: QueryView, moves_known: float = 0.0) -> np.ndarray:
        bias = self.bias_of(view.src_id)
        rest = view.context_log_ms - self.without_source(view.context_dst_id) - bias[:, None]
        given = ~np.isnan(rest)
        move = np.where(find(self.pairs.src_ids, view.src_id) >= 0, moves_known, 1.0)
        return self.without_source(view.dst_id) + bias + move * _shrunk_row_means(rest, given)


class Placing(ABC):
    """A method that places a source, from what was learned of it, of its /24 or of all, by its context; else a fallback
    answers."""

    pairs: Pairs
    backoff: SourceBackoff
    fallback: Learned
    width = 128  # numbers that one measurement of a context takes, about

    @abstractmethod
    def unmoved(self, start: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """(q,) log-ms from sources, rows of `backoff`, to known destinations; NaN = cannot say."""

    @abstractmethod
    def moved(
        self, start: np.ndarray, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray
    ) -> np.ndarray:
        """The same after contexts: destinations, log-ms, and which of these count, (q, K)."""

    def __call__(self, view: QueryView, moves_known: float = 0.0) -> np.ndarray:
        start, destination = self.backoff.rows(view.src_id), find(self.pairs.dst_ids, view.dst_id)
        there = find(self.pairs.dst_ids, view.context_dst_id)
        given = (there >= 0) & ~np.isnan(view.context_log_ms)
        move = np.where(start < len(self.pairs.src_ids), moves_known, 1.0) * given.any(axis=1)
        predicted = np.full(len(view), np.nan)
        rest = np.flatnonzero((destination >= 0) & (move < 1) & (start < self.backoff.count - 1))
        predicted[rest] = self.unmoved(start[rest], destination[rest])
        placed = np.flatnonzero((destination >= 0) & (move > 0))
        for part in chunks(len(placed), self.width * max(given.shape[1], 1)):
            rows = placed[part]
            moved = self.moved(start[rows], there[rows], view.context_log_ms[rows], given[rows], destination[rows])
            partly = predicted[rows] + move[rows] * (moved - predicted[rows])
            predicted[rows] = np.where(np.isnan(partly), moved, partly)
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


def _medians_by_prefix(
    train: Measurements, ids: np.ndarray, levels: tuple[tuple[int, int], ...], overall: float
) -> np.ndarray:
    """(a,) the median over what was answered to, or from, each address by ids (n,), else its prefix; coarsest first."""
    rows, median_of = np.flatnonzero(train.rtt_ms >= 0), np.full(len(train.addresses), overall)
    for bits in levels:
        prefixes = prefix_ids(train.addresses, *bits)
        known, group = np.unique(prefixes[ids[rows]], return_inverse=True)
        of_prefix = np.full(prefixes.max() + 1, np.nan)
        of_prefix[known] = group_medians(train.log_ms[rows], group, len(known))
        median_of = np.where(np.isnan(of_prefix[prefixes]), median_of, of_prefix[prefixes])
    return median_of


def _shrunk_mean(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    return np.bincount(group, values, groups) / (np.bincount(group, minlength=groups) + SHRINK)


def _shrunk_row_means(values: np.ndarray, given: np.ndarray) -> np.ndarray:
    return np.where(given, values, 0.0).sum(axis=1) / (given.sum(axis=1) + SHRINK)


GLOBAL_MEDIAN = PointMethod("global_median", learn_global)
SOURCE_MEDIAN = PointMethod("source_median", learn_source)
DESTINATION_MEDIAN = PointMethod("destination_median", learn_destination)
ADDITIVE = PointMethod("additive", Additive, uses=USES_OF_CONTEXT)
