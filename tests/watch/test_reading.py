"""A result's p-values are right whatever its packets have in common; losses and RTTs do not hide each other."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from ping_llm.watch.hysteresis import Pair, Rule
from ping_llm.watch.reading import KEPT, PACKETS_OF_PAIR, REFIT, Habit, Losses, Others, Reading, middle

ANSWERED, LOST = (20.0,) * 3, (-1.0,) * 3


def read(packets, rtt_ms=ANSWERED) -> tuple[Reading, list]:
    """The p-values of n results of one packet pattern each, (n, P), of pairs of which nothing is usual."""
    reading, found = Reading(), []
    for own in packets.tolist():
        found.append(reading.p_values(rtt_ms, own, Habit()))
        reading = reading.after(rtt_ms, own, Habit())
    return reading, found


def of_pair(lost: float, sent: float) -> Habit:
    return Habit(losses=Losses(lost, sent))


def test_losses_are_judged_by_the_rate_of_their_pair():
    """One of a hundred is lost of all; of the pair none of 70, or 20 of 70; 30 packets at the rate of all are added."""
    p_values = Reading().p_values
    assert p_values(LOST, [0.5] * 3, of_pair(0, 70)).losses == pytest.approx(0.003**3)
    assert p_values(LOST, [0.5] * 3, of_pair(20, 70)).losses == pytest.approx(0.203**3)
    two = p_values((20.0, -1.0, -1.0), [0.5] * 3, of_pair(20, 70)).losses
    assert two == pytest.approx(binom.sf(1, 3, 0.203))
    assert p_values(ANSWERED, [1e-9] * 3, of_pair(20, 70)).losses == 1
    new = p_values(LOST, [0.5] * 3, Habit())
    assert new.losses == pytest.approx(1e-6) and new.rtts == 1


def test_rtts_are_judged_by_the_answers_alone():
    reading = read(np.random.default_rng(0).random((REFIT, 3)))[0]
    alone = reading.p_values((20.0,), [0.01], Habit())
    for beside in (1e-12, 1.0):
        assert reading.p_values((-1.0, 20.0, -1.0), [beside, 0.01, beside], Habit()).rtts == alone.rtts
    assert middle([0.3, 0.1, 0.2]) == 0.2 and middle([0.1, 0.2]) == 0.2 and middle([0.4]) == 0.4


def test_three_losses_count_however_wrong_the_model_is_about_rtts():
    """Of a third of the results it says 1e-9: their RTTs are no longer unlikely, an outage still is."""
    rng = np.random.default_rng(0)
    reading = read(np.where(rng.random((KEPT, 1)) < 1 / 3, 1e-9, rng.random((KEPT, 3))))[0]
    assert reading.p_values(ANSWERED, [1e-9] * 3, Habit()).rtts > 0.1
    assert reading.p_values(LOST, [0.05] * 3, of_pair(0, 270)).losses < 1e-5


@pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
def test_p_values_are_right_whatever_packets_have_in_common(common):
    """Of 3,000 results whose packets are alike with a probability: the standard deviation is 0.006 at 0.1 and 0.003 at 0.02,
    and as much again of what they are read against."""
    rng = np.random.default_rng(3)
    alone, alike = rng.random((3000, 3)), rng.random((3000, 1))
    _, found = read(np.where(rng.random((3000, 1)) < common, alike, alone))
    for share in (0.02, 0.1, 0.5):
        below = np.mean(np.array([one.rtts for one in found[500:]]) <= share)
        assert below == pytest.approx(share, rel=0.5 if share == 0.02 else 0.2)


def test_losses_that_come_together_are_not_taken_for_independent():
    """5 % of all results lose all three packets: by the binomial of 5 % that would be 1e-4 of them."""
    reading, habit, below = Reading(), Habit(), []
    for lost in np.random.default_rng(0).random(3000) < 0.05:
        rtt_ms = LOST if lost else ANSWERED
        below.append(reading.p_values(rtt_ms, [0.5] * 3, habit).losses <= 0.01)
        reading, habit = reading.after(rtt_ms, [0.5] * 3, habit), habit.after(rtt_ms, [0.5] * 3, False, False)
    assert sum(below[:500]) > 10 and sum(below[1000:]) < 20


def test_with_few_results_the_middle_answer_speaks():
    reading, found = read(np.full((REFIT - 1, 3), [0.1, 0.9, 0.4]))
    assert {one.rtts for one in found} == {0.4} and not reading.of_rtts.fitted.count
    assert reading.after(ANSWERED, [0.1, 0.9, 0.4], Habit()).of_rtts.fitted.count == REFIT


def test_what_is_usual_for_a_pair_is_no_anomaly_there():
    """A model that says 1e-6 of every result of a pair, and then 1e-12, which is an anomaly there too."""
    rule, reading, pair, habit, changes = Rule(), Reading(), Pair(), Habit(), []
    rng = np.random.default_rng(0)
    for number in range(200):
        packets = (1e-6 * rng.random(3)).tolist() if number < 150 else [1e-12] * 3
        verdict = rule.judge(pair, (number, 1.0), reading.p_values(ANSWERED, packets, habit))
        pair, habit = verdict.pair, habit.after(ANSWERED, packets, number >= 150, False)
        changes += [(number, verdict.change)] if verdict.change else []
    assert changes[0] == (150, "opened")


def test_usual_results_make_no_p_value_smaller():
    reading = Reading()
    for usual in ((0.5,) * 9, (0.9,) * 9, (0.1,) * 9, ()):
        assert reading.p_values((20.0,), [0.03], Habit(usual)).rtts >= 0.03
    assert reading.p_values((20.0,), [0.03], Habit((0.1,) * 9)).rtts == pytest.approx(0.15)


def test_a_habit_is_of_no_anomaly_until_one_is_accepted():
    habit = Habit()
    for _ in range(200):
        habit = habit.after(ANSWERED, [0.5] * 3, False, False)
    in_it = habit
    for _ in range(9):
        in_it = in_it.after((20.0, -1.0, -1.0), [0.01, 0.2, 0.2], True, False)
    assert (in_it.p_values, in_it.losses) == (habit.p_values, habit.losses)
    accepted = in_it.after((20.0, -1.0, -1.0), [0.01, 0.2, 0.2], False, True)
    assert accepted.p_values == (0.01,) * 9
    assert accepted.losses == Losses(pytest.approx(2 / 3 * PACKETS_OF_PAIR), PACKETS_OF_PAIR)


def test_rates_forget():
    """After 300 packets a loss counts for 1/e."""
    losses = Losses(0.0, 0.0).after((-1.0, 20.0, 20.0), 300.0)
    assert losses == Losses(1, 3)
    for _ in range(100):
        losses = losses.after(ANSWERED, 300.0)
    assert losses.lost == pytest.approx(np.exp(-1), rel=0.01)


def test_a_reading_is_bounded_and_the_same_from_the_disk():
    reading, _ = read(np.random.default_rng(0).random((KEPT + 700, 3)))
    for others in (reading.of_losses, reading.of_rtts):
        assert len(others.values) == KEPT and others.new == 200
    again = Reading.of_json(reading.to_json())
    assert again == reading
    assert again.p_values(LOST, [0.01] * 3, Habit()) == reading.p_values(LOST, [0.01] * 3, Habit())
    assert replace(again, of_rtts=Others()) != reading


def test_a_lossy_pair_among_others_that_lose_nothing_is_judged_by_its_own_rate():
    """One that loses half of its packets: three of three are an eighth of its results, however rare among all."""
    reading, _ = read(np.full((REFIT, 3), 0.5))
    lossy = of_pair(150_000, 300_000)
    assert reading.of_losses.p_value(0.125) < 0.05
    assert reading.p_values(LOST, [0.5] * 3, lossy).losses == pytest.approx(0.125, rel=1e-3)


def test_results_without_answers_say_nothing_of_rtts():
    reading = Reading().after(LOST, [0.01] * 3, Habit())
    assert reading.of_rtts == Others() and len(reading.of_losses.values) == 1
