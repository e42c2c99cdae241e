"""Training measurements in, one log-RTT for each pair of a source and a destination out, and where a query stands in it.

Sources and destinations are addresses. Failed pings are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ping_llm.eval.columns import Measurements, Queries, QueryView, earlier_measurements, pair_keys, prefix_ids
from ping_llm.eval.queries import COUNTS


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs that were measured, of S sources and D destinations."""

    keys: np.ndarray  # (P,) int64 `pair_keys`, ascending
    source: np.ndarray  # (P,) int64, into src_ids
    destination: np.ndarray  # (P,) int64, into dst_ids
    log_ms: np.ndarray  # (P,) median of the pair
    src_ids: np.ndarray  # (S,) ascending
    dst_ids: np.ndarray  # (D,) ascending

    def __len__(self) -> int:
        return len(self.log_ms)

    @classmethod
    def of(cls, train: Measurements) -> Pairs:
        """The pairs of all answered measurements; ValueError if nothing was answered."""
        rows = np.flatnonzero(train.rtt_ms >= 0)
        if not len(rows):
            raise ValueError("the train part holds no answered measurement; prepare more measurements")
        src_ids, source = np.unique(train.src_id[rows], return_inverse=True)
        dst_ids, destination = np.unique(train.dst_id[rows], return_inverse=True)
        keys, first, pair = np.unique(
            pair_keys(train.src_id[rows], train.dst_id[rows]), return_index=True, return_inverse=True
        )
        log_ms = group_medians(train.log_ms[rows], pair, len(keys))
        return cls(keys, source[first], destination[first], log_ms, src_ids, dst_ids)

    def at(self, view: QueryView) -> np.ndarray:
        """(q,) where the queried pair stands among the P, −1 = it was not measured."""
        return find(self.keys, pair_keys(view.src_id, view.dst_id))

    @cached_property
    def matrix(self) -> np.ndarray:
        """(S, D) float32 log-ms, NaN where a pair was not measured."""
        matrix = np.full((len(self.src_ids), len(self.dst_ids)), np.nan, dtype=np.float32)
        matrix[self.source, self.destination] = self.log_ms
        return matrix


class Past:
    """Measurements by key, each key's in order of time: which of them are before a second."""

    def __init__(self, key: np.ndarray, time_s: np.ndarray) -> None:
        self._keys, group = np.unique(key, return_inverse=True)
        self._first_s = int(time_s.min()) if len(time_s) else 0
        place = self._place(group, time_s)
        self.order = np.argsort(place, kind="stable")  # (n,) places in the table
        self._places, self.time_s = place[self.order], time_s[self.order]

    def before(self, key: np.ndarray, time_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(q,) from where to where in `order` stands what has a key and is strictly earlier than a second."""
        group = find(self._keys, key)
        start = np.searchsorted(self._places, self._place(group, np.full_like(time_s, self._first_s)))
        stop = np.searchsorted(self._places, self._place(group, time_s))
        return start, np.where(group >= 0, stop, start)

    def last_s(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """(q,) the second of the last in each stretch; before all time for an empty one."""
        if not len(self.time_s):
            return np.full(len(stop), np.iinfo(np.int64).min)
        return np.where(stop > start, self.time_s[np.maximum(stop, 1) - 1], np.iinfo(np.int64).min)

    def _place(self, group: np.ndarray, time_s: np.ndarray) -> np.ndarray:
        """Ascends by group, then by time."""
        return (group.astype(np.int64) << 32) + np.clip(time_s - self._first_s, 0, (1 << 32) - 1)


class SourceBackoff:
    """A row for each source, then one for each /24 or /48 of sources, then one for all: what is known of an address."""

    def __init__(self, src_ids: np.ndarray, addresses: np.ndarray) -> None:
        self._src_ids, self._prefix = src_ids, prefix_ids(addresses, 24, 48)  # (S,) ascending, (a,)
        self._prefixes, self._group = np.unique(self._prefix[src_ids], return_inverse=True)
        self.count = len(src_ids) + len(self._prefixes) + 1

    def rows(self, src_id: np.ndarray) -> np.ndarray:
        """(q,) the row of each address, or of its prefix, or of all; those of known sources are 0 … S − 1."""
        source, prefix = find(self._src_ids, src_id), find(self._prefixes, self._prefix[src_id])
        sources = len(self._src_ids)
        of_prefix = np.where(prefix >= 0, sources + prefix, sources + len(self._prefixes))
        return np.where(source >= 0, source, of_prefix)

    def extend(self, values: np.ndarray) -> np.ndarray:
        """(S + prefixes + 1, …) values (S, …) of the sources, their means by prefix, and the mean of all."""
        flat = values.reshape(len(values), -1)
        sums = np.stack([np.bincount(self._group, column, len(self._prefixes)) for column in flat.T], axis=1)
        means = sums / np.bincount(self._group)[:, None]
        return np.concatenate([flat, means, flat.mean(axis=0)[None]]).reshape(-1, *values.shape[1:])


def find(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted value stands in a sorted array, −1 = nowhere; any shape."""
    if not len(ascending):
        return np.full(np.shape(wanted), -1)
    at = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    return np.where(ascending[at] == wanted, at, -1)


def group_medians(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """(groups,) medians of values (n,) by group (n,), each of which has one at least."""
    order = np.lexsort((values, group))
    count = np.bincount(group, minlength=groups)
    start = np.cumsum(count) - count
    ordered = values[order]
    return (ordered[start + (count - 1) // 2] + ordered[start + count // 2]) / 2


def hide(
    train: Measurements, seed: int, pairs: float = 0.12, sources: float = 0.12, prefixes: float = 0.08
) -> Measurements:
    """Training measurements without a share of sources and prefixes, as either endpoint, and of pairs, either way: queries
    of what was left out stand to the rest as held-out queries do to the whole."""
    rng = np.random.default_rng([seed, 0x51DE])
    prefix = train.prefix
    unit = (rng.random(len(train.addresses)) < sources) & np.isin(np.arange(len(train.addresses)), train.src_id)
    unit |= np.isin(prefix, prefix[train.dst_id]) & (rng.random(prefix.max() + 1) < prefixes)[prefix]
    either = np.sort(np.stack([train.src_id, train.dst_id]), axis=0)
    keys, pair = np.unique(pair_keys(*either), return_inverse=True)
    hidden = unit[train.src_id] | unit[train.dst_id] | (rng.random(len(keys)) < pairs)[pair]
    return train.take(~hidden) if (train.rtt_ms[~hidden] >= 0).any() else train  # a handful of pairs


def practice_queries(train: Measurements, rows: np.ndarray, rng: np.random.Generator) -> Queries:
    """Queries of measurements `rows` of train, each given 0 … 30 earlier ones of either draw, at random."""
    half = rng.random((len(rows), 1)) < 0.5
    recent, other = (earlier_measurements(train, rows, max(COUNTS), other) for other in (False, True))
    given = np.arange(max(COUNTS)) < rng.choice(COUNTS, (len(rows), 1))
    return Queries(train, rows, np.where(given, np.where(half, recent, other), -1))
