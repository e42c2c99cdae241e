"""A source and a prefix of the IPv4 space in, the prefixes one byte longer with what a ping to each would take out."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ping_llm.data.special_purpose import HOST, NO_HOST
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.query import Endpoint

LEVELS = (0.05, 0.5, 0.95)
_COLUMNS = ("q0.05", "median_ms", "q0.95")


def parts_of_space(within: str, first: int = 0, count: int = 256) -> list[str]:
    """The prefixes one byte longer that may hold hosts of the public Internet, of `count` from the byte `first` on.

    `within` is 0.0.0.0/0, or an IPv4 prefix of 8 or 16 bits; ValueError otherwise.
    """
    end = Endpoint.parse(within)
    if end.width != 4 or end.known_bits not in (0, 8, 16):
        raise ValueError(f"within={within!r} must be 0.0.0.0/0, or an IPv4 prefix of 8 or 16 bits, such as 192.0.0.0/8")
    bits = end.known_bits + 8
    base = int.from_bytes(end.known, "big") << 8
    numbers = range(base + first, base + min(first + count, 256))
    networks = [ipaddress.IPv4Network((number << (32 - bits), bits)) for number in numbers]
    return [str(network) for network in networks if may_hold_hosts(network)]


def may_hold_hosts(network: ipaddress.IPv4Network) -> bool:
    """Whether some address in it is not of a special purpose; see data.special_purpose."""
    no_host, host = _entries()
    return not any(network.subnet_of(one) for one in no_host) or any(one.subnet_of(network) for one in host)


def map_answer(prefixes: Sequence[str], found: Sequence[RTTDistribution]) -> dict[str, Any]:
    """Columns: prefix, P(no answer), median and the 5 and 95 % quantiles of an answer, null where there is none."""
    answer: dict[str, Any] = {"prefix": list(prefixes), "p_fail": [one.p_fail for one in found]}
    rtt_ms = [one.quantile(np.array(LEVELS)).tolist() if one.p_answer > 0 else [None] * 3 for one in found]
    return answer | {name: [own[place] for own in rtt_ms] for place, name in enumerate(_COLUMNS)}


@cache
def _entries() -> tuple[list[ipaddress.IPv4Network], list[ipaddress.IPv4Network]]:
    """IPv4 networks without hosts, and those within the IPv4 space that have some."""
    every = ([ipaddress.ip_network(prefix) for prefix in table if ":" not in prefix] for table in (NO_HOST, HOST))
    no_host, host = ([one for one in networks if isinstance(one, ipaddress.IPv4Network)] for networks in every)
    return no_host, [one for one in host if one.prefixlen]
