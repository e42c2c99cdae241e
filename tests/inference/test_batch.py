"""A table of queries gets, row for row, the answers that each query gets alone."""

import logging

import numpy as np
import pyarrow as pa
import pytest
from random_model import random_model

from ping_llm.inference import batch
from ping_llm.inference.batch import ANSWER_COLUMNS, SCORE_COLUMNS
from ping_llm.inference.distribution import QUANTILES
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Endpoint, Query

SOURCES = ("192.0.2.1", "192.0.2.9", "2001:db8::1")
CONTEXT = [
    {
        "src_addr": SOURCES[i % 3],
        "dst_addr": f"198.51.100.{i}",
        "rtt": -1.0 if i == 4 else 5.0 + i,
        "event_time": 1000 * i,
    }
    for i in range(12)
]
QUERIES = [
    {"src_addr": "192.0.2.1", "dst_addr": "198.51.100.7", "event_time": 9_500, "rtt": 12.0},
    {"src_addr": "192.0.2.1", "dst_addr": "198.51.100.8", "event_time": 9_000, "rtt": -1.0},
    {"src_addr": "2001:db8::1", "dst_addr": "2001:db8::7", "event_time": 100_000, "rtt": 1e9},
    {"src_addr": "192.0.2.0/24", "dst_addr": "198.51.0.0/16", "event_time": 8_000, "rtt": 80.0},
    {"src_addr": None, "dst_addr": "198.51.100.7", "event_time": 9_500, "rtt": 12.0},
    {"src_addr": "192.0.2.9", "dst_addr": None, "event_time": None, "rtt": None},
    {"src_addr": "203.0.113.1", "dst_addr": "198.51.100.7", "event_time": 9_500, "rtt": 3.0},
    {"src_addr": "192.0.2.1", "dst_addr": "198.51.100.7", "event_time": 9_500, "rtt": 99.0},
    {"src_addr": "192.0.2.9", "dst_addr": "198.51.96.0/20", "event_time": 9_500, "rtt": 7.0},
]


def answer_table(model, queries, *context, **options):
    """Answers to records as a table."""
    table = pa.Table.from_pylist(queries) if isinstance(queries, list) else queries
    return batch.answer_table(model, table, *context, **options)


@pytest.fixture(scope="module")
def model() -> PingModel:
    return random_model(32, 128)


def alone(model, row, context=None, src_known="auto"):
    """The row of the table, from the answer to one query."""
    distribution = model.rtt(row["src_addr"], row["dst_addr"], row.get("event_time"), context, src_known)
    answer = [distribution.p_fail, distribution.mean, *(distribution.quantile(q) for q in QUANTILES)]
    observed = row.get("rtt")
    if observed is None:
        return [*answer, None, None, None]
    failed = observed == -1
    scores = [None, None] if failed else [distribution.crps(observed), distribution.pit(observed)]
    return [*answer, -distribution.log_density(observed), *scores]


def earlier(row):
    """What the context for all says to a query."""
    if row["src_addr"] is None:
        return []
    end = Endpoint.parse(row["src_addr"])
    until = float("inf") if row["event_time"] is None else row["event_time"]
    packed = np.array([list(Endpoint.parse(c["src_addr"]).packed) for c in CONTEXT], dtype=np.uint8)
    return [c for c, covers in zip(CONTEXT, end.covers(packed), strict=True) if covers and c["event_time"] < until]


def assert_equal(table, rows, rel=1e-6):
    for found, expected in zip(table.to_pylist(), rows, strict=True):
        values = [found[name] for name in ANSWER_COLUMNS + SCORE_COLUMNS]
        assert [value is None for value in values] == [value is None for value in expected]
        numbers = [(v, e) for v, e in zip(values, expected, strict=True) if v is not None]
        np.testing.assert_allclose(*zip(*numbers, strict=True), rtol=rel, atol=rel)


def test_each_row_is_what_its_query_gets_alone_after_the_earlier_pings_of_its_source(model):
    table = answer_table(model, QUERIES, CONTEXT)
    assert table.column_names == ["query_id", *ANSWER_COLUMNS, *SCORE_COLUMNS]
    assert table.column("query_id").to_pylist() == list(range(len(QUERIES)))
    assert_equal(table, [alone(model, row, earlier(row)) for row in QUERIES])
    assert [len(earlier(row)) for row in QUERIES] == [4, 3, 4, 6, 0, 4, 0, 4, 3]  # so that it has been tried


def test_context_of_a_query_id_is_given_to_that_query_alone(model):
    queries = [row | {"query_id": f"q{i}"} for i, row in enumerate(QUERIES[:3])]
    own = [c | {"query_id": "q1"} for c in CONTEXT if c["src_addr"] == "192.0.2.1"][:3]
    everyone = [c | {"query_id": None} for c in CONTEXT if c["src_addr"] == "2001:db8::1"]
    table = answer_table(model, queries, own + everyone, "all")
    contexts = [[], own, everyone]
    assert_equal(table, [alone(model, row, c, "all") for row, c in zip(queries, contexts, strict=True)])
    assert table.column("query_id").to_pylist() == ["q0", "q1", "q2"]


