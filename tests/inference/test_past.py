"""Past results are those of the pair, and of the sources most like the query's; never the query's own or later ones."""

import numpy as np
import pytest
from conftest import write_rows

from ping_llm.data.measurement import pack_address
from ping_llm.data.rows import ProbeRow
from ping_llm.inference.context import Context
from ping_llm.inference.memory import Memory
from ping_llm.inference.past import UNKNOWN_AGE_H, offsets_ms, pasts
from ping_llm.inference.query import Endpoint, Query

HOUR, T = 3600, 1_700_000_000
SRC, DST = "192.0.2.1", "198.51.100.7"


def row_of(src: str, pings: list[tuple[str, int, float]], probe: int) -> ProbeRow:
    """Pings (destination, hours after T, ms) of one source."""
    pings = sorted(pings, key=lambda ping: ping[1])
    dst, hours, rtt_ms = zip(*pings, strict=True)
    addresses = sorted(set(dst))
    packed = [np.array([list(pack_address(text)) for text in some], dtype=np.uint8) for some in ([src], addresses)]
    zeros = np.zeros(len(pings), dtype=np.int64)
    ids = np.array([addresses.index(text) for text in dst])
    time_s, kind = T + HOUR * np.array(hours), zeros.astype(np.uint8)
    return ProbeRow.from_codes(probe, time_s, zeros, zeros, ids, np.array(rtt_ms, np.float32), kind, *packed)


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Memory:
    """The source has two destinations, and others that it shares with three sources of which the second is most like it."""
    others = ["203.0.113.1", "203.0.113.2", "203.0.113.3"]
    own = [(DST, 1, 10.0), (DST, 2, -1.0), (DST, 3, 11.0), (DST, 9, 99.0)]
    own += [(dst, 1, ms) for dst, ms in zip(others, (20.0, 40.0, 80.0), strict=True)]
    rows = [row_of(SRC, own, 1)]
    for probe, (src, factor, rtt_ms) in enumerate(
        (("192.0.2.200", 4.0, 55.0), ("203.0.113.77", 1.05, 12.0), ("192.0.3.1", 1.5, 15.0)), start=2
    ):
        pings = [(dst, 2, factor * ms) for dst, ms in zip(others, (20.0, 40.0, 80.0), strict=True)]
        rows.append(row_of(src, [*pings, (DST, 3, 3 * rtt_ms), (DST, 4, rtt_ms), (DST, 8, 500.0)], probe))
    rows.append(row_of("192.0.2.3", [(DST, 4, -1.0)], 6))  # never answered there
    return Memory.open(write_rows(tmp_path_factory.mktemp("rows"), {"train": rows}, shards=1))


def query(at_h: float | None = 5, context: list[tuple[str, int, float]] = (), src: str = SRC, dst: str = DST) -> Query:
    rows = [
        {"src_addr": src, "dst_addr": to, "event_time": T + HOUR * hour, "rtt": rtt_ms} for to, hour, rtt_ms in context
    ]
    time_s = None if at_h is None else int(T + HOUR * at_h)
    return Query.of(Endpoint.parse(src), Endpoint.parse(dst), time_s, Context.parse(rows))


def told(past, row: int = 0) -> list[float]:
    values = past.log_ms[row]
    return np.exp(values[np.isfinite(values)]).round(3).tolist()


def test_the_pair_s_own_answers_come_newest_first_and_none_is_of_the_query_s_second_or_later(memory):
    found = pasts([query(5), query(3), query(1), query(None)], memory)["pair"]
    assert [told(found, i) for i in range(4)] == [
        [11.0, 10.0],
        [10.0],
        [],
        [99.0, 11.0, 10.0],
    ]  # of the lost one nothing
    assert found.first[:2] == pytest.approx([2.0, 2.0]) and found.first[3] == UNKNOWN_AGE_H


def test_what_stands_in_the_context_is_not_counted_twice(memory):
    context = [(DST, 3, 11.0), (DST, 4, 12.5), ("203.0.113.9", 4, 1.0)]
    found = pasts([query(5, context)], memory)["pair"]
    assert told(found) == [12.5, 11.0, 10.0] and found.first[0] == pytest.approx(1.0)
    assert told(pasts([query(5, context)], None)["pair"]) == [12.5, 11.0]


