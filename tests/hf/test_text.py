"""Text ⇄ tokens: no token is lost, whatever the list; every text parses or says where it breaks."""

from fractions import Fraction

import numpy as np
import pytest
from conftest import make_row
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ping_llm.config import DataConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.windows import encode_windows, sample_window
from ping_llm.hf.text import NAMES, TextError, from_text, rtt_text, to_text
from ping_llm.inference.grammar import Grammar

B = [11 + value for value in range(256)]
A, D = [B[192], B[0], B[2], B[1]], [B[198], B[51], B[100], B[7]]  # 192.0.2.1, 198.51.100.7
MAPPED = [*[B[0]] * 10, B[255], B[255]]
NOON = [*[B[0]] * 4, B[0x69], B[0x5A], B[0x56], B[0x40]]  # 1,767,528,000 s
RTT = [B[0x6C], B[0x35]]  # of 50 ms 0x7C35, and 2² of that

BY_HAND = [
    ([], ""),
    ([0], "\n"),
    ([0, 1, *A, 3, *D, 5, *NOON, 8, B[0x7C], B[0x35]],
     "src=192.0.2.1 dst=198.51.100.7 time=2026-01-04T12:00:00Z rtt=50ms"),
    ([0, 8, *RTT, 4, *A, 1, *A[:3]], "rtt=12.5ms dst=c000:201::/32 src=192.0.2.0/24"),
    ([0, 10, 2, 3, D[0]], "fail src=::/0 dst=198.0.0.0/8"),
    ([0, 1, *A, 5, *NOON, 0, 10, 6, B[0], 0, 7, B[0], B[0], B[1], B[44]],
     "src=192.0.2.1 time=2026-01-04T12:00:00Z\nfail time=+0s\ntime=+300s"),
    ([0, 1, *A, 8], "src=192.0.2.1 rtt="),
    ([0, 1, *A, 5], "src=192.0.2.1 time="),
    ([0, 1, *A, 10, 0], "src=192.0.2.1 fail\n"),
    # parts of a window: what follows an open field, or a field
    (RTT, "12.5ms"),
    ([*NOON, 10], "2026-01-04T12:00:00Z fail"),
    ([3, *D, 0, 10], " dst=198.51.100.7\nfail"),
    # what the grammar does not know
    ([0, 0, 0], "\n\n\n"),
    ([0, 9, 10], "\n<THROUGHPUT_START> fail"),
    ([B[1], 10], "<0x01> fail"),
    ([0, 8, B[0x6C], 10], "rtt=<0x6c> fail"),
    ([0, 8, 10, B[1], 3, *D], "rtt=<FAILED><0x01> dst=198.51.100.7"),
    ([0, 8, 0, 10], "rtt=<MEASUREMENT_START> fail"),
    ([0, 8, *RTT, B[3]], "rtt=12.5ms<0x03>"),
    ([0, 1, *A, B[9], 10], "src=192.0.2.1<0x09> fail"),
    ([0, 2, *MAPPED, *A], "\n<SRC_IPV6>" + "<0x00>" * 10 + "<0xff><0xff><0xc0><0x00><0x02><0x01>"),
    ([0, 5, *NOON[:3]], "time=<0x00><0x00><0x00>"),
    ([0, 5, *[B[255]] * 8], "time=" + "<0xff>" * 8),
    ([0, 5, *NOON, 5, *NOON],
     "time=2026-01-04T12:00:00Z time=<0x00><0x00><0x00><0x00><0x69><0x5a><0x56><0x40>"),
    ([0, 7, B[0], B[0], B[0], B[255]], "\n<TIMESTAMP_DELTA4><0x00><0x00><0x00><0xff>"),
    ([0, 6, 10], "\n<TIMESTAMP_DELTA1> fail"),
    ([0, 1, *[B[0]] * 4, 4, *[B[0]] * 16], "src=0.0.0.0/32 dst=::/128"),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "text"), BY_HAND, ids=[text[:40] or "none" for _, text in BY_HAND])