def test_answers_do_not_depend_on_the_order_of_rows_or_the_size_of_chunks(model, monkeypatch):
    table = answer_table(model, QUERIES, CONTEXT)
    monkeypatch.setattr(batch, "CHUNK", 3)
    shuffled = [5, 2, 7, 0, 8, 3, 6, 1, 4]
    other = answer_table(model, [QUERIES[i] for i in shuffled], CONTEXT[::-1])
    back = other.take(np.argsort(shuffled))
    for name in ANSWER_COLUMNS + SCORE_COLUMNS:
        a, b = (t.column(name).to_numpy(zero_copy_only=False).astype(float) for t in (table, back))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_queries_that_are_equal_are_answered_once(model, monkeypatch):
    answered = []
    answer = batch.distributions
    monkeypatch.setattr(batch, "distributions", lambda reader, q, *rest: answered.extend(q) or answer(reader, q, *rest))
    table = answer_table(model, [QUERIES[0] | {"rtt": float(i + 1)} for i in range(50)], CONTEXT, "all")
    assert len(answered) == 1
    assert len(set(table.column("p_fail").to_pylist())) == 1 and len(set(table.column("pit").to_pylist())) == 50


def test_of_a_long_context_no_more_is_kept_than_may_fit_and_the_answer_is_the_same(model):
    rng = np.random.default_rng(0)
    long = [
        {"src_addr": "192.0.2.1", "dst_addr": f"198.51.100.{rng.integers(40)}", "rtt": 10.0 + i, "event_time": 60 * i}
        for i in range(600)
    ]
    row = {"src_addr": "192.0.2.1", "dst_addr": "198.51.100.7", "event_time": 50_000}
    assert_equal_answers(answer_table(model, [row], long, "none"), alone(model, row, long, "none"))


def assert_equal_answers(table, expected):
    found = table.to_pylist()[0]
    np.testing.assert_allclose([found[name] for name in ANSWER_COLUMNS], expected[: len(ANSWER_COLUMNS)], rtol=1e-6)
    assert not set(SCORE_COLUMNS) & set(table.column_names)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"src_addr": "192.0.2.300"}, "'192.0.2.300' is not an IPv4 or IPv6 address"),
        ({"dst_addr": "0.0.0.0"}, "'0.0.0.0' is the unspecified address"),
        ({"dst_addr": "::"}, "'::' is the unspecified address"),
        ({"dst_addr": "198.51.100.0/33"}, "must be a number from 0 to 32"),
        ({"src_addr": None, "dst_addr": None}, "give the source or the destination of the ping, or both"),
        ({"event_time": "yesterday"}, "'yesterday' is not a time"),
        ({"rtt": -5.0}, "rtt -5 must be ms, or −1 for a failed ping"),
        ({"rtt": float("inf")}, "must be ms"),
    ],
)
def test_a_bad_row_says_why_and_the_rest_is_answered(model, spoil, message):
    good = QUERIES[0] | {"event_time": "1970-01-01T02:38:20Z"}
    table = pa.Table.from_pylist(batch.answer_table(model, [good, good | spoil, good]))
    first, bad, last = table.to_pylist()
    assert message in bad["error"] and "\n" not in bad["error"]
    assert all(bad[name] is None for name in ANSWER_COLUMNS + SCORE_COLUMNS)
    assert first["error"] is None and last["error"] is None
    assert_equal(table.take([0, 2]), [alone(model, QUERIES[0])] * 2)


def test_a_context_of_its_own_that_does_not_belong_to_a_query_is_an_error_of_that_row(model):
    queries = [row | {"query_id": i} for i, row in enumerate(QUERIES[:2])]
    later = [CONTEXT[0] | {"query_id": 0, "event_time": 20_000}]
    foreign = [CONTEXT[1] | {"query_id": 1}]
    rows = answer_table(model, queries, later + foreign).to_pylist()
    assert (
        "not earlier than the query at 1970-01-01T02:38:20Z" in rows[0]["error"]
        and "holds a ping of 192.0.2.9" in rows[1]["error"]
    )


