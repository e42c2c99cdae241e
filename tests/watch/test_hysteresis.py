"""When anomalies open and close, against a slow reference and values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binom

from ping_llm.watch.hysteresis import HELD, Pair, PValues, Rule, in_a_row, tail, together

ONE = st.sampled_from([1e-6, 1e-4, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.11, 0.3, 0.5, 0.9, 1.0])
P_VALUES = st.builds(PValues, ONE, ONE)


def of_losses(*p_values: float) -> list[PValues]:
    return [PValues(p, 1.0) for p in p_values]


def of_rtts(*p_values: float) -> list[PValues]:
    return [PValues(1.0, p) for p in p_values]


QUIET = of_losses(*[0.5] * 10)


def judged(rule: Rule, p_values) -> list:
    """The verdict on each of some results, which are numbered by their times."""
    pair, found = Pair(), []
    for number, both in enumerate(p_values, 1):
        verdict = rule.judge(pair, (number, float(number)), both)
        pair = verdict.pair
        found.append(verdict)
    return found


class Slow:
    """All results of a pair from the first on, looked at anew after each; what opened and closed, and what joined."""

    def __init__(self, rule: Rule, p_values) -> None:
        self.changes, self.joined = [], list(range(1, min(rule.learn, len(p_values)) + 1))
        begin, opened, waiting = rule.learn + 1, None, []  # number of the first result of the window that counts
        for i in range(rule.learn + 1, len(p_values) + 1):
            p = min(2 * min(p_values[i - 1]), 1)
            window = list(range(max(begin, i - rule.last + 1), i + 1))
            n = len(window)
            lost, slow = (sorted(window, key=lambda j: p_values[j - 1][side]) for side in (0, 1))
            tails = [n * binom.sf(k - 1, n, p_values[j - 1].losses) for k, j in enumerate(lost, 1)]
            shares = [n / k * p_values[j - 1].rtts for k, j in enumerate(slow, 1)]
            shares = [share * sum(1 / k for k in range(1, n + 1)) for share in shares]
            ranked, least = (lost, tails) if min(*tails, 1) <= min(*shares, 1) else (slow, shares)
            combined = min(2 * min(least), 1)
            waiting += [i] if p <= HELD else []
            if p > HELD:
                self.joined.append(i)
            if opened is None:
                if combined <= rule.at:
                    opened, waiting = i, waiting[-1:]
                    since = min(ranked[: int(np.argmin(least)) + 1])
                    self.changes.append(("opened", i, since))
                    continue
                self.joined += [j for j in waiting if j <= i - rule.last]
                waiting = [j for j in waiting if j > i - rule.last]
                continue
            waiting = waiting[-rule.last :]
            if combined >= rule.close:
                self.changes.append(("closed", i, since))
            elif i - opened >= rule.accept:
                self.changes.append(("accepted", i, since))
                self.joined += waiting
            else:
                continue
            begin, opened, waiting = i + 1, None, []


@given(
    st.lists(P_VALUES, max_size=80),
    st.integers(1, 8),
    st.integers(0, 5),
    st.sampled_from([0.001, 0.01]),
)
@example(QUIET + of_losses(*[0.02] * 6) + QUIET + QUIET, 6, 4, 0.001)
@example(QUIET + of_losses(*[0.02] * 40), 6, 4, 0.001)
@example(QUIET + of_rtts(*[1e-4] * 40), 6, 4, 0.001)
def test_anomalies_open_and_close_as_by_the_slow_reference(p_values, last, learn, at):
    rule = Rule(at=at, last=last, accept=12, learn=learn)
    found = judged(rule, p_values)
    changes = [
        (one.change, i, before.since_s if one.change != "opened" else one.pair.since_s)
        for i, (one, before) in enumerate(zip(found, [Pair(), *(v.pair for v in found)], strict=False), 1)
        if one.change
    ]
    slow = Slow(rule, p_values)
    assert changes == slow.changes
    assert sorted(row[0] for one in found for row in one.joins) == sorted(slow.joined)


@given(st.lists(P_VALUES, max_size=80))
def test_openings_and_ends_take_turns_and_no_result_joins_twice(p_values):
    found = judged(Rule(accept=12), p_values)
    changes = [one.change for one in found if one.change]
    assert all(change == "opened" for change in changes[::2]) and "opened" not in changes[1::2]
    joined = [row for one in found for row in one.joins]
    assert len(set(joined)) == len(joined)
    assert all(len(one.pair.recent) <= 6 and len(one.pair.held) <= 6 for one in found)


def test_the_tail_is_that_of_the_binomial_distribution():
    assert tail(6, 3, 0.02) == pytest.approx(
        20 * 0.02**3 * 0.98**3 + 15 * 0.02**4 * 0.98**2 + 6 * 0.02**5 * 0.98 + 0.02**6
    )
    for n in (1, 2, 6, 20):
        for k in range(1, n + 1):
            for x in (1e-9, 0.01, 0.5, 1.0):
                assert tail(n, k, x) == pytest.approx(binom.sf(k - 1, n, x), rel=1e-9)


def test_the_fourth_lost_ping_in_a_row_is_an_outage():
    """p = 0.02 each, among 6: 2 · 6 · P(Bin(6, 0.02) ≥ 3) = 12 · 1.53e-4 = 1.8e-3, and P(… ≥ 4) = 2.3e-6."""
    found = judged(Rule(), QUIET + of_losses(*[0.02] * 4, 0.5))
    assert [one.change for one in found[10:]] == [None, None, None, "opened", None]
    assert found[12].combined == pytest.approx(1.84e-3, rel=0.01)
    assert found[13].combined == pytest.approx(12 * tail(6, 4, 0.02)) and found[13].combined < 3e-5
    assert found[13].pair.since_s == 11


def test_one_extreme_result_opens_by_itself():
    """Losses: 2 · 6 · (1 − (1 − p)^6), about 72 p, is 0.001 at p = 1.39e-5. RTTs: 2 · 2.45 · 6 · p is that at 3.4e-5."""
    for of, below, above in ((of_losses, 1.3e-5, 1.5e-5), (of_rtts, 3.3e-5, 3.5e-5)):
        assert judged(Rule(), QUIET + of(below))[-1].change == "opened"
        assert judged(Rule(), QUIET + of(above))[-1].change is None


def test_rtts_of_a_pair_in_a_row_are_taken_for_one_result():
    """Six of 2.1e-4 each: 2 · 2.45 · 6/6 · 2.1e-4 = 1.03e-3. Losses as unlikely open at the second."""
    assert in_a_row([0.1, 0.02, 0.5]) == pytest.approx((1 + 1 / 2 + 1 / 3) * 3 * 0.02)
    assert in_a_row([0.1, 0.1, 0.5]) == pytest.approx((1 + 1 / 2 + 1 / 3) * 3 / 2 * 0.1)
    assert in_a_row([0.5, 0.9]) == 1
    assert {one.change for one in judged(Rule(), QUIET + of_rtts(*[2.1e-4] * 12))} == {None}
    assert judged(Rule(), QUIET + of_rtts(*[2.0e-4] * 6))[-1].change == "opened"
    assert judged(Rule(), QUIET + of_losses(*[2.1e-4] * 2))[-1].change == "opened"


def test_three_losses_are_worth_more_than_one():
    assert together([0.02]) == pytest.approx(0.02)
    assert together([0.02] * 3) == pytest.approx(3 * 0.02**3)
    assert together([0.02, 0.9, 0.9]) == pytest.approx(3 * (1 - 0.98**3))
    assert together([1.0] * 3) == 1 and together([0.0] * 3) == 0


def test_a_lossy_path_has_outages_too():
    """No single p-value below 0.2, and six of them are as rare as 2 · 6 · 0.2^6 = 7.7e-4."""
    assert judged(Rule(), QUIET + of_losses(*[0.2] * 6))[-1].change == "opened"


def test_an_anomaly_stays_out_of_the_context_and_a_stray_result_joins_late():
    found = judged(Rule(), QUIET + of_losses(*[0.02] * 4, *[0.5] * 12))
    joined = [row[0] for one in found for row in one.joins]
    assert joined == [i for i in range(1, 27) if i not in (11, 12, 13, 14)]
    found = judged(Rule(), QUIET + of_losses(0.05, *[0.5] * 6))
    assert [row[0] for one in found for row in one.joins] == [*range(1, 11), 12, 13, 14, 15, 16, 11, 17]


def test_what_lasts_is_accepted_and_then_known():
    found = judged(Rule(accept=10), QUIET + of_losses(*[0.02] * 20))
    at = [(i, one.change) for i, one in enumerate(found, 1) if one.change]
    assert at[:2] == [(14, "opened"), (24, "accepted")]
    assert [row[0] for row in found[23].joins] == [19, 20, 21, 22, 23, 24]


@pytest.mark.parametrize("as_last", [0.0, 0.5, 0.95])
def test_by_chance_anomalies_open_at_most_as_often_as_asked_for(as_last):
    """30,000 uniform p-values at 0.01, those of RTTs as in the result before with a probability: errors last."""
    rule, rng = Rule(at=0.01, close=0.1), np.random.default_rng(0)
    losses, rtts, keeps = rng.random((3, 30_000))
    for i in np.flatnonzero(keeps < as_last)[1:]:
        rtts[i] = rtts[i - 1]
    found = judged(rule, [PValues(*both) for both in zip(losses.tolist(), rtts.tolist(), strict=True)])
    opened = sum(one.change == "opened" for one in found)
    assert 0.02 * 0.01 < opened / 30_000 <= 0.01


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"at": 0}, "at=0"),
        ({"at": math.nan}, "at=nan"),
        ({"at": 0.2}, "at < close"),
        ({"last": 0}, "last=0"),
        ({"accept": 6}, "accept=6"),
        ({"learn": -1}, "learn=-1"),
    ],
)
def test_rules_that_cannot_be_are_refused(given_, says):
    with pytest.raises(ValueError, match=says):
        Rule(**given_)
