"""Addresses that are no host of the public Internet, by IANA's registries."""

import ipaddress

import numpy as np
import pytest

from ping_llm.data.measurement import is_public, pack_addresses
from ping_llm.data.special_purpose import BY_IPV4, HOST, NO_HOST

# The registries of November 2026, written again: block, and whether an address of it is one host.
REGISTRIES = {
    "0.0.0.0/8": False,
    "0.0.0.0/32": False,
    "10.0.0.0/8": False,
    "100.64.0.0/10": False,
    "127.0.0.0/8": False,
    "169.254.0.0/16": False,
    "172.16.0.0/12": False,
    "192.0.0.0/24": False,
    "192.0.0.0/29": False,
    "192.0.0.8/32": False,
    "192.0.0.9/32": False,
    "192.0.0.10/32": False,
    "192.0.0.170/32": False,
    "192.0.0.171/32": False,
    "192.0.2.0/24": True,
    "192.31.196.0/24": True,
    "192.52.193.0/24": True,
    "192.88.99.0/24": False,
    "192.88.99.2/32": False,
    "192.168.0.0/16": False,
    "192.175.48.0/24": True,
    "198.18.0.0/15": False,
    "198.51.100.0/24": True,
    "203.0.113.0/24": True,
    "224.0.0.0/4": False,
    "240.0.0.0/4": False,
    "255.255.255.255/32": False,
    "::1/128": False,
    "::/128": False,
    "64:ff9b:1::/48": False,
    "100::/64": False,
    "100:0:0:1::/64": False,
    "2001:1::1/128": False,
    "2001:1::2/128": False,
    "2001:1::3/128": False,
    "2001:2::/48": False,
    "2001:3::/32": True,
    "2001:4:112::/48": True,
    "2001:10::/28": False,
    "2001:20::/28": False,
    "2001:30::/28": False,
    "2001:db8::/32": True,
    "2620:4f:8000::/48": True,
    "3fff::/20": True,
    "5f00::/16": False,
    "fc00::/7": False,
    "fe80::/10": False,
    "fec0::/10": False,
    "ff00::/8": False,
}
OUTSIDE = ["8.8.8.8", "192.0.1.0", "192.0.3.255", "192.88.98.255", "192.88.100.0", "198.17.255.255", "198.20.0.0"]
OUTSIDE += ["11.0.0.0", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0", "223.255.255.255"]
OUTSIDE += ["2001:200::", "2001:500:2f::f", "2000::", "2003::", "3fff:1000::", "2a02::1", "2620:4f:8001::"]


def public(*texts):
    packed, valid = pack_addresses(texts)
    assert valid.all()
    return is_public(packed).tolist()


@pytest.mark.parametrize("block", REGISTRIES)
def test_a_block_of_the_registries_is_what_it_is_from_its_first_address_to_its_last(block):
    network = ipaddress.ip_network(block)
    ends = str(network.network_address), str(network.broadcast_address)
    assert public(*ends) == [REGISTRIES[block]] * 2


def test_what_lies_beside_the_blocks_is_public():
    assert [text for text, found in zip(OUTSIDE, public(*OUTSIDE), strict=True) if not found] == []


def test_ipv6_that_is_no_global_unicast_is_no_host():
    reserved = ["::192.0.2.1", "200::1", "400::1", "1fff::1", "4000::1", "64:ff9b:0:1::1", "64:ff9b:2::1", "e000::1"]
    assert public(*reserved) == [False] * len(reserved)


@pytest.mark.parametrize(
    ("shape", "held"),
    [
        ("64:ff9b::{0:x}:{1:x}", "the translated host"),
        ("2002:{0:x}:{1:x}::1", "the router of the site"),
        ("2001:0:5db8:d822:0:0:{2:x}:{3:x}", "the NAT of the client"),
        ("2001:0:{0:x}:{1:x}:0:0:a247:27dd", "the server"),
    ],
)
@pytest.mark.parametrize(
    ("ipv4", "host"),
    [("8.8.8.8", True), ("192.0.2.33", True), ("10.0.0.1", False), ("192.0.0.2", False), ("198.18.0.1", False)],
)
def test_an_address_that_holds_an_ipv4_address_is_a_host_if_that_is_one(shape, held, ipv4, host):
    number = int(ipaddress.IPv4Address(ipv4))
    words = [number >> 16, number & 0xFFFF, (~number >> 16) & 0xFFFF, ~number & 0xFFFF]
    assert public(shape.format(*words)) == [host], held


def test_addresses_are_judged_one_by_one_whatever_the_shape_of_the_array():
    texts = [*REGISTRIES, *BY_IPV4, *HOST, *NO_HOST]
    packed, _ = pack_addresses([text.partition("/")[0] for text in texts])
    together = is_public(packed)
    assert together.tolist() == [bool(is_public(one)) for one in packed]
    assert (is_public(packed[np.newaxis, ::-1]) == together[::-1]).all()
