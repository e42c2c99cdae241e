"""The true of truth.json: closed forms that agree with each other, and an Internet that obeys geography."""

from __future__ import annotations

import dataclasses
import ipaddress
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from ping_llm.data.synthetic.truth import ANYCAST, TrueRTT, Truth
from ping_llm.data.synthetic.world import build_world

START_S = 1_767_225_600  # 2026-01-01T00:00:00Z
EVENING_S = START_S + 20 * 3600.0


@pytest.fixture(scope="module")
def truth():
    return Truth(build_world(5, 30, 24))


def test_hosts_of_a_subnet_differ_by_at_most_a_tenth_of_their_access_delay(truth):
    network = next(n for n in truth.world["networks"] if n["kind"] == "cable")
    target = next(m["dst_addr"] for m in truth.world["measurements"] if m["ip_version"] == 4)
    subnet = list(ipaddress.ip_network(network["prefixes"][0]))[:256]
    floors = truth.paths([str(a) for a in subnet], [target] * 256).idle_floor_ms
    assert 0 < np.ptp(floors) <= 0.1 * network["access_ms"]


def test_nothing_is_faster_than_straight_fibre(truth):
    """Against the haversine formula, which truth.py does not use."""
    place = {n["asn"]: (n["sites"][0]["latitude"], n["sites"][0]["longitude"]) for n in truth.world["networks"]}
    probes = truth.world["probes"]
    pairs = [(a, b) for a in probes for b in probes if a["asn"] != b["asn"]]
    ends = np.radians([[place[a["asn"]], place[b["asn"]]] for a, b in pairs])  # (pairs, 2, latitude and longitude)
    (lat_a, lon_a), (lat_b, lon_b) = ends[:, 0].T, ends[:, 1].T
    chord = np.sin((lat_b - lat_a) / 2) ** 2 + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    straight_ms = 2 * 2 * 6371 * np.arcsin(np.sqrt(chord)) / 200
    floors = truth.paths([a["ipv4"] for a, _ in pairs], [b["ipv4"] for _, b in pairs]).idle_floor_ms
    assert (floors > straight_ms).all()
    assert np.median(floors / straight_ms) < 4


def test_fibre_time_is_the_same_both_ways(truth):
    a, b = (p["ipv4"] for p in truth.world["probes"][:2])
    there, back = truth.paths([a, b], [b, a]).idle_floor_ms
    assert there == pytest.approx(back, rel=1e-12)


def test_anycast_answers_from_near_nearly_everywhere(truth):
    sources = [p["ipv4"] for p in truth.world["probes"]]

    def median_floor(kind: str) -> float:
        networks = {n["asn"] for n in truth.world["networks"] if (n["kind"] == ANYCAST) == (kind == ANYCAST)}
        targets = [m["dst_addr"] for m in truth.world["measurements"] if m["asn"] in networks and m["ip_version"] == 4]
        pairs = [(s, t) for s in sources for t in targets if s != t]
        return float(np.median(truth.paths(*zip(*pairs, strict=True)).idle_floor_ms))

    assert median_floor(ANYCAST) < 0.6 * median_floor("unicast")


def test_evening_raises_rtt_and_loss(truth):
    probe = next(p for p in truth.world["probes"] if p["asn"] == 4_200_000_000)
    site = truth.world["networks"][0]["sites"][0]
    target = next(m["dst_addr"] for m in truth.world["measurements"] if m["built_in"] and m["ip_version"] == 4)
    solar_midnight = START_S - site["longitude"] / 15 * 3600
    morning = truth.rtt_distribution(probe["ipv4"], target, solar_midnight + 9 * 3600)
    evening = truth.rtt_distribution(probe["ipv4"], target, solar_midnight + 21 * 3600)
    assert evening.median > morning.median and evening.p_fail > morning.p_fail