def test_texts_by_hand(tokens, text):
    assert to_text(tokens) == text
    assert from_text(text) == tokens


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  src=192.0.2.1\t  fail  ", " src=192.0.2.1 fail"),
        ("src=192.0.2.1 \r\n  dst=198.51.100.7", "src=192.0.2.1\ndst=198.51.100.7"),
        ("\nfail", "fail"),
        ("src=192.0.2.77/24 dst=2001:DB8:0::1", "src=192.0.2.0/24 dst=2001:db8::1"),
        ("src=::ffff:192.0.2.1", "src=192.0.2.1"),
        ("rtt=12.5001ms", "rtt=12.5ms"),
        ("rtt=0ms", "rtt=0.001ms"),
        ("rtt= ", "rtt="),
        ("rtt=<0x6c><0x35>", "rtt=12.5ms"),
        ("src=192.0.2.0/24<0x01>", "src=192.0.2.1"),
        ("time=1767528000", "time=2026-01-04T12:00:00Z"),
        ("time=2026-01-04T13:00+01:00 fail\ntime=2026-01-04T12:05:00Z",
         "time=2026-01-04T12:00:00Z fail\ntime=+300s"),
        ("time=2026-01-04T12:00:00Z\ntime=+60s\ntime=2026-01-04T12:02:00Z",
         "time=2026-01-04T12:00:00Z\ntime=+60s\ntime=+60s"),
        ("time=+60s\ntime=2026-01-04T12:02:00Z", "time=+60s\ntime=2026-01-04T12:02:00Z"),
        ("2026-01-04T12:00:00Z\ntime=2026-01-04T12:00:01Z", "2026-01-04T12:00:00Z\ntime=+1s"),
    ],
)  # fmt: skip
def test_what_is_written_otherwise_means_the_same(text, same):
    assert to_text(from_text(text)) == same
    assert from_text(text) == from_text(same)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("src=192.0.2.1 dest=1", "position 14: there is no 'dest=1'; fields are src=, dst=, time=, rtt= and fail"),
        ("hello", "position 0: there is no 'hello'"),
        ("fail 12.5ms", "position 5: there is no '12.5ms'"),
        ("src=192.0.2.256", "position 0: '192.0.2.256' is not an IPv4 or IPv6 address"),
        ("src=192.0.2.0/25", "position 0: '192.0.2.0/25' does not end on a byte"),
        ("src=0.0.0.0", "position 0: '0.0.0.0' is the unspecified address"),
        ("fail src=", "position 5: src= needs an address or a prefix; 0.0.0.0/0 or ::/0 says the family alone"),
        ("rtt=12.5", "position 0: '12.5' is no RTT; write it like 12.5ms, and fail where there was no answer"),
        ("rtt=-1ms", "position 0: '-1ms' is no RTT"),
        ("rtt=4300000ms", "position 0: '4300000ms' is longer than 71.6 minutes"),
        ("time=yesterday", "position 0: 'yesterday' is not a time; write it like"),
        ("time=2026-01-04T12:00:01Z\ntime=2026-01-04T12:00:00Z", "position 26: times must not decrease"),
        ("time=1000000\ntime=4296000000", "position 13: times must not decrease, nor leap more than 136 years"),
        ("time=+4294967296s", "position 0: times must not decrease, nor leap more than 136 years"),
        (f"time=+{'9' * 5000}s", "position 0: '+999"),
        ("rtt= dst=198.51.100.7", "position 5: rtt= has no value; only at the end of a text may it be left out"),
        ("time=\nfail", "position 5: time= has no value"),
        ("fail<0x01>dst=198.51.100.7", "position 10: before 'dst=198.51.100.7' a space is missing"),
        ("fail <0x1>", "position 5: <0x1> is no token; there are <MEASUREMENT_START> … <FAILED>, <0x00> … <0xff>"),
        ("fail <", "position 5: '<' is no part of a measurement"),
        ("fail\x00", "position 0: there is no 'fail\\x00'"),
        ("fail\u00a0", "position 4: '\\xa0' is no part of a measurement"),
    ],
)
def test_a_text_that_is_none_says_where_and_why(text, message):
    with pytest.raises(TextError) as error:
        from_text(text)
    assert str(error.value).startswith(message)
    assert error.value.position == int(message.split()[1].rstrip(":"))


any_token = st.one_of(st.integers(0, 10), st.integers(0, 266), st.sampled_from([0, 8, 10, B[0], B[255]]))


