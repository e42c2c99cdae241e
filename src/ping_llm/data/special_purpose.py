"""Packed addresses in, whether each can be that of one host on the public Internet out.

The tables are IANA's special-purpose registries of IPv4 and IPv6 as of November 2026, with multicast and the parts of
IPv6 that are no global unicast. The most specific entry decides. An entry is a host if packets to it reach, from
anywhere, whoever announces it; anycast counts, since a root server is anycast too. Documentation prefixes count as
hosts: tests and examples are written with them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

_IPV4_MAPPED = 0xFFFF << 32
_LOW_32 = np.uint64(0xFFFF_FFFF)

NO_HOST = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private use",
    "100.64.0.0/10": "shared by the customers of a provider (CGN)",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private use",
    # All of it, DS-Lite's 192.0.0.0/29 with it: 192.0.0.9 and .10 are reachable, but name the nearest PCP or TURN server
    # of whoever asks, and as a source nobody.
    "192.0.0.0/24": "IETF protocol assignments",
    # Withdrawn in 2015 (RFC 7526): whoever still announces it answers, or a filter drops it; 192.88.99.2 is a 6a44 relay.
    "192.88.99.0/24": "6to4 relay anycast",
    "192.168.0.0/16": "private use",
    "198.18.0.0/15": "benchmarking",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved, and 255.255.255.255 limited broadcast",
    # Of IPv6 only 2000::/3 is global unicast. Outside it lie ::, ::1, ::/96 (IPv4-compatible), fc00::/7, fe80::/10,
    # fec0::/10 (site-local), ff00::/8, and among what is reserved:
    "::/0": "no global unicast",
    "64:ff9b:1::/48": "translation within one network (RFC 8215): its addresses mean something else in the next",
    "100::/64": "discard-only",
    "100:0:0:1::/64": "dummy prefix",
    "5f00::/16": "segments of SRv6, inside one network",
    # With 2001:1::1 to ::3, the anycast addresses of the nearest PCP, TURN and DNS-SD server, 2001:2::/48 for
    # benchmarking and 2001:10::/28, the first ORCHIDs
    "2001::/23": "IETF protocol assignments",
    # Registered as reachable, but they are hashes and identities, which no router has a path for
    "2001:20::/28": "ORCHIDv2",
    "2001:30::/28": "identities of drones",
}

HOST = {
    "0.0.0.0/0": "IPv4",
    "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112: anycast name servers that answer pings, announced everywhere",
    "192.52.193.0/24": "AMT: anycast relays of multicast, announced everywhere",
    "192.175.48.0/24": "AS112",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "2000::/3": "global unicast",
    "2001:3::/32": "AMT",
    "2001:4:112::/48": "AS112",
    "2001:db8::/32": "documentation",
    "2620:4f:8000::/48": "AS112",
    "3fff::/20": "documentation",
}


def _translated(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, ...]:
    """64:ff9b::a.b.c.d is the IPv4 host a.b.c.d, by way of a translator."""
    return (low & _LOW_32,)


def _site(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, ...]:
    """2002:aabb:ccdd::/48 is the network behind the IPv4 host a.b.c.d, to which its packets are tunnelled."""
    return (high >> np.uint64(16) & _LOW_32,)


def _client(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, ...]:
    """Teredo: the IPv4 address of the server, and, inverted, that of the NAT before the host."""
    return high & _LOW_32, ~low & _LOW_32


BY_IPV4: dict[str, tuple[str, Callable[..., tuple[np.ndarray, ...]]]] = {
    "64:ff9b::/96": ("translation between IPv4 and IPv6", _translated),
    "2001::/32": ("Teredo", _client),
    "2002::/16": ("6to4", _site),
}
"""Hosts exactly if the IPv4 addresses that they hold are: 2002:a00:1:: is behind 10.0.0.1, and reached from nowhere."""


class _Network(NamedTuple):
    base: tuple[np.uint64, np.uint64]
    mask: tuple[np.uint64, np.uint64]
    host: bool | Callable[..., tuple[np.ndarray, ...]]


def is_public(packed: np.ndarray) -> np.ndarray:
    """True where (…, 16) packed addresses are neither private, shared, link-local, multicast, reserved nor otherwise
    of a special purpose that no host has; see the tables above."""
    words = np.ascontiguousarray(packed).view(">u8").astype(np.uint64)
    return _is_public(words[..., 0], words[..., 1])


def _is_public(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Of (…,) first and last 64 bits."""
    public = np.zeros(high.shape, dtype=bool)
    for network in _networks():
        inside = (high & network.mask[0] == network.base[0]) & (low & network.mask[1] == network.base[1])
        if isinstance(network.host, bool):
            public[inside] = network.host
        elif inside.any():
            held = network.host(high[inside], low[inside])
            public[inside] = np.logical_and.reduce([_is_public(np.zeros_like(v4), v4 | _IPV4_MAPPED) for v4 in held])
    return public


@cache
def _networks() -> list[_Network]:
    """All entries, the more specific ones after those that hold them."""
    verdicts: dict[str, bool | Callable[..., tuple[np.ndarray, ...]]] = dict.fromkeys(NO_HOST, False)
    verdicts |= dict.fromkeys(HOST, True) | {prefix: held for prefix, (_, held) in BY_IPV4.items()}
    networks = []
    for prefix, host in verdicts.items():
        network = ipaddress.ip_network(prefix)
        length = network.prefixlen + (96 if network.version == 4 else 0)
        base = int(network.network_address) | (_IPV4_MAPPED if network.version == 4 else 0)
        mask = (1 << 128) - (1 << (128 - length))
        networks.append((length, _Network(_words(base), _words(mask), host)))
    return [network for _, network in sorted(networks, key=lambda pair: pair[0])]


def _words(number: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(number >> 64), np.uint64(number & (1 << 64) - 1)
