"""When anomalies open and close, against a slow reference and values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binom

from ping_llm.watch.hysteresis import HELD, Pair, Rule, tail

P_VALUES = st.sampled_from([1e-6, 1e-4, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.21, 0.3, 0.5, 0.9, 1.0])


def judged(rule: Rule, p_values) -> list:
    """The verdict on each of some results, which are numbered by their times."""
    pair, found = Pair(), []
    for number, p_value in enumerate(p_values, 1):
        verdict = rule.judge(pair, (number, float(number)), p_value)
        pair = verdict.pair
        found.append(verdict)
    return found


class Slow:
    """All results of a pair from the first on, looked at anew after each; what opened and closed, and what joined."""

    def __init__(self, rule: Rule, p_values) -> None:
        self.changes, self.joined = [], list(range(1, min(rule.learn, len(p_values)) + 1))
        begin, opened, waiting = rule.learn + 1, None, []  # number of the first result of the window that counts
        for i in range(rule.learn + 1, len(p_values) + 1):
            p = p_values[i - 1]
            window = list(range(max(begin, i - rule.last + 1), i + 1))
            ranked = sorted(window, key=lambda j: p_values[j - 1])
            tails = [binom.sf(k - 1, len(ranked), p_values[j - 1]) for k, j in enumerate(ranked, 1)]
            combined = min(len(ranked) * min(tails), 1)
            waiting += [i] if p <= HELD else []
            if p > HELD:
                self.joined.append(i)
            if opened is None:
                if combined <= rule.at:
                    opened, waiting = i, waiting[-1:]
                    since = min(ranked[: int(np.argmin(tails)) + 1])
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
@example([0.5] * 4 + [0.02] * 6 + [0.5] * 20, 6, 4, 0.001)
@example([0.5] * 4 + [0.02] * 40, 6, 4, 0.001)
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


def test_one_lost_ping_is_none_and_the_third_in_a_row_is_an_outage():
    """p = 0.02 each, among 6: 6 · P(Bin(6, 0.02) ≥ 3) = 6 · 1.53e-4 = 9.2e-4 is the first below 0.001."""
    found = judged(Rule(), [0.5] * 10 + [0.02] * 3 + [0.5])
    assert [one.change for one in found[10:]] == [None, None, "opened", None]
    assert found[12].combined == pytest.approx(9.2e-4, rel=0.01)
    assert found[12].pair.since_s == 11
    assert found[11].combined == pytest.approx(6 * tail(6, 2, 0.02)) and found[11].combined > 0.03


def test_one_extreme_result_opens_by_itself():
    """6 · (1 − (1 − p)^6), about 36 p, is 0.001 at p = 2.78e-5."""
    assert judged(Rule(), [0.5] * 10 + [2.7e-5])[-1].change == "opened"
    assert judged(Rule(), [0.5] * 10 + [2.9e-5])[-1].change is None


def test_a_lossy_path_has_outages_too():
    """No single p-value below 0.2, and six of them are as rare as 6 · 0.2^6 = 3.8e-4."""
    assert judged(Rule(), [0.5] * 10 + [0.2] * 6)[-1].change == "opened"


def test_an_anomaly_stays_out_of_the_context_and_a_stray_result_joins_late():
    found = judged(Rule(), [0.5] * 10 + [0.02] * 3 + [0.5] * 12)
    joined = [row[0] for one in found for row in one.joins]
    assert joined == [i for i in range(1, 26) if i not in (11, 12, 13)]
    found = judged(Rule(), [0.5] * 10 + [0.1] + [0.5] * 6)
    assert [row[0] for one in found for row in one.joins] == [*range(1, 11), 12, 13, 14, 15, 16, 11, 17]


def test_what_lasts_is_accepted_and_then_known():
    found = judged(Rule(accept=10), [0.5] * 10 + [0.02] * 20)
    at = [(i, one.change) for i, one in enumerate(found, 1) if one.change]
    assert at[:2] == [(13, "opened"), (23, "accepted")]
    assert [row[0] for row in found[22].joins] == [18, 19, 20, 21, 22, 23]


def test_by_chance_anomalies_open_at_most_as_often_as_asked_for():
    """30,000 uniform p-values at 0.01: Bonferroni over k keeps the rate below, and not at nothing."""
    rule, rng = Rule(at=0.01, close=0.1), np.random.default_rng(0)
    opened = sum(one.change == "opened" for one in judged(rule, rng.random(30_000).tolist()))
    assert 0.3 * 0.01 < opened / 30_000 <= 0.01


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
