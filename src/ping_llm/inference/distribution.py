"""Probabilities of the 65,536 RTT codes and of failure in, every statistic of the RTT out, in closed form.

Within a code the density is uniform in log-RTT: a code is 0.05 % wide, so nothing that is asked depends on it. All
statistics of the RTT are of an answered ping; `p_fail` stands beside them. The formulas are in distributions.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from ping_llm.data.measurement import FAILED_RTT_MS
from ping_llm.inference.distributions import RTTDistributions

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True, eq=False)
class RTTDistribution:
    """The law of the result of one ping.

    `code_probability` is (65,536,) float64 or float32, the probability that the ping is answered with an RTT of that code,
    and `p_fail` that it is not answered; together they sum to 1. `total_probability` is the mass that the raw model put on
    valid results before they were made to. `unresolved` is the probability of RTTs that were computed to byte 1 only
    (within 9 %) and are taken as uniform there: no probability is off by more. `src_weights` are the shares of a mixture
    over how much of the source is told. Where a ping fails with certainty, statistics of its RTT are a ValueError.
    """

    code_probability: np.ndarray = field(repr=False)
    p_fail: float
    total_probability: float = 1.0
    forward_passes: int = 0
    context_measurements: int = 0
    unresolved: float = 0.0
    src_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._law  # noqa: B018  checks the probabilities

    @classmethod
    def mixture(cls, laws: Sequence[RTTDistribution], weights: Sequence[float] | np.ndarray) -> RTTDistribution:
        """The law of a result that comes from the i-th law with probability `weights[i]`; the weights sum to 1.

        Mixed are the laws of all results, so an answer counts in proportion to how likely each law makes it. Of
        `forward_passes` and `context_measurements` the largest is told: laws that are mixed come from one batch.
        """
        if np.shape(weights) != (len(laws),):
            raise ValueError(f"{len(laws)} laws need as many weights, not {np.shape(weights)}")
        return RTTDistributions.of(laws).mixture(np.asarray(weights)[None])[0]

    @cached_property
    def _law(self) -> RTTDistributions:
        """This law as a batch of one."""
        codes = np.asarray(self.code_probability)[None]
        return RTTDistributions(codes, *(getattr(self, column.name) for column in fields(self)[1:]))

    @property
    def _can_answer(self) -> bool:
        return bool(self._law.p_answer[0] > 0)

    @property
    def _answered_law(self) -> RTTDistributions:
        """This law as a batch of one; ValueError where no answer is possible."""
        if not self._can_answer:
            raise ValueError("the ping fails with certainty: its RTT has no distribution")
        return self._law

    def cdf(self, rtt_ms: float | np.ndarray) -> float | np.ndarray:
        """P(RTT ≤ rtt_ms | answered); any shape."""
        return _one(self._answered_law.cdf(rtt_ms))

    def pdf(self, rtt_ms: float | np.ndarray) -> float | np.ndarray:
        """Density per log-ms at rtt_ms, given an answer; any shape. The density per ms is this divided by rtt_ms."""
        return _one(self._answered_law.pdf(rtt_ms))

    def quantile(self, q: float | np.ndarray) -> float | np.ndarray:
        """RTT in ms below which a share q (0 to 1) of the answers lies; any shape."""
        return _one(self._answered_law.quantile(q))

    def interval(self, level: float) -> tuple[float, float]:
        """The central interval of ms that holds a share `level` (0 to 1) of the answers."""
        low, high = self._answered_law.interval(level)[0].tolist()
        return low, high

    @property
    def median(self) -> float:
        """Median RTT of an answer, ms."""
        return _one(self._answered_law.median)

    @property
    def mean(self) -> float:
        """Mean RTT of an answer, ms."""
        return _one(self._answered_law.mean)

    @property
    def mode(self) -> float:
        """The middle in ms of the code whose density per log-ms is highest, the lowest of equals.

        Nothing is smoothed: where the law is ragged from code to code (0.05 %), its highest spike is told.
        """
        return _one(self._answered_law.mode)

    @property
    def entropy(self) -> float:
        """Entropy in nats of the result as one of 65,537, a code or failure: 0 to ln 65,537 = 11.09."""
        return _one(self._law.entropy)

    def log_density(self, rtt_ms: float) -> float:
        """Log-density in nats of an observed result, −1 = failed; −∞ where it has no chance.

        Of an answer, the log of its density per log-ms times P(answer); of a failure, log p_fail. Minus this is `nll_nats`.
        """
        return _one(self._law.log_density(rtt_ms))

    def crps(self, rtt_ms: float) -> float:
        """Continuous ranked probability score in log-ms of an observed RTT, given an answer, exact.

        ∫ (F(x) − [x ≥ y])² dx over x = log-RTT.
        """
        return _one(self._answered_law.crps(_answer(rtt_ms, "CRPS")))

    def pit(self, rtt_ms: float, rng: np.random.Generator | None = None) -> float:
        """Probability integral transform of an observed RTT, F(rtt_ms | answered): uniform on 0 to 1 if the law is right.

        With `rng` the place of the RTT within its code is drawn anew: the randomised transform of the law of codes, which
        does not mind that RTTs are reported in steps.
        """
        return _one(self._answered_law.pit(_answer(rtt_ms, "PIT"), rng))

    def kl(self, other: RTTDistribution) -> float:
        """Kullback–Leibler divergence in nats from this law to another, of the 65,537 results; ∞ allowed."""
        return _one(self._law.kl(other._law))

    def wasserstein(self, other: RTTDistribution) -> float:
        """Wasserstein-1 distance in log-ms to another law, of RTTs given an answer: ∫ |F − G| over log-RTT, exact."""
        return _one(self._answered_law.wasserstein(other._answered_law))

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """`count` independent results in ms, −1 = failed; (count,) float64."""
        rng = np.random.default_rng(seed)
        failed = rng.random(count) < self.p_fail
        if not self._can_answer:
            return np.full(count, FAILED_RTT_MS)
        return np.where(failed, FAILED_RTT_MS, self.quantile(rng.random(count)))

    def to_dict(self) -> dict:
        """What `rtt --json` prints."""
        answered = self._can_answer
        return {
            "p_fail": self.p_fail,
            "median_ms": self.median if answered else None,
            "mean_ms": self.mean if answered else None,
            "quantiles": {f"{q:g}": self.quantile(q) if answered else None for q in QUANTILES},
            "total_probability": self.total_probability,
            "forward_passes": self.forward_passes,
            "context_measurements": self.context_measurements,
            "unresolved_probability": self.unresolved,
            "src_weights": dict(self.src_weights),
        }

    def plot(self, path: Path | str, title: str = "", truth=None) -> None:
        """Draws the density on a log axis with median, 5–95 % band and P(fail) to an image file.

        `truth` is an object with `cdf`, `quantile`, `median` and `p_fail`, drawn beside it.
        """
        from ping_llm.inference.plots import plot_rtt

        plot_rtt({"model": self}, Path(path), title, truth)


def _one(answers: np.ndarray) -> float | np.ndarray:
    """What a batch of one says: a number where one was asked for, else an array of the shape that was asked."""
    return answers[0] if answers.ndim > 1 else float(answers[0])


def _answer(rtt_ms: float, score: str) -> float:
    if rtt_ms == FAILED_RTT_MS:
        raise ValueError(f"the {score} is of an answered ping, and this one failed; log_density scores failures too")
    return rtt_ms
