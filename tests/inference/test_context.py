"""What may be context is the same for every function: earlier seconds of the source, or of one host if that is said."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model

from ping_llm.inference.context import Context
from ping_llm.inference.query import Query
from ping_llm.inference.table import History

SRC, DST, AT = "192.0.2.1", "198.51.100.7", 1_700_000_000
OTHER, IPV6 = "192.0.2.9", "2001:db8::1"
MODEL = random_model(16, 256, knows_bytes=True)


def ping(src: str = SRC, time_s: int = AT - 1, rtt: float = 80.0, dst: str = "198.51.100.9") -> dict:
    return {"src_addr": src, "dst_addr": dst, "rtt": rtt, "event_time": time_s}


def in_batch(context, one_host: bool, **own) -> float:
    row = MODEL.rtt_many([ping(dst=DST, time_s=AT) | own], "all", context, one_host=one_host)[0]
    if row.get("error"):
        raise ValueError(row["error"])
    return row["nll_nats"]


def in_batch_by_id(context, one_host: bool) -> float:
    return in_batch([row | {"query_id": "q"} for row in context] or None, one_host, query_id="q")


def log_prob(context, one_host: bool) -> float:
    order = ("time", "src", "dst", "rtt")
    return float(MODEL.log_prob([ping(dst=DST, time_s=AT)], order, context, one_host=one_host)[0])


def in_score(context, one_host: bool) -> float:
    rows = [*context, ping(dst=DST, time_s=AT)]
    return MODEL.score(rows, src_known="all", one_host=one_host)[-1]["nll_nats"]


def found(addresses) -> float:
    return addresses.table.column("probability")[0].as_py()


GIVEN = {  # the answer of each function that is given a context
    "rtt": lambda context, host: MODEL.rtt(SRC, DST, AT, context, "all", one_host=host).mean,
    "rank": lambda context, host: MODEL.rank(SRC, [DST], AT, context, "all", one_host=host).p_none,
    "dst": lambda context, host: found(
        MODEL.destinations(SRC, 9.0, None, AT, context, "198.51.100.4/30", top=1, one_host=host)
    ),
    "complete": lambda context, host: found(
        MODEL.complete("198.51.100.4/30", src=SRC, at=AT, context=context, top=1, one_host=host)
    ),
    "log_prob": log_prob,
    "batch by query_id": in_batch_by_id,
}
CHOSEN = {"score": in_score, "batch": in_batch}  # these choose the context of each from a table
each_given = pytest.mark.parametrize("answer", GIVEN.values(), ids=GIVEN)
each_chosen = pytest.mark.parametrize("answer", CHOSEN.values(), ids=CHOSEN)


@each_given
@pytest.mark.parametrize(("after", "second"), [(0, "2023-11-14T22:13:20Z"), (60, "2023-11-14T22:14:20Z")])
@pytest.mark.parametrize("one_host", [False, True])
def test_a_context_of_the_second_of_the_query_or_later_is_refused(answer, after, second, one_host):
    message = f"a measurement of {second}, which is not earlier than the query at 2023-11-14T22:13:20Z; leave out"
    with pytest.raises(ValueError, match=message):
        answer([ping(), ping(time_s=AT + after)], one_host)
    assert answer([ping(), ping(time_s=AT - 1, rtt=5.0)], one_host) != answer([], one_host)


@each_given
@pytest.mark.parametrize("foreign", [OTHER, IPV6])
def test_a_foreign_host_is_refused_in_both_families_unless_it_is_one_host(answer, foreign):
    context = [ping(foreign, AT - 60), ping()]
    message = f"holds a ping of {foreign}, but the query is about {SRC}; .* pass one_host=True .--one-host."
    with pytest.raises(ValueError, match=message):
        answer(context, False)
    assert answer(context, True) not in (answer(context[1:], True), answer([], True))


@each_chosen
@pytest.mark.parametrize("left_out", [ping(time_s=AT), ping(time_s=AT + 60)])
@pytest.mark.parametrize("one_host", [False, True])
def test_of_a_table_the_same_second_and_later_ones_are_left_out(answer, left_out, one_host):
    alone = answer([ping()], one_host)
    assert answer([ping(), left_out], one_host) == pytest.approx(alone, rel=1e-9)
    assert answer([ping(), left_out | {"event_time": AT - 1}], one_host) != pytest.approx(alone, rel=1e-6)


@each_chosen
@pytest.mark.parametrize("foreign", [OTHER, IPV6])
def test_of_a_table_foreign_hosts_are_left_out_unless_it_is_of_one_host(answer, foreign):
    context = [ping(foreign, AT - 60), ping()]
    assert answer(context, False) == pytest.approx(answer([ping()], False), rel=1e-9)
    distribution = MODEL.rtt(SRC, DST, AT, context, "all", one_host=True)
    assert answer(context, True) == pytest.approx(-distribution.log_density(80.0), abs=1e-4)
    assert answer(context, True) != pytest.approx(answer([ping()], True), abs=1e-3)


def test_a_context_without_times_or_for_a_query_of_any_time_is_taken_as_it_is():
    untimed = [{name: row[name] for name in ("src_addr", "dst_addr", "rtt")} for row in (ping(), ping(rtt=5.0))]
    assert MODEL.rtt(SRC, DST, AT, untimed).context_measurements == 2
    assert MODEL.rtt(SRC, DST, None, [ping(time_s=AT + 9)]).context_measurements == 1


def test_all_measurements_that_are_given_probabilities_are_of_the_source_of_the_context():
    measured = [ping(), ping(IPV6)]
    with pytest.raises(ValueError, match=f"holds a ping of {SRC}, but the query is about {IPV6}"):
        MODEL.log_prob(measured, context=[ping(time_s=AT - 9)])
    assert MODEL.log_prob(measured, context=[ping(time_s=AT - 9)], one_host=True).shape == (2,)


def test_the_context_is_earlier_than_the_first_of_the_measurements_that_are_given_probabilities():
    with pytest.raises(ValueError, match="not earlier than the query at 2023-11-14T22:13:20Z"):
        MODEL.log_prob([ping(time_s=AT + 9), ping(time_s=AT)], context=[ping(time_s=AT)])


def test_what_is_too_much_to_be_read_is_checked_too():
    context = [ping(OTHER, AT - 99), *(ping(time_s=AT - 60 + i) for i in range(50))]
    with pytest.raises(ValueError, match=f"holds a ping of {OTHER}"):
        in_batch_by_id(context, False)
    assert in_batch_by_id(context, True) == pytest.approx(in_batch_by_id(context[1:], True), rel=1e-9)


def test_measurements_of_one_second_have_the_same_past_and_none_of_each_other():
    rows = [ping(time_s=AT - 9), ping(time_s=AT - 5), ping(time_s=AT), ping(time_s=AT, rtt=5.0), ping(time_s=AT + 1)]
    times = [q.context.time_s.tolist() for q in History(Context.parse(rows), 2).queries(range(5))]
    assert times == [[], [AT - 9], [AT - 9, AT - 5], [AT - 9, AT - 5], [AT, AT]]
    past = MODEL.rtt(SRC, "198.51.100.9", AT, rows[:2])
    scored = [row["nll_nats"] for row in MODEL.score(rows)]
    assert scored[2:4] == pytest.approx([-past.log_density(80.0), -past.log_density(5.0)], abs=1e-4)


def test_without_times_the_past_is_what_stands_before_it_in_the_table():
    rows = [{"src_addr": src, "dst_addr": DST, "rtt": i} for i, src in enumerate((SRC, IPV6, SRC, SRC))]
    for one_host, expected in ((False, [[], [], [0], [0, 2]]), (True, [[], [0], [0, 1], [1, 2]])):
        queries = History(Context.parse(rows, one_host), 2).queries(range(4))
        assert [query.context.rtt_ms.tolist() for query in queries] == expected


def test_the_flag_stays_with_the_measurements_that_are_taken():
    context = Context.parse([ping(OTHER), ping(IPV6)], one_host=True)
    assert context.take(slice(1)).one_host and len(Query.parse(SRC, DST, AT, context.take(slice(1))).context) == 1
    assert not Context(context.src, context.dst, context.rtt_ms, context.time_s).one_host


rows_of = st.lists(
    st.builds(
        ping,
        src=st.sampled_from([SRC, OTHER, IPV6]),
        time_s=st.integers(AT, AT + 3),
        rtt=st.sampled_from([-1.0, 5.0, 80.0]),
        dst=st.sampled_from([DST, "2001:db8::7"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=12, deadline=None)
@given(rows_of, st.booleans())
def test_score_and_batch_give_the_same_answer_after_the_same_history(rows, one_host):
    scored = [row["nll_nats"] for row in MODEL.score(rows, history=len(rows), one_host=one_host)]
    answered = [row["nll_nats"] for row in MODEL.rtt_many(rows, "auto", rows, one_host=one_host)]
    np.testing.assert_allclose(scored, answered, atol=1e-4)
    for row, nll in zip(rows, scored, strict=True):  # and rtt, where the history is found by its definition
        past = [
            r for r in rows if (one_host or r["src_addr"] == row["src_addr"]) and r["event_time"] < row["event_time"]
        ]
        past.sort(key=lambda r: r["event_time"])
        alone = MODEL.rtt(row["src_addr"], row["dst_addr"], row["event_time"], past, one_host=one_host)
        assert -alone.log_density(row["rtt"]) == pytest.approx(nll, abs=1e-4)
