"""Training measurements in, the RTTs of sources alike or of addresses near by out."""

from __future__ import annotations

from functools import cache

import numpy as np

from ping_llm.eval.baselines.base import PointMethod
from ping_llm.eval.baselines.pairs import Pairs
from ping_llm.eval.baselines.simple import Placing, chunks, learn_destination, row_medians
from ping_llm.eval.columns import Measurements, QueryView, prefix_ids

MAX_SOURCES = 2_000  # known sources that a query is compared with: those with the most destinations
MAX_PAIRS = 50_000  # pairs that a query is compared with: evenly out of all
PREFIX_BITS = ((8, 16), (16, 32), (24, 48), (32, 128))  # IPv4 and IPv6 bits of an address that may agree
DOUBT_LOG_MS = 0.5
"""A source is held to differ so much at one destination more than it shares: one lucky agreement is no twin."""


class ProfileNeighbours(Placing):
    """The median RTT to the destination over the known sources whose log-RTTs to shared destinations differ least.

    What no neighbour has measured is answered per destination.
    """

    def __init__(self, train: Measurements, neighbours: int) -> None:
        self.pairs, self.neighbours = Pairs.of(train), neighbours
        self.fallback = learn_destination(train)
        matrix = self.pairs.matrix
        self._known = np.sort(np.argsort(np.isnan(matrix).sum(axis=1), kind="stable")[:MAX_SOURCES])
        self._profiles = np.ascontiguousarray(matrix[self._known].T)  # (D, S)
        self.width, self._distance = len(self._known), cache(self._distance_to_others)

    def of_known(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """Each pair once: known sources do not depend on context."""
        (source, destination), where = np.unique(np.stack([source, destination]), axis=1, return_inverse=True)
        predicted = np.full(len(source), np.nan)
        for rows in chunks(len(source), self.width):
            distance = np.stack([self._distance(s) for s in source[rows].tolist()])
            predicted[rows] = self._nearest(distance, destination[rows])
        return predicted[where]

    def of_new(self, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """The profile of a new source is its context."""
        difference = np.abs(self._profiles[there] - log_ms[:, :, None])  # (q, K, S)
        difference[~given] = np.nan
        return self._nearest(_mean_difference(difference), destination)

    def _distance_to_others(self, source: int) -> np.ndarray:
        """(S,) from a known source; infinite to itself."""
        difference = np.abs(self._profiles - self.pairs.matrix[source][:, None])  # (D, S)
        return np.where(self._known == source, np.inf, _mean_difference(difference[None])[0])

    def _nearest(self, distance: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """(q,) the median, over the nearest by distance (q, S) that measured it, of the log-RTT to the destination."""
        values = self._profiles[destination]  # (q, S)
        usable = np.where(np.isnan(values), np.inf, distance)
        count = min(self.neighbours, usable.shape[1])
        nearest = np.argpartition(usable, count - 1, axis=1)[:, :count]
        usable, values = (np.take_along_axis(column, nearest, 1) for column in (usable, values))
        return row_medians(np.where(np.isfinite(usable), values, np.nan), np.nan)


class PrefixNeighbours:
    """The median over the n known pairs whose addresses share the longest prefixes with the query's.

    The destination's prefix comes first, the source's decides among equals, then the order of a fixed shuffle.
    """

    def __init__(self, train: Measurements, neighbours: int = 20) -> None:
        pairs = Pairs.of(train)
        chosen = np.random.default_rng(0).permutation(len(pairs))[:MAX_PAIRS]
        self.neighbours, self._log_ms = neighbours, pairs.log_ms[chosen]
        self._levels = [prefix_ids(train.addresses, *bits) for bits in PREFIX_BITS]  # (a,) each
        self._source, self._destination = pairs.src_id[chosen], pairs.dst_ids[pairs.destination[chosen]]

    def __call__(self, view: QueryView) -> np.ndarray:
        (source, destination), where = np.unique(np.stack([view.src_id, view.dst_id]), axis=1, return_inverse=True)
        predicted, count = np.empty(len(source)), min(self.neighbours, len(self._log_ms))
        for rows in chunks(len(source), len(self._log_ms)):
            shared = 8 * self._agreement(destination[rows], self._destination)
            shared += self._agreement(source[rows], self._source)
            rank = shared.astype(np.int64) * shared.shape[1] - np.arange(shared.shape[1])  # the first of equals wins
            nearest = np.argpartition(-rank, count - 1, axis=1)[:, :count]
            predicted[rows] = np.median(self._log_ms[nearest], axis=1)
        return predicted[where]

    def _agreement(self, queried: np.ndarray, known: np.ndarray) -> np.ndarray:
        """(q, P) int32, 0 … 4: how many of PREFIX_BITS the addresses share."""
        agreement = np.zeros((len(queried), len(known)), dtype=np.int32)
        for level in self._levels:
            agreement += level[queried][:, None] == level[known]
        return agreement


def _mean_difference(difference: np.ndarray) -> np.ndarray:
    """(q, m, S) differences, NaN = not shared, to (q, S) means with one of DOUBT_LOG_MS more; infinite if none is shared."""
    shared = (~np.isnan(difference)).sum(axis=1)
    mean = (np.nansum(difference, axis=1) + DOUBT_LOG_MS) / (shared + 1)
    return np.where(shared > 0, mean, np.inf)


PROFILE_KNN = PointMethod("profile_knn", ProfileNeighbours, tuple({"neighbours": count} for count in (1, 5, 15)))
PREFIX_KNN = PointMethod("prefix_knn", PrefixNeighbours)
