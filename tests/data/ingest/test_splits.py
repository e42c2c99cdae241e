import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pings import ndjson, ping, write

from ping_llm.data import hashing
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.ingest.splits import (
    DROPPED,
    KEY_BYTES,
    PARTS,
    SplitRule,
    address_keys,
    assign_parts,
    collect_sources,
    group_measurements,
)
from ping_llm.data.measurement import pack_address
from ping_llm.data.rows import RowReader

RULE = SplitRule()
TRAIN, VAL, S1, S2, S3, S4, S5 = range(len(PARTS))


def addresses(*texts):
    return np.frombuffer(b"".join(map(pack_address, texts)), dtype=np.uint8).reshape(-1, 16)


def split(probe_id, time_s, src, dst, rule=RULE):
    """(n,) probes, times, source and destination texts to (n,) parts, with the sources of just these."""
    probe_id, time_s = np.asarray(probe_id), np.asarray(time_s)
    src_unique, src_code = np.unique(src, return_inverse=True)
    dst_unique, dst_code = np.unique(dst, return_inverse=True)
    src_addresses, dst_addresses = addresses(*src_unique), addresses(*dst_unique)
    order = np.argsort(np.ascontiguousarray(src_addresses).view("S16").ravel())
    rank = np.argsort(order)
    src_addresses, src_code = src_addresses[order], rank[src_code]
    groups = group_measurements(probe_id, src_code, src_addresses)
    sources = collect_sources(groups.keys[groups.index], src_addresses[src_code], rule)
    return assign_parts(groups, time_s, src_code, src_addresses, dst_code, dst_addresses, sources, rule)


@pytest.fixture(scope="module")
def mesh():
    """300 probes that ping 60 hosts and each other at 40 random times: columns and parts."""
    rng = np.random.default_rng(0)
    probes = np.repeat(np.arange(300), 400)
    own = np.array([f"192.0.2.{i % 200}" if i < 200 else f"2001:db8:{i:x}::1" for i in range(300)])
    hosts = np.array([f"198.{i}.100.7" for i in range(40)] + [f"2001:db8:aa{i}::7" for i in range(20)])
    target = rng.integers(360, size=len(probes))
    dst = np.concatenate([own, hosts])[target]
    time_s = rng.integers(1_600_000_000, 1_700_000_000, size=len(probes))
    return probes, time_s, own[probes], dst, split(probes, time_s, own[probes], dst)


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
    assert abs(hashing.hash_selects(hashes, 5).mean() - 0.05) < 0.003


def test_groups_are_probes_and_source_addresses_where_the_probe_is_unknown():
    src_addresses = addresses("192.0.2.1", "192.0.2.2")
    groups = group_measurements(np.array([9, -1, 3, -1, 9, -1]), np.array([0, 1, 0, 0, 1, 1]), src_addresses)
    assert groups.index.tolist() == [1, 3, 0, 2, 1, 3]
    assert groups.keys.shape == (4, KEY_BYTES)
    assert groups.keys[1].tobytes() == bytes(16) + b"\x09"
    assert groups.keys[2].tobytes() == b"\x01" + src_addresses[0].tobytes()
    assert np.array_equal(np.unique(groups.keys, axis=0), groups.keys)


def test_shares_are_those_of_the_rule(mesh):
    *_, part = mesh
    share = np.bincount(part, minlength=DROPPED + 1) / len(part)
    groups, prefixes, pairs = 0.05, 0.05, 0.10
    rest = (1 - groups) * (1 - prefixes)
    want = [rest * (1 - pairs) * s for s in (0.75, 0.10, 0.15)] + [rest * pairs]
    assert np.abs(share[:4] - want).max() < 0.05
    assert 0.02 < share[S3] < 0.09
    assert 0.005 < share[S4] < 0.11
    assert share[DROPPED] == 0


def test_a_held_out_group_is_held_out_whole(mesh):
    probes, _, _, _, part = mesh
    held = np.isin(part, (S3, S5))
    assert held.any()
    assert not np.isin(probes[~held], probes[held]).any()


