"""Training measurements in, the RTTs of sources alike or of addresses near by out."""

from __future__ import annotations

import numpy as np

from ping_llm.eval.baselines.base import USES_OF_CONTEXT, PointMethod
from ping_llm.eval.baselines.pairs import Pairs, SourceBackoff, find
from ping_llm.eval.baselines.simple import Placing, chunks, learn_destination, row_medians
from ping_llm.eval.columns import Measurements, QueryView, pair_keys, prefix_ids

MAX_SOURCES = 2_000  # known sources that a query is compared with: those with the most destinations
MAX_PAIRS = 50_000  # pairs that a query is compared with: evenly out of all
PREFIX_BITS = ((8, 16), (16, 32), (24, 48), (32, 128))  # IPv4 and IPv6 bits of an address that may agree
DOUBT_LOG_MS = 0.5
"""A source is held to differ so much at one destination more than it shares: one lucky agreement is no twin."""


class ProfileNeighbours(Placing):
    """The median RTT to the destination over the known sources whose log-RTTs to shared destinations differ least.

    The profile of a source is what train holds of it, or of its /24 or /48, and its context. What no neighbour has measured
    is answered per destination.
    """

    def __init__(self, train: Measurements, neighbours: int) -> None:
        self.pairs, self.neighbours = Pairs.of(train), neighbours
        self.fallback = learn_destination(train)
        matrix = self.pairs.matrix
        self.backoff = SourceBackoff(self.pairs.src_ids, train.addresses)
        sums, counts = (
            self.backoff.extend(np.nan_to_num(matrix)),
            self.backoff.extend((~np.isnan(matrix)).astype(float)),
        )
        with np.errstate(invalid="ignore"):
            self._rows = (sums / np.where(counts > 0, counts, np.nan)).astype(np.float32)
        self._rows[-1] = np.nan  # the mean of all is no profile
        self._known = np.sort(np.argsort(np.isnan(matrix).sum(axis=1), kind="stable")[:MAX_SOURCES])
        self._profiles = np.ascontiguousarray(matrix[self._known].T)  # (D, S)
        self.width = len(self._known)
        self._made: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def unmoved(self, start: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """Each pair once."""
        (start, destination), where = np.unique(np.stack([start, destination]), axis=1, return_inverse=True)
        predicted = np.full(len(start), np.nan)
        for rows in chunks(len(start), 2 * self.width):
            predicted[rows] = self._nearest(start[rows], *self._differences(start[rows]), destination[rows])
        return predicted[where]

    def moved(
        self, start: np.ndarray, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray
    ) -> np.ndarray:
        """With what the context adds to the profile."""
        total, shared = self._differences(start)
        difference = np.abs(self._profiles[there] - log_ms.astype(np.float32)[:, :, None])  # (q, K, S)
        difference[~given] = np.nan
        total = total + np.nansum(difference, axis=1)
        return self._nearest(start, total, shared + (~np.isnan(difference)).sum(axis=1), destination)

    def _differences(self, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(q, S) sums of the differences between learned profiles and known sources', and of how many destinations."""
        found = [self._made.get(row) or self._made.setdefault(row, self._difference(row)) for row in start.tolist()]
        total, shared = (np.stack(column) for column in zip(*found, strict=True))
        return total, shared

    def _difference(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        measured = np.flatnonzero(~np.isnan(self._rows[row]))
        difference = np.abs(self._profiles[measured] - self._rows[row, measured][:, None])
        return np.nansum(difference, axis=0), (~np.isnan(difference)).sum(axis=0).astype(np.int32)

    def _nearest(self, start: np.ndarray, total: np.ndarray, shared: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """(q,) the median, over the nearest other sources that measured it, of the log-RTT to the destination."""
        values = self._profiles[destination]  # (q, S)
        usable = (shared > 0) & ~np.isnan(values) & (self._known != start[:, None])
        distance = np.where(usable, (total + DOUBT_LOG_MS) / (shared + 1), np.inf)
        count = min(self.neighbours, distance.shape[1])
        nearest = np.argpartition(distance, count - 1, axis=1)[:, :count]
        distance, values = (np.take_along_axis(column, nearest, 1) for column in (distance, values))
        return row_medians(np.where(np.isfinite(distance), values, np.nan), np.nan)


class PrefixNeighbours:
    """The median of the pair itself; else that of the n known pairs whose addresses share the longest prefixes with it.

    The destination's prefix comes first, the source's decides among equals, then the order of a fixed shuffle. Each level
    that the sources share makes a pair weigh twice as much, each of the destinations four times.
    """

    def __init__(self, train: Measurements, neighbours: int = 20) -> None:
        self.pairs = pairs = Pairs.of(train)
        chosen = np.random.default_rng(0).permutation(len(pairs))[:MAX_PAIRS]
        self.neighbours, self._log_ms = neighbours, pairs.log_ms[chosen]
        self._levels = [prefix_ids(train.addresses, *bits) for bits in PREFIX_BITS]  # (a,) each
        self._source, self._destination = pairs.src_ids[pairs.source[chosen]], pairs.dst_ids[pairs.destination[chosen]]
        self._made: dict[int, float] = {}

    def __call__(self, view: QueryView) -> np.ndarray:
        keys, where = np.unique(pair_keys(view.src_id, view.dst_id), return_inverse=True)
        new = np.array([key for key in keys.tolist() if key not in self._made], dtype=np.int64)
        source, destination = new >> 32, new & 0xFFFFFFFF
        for one in np.unique(destination):
            rows = np.flatnonzero(destination == one)
            self._made |= zip(new[rows].tolist(), self._to(one, source[rows]).tolist(), strict=True)
        at = find(self.pairs.keys, keys)
        near = np.array([self._made[key] for key in keys.tolist()], dtype=float)
        return np.where(at >= 0, self.pairs.log_ms[at], near)[where]

    def _to(self, destination: int, source: np.ndarray) -> np.ndarray:
        """(q,) log-ms from sources to one destination."""
        there = self._agreement(np.array([destination]), self._destination)[0]  # (P,)
        count = min(self.neighbours, len(there))
        near = np.flatnonzero(there >= np.sort(there)[-count])  # all that may be among the nearest
        predicted = np.empty(len(source))
        for rows in chunks(len(source), len(near)):
            here = self._agreement(source[rows], self._source[near])
            rank = (8 * there[near] + here).astype(np.int64) * len(near) - np.arange(
                len(near)
            )  # the first of equals wins
            nearest = np.argpartition(-rank, count - 1, axis=1)[:, :count]
            weight = 4.0 ** there[near][nearest] * 2.0 ** np.take_along_axis(here, nearest, 1)
            predicted[rows] = weighted_medians(self._log_ms[near][nearest], weight)
        return predicted

    def _agreement(self, queried: np.ndarray, known: np.ndarray) -> np.ndarray:
        """(q, P) int32, 0 … 4: how many of PREFIX_BITS the addresses share."""
        agreement = np.zeros((len(queried), len(known)), dtype=np.int32)
        for level in self._levels:
            agreement += level[queried][:, None] == level[known]
        return agreement


def weighted_medians(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(q,) the values of (q, n) at which half of each row's weight lies below; the mean of two where it is just half."""
    order = np.argsort(values, axis=1)
    values, weight = np.take_along_axis(values, order, 1), np.take_along_axis(weight, order, 1)
    share = np.cumsum(weight, axis=1) / weight.sum(axis=1, keepdims=True)
    low, high = ((share < 0.5 + side * 1e-9).sum(axis=1, keepdims=True) for side in (-1, 1))
    ends = [np.take_along_axis(values, np.minimum(at, values.shape[1] - 1), 1)[:, 0] for at in (low, high)]
    return (ends[0] + ends[1]) / 2


PROFILE_KNN = PointMethod(
    "profile_knn", ProfileNeighbours, tuple({"neighbours": count} for count in (1, 5, 15)), USES_OF_CONTEXT
)
PREFIX_KNN = PointMethod("prefix_knn", PrefixNeighbours, tuple({"neighbours": count} for count in (5, 20)))
