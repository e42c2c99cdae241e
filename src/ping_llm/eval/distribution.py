"""Quantiles of log-RTT in, every statistic of the distribution they stand for out, in closed form.

The CDF is piecewise linear between the quantiles, so its density is constant between two of them. The support is
that of the RTT codes, 1 µs to 71 min, and the outermost 0.1 % on either side is spread evenly to its end: no result has
density 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ping_llm.data.tokenization import rtt_code_edges_ms

LEVELS = np.array([0, 0.001, 0.005, 0.01, 0.02, *np.linspace(0.05, 0.95, 19), 0.98, 0.99, 0.995, 0.999, 1])
INNER_LEVELS = LEVELS[1:-1]  # the quantiles that a predictor gives; those of 0 and 1 are the ends of the support
SUPPORT: tuple[float, float] = (float(np.log(rtt_code_edges_ms()[0])), float(np.log(rtt_code_edges_ms()[-1])))  # log-ms
LEAST_WIDTH = 2.0**-11
"""Log-ms that a whole distribution spans at least: one RTT code, so that repeats of one RTT have no infinite density."""

LEAST_CHANCE = 1e-6  # chances of failure are kept this far from 0 and 1: one surprise does not make a mean infinite


@dataclass(frozen=True, eq=False)
class QuantileDistributions:
    """Of q answered pings; values (q, L) are ascending log-ms at levels (L,), or (q, L) if each has its own."""

    values: np.ndarray
    levels: np.ndarray = field(default_factory=lambda: LEVELS)

    @classmethod
    def from_quantiles(cls, quantiles: np.ndarray) -> QuantileDistributions:
        """Those with these (q, L − 2) quantiles in log-ms at INNER_LEVELS; crossed ones are put in order."""
        assert quantiles.shape[1:] == INNER_LEVELS.shape and np.isfinite(quantiles).all(), f"{quantiles.shape}"
        inner = np.sort(quantiles, axis=1) + LEAST_WIDTH * (INNER_LEVELS - 0.5)
        room = LEAST_WIDTH * INNER_LEVELS
        return cls(between_ends(np.clip(inner, SUPPORT[0] + room, SUPPORT[1] - LEAST_WIDTH + room)))

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: np.ndarray | slice) -> QuantileDistributions:
        """The distributions at `rows`."""
        return QuantileDistributions(self.values[rows], self.levels if self.levels.ndim == 1 else self.levels[rows])

    def quantile(self, levels: np.ndarray) -> np.ndarray:
        """(q, Q) log-ms below which a share levels (Q,) of the answers lies."""
        x = np.broadcast_to(levels, (len(self), len(levels)))
        return interpolate_rows(x, np.broadcast_to(self.levels, self.values.shape), self.values)

    @property
    def median(self) -> np.ndarray:
        """(q,) log-ms."""
        return self.quantile(np.array([0.5]))[:, 0]

    def cdf(self, log_ms: np.ndarray) -> np.ndarray:
        """(q,) or (q, m): P(log-RTT ≤ log_ms) of each."""
        x = log_ms.reshape(len(self), -1)
        return interpolate_rows(x, self.values, np.broadcast_to(self.levels, self.values.shape)).reshape(log_ms.shape)

    def log_density(self, log_ms: np.ndarray) -> np.ndarray:
        """(q,) log of the density per log-ms of each at its own log_ms (q,), clamped to the support."""
        inside = np.clip(log_ms, *SUPPORT)[:, None]
        segment = np.arange(len(self)), np.clip((self.values <= inside).sum(axis=1) - 1, 0, self.values.shape[1] - 2)
        mass = np.diff(np.broadcast_to(self.levels, self.values.shape))
        return np.log(mass[segment]) - np.log(np.diff(self.values)[segment])

    def crps(self, log_ms: np.ndarray) -> np.ndarray:
        """(q,) ∫ (CDF(x) − 1[x ≥ log_ms])² dx in log-ms, exact; log_ms (q,) is clamped to the support."""
        y = np.clip(log_ms, *SUPPORT)[:, None]
        at_y = self.cdf(y)
        below = np.where(self.values < y, self.levels, at_y)  # at the knots up to y, the rest folded onto it
        above = 1 - np.where(self.values > y, self.levels, at_y)
        parts = ((np.minimum(self.values, y), below), (np.maximum(self.values, y), above))
        # ∫ f² of f linear between knots
        return sum(np.diff(x) * (f[:, 1:] ** 2 + f[:, 1:] * f[:, :-1] + f[:, :-1] ** 2) / 3 for x, f in parts).sum(
            axis=1
        )


def interpolate_rows(x: np.ndarray, knots: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(q, m) values of q piecewise-linear functions at x (q, m); knots (q, L) ascend; constant beyond the ends."""
    count = np.zeros(x.shape, dtype=np.int64)  # of its row's knots that are not above
    for knot in knots.T:
        count += knot[:, None] <= x
    segment = np.clip(count - 1, 0, knots.shape[1] - 2)
    left, right = np.take_along_axis(knots, segment, 1), np.take_along_axis(knots, segment + 1, 1)
    below, above = np.take_along_axis(values, segment, 1), np.take_along_axis(values, segment + 1, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.clip(np.where(right > left, (x - left) / (right - left), 1.0), 0, 1)
    return (1 - share) * below + share * above


def pool(distributions: list[QuantileDistributions], weights: np.ndarray) -> QuantileDistributions:
    """The linear pools Σ w F of m members each, weights (q, m) summing to 1: exact, its knots are those of all members."""
    low, high = (distributions[0].values[:, [side]] for side in (0, -1))
    inner = np.sort(np.concatenate([member.values[:, 1:-1] for member in distributions], axis=1), axis=1)
    knots = np.concatenate([low, inner, high], axis=1)  # (q, M)
    levels = sum(weight[:, None] * member.cdf(knots) for member, weight in zip(distributions, weights.T, strict=True))
    return QuantileDistributions(knots, np.maximum.accumulate(levels, axis=1))


def between_ends(inner: np.ndarray) -> np.ndarray:
    """(q, L) quantiles (q, L − 2) between the two ends of the support."""
    return np.pad(inner, ((0, 0), (1, 1)), constant_values=(SUPPORT,))


def clip_chance(chance: np.ndarray) -> np.ndarray:
    """Chances not below LEAST_CHANCE and not above 1 − LEAST_CHANCE."""
    return np.clip(chance, LEAST_CHANCE, 1 - LEAST_CHANCE)


def log_loss(chance: np.ndarray, happened: np.ndarray) -> np.ndarray:
    """(q,) nats: −log of the chance (q,) that was given to what happened (q,), or did not."""
    chance = clip_chance(chance)
    return -np.where(happened, np.log(chance), np.log1p(-chance))
