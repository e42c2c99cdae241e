"""A value has one text, whatever library holds it; what has none is refused by the name of its type."""

import datetime as dt
import decimal
import enum
import ipaddress
import uuid

import numpy as np
import pyarrow as pa
import pytest

from ping_llm.data.as_text import text_column, text_of

UTC = dt.UTC
NOON = dt.datetime(2026, 1, 3, 12)


class Word(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (float("nan"), None),
        (np.datetime64("NaT"), None),
        (decimal.Decimal("NaN"), None),
        ("1.10", "1.10"),
        (np.str_(" a"), " a"),
        (Word.RED, "red"),
        (b"192.0.2.1", "192.0.2.1"),
        (True, "true"),
        (np.bool_(False), "false"),
        (98446744073709551615, "98446744073709551615"),
        (np.uint64(2**64 - 1), "18446744073709551615"),
        (np.int8(-1), "-1"),
        (np.array(7), "7"),
        (12.4, "12.4"),
        (np.float64(12.4), "12.4"),
        (np.float32(12.4), "12.4"),
        (np.float16(12.4), "12.4"),
        (1.0, "1"),
        (-1.0, "-1"),
        (float(2**53 - 1), "9007199254740991"),
        (1e300, "1e+300"),
        (float("inf"), "inf"),
        (decimal.Decimal("12.40"), "12.40"),
        (NOON, "2026-01-03T12:00:00"),
        (NOON.replace(microsecond=250_000), "2026-01-03T12:00:00.25"),
        (NOON.replace(tzinfo=dt.timezone(dt.timedelta(hours=1))), "2026-01-03T11:00:00Z"),
        (dt.date(2026, 1, 3), "2026-01-03"),
        (np.datetime64("2026-01-03T12:00:00.000000000"), "2026-01-03T12:00:00"),
        (np.datetime64("2026-01-03"), "2026-01-03"),
        (ipaddress.ip_address("192.0.2.1"), "192.0.2.1"),
        (ipaddress.ip_network("2001:db8::/32"), "2001:db8::/32"),
        (uuid.UUID("6f9619ff-8b86-d011-b42d-00cf4fc964ff"), "6f9619ff-8b86-d011-b42d-00cf4fc964ff"),
    ],
)
def test_the_text_of_a_value(value, text):
    assert text_of(value) == text and type(text_of(value)) is type(text)


@pytest.mark.parametrize(
    "value", [dt.timedelta(1), np.timedelta64(5, "ms"), dt.time(12), [1], {"a": 1}, 1j, object(), np.array([1])]
)
def test_what_has_no_text_is_refused_by_its_name(value):
    with pytest.raises(ValueError, match=type(value).__name__):
        text_of(value)


def test_a_time_that_is_out_of_all_years_in_utc_is_refused():
    with pytest.raises(ValueError, match="outside of the years"):
        text_of(dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))))


SECONDS = [1_767_441_600, None, 1_767_441_601]
TIMES = ["2026-01-03T12:00:00", None, "2026-01-03T12:00:01"]


@pytest.mark.parametrize(
    ("array", "texts"),
    [
        (pa.array(["1e3", None, ""]), ["1e3", None, ""]),
        (pa.array(["a", None], pa.large_string()), ["a", None]),
        (pa.array(["a", None], pa.string_view()), ["a", None]),
        (pa.array([b"a", None]), ["a", None]),
        (pa.array([b"abcd", None], pa.binary(4)), ["abcd", None]),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), ["b", "a", None, "b"]),
        (pa.array([1.5, None, 1.0]).dictionary_encode(), ["1.5", None, "1"]),
        (pa.RunEndEncodedArray.from_arrays([2, 3], ["a", "b"]), ["a", "a", "b"]),
        (pa.array([True, None]), ["true", None]),
        (pa.array([2**64 - 1, None], pa.uint64()), ["18446744073709551615", None]),
        (pa.array([12.4, None, float("nan"), 1.0, -1.0]), ["12.4", None, None, "1", "-1"]),
        (pa.array([12.4, None], pa.float32()), ["12.4", None]),
        (pa.array(np.array([12.4], np.float16)), ["12.4"]),
        (pa.array([decimal.Decimal("12.40"), None]), ["12.40", None]),
        (pa.array([None, None]), [None, None]),
        (pa.array(SECONDS, pa.timestamp("s")), TIMES),
        (pa.array(SECONDS, pa.timestamp("s")).cast(pa.timestamp("ns")), TIMES),
        (pa.array(SECONDS, pa.timestamp("s", "UTC")), [time and f"{time}Z" for time in TIMES]),
        (pa.array(SECONDS, pa.timestamp("s", "America/New_York")), [time and f"{time}Z" for time in TIMES]),
        (pa.array([1_767_441_600_250_000_010], pa.timestamp("ns", "UTC")), ["2026-01-03T12:00:00.25000001Z"]),
        (pa.array([1_767_441_610_100], pa.timestamp("ms")), ["2026-01-03T12:00:10.1"]),
        (pa.array([dt.date(2026, 1, 3), None]), ["2026-01-03", None]),
        (pa.array([dt.date(2026, 1, 3)], pa.date64()), ["2026-01-03"]),
        (pa.chunked_array([["a"], ["b", None]]), ["a", "b", None]),
        (pa.chunked_array([], pa.string()), []),
        (pa.array(["a", "b", "c"]).slice(1), ["b", "c"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array | pa.ChunkedArray) else "",
)
def test_the_text_of_a_column_of_arrow(array, texts):
    assert text_column(array, "x").to_pylist() == texts


@pytest.mark.parametrize(
    "kind",
    [
        pa.duration("s"),
        pa.time32("s"),
        pa.list_(pa.int64()),
        pa.struct([("a", pa.int64())]),
        pa.month_day_nano_interval(),
    ],
)
def test_a_type_of_arrow_without_text_is_refused_by_its_name(kind):
    with pytest.raises(ValueError, match=f"event_time is of type {str(kind)[:6]}.*; make it text"):
        text_column(pa.nulls(2, kind), "event_time")


def test_an_extension_is_refused_by_its_name_unless_it_is_a_uuid():
    one = uuid.UUID("6f9619ff-8b86-d011-b42d-00cf4fc964ff")
    assert text_column(pa.array([one.bytes, None], pa.uuid()), "id").to_pylist() == [str(one), None]
    with pytest.raises(ValueError, match=r"x is of type arrow\.opaque"):
        text_column(pa.array([None], pa.opaque(pa.int64(), "a", "b")), "x")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", 1, dt.timedelta(1)], "row 13: x: a timedelta is neither"),
        (pa.array([b"a", b"\xff"]), "row 12: x: it is no UTF-8"),
        (["a", "\ud800"], "row 12: x: it is no UTF-8"),
    ],
)
def test_a_value_without_text_is_named_by_its_row_or_told(column, message):
    with pytest.raises(ValueError, match=message):
        text_column(column, "x", first_row=11)
    told = []
    texts = text_column(column, "x", 11, lambda row, why: told.append(f"row {row}: {why}")).to_pylist()
    assert len(told) == 1 and told[0].startswith(message) and texts[:1] == ["a"] and texts[-1] is None


def test_a_number_reads_back_as_itself():
    numbers = np.random.default_rng(0).lognormal(3, 4, 1000)
    for kind in (np.float64, np.float32):
        texts = text_column(pa.array(numbers.astype(kind)), "x").to_pylist()
        assert (np.array(texts).astype(kind) == numbers.astype(kind)).all()
        assert texts == text_column(list(numbers.astype(kind)), "x").to_pylist()
