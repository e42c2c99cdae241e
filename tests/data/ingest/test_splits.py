"""The parts keep apart what they are to keep apart, on meshes of probes that all ping each other through odd addresses."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_split import group_key, prefix_of, reference_parts

from ping_llm.data import hashing
from ping_llm.data.ingest.splits import (
    KEY_BYTES,
    PARTS,
    TEST,
    TRAIN,
    VAL,
    SplitRule,
    TimeCut,
    address_keys,
    assign_parts,
    collect_sources,
    count_times,
    group_measurements,
)
from ping_llm.data.measurement import pack_address

RULE = SplitRule()
CUT = TimeCut(1_600_000_700, 1_600_000_850)
NAMES = np.array([*PARTS, "dropped"])
SEEN = ("train", "val-s1", "test-s1")
BANDS = {"val": VAL, "test": TEST}


def addresses(*texts):
    return np.frombuffer(b"".join(map(pack_address, texts)), dtype=np.uint8).reshape(-1, 16)


def split(probe_id, time_s, src, dst, rule=RULE, cut=CUT):
    """(n,) probes, times, source and destination texts to the names of (n,) parts, with the sources of just these."""
    probe_id, time_s = np.asarray(probe_id), np.asarray(time_s)
    src_unique, src_code = np.unique(src, return_inverse=True)
    dst_unique, dst_code = np.unique(dst, return_inverse=True)
    src_addresses, dst_addresses = addresses(*src_unique), addresses(*dst_unique)
    order = np.argsort(np.ascontiguousarray(src_addresses).view("S16").ravel())
    rank = np.argsort(order)
    src_addresses, src_code = src_addresses[order], rank[src_code]
    groups = group_measurements(probe_id, src_code, src_addresses)
    sources = collect_sources(groups.keys[groups.index], src_addresses[src_code], rule)
    return NAMES[assign_parts(groups, time_s, src_code, src_addresses, dst_code, dst_addresses, sources, rule, cut)]


def full_mesh(seed, probes=60):
    """Every probe pings every address of all of them, and 40 hosts besides, twice from each of its own addresses.

    Two neighbours share a /24 or a /48, every fourth has a second address, every ninth uses that of the next one too, and
    of every seventh the probe is unknown. Columns: probe, time, source, destination.
    """
    rng = np.random.default_rng(seed)
    first = [f"192.{i // 2}.2.{i % 2}" if i % 3 else f"2001:db8:{i // 2:x}::{i % 2 + 1}" for i in range(probes)]
    own = [[address] for address in first]
    for i in range(probes):
        own[i] += [f"193.{i}.2.1"] * (i % 4 == 0) + [first[(i + 1) % probes]] * (i % 9 == 0)
    hosts = [f"198.{i // 2}.100.{i % 2}" for i in range(30)] + [f"2001:db8:aa{i // 2}::{i % 2 + 1}" for i in range(10)]
    targets = sorted({address for some in own for address in some}) + hosts
    rows = [
        (i if i % 7 else -1, src, dst)
        for i in range(probes)
        for src, dst, _ in product(own[i], targets, range(2))
        if src != dst
    ]
    probe, src, dst = (np.array(column) for column in zip(*rows, strict=True))
    return probe, rng.integers(1_600_000_000, 1_600_001_000, len(rows)), src, dst


@pytest.fixture(scope="module", params=range(4))
def mesh(request):
    """A mesh, the rule that splits it, with other hashes each time and more held out than by default, and its parts."""
    rule = SplitRule(f"salt {request.param}", group_percent=(8, 10), prefix_percent=(6, 8))
    columns = full_mesh(request.param)
    return rule, columns, split(*columns, rule)


def held_by_hash(rule, columns, band):
    """The groups that a band holds out, and the prefixes, by the hashes alone."""
    probe, _, src, dst = columns
    keys = {group_key(p, s): None for p, s in zip(probe.tolist(), src.tolist(), strict=True)}
    bands = rule.group_bands(np.array([list(key) for key in keys], dtype=np.uint8))
    hosts = np.unique(np.concatenate([src, dst])).tolist()
    held = rule.prefix_bands(addresses(*hosts)) == BANDS[band]
    groups = {key for key, its in zip(keys, bands, strict=True) if its == BANDS[band]}
    return groups, {prefix_of(host) for host, yes in zip(hosts, held, strict=True) if yes}


def test_groups_are_probes_and_source_addresses_where_the_probe_is_unknown():
    src_addresses = addresses("192.0.2.1", "192.0.2.2")
    groups = group_measurements(np.array([9, -1, 3, -1, 9, -1]), np.array([0, 1, 0, 0, 1, 1]), src_addresses)
    assert groups.index.tolist() == [1, 3, 0, 2, 1, 3]
    assert groups.keys.shape == (4, KEY_BYTES)
    assert groups.keys[1].tobytes() == bytes(16) + b"\x09"
    assert groups.keys[2].tobytes() == b"\x01" + src_addresses[0].tobytes()
    assert np.array_equal(np.unique(groups.keys, axis=0), groups.keys)


def test_shares_are_those_of_the_rule():
    numbers = np.arange(60_000)
    keys = hashing.int64_bytes(np.zeros_like(numbers), np.zeros_like(numbers), numbers)[:, -KEY_BYTES:]
    prefixes = addresses(*(f"{20 + i // 200}.{i % 200}.7.1" for i in range(20_000)))
    one = RULE.endpoint_hashes(keys)
    for bands, percent in (
        (RULE.group_bands(keys), (3, 5)),
        (RULE.prefix_bands(prefixes), (3, 5)),
        (RULE.pair_bands(one[1:], one[:-1]), (4, 10)),
    ):
        share = np.bincount(bands, minlength=3) / len(bands)
        assert share == pytest.approx([1 - sum(percent) / 100, percent[0] / 100, percent[1] / 100], abs=0.005)


def test_a_larger_share_keeps_what_a_smaller_one_held():
    prefixes = addresses(*(f"{20 + i // 200}.{i % 200}.7.1" for i in range(2_000)))
    small, large = (replace(RULE, prefix_percent=percent).prefix_bands(prefixes) for percent in ((3, 5), (9, 20)))
    for band in (VAL, TEST):
        assert (large[small == band] == band).all() and (large == band).sum() > (small == band).sum() > 0


def test_every_part_is_that_of_a_slow_independent_split(mesh):
    rule, columns, part = mesh
    want = reference_parts(list(zip(*(column.tolist() for column in columns), strict=True)), rule, CUT)
    assert part.tolist() == want
    assert set(want) >= {"dropped", "train", "val-s1", "val-s2", "test-s1", "test-s2"}


@given(
    rows=st.lists(st.tuples(*(st.integers(0, most) for most in (8, 9, 11, 11))), min_size=1, max_size=60),
    salt=st.text("abcdef", min_size=1, max_size=3),
)
def test_small_odd_dumps_are_split_as_slowly(rows, salt):
    """Nine groups, of which one address each has no probe, and twelve addresses in six prefixes, used by whom it may be."""
    hosts = [f"192.{i // 2}.2.{i % 2}" if i < 8 else f"2001:db8:{i // 2}::{i % 2}" for i in range(12)]
    rows = [(probe or -1, CUT.val_from_s + 25 * (when - 4), hosts[src], hosts[dst]) for probe, when, src, dst in rows]
    rule = SplitRule(salt, (20, 25), (15, 15), (20, 20))
    assert split(*zip(*rows, strict=True), rule).tolist() == reference_parts(rows, rule, CUT)


@pytest.mark.parametrize("band", ["val", "test"])
def test_a_held_out_host_or_prefix_is_in_no_other_part_as_either_endpoint(mesh, band):
    rule, columns, part = mesh
    probe, _, src, dst = columns
    groups, prefixes = held_by_hash(rule, columns, band)
    keys = [group_key(p, s) for p, s in zip(probe.tolist(), src.tolist(), strict=True)]
    of_group = np.array([key in groups for key in keys])
    hosts = set(src[of_group].tolist())
    if band == "val":  # an address that groups of both bands used is of test
        of_test = held_by_hash(rule, columns, "test")[0]
        hosts -= set(src[np.array([key in of_test for key in keys])].tolist())
    used = np.unique(np.concatenate([src, dst]))
    used = used[[host in hosts or prefix_of(host) in prefixes for host in used.tolist()]]

    def held(column):
        return np.isin(column, used)

    elsewhere = ~np.isin(part, ["dropped", *(f"{band}-s{number}" for number in (3, 4, 5))])
    assert groups and prefixes
    assert not (elsewhere & (of_group | held(src) | held(dst))).any()
    new = {number: part == f"{band}-s{number}" for number in (3, 4, 5)}
    assert of_group[new[3] | new[5]].all() and not of_group[new[4]].any()
    assert held(dst)[new[4] | new[5]].all() and not held(dst)[new[3]].any()
    assert new[3].any() and new[4].any()


def test_endpoints_of_val_and_of_test_are_disjoint(mesh):
    _, (probe, _, src, dst), part = mesh
    new = {}
    for band in BANDS:
        sources, destinations = (np.isin(part, [f"{band}-s{n}" for n in numbers]) for numbers in ((3, 5), (4, 5)))
        new[band] = set(src[sources]) | set(dst[destinations]), set(probe[sources & (probe >= 0)])
        assert all(new[band])
    assert not new["val"][0] & new["test"][0]
    assert not new["val"][1] & new["test"][1]
    for band, other in (("val", "test"), ("test", "val")):
        of_other = np.char.startswith(part, other)
        assert not new[band][0] & (set(src[of_other]) | set(dst[of_other]))


def test_a_prefix_of_val_holds_no_endpoint_of_test(mesh):
    rule, columns, part = mesh
    _, _, src, dst = columns
    for band, other in (("val", "test"), ("test", "val")):
        of_other = np.char.startswith(part, other)
        used = {prefix_of(host) for host in {*src[of_other].tolist(), *dst[of_other].tolist()}}
        assert not held_by_hash(rule, columns, band)[1] & used


def test_the_reverse_of_a_new_pair_is_nowhere_seen(mesh):
    _, (_, _, src, dst), part = mesh
    directed = {name: set(zip(src[part == name], dst[part == name], strict=True)) for name in NAMES}
    seen = set().union(*(directed[name] for name in SEEN))
    everything = set().union(*(directed[name] for name in PARTS))
    for band, number in product(BANDS, (2, 3, 4, 5)):
        name = f"{band}-s{number}"
        reverse = {(d, s) for s, d in directed[name]}
        assert not (directed[name] | reverse) & seen
        assert reverse & everything or number == 5 or not directed[name]  # the mesh does have both directions
        other = "val" if band == "test" else "test"
        assert not (directed[name] | reverse) & set().union(*(directed[f"{other}-s{n}"] for n in range(1, 6)))


def test_later_parts_are_later_than_all_of_the_earlier_ones(mesh):
    _, (_, time_s, _, _), part = mesh
    train, val, test = (time_s[part == name] for name in SEEN)
    assert train.max() == CUT.val_from_s - 1 < CUT.val_from_s == val.min()
    assert val.max() == CUT.test_from_s - 1 < CUT.test_from_s == test.min()


def test_time_decides_nothing_of_what_is_held_out(mesh):
    rule, (probe, time_s, src, dst), part = mesh
    same = split(probe, np.full_like(time_s, CUT.val_from_s - 1), src, dst, rule)
    assert (same[np.isin(part, SEEN)] == "train").all()
    assert np.array_equal(same[~np.isin(part, SEEN)], part[~np.isin(part, SEEN)])


@pytest.mark.parametrize(("one", "same", "other"), [("198.{}.100.7", "198.{}.100.250", "198.{}.101.7")])
def test_destinations_are_held_out_by_24_and_48(one, same, other):
    def bands(*texts):
        return RULE.prefix_bands(addresses(*texts))

    v4 = [bands(*(form.format(i) for i in range(250))) for form in (one, same, other)]
    v6 = [
        bands(*(form.format(i) for i in range(1, 250)))
        for form in ("2001:db8:{:x}::7", "2001:db8:{:x}:ff00::9", "2001:db9:{:x}::7")
    ]
    for first, second, third in (v4, v6):
        assert set(first.tolist()) == {TRAIN, VAL, TEST}
        assert np.array_equal(first, second)
        assert not np.array_equal(first, third)


def test_the_quantile_cut_is_that_worked_out_by_hand():
    """20 measurements in minutes 100 to 104: 9, 5, 1, 2, 3. The 15th of them ends minute 102, and the 17th minute 103."""
    counts = dict(zip(range(100, 105), (9, 5, 1, 2, 3), strict=True))
    assert RULE.time_cut(counts) == TimeCut(103 * 60, 104 * 60)
    assert RULE.time_cut(dict(reversed(counts.items()))) == TimeCut(103 * 60, 104 * 60)
    assert RULE.time_cut(counts | {104: 4}) == TimeCut(104 * 60, 105 * 60)  # 15 of 21 are not 75 %, 17 of 21 not 85 %
    assert replace(RULE, time_percent=(50, 30)).time_cut(counts) == TimeCut(101 * 60, 101 * 60 + 60)


def test_times_are_counted_by_the_minute():
    assert count_times(np.array([120, 59, 60, 119, 0, 6_000])) == {0: 2, 1: 2, 2: 1, 100: 1}
    assert CUT.bands(np.array([0, 699, 700, 849, 850, 10**6]) + 1_600_000_000).tolist() == [0, 0, 1, 1, 2, 2]


def test_measurements_of_one_minute_are_train():
    rule = replace(RULE, group_percent=(0, 0), prefix_percent=(0, 0), pair_percent=(0, 0))
    time_s = np.full(4, 1_700_000_000)
    cut = rule.time_cut(count_times(time_s))
    assert split([5] * 4, time_s, ["192.0.2.1"] * 4, ["198.51.100.7"] * 4, rule, cut).tolist() == ["train"] * 4


def probe_of(band):
    keys = np.zeros((1000, KEY_BYTES), dtype=np.uint8)
    keys[:, -8:] = hashing.int64_bytes(np.arange(1000))
    return int(np.flatnonzero(RULE.group_bands(keys) == band)[0])


NO_PREFIX = replace(RULE, pair_percent=(0, 0), prefix_percent=(0, 0))
EARLY = CUT.val_from_s - 1


def test_a_source_address_of_a_held_out_group_is_dropped_elsewhere():
    val, test, free, shared = probe_of(VAL), probe_of(TEST), probe_of(TRAIN), "192.0.2.1"
    for held, name in ((val, "val-s3"), (test, "test-s3")):
        src = [shared, "192.0.2.2", shared, "192.0.2.3"]
        part = split([held, held, free, free], [EARLY] * 4, src, ["198.51.100.7"] * 4, NO_PREFIX)
        assert part.tolist() == [name, name, "dropped", "train"]
    part = split([val, test, val], [EARLY] * 3, [shared, shared, "192.0.2.2"], ["198.51.100.7"] * 3, NO_PREFIX)
    assert part.tolist() == ["dropped", "test-s3", "val-s3"]
    everything = replace(NO_PREFIX, prefix_percent=(0, 100))  # also where the row would be of a test part
    part = split([test, free], [EARLY] * 2, [shared, "192.0.2.3"], ["198.51.100.7"] * 2, everything)
    assert part.tolist() == ["test-s5", "dropped"]


def test_a_host_that_is_held_out_as_source_is_a_new_destination():
    test, free = probe_of(TEST), probe_of(TRAIN)
    part = split([test, free], [EARLY] * 2, ["192.0.2.1", "192.0.2.2"], ["192.0.2.2", "192.0.2.1"], NO_PREFIX)
    assert part.tolist() == ["test-s3", "test-s4"]


def test_between_an_endpoint_of_val_and_one_of_test_there_is_nothing():
    val, test = probe_of(VAL), probe_of(TEST)
    src, dst = ["192.0.2.1", "192.0.2.2"], ["192.0.2.2", "192.0.2.1"]
    assert split([val, test], [EARLY] * 2, src, dst, NO_PREFIX).tolist() == ["dropped"] * 2


def test_the_split_does_not_depend_on_order_nor_on_other_groups(mesh):
    rule, columns, part = mesh
    shuffled = np.random.default_rng(1).permutation(len(part))
    assert np.array_equal(split(*(column[shuffled] for column in columns), rule), part[shuffled])
    probe, _, _, dst = columns
    some = (probe % 9 == 5) & np.char.startswith(dst, "198.")  # those share no address, and ping what is no source
    assert np.array_equal(split(*(column[some] for column in columns), rule), part[some])


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
    rule = replace(RULE, group_percent=(0, 0), prefix_percent=(0, 0))
    part = split(probes, np.ones(len(probes), dtype=int), src, dst, rule)
    users = {}
    for group_of, address in zip(end, src, strict=True):
        users.setdefault(address, set()).add(group_of)

    def directed(wanted):
        """(group, source address, destination address) of the parts wanted."""
        return {(end[i], src[i], dst[i]) for i in np.flatnonzero(np.isin(part, wanted))}

    held, rest = directed(["test-s2"]), directed(["val-s2", *SEEN])
    assert held and rest
    assert not {(g, d) for g, _, d in held} & {(g, d) for g, _, d in rest}
    assert not {(s, d) for _, s, d in held} & {(d, s) for _, s, d in rest}
    between = {frozenset([g, other]) for g, _, d in rest for other in users.get(d, ())}
    assert not {frozenset([g, other]) for g, _, d in held for other in users.get(d, ())} & between


def test_new_pairs_are_no_blocks_of_sources_and_destinations():
    sources = hashing.int64_bytes(np.zeros(200), np.zeros(200), np.arange(200))[:, -KEY_BYTES:]
    hosts = address_keys(addresses(*(f"198.51.100.{i}" for i in range(200))))
    bands = RULE.pair_bands(RULE.endpoint_hashes(sources)[:, None], RULE.endpoint_hashes(hosts)[None])
    for band, share, most in ((TEST, 0.10, 12), (VAL, 0.04, 7)):
        held = bands == band
        assert abs(held.mean() - share) < 0.01
        shared = (held.astype(float) @ held.T)[np.triu_indices(200, 1)]  # destinations that two sources both lose
        assert shared.max() <= most


def test_an_address_belongs_to_the_least_key_of_the_groups_that_it_joins():
    keys = np.zeros((3, KEY_BYTES), dtype=np.uint8)
    keys[:, -1] = [9, 4, 7]
    sources = collect_sources(keys, addresses("192.0.2.1", "192.0.2.1", "192.0.2.0"), RULE)
    assert sources.addresses.tolist() == addresses("192.0.2.0", "192.0.2.1").tolist()
    assert sources.owner[:, -1].tolist() == [7, 4]
    assert sources.band.dtype == RULE.prefix_bands(sources.addresses).dtype == np.uint8


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
