"""The codecs and the encoder, against a slow reference and against their own inverse."""

import dataclasses
import itertools

import numpy as np
import pytest
import reference_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_decoder import decode

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import format_address, is_ipv4, pack_address

FIELD_NAMES = ("src", "dst", "result", "time")


def test_vocabulary_has_11_roles_and_256_bytes():
    assert tk.VOCAB_SIZE == 267
    assert (tk.MEASUREMENT_START, tk.RTT_START, tk.FAILED, tk.BYTE_0) == (0, 8, 10, 11)
    assert tk.token_name(tk.TIMESTAMP_DELTA4) == "TIMESTAMP_DELTA4" and tk.token_name(266) == "0xff"


def test_every_rtt_code_round_trips_and_codes_are_monotone():
    codes = np.arange(tk.RTT_CODES)
    values = tk.decode_rtt(codes)
    assert (tk.encode_rtt(values) == codes).all()
    assert (np.diff(values) > 0).all()
    assert values[0] == 0.001 and 71 < values[-1] / 60_000 < 72


def test_rtt_error_is_at_most_2_to_the_minus_12_and_unbiased():
    rtt_ms = np.exp(np.random.default_rng(0).uniform(np.log(0.001), np.log(4_000_000), 300_000))
    error = tk.decode_rtt(tk.encode_rtt(rtt_ms)) / rtt_ms - 1
    assert np.abs(error).max() <= 2**-12
    assert abs(error.mean()) < 1e-6


@given(st.floats(0.0005, 5_000_000))
def test_rtt_code_is_the_nearest_of_all_codes(rtt_ms):
    code, nearest = int(tk.encode_rtt(rtt_ms)), reference_encoder.rtt_code(rtt_ms)
    error, least = (abs(tk.decode_rtt(c) - rtt_ms) for c in (code, nearest))
    assert error <= least * (1 + 1e-9) + 1e-12


def test_rtts_out_of_range_clamp_and_are_counted():
    assert tk.encode_rtt(np.array([0.0, 1e-9, 1e12])).tolist() == [0, 0, 65535]
    assert tk.clamped_rtts(np.array([-1.0, 0.0, 1e-9, 5.0, 1e12])) == 3


def test_code_edges_enclose_exactly_the_rtts_of_their_code():
    edges = tk.rtt_code_edges_ms()
    assert edges.shape == (65537,) and (np.diff(edges) > 0).all()
    inside = edges[:-1] + np.diff(edges) * np.random.default_rng(1).uniform(0.01, 0.99, tk.RTT_CODES)
    assert (tk.encode_rtt(inside) == np.arange(tk.RTT_CODES)).all()


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(lambda a: pack_address(str(a)))


@st.composite
def windows(draw):
    """A list of measurements as the reference encoder takes them, with ascending times."""
    clock = draw(st.integers(0, 2**33))
    measurements = []
    for _ in range(draw(st.integers(1, 8))):
        src, dst = draw(addresses), draw(addresses)
        clock += draw(st.sampled_from([0, 1, 240, 255, 256, 86400, 2**32 - 1]))
        width_src, width_dst = (4 if is_ipv4(np.frombuffer(a, np.uint8)) else 16 for a in (src, dst))
        measurements.append(
            {
                "src": src,
                "dst": dst,
                "src_bytes": draw(st.integers(0, width_src)),
                "dst_bytes": draw(st.integers(1, width_dst)),
                "rtt_ms": draw(st.one_of(st.just(-1.0), st.floats(0.001, 4_000_000))),
                "time_s": clock if draw(st.booleans()) else None,
                "order": draw(st.permutations(FIELD_NAMES)),
            }
        )
        clock = measurements[-1]["time_s"] or clock
    timed = [m["time_s"] for m in measurements if m["time_s"] is not None]
    for before, after in itertools.pairwise(timed):  # untimed leaps between may add up to more than 4 bytes
        if after - before > tk.DELTA4_MAX_S:
            return draw(windows())
    return measurements


def to_fields(window_list):
    flat = [m for window in window_list for m in window]
    rank = [[m["order"].index(name) for name in FIELD_NAMES] for m in flat]
    return tk.Fields(
        src=np.array([list(m["src"]) for m in flat], dtype=np.uint8),
        dst=np.array([list(m["dst"]) for m in flat], dtype=np.uint8),
        src_bytes=np.array([m["src_bytes"] for m in flat]),
        dst_bytes=np.array([m["dst_bytes"] for m in flat]),
        rtt_ms=np.array([m["rtt_ms"] for m in flat]),
        time_s=np.array([m["time_s"] or 0 for m in flat]),
        timed=np.array([m["time_s"] is not None for m in flat]),
        order=np.array(rank, dtype=np.float32),
        window=np.repeat(np.arange(len(window_list)), [len(w) for w in window_list]),
    )


