"""One set of rules for addresses, RTTs and times; the quick way through a column is the slow way."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.data import text_values
from ping_llm.data.measurement import pack_address
from ping_llm.data.text_values import addresses, are_missing, parse_rtt_ms, rtts_ms, times_s


@pytest.mark.parametrize(
    ("text", "rtt_ms"),
    [
        ("12.4", 12.4),
        ("-1", -1.0),
        ("-1.0", -1.0),
        ("0", 0.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e3", 1000.0),
        (" 7 ", 7.0),
        ("+7", 7.0),
    ],
)
def test_an_rtt_is_a_number_of_ms(text, rtt_ms):
    assert parse_rtt_ms(text) == rtt_ms


@pytest.mark.parametrize(
    "text", ["-2", "-0.5", "inf", "1e999", "12,4", "12.4 ms", "1_000", "0x10", "true", "١٢", "NULL", "*"]
)
def test_what_is_no_rtt_is_refused(text):
    with pytest.raises(ValueError, match="must be ms, or −1 for a failed ping"):
        parse_rtt_ms(text)


def test_columns_name_what_is_wrong_by_row_and_know_what_is_missing():
    rtt_ms, errors = rtts_ms(pa.array(["12.4", None, "", "NaN", "fast", "-1", "fast"]))
    np.testing.assert_array_equal(rtt_ms, [12.4, *[np.nan] * 4, -1.0, np.nan])
    assert errors == dict.fromkeys((4, 6), "rtt 'fast' must be ms, or −1 for a failed ping")
    seconds, errors = times_s(pa.array(["2026-01-03T12:00:00", None, " ", "nan", "soon"]))
    assert seconds.tolist() == [1_767_441_600, -1, -1, -1, -1] and errors.keys() == {4}
    packed, errors = addresses(pa.array(["192.0.2.1", None, "", "nan", " ::1 "]))
    assert [row.tobytes() for row in packed] == [pack_address("192.0.2.1"), *[bytes(16)] * 3, pack_address("::1")]
    assert errors.keys() == {3}
    texts = pa.array([None, "", " ", "NaN", "x"])
    assert are_missing(texts).tolist() == [True, True, True, True, False]
    assert are_missing(texts, numbers=False).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("parse", [rtts_ms, times_s, addresses])
def test_no_rows_are_no_values(parse):
    values, errors = parse(pa.array([], pa.string()))
    assert len(values) == 0 and errors == {}


RTTS = st.one_of(
    st.floats(0, 1e6).map(repr), st.sampled_from(["-1", "0.1", "12.400", "1e3", "-1.0", "5.", "-2", "", "00012.5"])
)
TIMES = st.one_of(
    st.datetimes().map(str),
    st.datetimes().map(lambda time: time.isoformat() + "Z"),
    st.integers(0, 10**12).map(str),
    st.sampled_from(
        ["2026-02-30 12:00:00", "1969-12-31 23:59:59", "2026-01-03T25:00:00", "20260104", "2026-01-03 12:00:00.5+00:00"]
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(RTTS, max_size=4), st.lists(TIMES, max_size=4))
def test_the_quick_way_is_the_slow_way(rtts, times):
    for texts, parse, plain in ((rtts, rtts_ms, "_plain_rtts"), (times, times_s, "_plain_times")):
        for column in [pa.array(texts, pa.string()), *(pa.array([one]) for one in texts)]:
            quick, errors = parse(column)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(text_values, plain, lambda column: None)
                slow, wrong = parse(column)
            np.testing.assert_array_equal(quick, slow)
            assert errors == wrong


@pytest.mark.parametrize(
    "text", ["1767441600", "2026-01-03T12:00:00Z", "2026-01-03 12:00:00.123", "2026-01-03 12:00:00+00:00"]
)
def test_usual_times_and_rtts_go_the_quick_way(text, monkeypatch):
    monkeypatch.setattr(text_values, "parse_time", None)
    monkeypatch.setattr(text_values, "parse_rtt_ms", None)
    assert times_s(pa.array([text] * 3))[0].tolist() == [1_767_441_600] * 3
    assert rtts_ms(pa.array(["12.4", "-1", "80"]))[0].tolist() == [12.4, -1.0, 80.0]
