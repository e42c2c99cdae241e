"""Measurements in, the part of each out: train, five parts to choose and tune on, five that are read once, by the report.

    train      earlier than every time cut, of endpoints and pairs that nothing below holds out
    val-s1     the rest, later; test-s1 is later still: one global time cut each, whether the pair was seen before or not
    …-s2       new pair: 4 % (val) and 10 % (test) of the pairs of a source and a destination, with the reverse direction
    …-s3       new source: 3 % and 5 % of groups (a probe, or a source address where the probe is unknown)
    …-s4       new destination: 3 % and 5 % of /24s (IPv4) or /48s (IPv6), and the hosts of the groups held out as sources
    …-s5       both new

Every choice but that of time is a salted hash of a stable key, never a position: it does not depend on the order of a
dump. The bands of val and of test are disjoint, so no endpoint of a test part is one of a val part.

A held-out host or prefix is held out **as either endpoint**. Measurements that would show one elsewhere are dropped: those
from a source in a held-out prefix, those of another group from a source address that a held-out group used too, and those
between an endpoint of val and one of test. So the reverse of a pair of s2 to s5 is never in train.

A destination that is also a source stands for its group, so that a pair has two directions. Groups that shared a source
address, directly or through others, count as one endpoint of a pair: a pair has no one owner otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ping_llm.data.hashing import crc32, hash_below, hash_keys, int64_bytes, mix
from ping_llm.data.measurement import ADDRESS_BYTES, as_text, is_ipv4

TRAIN, VAL, TEST = range(3)
"""The band of an endpoint, a pair or a moment: seen in training, or held out for val or for test."""

BANDS = ("train", "val", "test")
PARTS = ("train", *(f"{band}-s{number}" for band in BANDS[1:] for number in range(1, 6)))
DROPPED = len(PARTS)
"""What stands for a part where a measurement is dropped because it would show a held-out endpoint outside its parts."""

KEY_BYTES = 1 + ADDRESS_BYTES
"""Of the key of an endpoint: 0 and the probe as 16 bytes, or 1 and an address; so probes sort before addresses."""

CUT_STEP_S = 60
"""Time cuts are multiples of this: as fine as the histogram that they are taken from."""


@dataclass(frozen=True)
class TimeCut:
    """Train is earlier than `val_from_s`, val-s1 earlier than `test_from_s`, test-s1 the rest; Unix seconds."""

    val_from_s: int
    test_from_s: int

    def bands(self, time_s: np.ndarray) -> np.ndarray:
        """(n,) uint8 bands of (n,) times."""
        return ((time_s >= self.val_from_s).astype(np.uint8) + (time_s >= self.test_from_s)).astype(np.uint8)


@dataclass(frozen=True)
class SplitRule:
    """What decides the part of a measurement; shares in percent."""

    salt: str = "pingbench"
    group_percent: tuple[int, int] = (3, 5)  # of val, of test
    prefix_percent: tuple[int, int] = (3, 5)
    pair_percent: tuple[int, int] = (4, 10)
    time_percent: tuple[int, int] = (10, 15)

    def describe(self) -> dict[str, Any]:
        """The rule as the manifest holds it."""
        shares = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"name": "pingbench", "version": 2, **shares, "hash": "murmur3 finaliser of crc32(salt/field/ + key)"}

    def hashes(self, field: str, keys: np.ndarray) -> np.ndarray:
        """(n, k) uint8 keys to (n,) uint32, salted with the rule's salt and what the key is."""
        return hash_keys(keys, f"{self.salt}/{field}/".encode())

    def group_bands(self, keys: np.ndarray) -> np.ndarray:
        """(n,) bands of the (n, 17) keys of groups."""
        return _bands(self.hashes("group", keys), self.group_percent)

    def prefix_bands(self, addresses: np.ndarray) -> np.ndarray:
        """(n,) bands of the /24s or /48s of (n, 16) addresses."""
        kept = np.where(is_ipv4(addresses)[:, None], 15, 6)  # bytes; a.b.c.0 is the IPv4-mapped form cut after byte 15
        prefixes = np.where(np.arange(ADDRESS_BYTES) < kept, addresses, 0).astype(np.uint8)
        return _bands(self.hashes("prefix", prefixes), self.prefix_percent)

    def endpoint_hashes(self, keys: np.ndarray) -> np.ndarray:
        """(n, 17) keys of the endpoints of pairs to (n,) uint32, for `pair_bands`."""
        return crc32(keys, f"{self.salt}/pair/".encode())

    def pair_bands(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Bands of pairs of endpoints, given by `endpoint_hashes`; the sum makes both directions one pair."""
        return _bands(mix(mix(one) + mix(other)), self.pair_percent)

    def time_cut(self, counts: dict[int, int]) -> TimeCut:
        """The cuts that leave at most `time_percent` of all measurements to val and test.

        `counts`: how many there are in each CUT_STEP_S of Unix time, see `count_times`; not empty. Repeated and dropped
        measurements count as well. All are train where there are too few moments to cut between.
        """
        steps = np.array(sorted(counts), dtype=np.int64)
        until = np.cumsum([counts[step] for step in steps.tolist()])  # measurements up to the end of each step
        val, test = (
            int(steps[np.searchsorted(100 * until, until[-1] * (100 - percent))] + 1) * CUT_STEP_S
            for percent in (sum(self.time_percent), self.time_percent[1])
        )
        return TimeCut(val, test)


def count_times(time_s: np.ndarray) -> dict[int, int]:
    """How many of (n,) times lie in each CUT_STEP_S of Unix time."""
    step, count = np.unique(time_s // CUT_STEP_S, return_counts=True)
    return dict(zip(step.tolist(), count.tolist(), strict=True))


def _bands(hashes: np.ndarray, percent: tuple[int, int]) -> np.ndarray:
    """The test share is the lowest hashes and the val share the highest, so either may grow and keep what it held."""
    of_val, of_test = percent
    drawn = hash_below(hashes, 100)
    return np.select([drawn < of_test, drawn >= 100 - of_val], [TEST, VAL], TRAIN).astype(np.uint8)


@dataclass(frozen=True)
class Groups:
    """The group of each of n measurements, as an index into keys in ascending order."""

    index: np.ndarray  # (n,) int64
    keys: np.ndarray  # (G, 17) uint8


@dataclass(frozen=True)
class Sources:
    """Every source address of a dump, ascending, and whose it is. An address joins the groups that used it."""

    addresses: np.ndarray  # (A, 16) uint8
    owner: np.ndarray  # (A, 17) uint8, the least key of all groups that it joins
    band: np.ndarray  # (A,) uint8, the highest of the groups that used it


def group_measurements(probe_id: np.ndarray, src: np.ndarray, src_addresses: np.ndarray) -> Groups:
    """Groups by probe, and by source address where probe_id is −1. `src` (n,) indexes ascending `src_addresses` (S, 16)."""
    probes, probe_index = np.unique(probe_id, return_inverse=True)
    unknown = probe_id < 0
    code = np.where(unknown, len(probes) + src, probe_index)
    used, index = np.unique(code, return_inverse=True)
    by_address = used >= len(probes)
    keys = np.zeros((len(used), KEY_BYTES), dtype=np.uint8)
    keys[~by_address, -8:] = int64_bytes(probes[used[~by_address]])
    keys[by_address] = address_keys(src_addresses[used[by_address] - len(probes)])
    return Groups(index, keys)


def address_keys(addresses: np.ndarray) -> np.ndarray:
    """(n, 16) addresses to (n, 17) keys."""
    return np.concatenate([np.ones((len(addresses), 1), dtype=np.uint8), addresses], axis=1)


def collect_sources(keys: np.ndarray, addresses: np.ndarray, rule: SplitRule) -> Sources:
    """(n, 17) groups beside the (n, 16) source addresses that they used, in any order and with repeats, by address."""
    _, group_at, group = np.unique(as_text(keys), return_index=True, return_inverse=True)
    _, address_at, address = np.unique(as_text(addresses), return_index=True, return_inverse=True)
    band = np.zeros(len(address_at), dtype=np.uint8)
    np.maximum.at(band, address, rule.group_bands(keys))
    owner = _least_joined(group, address, len(group_at), len(address_at))
    return Sources(addresses[address_at], keys[group_at[owner]], band)


def assign_parts(
    groups: Groups,
    time_s: np.ndarray,
    src: np.ndarray,
    src_addresses: np.ndarray,
    dst: np.ndarray,
    dst_addresses: np.ndarray,
    sources: Sources,
    rule: SplitRule,
    cut: TimeCut,
) -> np.ndarray:
    """The part of each of n measurements as an index into PARTS, or DROPPED: (n,) uint8.

    `src` and `dst` are (n,) indices into addresses. `sources` and `cut` are of the whole dump.
    """
    group = rule.group_bands(groups.keys)[groups.index]
    src_prefix, src_group = rule.prefix_bands(src_addresses)[src], _source_bands(src_addresses, sources)[src]
    dst_prefix, dst_group = rule.prefix_bands(dst_addresses), _source_bands(dst_addresses, sources)
    destination = np.maximum(dst_prefix, dst_group)[dst]
    one, other = (rule.endpoint_hashes(_owners(addresses, sources)) for addresses in (src_addresses, dst_addresses))
    pair = rule.pair_bands(one[src], other[dst])

    endpoints = np.maximum(group, destination)
    number = np.select([(group > 0) & (destination > 0), destination > 0, group > 0, pair > 0], (5, 4, 3, 2), 1)
    band = np.select([endpoints > 0, pair > 0], [endpoints, pair], cut.bands(time_s))
    part = np.where(band == TRAIN, 0, 1 + 5 * (band.astype(np.int64) - 1) + number - 1).astype(np.uint8)
    shown_as_source = (src_group != group) | (src_prefix > 0) & (src_prefix != group)
    part[shown_as_source | _differ(dst_prefix, dst_group)[dst] | _differ(group, destination)] = DROPPED
    return part


def _least_joined(group: np.ndarray, address: np.ndarray, groups: int, addresses: int) -> np.ndarray:
    """(A,) the least index of the groups that n (group, address) edges join, directly or not, to each address."""
    least = np.arange(groups)
    while True:
        of_address = np.full(addresses, groups)
        np.minimum.at(of_address, address, least[group])
        joined = least.copy()
        np.minimum.at(joined, group, of_address[address])
        joined = joined[joined]  # a long chain of groups takes the logarithm of its length
        if np.array_equal(joined, least):
            return of_address
        least = joined


def _owners(addresses: np.ndarray, sources: Sources) -> np.ndarray:
    """(n, 17) keys of the endpoints behind (n, 16) addresses: the group that owns an address, else the address itself."""
    return _find(addresses, sources, sources.owner, address_keys(addresses))


def _differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """True where one band is val and the other test."""
    return (one > 0) & (other > 0) & (one != other)


def _source_bands(addresses: np.ndarray, sources: Sources) -> np.ndarray:
    """The bands of the groups that used (n, 16) addresses as sources, (n,); TRAIN where none did."""
    return _find(addresses, sources, sources.band, np.zeros(len(addresses), dtype=np.uint8))


def _find(addresses: np.ndarray, sources: Sources, values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """For each of (n, 16) addresses the value of that source, or its `missing` value if it is no source."""
    if not len(sources.addresses):
        return missing
    known, wanted = as_text(sources.addresses), as_text(addresses)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    found = (known[at] == wanted).reshape(-1, *[1] * (values.ndim - 1))
    return np.where(found, values[at], missing)
