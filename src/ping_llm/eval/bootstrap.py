"""Scores of queries, each with its source and its destination prefix, in; macro means and ratios with intervals out.

Queries of one source resemble each other, and so do queries to one prefix, so both are resampled: the pigeonhole bootstrap
(Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007). A query counts as often as its source was drawn
times as often as its prefix was. The standard deviation of the logarithm over the draws, times a quantile of Student's t, is
the half-width of an interval. The degrees of freedom are Satterthwaite's, of the two sums that the variance consists of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
_DRAWS_AT_ONCE = 50  # bounds the memory at some tens of MB
LEAST_CLUSTERS = 30  # sources, and prefixes, that an interval needs: with fewer, a number stands without one


@dataclass(frozen=True)
class Estimate:
    """A positive number and its 95 % interval, None where there are too few sources or prefixes for one."""

    value: float
    interval: tuple[float, float] | None = None

    @classmethod
    def of_draws(cls, value: float, log_draws: np.ndarray, degrees_of_freedom: float) -> Estimate:
        """With the spread of the logarithm over the draws (R,), without those that are NaN."""
        from scipy.stats import t

        factor = float(np.exp(t.ppf(0.975, degrees_of_freedom) * np.nanstd(log_draws)))
        return cls(value, (value / factor, value * factor))


class Resamples:
    """How often each of S sources and of P prefixes counts in each of R draws; shared by all cells of a bench."""

    def __init__(self, sources: np.ndarray, prefixes: np.ndarray, seed: int = 0, draws: int = DRAWS) -> None:
        """The ids of all queries' sources, and of their destinations' prefixes."""
        rng = np.random.default_rng([seed, 0xB007])
        self._ids = np.unique(sources), np.unique(prefixes)
        self._counts = [rng.multinomial(n, np.full(n, 1 / n), draws).astype(np.float64) for n in map(len, self._ids)]

    def of_sources(self, ids: np.ndarray) -> np.ndarray:
        """(R, n) counts of some sources (n,)."""
        return self._counts[0][:, np.searchsorted(self._ids[0], ids)]

    def of_prefixes(self, ids: np.ndarray) -> np.ndarray:
        """(R, n) counts of some prefixes (n,)."""
        return self._counts[1][:, np.searchsorted(self._ids[1], ids)]


class Clusters:
    """q queries by the ids of their sources and of their destinations' prefixes, (q,)."""

    def __init__(self, source: np.ndarray, prefix: np.ndarray, resamples: Resamples) -> None:
        self._resamples = resamples
        self.sources, self._source = np.unique(source, return_inverse=True)  # (s,)
        self.prefixes, self._prefix = np.unique(prefix, return_inverse=True)  # (p,)
        self._size = np.bincount(self._source)  # (s,) queries

    @property
    def has_interval(self) -> bool:
        """Whether there are enough of both for an interval."""
        return min(len(self.sources), len(self.prefixes)) >= LEAST_CLUSTERS

    def macro_mean(self, scores: np.ndarray) -> float:
        """The mean over sources of the mean (q,) score of each."""
        return float((np.bincount(self._source, scores) / self._size).mean())

    def mean(self, scores: np.ndarray, log_draws: np.ndarray | None = None) -> Estimate:
        """The macro mean of (q,) positive scores, with its interval; `log_draws` (R,) are its `log_means`, if at hand."""
        value = self.macro_mean(scores)
        if not self.has_interval:
            return Estimate(value)
        draws = self.log_means(scores) if log_draws is None else log_draws
        return Estimate.of_draws(value, draws, self._degrees_of_freedom(scores / value - 1))

    def ratio(self, one: np.ndarray, other: np.ndarray, log_draws: np.ndarray | None = None) -> Estimate:
        """The macro mean of (q,) scores of one method over that of another, with its interval; `log_draws` (R,) are the
        differences of their `log_means`, if at hand."""
        means = self.macro_mean(one), self.macro_mean(other)
        value = means[0] / means[1]
        if not self.has_interval:
            return Estimate(value)
        draws = self.log_means(one) - self.log_means(other) if log_draws is None else log_draws
        return Estimate.of_draws(value, draws, self._degrees_of_freedom(one / means[0] - other / means[1]))

    def log_means(self, scores: np.ndarray) -> np.ndarray:
        """(R,) log of the macro mean of (q,) scores in each draw, or (R, m) of (q, m) scores of m methods at once.

        A source none of whose prefixes was drawn is left out of the draw; NaN is a draw that leaves none.
        """
        order = np.argsort(self._source, kind="stable")
        source, prefix, scores = self._source[order], self._prefix[order], scores[order]
        starts = np.searchsorted(source, np.arange(len(self.sources)))
        of_sources = self._resamples.of_sources(self.sources)  # (R, s)
        of_prefixes = self._resamples.of_prefixes(self.prefixes)  # (R, p)
        means = []
        for start in range(0, len(of_sources), _DRAWS_AT_ONCE):
            some = slice(start, start + _DRAWS_AT_ONCE)
            weight = of_prefixes[some][:, prefix]  # (r, q)
            size = np.add.reduceat(weight, starts, axis=1)  # (r, s)
            drawn = of_sources[some] * (size > 0)
            with np.errstate(invalid="ignore"):
                weight *= (drawn / np.maximum(size, 1) / drawn.sum(axis=1, keepdims=True))[:, source]
            means.append(weight @ scores)
        return np.log(np.concatenate(means))

    def _degrees_of_freedom(self, influence: np.ndarray) -> float:
        """Satterthwaite's, of the variances of sources and of prefixes; `influence` (q,) is how a query moves the logarithm.

        Prefixes count for as many as would have the same spread if all were queried equally often.
        """
        influence = influence / (len(self.sources) * self._size[self._source])
        of_sources = (np.bincount(self._source, influence) ** 2).sum()
        of_prefixes = (np.bincount(self._prefix, influence) ** 2).sum()
        share = np.bincount(self._prefix) / len(self._prefix)
        effective = max(1 / (share**2).sum(), 2.0)
        if of_sources + of_prefixes == 0:
            return np.inf
        each = of_sources**2 / (len(self.sources) - 1) + of_prefixes**2 / (effective - 1)
        return float((of_sources + of_prefixes) ** 2 / each)


def geometric_mean(ratios: Sequence[Estimate], log_draws: Sequence[np.ndarray], least: int) -> Estimate:
    """The geometric mean of ratios, each with the (R,) logarithms of its draws, which all cells have in common.

    Cells share sources, prefixes and queries: a draw is applied to all of them at once, so nested cells do not count as
    independent. `least` is the number of sources or prefixes of the cell with the fewest. There is no interval where one of
    the ratios has none.
    """
    value = float(np.exp(np.mean([np.log(one.value) for one in ratios])))
    if any(one.interval is None for one in ratios):
        return Estimate(value)
    return Estimate.of_draws(value, np.mean(log_draws, axis=0), least - 1)
