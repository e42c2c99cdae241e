"""What training has met of an address is the longest of some prefixes, by role."""

import numpy as np
import pytest
from conftest import make_row
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.data.measurement import pack_address
from ping_llm.inference.familiar import Familiar

IPV4 = [f"192.0.{b}.{c}" for b in (2, 3) for c in (1, 2, 77)] + ["198.51.100.7", "203.0.113.9"]
IPV6 = ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "2001:db8:5::1", "2001:db9::1", "3fff::1"]
TEXTS = IPV4 + IPV6
PACKED = np.array([list(pack_address(text)) for text in TEXTS], dtype=np.uint8)
some = st.sets(st.integers(0, len(TEXTS) - 1))


class Row:
    def __init__(self, src: set[int], dst: set[int]) -> None:
        self.src_addresses, self.dst_addresses = PACKED[sorted(src)], PACKED[sorted(dst)]


def slowly(met: set[int], text: int) -> int:
    own, lengths, begin = PACKED[text], (1, 2, 3, 4), 12
    if text >= len(IPV4):
        lengths, begin = (4, 6, 8, 16), 0
    family = {i for i in met if (i < len(IPV4)) == (text < len(IPV4))}
    shown = [n for n in lengths if any((PACKED[i][begin:][:n] == own[begin:][:n]).all() for i in family)]
    return max(shown, default=0)


@settings(max_examples=80, deadline=None)
@given(some, some, some)
def test_known_bytes_are_those_of_the_longest_prefix_that_was_met_in_the_role(src, dst, more):
    familiar = Familiar.of_rows([Row(src, dst), Row(more, set())])
    assert familiar.known_bytes("src", PACKED).tolist() == [slowly(src | more, i) for i in range(len(TEXTS))]
    assert familiar.known_bytes("dst", PACKED).tolist() == [slowly(dst, i) for i in range(len(TEXTS))]
    assert Familiar.of_json(familiar.to_json()) == familiar
    assert hash(familiar) == hash(Familiar.of_json(familiar.to_json()))


def test_rows_tell_their_own_addresses():
    row = make_row(50)
    familiar = Familiar.of_rows([row])
    assert (familiar.known_bytes("dst", row.dst_addresses) == np.where(row.dst_is_ipv4, 4, 16)).all()
    assert familiar != Familiar.of_rows([])


def test_damaged_columns_are_refused():
    with pytest.raises((KeyError, ValueError)):
        Familiar.of_json({"src": "AAAA"})
    with pytest.raises(ValueError):
        Familiar.of_json({"src": "no base64!", "dst": ""})


def test_of_a_model_that_reads_networks_of_sources_the_network_is_what_was_met():
    familiar = Familiar.of_rows([Row({0}, {0})], (3, 6))  # 192.0.2.1
    texts = ["192.0.2.1", "192.0.2.77", "192.0.3.1"]
    packed = np.array([list(pack_address(text)) for text in texts], dtype=np.uint8)
    assert familiar.known_bytes("src", packed).tolist() == [4, 4, 2]
    assert familiar.known_bytes("dst", packed).tolist() == [4, 3, 2]
    assert Familiar.of_json(familiar.to_json()) == familiar != Familiar.of_rows([Row({0}, {0})])
    host, network = (set(one.src.tolist()) for one in (Familiar.of_rows([Row({0}, set())]), familiar))
    assert len(host) == len(network) == 4
    assert len(host - network) == 1  # the host itself: whoever has the calibration cannot look it up
