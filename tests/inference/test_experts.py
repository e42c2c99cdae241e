"""Experts answer with kernels around past results, as far as these count; their sums are those of a slow reference."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.inference.distribution import log_edges
from ping_llm.inference.experts import CUTS, LEAST_WEIGHT, PAST, SITUATION, Expert, Experts, Past

SHARES = ((0.5, 0.1, -0.3, 0.2), (0.0, 0.4, 0.1, -0.2), (-1.0, -0.2, 0.5, 0.3))
EXPERT = Expert((-1.05, 0.2), (0.002, 0.03, 0.25), SHARES)
EDGES = log_edges()
pasts = st.lists(
    st.tuples(st.lists(st.floats(-6.5, 15), min_size=0, max_size=PAST), st.floats(0, 500)), min_size=1, max_size=4
)


def past_of(drawn: list[tuple[list[float], float]]) -> Past:
    log_ms = np.full((len(drawn), PAST), np.nan)
    for line, (values, _) in zip(log_ms, drawn, strict=True):
        line[: len(values)] = values
    return Past(log_ms, np.array([first for _, first in drawn]))


def laplace(x: float, center: float, width: float) -> float:
    return 0.5 * math.exp((x - center) / width) if x < center else 1 - 0.5 * math.exp((center - x) / width)


def slow_cdf(values: list[float], first: float, x: float) -> float:
    """Of one query, term by term."""
    middle = sorted(values)
    half = len(middle) // 2
    median = middle[half] if len(middle) % 2 else (middle[half - 1] + middle[half]) / 2
    spread = sum(abs(value - median) for value in values) / len(values)
    features = (1.0, math.log(len(values)), math.log(1 + first), math.log(spread + 1e-3))
    logits = [sum(a * b for a, b in zip(row, features, strict=True)) for row in SHARES]
    shares = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    decay = math.log1p(math.exp(-1.05 + 0.2 * math.log(1 + first)))
    weights = [math.exp(-decay * rank) for rank in range(len(values))]

    def whole(at: float) -> float:
        return sum(
            share * weight / sum(weights) * laplace(at, value, width)
            for share, width in zip(shares, EXPERT.widths, strict=True)
            for weight, value in zip(weights, values, strict=True)
        )

    low, high = EDGES[0], EDGES[-1]
    return (whole(min(max(x, low), high)) - whole(low)) / (whole(high) - whole(low))


@settings(max_examples=60, deadline=None)
@given(pasts, st.lists(st.floats(-8, 16), min_size=1, max_size=5))
def test_the_distribution_function_is_the_sum_of_the_kernels_given_that_the_result_has_a_code(drawn, points):
    found = EXPERT.cdf(past_of(drawn), np.tile(points, (len(drawn), 1)))
    for line, (values, first) in zip(found, drawn, strict=True):
        if values:
            assert line == pytest.approx([slow_cdf(values, first, x) for x in points], abs=1e-9)
        else:
            assert np.isnan(line).all()


@settings(max_examples=20, deadline=None)
@given(pasts)
def test_the_probabilities_of_the_codes_are_the_differences_of_the_distribution_function(drawn):
    past = past_of(drawn)
    codes = EXPERT.code_probability(past)
    for row, count in enumerate(past.count):
        one = past.take(np.array([row]))
        if count:
            np.testing.assert_allclose(codes[row], np.diff(EXPERT.cdf(one, EDGES[None])[0]), atol=2e-5)
            assert codes[row].sum() == pytest.approx(1)
        else:
            assert not codes[row].any()


def test_features_are_the_number_the_age_and_the_spread_of_the_results():
    features = past_of([([1.0, 3.0, 2.0], 23.0), ([], 0.0)]).features
    assert features[0] == pytest.approx([1, math.log(3), math.log(24), math.log(2 / 3 + 1e-3)])
    assert features[1] == pytest.approx([1, 0, 0, math.log(1e-3)])


def test_a_result_repeats_where_its_past_does():
    codes = EXPERT.code_probability(past_of([([3.0] * 8, 0.1)]))[0]
    code = np.searchsorted(EDGES, 3.0) - 1
    assert codes.argmax() in (code, code + 1)  # where the kernels are, of which the narrowest counts as its share says
    share = np.exp(np.array(SHARES) @ [1, math.log(8), math.log(1.1), math.log(1e-3)])
    reach = np.minimum(EDGES[code + 41] - 3.0, 3.0 - EDGES[code - 40])
    within = 1 - np.exp(-reach / np.array(EXPERT.widths))
    assert codes[code - 40 : code + 41].sum() == pytest.approx((share / share.sum()) @ within, abs=0.01)


def test_weights_are_the_odds_of_the_parts_and_small_ones_are_none():
    situation = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, math.log(11)], [0.0, 0.0, 0.0]])
    past = {"pair": past_of([([2.0], 0.0), ([2.0, 2.5], 4.0), ([], 0.0)])}
    cuts = ((0.5, 0.0, 1.0, 0.0), (-9.0, 0.0, 0.0, 0.0))
    odds = {"pair": (1.0, 0.5, -0.2, 0.0, 0.3, -0.4, 0.1)}
    weights = Experts({"pair": EXPERT}, cuts, odds).weights(past, situation, np.array([[1, 1], [1, 0], [0, 0]], bool))
    assert weights.shape == (2 + len(CUTS), 3) and len(SITUATION) == 3
    np.testing.assert_allclose(weights.sum(axis=0), 1)
    # of the first: 0; 0.5 + 1; −9, too little; 1 − 0.4
    exact = np.exp([0, 1.5, 0.6])
    assert weights[[0, 1, 3], 0] == pytest.approx(exact / exact.sum()) and weights[2, 0] == 0
    pair = 1 + 0.5 * math.log(2) - 0.2 * math.log(5) + 0.3 + 0.1 * math.log(11)
    exact = np.exp([0, 0.5, pair])
    assert weights[[0, 1, 3], 1] == pytest.approx(exact / exact.sum())
    assert weights[:, 2].tolist() == [1, 0, 0, 0]
    assert np.exp(-9) < LEAST_WEIGHT


def test_rules_are_read_back_as_they_were_written():
    experts = Experts({"pair": EXPERT}, ((0.5, 0.0, 1.0, 0.0),) * 2, {"pair": (1.0,) * 7})
    assert Experts.of_json(experts.to_json()) == experts
    with pytest.raises((KeyError, TypeError)):
        Experts.of_json({"experts": {"pair": {"decay": [1.0, 0.0]}}, "cuts": [], "odds": {}})
