"""Sources and results of pings in, the probability of each destination out: popularity × RTT histogram (Bayes).

A destination is as likely as its source pinged it, smoothed by all sources, times how likely the result is for that
pair: its histogram of log-RTT, smoothed by residuals around additive biases. A share of the mass is for destinations
that were never seen.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from ping_llm.eval.baselines.pairs import find, hide
from ping_llm.eval.baselines.simple import Additive, chunks
from ping_llm.eval.columns import Measurements, Queries, log_rtt

BIN_LOG_MS = 0.05
EDGES = np.arange(-7.0, 15.5, BIN_LOG_MS)
BINS = len(EDGES) + 2
FAILED = BINS - 1
"""The bin of pings without an answer; the first and the last but one are open."""

RESIDUAL_EDGES = np.arange(-6.0, 6.01, BIN_LOG_MS)
STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""Pings that the coarser distribution is worth; chosen on val."""

ARRAYS = 5
"""That are made at once for every query and destination, about."""


class DestinationBayes:
    """P(destination | source, result) over `destinations` (D,), the addresses seen in train, and all others together."""

    name = "destination_bayes"

    def __init__(self, train: Measurements, val: Queries) -> None:
        """Chooses, by the log-probability of val's destinations, how much is smoothed and kept for unseen ones.

        What is chosen for is train without some sources, destinations and pairs, as the test parts have them.
        """
        self._count(hide(train, 0))
        self._unseen = float(((find(self.destinations, val.dst_id) < 0).sum() + 1) / (len(val) + 2))
        chosen = val.take(slice(None, None, max(1, len(val) // 1000)))
        right, each = (
            find(self.destinations, chosen.dst_id),
            np.arange(len(chosen)),
        )  # −1 is the last column: all others
        strengths = list(product(STRENGTHS, STRENGTHS))
        found = (self.log_probability(chosen.probe, chosen.rtt_ms, *one)[each, right].mean() for one in strengths)
        _, self._strengths = max(zip(found, strengths, strict=True))
        self._count(train)

    def _count(self, train: Measurements) -> None:
        self._additive = Additive(train)
        self.destinations, destination = np.unique(train.dst_id, return_inverse=True)
        self._probes, source = np.unique(train.probe, return_inverse=True)
        self._pair_keys, pair = np.unique(self._key(source, destination), return_inverse=True)
        self._pair_count = np.bincount(pair)
        self._source_count = np.bincount(source)
        self._popularity = np.bincount(destination) / len(train)
        failed = train.rtt_ms < 0
        self._fail_rate = (np.bincount(destination, failed) + failed.mean()) / (np.bincount(destination) + 1)
        self._result_keys, self._result_count = np.unique(pair * BINS + _bins(train.rtt_ms), return_counts=True)
        residual = (train.log_ms - self._expected(source, destination))[~failed]
        counts = np.bincount(np.digitize(residual, RESIDUAL_EDGES), minlength=len(RESIDUAL_EDGES) + 1)
        self._residual = (counts + 0.1) / (counts + 0.1).sum()
        self._any_result = (np.bincount(_bins(train.rtt_ms), minlength=BINS) + 0.1) / (len(train) + 0.1 * BINS)

    def log_probability(
        self, probe: np.ndarray, rtt_ms: np.ndarray, popularity: float = 0, result: float = 0
    ) -> np.ndarray:
        """(q, D + 1) natural log; the last column is of all destinations that train does not hold.

        With other strengths, of the popularity and of the coarser distribution of results, than chosen.
        """
        if not popularity:
            popularity, result = self._strengths
        parts = []
        for rows in chunks(len(probe), ARRAYS * len(self.destinations)):
            source, bins, log_ms = find(self._probes, probe[rows]), _bins(rtt_ms[rows]), log_rtt(rtt_ms[rows])
            known = (1 - self._unseen) * self._pinged(source, popularity) * self._results(source, bins, log_ms, result)
            joint = np.concatenate([known, (self._unseen * self._any_result[bins])[:, None]], axis=1)
            parts.append(np.log(joint / joint.sum(axis=1, keepdims=True)))
        return np.concatenate(parts)

    def _pinged(self, source: np.ndarray, strength: float) -> np.ndarray:
        """(q, D) how often each source pings each destination."""
        pair = self._pairs_of(source)
        count = np.where(pair >= 0, self._pair_count[pair], 0)
        total = np.where(source >= 0, self._source_count[source], 0)
        return (count + strength * self._popularity) / (total + strength)[:, None]

    def _results(self, source: np.ndarray, bins: np.ndarray, log_ms: np.ndarray, strength: float) -> np.ndarray:
        """(q, D) the probability of the bin of the result, from each destination."""
        pair = self._pairs_of(source)
        at = find(self._result_keys, np.where(pair >= 0, pair * BINS + bins[:, None], -1))
        count = np.where(at >= 0, self._result_count[at], 0)
        total = np.where(pair >= 0, self._pair_count[pair], 0)
        every = np.arange(len(self.destinations))
        residual = np.nan_to_num(log_ms)[:, None] - self._expected(source[:, None], every[None])
        answered = (1 - self._fail_rate) * self._residual[np.digitize(residual, RESIDUAL_EDGES)]
        prior = np.where((bins == FAILED)[:, None], self._fail_rate, answered)
        return (count + strength * prior) / (total + strength)

    def _expected(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """Additive log-ms of sources, −1 = not seen, and destinations; shapes broadcast."""
        at = np.where(source >= 0, self._additive.pairs.source_of(self._probes[source]), -1)
        bias = np.where(at >= 0, self._additive.source_bias[at], 0.0)
        return bias + self._additive.without_source(self.destinations[destination])

    def _pairs_of(self, source: np.ndarray) -> np.ndarray:
        """(q, D) places of each source's pairs, −1 = not measured."""
        every = np.arange(len(self.destinations))
        return find(self._pair_keys, np.where(source[:, None] >= 0, self._key(source[:, None], every), -1))

    def _key(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        return source.astype(np.int64) * len(self.destinations) + destination


def prefix_ranks(log_probability: np.ndarray, of_known: np.ndarray, of_queried: np.ndarray) -> np.ndarray:
    """(q,) how many prefixes are likelier than the right one, ties against it; the number of all if it is not known.

    `of_known` (D,) and `of_queried` (q,) are `prefix_ids` of the destinations and of the answers.
    """
    prefixes, group = np.unique(of_known, return_inverse=True)
    right = find(prefixes, of_queried)
    ranks = np.full(len(right), len(prefixes))
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(prefixes)))
    for rows in chunks(len(right), ARRAYS * len(of_known)):
        mass = np.add.reduceat(np.exp(log_probability[rows, : len(of_known)])[:, order], starts, axis=1)
        at = right[rows]
        own = np.take_along_axis(mass, np.maximum(at, 0)[:, None], 1)
        ranks[rows] = np.where(at >= 0, (mass >= own).sum(axis=1) - 1, len(prefixes))
    return ranks


def _bins(rtt_ms: np.ndarray) -> np.ndarray:
    """The bin of each result."""
    return np.where(rtt_ms < 0, FAILED, np.digitize(np.nan_to_num(log_rtt(rtt_ms)), EDGES))
