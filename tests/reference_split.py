"""The rule of the splits once more, slowly: over single measurements, with dictionaries, from its description alone."""

from __future__ import annotations

import ipaddress
import zlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

from ping_llm.data.ingest.splits import SplitRule, TimeCut

Measurement = tuple[int, int, str, str]
"""Probe or −1, Unix seconds, source, destination."""


def reference_parts(measurements: Sequence[Measurement], rule: SplitRule, cut: TimeCut) -> list[str]:
    """The part of each, or "dropped"."""
    users = defaultdict(set)
    for probe, _, src, _ in measurements:
        users[src].add(group_key(probe, src))
    owner = {key: min(joined) for joined in _components(users.values()) for key in joined}

    @cache
    def group_band(key: bytes) -> str:
        return _band(_hash(rule, "group", key), rule.group_percent)

    @cache
    def held_by(address: str) -> set[str]:
        """The bands that hold out an address: that of its prefix, and the last one of the groups that used it."""
        used = max(
            (group_band(key) for key in users.get(address, ())), key=["train", "val", "test"].index, default="train"
        )
        prefix = prefix_of(address).network_address.packed
        prefix = packed(str(ipaddress.ip_address(prefix)))
        return {used, _band(_hash(rule, "prefix", prefix), rule.prefix_percent)} - {"train"}

    @cache
    def endpoint(address: str) -> int:
        """The hash of the endpoint of a pair that an address stands for."""
        joined = users.get(address)
        return _crc(rule, "pair", owner[next(iter(joined))] if joined else b"\1" + packed(address))

    parts = []
    for probe, time_s, src, dst in measurements:
        source = {group_band(group_key(probe, src))} - {"train"}
        destination = held_by(dst)
        if held_by(src) - source or len(source | destination) > 1:
            parts.append("dropped")
        elif source or destination:
            (band,) = source | destination
            parts.append(band + ("-s5" if source and destination else "-s3" if source else "-s4"))
        else:
            both = _mixed(endpoint(src)) + _mixed(endpoint(dst))
            band = _band(_mixed(both & 0xFFFFFFFF), rule.pair_percent)
            if band == "train":
                late = "test-s1" if time_s >= cut.test_from_s else "val-s1"
                parts.append("train" if time_s < cut.val_from_s else late)
            else:
                parts.append(f"{band}-s2")
    return parts


def group_key(probe: int, src: str) -> bytes:
    return b"\0" + probe.to_bytes(16, "big") if probe >= 0 else b"\1" + packed(src)


@cache
def packed(address: str) -> bytes:
    raw = ipaddress.ip_address(address).packed
    return raw if len(raw) == 16 else bytes(10) + b"\xff\xff" + raw


@cache
def prefix_of(address: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network((address, 48 if ":" in address else 24), strict=False)


def _components(sets) -> list[set]:
    """Sets that share an element, joined until none do."""
    joined: list[set] = []
    for new in map(set, sets):
        overlapping = [old for old in joined if old & new]
        joined = [old for old in joined if not old & new] + [new.union(*overlapping)]
    return joined


def _band(hashed: int, percent: tuple[int, int]) -> str:
    drawn = hashed * 100 // 2**32
    return "test" if drawn < percent[1] else "val" if drawn >= 100 - percent[0] else "train"


def _crc(rule: SplitRule, field: str, key: bytes) -> int:
    return zlib.crc32(f"{rule.salt}/{field}/".encode() + key)


def _hash(rule: SplitRule, field: str, key: bytes) -> int:
    return _mixed(_crc(rule, field, key))


def _mixed(h: int) -> int:
    """The finaliser of MurmurHash3."""
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16
