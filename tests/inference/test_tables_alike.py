"""The same table gives the same answers in every kind of table, in every time zone, in any order and number of rows."""

import datetime as dt
import decimal
import io
import ipaddress
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_model import random_model

from ping_llm.data.text_table import open_table, table_of
from ping_llm.inference.batch import ANSWER_COLUMNS, SCORE_COLUMNS, answer_table
from ping_llm.inference.context import Context

MODEL = random_model(16, 128)
ZONES = ("UTC", "America/New_York", "Asia/Tokyo")
AT = 1_767_441_600  # 2026-01-03T12:00:00Z
ROW = {"src_addr": "192.0.2.1", "dst_addr": "198.51.100.7", "rtt": 12.4}
UUID = "6F9619FF-8B86-D011-B42D-00CF4FC964FF"
IDS = ["1e3", "1000", "1.10", "1.1", "007", "7", UUID, "t", "2026-1-4", "98446744073709551615"]
SRC = ("192.0.2.1", "2001:db8::1")
DST = ("198.51.100.7", "198.51.100.8")


def utc(second):
    return None if second is None else dt.datetime.fromtimestamp(second, dt.UTC)


def columns(rows):
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def mapped(rows, **functions):
    """The rows with a function of each value that is not missing; what is missing stays so."""
    return [
        {name: functions.get(name, lambda v: v)(v) if v is not None else None for name, v in row.items()}
        for row in rows
    ]


def csv(rows):
    names = list(columns(rows))
    lines = [",".join("" if row.get(name) is None else str(row[name]) for name in names) for row in rows]
    return "\n".join([",".join(names), *lines])


def file(content):
    return open_table(io.BytesIO(content.encode() if isinstance(content, str) else content)).read_as_given()


def of_csv(rows):
    forms = (lambda s: utc(s).isoformat(), lambda s: f"{utc(s):%Y-%m-%d %H:%M:%S}", str)
    return file(csv([mapped([row], event_time=forms[i % 3])[0] for i, row in enumerate(rows)]))


def of_tsv(rows):
    east = dt.timezone(dt.timedelta(hours=9))
    return file(csv(mapped(rows, event_time=lambda s: utc(s).astimezone(east).isoformat())).replace(",", "\t"))


def of_json(rows):
    return file(json.dumps(mapped(rows, event_time=lambda s: utc(s).isoformat()[:19]), indent=1))


def of_json_lines(rows):
    there = [{name: value for name, value in row.items() if value is not None} | {"note": [1]} for row in rows]
    return file("\n".join(map(json.dumps, there)))


def typed(rows, unit="us", zone="UTC"):
    found = {name: pa.array(values) for name, values in columns(rows).items()}
    found["event_time"] = pa.array(found["event_time"], pa.timestamp("s")).cast(pa.timestamp(unit, zone))
    return pa.table(found)


def of_parquet(rows):
    sink = io.BytesIO()
    pq.write_table(typed(rows, "ms", "Asia/Tokyo"), sink)
    return file(sink.getvalue())


def of_arrow_file(rows):
    table, sink = typed(rows, "ns", None), io.BytesIO()
    for name in ("query_id", "src_addr"):
        if name in table.column_names:
            place = table.column_names.index(name)
            table = table.set_column(place, name, table.column(name).cast(pa.large_string()).dictionary_encode())
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return file(sink.getvalue())


