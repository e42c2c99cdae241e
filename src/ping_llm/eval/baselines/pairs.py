"""Training measurements in, one log-RTT for each pair of a source and a destination out, and where a query stands in it.

A source is a group (a probe, whichever addresses it used), a destination an address. Failed pings are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ping_llm.eval.columns import Measurements, QueryView


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs that were measured, of S sources and D destinations."""

    keys: np.ndarray  # (P,) int64 `pair_keys`, ascending
    source: np.ndarray  # (P,) int64, into probes
    destination: np.ndarray  # (P,) int64, into dst_ids
    log_ms: np.ndarray  # (P,) median of the pair
    src_id: np.ndarray  # (P,) an address that the source used
    probes: np.ndarray  # (S,) ascending
    dst_ids: np.ndarray  # (D,) ascending

    def __len__(self) -> int:
        return len(self.log_ms)

    @classmethod
    def of(cls, train: Measurements) -> Pairs:
        """The pairs of all answered measurements; ValueError if nothing was answered."""
        rows = np.flatnonzero(train.rtt_ms >= 0)
        if not len(rows):
            raise ValueError("the train part holds no answered measurement; prepare more measurements")
        probes, source = np.unique(train.probe[rows], return_inverse=True)
        dst_ids, destination = np.unique(train.dst_id[rows], return_inverse=True)
        keys, first, pair = np.unique(pair_keys(source, destination), return_index=True, return_inverse=True)
        log_ms = group_medians(train.log_ms[rows], pair, len(keys))
        return cls(keys, source[first], destination[first], log_ms, train.src_id[rows][first], probes, dst_ids)

    def has_pair(self, view: QueryView) -> np.ndarray:
        """(q,) bool: the queried pair was measured."""
        return find(self.keys, pair_keys(find(self.probes, view.probe), find(self.dst_ids, view.dst_id))) >= 0

    @cached_property
    def matrix(self) -> np.ndarray:
        """(S, D) float32 log-ms, NaN where a pair was not measured."""
        matrix = np.full((len(self.probes), len(self.dst_ids)), np.nan, dtype=np.float32)
        matrix[self.source, self.destination] = self.log_ms
        return matrix


def find(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted value stands in a sorted array, −1 = nowhere; any shape."""
    if not len(ascending):
        return np.full(np.shape(wanted), -1)
    at = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    return np.where(ascending[at] == wanted, at, -1)


def pair_keys(source: np.ndarray, destination: np.ndarray) -> np.ndarray:
    """One int64 for each source and destination, or prefix, ascending with both; −1 where either is not known."""
    return np.where((source >= 0) & (destination >= 0), (source.astype(np.int64) << 32) | destination, -1)


def group_medians(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """(groups,) medians of values (n,) by group (n,), each of which has one at least."""
    order = np.lexsort((values, group))
    count = np.bincount(group, minlength=groups)
    start = np.cumsum(count) - count
    ordered = values[order]
    return (ordered[start + (count - 1) // 2] + ordered[start + count // 2]) / 2


def hide(
    train: Measurements, seed: int, pairs: float = 0.12, sources: float = 0.12, destinations: float = 0.08
) -> Measurements:
    """Training measurements without a share of sources, destinations and pairs, so that queries of what was left out
    stand to the rest as test queries of new sources, destinations and pairs stand to the whole."""
    rng = np.random.default_rng([seed, 0x51DE])
    probes, source = np.unique(train.probe, return_inverse=True)
    dst_ids, destination = np.unique(train.dst_id, return_inverse=True)
    keys, pair = np.unique(pair_keys(source, destination), return_inverse=True)
    hidden = (rng.random(len(probes)) < sources)[source] | (rng.random(len(dst_ids)) < destinations)[destination]
    hidden |= (rng.random(len(keys)) < pairs)[pair]
    return train.take(~hidden) if (train.rtt_ms[~hidden] >= 0).any() else train  # a handful of pairs
