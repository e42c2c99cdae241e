"""Results of train in, the chance that a ping fails out.

A pair's rate is shrunk to what its destination and its source say together, and these to the rate of all pings.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from ping_llm.eval.baselines.pairs import find, pair_keys
from ping_llm.eval.columns import Measurements, Queries, QueryView
from ping_llm.eval.distribution import log_loss
from ping_llm.eval.queries import CHOICE_CONTEXTS

STRENGTHS = (1.0, 4.0, 16.0, 64.0)  # pings that the coarser rate is worth; chosen on val

NEVER = np.iinfo(np.int64).min


class _Counts:
    """Failures and pings by key."""

    def __init__(self, key: np.ndarray, failed: np.ndarray, time_s: np.ndarray) -> None:
        self.keys, group = np.unique(key, return_inverse=True)
        self.failures = np.bincount(group, failed, len(self.keys))
        self.pings = np.bincount(group, minlength=len(self.keys)).astype(float)
        self.last_s = np.full(len(self.keys), NEVER)
        np.maximum.at(self.last_s, group, time_s)

    def of(self, key: np.ndarray, view: QueryView, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(q,) failures and pings of each key (q,), with those of the context that are `counted` (q, K) and are later."""
        at = find(self.keys, key)
        known = at >= 0
        new = counted & (view.context_time_s > np.where(known, self.last_s[at], NEVER)[:, None])
        failures = np.where(known, self.failures[at], 0.0) + (new & (view.context_rtt_ms < 0)).sum(axis=1)
        return failures, np.where(known, self.pings[at], 0.0) + new.sum(axis=1)


class FailureRates:
    """Smoothed failure rates, pair → destination and source → all; the context counts as history of its source."""

    def __init__(self, train: Measurements, val: Queries) -> None:
        """Counts train, and chooses how much the coarser rates weigh by the log-loss on val."""
        failed = train.rtt_ms < 0
        self._rate = (failed.sum() + 1) / (len(train) + 2)
        self._destinations = _Counts(train.dst_id, failed, train.time_s)
        self._sources = _Counts(train.probe, failed, train.time_s)
        self._pairs = _Counts(self._pair_key(train.probe, train.dst_id), failed, train.time_s)
        views = val.views(CHOICE_CONTEXTS)
        _, *self._strengths = min(
            (sum(log_loss(self.p_fail(view, *strengths), val.rtt_ms < 0).mean() for view in views), *strengths)
            for strengths in product(STRENGTHS, STRENGTHS)
        )

    def p_fail(self, view: QueryView, pair_strength: float = 0, one_strength: float = 0) -> np.ndarray:
        """(q,) the chance that each query fails; with other strengths, of the pair and of either address, than chosen."""
        if not pair_strength:
            pair_strength, one_strength = self._strengths
        given = view.context_dst_id >= 0
        failures, pings = self._destinations.of(view.dst_id, view, np.zeros_like(given))
        odds = _log_odds((failures + one_strength * self._rate) / (pings + one_strength)) - _log_odds(self._rate)
        failures, pings = self._sources.of(view.probe, view, given)  # source and destination both shift the odds
        odds += _log_odds((failures + one_strength * self._rate) / (pings + one_strength))
        same = given & (view.context_dst_id == view.dst_id[:, None])
        failures, pings = self._pairs.of(self._pair_key(view.probe, view.dst_id), view, same)
        return (failures + pair_strength / (1 + np.exp(-odds))) / (pings + pair_strength)

    def _pair_key(self, probe: np.ndarray, dst_id: np.ndarray) -> np.ndarray:
        return pair_keys(find(self._sources.keys, probe), dst_id)


def _log_odds(chance: np.ndarray) -> np.ndarray:
    return np.log(chance) - np.log1p(-chance)
