"""The grammar lets through every window of training, and nothing that does not decode without loss."""

import itertools

import numpy as np
import pytest
import reference_encoder
from conftest import make_row
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_decoder import decode

from ping_llm.config import DataConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import pack_address
from ping_llm.data.windows import encode_windows, sample_window
from ping_llm.inference.grammar import INT64_MAX, Grammar, follow

NAMES = {1: "src", 2: "src", 3: "dst", 4: "dst", 5: "time", 6: "time", 7: "time", 8: "result", 10: "result"}
LAST_TIME_S = 253_402_300_799


def content_of(tokens):
    """What a window holds, as the reference encoder takes it: its measurements with the order of their fields."""
    decoded = decode(tokens)
    starts = [m.start for m in decoded] + [len(tokens)]
    return [
        {
            "src": pack_address(m.src),
            "dst": pack_address(m.dst),
            "src_bytes": m.src_bits // 8,
            "dst_bytes": m.dst_bits // 8,
            "rtt_ms": m.rtt_ms,
            "time_s": m.time_s,
            "order": [NAMES[token] for token in tokens[start:end] if token in NAMES],
        }
        for m, start, end in zip(decoded, starts, starts[1:], strict=False)
    ]


def is_window(tokens, whole_addresses, last_time_s=INT64_MAX):
    """Whether training could show these tokens: an independent and slow account of the grammar."""
    try:
        measurements = content_of(tokens)
    except ValueError:
        return False
    if reference_encoder.encode(measurements) != tokens:
        return False
    shares = set()
    for m in measurements:
        src_ipv4, dst_ipv4 = (m[end].startswith(bytes(10) + b"\xff\xff") for end in ("src", "dst"))
        whole = m["src_bytes"] == (4 if src_ipv4 else 16) and m["dst_bytes"] == (4 if dst_ipv4 else 16)
        if (whole_addresses and not whole) or (m["time_s"] or 0) > last_time_s:
            return False
        sixteenths = m["src_bytes"] * (4 if src_ipv4 else 1)
        shares.add(
            range(sixteenths, sixteenths + 4) if src_ipv4 and sixteenths < 16 else range(sixteenths, sixteenths + 1)
        )
    return bool(set.intersection(*map(set, shares)))


def completions(whole_addresses):
    """Token lists, one of which completes any measurement that can be completed."""
    address = [[role, *[12] * known] for role, known in ((1, 4), (2, 16))]
    if not whole_addresses:
        address += [[role, *[12] * known] for role, width in ((1, 4), (2, 16)) for known in range(width)]
    endings = [fields for n in range(3) for fields in itertools.combinations(("src", "dst", "result"), n)]
    endings.append(("src", "dst", "result"))
    known = {"src": address, "dst": [[3, 12, 12, 12, 12]], "result": [[10]]}
    for fields in endings:
        for parts in itertools.product(*(known[field] for field in fields)):
            yield list(fields), [token for part in parts for token in part]


def can_be_completed(tokens, whole_addresses, last_time_s):
    """Whether some tokens after these make a window: bytes for the open field, then the fields that are missing."""
    start = max((at for at, token in enumerate(tokens) if token == 0), default=0)
    known = [NAMES[token] for token in tokens[start:] if token in NAMES]
    missing = [name for name in ("src", "dst", "result") if name not in known]
    endings = [ending for fields, ending in completions(whole_addresses) if fields == missing]
    fillings = [[]] if tokens[-1] == 0 else [[byte] * more for more in range(17) for byte in (11, 12)]
    return any(
        is_window([*tokens, *filling, *ending], whole_addresses, last_time_s)
        for filling in fillings
        for ending in endings
    )


def walk(seed, tokens, whole_addresses, last_time_s=INT64_MAX, favour=0.8):
    """A random walk over legal tokens that prefers roles and extreme bytes to the many other bytes."""
    rng = np.random.default_rng(seed)
    grammar, walked = Grammar(1, whole_addresses=whole_addresses, last_time_s=last_time_s), []
    while len(walked) < tokens:
        legal = np.flatnonzero(grammar.legal()[0])
        roles, bytes_ = legal[legal < tk.BYTE_0], legal[legal >= tk.BYTE_0]
        if len(roles) and (not len(bytes_) or rng.random() < 0.3):
            token = int(rng.choice(roles))
        else:
            token = int(rng.choice(bytes_[[0, -1]] if rng.random() < favour else bytes_))
        grammar.advance(np.array([token]))
        walked.append(token)
    return walked, grammar


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_every_window_of_training_is_legal(count, seed, ipv6_share, src_dropout, dst_dropout):
    row = make_row(count, seed, ipv6_share)
    config = DataConfig(src_prefix_dropout=src_dropout, dst_prefix_dropout=dst_dropout)
    windows = [sample_window(row, config, 300, np.random.default_rng((seed, i))) for i in range(8)]
    encoded = encode_windows(windows, 300).astype(np.int64)
    grammar = Grammar(8, whole_addresses=False)
    for at in range(encoded.shape[1]):
        going = encoded[:, at] != tk.PADDING
        encoded, grammar = encoded[going], grammar.select(going)
        assert grammar.legal()[np.arange(len(encoded)), encoded[:, at]].all()
        grammar.advance(encoded[:, at])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), st.integers(0, 10_000))
