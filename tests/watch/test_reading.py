"""A result's p-value is right whatever its packets have in common; a pair that a model is wrong about raises no alarms."""

import numpy as np
import pytest

from ping_llm.watch.hysteresis import Pair, Rule
from ping_llm.watch.reading import KEPT, REFIT, USUAL, Reading, middle, together


def read(packets) -> tuple[Reading, list[float]]:
    """The p-values of n results of one packet pattern each, (n, P), of pairs of which nothing is usual."""
    reading, found = Reading(), []
    for own in packets.tolist():
        found.append(reading.p_value(own, ()))
        reading = reading.after(own, ())
    return reading, found


def test_three_losses_are_worth_more_than_one():
    assert together([0.02]) == pytest.approx(0.02)
    assert together([0.02] * 3) == pytest.approx(3 * 0.02**3)
    assert together([0.02, 0.9, 0.9]) == pytest.approx(3 * (1 - 0.98**3))
    assert together([1.0] * 3) == 1 and together([0.0] * 3) == 1e-30
    assert middle([0.3, 0.1, 0.2]) == 0.2 and middle([0.1, 0.2]) == 0.2 and middle([0.4]) == 0.4


@pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
def test_p_values_are_right_whatever_packets_have_in_common(common):
    """Of 3,000 results whose packets are alike with a probability: the standard deviation is 0.006 at 0.1 and 0.003 at 0.02,
    and as much again of what they are read against."""
    rng = np.random.default_rng(3)
    alone, alike = rng.random((3000, 3)), rng.random((3000, 1))
    _, found = read(np.where(rng.random((3000, 1)) < common, alike, alone))
    for share in (0.02, 0.1, 0.5):
        assert np.mean(np.array(found[500:]) <= share) == pytest.approx(share, rel=0.5 if share == 0.02 else 0.2)


def test_with_few_results_the_middle_packet_speaks():
    reading, found = read(np.full((REFIT - 1, 3), [0.1, 0.9, 0.4]))
    assert set(found) == {0.4} and not reading.fitted.count
    assert reading.after([0.1, 0.9, 0.4], ()).fitted.count == REFIT


def test_what_is_usual_for_a_pair_is_no_anomaly_there():
    """A model that says 1e-6 of every result of a pair, and then 1e-12, which is an anomaly there too."""
    rule, reading, pair, usual, changes = Rule(), Reading(), Pair(), (), []
    rng = np.random.default_rng(0)
    for number in range(200):
        packets = (1e-6 * rng.random(3)).tolist() if number < 150 else [1e-12] * 3
        verdict = rule.judge(pair, (number, 1.0), reading.p_value(packets, usual))
        pair, usual = verdict.pair, (*usual, middle(packets))[-USUAL:] if number < 150 else usual
        changes += [(number, verdict.change)] if verdict.change else []
    assert changes[0] == (150, "opened")


def test_usual_results_make_no_p_value_smaller():
    reading = Reading()
    for usual in ((0.5,) * 9, (0.9,) * 9, (0.1,) * 9, ()):
        assert reading.p_value([0.03], usual) >= 0.03
    assert reading.p_value([0.03], (0.1,) * 9) == pytest.approx(0.15)


def test_a_reading_is_bounded_and_the_same_from_the_disk():
    reading, _ = read(np.random.default_rng(0).random((KEPT + 700, 3)))
    assert len(reading.values) == KEPT and reading.new == 200
    again = Reading.of_json(reading.to_json())
    assert again == reading and again.p_value([0.01] * 3, ()) == reading.p_value([0.01] * 3, ())
