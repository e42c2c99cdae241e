"""A seed and the number of hosts in, a synthetic Internet out: networks with prefixes and places, probes, measurements.

The result is the plain dictionary that truth.json holds. Networks of one region share their leading address bytes, as
those of one registry do; hosts of a network sit in a few of its subnets.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import numpy as np

from ping_llm.data.measurement import is_public, pack_addresses
from ping_llm.data.synthetic.truth import ANYCAST, FORMAT_VERSION

Entry = dict[str, Any]  # of truth.json

# Region: share of the networks, and leading 16 bits of its IPv6 space. Its cities are in cities.csv.
_REGIONS = {
    "Europe": (0.62, 0x2A00),
    "North America": (0.17, 0x2600),
    "Asia": (0.10, 0x2400),
    "South America": (0.04, 0x2800),
    "Africa": (0.03, 0x2C00),
    "Oceania": (0.04, 0x2402),
}
# Kind of network: ranges of access RTT in ms, evening congestion in ms, jitter as a share of the RTT, loss when idle.
_KINDS = {
    "datacentre": ((0.15, 0.6), (0.02, 0.1), (0.002, 0.006), (0.0005, 0.003)),
    "fibre": ((1.0, 4.0), (0.1, 0.8), (0.003, 0.008), (0.001, 0.006)),
    "cable": ((4.0, 10.0), (0.5, 4.0), (0.006, 0.015), (0.003, 0.012)),
    "dsl": ((8.0, 20.0), (0.5, 3.0), (0.005, 0.012), (0.004, 0.02)),
    "mobile": ((20.0, 45.0), (2.0, 8.0), (0.012, 0.03), (0.01, 0.04)),
    ANYCAST: ((0.1, 0.4), (0.0, 0.0), (0.001, 0.004), (0.0002, 0.002)),
}
_PROBE_KINDS = {"fibre": 0.45, "cable": 0.2, "dsl": 0.15, "datacentre": 0.15, "mobile": 0.05}
_TARGET_KINDS = {"datacentre": 0.8, "fibre": 0.2}
_FIRMWARE = {4790: 0.1, 4970: 0.2, 5020: 0.2, 5080: 0.5}
# /16 blocks that hold special-purpose prefixes, beside those that is_public knows.
_RESERVED_16 = {(192, 0), (192, 88), (198, 18), (198, 19), (198, 51), (203, 0)}
_ANYCAST_SHARE = 0.3  # of the targets
_IPV6_SHARE = 0.75  # of the probes and of the targets
_PRIVATE_SHARE = 0.45  # of the probes outside datacentres: behind a NAT, so src_addr is private
_NAMED_SHARE = 0.3  # of the unicast targets: resolved by name on the probe
_MAX_BUILT_INS = 999  # measurements 1001–1999 of IPv4 and 2001–2999 of IPv6, as on Atlas
_HOSTS_PER_NETWORK = 3
_PROBES_PER_ANCHOR = 6  # one probe in so many is pinged by the others


def build_world(seed: int, probes: int, targets: int) -> Entry:
    """The networks, probes and measurements of a seed: what truth.json holds beside the schedule."""
    rng = np.random.default_rng([seed, 0])
    anycast = round(targets * _ANYCAST_SHARE)
    unicast = targets - anycast
    access_kinds = _kinds(_PROBE_KINDS, max(1, -(-probes // _HOSTS_PER_NETWORK)), rng)
    hosting_kinds = _kinds(_TARGET_KINDS, -(-unicast // _HOSTS_PER_NETWORK), rng)
    blocks_4, blocks_6 = {r: _ipv4_blocks(r, rng) for r in _REGIONS}, {r: _ipv6_blocks(r, rng) for r in _REGIONS}
    networks = [
        _network(i, kind, blocks_4, blocks_6, rng)
        for i, kind in enumerate(access_kinds + hosting_kinds + [ANYCAST] * anycast)
    ]
    access = networks[: len(access_kinds)]
    hosting = networks[len(access_kinds) : len(access_kinds) + len(hosting_kinds)]
    probe_list = _probes(_members(access, probes, rng), rng)
    hosts = _members(hosting, unicast, rng) + networks[len(access) + len(hosting) :]
    return {
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "regions": list(_REGIONS),
        "networks": networks,
        "probes": probe_list,
        "measurements": _measurements(hosts, probe_list, rng),
    }


def _network(
    i: int,
    kind: str,
    blocks_4: dict[str, Iterator[int]],
    blocks_6: dict[str, Iterator[IPv6Network]],
    rng: np.random.Generator,
) -> Entry:
    """An autonomous system: one place, one access profile, 1–4 IPv4 blocks, one IPv6 /32. Anycast: many places, /24, /48."""
    count = int(rng.integers(8, 17)) if kind == ANYCAST else 1
    # Golden-ratio steps: few networks, and the sites of each anycast one, already have the regions in their shares.
    sites = [_site(((i + k) * 0.6180339887) % 1, rng) for k in range(count)]
    region = sites[0]["region"]
    access_ms, congestion_ms, jitter_share, loss = (float(rng.uniform(*bounds)) for bounds in _KINDS[kind])
    if kind == ANYCAST:
        base_4, base_6 = next(blocks_4[region]), next(blocks_6[region])
        prefixes = [f"{IPv4Address(base_4 | int(rng.integers(256)) << 8)}/24", f"{base_6.network_address}/48"]
    else:
        prefixes = []
        for _ in range(int(rng.integers(1, 5))):  # a /16 to /20 somewhere in a /16
            base, length = next(blocks_4[region]), int(rng.integers(16, 21))
            prefixes.append(f"{IPv4Address(base | int(rng.integers(1 << (length - 16))) << (32 - length))}/{length}")
        prefixes.append(str(next(blocks_6[region])))
    tunnelled = kind != ANYCAST and rng.random() < 0.2
    return {
        "asn": 4_200_000_000 + i,  # a private AS number, RFC 6996
        "kind": kind,
        "sites": sites,
        "prefixes": prefixes,
        "access_ms": access_ms,
        "detour": float(rng.uniform(0.02, 0.30)),
        "congestion_ms": congestion_ms,
        "jitter_share": jitter_share,
        "jitter_shape": float(rng.uniform(2.5, 5.0)),
        "loss": loss,
        "ipv6_extra_ms": float(rng.uniform(3, 15) if tunnelled else rng.uniform(0, 0.3)),
    }


def _site(share: float, rng: np.random.Generator) -> Entry:
    """A place in or around a city, in the region that holds this point of the cumulated shares."""
    edges = np.cumsum([share for share, _ in _REGIONS.values()])
    region = list(_REGIONS)[int((share * edges[-1] >= edges).sum())]
    cities = [city for city in _cities() if city["region"] == region]
    city = cities[rng.integers(len(cities))]
    offsets = dict(zip(("latitude", "longitude"), rng.normal(0, 0.3, 2), strict=True))
    place = {name: round(float(city[name]) + offset, 3) for name, offset in offsets.items()}
    return {"city": city["city"], "region": region, **place}


@cache
def _cities() -> list[dict[str, str]]:
    """Name, region, latitude and longitude of each city."""
    return list(csv.DictReader((files(__package__) / "cities.csv").read_text("utf-8").splitlines()))


def _ipv4_blocks(region: str, rng: np.random.Generator) -> Iterator[int]:
    """The region's free public /16s as 32-bit numbers, a few leading bytes first, as a registry hands them out."""
    names, shares = list(_REGIONS), [share for share, _ in _REGIONS.values()]
    edges = np.round(np.cumsum([0, *shares]) / sum(shares) * 223).astype(int)
    i = names.index(region)
    # 97 is coprime to 223: the leading bytes of a region lie scattered, and no byte has two regions.
    leading = rng.permutation([(k * 97) % 223 + 1 for k in range(edges[i], edges[i + 1])])
    for group in range(0, len(leading), 4):
        pairs = [(int(a), b) for a in leading[group : group + 4] for b in range(256)]
        packed, _ = pack_addresses([f"{a}.{b}.0.0" for a, b in pairs])
        public = is_public(packed)
        for k in rng.permutation(len(pairs)):
            if public[k] and pairs[k] not in _RESERVED_16:
                yield pairs[k][0] << 24 | pairs[k][1] << 16
    raise ValueError(f"{region} has no IPv4 block left; choose fewer probes and targets")