def test_two_windows_by_hand():
    """192.0.2.1 → 198.51.x (a prefix) at 1,700,000,000 = 0x6553F100; a failed ping 256 s later; then a window of its own.

    50 ms are 50,000 µs = 2^15 · 1.52588; 0.52588 · 2048 = 1077 to the nearest, so the code is 15 · 2048 + 1077 = 0x7C35.
    """
    b = [11 + value for value in range(256)]
    ping = {"src": pack_address("192.0.2.1"), "dst": pack_address("198.51.100.1"), "src_bytes": 4, "dst_bytes": 2}
    first = ping | {"rtt_ms": 50.0, "time_s": 1_700_000_000, "order": ("src", "dst", "result", "time")}
    later = ping | {"rtt_ms": -1.0, "time_s": 1_700_000_256, "order": ("time", "result", "dst", "src"), "src_bytes": 0}
    ipv6 = {"src": pack_address("2001:db8::5"), "dst": pack_address("2001:db8::9"), "src_bytes": 3, "dst_bytes": 16}
    other = ipv6 | {"rtt_ms": 50.0, "time_s": None, "order": ("dst", "src", "time", "result")}
    tokens, starts = tk.encode(to_fields([[first, later], [first, later | {"time_s": 1_700_000_255}, other]]))
    of_first = [0, 1, b[192], b[0], b[2], b[1], 3, b[198], b[51], 8, b[0x7C], b[0x35],
                5, *[b[0]] * 4, b[0x65], b[0x53], b[0xF1], b[0x00]]  # fmt: skip
    of_later = [0, 7, b[0], b[0], b[1], b[0], 10, 3, b[198], b[51], 1]
    of_sooner = [0, 6, b[255], 10, 3, b[198], b[51], 1]
    of_other = [0, 4, b[0x20], b[1], b[0xD], b[0xB8], *[b[0]] * 11, b[9], 2, b[0x20], b[1], b[0xD], 8, b[0x7C], b[0x35]]
    parts = [of_first, of_later, of_first, of_sooner, of_other]
    assert tokens.tolist() == [token for part in parts for token in part] and tokens.dtype == np.int16
    assert starts.tolist() == [0, *np.cumsum(list(map(len, parts)))]
    assert tk.decode(of_first + of_later) == [
        tk.Decoded("192.0.2.1", 32, "198.51.0.0", 16, float(tk.decode_rtt(np.array(0x7C35))), 1_700_000_000),
        tk.Decoded("0.0.0.0", 0, "198.51.0.0", 16, -1.0, 1_700_000_256),
    ]
    assert tk.decode(of_other)[0].dst == "2001:db8::9" and tk.decode(of_other)[0].src == "2001:d00::"
    assert tk.decode(of_other)[0].time_s is None


def test_rtt_codes_and_their_borders_by_hand():
    """1 µs is code 0, and each step there 2⁻¹¹ of it; 2 µs begin the next exponent; the last code ends at 2³² µs."""
    step_ms = 0.001 / 2048
    assert tk.encode_rtt(np.array([0.001, 0.001 + step_ms, 0.002, 50.0])).tolist() == [0, 1, 2048, 0x7C35]
    assert tk.decode_rtt(np.array([0, 1, 2048, 4096])).tolist() == pytest.approx([0.001, 0.001 + step_ms, 0.002, 0.004])
    edges = tk.rtt_code_edges_ms()
    assert edges[:3] == pytest.approx([0.001 - step_ms / 2, 0.001 + step_ms / 2, 0.001 + 1.5 * step_ms], rel=1e-12)
    end, last_step = 2**32 / 1000, 2**20 / 1000
    assert edges[-2:] == pytest.approx([end - 1.5 * last_step, end - last_step / 2], rel=1e-12)
    at_borders = np.array([-1.0, edges[0], np.nextafter(edges[0], 0), edges[-1], np.nextafter(edges[-1], 0)])
    assert [tk.clamped_rtts(np.array([each])) for each in at_borders] == [0, 0, 1, 1, 0]


def test_an_answer_within_the_clock_is_no_failure():
    for rtt_ms, result in ((0.0, [8, 11, 11]), (-1.0, [10])):
        measurement = MINIMAL | {"rtt_ms": rtt_ms, "time_s": None, "order": FIELD_NAMES}
        assert tk.encode(to_fields([[measurement]]))[0].tolist() == [0, 1, 3, 11 + 198, *result]


def test_names_of_tokens_by_hand():
    assert [tk.token_name(token) for token in (0, 10, 11, 42, 266)] == [
        "MEASUREMENT_START",
        "FAILED",
        "0x00",
        "0x1f",
        "0xff",
    ]
    assert [tk.token_name(token) for token in (-1, 267)] == ["-1, which is no token", "267, which is no token"]


@pytest.mark.parametrize("leap_s", [-1, 2**32])
def test_a_leap_that_no_delta_holds_is_refused_and_the_longest_is_not(leap_s):
    def times(*times_s):
        return to_fields([[MINIMAL | {"time_s": time_s, "order": FIELD_NAMES} for time_s in times_s]])

    with pytest.raises(ValueError, match=r"^timestamps of a window must not decrease, nor leap more than 136 years"):
        tk.encode(times(5, 5 + leap_s))
    assert tk.encode(times(5, 5, 2**32 + 4))[0][-4:].tolist() == [266] * 4


