"""Packets of a result and their p-values in, two p-values of the result out: of its losses, and of its RTTs.

Three things keep the p-values of a model from being those of results:

    packets of a result     depend on each other, nobody knows how much: three losses are one outage, or bad luck three times
    pairs                   a model may be wrong about one, and all of its results are then unlikely
    dumps                   a model was calibrated on others

Losses and RTTs are read apart: models often err about RTTs, and an outage would be lost among what they take for unlikely.

    losses    P(Binomial(packets, rate) ≥ lost), with the pair's own rate of loss: of its last packets that belong to no
              anomaly, and PRIOR packets more at the rate of all pairs
    RTTs      a packet's p-value is divided by what is usual for its pair, twice the median of the last ones, if that is
              below 1, which makes no p-value smaller; those of a result are combined as if packets were independent

Either number is read against those of the last results of all pairs, as `PingModel.score` reads its own against val: by an
empirical distribution function and a generalised Pareto tail. Whatever the dependence of packets, a share x of results then
has a p-value of x or less. While there are too few results for that, the binomial and the middle answer count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ping_llm.inference.calibration import Surprise
from ping_llm.watch.hysteresis import PValues, tail, together

KEPT = 4000
"""Results that others are read against."""
REFIT = 500
"""New ones after which they are looked at anew; the first time too."""
USUAL = 9
"""Results of a pair that say what is usual for it."""
PACKETS_OF_PAIR, PACKETS_OF_ALL = 300.0, 3000.0
"""Packets after which a loss counts for 1/e in a rate of loss."""
PRIOR = 30.0
"""Packets at the rate of all pairs that are added to those of a pair."""
_LEAST = 1e-30


@dataclass(frozen=True)
class Losses:
    """Packets that were lost, of those that were sent; older ones count for less."""

    lost: float
    sent: float

    def after(self, rtt_ms: Sequence[float], memory: float) -> Losses:
        """With those of one more result."""
        fades = (1 - 1 / memory) ** len(rtt_ms)
        return Losses(fades * self.lost + sum(rtt < 0 for rtt in rtt_ms), fades * self.sent + len(rtt_ms))


NONE_SENT = Losses(0.0, 0.0)
FIRST = Losses(1.0, 100.0)
"""Of all pairs, before there were any."""


@dataclass(frozen=True)
class Habit:
    """What is usual for a pair."""

    p_values: tuple[float, ...] = ()  # of the answers of the last results that are no anomaly
    lately: tuple[float, ...] = ()  # of those of the last ones, whatever they are
    losses: Losses = NONE_SENT  # of results that are no anomaly
    lost_lately: tuple[float, ...] = ()  # share of each of the last results, whatever it is

    def after(self, rtt_ms: Sequence[float], packets: Sequence[float], is_open: bool, is_accepted: bool) -> Habit:
        """With one more result; what an anomaly that is accepted was like lately is usual from then on."""
        answers = _answers(rtt_ms, packets)
        own = (middle(answers),) if answers else ()
        lately = (*self.lately, *own)[-USUAL:]
        lost_lately = (*self.lost_lately, sum(rtt < 0 for rtt in rtt_ms) / len(rtt_ms))[-USUAL:]
        now = replace(self, lately=lately, lost_lately=lost_lately)
        if is_accepted:
            share = sum(lost_lately) / len(lost_lately)
            return replace(now, p_values=lately, losses=Losses(share * PACKETS_OF_PAIR, PACKETS_OF_PAIR))
        if is_open:
            return now
        usual = (*self.p_values, *own)[-USUAL:]
        return replace(now, p_values=usual, losses=self.losses.after(rtt_ms, PACKETS_OF_PAIR))

    @classmethod
    def of_json(cls, one: dict[str, Any]) -> Habit:
        """What `asdict` made of one."""
        tuples = {name: tuple(one[name]) for name in ("p_values", "lately", "lost_lately")}
        return cls(**tuples, losses=Losses(**one["losses"]))


@dataclass(frozen=True)
class Others:
    """What the last results of all pairs were, and how to read one more."""

    fitted: Surprise = field(default_factory=Surprise)
    values: tuple[float, ...] = ()
    new: int = 0  # of these, since it was fitted

    def p_value(self, own: float) -> float | None:
        """The share of them that are at least as unlikely; None while there are too few."""
        return float(self.fitted.calibrated(np.array([own]))[0]) if self.fitted.count else None

    def after(self, own: float) -> Others:
        """With one more."""
        values = (*self.values, own)[-KEPT:]
        if self.new + 1 < REFIT:
            return replace(self, values=values, new=self.new + 1)
        return Others(Surprise.fit(np.array(values)), values)

    @classmethod
    def of_json(cls, one: dict[str, Any]) -> Others:
        """What `asdict` made of one."""
        return cls(Surprise.of_json(one["fitted"]), tuple(one["values"]), one["new"])


@dataclass(frozen=True)
class Reading:
    """What the results of a watch were, and how to read more."""

    of_losses: Others = field(default_factory=Others)
    of_rtts: Others = field(default_factory=Others)
    losses: Losses = FIRST  # of all pairs

    def p_values(self, rtt_ms: Sequence[float], packets: Sequence[float], habit: Habit) -> PValues:
        """Of one result, by the RTTs of its packets in ms, −1 if lost, their p-values, and what is usual for its pair."""
        lost, rtts = self._of_losses(rtt_ms, habit), _of_rtts(rtt_ms, packets, habit)
        of_losses = self.of_losses.p_value(lost) if lost < 1 else None
        of_rtts = self.of_rtts.p_value(rtts) if rtts < 1 else None
        if of_rtts is None:
            of_rtts = middle(_relative(_answers(rtt_ms, packets), habit)) if rtts < 1 else 1.0
        # By the pair's own rate, results in a row are independent; to be rare among all pairs is none of its faults.
        return PValues(lost if of_losses is None else max(of_losses, lost), of_rtts)

    def after(self, rtt_ms: Sequence[float], packets: Sequence[float], habit: Habit) -> Reading:
        """With one more result, of no known anomaly."""
        has_answers = any(rtt >= 0 for rtt in rtt_ms)
        return Reading(
            self.of_losses.after(self._of_losses(rtt_ms, habit)),
            self.of_rtts.after(_of_rtts(rtt_ms, packets, habit)) if has_answers else self.of_rtts,
            self.losses.after(rtt_ms, PACKETS_OF_ALL),
        )

    def _of_losses(self, rtt_ms: Sequence[float], habit: Habit) -> float:
        """P(so many of the packets are lost, or more) by the pair's own rate."""
        lost = sum(rtt < 0 for rtt in rtt_ms)
        rate = (habit.losses.lost + PRIOR * self.losses.lost / self.losses.sent) / (habit.losses.sent + PRIOR)
        return max(tail(len(rtt_ms), lost, rate), _LEAST) if lost else 1.0

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Reading:
        """What `to_json` made of one."""
        one = json.loads(text)
        return cls(Others.of_json(one["of_losses"]), Others.of_json(one["of_rtts"]), Losses(**one["losses"]))


def middle(packets: Sequence[float]) -> float:
    """That in the middle; of an even number the larger one of the two there."""
    return sorted(packets)[len(packets) // 2]


def _of_rtts(rtt_ms: Sequence[float], packets: Sequence[float], habit: Habit) -> float:
    relative = _relative(_answers(rtt_ms, packets), habit)
    return max(together(relative), _LEAST) if relative else 1.0


def _answers(rtt_ms: Sequence[float], packets: Sequence[float]) -> list[float]:
    """The p-values of packets that were answered."""
    return [p for rtt, p in zip(rtt_ms, packets, strict=True) if rtt >= 0]


def _relative(packets: Sequence[float], habit: Habit) -> list[float]:
    scale = min(2 * middle(habit.p_values), 1.0) if habit.p_values else 1.0
    return [min(p / max(scale, _LEAST), 1.0) for p in packets]
