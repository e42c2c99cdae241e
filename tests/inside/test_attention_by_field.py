"""Shares of attention are added up by field, age and destination as a slow account does it, and sum to 1."""

import numpy as np
import pytest
import torch
from conftest import make_row
from lookable import config_of, lookable

from ping_llm.config import FIELDS, DataConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.windows import encode_windows, sample_window
from ping_llm.inside.attention import AGES, answered, attention_by_field
from ping_llm.inside.hooks import look_inside
from ping_llm.inside.layout import Layout

B = tk.BYTE_0
FIRST_OF_AGE = (0, 1, 2, 3, 4, 7, 11)


def ping(dst: int, *result: int) -> list[int]:
    return [
        tk.MEASUREMENT_START,
        tk.SRC_IPV4,
        B + 1,
        tk.DST_IPV4,
        B + dst,
        *(result or (tk.RTT_START, B + 80, B + dst)),
    ]


def windows(count: int) -> list[np.ndarray]:
    rng, row = np.random.default_rng(0), make_row(300, seed=1)
    drawn = [sample_window(row, DataConfig(), 192, rng) for _ in range(count)]
    return list(encode_windows(drawn, 192).astype(np.int64))


def slow_shares(weights: np.ndarray, layout: Layout, place: int) -> np.ndarray:
    """Of one token's weights (T,), token by token."""
    sums, own = np.zeros((len(AGES), 2, len(FIELDS))), layout.measurement[place]
    for token in range(place + 1):
        back = own - layout.measurement[token]
        age = max(number for number, first in enumerate(FIRST_OF_AGE) if back >= first)
        same = layout.destination(layout.measurement[token]) == layout.destination(own)
        sums[age, int(same), layout.field[token]] += weights[token]
    return sums


def test_a_model_whose_queries_are_nothing_looks_at_all_tokens_alike():
    model = lookable()
    with torch.no_grad():
        for block in model.gpt.blocks:
            block.attention.qkv.weight[:32] = 0
    found = attention_by_field(model, windows(3))
    for layer in found.shares:
        np.testing.assert_allclose(layer, found.tokens, atol=1e-6)


@pytest.mark.parametrize("field_aware", [False, True])
def test_shares_equal_a_slow_account_and_sum_to_1(field_aware, monkeypatch):
    monkeypatch.setattr("ping_llm.inside.attention.ENOUGH_EARLIER", 4)
    model, drawn = lookable(field_aware), windows(2)
    found = attention_by_field(model, drawn)
    layouts = [Layout.of(window) for window in drawn]
    sums, counted, met = np.zeros_like(found.shares), 0, 0
    for window, layout in zip(drawn, layouts, strict=True):
        seen = look_inside(model, window[window >= 0]).attention
        for measurement in range(found.least_earlier, layout.measurements):
            start = layout.place_of_rtt(measurement)
            if start is None:
                continue
            for layer, heads in enumerate(seen):
                for byte in (0, 1):
                    sums[layer, byte] += slow_shares(heads.mean(0)[start + byte].numpy(), layout, start + byte)
            counted += 1
            met += any(layout.destination(m) == layout.destination(measurement) for m in range(measurement))
    assert counted == found.results > 5 and met == found.met_before
    np.testing.assert_allclose(found.shares, sums / counted, atol=1e-6)
    np.testing.assert_allclose(found.shares.sum(axis=(2, 3, 4)), 1, atol=1e-5)
    np.testing.assert_allclose(found.tokens.sum(axis=(1, 2, 3)), 1, atol=1e-9)


def test_shares_of_tokens_are_counted_by_hand():
    window = np.array([*ping(7), *ping(8, tk.FAILED), *ping(7)])
    found = attention_by_field(lookable(), [window], [[2]])
    # Byte 1 is predicted from 8 + 6 + 6 tokens, byte 2 from one more, a byte of its own RTT.
    structure, src, dst, _, rtt = range(5)
    own = np.zeros(5)
    own[[structure, src, dst]] = 4, 1, 1
    same, other = np.zeros(5), np.zeros(5)
    same[[structure, src, dst, rtt]] = 4, 1, 1, 2
    other[[structure, src, dst, rtt]] = 3, 1, 1, 1  # FAILED is a result
    expected = np.zeros((len(AGES), 2, 5))
    expected[0, 1], expected[2, 1], expected[1, 0] = own, same, other
    np.testing.assert_allclose(found.tokens[0], expected / 20)
    expected[0, 1, rtt] = 1
    np.testing.assert_allclose(found.tokens[1], expected / 21)
    assert (found.results, found.met_before, found.least_earlier) == (1, 1, 2)


def test_results_count_that_have_ten_measurements_before_them_where_there_are_such():
    long, short = [*(ping(i) for i in range(12))], [ping(1), ping(2), ping(3, tk.FAILED)]
    layouts = [Layout.of(np.concatenate(pings)) for pings in (long, short)]
    assert answered(layouts) == ([[10, 11], []], 10)
    assert answered(layouts[1:]) == ([[1]], 1)
    with pytest.raises(ValueError, match="no ping of these windows has an RTT"):
        answered([Layout.of(np.array(ping(1, tk.FAILED)))])


def test_windows_are_as_long_as_the_model_reads():
    assert all(len(window) == config_of().seq_len for window in windows(2))
