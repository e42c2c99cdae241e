"""What runs of two configs reached, by seed, in; how far apart the configs are, and whether that exceeds the noise, out.

Student, "The probable error of a mean", Biometrika 6(1), 1908: n differences of pairs have the interval
mean ± t(0.975, n − 1) · deviation / √n. The noise is the deviation over seeds of runs of one config, pooled over configs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Noise:
    """The standard deviation of a number over seeds, all else equal, and the degrees of freedom of that estimate."""

    deviation: float
    freedom: int

    @classmethod
    def pooled(cls, groups: Iterable[Sequence[float]]) -> Noise | None:
        """Of groups of runs, each of one config: the root of the sum of squares within groups over Σ (n − 1). None if no
        group has two runs."""
        arrays = [np.asarray(group, dtype=float) for group in groups]
        freedom = sum(max(len(array) - 1, 0) for array in arrays)
        if not freedom:
            return None
        squares = sum(float(((array - array.mean()) ** 2).sum()) for array in arrays if len(array))
        return cls(math.sqrt(squares / freedom), freedom)

    def exceeded_by(self, difference: float, n: int, others: int) -> bool:
        """Whether the difference between the means of n and of `others` runs is larger than 95 % of those of one config."""
        return abs(difference) > t_quantile(self.freedom) * self.deviation * math.sqrt(1 / n + 1 / others)


@dataclass(frozen=True)
class Difference:
    """Of a config from the one it is compared with."""

    value: float
    pairs: int  # seeds that both have; 0 = none, and the value is that between the means of all
    interval: tuple[float, float] | None  # of 95 %; None with fewer than two pairs
    exceeds_noise: bool | None  # None where the noise is not known


def difference(
    ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], noise: Noise | None
) -> Difference | None:
    """Between two configs whose runs reached these numbers, by seed; None if one has no run."""
    if not ours or not theirs:
        return None
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if pairs:
        value, counts = float(np.mean(pairs)), (len(pairs), len(pairs))
    else:
        value = float(np.mean([*ours.values()]) - np.mean([*theirs.values()]))
        counts = len(ours), len(theirs)
    interval = None
    if len(pairs) > 1:
        half = t_quantile(len(pairs) - 1) * float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs))
        interval = (value - half, value + half)
    return Difference(value, len(pairs), interval, noise.exceeded_by(value, *counts) if noise else None)


def t_quantile(freedom: int) -> float:
    """That of Student's t which 95 % of its values are below in size."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))
