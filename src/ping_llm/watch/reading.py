"""P-values of packets in, one p-value of each result out, read against what results of the same watch were.

Three things keep the p-values of a model from being those of results:

    packets of a result     depend on each other, nobody knows how much: three losses are one outage, or bad luck three times
    pairs                   a model may be wrong about one, and all of its results are then unlikely
    dumps                   a model was calibrated on others

So a packet's p-value is divided by what is usual for its pair, twice the median of the last ones, if that is below 1: that
makes no p-value smaller. Those of a result are combined as if packets were independent. And that number is read against
those of the last results of all pairs, as `PingModel.score` reads its own against val: by an empirical distribution function
and a generalised Pareto tail. Whatever the dependence, a share x of results then has a p-value of x or less. While there are
too few results for that, the middle packet speaks for its result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from ping_llm.inference.calibration import Surprise
from ping_llm.watch.hysteresis import tail

KEPT = 4000
"""Results that others are read against."""
REFIT = 500
"""New ones after which they are looked at anew; the first time too."""
USUAL = 9
"""P-values of a pair that say what is usual for it."""
_LEAST = 1e-30


@dataclass(frozen=True)
class Reading:
    """What the results of a watch were, and how to read more."""

    fitted: Surprise = field(default_factory=Surprise)
    values: tuple[float, ...] = ()  # the last ones, as `together` gives them
    new: int = 0  # of these, since it was fitted

    def p_value(self, packets: Sequence[float], usual: Sequence[float]) -> float:
        """Of one result, by the p-values of its packets and the last ones of its pair."""
        relative = _relative(packets, usual)
        if not self.fitted.count:
            return middle(relative)
        return float(self.fitted.calibrated(np.array([together(relative)]))[0])

    def after(self, packets: Sequence[float], usual: Sequence[float]) -> Reading:
        """With one more result, of no known anomaly."""
        values = (*self.values, together(_relative(packets, usual)))[-KEPT:]
        if self.new + 1 < REFIT:
            return replace(self, values=values, new=self.new + 1)
        return Reading(Surprise.fit(np.array(values)), values)

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Reading:
        """What `to_json` made of one."""
        one = json.loads(text)
        return cls(Surprise.of_json(one["fitted"]), tuple(one["values"]), one["new"])


def together(packets: Sequence[float]) -> float:
    """One p-value of independent ones: n · min over k of P(Binomial(n, p(k)) ≥ k), as in hysteresis."""
    n = len(packets)
    return max(min(1.0, *(n * tail(n, k, p) for k, p in enumerate(sorted(packets), 1))), _LEAST)


def middle(packets: Sequence[float]) -> float:
    """That in the middle; of an even number the larger one of the two there."""
    return sorted(packets)[len(packets) // 2]


def _relative(packets: Sequence[float], usual: Sequence[float]) -> list[float]:
    scale = min(2 * middle(usual), 1.0) if usual else 1.0
    return [min(p / max(scale, _LEAST), 1.0) for p in packets]
