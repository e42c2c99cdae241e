"""Sources and results of pings in, the probability of each destination out: popularity × RTT histogram (Bayes).

A destination is as likely as its source pinged it, smoothed by all sources, times how likely the result is for that
pair: its histogram of log-RTT, smoothed by residuals around additive biases. A share of the mass is for destinations
that were never seen.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from ping_llm.data.measurement import log_rtt
from ping_llm.eval.baselines.pairs import find
from ping_llm.eval.baselines.simple import Additive, chunks
from ping_llm.eval.columns import Measurements, Queries, pair_keys

BIN_LOG_MS = 0.05
EDGES = np.arange(-7.0, 15.5, BIN_LOG_MS)
BINS = len(EDGES) + 2
FAILED = BINS - 1  # the bin of pings without an answer; the first and the last but one are open
RESIDUAL_EDGES = np.arange(-6.0, 6.01, BIN_LOG_MS)
STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # pings that the coarser distribution is worth; chosen on val
ARRAYS = 5  # that are made at once for every query and destination, about


class DestinationBayes:
    """P(destination | source, result) over `destinations` (D,), the addresses seen in train, and all others together."""

    name = "destination_bayes"

    def __init__(self, train: Measurements, val: Queries) -> None:
        """Chooses, by the log-probability of val's destinations, how much is smoothed and kept for unseen ones."""
        self._count(train)
        self._unseen = float(((find(self.destinations, val.dst_id) < 0).sum() + 1) / (len(val) + 2))
        chosen = val.take(slice(None, None, max(1, len(val) // 1000)))
        right, each = find(self.destinations, chosen.dst_id), np.arange(len(chosen))  # −1 is the last column
        strengths = list(product(STRENGTHS, STRENGTHS))
        found = (self.log_probability(chosen.src_id, chosen.rtt_ms, *one)[each, right].mean() for one in strengths)
        _, self._strengths = max(zip(found, strengths, strict=True))

    def _count(self, train: Measurements) -> None:
        self._additive = Additive(train)
        self.destinations, destination = np.unique(train.dst_id, return_inverse=True)
        self._sources, source = np.unique(train.src_id, return_inverse=True)
        self._keys, pair, self._pair_count = np.unique(
            pair_keys(source, destination), return_inverse=True, return_counts=True
        )
        self._source_count, pings = np.bincount(source), np.bincount(destination)
        self._popularity = pings / len(train)
        failed, bins = train.rtt_ms < 0, _bins(train.rtt_ms)
        self._fail_rate = (np.bincount(destination, failed) + failed.mean()) / (pings + 1)
        self._result_keys, self._result_count = np.unique(pair * BINS + bins, return_counts=True)
        residual = (train.log_ms - self._expected(train.src_id, destination))[~failed]
        counts = np.bincount(np.digitize(residual, RESIDUAL_EDGES), minlength=len(RESIDUAL_EDGES) + 1)
        self._residual = (counts + 0.1) / (counts + 0.1).sum()
        self._any_result = (np.bincount(bins, minlength=BINS) + 0.1) / (len(train) + 0.1 * BINS)

    def log_probability(
        self, src_id: np.ndarray, rtt_ms: np.ndarray, popularity: float = 0, result: float = 0
    ) -> np.ndarray:
        """(q, D + 1) natural log; the last column is of all destinations that train does not hold.

        With other strengths, of the popularity and of the coarser distribution of results, than chosen.
        """
        if not popularity:
            popularity, result = self._strengths
        every, parts = np.arange(len(self.destinations)), []
        for rows in chunks(len(src_id), ARRAYS * len(every)):
            source, bins = find(self._sources, src_id[rows])[:, None], _bins(rtt_ms[rows])[:, None]  # (q, 1)
            pair = find(self._keys, pair_keys(source, every))  # (q, D), −1 = not measured
            of_pair = np.where(pair >= 0, self._pair_count[pair], 0)
            of_source = np.where(source >= 0, self._source_count[source], 0)
            pinged = (of_pair + popularity * self._popularity) / (of_source + popularity)
            at = find(self._result_keys, np.where(pair >= 0, pair * BINS + bins, -1))
            residual = np.nan_to_num(log_rtt(rtt_ms[rows]))[:, None] - self._expected(src_id[rows][:, None], every)
            answered = (1 - self._fail_rate) * self._residual[np.digitize(residual, RESIDUAL_EDGES)]
            prior = np.where(bins == FAILED, self._fail_rate, answered)
            results = (np.where(at >= 0, self._result_count[at], 0) + result * prior) / (of_pair + result)
            joint = np.append((1 - self._unseen) * pinged * results, self._unseen * self._any_result[bins], axis=1)
            parts.append(np.log(joint / joint.sum(axis=1, keepdims=True)))
        return np.concatenate(parts)

    def _expected(self, src_id: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """Additive log-ms of sources and destinations; shapes broadcast."""
        return self._additive.bias_of(src_id) + self._additive.without_source(self.destinations[destination])


def prefix_ranks(mass: np.ndarray, of_known: np.ndarray, of_queried: np.ndarray) -> np.ndarray:
    """(q,) how many prefixes are likelier than the right one, ties against it; the number of all if it is not known.

    `mass` (q, D) is the probability of each destination, `of_known` (D,) and `of_queried` (q,) are `prefix_ids` of the
    destinations and of the answers.
    """
    order = np.argsort(of_known, kind="stable")
    prefixes, starts = np.unique(of_known[order], return_index=True)
    of_prefix = np.add.reduceat(mass[:, order], starts, axis=1)
    right = find(prefixes, of_queried)
    own = np.take_along_axis(of_prefix, right[:, None], 1)
    return np.where(right >= 0, (of_prefix >= own).sum(axis=1) - 1, len(prefixes))


def _bins(rtt_ms: np.ndarray) -> np.ndarray:
    """The bin of each result."""
    return np.where(rtt_ms < 0, FAILED, np.digitize(np.nan_to_num(log_rtt(rtt_ms)), EDGES))
