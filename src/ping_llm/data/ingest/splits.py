"""Measurements in, the part of each out: train, val, or one of five test sets that differ in what was seen in training.

    test-s3  new source         5 % of groups (a probe, or a source address where the probe is unknown), held out whole
    test-s4  new destination    5 % of destination /24s (IPv4) or /48s (IPv6)
    test-s5  both new
    test-s2  new pair           10 % of the pairs of a group and a destination of the rest, with the reverse direction
    test-s1  pair, future       of the rest, the last 15 % of each group's time span
    val                         the 10 % before that; all earlier is train

Every choice but that of time is a salted hash of a stable key, never a position: it does not depend on the order of a
dump. A source address that a held-out group used too would leak what the group's rows look like, so its measurements in
other groups are excluded. A held-out source may still be a destination in train.

A destination that is also a source stands for its group, so that a pair has two directions. Groups that shared a source
address count as one endpoint of a pair, and so do groups joined by several such addresses.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from ping_llm.data.hashing import crc32, hash_keys, hash_selects, int64_bytes, mix
from ping_llm.data.measurement import ADDRESS_BYTES, is_ipv4

PARTS = ("train", "val", "test-s1", "test-s2", "test-s3", "test-s4", "test-s5")
DROPPED = len(PARTS)
"""What stands for a part where a measurement is dropped because its source address occurs in a held-out group."""

KEY_BYTES = 1 + ADDRESS_BYTES
"""Of the key of an endpoint: 0 and the probe as 16 bytes, or 1 and an address; so probes sort before addresses."""


@dataclass(frozen=True)
class SplitRule:
    """What decides the part of a measurement; shares in percent."""

    salt: str = "pingbench"
    group_percent: int = 5
    prefix_percent: int = 5
    pair_percent: int = 10
    future_percent: int = 15
    val_percent: int = 10

    def describe(self) -> dict[str, str | int]:
        """The rule as the manifest holds it."""
        return {"name": "pingbench", **asdict(self), "hash": "murmur3 finaliser of crc32(salt/field/ + key)"}

    def hashes(self, field: str, keys: np.ndarray) -> np.ndarray:
        """(n, k) uint8 keys to (n,) uint32, salted with the rule's salt and what the key is."""
        return hash_keys(keys, f"{self.salt}/{field}/".encode())

    def holds_out_group(self, keys: np.ndarray) -> np.ndarray:
        """True for the (n, 17) keys of groups that are held out."""
        return hash_selects(self.hashes("group", keys), self.group_percent)

    def holds_out_prefix(self, addresses: np.ndarray) -> np.ndarray:
        """True for (n, 16) destinations whose /24 or /48 is held out."""
        kept = np.where(is_ipv4(addresses)[:, None], 15, 6)  # bytes; a.b.c.0 is the IPv4-mapped form cut after byte 15
        prefixes = np.where(np.arange(ADDRESS_BYTES) < kept, addresses, 0).astype(np.uint8)
        return hash_selects(self.hashes("prefix", prefixes), self.prefix_percent)

    def endpoint_hashes(self, keys: np.ndarray) -> np.ndarray:
        """(n, 17) keys of endpoints to (n,) uint32, for `holds_out_pair`."""
        return crc32(keys, f"{self.salt}/pair/".encode())

    def holds_out_pair(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """True where a pair of endpoints, by `endpoint_hashes`, is held out; the sum makes both directions one pair."""
        return hash_selects(mix(mix(one) + mix(other)), self.pair_percent)


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
    held_out: np.ndarray  # (A,) bool: one of those groups is held out


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
    held_out = np.zeros(len(address_at), dtype=bool)
    held_out[address[rule.holds_out_group(keys)]] = True
    owner = _least_joined(group, address, len(group_at), len(address_at))
    return Sources(addresses[address_at], keys[group_at[owner]], held_out)


def assign_parts(
    groups: Groups,
    time_s: np.ndarray,
    src: np.ndarray,
    src_addresses: np.ndarray,
    dst: np.ndarray,
    dst_addresses: np.ndarray,
    sources: Sources,
    rule: SplitRule,
) -> np.ndarray:
    """The part of each of n measurements as an index into PARTS, or DROPPED: (n,) uint8.

    All measurements of a group must be given at once, for its time span. `src` and `dst` are (n,) indices into addresses.
    """
    new_source = rule.holds_out_group(groups.keys)[groups.index]
    new_destination = rule.holds_out_prefix(dst_addresses)[dst]
    src_hash, dst_hash = (
        rule.endpoint_hashes(_owners(addresses, sources)) for addresses in (src_addresses, dst_addresses)
    )
    new_pair = rule.holds_out_pair(src_hash[src], dst_hash[dst])
    leaking = _find(src_addresses, sources, sources.held_out, np.zeros(len(src_addresses), dtype=bool))
    excluded = leaking[src] & ~new_source

    part = np.full(len(time_s), PARTS.index("train"), dtype=np.uint8)
    rest = ~(new_source | new_destination | new_pair | excluded)
    val, future = _last_of_span(groups, time_s, rest, rule)
    part[val] = PARTS.index("val")
    part[future] = PARTS.index("test-s1")
    part[new_pair] = PARTS.index("test-s2")
    part[new_source] = PARTS.index("test-s3")
    part[new_destination] = PARTS.index("test-s4")
    part[new_source & new_destination] = PARTS.index("test-s5")
    part[excluded] = DROPPED
    return part


def as_text(rows: np.ndarray) -> np.ndarray:
    """(n, k) uint8 as (n,) of k-byte strings, which NumPy sorts and searches byte by byte."""
    return np.ascontiguousarray(rows).view(f"S{rows.shape[1]}").reshape(-1)


def _last_of_span(
    groups: Groups, time_s: np.ndarray, rest: np.ndarray, rule: SplitRule
) -> tuple[np.ndarray, np.ndarray]:
    """Two (n,) bool: in the validation stretch, in the last stretch, of the span of the group's measurements in `rest`."""
    first = np.full(len(groups.keys), np.iinfo(np.int64).max)
    last = np.full(len(groups.keys), np.iinfo(np.int64).min)
    np.minimum.at(first, groups.index[rest], time_s[rest])
    np.maximum.at(last, groups.index[rest], time_s[rest])
    elapsed = 100 * np.where(rest, time_s - first[groups.index], 0)
    span = np.where(rest, last[groups.index] - first[groups.index], 0)
    future = elapsed > (100 - rule.future_percent) * span
    past_train = elapsed > (100 - rule.future_percent - rule.val_percent) * span
    return past_train & ~future, future


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


def _find(addresses: np.ndarray, sources: Sources, values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """For each of (n, 16) addresses the value of that source, or its `missing` value if it is no source."""
    if not len(sources.addresses):
        return missing
    known, wanted = as_text(sources.addresses), as_text(addresses)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    found = (known[at] == wanted).reshape(-1, *[1] * (values.ndim - 1))
    return np.where(found, values[at], missing)
