"""Times are ISO 8601 or Unix seconds, and UTC without a zone; what may mean two things is refused."""

import datetime as dt

import pytest

from ping_llm.data.times import LAST_TIME_S, parse_time

NOON = 1_767_441_600  # 2026-01-03T12:00:00Z


@pytest.mark.parametrize(
    "written",
    [
        "2026-01-03T12:00:00Z",
        "2026-01-03T12:00:00",
        "2026-01-03 12:00:00",
        "2026-01-03 12:00",
        "2026-01-03T12",
        "2026-01-03T12:00:00.999999999",
        "2026-01-03T12:00:00.5Z",
        "2026-01-03T13:00:00+01:00",
        "2026-01-03 07:00:00-0500",
        "2026-01-03 12:00:00+00",
        "2026-01-03 12:00:00 UTC",
        "2026-01-03T12:00:00z",
        "20260103T120000Z",
        " 2026-01-03T12:00:00Z ",
        "1767441600",
        "1767441600.9",
        "1.7674416e9",
        1_767_441_600,
        1_767_441_600.75,
        dt.datetime(2026, 1, 3, 12),
        dt.datetime(2026, 1, 3, 12, tzinfo=dt.UTC),
        dt.datetime(2026, 1, 3, 21, tzinfo=dt.timezone(dt.timedelta(hours=9))),
    ],
)
def test_every_way_to_write_a_time(written):
    assert parse_time(written) == NOON


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("2026-01-03", NOON - 43_200), ("1970-01-01", 0), ("0", 0), (9_500, 9_500), (str(LAST_TIME_S), LAST_TIME_S)],
)
def test_dates_and_the_ends_of_what_is_a_time(written, seconds):
    assert parse_time(written) == seconds


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("20260104", "may be a date or seconds"),
        (20260104, "may be a date or seconds"),
        (20260104.0, "may be a date or seconds"),
        ("202601041200", "may be a date or seconds"),
        (202601, "may be a date or seconds"),
        ("9999-12-31T23:59:59-00:01", "not a time between 1970 and 9999"),
        ("20260104120000", "of milliseconds give a thousandth"),
        (1_767_441_600_000, "of milliseconds give a thousandth"),
        (str(LAST_TIME_S + 1), "of milliseconds give a thousandth"),
        ("1e999", "of milliseconds give a thousandth"),
        ("01/03/2026", "write it like"),
        ("01/03/2026 12:00", "write it like"),
        ("3.1.2026", "write it like"),
        ("2026-1-4", "write it like"),
        ("2026-01", "write it like"),
        ("2026-02-30", "write it like"),
        ("12:30", "write it like"),
        ("yesterday", "write it like"),
        ("", "write it like"),
        ("-5", "write it like"),
        (True, "write it like"),
        ("1_000", "write it like"),
        ("١٢٣", "write it like"),
        ("1969-12-31T23:59:59Z", "not a time between 1970 and 9999"),
        (None, "None is not a time"),
        (dt.timedelta(1), "a timedelta is neither text"),
    ],
)
def test_what_is_no_time_or_two_is_refused(written, message):
    with pytest.raises(ValueError, match=message):
        parse_time(written)


def test_eight_digits_that_are_no_date_of_these_centuries_are_seconds():
    assert parse_time("20261304") == 20_261_304 and parse_time("30000101") == 30_000_101