def of_pandas(rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(mapped(rows, event_time=utc, src_addr=ipaddress.ip_address))
    if "query_id" in frame:
        frame["query_id"] = frame["query_id"].astype("category")
    frame["event_time"] = pandas.to_datetime(frame["event_time"], utc=True).dt.tz_convert("America/New_York")
    return frame


def of_polars(rows):
    polars = pytest.importorskip("polars")
    found = columns(mapped(rows, event_time=lambda s: utc(s).replace(tzinfo=None)))
    kinds = {"rtt": polars.Float64, "event_time": polars.Datetime("us"), "src_addr": polars.Categorical}
    series = [polars.Series(name, values, dtype=kinds.get(name, polars.String)) for name, values in found.items()]
    return polars.DataFrame(series)


def of_records(rows):
    there = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return mapped(there, rtt=np.float64, event_time=utc, dst_addr=ipaddress.ip_address)


def of_columns(rows):
    found = columns(mapped(rows, rtt=lambda rtt: decimal.Decimal(str(rtt)), event_time=np.int64))
    return found | {"src_addr": np.array(found["src_addr"])}


FILES = (of_csv, of_tsv, of_json, of_json_lines, of_parquet, of_arrow_file)
SHAPES = {made.__name__: made for made in (*FILES, of_pandas, of_polars, of_records, of_columns)}
each_shape = pytest.mark.parametrize("made", SHAPES.values(), ids=SHAPES)


def answers(table):
    """Rows of answers, whatever the kind: the id as text, and numbers."""
    names = [*ANSWER_COLUMNS, *SCORE_COLUMNS]
    rows = table_of(table).read_text(["query_id", *names, "error"]).to_pylist()
    assert not any(row.get("error") for row in rows), rows
    return [(row["query_id"], [float(row.get(name) or "nan") for name in names]) for row in rows]


def equal(found, expected):
    """Whether rows of records are the same but for rounding."""
    found, expected = answers(found), answers(expected)
    return len(found) == len(expected) and all(
        one[0] == other[0] and one[1] == pytest.approx(other[1], rel=1e-9, nan_ok=True)
        for one, other in zip(found, expected, strict=True)
    )


queries_of = st.lists(
    st.fixed_dictionaries(
        {
            "query_id": st.sampled_from(IDS),
            "src_addr": st.sampled_from(SRC),
            "dst_addr": st.sampled_from(DST),
            "event_time": st.sampled_from([None, AT, AT + 43_200]),
            "rtt": st.sampled_from([None, -1.0, 0.4, 12.4, 80.0]),
        }
    ),
    min_size=2,
    max_size=3,
    unique_by=lambda row: row["query_id"],
)
QUERIES = [
    {"query_id": "1e3", "src_addr": SRC[0], "dst_addr": DST[0], "event_time": AT, "rtt": 12.4},
    {"query_id": "1000", "src_addr": SRC[0], "dst_addr": DST[0], "event_time": AT, "rtt": 12.4},
]


def context_of(queries):
    """Of each query some of its own, which only it may see, and some for all."""
    own = [
        {"query_id": query["query_id"], "src_addr": query["src_addr"], "dst_addr": DST[1]}
        | {"rtt": 0.4 + place, "event_time": AT - 9 - place}
        for place, query in enumerate(queries)
    ]
    return [*own, {"query_id": None, "src_addr": SRC[0], "dst_addr": DST[0], "rtt": -1.0, "event_time": AT - 60}]


@each_shape
@settings(max_examples=5, deadline=None)
@given(queries_of)
@example(QUERIES)
def test_the_same_table_gives_the_same_answers(made, queries):
    context = context_of(queries)
    alone = []
    for query, own in zip(queries, context, strict=False):
        earlier = [row for row in (context[-1], own) if row["src_addr"] == query["src_addr"]]
        one = MODEL.rtt(query["src_addr"], query["dst_addr"], query["event_time"], earlier, "all")
        alone.append((query["query_id"], one.p_fail, one.median))
    with pytest.MonkeyPatch.context() as patch:
        for name in ZONES:
            patch.setenv("TZ", name)
            time.tzset()
            found = answers(answer_table(MODEL, made(queries), made(context), "all"))
            back = answers(answer_table(MODEL, made(queries[::-1]), made(context[::-1]), "all"))[::-1]
            for row, other, (query_id, *expected) in zip(found, back, alone, strict=True):
                assert row[0] == other[0] == query_id
                assert row[1] == pytest.approx(other[1], rel=1e-9, nan_ok=True)
                assert [row[1][0], row[1][ANSWER_COLUMNS.index("q0.5")]] == pytest.approx(expected, rel=1e-6)
    time.tzset()


@each_shape
def test_what_stands_after_20480_rows_is_read_alike(made):
    rows = [{"src_addr": SRC[0], "dst_addr": DST[0], "rtt": -1, "event_time": AT - 20_530 + i} for i in range(20_500)]
    rows += [row | {"rtt": 0.4 + i, "event_time": AT + i} for i, row in enumerate(rows[:30])]
    context = Context.parse(made(mapped(rows, rtt=float)))
    assert context.rtt_ms.tolist() == [row["rtt"] for row in rows]
    assert context.time_s.tolist() == [row["event_time"] for row in rows]


@each_shape
def test_a_row_that_is_wrong_is_the_same_error_in_every_kind(made):
    context = context_of(QUERIES)
    untimed = [row | {"event_time": None} if place == 1 else row for place, row in enumerate(context)]
    with pytest.raises(ValueError, match="context row 2: event_time is missing; give it in every row, or in none"):
        answer_table(MODEL, made(QUERIES), made(untimed))
    with pytest.raises(ValueError, match=r"context row 3: rtt -2(\.0)? must be ms"):
        answer_table(MODEL, made(QUERIES), made([*context[:2], context[2] | {"rtt": -2.0}]))
    with pytest.raises(ValueError, match="context row 1: rtt is missing"):
        answer_table(MODEL, made(QUERIES), made([context[0] | {"rtt": None}, *context[1:]]))


def test_of_several_rows_that_are_wrong_the_first_is_named():
    rows = [ROW, ROW | {"rtt": "slow"}, ROW | {"src_addr": "x"}]
    for order, message in (((0, 1, 2), "context row 2: rtt 'slow'"), ((0, 2, 1), "context row 2: 'x' is not an")):
        with pytest.raises(ValueError, match=message):
            Context.parse([rows[place] for place in order])


def test_spaces_around_a_value_do_not_count_and_a_blank_endpoint_is_any():
    spaced = answer_table(MODEL, [{**ROW, "src_addr": " 192.0.2.1", "rtt": " 12.4 "}, {**ROW, "src_addr": " "}])
    plain = answer_table(MODEL, [ROW, {**ROW, "src_addr": None}])
    assert equal([one | {"query_id": None} for one in spaced], [one | {"query_id": None} for one in plain])


@each_shape
def test_times_that_are_missing_from_every_row_are_not_known(made):
    rows = [row | {"event_time": None} for row in context_of(QUERIES)]
    assert Context.parse(made(rows)).time_s is None


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, "1"), (np.int64(1), 1), (1, decimal.Decimal(1))])
def test_a_number_is_one_id_whatever_its_type(one, other):
    queries, context = [QUERIES[0] | {"query_id": one}], context_of(QUERIES)[:1]
    joined = answer_table(MODEL, queries, [context[0] | {"query_id": other}])
    assert equal(joined, answer_table(MODEL, queries, [context[0] | {"query_id": one}]))
    assert not equal(joined, answer_table(MODEL, queries))


