"""Statistics of an RTTDistribution that tests compare with the literature: of one ping a number, of B pings (B,)."""

from __future__ import annotations

import numpy as np

from ping_llm.data.tokenization import rtt_code_edges_ms
from ping_llm.inference.distribution import RTTDistribution, code_widths

EDGES = rtt_code_edges_ms()


def interval(d: RTTDistribution, level: float):
    """The central interval of ms that holds a share `level` (0 to 1) of the answers, (2,) or (B, 2)."""
    return d.quantile(np.array([(1 - level) / 2, (1 + level) / 2]))


def mode(d: RTTDistribution):
    """The middle in ms of the code whose density per log-ms is highest, the lowest of equals."""
    highest = (d.code_probability / code_widths()).argmax(axis=-1)
    return np.where(d.p_answer > 0, np.sqrt(EDGES[highest] * EDGES[highest + 1]), np.nan)[()]


def results(d: RTTDistribution) -> np.ndarray:
    """Probabilities of all results, failure last, (65,537,) or (B, 65,537)."""
    return np.concatenate([d.code_probability, np.expand_dims(np.asarray(d.p_fail), -1)], axis=-1)


def entropy(d: RTTDistribution):
    """Entropy in nats of the result as one of 65,537: 0 to ln 65,537 = 11.09."""
    p = results(d)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)


def kl(d: RTTDistribution, other: RTTDistribution):
    """Kullback–Leibler divergence in nats from d to another distribution of the 65,537 results; ∞ allowed."""
    p, q = results(d), results(other)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.maximum(np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(axis=-1), 0.0)


def wasserstein(d: RTTDistribution, other: RTTDistribution):
    """Wasserstein-1 distance in log-ms of RTTs given an answer: ∫ |F − G| over log-RTT, exact.

    The difference is linear within a code, and may cross zero there.
    """
    with np.errstate(invalid="ignore"):
        p, q = (x.code_probability / x.code_probability.sum(axis=-1, keepdims=True) for x in (d, other))
    end = np.cumsum(p - q, axis=-1)  # F − G at the upper edge of each code
    start = np.concatenate([np.zeros((*end.shape[:-1], 1)), end[..., :-1]], axis=-1)
    size, crossing = np.abs(start) + np.abs(end), start * end < 0
    # Two triangles where the difference crosses zero, else a trapezoid.
    height = np.where(crossing, (start**2 + end**2) / np.where(size > 0, size, 1), size)
    return height @ code_widths() / 2
