"""Training measurements in, the RTTs of sources alike or of addresses near by out."""

from __future__ import annotations

import numpy as np

from ping_llm.eval.baselines.base import PointMethod
from ping_llm.eval.baselines.pairs import Pairs
from ping_llm.eval.baselines.simple import Placing, chunks, learn_destination, row_medians
from ping_llm.eval.columns import Measurements, QueryView, prefix_ids

MAX_SOURCES = 2_000
"""Known sources that a query is compared with: those with the most destinations."""

MAX_PAIRS = 50_000
"""Pairs that a query is compared with: evenly out of all."""

DOUBT_LOG_MS = 0.5
"""A source is held to differ so much at one destination more than it shares: one lucky agreement is no twin."""

PREFIX_BITS = ((8, 16), (16, 32), (24, 48), (32, 128))
"""IPv4 and IPv6 bits of an address that may agree."""


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
        self.width = len(self._known)
        self._distances: dict[int, np.ndarray] = {}

    def of_known(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """Each pair once: known sources do not depend on context."""
        pair, where = np.unique(source * len(self.pairs.dst_ids) + destination, return_inverse=True)
        source, destination = pair // len(self.pairs.dst_ids), pair % len(self.pairs.dst_ids)
        predicted = np.full(len(pair), np.nan)
        for rows in chunks(len(pair), self.width):
            distance = np.stack([self._distance(int(s)) for s in source[rows]])
            predicted[rows] = self._nearest(distance, destination[rows])
        return predicted[where]

    def of_new(self, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """The profile of a new source is its context."""
        difference = np.abs(self._profiles[there] - log_ms[:, :, None])  # (q, K, S)
        difference[~given] = np.nan
        return self._nearest(_mean_difference(difference), destination)

    def _distance(self, source: int) -> np.ndarray:
        """(S,) from a known source to the others; infinite to itself."""
        if source not in self._distances:
            difference = np.abs(self._profiles - self.pairs.matrix[source][:, None])  # (D, S)
            distance = _mean_difference(difference[None])[0]
            distance[self._known == source] = np.inf
            self._distances[source] = distance
        return self._distances[source]

    def _nearest(self, distance: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """(q,) the median, over the nearest by distance (q, S) that measured it, of the log-RTT to the destination."""
        values = self._profiles[destination]  # (q, S)
        usable = np.where(np.isnan(values), np.inf, distance)
        count = min(self.neighbours, usable.shape[1])
        nearest = np.argpartition(usable, count - 1, axis=1)[:, :count]
        chosen = np.where(
            np.isfinite(np.take_along_axis(usable, nearest, 1)), np.take_along_axis(values, nearest, 1), np.nan
        )
        return row_medians(chosen, np.nan)


class PrefixNeighbours:
    """The median over the n known pairs whose addresses share the longest prefixes with the query's.

    The destination's prefix comes first, the source's decides among equals, then the order of a fixed shuffle.
    """

    def __init__(self, train: Measurements, neighbours: int = 20) -> None:
        pairs = Pairs.of(train)
        chosen = np.random.default_rng(0).permutation(len(pairs))[:MAX_PAIRS]
        self.neighbours, self._log_ms = neighbours, pairs.log_ms[chosen]
        levels = [prefix_ids(train.addresses, *bits) for bits in PREFIX_BITS]  # each (a,)
        self._levels = np.stack(levels, axis=1)  # (a, 4)
        self._source, self._destination = pairs.src_id[chosen], pairs.dst_ids[pairs.destination[chosen]]

    def __call__(self, view: QueryView) -> np.ndarray:
        addresses = len(view.addresses)
        pair, where = np.unique(view.src_id.astype(np.int64) * addresses + view.dst_id, return_inverse=True)
        predicted = np.empty(len(pair))
        for rows in chunks(len(pair), len(self._log_ms)):
            shared = 8 * self._agreement(pair[rows] % addresses, self._destination)
            shared += self._agreement(pair[rows] // addresses, self._source)
            count = min(self.neighbours, shared.shape[1])
            rank = shared.astype(np.int64) * shared.shape[1] - np.arange(shared.shape[1])  # the first of equals wins
            nearest = np.argpartition(-rank, count - 1, axis=1)[:, :count]
            predicted[rows] = np.median(self._log_ms[nearest], axis=1)
        return predicted[where]

    def _agreement(self, queried: np.ndarray, known: np.ndarray) -> np.ndarray:
        """(q, P) int32, 0 … 4: how many of PREFIX_BITS the addresses share."""
        agreement = np.zeros((len(queried), len(known)), dtype=np.int32)
        for level in self._levels.T:
            agreement += level[queried][:, None] == level[known]
        return agreement


def _mean_difference(difference: np.ndarray) -> np.ndarray:
    """(q, m, S) differences, NaN = not shared, to (q, S) means with one of DOUBT_LOG_MS more; infinite if none is shared."""
    shared = (~np.isnan(difference)).sum(axis=1)
    mean = (np.nansum(difference, axis=1) + DOUBT_LOG_MS) / (shared + 1)
    return np.where(shared > 0, mean, np.inf)


PROFILE_KNN = PointMethod("profile_knn", ProfileNeighbours, tuple({"neighbours": count} for count in (1, 5, 15)))
PREFIX_KNN = PointMethod("prefix_knn", PrefixNeighbours)