@pytest.mark.parametrize(
    ("queries", "context", "message"),
    [
        ([], None, "there are no queries"),
        ([{"src": "192.0.2.1", "dst_addr": "192.0.2.9"}], None, "unknown column src; did you mean src_addr?"),
        ([QUERIES[0] | {"src_addr": "192.0.2.1"}, {}], [{"rtt": 1.0}], "the context has no column src_addr"),
        ([{"src_addr": "192.0.2.1", "dst_addr": "192.0.2.9", "rtt_ms": 1.0}], None, "rtt_ms; did you mean rtt?"),
        ([{"src_addr": "192.0.2.1", "dst_addr": "192.0.2.9", "start_time": 1}], None, "did you mean event_time?"),
        (QUERIES, [CONTEXT[0] | {"rtt": -3.0}], "context row 1: rtt -3 must be ms"),
        (QUERIES, [CONTEXT[0], CONTEXT[1] | {"dst_addr": "x"}], "context row 2: 'x' is not an IPv4"),
        (QUERIES, [CONTEXT[0] | {"query_id": 1}], "give both or neither one"),
        ("queries.csv", None, "is no table"),
    ],
)
def test_bad_tables_are_one_clear_error(model, queries, context, message):
    with pytest.raises(ValueError, match=r".") as error:
        answer_table(model, queries, context)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_length_no_source_can_have_is_an_error_and_one_that_a_source_cannot_is_an_error_of_its_row(model):
    with pytest.raises(ValueError, match="src_known='most' must be auto"):
        answer_table(model, QUERIES, src_known="most")
    rows = answer_table(model, QUERIES[:3], src_known=48).to_pylist()
    assert "src_known=48" in rows[0]["error"] and rows[2]["error"] is None


def test_what_is_odd_is_warned_of(model, caplog):
    with caplog.at_level(logging.WARNING):
        answer_table(model, QUERIES[:1], CONTEXT[::-1], "all")
        answer_table(model, [QUERIES[6]], CONTEXT, "all")
        answer_table(model, [QUERIES[0] | {"query_id": 1}], [CONTEXT[0] | {"query_id": 2}], "all")
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings[0] == "the context is not in the order of event_time; it was put in order"
    assert "no query is of a source of the context" in warnings[1]
    assert "1 rows of the context belong to no query" in warnings[2]


def test_rtt_many_takes_tables_of_arrow_and_of_others_that_hand_out_arrow(model):
    table = pa.Table.from_pylist(QUERIES)

    class Frame:  # as those of pandas and polars
        def __arrow_c_stream__(self, schema=None):
            return table.__arrow_c_stream__(schema)

    answers = model.rtt_many(table, "all", pa.Table.from_pylist(CONTEXT))
    assert model.rtt_many(Frame(), "all", CONTEXT).equals(answers)
    assert model.rtt_many(QUERIES, "all", CONTEXT) == answers.to_pylist()


def test_answers_and_scores_are_of_the_kind_that_was_given(model):
    expected = answer_table(model, QUERIES, CONTEXT, "all")
    assert model.rtt_many(QUERIES, "all", CONTEXT) == expected.to_pylist()
    columns = {name: [row[name] for row in QUERIES] for name in QUERIES[0]}
    assert model.rtt_many(columns, "all", CONTEXT) == expected.to_pydict()
    scored = model.score(pa.Table.from_pylist(CONTEXT), src_known="all")
    assert model.score(CONTEXT, src_known="all") == scored.to_pylist()
    with pytest.raises(ValueError, match="a list of Query is no table"):
        model.rtt_many([Query.parse("192.0.2.1", None), QUERIES[0]])


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_is_answered_by_a_frame(model, library):
    frames = pytest.importorskip(library)
    rows = [row | {"query_id": f"q{i}"} for i, row in enumerate(QUERIES)]
    given, context = frames.DataFrame(rows), frames.DataFrame(CONTEXT)
    if library == "pandas":
        given.index = range(9, 0, -1)
    answers, scored = model.rtt_many(given, "all", context), model.score(context, src_known="all", anomaly_at=0.5)
    assert type(answers) is type(scored) is frames.DataFrame
    assert library == "polars" or list(answers.index) == list(range(9, 0, -1))
    expected = model.rtt_many(rows, "all", CONTEXT)
    assert list(answers.columns) == list(expected[0]) and list(answers["query_id"]) == [row["query_id"] for row in rows]
    for name in ANSWER_COLUMNS + SCORE_COLUMNS:
        wanted = [float("nan") if row[name] is None else row[name] for row in expected]
        found = [float("nan") if value is None else value for value in answers[name]]
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert list(scored.columns) == [*CONTEXT[0], "nll_nats", "pit", "p_value", "anomaly"]
    assert list(scored["rtt"]) == [row["rtt"] for row in CONTEXT] and set(scored["anomaly"]) <= {True, False}


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.string(), pa.timestamp("ns"), pa.timestamp("s", "UTC")])
def test_times_of_any_type_are_the_same_times(model, kind):
    times = pa.array([9_500, 100_000])
    if pa.types.is_string(kind):
        times = pa.array(["1970-01-01T02:38:20", "1970-01-02T04:46:40+01:00"])
    else:
        times = times.cast(pa.timestamp("s")).cast(kind) if pa.types.is_timestamp(kind) else times.cast(kind)
    rows = {"src_addr": ["192.0.2.1"] * 2, "dst_addr": ["198.51.100.7"] * 2}
    given = answer_table(model, pa.table({**rows, "event_time": times}), src_known="all")
    assert given.equals(answer_table(model, pa.table({**rows, "event_time": [9_500, 100_000]}), src_known="all"))
