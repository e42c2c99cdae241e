"""Probabilities of the 65,536 RTT codes and of failure in, every statistic of the RTT out, in closed form.

Within a code the density is uniform in log-RTT: a code is 0.05 % wide, so nothing that is asked depends on it. All
statistics of the RTT are of an answered ping; `p_fail` stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from ping_llm.data.tokenization import RTT_CODES, decode_rtt, rtt_code_edges_ms

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True)
class RTTDistribution:
    """The law of the result of one ping.

    `code_probability` is (65,536,) float64, the probability that the ping is answered with an RTT of that code, and
    `p_fail` that it is not answered; together they sum to 1. `total_probability` is the mass that the raw model put on
    valid results before they were made to.
    """

    code_probability: np.ndarray = field(repr=False)
    p_fail: float
    total_probability: float = 1.0
    forward_passes: int = 0
    context_measurements: int = 0

    def __post_init__(self) -> None:
        if self.code_probability.shape != (RTT_CODES,) or not np.isfinite(self.code_probability).all():
            raise ValueError(f"code_probability must be {RTT_CODES} finite numbers, not {self.code_probability.shape}")
        total = self.code_probability.sum() + self.p_fail
        if abs(total - 1) > 1e-6 or self.code_probability.min() < 0 or self.p_fail < 0:
            raise ValueError(f"the probabilities of all results must be non-negative and sum to 1, not {total}")

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """P(RTT below each code edge | answered), (65,537,)."""
        cumulative = np.concatenate([[0.0], np.cumsum(self.code_probability)])
        if cumulative[-1] <= 0:
            raise ValueError("the ping fails with certainty: its RTT has no distribution")
        return cumulative / cumulative[-1]

    def cdf(self, rtt_ms: float | np.ndarray) -> float | np.ndarray:
        """P(RTT ≤ rtt_ms | answered); any shape."""
        return _like(rtt_ms, np.interp(np.log(np.maximum(rtt_ms, 1e-300)), _log_edges(), self._cumulative))

    def pdf(self, rtt_ms: float | np.ndarray) -> float | np.ndarray:
        """Density per log-ms at rtt_ms, given an answer; any shape. The density per ms is this divided by rtt_ms."""
        density = np.diff(self._cumulative) / np.diff(_log_edges())
        place = np.searchsorted(_log_edges(), np.log(np.maximum(rtt_ms, 1e-300)), "right") - 1
        inside = (place >= 0) & (place < RTT_CODES)
        return _like(rtt_ms, np.where(inside, density[np.clip(place, 0, RTT_CODES - 1)], 0.0))

    def quantile(self, q: float | np.ndarray) -> float | np.ndarray:
        """RTT in ms below which a share q (0 to 1) of the answers lies; any shape."""
        if not ((np.asarray(q) >= 0) & (np.asarray(q) <= 1)).all():
            raise ValueError(f"a quantile is asked for a share between 0 and 1, not {q}")
        q = np.asarray(q, dtype=np.float64)
        code = np.searchsorted(self._cumulative[1:], np.maximum(q, np.finfo(np.float64).tiny), "left")
        below, mass = self._cumulative[code], np.diff(self._cumulative)[code]  # mass > 0: empty codes are never chosen
        log_edges = _log_edges()
        share = np.clip((q - below) / mass, 0, 1)
        return _like(q, np.exp(log_edges[code] + share * (log_edges[code + 1] - log_edges[code])))

    @property
    def median(self) -> float:
        """Median RTT of an answer, ms."""
        return self.quantile(0.5)

    @property
    def mean(self) -> float:
        """Mean RTT of an answer, ms."""
        return float(np.diff(self._cumulative) @ decode_rtt(np.arange(RTT_CODES)))

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """`count` independent results in ms, −1 = failed; (count,) float64."""
        rng = np.random.default_rng(seed)
        failed = rng.random(count) < self.p_fail
        if self.p_fail == 1:
            return np.full(count, -1.0)
        return np.where(failed, -1.0, self.quantile(rng.random(count)))

    def to_dict(self) -> dict:
        """What `rtt --json` prints."""
        answered = self.p_fail < 1
        return {
            "p_fail": self.p_fail,
            "median_ms": self.median if answered else None,
            "mean_ms": self.mean if answered else None,
            "quantiles": {f"{q:g}": float(self.quantile(q)) if answered else None for q in QUANTILES},
            "total_probability": self.total_probability,
            "forward_passes": self.forward_passes,
            "context_measurements": self.context_measurements,
        }

    def plot(self, path: Path | str, title: str = "", truth=None) -> None:
        """Draws the density on a log axis with median, 5–95 % band and P(fail) to an image file.

        `truth` is an object with `cdf`, `quantile`, `median` and `p_fail`, drawn beside it.
        """
        from ping_llm.inference.plots import plot_rtt

        plot_rtt({"model": self}, Path(path), title, truth)


@cache
def _log_edges() -> np.ndarray:
    return np.log(rtt_code_edges_ms())


def _like(asked: float | np.ndarray, answer: np.ndarray) -> float | np.ndarray:
    return float(answer) if np.ndim(asked) == 0 else answer
