"""The draws of a split are salted hashes, the same on every machine, and the manifest says how to repeat them."""

import json
import zlib
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_splits import addresses

from ping_llm.data import hashing
from ping_llm.data.ingest.splits import TEST, TRAIN, VAL, SplitRule, TimeCut, address_keys


@given(data=st.binary(min_size=24, max_size=24), salt=st.binary(max_size=20))
def test_crc32_is_that_of_zlib(data, salt):
    keys = np.frombuffer(data, dtype=np.uint8).reshape(3, 8)
    assert hashing.crc32(keys, salt).tolist() == [zlib.crc32(salt + key.tobytes()) for key in keys]


def test_hashes_do_not_change_between_machines_and_versions():
    keys = hashing.int64_bytes(np.array([0, 1, 1_700_000_000]), np.array([-1, 5, 7]))
    assert keys[2].tobytes() == (1_700_000_000).to_bytes(8, "big") + (7).to_bytes(8, "big")
    assert hashing.mix(np.array([0, 1, 0xDEADBEEF], dtype=np.uint32)).tolist() == [0, 0x514E28B7, 0x0DE5C6A9]


def test_mixed_hashes_of_neighbouring_keys_are_even_and_independent():
    hashes = hashing.hash_keys(hashing.int64_bytes(np.arange(60_000)), b"salt")
    draws = hashing.hash_below(hashes, 6)
    counts = np.bincount(draws[1:] * 6 + draws[:-1], minlength=36)
    assert ((counts - 60_000 / 36) ** 2 / (60_000 / 36)).sum() < 66.6  # chi², 35 degrees of freedom, p = 0.001
    assert abs((hashing.hash_below(hashes, 100) < 5).mean() - 0.05) < 0.003


def fmix32(h):
    """murmur3's finaliser, as its reference has it."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_bands_can_be_drawn_again_from_what_the_manifest_says():
    """Of a rule with a number of its own in every place: by zlib, murmur3 and the words of its entry "hash"."""
    rule = SplitRule("pepper", (7, 11), (13, 17), (19, 23), (29, 31))
    told = json.loads(json.dumps(rule.describe()))
    assert told["name"] == "pingbench" and told["version"] == 2  # of the rule; another one could not read this
    assert told["hash"] == "murmur3 finaliser of crc32(salt/field/ + key)"
    assert rule.time_cut(dict.fromkeys(range(100), 1)) == TimeCut(
        *(60 * (100 - sum(told["time_percent"][i:])) for i in range(2))
    )

    def band(hash_32, percent):
        share = hash_32 * 100 // 2**32
        return TEST if share < percent[1] else VAL if share >= 100 - percent[0] else TRAIN

    def crc(field, key):
        return zlib.crc32(f"{told['salt']}/{field}/".encode() + bytes(key))

    keys = address_keys(addresses(*(f"192.0.{i}.1" for i in range(200))))
    assert rule.group_bands(keys).tolist() == [band(fmix32(crc("group", key)), told["group_percent"]) for key in keys]
    prefixes = keys[:, 1:].copy()
    prefixes[:, -1] = 0
    expected = [band(fmix32(crc("prefix", prefix)), told["prefix_percent"]) for prefix in prefixes]
    assert rule.prefix_bands(keys[:, 1:]).tolist() == expected
    ends = [fmix32(crc("pair", key)) for key in keys]
    expected = [band(fmix32((a + b) % 2**32), told["pair_percent"]) for a, b in pairwise(ends)]
    hashes = rule.endpoint_hashes(keys)
    assert rule.pair_bands(hashes[:-1], hashes[1:]).tolist() == expected