@settings(max_examples=1500, deadline=None)
@given(st.lists(any_token, max_size=40))
def test_no_list_of_tokens_loses_one(tokens):
    text = to_text(tokens)
    assert from_text(text) == tokens
    assert to_text(from_text(text)) == text


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 150), st.booleans())
def test_no_list_by_the_grammar_loses_a_token(seed, count, whole_addresses):
    rng, grammar, tokens = np.random.default_rng(seed), Grammar(1, whole_addresses=whole_addresses), []
    for _ in range(count):
        legal = np.flatnonzero(grammar.legal()[0])
        roles = legal[legal < tk.BYTE_0]
        tokens.append(int(rng.choice(roles if len(roles) and rng.random() < 0.3 else legal)))
        grammar.advance(np.array([tokens[-1]]))
    text = to_text(tokens)
    assert from_text(text) == tokens
    inside = text.removesuffix("\n")
    assert grammar.clock[0] > 2**33 or "<" not in inside.rpartition(" ")[0].rpartition("\n")[0]  # only what is cut off


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_windows_of_training_are_readable_and_say_what_the_decoder_does(seed, data):
    config = DataConfig(full_time=0.5, partial_time=0.3)
    window = sample_window(make_row(200, seed=seed % 5), config, 400, np.random.default_rng(seed))
    tokens = encode_windows([window], 400)[0].tolist()
    tokens = [token for token in tokens if token != tk.PADDING]
    text = to_text(tokens)
    assert from_text(text) == tokens and "<" not in text
    clock = 0
    for line, true in zip(text.split("\n"), tk.decode(tokens), strict=True):
        fields = dict(field.split("=") for field in line.split() if field != "fail")
        for side in ("src", "dst"):
            address, bits = getattr(true, side), getattr(true, f"{side}_bits")
            assert fields[side] in (address, f"{address}/{bits}")
            assert ("/" in fields[side]) == (bits < (128 if ":" in address else 32) or address in ("0.0.0.0", "::"))
        assert ("rtt" not in fields) == ("fail" in line.split()) == (true.rtt_ms < 0)
        if "rtt" in fields:
            assert float(fields["rtt"].removesuffix("ms")) == pytest.approx(true.rtt_ms, rel=2**-12)
        if "time" in fields:
            later = fields["time"].startswith("+")
            clock = clock + int(fields["time"][1:-1]) if later else true.time_s
        assert true.time_s == (clock if "time" in fields else None)
    # Its parts, cut before any role but that of a new line or after an open result, say the same one after the other.
    cuts = [at for at in range(1, len(tokens)) if 0 < tokens[at] < tk.BYTE_0 or tokens[at - 1] in (8, 5)]
    at = data.draw(st.sampled_from(cuts))
    assert from_text(to_text(tokens[:at]) + to_text(tokens[at:])) == tokens


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("src=dt12.0:/+-TZm<>x \nfail"), max_size=30))
@example("src=192.0.2.1 rtt=1ms\n")
def test_every_text_parses_to_what_it_says_or_breaks_within_itself(text):
    try:
        tokens = from_text(text)
    except TextError as error:
        assert 0 <= error.position < len(text) and error.reason
    else:
        assert from_text(to_text(tokens)) == tokens


def test_rtt_codes_read_back_from_the_decimal_of_fewest_digits():
    """Against all decimals of one digit less: in each code there is none, but on its border."""
    codes = np.array([*range(0, tk.RTT_CODES, 7), *range(0, tk.RTT_CODES, 2048), tk.RTT_CODES - 1])
    texts = [rtt_text(code).removesuffix("ms") for code in codes.tolist()]
    assert (tk.encode_rtt(np.array([float(text) for text in texts])) == codes).all()
    edges = tk.rtt_code_edges_ms()
    for code, text in zip(codes.tolist(), texts, strict=True):
        low, high = edges[code] * (1 + 1e-12), edges[code + 1] * (1 - 1e-12)
        digits = len(text.replace(".", "").strip("0"))
        for magnitude in {int(np.floor(np.log10(edge))) for edge in (low, high)}:  # a code may hold a power of 10
            step = Fraction(10) ** (magnitude + 2 - digits)
            assert digits == 1 or (Fraction(low) // step + 1) * step > Fraction(high), (code, text)


@pytest.mark.parametrize("token", [-1, 267, 1000])
def test_a_number_that_is_no_token_has_no_text(token):
    with pytest.raises(ValueError, match=rf"^token 1: {token}, which is no token"):
        to_text([0, token])


def test_names_are_those_of_the_vocabulary_and_each_is_one_token():
    assert len(set(NAMES)) == tk.VOCAB_SIZE and NAMES[8] == "<RTT_START>" and NAMES[266] == "<0xff>"
    for token, name in enumerate(NAMES):
        assert from_text(name) == [token]
