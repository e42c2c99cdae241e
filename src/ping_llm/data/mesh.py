"""Probe rows in, rows of several probes out: measurements of one, and of others to the same destinations.

A model that reads such windows learns to complete a matrix from its context: sources that see some destinations alike see
others alike too. Up to 12 other rows are drawn in proportion to how many of 1–12 destinations of the first row they share.
Of the measurements 20–60 % are of the first row and three quarters are to those destinations, as far as the rows hold so
many. They lie in a random span of the first row's history, or else as near to it as can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ping_llm.data.rows import ProbeRow, RowReader
from ping_llm.data.windows import random_span

MOST_OTHERS = 12  # rows beside the first
MOST_SHARED = 12  # destinations by which they are found
FIRST_SHARE = 0.2, 0.6  # of the measurements
SHARED_SHARE = 0.75
# What is read for the index, and what is kept of a row of hops: 2^24 numbers of rows at most, 64 MB.
MOST_ROWS, MOST_MEASUREMENTS, MOST_DESTINATIONS = 1 << 16, 1 << 28, 1 << 8
_AT_ONCE = 1 << 6  # rows whose addresses are in memory together: of 8 MB each at most


class DestinationIndex:
    """Which rows of a part hold measurements to a destination.

    Destinations that only one row holds are left out: `rows[starts[i] : starts[i + 1]]` hold the one of key `keys[i]`.
    Picklable, with the reader of the part.
    """

    def __init__(self, reader: RowReader) -> None:
        """Reads all rows, or evenly spaced ones of as many as MOST_ROWS and MOST_MEASUREMENTS allow.

        Of a row with more than MOST_DESTINATIONS those with the least keys are kept, so that rows keep the same ones.
        """
        self.reader, count = reader, len(reader)
        share = MOST_MEASUREMENTS / max(1, reader.measurements.sum())
        chosen = max(1, min(count, MOST_ROWS, int(count * share)))
        numbers = np.arange(chosen) * count // chosen
        parts = [self._keys_of(numbers[i : i + _AT_ONCE]) for i in range(0, chosen, _AT_ONCE)]
        key, row = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.lexsort((row, key))
        keys, counts = np.unique(key, return_counts=True)
        shared = counts > 1
        self.keys = keys[shared]  # (D,) uint64, ascending
        self.starts = np.concatenate([[0], np.cumsum(counts[shared])])  # (D + 1,) of the rows of each
        self.rows = row[order][np.repeat(shared, counts)]  # (N,) uint32

    def _keys_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The keys of the destinations of some rows, (n,) uint64, and the row of each, (n,) uint32."""
        addresses = [self.reader[number].dst_addresses.copy() for number in numbers.tolist()]  # else whole rows stay
        key = destination_keys(np.concatenate(addresses))
        row = np.repeat(numbers, [len(own) for own in addresses]).astype(np.uint32)
        order = np.lexsort((key, row))
        key, row = key[order], row[order]
        starts = np.flatnonzero(np.diff(row, prepend=row[0] + 1))
        kept = np.arange(len(row)) - np.repeat(starts, np.diff(starts, append=len(row))) < MOST_DESTINATIONS
        return key[kept], row[kept]

    def places(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of destinations (n, 16), where their rows begin in the list of all, (n,), and how many there are, (n,)."""
        if not len(self.keys):
            return np.zeros(len(addresses), np.int64), np.zeros(len(addresses), np.int64)
        key = destination_keys(addresses)
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        found = self.keys[at] == key
        return self.starts[at], np.where(found, self.starts[at + 1] - self.starts[at], 0)

    def others(self, number: int, addresses: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
        """Up to `count` rows of other probes than row `number`, each drawn in proportion to how many of the destinations
        (n, 16) it holds."""
        starts, counts = self.places(addresses)
        ends = np.cumsum(counts)
        if not len(ends) or not ends[-1]:
            return []
        drawn = rng.integers(ends[-1], size=4 * (count + 4))  # more, as some are its own or come again
        at = np.searchsorted(ends, drawn, "right")
        rows = self.rows[starts[at] + drawn - (ends - counts)[at]].astype(np.int64)
        probe_id = self.reader.probe_id
        own = (rows == number) | ((probe_id[rows] == probe_id[number]) & (probe_id[number] >= 0))
        return list(dict.fromkeys(rows[~own].tolist()))[:count]

    def mesh(self, number: int, first: ProbeRow, rng: np.random.Generator) -> Mesh | None:
        """Row `number` and others that share destinations with it; None if no row does."""
        _, counts = self.places(first.dst_addresses)
        held = np.flatnonzero(counts)
        if not len(held):
            return None
        chosen = rng.choice(held, min(len(held), _log_uniform(MOST_SHARED, rng)), replace=False)
        shared = first.dst_addresses[chosen]
        others = self.others(number, shared, _log_uniform(MOST_OTHERS, rng), rng)
        if not others:
            return None
        return Mesh([first, *(self.reader[other] for other in others)], destination_keys(shared))


@dataclass(frozen=True)
class Mesh:
    """Rows of different probes, the first of which gives the span."""

    rows: Sequence[ProbeRow]
    shared_keys: np.ndarray  # of the destinations by which the others were found

    @cached_property
    def places(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each row the measurements to a shared destination, and the others: (n,) ascending."""
        of_rows = [(destination_keys(row.dst_addresses)[:, None] == self.shared_keys).any(axis=1) for row in self.rows]
        to_shared = [is_shared[row.dst] for row, is_shared in zip(self.rows, of_rows, strict=True)]
        return [(np.flatnonzero(chosen), np.flatnonzero(~chosen)) for chosen in to_shared]

    def row(self, size: int, rng: np.random.Generator) -> ProbeRow:
        """About `size` measurements of all rows as one row in time order, or all measurements if there are fewer."""
        counts = _dealt(size, rng.uniform(*FIRST_SHARE), np.array([len(row) for row in self.rows]))
        first = self.rows[0]
        offset, span = random_span(len(first), int(counts[0]), rng)
        begin_s, end_s = first.times(np.array([offset, offset + span - 1])).tolist()
        chosen = []
        for row, (shared, rest), count in zip(self.rows, self.places, counts.tolist(), strict=True):
            of_rest = min(len(rest), int(count * (1 - SHARED_SHARE) + rng.random()))
            of_shared = min(len(shared), count - of_rest)
            kinds = ((shared, of_shared), (rest, count - of_shared))
            chosen += [(row, _near(row, places, k, begin_s, end_s, rng)) for places, k in kinds if k]
        time_s = np.concatenate([row.times(index) for row, index in chosen])
        order = np.argsort(time_s, kind="stable")
        columns = [
            np.concatenate(parts)[order]
            for parts in (
                [row.msm_ids[row.msm[index]] for row, index in chosen],
                [row.src_addresses[row.src[index]] for row, index in chosen],
                [row.dst_addresses[row.dst[index]] for row, index in chosen],
                [row.rtt_ms[index] for row, index in chosen],
                [row.kind[index] for row, index in chosen],
            )
        ]
        return ProbeRow.from_addresses(first.probe_id, time_s[order], *columns)


def destination_keys(addresses: np.ndarray) -> np.ndarray:
    """(n, 16) addresses to (n,) uint64 that are as good as different, by the finaliser of splitmix64."""
    high, low = np.ascontiguousarray(addresses).view(np.uint64).reshape(-1, 2).T
    key = high * np.uint64(0x9E3779B97F4A7C15) + low
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def _log_uniform(most: int, rng: np.random.Generator) -> int:
    """1 … most, the logarithm uniform."""
    return int((most + 1) ** rng.random())


def _dealt(size: int, first_share: float, lengths: np.ndarray) -> np.ndarray:
    """How many measurements each row (n,) gives of `size`, or of a few more, so that none is without: (n,).

    The first gives its share and the others equal ones; what one lacks the others give.
    """
    others = max(1, len(lengths) - 1)
    wanted = np.full(len(lengths), size * (1 - first_share) / others)
    wanted[0] = size * first_share
    counts = np.minimum(np.maximum(1, np.rint(wanted)).astype(np.int64), lengths)
    while (missing := size - counts.sum()) > 0 and (counts < lengths).any():
        room = np.flatnonzero(counts < lengths)
        counts[room] = np.minimum(counts[room] - (-missing // len(room)), lengths[room])
    return counts


def _near(
    row: ProbeRow, places: np.ndarray, count: int, begin_s: int, end_s: int, rng: np.random.Generator
) -> np.ndarray:
    """`count` of ascending places of a row: random ones of those from begin_s to end_s, or as near to that as can be."""
    if count == len(places):
        return places
    edges = [min(max(0, time_s - row.first_time_s), 0xFFFF_FFFF) for time_s in (begin_s, end_s + 1)]
    within = np.searchsorted(row.offset_s, np.array(edges, dtype=np.uint32))  # of another type: a copy of the column
    low, high = np.searchsorted(places, within).tolist()
    if high - low < count:
        low = min(max(0, low - (count - (high - low)) // 2), len(places) - count)
        high = low + count
    return places[low + np.sort(rng.choice(high - low, count, replace=False, shuffle=False))]
