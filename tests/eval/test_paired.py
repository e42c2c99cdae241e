"""Paired differences and the noise over seeds, by numbers worked out by hand and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.eval.paired import Noise, difference, t_quantile

NUMBERS = st.lists(st.floats(-100, 100), min_size=2, max_size=6)


def test_a_paired_interval_is_that_of_student_by_hand():
    """Differences −1, 0, −2: mean −1, deviation 1; t(0.975, 2) = 4.302653; 4.302653 ÷ √3 = 2.484138."""
    found = difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 2.0, 2: 5.0}, None)
    assert (found.value, found.pairs, found.exceeds_noise) == (-1.0, 3, None)
    assert found.interval == pytest.approx((-3.484138, 1.484138), abs=1e-6)


def test_quantiles_of_student_are_those_of_the_tables():
    assert [round(t_quantile(freedom), 3) for freedom in (1, 2, 3, 10, 30)] == [12.706, 4.303, 3.182, 2.228, 2.042]


def test_runs_are_paired_by_seed_and_others_left_out():
    found = difference({5: 1.0, 6: 9.0, 7: 100.0}, {6: 4.0, 5: 2.0, 8: -100.0}, None)
    assert (found.value, found.pairs) == (2.0, 2)  # 9 − 4 and 1 − 2
    assert found.interval == pytest.approx((2 - 12.7062 * 3, 2 + 12.7062 * 3), abs=1e-3)  # deviation 3·√2, ÷ √2


def test_without_common_seeds_the_means_differ_and_there_is_no_interval():
    found = difference({0: 1.0, 1: 3.0}, {2: 5.0}, Noise(1.0, 10))
    assert (found.value, found.pairs, found.interval) == (-3.0, 0, None)
    assert found.exceeds_noise is True  # 3 > 2.228 · √(1/2 + 1) = 2.729
    assert difference({0: 2.4, 1: 2.4}, {2: 5.0}, Noise(1.0, 10)).exceeds_noise is False
    assert difference({}, {0: 1.0}, None) is None and difference({0: 1.0}, {}, None) is None


def test_the_noise_is_pooled_over_configs_by_hand():
    """1, 3 about 2: 2. 2, 2, 5 about 3: 6. A single run: nothing. √(8 ÷ 3)."""
    noise = Noise.pooled([[1.0, 3.0], [2.0, 2.0, 5.0], [1000.0], []])
    assert noise == Noise(pytest.approx(math.sqrt(8 / 3)), 3)
    threshold = 3.182446 * math.sqrt(8 / 3)  # of two runs beside two: √(1/2 + 1/2) = 1
    assert noise.exceeded_by(-threshold - 1e-4, 2, 2) and not noise.exceeded_by(threshold - 1e-4, 2, 2)
    assert Noise.pooled([[1.0], [2.0]]) is None and Noise.pooled([]) is None


def test_with_one_seed_nothing_is_said_about_noise_unless_it_is_known():
    one = difference({0: 1.0}, {0: 2.0}, Noise.pooled([[1.0], [2.0]]))
    assert (one.pairs, one.interval, one.exceeds_noise) == (1, None, None)
    assert difference({0: 1.0}, {0: 2.0}, Noise(0.1, 15)).exceeds_noise is True


@given(NUMBERS, st.floats(-50, 50))
def test_what_shifts_all_runs_of_a_seed_alike_does_not_widen_the_interval(values, shift):
    ours = dict(enumerate(values))
    theirs = {seed: value + shift for seed, value in ours.items()}
    found = difference(ours, theirs, None)
    assert found.value == pytest.approx(-shift, abs=1e-9)
    assert found.interval == pytest.approx((-shift, -shift), abs=1e-9)


@given(st.lists(NUMBERS, min_size=1, max_size=3), st.floats(-50, 50))
def test_the_noise_does_not_depend_on_how_far_configs_are_apart(groups, shift):
    moved = [[value + number * shift for value in group] for number, group in enumerate(groups)]
    assert Noise.pooled(moved).deviation == pytest.approx(Noise.pooled(groups).deviation, abs=1e-9)


def test_of_configs_that_are_alike_one_difference_in_twenty_exceeds_the_noise():
    rng = np.random.default_rng(0)
    exceeded = covered = 0
    for _ in range(1000):
        groups = rng.normal(size=(2, 4))
        found = difference(dict(enumerate(groups[0])), dict(enumerate(groups[1])), Noise.pooled(groups))
        exceeded += found.exceeds_noise
        covered += found.interval[0] <= 0 <= found.interval[1]
    assert 30 <= exceeded <= 70 and 930 <= covered <= 970
