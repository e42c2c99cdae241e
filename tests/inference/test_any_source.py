"""A context of any source: pings of other hosts are let in where that is said, and the model sees whose they are."""

from dataclasses import replace

import pytest
from random_model import random_model
from reference_decoder import decode

from ping_llm.inference.context import Context
from ping_llm.inference.prompt import build_prompt, fitting_places
from ping_llm.inference.query import Query

SRC, DST, AT = "192.0.2.1", "198.51.100.7", 1_700_000_000
NEIGHBOUR, OTHER, IPV6 = "192.0.2.9", "203.0.113.5", "2001:db8::1"
MODEL = random_model(16, 256, knows_bytes=True)


def ping(src: str = SRC, time_s: int = AT - 1, rtt: float = 80.0, dst: str = "198.51.100.9") -> dict:
    return {"src_addr": src, "dst_addr": dst, "rtt": rtt, "event_time": time_s}


def query_of(context, dst: str | None = DST, src: str = SRC) -> Query:
    return Query.parse(src, dst, AT, Context.parse(context, any_source=True))


def found(addresses) -> float:
    return addresses.table.column("probability")[0].as_py()


def in_batch(context, any_source: bool, **own) -> float:
    row = MODEL.rtt_many([ping(dst=DST, time_s=AT) | own], "all", context or None, any_source=any_source)[0]
    if row.get("error"):
        raise ValueError(row["error"])
    return row["nll_nats"]


GIVEN = {  # the answer of each function that is given a context
    "rtt": lambda context, some: MODEL.rtt(SRC, DST, AT, context, "all", any_source=some).mean,
    "rank": lambda context, some: MODEL.rank(SRC, [DST], AT, context, "all", any_source=some).p_none,
    "dst": lambda context, some: found(
        MODEL.destinations(SRC, 9.0, None, AT, context, "198.51.100.4/30", top=1, any_source=some)
    ),
    "complete": lambda context, some: found(
        MODEL.complete("198.51.100.4/30", src=SRC, at=AT, context=context, top=1, any_source=some)
    ),
    "log_prob": lambda context, some: float(
        MODEL.log_prob([ping(dst=DST, time_s=AT)], context=context, any_source=some)[0]
    ),
    "batch by query_id": lambda context, some: in_batch(
        [row | {"query_id": "q"} for row in context], some, query_id="q"
    ),
}


@pytest.mark.parametrize("answer", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("foreign", [OTHER, IPV6])
def test_every_function_takes_pings_of_other_hosts_where_that_is_said(answer, foreign):
    context = [ping(foreign, AT - 60), ping()]
    with pytest.raises(
        ValueError, match=r"holds a ping of .* or any_source=True \(--any-source\) if pings of other hosts"
    ):
        answer(context, False)
    assert answer(context, True) not in (answer(context[1:], True), answer(context[:1], True))
    assert answer(context[1:], True) == pytest.approx(answer(context[1:], False), rel=1e-12)


def test_they_must_be_earlier_than_the_query_too():
    with pytest.raises(ValueError, match="not earlier than the query at 2023-11-14T22:13:20Z"):
        query_of([ping(OTHER, AT)])


def test_all_sources_are_one_host_or_they_are_several():
    with pytest.raises(ValueError, match="one_host and any_source exclude each other"):
        Context.parse([ping(OTHER)], one_host=True, any_source=True)


def sources_seen(query: Query) -> list[tuple[str, int]]:
    """Of the context, with the bits that are told of each."""
    return [(one.src, one.src_bits) for one in decode(build_prompt(query, 256).context)]


@pytest.mark.parametrize(("known", "bits", "own"), [("all", 32, SRC), (16, 16, "192.0.0.0"), ("none", 0, "0.0.0.0")])
def test_what_is_known_of_the_source_cuts_its_own_pings_and_no_others(known, bits, own):
    (variant,) = query_of([ping(OTHER), ping(), ping(NEIGHBOUR), ping(IPV6)]).variants(known)
    assert sources_seen(variant) == [(OTHER, 32), (own, bits), (NEIGHBOUR, 32), (IPV6, 128)]
    (again,) = variant.variants("none")
    assert sources_seen(again) == [(OTHER, 32), ("0.0.0.0", 0), (NEIGHBOUR, 32), (IPV6, 128)]


def test_the_pings_of_a_prefix_or_of_one_host_are_all_its_own():
    prefix = query_of([ping(OTHER), ping(NEIGHBOUR)], src="192.0.2.0/24")
    assert sources_seen(prefix) == [(OTHER, 32), ("192.0.2.0", 24)]
    host = Query.parse(SRC, DST, AT, Context.parse([ping(OTHER), ping(IPV6)], one_host=True))
    assert [sources_seen(one) for one in host.variants(16)] == [[("203.0.0.0", 16), ("2001:db8::", 64)]]


def test_of_a_context_that_is_too_long_other_hosts_pings_elsewhere_are_left_out_first():
    kinds = [ping(), ping(OTHER), ping(OTHER, dst=DST), ping(OTHER), ping(dst=DST)]
    query = query_of([row | {"event_time": AT - 9 + i} for i, row in enumerate(kinds)])
    order = []
    for seq_len in range(256, 20, -1):
        places = set(fitting_places(query, seq_len).tolist())
        order += sorted(set(range(5)) - places - set(order))
    assert order == [1, 3, 0, 2, 4]
    whole = replace(query, context=replace(query.context, any_source=False))
    assert fitting_places(whole, 90).tolist() != fitting_places(query, 90).tolist()


def test_in_a_table_a_ping_of_any_host_is_context_of_every_later_query():
    context = [ping(OTHER, AT - 60), ping(IPV6, AT - 30, 5.0), ping(time_s=AT - 20), ping(OTHER, AT)]
    alone = MODEL.rtt(SRC, DST, AT, context[:3], "all", any_source=True)
    assert in_batch(context, True) == pytest.approx(-alone.log_density(80.0), abs=1e-4)
    assert in_batch(context, False) == pytest.approx(in_batch(context[2:3], False), rel=1e-9)


def test_of_a_long_table_the_sources_own_pings_are_kept_as_for_a_query_alone():
    own = [ping(time_s=AT - 900 + i, rtt=5.0 + i) for i in range(12)]
    others = [ping(OTHER, AT - 500 + i, 90.0) for i in range(120)]
    alone = MODEL.rtt(SRC, DST, AT, own + others, "all", any_source=True)
    assert in_batch(own + others, True) == pytest.approx(-alone.log_density(80.0), abs=1e-7)
    assert in_batch(own + others, True) != pytest.approx(in_batch(others, True), abs=1e-5)
