"""P-values of a pair's results, one after another, in; when an anomaly opens and closes, and what may join the context, out.

Single results do not tell: of a path that loses 20 % of its packets three losses are no anomaly, and yet three times three
are. So the last n results are judged together: their losses, and apart from these their RTTs.

Losses are read by the pair's own rate, so those of n results are taken for independent. Of n independent p-values the k-th
least, p(k), is at most x with probability P(Binomial(n, x) ≥ k), so

    together = n · min over k of P(Binomial(n, p(k)) ≥ k)

is a p-value of them all (Bonferroni over k; Wilkinson, A statistical consideration in psychological research, 1951). RTTs of
a pair in a row depend on each other, for a model that errs about one errs about the next. For these

    in_a_row = (1 + 1/2 + … + 1/n) · min over k of n/k · p(k)

is a p-value whatever the dependence (Hommel, Biometrical Journal 1983). Both are small for one extreme result, k = 1, and
for several of the last n that are unlikely. The smaller one counts, twice (Bonferroni):

    combined = 2 · min(together of losses, in_a_row of RTTs)

An anomaly opens at a result where combined ≤ `at`: by chance at most so often a result, if the p-values of results are right
and losses independent. It closes where combined ≥ `close`: the two levels are far apart, so that it does not open and close
in turn.

What is anomalous must not become the context by which it is judged, or a model that learns from its context would expect it
after one result. So results with p ≤ HELD wait: they join once `last` more have come and nothing opened, and never if an
anomaly opens. What lasts for `accept` results is what is usual from then on: the anomaly closes, and its last results join.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

HELD = 0.2
"""A result with at most this p-value waits before it joins the context."""

Change = Literal["opened", "closed", "accepted"]
Row = tuple[int, float]  # Unix seconds, RTT in ms (−1 = failed)


class PValues(NamedTuple):
    """How unlikely one result was given the context, 0 to 1."""

    losses: float
    rtts: float

    @property
    def of_result(self) -> float:
        """One p-value for both (Bonferroni)."""
        return min(2 * min(self), 1.0)


@dataclass(frozen=True)
class Pair:
    """What is known of the results of a pair."""

    results: int = 0
    recent: tuple[tuple[int, float, float], ...] = ()  # Unix seconds and PValues of the last ones, as they came
    held: tuple[tuple[int, int, float], ...] = ()  # number of the result, and its Row
    since_s: int | None = None  # time of the first result of the anomaly that is open
    until_s: int = 0  # time of the last result of it that was unlikely
    opened_at: int = 0  # number of the result at which it opened


@dataclass(frozen=True)
class Verdict:
    """What follows from one more result."""

    pair: Pair
    combined: float  # p-value of the last results together; 1 while the pair is being learned
    change: Change | None = None
    joins: tuple[Row, ...] = ()  # rows for the context, the oldest first


@dataclass(frozen=True)
class Rule:
    """When anomalies open and close."""

    at: float = 0.001
    """False alarms a result, at most: anomalies that open where nothing happened."""
    close: float = 0.1
    """P-value of the last results together from which on an anomaly closes."""
    last: int = 6
    """Results of a pair that are judged together."""
    accept: int = 50
    """Results after which an anomaly that does not end is taken for what is usual."""
    learn: int = 4
    """First results of a pair, which are context and are not judged."""

    def __post_init__(self) -> None:
        if not 0 < self.at < self.close < 1:
            raise ValueError(f"at={self.at} and close={self.close} must be p-values, 0 < at < close < 1")
        if not 1 <= self.last <= 50:
            raise ValueError(f"last={self.last} must be from 1 to 50 results")
        if self.accept <= self.last or self.learn < 0:
            raise ValueError(f"accept={self.accept} must be above last={self.last}, and learn={self.learn} not below 0")

    def judge(self, pair: Pair, row: Row, p_values: PValues) -> Verdict:
        """One more result of a pair: `row`, and how unlikely it was given the context."""
        number = pair.results + 1
        if number <= self.learn:
            return Verdict(replace(pair, results=number), 1.0, None, (row,))
        recent = (*pair.recent, (row[0], *p_values))[-self.last :]
        combined, first_s = _combined(recent)
        unlikely = p_values.of_result <= HELD
        joins = () if unlikely else (row,)
        held = (*pair.held, (number, *row)) if unlikely else pair.held
        now = replace(pair, results=number, recent=recent)
        if pair.since_s is None:
            if combined <= self.at:
                now = replace(now, held=held[-1:], since_s=first_s, until_s=row[0], opened_at=number)
                return Verdict(now, combined, "opened")
            waited = tuple(one for one in held if one[0] <= number - self.last)
            now = replace(now, held=held[len(waited) :])
            return Verdict(now, combined, None, (*(one[1:] for one in waited), *joins))
        now = replace(now, held=held[-self.last :], until_s=row[0] if unlikely else pair.until_s)
        if combined >= self.close:
            return Verdict(_over(now), combined, "closed", joins)
        if number - pair.opened_at >= self.accept:
            return Verdict(_over(now), combined, "accepted", (*(one[1:] for one in now.held), *joins))
        return Verdict(now, combined, None, joins)


def together(p_values: Sequence[float]) -> float:
    """One p-value of independent ones."""
    return _least(p_values, _of_independent)[0]


def in_a_row(p_values: Sequence[float]) -> float:
    """One p-value of p-values, in whatever way they depend on each other."""
    return _least(p_values, _of_any)[0]


def _combined(recent: Sequence[tuple[int, float, float]]) -> tuple[float, int]:
    """The combined p-value, and the time of the first of those results that it is small for."""
    ways = (1, _of_independent), (2, _of_any)
    found = [(*_least([one[column] for one in recent], way), column) for column, way in ways]
    combined, k, column = min(found, key=lambda one: one[0])
    odd = sorted(recent, key=lambda one: one[column])[:k]
    return min(2 * combined, 1.0), min(one[0] for one in odd)


def _least(p_values: Sequence[float], way: Callable[[int, int, float], float]) -> tuple[float, int]:
    """The combined p-value, and of how many of the least it is that."""
    found = [way(len(p_values), k, p) for k, p in enumerate(sorted(p_values), 1)]
    k = min(range(len(found)), key=found.__getitem__)
    return min(found[k], 1.0), k + 1


def _of_independent(n: int, k: int, x: float) -> float:
    return n * tail(n, k, x)


def _of_any(n: int, k: int, x: float) -> float:
    return sum(1 / i for i in range(1, n + 1)) * n / k * x


def tail(n: int, k: int, x: float) -> float:
    """P(at least k of n independent events of probability x)."""
    return min(math.fsum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(k, n + 1)), 1.0)


def _over(pair: Pair) -> Pair:
    """After an anomaly: the next one needs results of its own."""
    return replace(pair, recent=(), held=(), since_s=None, until_s=0, opened_at=0)