def test_a_held_out_prefix_is_in_no_other_part(mesh):
    _, _, _, dst, part = mesh
    prefix = np.array([text.rpartition(".")[0] if "." in text else text.rpartition("::")[0] for text in dst])
    held = np.isin(part, (S4, S5))
    assert held.any()
    assert not np.isin(prefix[~held], prefix[held]).any()


def test_what_is_new_at_both_ends_is_a_part_of_its_own(mesh):
    probes, _, _, dst, part = mesh
    new_source, new_destination = np.isin(probes, probes[part == S3]), np.isin(dst, dst[part == S4])
    assert np.array_equal(part == S5, new_source & new_destination)
    assert np.array_equal(part == S3, new_source & ~new_destination)
    assert np.array_equal(part == S4, new_destination & ~new_source)
    assert (part == S5).any()


@pytest.mark.parametrize(("one", "same", "other"), [("198.{}.100.7", "198.{}.100.250", "198.{}.101.7")])
def test_destinations_are_held_out_by_24_and_48(one, same, other):
    def held(*texts):
        return RULE.holds_out_prefix(addresses(*texts))

    v4 = [held(*(form.format(i) for i in range(250))) for form in (one, same, other)]
    v6 = [
        held(*(form.format(i) for i in range(1, 250)))
        for form in ("2001:db8:{:x}::7", "2001:db8:{:x}:ff::9", "2001:db9:{:x}::7")
    ]
    for first, second, third in (v4, v6):
        assert first.any()
        assert np.array_equal(first, second)
        assert not np.array_equal(first, third)


def test_a_new_pair_is_unseen_in_both_directions(mesh):
    probes, _, src, dst, part = mesh
    probe_of = dict(zip(src, probes, strict=True))
    ends = [frozenset([probe, probe_of.get(d, d)]) for probe, d in zip(probes.tolist(), dst.tolist(), strict=True)]
    held = {pair for pair, p in zip(ends, part, strict=True) if p == S2}
    rest = {pair for pair, p in zip(ends, part, strict=True) if p in (TRAIN, VAL, S1)}
    assert any(all(isinstance(end, int) for end in pair) for pair in held)  # pairs of two probes are among them
    assert not held & rest