def test_windows_without_dropout_are_legal_where_addresses_must_be_whole(count, seed):
    row = make_row(count, seed)
    window = sample_window(
        row, DataConfig(src_prefix_dropout=0, dst_prefix_dropout=0), 300, np.random.default_rng(seed)
    )
    line = encode_windows([window], 300)[0]
    grammar = Grammar(1)
    follow(grammar, line[line != tk.PADDING])  # ValueError at a token that is not legal
    assert grammar.legal()[0, tk.MEASUREMENT_START]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 120), st.booleans(), st.sampled_from([INT64_MAX, LAST_TIME_S]))
def test_legal_walks_decode_without_loss(seed, tokens, whole_addresses, last_time_s):
    walked, grammar = walk(seed, tokens, whole_addresses, last_time_s)
    rng = np.random.default_rng(seed)
    while not grammar.legal()[0, tk.MEASUREMENT_START]:  # until the measurement may end
        token = rng.choice(np.flatnonzero(grammar.legal()[0]))
        walked.append(int(token))
        grammar.advance(np.array([token]))
    walked = walked if walked[-1] else walked[:-1]
    assert not walked or is_window(walked, whole_addresses, last_time_s)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 70), st.booleans(), st.sampled_from([INT64_MAX, LAST_TIME_S]))
def test_exactly_those_tokens_are_legal_after_which_a_window_can_be_completed(seed, tokens, whole, last_time_s):
    walked, grammar = walk(seed, tokens, whole, last_time_s)
    legal = grammar.legal()[0]
    edges = {tk.BYTE_0 + b for at in np.flatnonzero(np.diff(legal[tk.BYTE_0 :])) for b in (at, at + 1)}
    for token in sorted({*range(11), *edges, 11, 12, 200, 266}):
        assert legal[token] == can_be_completed([*walked, int(token)], whole, last_time_s), tk.token_name(token)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 60)), min_size=2, max_size=6), st.booleans())
def test_windows_side_by_side_stand_where_each_stands_alone(walks, whole_addresses):
    length = min(tokens for _, tokens in walks)
    alone = [walk(seed, length, whole_addresses) for seed, _ in walks]
    together = Grammar(len(walks), whole_addresses=whole_addresses)
    for column in np.array([walked for walked, _ in alone]).T:
        together.advance(column)
    assert (together.legal() == np.concatenate([grammar.legal() for _, grammar in alone])).all()
    rows = np.array([1, 0, 1])
    picked = together.select(rows)
    assert (picked.legal() == together.legal()[rows]).all()
    picked.advance(picked.legal().argmax(axis=1))
    assert (together.legal()[0] == alone[0][1].legal()[0]).all()  # what is selected goes its own way


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.booleans(), st.integers(1, 3))
def test_longest_is_reached_and_never_passed(seed, tokens, whole_addresses, measurements):
    _, grammar = walk(seed, tokens, whole_addresses)
    rng = np.random.default_rng(seed)
    longest_first = np.array([*range(tk.BYTE_0, tk.VOCAB_SIZE), 2, 4, 8, 5, 7, 6, 1, 3, 10, 0])
    for stretched in (True, False):
        state, drawn, begun = grammar.select(np.array([0])), 0, 1
        while not (state.ended()[0] and begun == measurements):
            legal = state.legal()[0]
            token = longest_first[legal[longest_first]][0] if stretched else rng.choice(np.flatnonzero(legal))
            if token == tk.MEASUREMENT_START and begun == measurements:
                break
            begun += token == tk.MEASUREMENT_START
            drawn += 1
            state.advance(np.array([token]))
        longest = int(grammar.longest(measurements)[0])
        assert drawn <= longest
        assert drawn == longest or not (stretched and whole_addresses)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1], "token 0: expected MEASUREMENT_START, found SRC_IPV4"),
        ([0, 1, 11, 3], "token 3: expected a byte, found DST_IPV4"),
        ([0, 5, 11 + 0x80], "token 2: expected a byte from 0x00 to 0x7f, found 0x80"),
        ([0, 2, *[11] * 10, 266, 266], "token 13: expected a byte from 0x00 to 0xfe, found 0xff"),
        ([0, 10, 10], "token 2: expected SRC_IPV4 or SRC_IPV6 or DST_IPV4 or DST_IPV6 or TIMESTAMP_ABS, found FAILED"),
        ([0, 267], "expected SRC_IPV4 or SRC_IPV6 or DST_IPV4 or DST_IPV6 or TIMESTAMP_ABS or RTT_START or FAILED"),
        ([0, -1], "found -1, which is no token"),
    ],
)
def test_an_illegal_token_is_named_with_what_is_expected(tokens, message):
    with pytest.raises(ValueError) as error:
        follow(Grammar(1), tokens)
    assert message in str(error.value)


def test_all_sources_of_a_window_are_cut_alike():
    grammar = Grammar(1, whole_addresses=False)
    follow(grammar, [0, 1, 203, 11, 10, 3, 21, 0, 2])  # 2 of 4 bytes: 8 to 11 of 16
    for known in range(13):
        legal = grammar.legal()[0]
        assert legal[tk.DST_IPV4] == (8 <= known <= 11) and legal[tk.BYTE_0] == (known < 11), known
        if known == 11:
            break
        grammar.advance(np.array([200]))