def _ipv6_blocks(region: str, rng: np.random.Generator) -> Iterator[IPv6Network]:
    """The region's /32s in a random order."""
    lead = _REGIONS[region][1]
    for second in rng.permutation(1 << 16):
        yield IPv6Network(((lead << 16 | int(second)) << 96, 32))
    raise ValueError(f"{region} has no IPv6 block left; choose fewer probes and targets")


def _members(networks: list[Entry], hosts: int, rng: np.random.Generator) -> list[Entry]:
    """The network of each host: every network has one, then larger networks have more."""
    if not hosts:
        return []
    weights = 1 / (4 + np.arange(len(networks)))
    extra = rng.choice(len(networks), size=hosts - min(hosts, len(networks)), p=weights / weights.sum())
    return [networks[i] for i in (*range(min(hosts, len(networks))), *extra.tolist())]


def _probes(networks: list[Entry], rng: np.random.Generator) -> list[Entry]:
    """One probe in each network of the list; `ipv4` and `ipv6` are public, `private_ipv4` is what a NAT hides."""
    ids = np.sort(rng.choice(np.arange(6000, 66_000 + 10 * len(networks)), size=len(networks), replace=False)).tolist()
    firmware = rng.choice(list(_FIRMWARE), p=list(_FIRMWARE.values()), size=len(ids)).tolist()
    addresses = _addresses(networks, rng)
    probes = []
    for probe_id, network, version, (ipv4, ipv6) in zip(ids, networks, firmware, addresses, strict=True):
        private = network["kind"] != "datacentre" and rng.random() < _PRIVATE_SHARE
        a, b = rng.integers(0, 3), rng.integers(2, 255)
        probes.append(
            {
                "probe_id": probe_id,
                "asn": network["asn"],
                "firmware": version,
                "ipv4": ipv4,
                "ipv6": ipv6 if rng.random() < _IPV6_SHARE else None,
                "private_ipv4": (f"192.168.{a}.{b}" if rng.random() < 0.8 else f"10.0.{a}.{b}") if private else None,
                "reports_src": bool(rng.random() >= 0.02),
            }
        )
    return probes