@settings(max_examples=200, deadline=None)
@given(st.lists(windows(), min_size=1, max_size=3))
def test_vectorised_encoder_equals_the_reference(window_list):
    tokens, starts = tk.encode(to_fields(window_list))
    assert tokens.tolist() == [t for window in window_list for t in reference_encoder.encode(window)]
    assert starts[-1] == len(tokens) and (tokens[starts[:-1]] == tk.MEASUREMENT_START).all()


@settings(max_examples=200, deadline=None)
@given(windows())
def test_decoder_inverts_the_encoder(window):
    tokens = tk.encode(to_fields([window]))[0]
    decoded = decode(tokens)
    assert [dataclasses.asdict(d) for d in tk.decode(tokens)] == [
        {name: value for name, value in dataclasses.asdict(d).items() if name != "start"} for d in decoded
    ]
    assert len(decoded) == len(window)
    for d, m in zip(decoded, window, strict=True):
        assert (d.src_bits, d.dst_bits) == (8 * m["src_bytes"], 8 * m["dst_bytes"])
        first = 12 if is_ipv4(np.frombuffer(m["dst"], np.uint8)) else 0
        known = m["dst"][: first + m["dst_bytes"]].ljust(16, b"\0")
        assert d.dst == format_address(known)
        assert d.time_s == m["time_s"]
        assert d.rtt_ms == m["rtt_ms"] == -1 or abs(d.rtt_ms / m["rtt_ms"] - 1) <= 2**-12


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-1, 300), max_size=40))
def test_decoder_parses_or_says_where_a_random_list_breaks(tokens):
    try:
        decoded = decode(tokens)
    except ValueError as error:
        assert str(error).startswith("token ") and "expected" in str(error)
        assert 0 <= int(str(error).split()[1].rstrip(":")) <= len(tokens)
    else:
        assert len(decoded) == tokens.count(tk.MEASUREMENT_START)


@settings(max_examples=200, deadline=None)
@given(windows(), st.data())
def test_decoder_names_the_one_token_that_is_none(window, data):
    tokens = tk.encode(to_fields([window]))[0].tolist()
    place = data.draw(st.integers(0, len(tokens) - 1))
    tokens[place] = data.draw(st.sampled_from([-1, 267, 999]))
    with pytest.raises(ValueError, match=rf"^token {place}: expected .*, found {tokens[place]}, which is no token"):
        decode(tokens)


VALID = [0, 1, 11, 12, 3, 21, 22, 23, 24, 8, 100, 101]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "token 0: expected MEASUREMENT_START, found the end"),
        ([0, 1, 1], "token 2: expected a destination or a result or a time, found SRC_IPV4"),
        ([3, 21], "token 0: expected MEASUREMENT_START, found DST_IPV4"),
        ([*VALID, 0, 1, 3, 21], "token 16: expected the result of the measurement at token 12, found the end"),
        ([0, 1, 3, 8, 100, 101], "token 3: expected 1–4 bytes after DST_IPV4, found RTT_START"),
        ([0, 1, *[11] * 5, 3, 21, 10], "token 6: expected 0–4 bytes after SRC_IPV4, found 0x00"),
        ([*VALID[:-1]], "token 11: expected 2 bytes after RTT_START, found the end"),
        ([*VALID, 10], "token 12: expected a time or MEASUREMENT_START, found FAILED"),
        ([*VALID, 6, 40], "token 12: expected TIMESTAMP_ABS, found TIMESTAMP_DELTA1"),
        ([*VALID, 9], "token 12: expected a time or MEASUREMENT_START, found THROUGHPUT_START"),
        ([*VALID, 267], "token 12: expected a token below 267, found 267, which is no token"),
    ],
)
def test_decoder_says_which_token_breaks_the_grammar(tokens, message):
    with pytest.raises(ValueError) as error:
        decode(tokens)
    assert str(error.value) == message


MINIMAL = {
    "src": pack_address("192.0.2.1"),
    "dst": pack_address("198.51.100.1"),
    "src_bytes": 0,
    "dst_bytes": 1,
    "rtt_ms": -1.0,
}


def test_delta_of_255_takes_one_byte_and_256_takes_four():
    window = [MINIMAL | {"time_s": t, "order": FIELD_NAMES} for t in (1000, 1255, 1511)]
    tokens = tk.encode(to_fields([window]))[0].tolist()
    assert [t for t in tokens if t in (5, 6, 7)] == [tk.TIMESTAMP_ABS, tk.TIMESTAMP_DELTA1, tk.TIMESTAMP_DELTA4]


def test_decreasing_timestamps_are_refused():
    with pytest.raises(ValueError, match="sort by time"):
        tk.encode(to_fields([[MINIMAL | {"time_s": t, "order": FIELD_NAMES} for t in (1000, 999)]]))