TWO = [("1.10", "1.1"), ("1e3", "1000"), ("007", "7"), ("1", "1.0"), ("a", "A"), ("a", "a ")]


@pytest.mark.parametrize(("one", "other"), TWO)
def test_ids_that_are_written_in_two_ways_are_two(one, other, caplog):
    queries, context = [QUERIES[0] | {"query_id": one}], context_of(QUERIES)[:1]
    assert equal(answer_table(MODEL, queries, [context[0] | {"query_id": other}]), answer_table(MODEL, queries))
    assert "1 rows of the context belong to no query" in caplog.text


@pytest.mark.parametrize("first", [{}, {"query_id": None}, {"query_id": ""}, {"query_id": float("nan")}])
def test_the_context_of_one_query_never_reaches_another(first):
    queries = [QUERIES[0] | {"query_id": name} for name in (1, 2)]
    everyone, own = ({**row} for row in context_of(QUERIES)[:2])
    everyone.pop("query_id")
    context = [everyone | first, own | {"query_id": 2, "rtt": 900.0}]
    found = answer_table(MODEL, queries, context)
    alone = [answer_table(MODEL, [query], [everyone]) for query in queries]
    assert equal(found[:1], alone[0]) and not equal(found[1:], alone[1])


def test_records_may_differ_in_their_keys():
    timed, untimed = QUERIES[0], {name: QUERIES[0][name] for name in ("src_addr", "dst_addr")}
    found = answer_table(MODEL, [untimed, timed])
    assert found[0]["query_id"] is None and found[1]["query_id"] == "1e3"
    assert found[0]["nll_nats"] is None and equal(found[1:], answer_table(MODEL, [timed]))
    assert found[1]["p_fail"] != found[0]["p_fail"]
    assert equal(answer_table(MODEL, [timed, untimed]), found[::-1])