def _measurements(hosts: list[Entry], probes: list[Entry], rng: np.random.Generator) -> list[Entry]:
    """One measurement for every target and IP version, then for every anchor (a probe that others ping)."""
    anchors = rng.choice(len(probes), size=min(len(probes), max(2, len(probes) // _PROBES_PER_ANCHOR)), replace=False)
    pinged = [
        (host["asn"], host["kind"], ipv4, ipv6 if rng.random() < _IPV6_SHARE else None)
        for host, (ipv4, ipv6) in zip(hosts, _addresses(hosts, rng), strict=True)
    ]
    pinged += [(probes[i]["asn"], "anchor", probes[i]["ipv4"], probes[i]["ipv6"]) for i in sorted(anchors.tolist())]
    measurements, built_ins = [], 0
    for i, (asn, kind, ipv4, ipv6) in enumerate(pinged):
        named = kind not in (ANYCAST, "anchor") and rng.random() < _NAMED_SHARE
        built_in = kind == ANYCAST and built_ins < _MAX_BUILT_INS
        built_ins += built_in
        for version, address in ((4, ipv4), (6, ipv6)):
            measurements.append(
                {
                    "msm_id": version // 2 * 1000 - 1000 + built_ins if built_in else 40_000_000 + 10 * i + version,
                    "asn": asn,
                    "ip_version": version,
                    "dst_addr": address,
                    "dst_name": f"target-{i}.example.net" if named else address,
                    "built_in": built_in,
                }
            )
    return [measurement for measurement in measurements if measurement["dst_addr"]]


def _addresses(networks: list[Entry], rng: np.random.Generator) -> list[tuple[str, str]]:
    """A free IPv4 and IPv6 address for each host; hosts of a network share 3 subnets a prefix, more where those are full."""
    used: set[str] = set()
    pairs = []
    for network in networks:
        *blocks, ipv6_block = network["prefixes"]
        ipv6 = IPv6Network(ipv6_block)
        for attempt in itertools.count():
            block = IPv4Network(blocks[rng.integers(len(blocks))])
            # The subnets follow from the prefix, so that they are the same whenever a host is placed.
            subnet = (int(rng.integers(3 + attempt // 8)) * 37 + network["asn"]) % (block.num_addresses >> 8)
            ipv4 = str(block[subnet << 8 | int(rng.integers(1, 255))])
            site = (int(rng.integers(3)) * 4099 + network["asn"]) % (1 << (48 - ipv6.prefixlen))
            low = int(rng.integers(1, 1 << 16)) if rng.random() < 0.5 else int(rng.integers(1 << 62))
            address = str(ipv6[site << 80 | int(rng.integers(4)) << 64 | low])
            if not {ipv4, address} & used:
                break
        used |= {ipv4, address}
        pairs.append((ipv4, address))
    return pairs


def _kinds(shares: dict[str, float], count: int, rng: np.random.Generator) -> list[str]:
    return rng.choice(list(shares), p=list(shares.values()), size=count).tolist()
