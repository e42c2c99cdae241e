"""Means of each source in, how far chance moves the mean over all sources out: a cluster bootstrap, drawn once for all.

One draw of sources serves every cell and method, so that what is compared in a draw is of the same sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

REPLICATES = 1000
LEVELS = (2.5, 97.5)  # percent: the bounds of an interval of 95 %


@dataclass(frozen=True, eq=False)
class SourceBootstrap:
    """How often each replicate drew each of S sources."""

    sources: np.ndarray  # (S,) ascending
    counts: np.ndarray  # (R, S)

    @classmethod
    def draw(
        cls, sources: np.ndarray, stratum: np.ndarray, rng: np.random.Generator, replicates: int = REPLICATES
    ) -> SourceBootstrap:
        """With replacement, as many as there are in each stratum (S,): sources held out and others are drawn apart."""
        counts = np.zeros((replicates, len(sources)))
        for value in np.unique(stratum):
            inside = np.flatnonzero(stratum == value)
            counts[:, inside] = rng.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), replicates)
        return cls(sources, counts)

    def means(self, sources: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(R,) mean over the drawn ones of some sources (s,) of their values (s,); NaN values are left out."""
        known = ~np.isnan(values)
        counts = self.counts[:, np.searchsorted(self.sources, sources[known])]
        with np.errstate(invalid="ignore"):
            return counts @ values[known] / counts.sum(axis=1)

    def ratios(self, sources: np.ndarray, values: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """(R,) ratio of two such means over the same drawn sources."""
        return self.means(sources, values) / self.means(sources, reference)


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """The bounds of 95 % of the replicates; a replicate that drew no source of a cell, NaN, is left out."""
    known = replicates[np.isfinite(replicates)]
    low, high = np.percentile(known, LEVELS) if len(known) else (np.nan, np.nan)
    return float(low), float(high)