def test_what_is_held_beside_and_after_an_old_result_of_the_context_counts_too(memory):
    """The memory holds 10 after an hour and 11 after three. One of the same second or the same RTT alone is no repeat."""
    found = pasts([query(5, [(DST, 2, 7.0)])], memory)["pair"]
    assert told(found) == [11.0, 7.0, 10.0] and found.first[0] == pytest.approx(2.0)
    assert told(pasts([query(5, [(DST, 1, 7.0), (DST, 2, 10.0)])], memory)["pair"]) == [11.0, 10.0, 7.0, 10.0]
    assert told(pasts([query(5, [(DST, 1, 10.0)])], memory)["pair"]) == [11.0, 10.0]


def test_a_result_that_the_memory_added_to_a_context_without_times_is_not_counted_twice(memory):
    rows = [{"src_addr": SRC, "dst_addr": DST, "rtt": ms} for ms in (11.0, 8.0)]
    untimed = Query.of(Endpoint.parse(SRC), Endpoint.parse(DST), T + 5 * HOUR, Context.parse(rows))
    found = pasts([untimed], memory)["pair"]
    assert told(found) == [8.0, 11.0, 10.0] and found.first[0] == UNKNOWN_AGE_H


def test_of_a_context_without_times_the_last_is_the_newest(memory):
    rows = [{"src_addr": SRC, "dst_addr": DST, "rtt": ms} for ms in (1.0, 2.0)]
    found = pasts([Query.of(Endpoint.parse(SRC), Endpoint.parse(DST), T, Context.parse(rows))], None)["pair"]
    assert told(found) == [2.0, 1.0] and found.first[0] == UNKNOWN_AGE_H


def test_other_sources_answer_the_most_alike_first_each_with_its_latest_and_their_offset(memory):
    """To three destinations theirs are 1.05, 1.5 and 4 times 20, 40 and 80 ms: by the median 2, 20 and 120 ms longer, of
    which three quarters count, for three are shared. 12, 15 and 55 ms become 10.5, the least of 0.3, and 55, for 90 ms less
    would bring the three RTTs of the last source no nearer."""
    found = pasts([query(5)], memory)["others"]
    assert told(found) == [10.5, 0.3, 55.0]
    # To three shared destinations three of the usual distance 1 are added; the nearest source shares the fewest bits.
    bits = [
        32 - (int.from_bytes(pack_address(a)) ^ int.from_bytes(pack_address(SRC))).bit_length()
        for a in ("192.0.2.200", "203.0.113.77")
    ]
    apart = sum(abs(np.log((1.05 * ms - 1.5) / ms)) for ms in (20, 40, 80))
    assert found.first[0] == pytest.approx((apart + 3) / 6 + 0.005 * (bits[0] - bits[1]), abs=1e-4)
    assert told(pasts([query(4)], memory)["others"]) == [34.5, 30.0, 165.0]
    assert told(pasts([query(2)], memory)["others"]) == []


def test_a_source_that_is_not_held_is_compared_by_its_context(memory):
    like_third = [("203.0.113.1", 1, 30.0), ("203.0.113.2", 1, 60.0), ("203.0.113.3", 1, 120.0)]
    assert told(pasts([query(5, like_third, src="198.18.0.1")], memory)["others"])[0] == 15.0
    nearest_by_bits = told(pasts([query(5, src="192.0.3.9")], memory)["others"])
    assert nearest_by_bits[0] == 15.0 and nearest_by_bits[-1] == 12.0


@pytest.mark.parametrize(
    ("theirs", "own", "offset"),
    [
        ([20, 40, 80], [50, 70, 110], 30 * 3 / 4),  # a slower line
        ([50, 70, np.nan], [20, 40, 9], -30 * 2 / 3),  # a faster one; the third is not shared
        ([20, 40, 80], [20, 40, 900], 0),  # one destination that differs moves nothing
        ([80, 160, 320], [20, 40, 80], 0),  # 90 ms less would leave the first with the least, further away than it was
        ([np.nan, np.nan, np.nan], [20, 40, 80], 0),
    ],
)
def test_the_offset_of_two_sources_is_the_median_over_what_they_share_by_hand(theirs, own, offset):
    assert offsets_ms(np.log([theirs, own]), np.log(own)) == pytest.approx([offset, 0.0])
    assert offsets_ms(np.zeros((2, 0)), np.zeros(0)).tolist() == [0, 0]


def test_prefixes_have_no_past(memory):
    part = Query.of(Endpoint.parse("192.0.2.0/24"), Endpoint.parse(DST), T + 5 * HOUR)
    found = pasts([part, query(5)], memory)
    assert [own.count.tolist() for own in found.values()] == [[0, 2], [0, 3]]
    assert pasts([], memory)["pair"].count.tolist() == []
