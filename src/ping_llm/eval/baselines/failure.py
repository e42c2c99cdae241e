"""Results of train in, the chance that a ping fails out, and the chance of each destination given source and RTT.

A pair's rate is shrunk to what its destination and its source say together, and these to the rate of all pings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ping_llm.eval.baselines.pairs import find
from ping_llm.eval.columns import Measurements, Queries, QueryView

STRENGTHS = (1.0, 4.0, 16.0, 64.0)
"""Pings that the coarser rate is worth; chosen on val."""


class _Counts:
    """Failures and pings by key."""

    def __init__(self, key: np.ndarray, failed: np.ndarray, time_s: np.ndarray) -> None:
        self.keys, group = np.unique(key, return_inverse=True)
        self.failures = np.bincount(group, failed, len(self.keys))
        self.pings = np.bincount(group, minlength=len(self.keys)).astype(float)
        self.last_s = np.full(len(self.keys), np.iinfo(np.int64).min)
        np.maximum.at(self.last_s, group, time_s)

    def of(self, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Failures, pings, and the time of the latest, of each key; 0, 0 and the beginning of time if it is unknown."""
        at = find(self.keys, key)
        known = at >= 0
        zero, never = np.where(known, self.failures[at], 0.0), np.iinfo(np.int64).min
        return zero, np.where(known, self.pings[at], 0.0), np.where(known, self.last_s[at], never)


class FailureRates:
    """Smoothed failure rates, pair → destination and source → all; the context counts as history of its source."""

    name = "failure_rates"

    def __init__(self) -> None:
        self.choices: dict[str, Any] = {}

    def fit(self, train: Measurements, val: Queries) -> None:
        """Counts train, and chooses how much the coarser rates weigh by the log-loss on val."""
        failed = train.rtt_ms < 0
        self._rate = (failed.sum() + 1) / (len(train) + 2)
        self._destinations = _Counts(train.dst_id, failed, train.time_s)
        self._sources = _Counts(train.probe, failed, train.time_s)
        self._probes = self._sources.keys
        self._pairs = _Counts(self._pair_key(train.probe, train.dst_id), failed, train.time_s)
        counts = [k for k in (0, 5, 30) if k <= val.context.shape[1]]
        views, happened = [val.told(k).view() for k in counts], val.rtt_ms < 0
        losses = [
            (sum(_log_loss(self._p_fail(view, pair, end), happened) for view in views), pair, end)
            for pair in STRENGTHS
            for end in STRENGTHS
        ]
        _, pair, end = min(losses)
        self.choices = {"pair_strength": pair, "end_strength": end}

    def p_fail(self, view: QueryView) -> np.ndarray:
        """(q,) the chance that each query fails."""
        return self._p_fail(view, self.choices["pair_strength"], self.choices["end_strength"])

    def _p_fail(self, view: QueryView, pair_strength: float, end_strength: float) -> np.ndarray:
        told, failed = view.context_dst_id >= 0, view.context_rtt_ms < 0
        ends = []
        for counts, key, counted in (
            (self._destinations, view.dst_id, np.zeros_like(told)),
            (self._sources, view.probe, told),
        ):
            failures, pings, last_s = counts.of(key)
            new = counted & (view.context_time_s > last_s[:, None])
            failures, pings = failures + (new & failed).sum(axis=1), pings + new.sum(axis=1)
            ends.append(_log_odds((failures + end_strength * self._rate) / (pings + end_strength)))
        prior = 1 / (1 + np.exp(_log_odds(self._rate) - ends[0] - ends[1]))  # both ends shift the odds
        failures, pings, last_s = self._pairs.of(self._pair_key(view.probe, view.dst_id))
        same = told & (view.context_dst_id == view.dst_id[:, None]) & (view.context_time_s > last_s[:, None])
        failures, pings = failures + (same & failed).sum(axis=1), pings + same.sum(axis=1)
        return (failures + pair_strength * prior) / (pings + pair_strength)

    def _pair_key(self, probe: np.ndarray, dst_id: np.ndarray) -> np.ndarray:
        source = find(self._probes, probe)
        return np.where(source >= 0, (source.astype(np.int64) << 32) | dst_id, -1)


def _log_odds(chance: np.ndarray | float) -> np.ndarray:
    return np.log(chance) - np.log1p(-chance)


def _log_loss(chance: np.ndarray, happened: np.ndarray) -> float:
    chance = np.clip(chance, 1e-6, 1 - 1e-6)
    return float(-np.where(happened, np.log(chance), np.log1p(-chance)).mean())