DISTRIBUTIONS = st.builds(
    lambda parts: TrueRTT(*map(np.array, zip(*parts, strict=True))),
    st.lists(
        st.tuples(st.floats(0, 0.9), st.floats(0.5, 300), st.floats(0.01, 10), st.floats(2.2, 6)),
        min_size=1,
        max_size=4,
    ),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(DISTRIBUTIONS, st.floats(0.001, 0.999))
def test_quantile_inverts_the_cdf(true, q):
    assert true.cdf(true.quantile(q)) == pytest.approx(q, abs=1e-7)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(DISTRIBUTIONS)
def test_density_integrates_to_the_cdf_and_quantiles_to_the_mean(true):
    low, high = float(true.floor_ms.min()), float(true.quantile(0.95))
    kinks = sorted({low, *true.floor_ms.tolist(), *true.quantile([0.1, 0.5, 0.9]).tolist(), high})
    inside = [point for point in kinks if point <= high]
    mass = sum(integrate.quad(lambda x: true.pdf(x), a, b)[0] for a, b in itertools.pairwise(inside))
    assert mass == pytest.approx(0.95, abs=1e-5)
    u = (np.arange(200_000) + 0.5) / 200_000
    parts = [
        TrueRTT(*(getattr(true, f.name)[k : k + 1] for f in dataclasses.fields(true))) for k in range(len(true.shape))
    ]
    excess = [(part.quantile(u) - part.floor_ms).mean() + part.floor_ms[0] for part in parts]
    assert true.mean == pytest.approx(np.dot(true.weights, excess), rel=2e-2)


def test_samples_follow_the_mixture_and_its_loss(truth):
    probe = truth.world["probes"][0]
    target = next(m["dst_addr"] for m in truth.world["measurements"] if m["built_in"] and m["ip_version"] == 4)
    true = truth.rtt_distribution(probe["ipv4"], target)
    rtt_ms = true.sample(20_000, np.random.default_rng(1))
    assert stats.kstest(true.cdf(rtt_ms[rtt_ms >= 0]), "uniform").pvalue > 0.01
    assert stats.binomtest(int((rtt_ms < 0).sum()), len(rtt_ms), true.p_fail).pvalue > 0.01
    assert abs(true.cdf(true.median) - 0.5) < 1e-9


def test_the_mixture_over_the_day_is_as_good_as_exact(truth):
    src, dst = (p["ipv4"] for p in truth.world["probes"][:2])
    true = truth.rtt_distribution(src, dst)
    fine = TrueRTT(*truth.paths([src], [dst]).at((np.arange(6000) + 0.5) * 86_400 / 6000))
    at = true.quantile(np.linspace(0.05, 0.95, 19))
    assert np.abs(true.cdf(at) - fine.cdf(at)).max() < 1e-5
    assert true.p_fail == pytest.approx(fine.p_fail, rel=1e-9) and true.mean == pytest.approx(fine.mean, rel=1e-9)


def test_the_distribution_of_a_truth_on_disk_stays_what_it_is():
    """A change to the constants or the hash changes old worlds: then FORMAT_VERSION must be raised, and these numbers."""
    site = {"city": "A", "region": "Europe", "latitude": 50.0, "longitude": 10.0}
    network = {"kind": "fibre", "access_ms": 2.0, "detour": 0.1, "congestion_ms": 1.0, "jitter_share": 0.01}
    network |= {"jitter_shape": 3.0, "loss": 0.01, "ipv6_extra_ms": 0.5}
    networks = [
        network | {"asn": 1, "sites": [site], "prefixes": ["192.0.2.0/24"]},
        network | {"asn": 2, "sites": [site | {"latitude": 40.0}], "prefixes": ["198.51.100.0/24"]},
    ]
    truth = Truth({"format_version": 1, "seed": 7, "regions": ["Europe"], "networks": networks})
    true = truth.rtt_distribution("192.0.2.1", "198.51.100.1", EVENING_S)
    assert [true.p_fail, true.median, true.mean] == pytest.approx(
        [0.07796324139535749, 22.5584940898692, 22.765011834223984], rel=1e-9
    )


def test_an_address_of_no_network_is_one_clear_error(truth):
    known = truth.world["probes"][0]["ipv4"]
    anycast = next(m["dst_addr"] for m in truth.world["measurements"] if m["built_in"] and m["ip_version"] == 4)
    ipv6 = next(m["dst_addr"] for m in truth.world["measurements"] if m["ip_version"] == 6)
    for src, dst, message in [
        (known, "203.0.113.9", "203.0.113.9 is in no network"),
        ("2001:db8::1", ipv6, "2001:db8::1 is in no network"),
        (known, "example", "'example' is not an IPv4 or IPv6 address"),
        (anycast, known, "is anycast"),
        (known, ipv6, "different IP versions"),
    ]:
        with pytest.raises(ValueError, match=message):
            truth.rtt_distribution(src, dst, 0.0)


def test_a_missing_or_damaged_truth_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match='run "ping-llm synth'):
        Truth.load(tmp_path)
    (tmp_path / "truth.json").write_text('{"seed": 1,')
    with pytest.raises(ValueError, match="is damaged"):
        Truth.load(tmp_path)
    (tmp_path / "truth.json").write_text('{"seed": 1, "format_version": 99}')
    with pytest.raises(ValueError, match="format 99"):
        Truth.load(tmp_path)