@pytest.mark.parametrize("seed", range(5))
def test_a_new_pair_is_unseen_where_groups_share_addresses(seed):
    """80 groups, some of them unknown probes, with up to three of 60 addresses each, that ping each other."""
    rng = np.random.default_rng(seed)
    own = np.array([f"192.{i}.2.1" for i in range(60)])
    used = np.minimum(np.arange(80)[:, None] * 3 // 4 + rng.integers(0, 3, (80, 3)) * rng.integers(0, 20, (80, 1)), 59)
    group = rng.integers(80, size=20_000)
    src = own[used[group, rng.integers(3, size=len(group))]]
    dst = own[rng.integers(60, size=len(group))]
    probes = np.where(group % 5, group, -1)
    end = [src[i] if probes[i] < 0 else int(probes[i]) for i in range(len(probes))]
    rule = replace(RULE, group_percent=0, prefix_percent=0)
    part = split(probes, np.ones(len(probes), dtype=int), src, dst, rule)
    users = {}
    for group_of, address in zip(end, src, strict=True):
        users.setdefault(address, set()).add(group_of)

    def directed(wanted):
        """(group, source address, destination address) of the parts wanted."""
        return {(end[i], src[i], dst[i]) for i in np.flatnonzero(np.isin(part, wanted))}

    held, rest = directed([S2]), directed([TRAIN, VAL, S1])
    assert held and rest
    assert not {(g, d) for g, _, d in held} & {(g, d) for g, _, d in rest}
    assert not {(s, d) for _, s, d in held} & {(d, s) for _, s, d in rest}
    between = {frozenset([g, other]) for g, _, d in rest for other in users.get(d, ())}
    assert not {frozenset([g, other]) for g, _, d in held for other in users.get(d, ())} & between


def test_new_pairs_are_no_blocks_of_sources_and_destinations():
    sources = hashing.int64_bytes(np.zeros(200), np.zeros(200), np.arange(200))[:, -KEY_BYTES:]
    hosts = address_keys(addresses(*(f"198.51.100.{i}" for i in range(200))))
    held = RULE.holds_out_pair(RULE.endpoint_hashes(sources)[:, None], RULE.endpoint_hashes(hosts)[None])
    assert abs(held.mean() - 0.10) < 0.01
    shared = (held.astype(float) @ held.T)[np.triu_indices(200, 1)]  # destinations that two sources both lose: about 2
    assert shared.max() <= 12


def test_train_is_before_val_is_before_the_future_of_each_group(mesh):
    probes, time_s, _, _, part = mesh
    for probe in np.unique(probes[part == TRAIN]):
        train, val, future = (time_s[(probes == probe) & (part == p)] for p in (TRAIN, VAL, S1))
        span = max(train.max(), val.max(), future.max()) - train.min()
        assert train.max() < val.min()
        assert val.max() < future.min()
        assert future.min() - train.min() > 0.85 * span >= val.max() - train.min()
        assert val.min() - train.min() > 0.75 * span >= train.max() - train.min()


def test_a_group_of_one_moment_is_train():
    rule = replace(RULE, group_percent=0, prefix_percent=0, pair_percent=0)
    part = split([5] * 4, [1_700_000_000] * 4, ["192.0.2.1"] * 4, ["198.51.100.7"] * 4, rule)
    assert part.tolist() == [TRAIN] * 4


def held_out_probe(held):
    keys = np.zeros((1000, KEY_BYTES), dtype=np.uint8)
    keys[:, -8:] = hashing.int64_bytes(np.arange(1000))
    return int(np.flatnonzero(RULE.holds_out_group(keys) == held)[0])


def test_a_source_address_of_a_held_out_group_is_dropped_elsewhere():
    held, free, shared, own = held_out_probe(True), held_out_probe(False), "192.0.2.1", "192.0.2.2"
    rule = replace(RULE, pair_percent=0, prefix_percent=0)
    part = split([held, held, free, free], [1, 1, 1, 1], [shared, own, shared, "192.0.2.3"], ["198.51.100.7"] * 4, rule)
    assert part.tolist() == [S3, S3, DROPPED, TRAIN]
    everything = replace(rule, prefix_percent=100)  # also where the row would be of a test part
    part = split([held, free, free], [1, 1, 1], [shared, shared, "192.0.2.3"], ["198.51.100.7"] * 3, everything)
    assert part.tolist() == [S5, DROPPED, S4]


def test_what_is_dropped_does_not_stretch_the_span_of_a_group():
    held, free, rule = held_out_probe(True), held_out_probe(False), replace(RULE, pair_percent=0, prefix_percent=0)
    src = ["192.0.2.1", "192.0.2.1", *["192.0.2.2"] * 10]
    part = split([held, *[free] * 11], [1, 10_000, *range(10)], src, ["198.51.100.7"] * 12, rule)
    assert part.tolist() == [S3, DROPPED, *[TRAIN] * 7, VAL, S1, S1]


def test_a_held_out_source_may_be_a_destination_in_train():
    held, free = held_out_probe(True), held_out_probe(False)
    rule = replace(RULE, pair_percent=0, prefix_percent=0)
    assert split([held, free], [1, 1], ["192.0.2.1", "192.0.2.2"], ["192.0.2.2", "192.0.2.1"], rule).tolist() == [
        S3,
        TRAIN,
    ]


def test_the_split_does_not_depend_on_order_nor_on_other_groups(mesh):
    probes, time_s, src, dst, part = mesh
    shuffled = np.random.default_rng(1).permutation(len(part))
    assert np.array_equal(split(*(column[shuffled] for column in (probes, time_s, src, dst))), part[shuffled])
    some = (probes < 100) & ~np.isin(dst, src[probes >= 100])
    alone = split(*(column[some] for column in (probes, time_s, src, dst)))
    choice = ~np.isin(part[some], (TRAIN, VAL, S1))  # time is relative to the span, which has changed
    assert np.array_equal(alone[choice], part[some][choice])


def test_an_address_belongs_to_the_least_key_of_the_groups_that_it_joins():
    keys = np.zeros((3, KEY_BYTES), dtype=np.uint8)
    keys[:, -1] = [9, 4, 7]
    sources = collect_sources(keys, addresses("192.0.2.1", "192.0.2.1", "192.0.2.0"), RULE)
    assert sources.addresses.tolist() == addresses("192.0.2.0", "192.0.2.1").tolist()
    assert sources.owner[:, -1].tolist() == [7, 4]


@given(st.permutations(range(40)))
def test_a_chain_of_shared_addresses_makes_one_owner(order):
    """Each group shares an address with the next one in a random order; those below 20 and the others are two chains."""
    chains = [[i for i in order if (i < 20) == low] for low in (True, False)]
    links = [link for chain in chains for link in pairwise(chain)]
    keys = np.zeros((2 * len(links), KEY_BYTES), dtype=np.uint8)
    keys[:, -1] = [group for link in links for group in link]
    shared = addresses(*(f"192.0.{i}.1" for i in range(len(links)) for _ in range(2)))
    sources = collect_sources(keys, shared, RULE)
    assert set(sources.owner[:, -1].tolist()) == {0, 20}


def test_no_sources_are_no_error():
    sources = collect_sources(np.zeros((0, KEY_BYTES), dtype=np.uint8), np.zeros((0, 16), dtype=np.uint8), RULE)
    assert sources.addresses.shape == (0, 16) and sources.owner.shape == (0, KEY_BYTES)


def test_the_parts_of_a_prepared_folder_keep_apart_what_the_rule_keeps_apart(tmp_path):
    """60 probes that ping each other, every fourth through the address of another; in four buckets."""
    rng = np.random.default_rng(0)
    address = [f"192.{i}.2.1" for i in range(60)]
    lines = [
        ping(
            prb_id=probe,
            msm_id=target,
            timestamp=1_700_000_000 + int(rng.integers(100_000)),
            src_addr=address[probe - (probe % 4 == 0 and i % 2)],
            dst_addr=address[target],
        )
        for i in range(2)
        for probe in range(60)
        for target in range(60)
    ]
    dumps = [write(tmp_path / f"{i}.json", ndjson(*lines[i::3])) for i in range(3)]
    parts = prepare(dumps, tmp_path / "rows", workers=1)["parts"]
    table = {
        part: pa.concat_tables([row.to_measurements() for row in RowReader(tmp_path / "rows", part)])
        for part in PARTS
        if parts[part]
    }
    directed = {
        part: {(src, dst) for src, dst in zip(rows["src"].to_pylist(), rows["dst"].to_pylist(), strict=True)}
        for part, rows in table.items()
    }
    seen = set().union(*(directed[part] for part in ("train", "val", "test-s1")))
    assert directed["test-s2"]
    assert not directed["test-s2"] & seen
    assert not {(dst, src) for src, dst in directed["test-s2"]} & seen
    assert not {dst for part in ("test-s4", "test-s5") for _, dst in directed[part]} & {dst for _, dst in seen}
    probes = {part: set(rows["probe_id"].to_pylist()) for part, rows in table.items()}
    assert not (probes["test-s3"] | probes["test-s5"]) & (probes["train"] | probes["val"] | probes["test-s4"])
    everything = pa.concat_tables(table.values())
    assert everything.group_by(["probe_id", "msm_id", "time_s"]).aggregate([]).num_rows == len(everything)


def test_the_rule_in_the_manifest_has_every_number():
    assert RULE.describe() | {"hash": ""} == {
        "name": "pingbench",
        "salt": "pingbench",
        "group_percent": 5,
        "prefix_percent": 5,
        "pair_percent": 10,
        "future_percent": 15,
        "val_percent": 10,
        "hash": "",
    }
