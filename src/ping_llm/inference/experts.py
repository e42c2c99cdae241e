"""What past results say of a ping by themselves: experts that answer beside the model, by rules fitted on val.

An expert takes past results of a kind, those of the pair or those of other sources to the destination, and answers with a
sum of Laplace kernels around their log-RTTs: where a ping repeats itself, the answer repeats it. How wide the kernels are,
and how much the expert counts beside the model, depends on how many results there are, how old or distant, and how far they
differ. P(failed) stays that of the model.

q = queries, E = past results of each, the most telling first, W = widths, F = features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ping_llm.inference.distribution import code_widths, log_edges

PAST = 64
"""Results of each query that an expert looks at, at most."""
FEATURES = 4  # 1, and the logarithms of: their number, 1 + how old or distant the first is, how far they differ
CUTS = ("prefix that was met", "first byte")
"""What else of a destination the model is given."""
SITUATION = ("source is new", "destination is new", "log of 1 + measurements of the context")
LEAST_WEIGHT = 0.02
"""A part of an answer of less weight is left out."""
_LEAST_SPREAD = 1e-3  # log-ms
_REACH = 20.0  # widths; beyond them lie 2e-9 of a kernel
_WIDE, _COARSE = 0.1, 16  # log-ms, and codes


@dataclass(frozen=True, eq=False)
class Past:
    """Past results of q queries."""

    log_ms: np.ndarray  # (q, E) log of the RTT in ms, the most telling first; NaN where there is no more
    first: np.ndarray  # (q,) hours since the first of them, or its distance; 0 where there is none

    @property
    def count(self) -> np.ndarray:
        """(q,) results of each."""
        return np.isfinite(self.log_ms).sum(axis=1)

    @property
    def features(self) -> np.ndarray:
        """(q, F); of no results they mean nothing."""
        count = self.count
        filled = np.where((count > 0)[:, None], self.log_ms, 0.0)
        spread = np.nanmean(np.abs(filled - np.nanmedian(filled, axis=1, keepdims=True)), axis=1)
        columns = np.ones(len(count)), np.log(np.maximum(count, 1)), np.log1p(self.first)
        return np.stack([*columns, np.log(spread + _LEAST_SPREAD)], axis=1)

    def take(self, rows: np.ndarray) -> Past:
        """That of some queries."""
        return Past(self.log_ms[rows], self.first[rows])


@dataclass(frozen=True)
class Expert:
    """The rule of one kind of past results."""

    decay: tuple[
        float, float
    ]  # a result weighs exp(−softplus(a + b · log of 1 + `first`)) of what the one before it does
    widths: tuple[float, ...]  # (W,) scales of the Laplace kernels, log-ms
    shares: tuple[tuple[float, ...], ...]  # (W, F): logits of the share of each width, of the features

    def kernels(self, past: Past) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the results (q, E), which sum to 1 where there are any, and of the widths (q, W)."""
        decay = np.logaddexp(0, self.decay[0] + self.decay[1] * np.log1p(past.first))  # (q,)
        weights = np.exp(-decay[:, None] * np.arange(past.log_ms.shape[1]))
        weights = np.where(np.isfinite(past.log_ms), weights, 0.0)
        total = weights.sum(axis=1, keepdims=True)
        logits = past.features @ np.array(self.shares).T
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / np.where(total > 0, total, 1.0), shares / shares.sum(axis=1, keepdims=True)

    def cdf(self, past: Past, log_ms: np.ndarray) -> np.ndarray:
        """(q, P): P(log-RTT ≤ log_ms (q, P)), given an RTT that has a code; NaN where there are no results."""
        low, high = log_edges()[[0, -1]]
        weights, shares = self.kernels(past)
        ends = np.broadcast_to([low, high], (len(weights), 2))
        found = self._sum(past, weights, shares, np.concatenate([np.clip(log_ms, low, high), ends], axis=1))
        below, above = found[:, -2:-1], found[:, -1:]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((past.count > 0)[:, None], (found[:, :-2] - below) / (above - below), np.nan)

    def _sum(self, past: Past, weights: np.ndarray, shares: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Sums of the kernels' distribution functions at x (q, P)."""
        away = x[:, None, :] - np.nan_to_num(past.log_ms)[:, :, None]  # (q, E, P)
        total = np.zeros(x.shape)
        for width, share in zip(self.widths, shares.T, strict=True):
            tail = np.exp(-np.abs(away) / width) / 2
            total += share[:, None] * (weights[:, :, None] * np.where(away < 0, tail, 1 - tail)).sum(axis=1)
        return total

    def code_probability(self, past: Past) -> np.ndarray:
        """(q, 65,536) probabilities of the codes given an answer, which sum to 1; of no results all are 0.

        A wide kernel is taken as even over each _COARSE codes: at its middle it is up to 2 % less dense than it should be.
        """
        weights, shares = self.kernels(past)
        masses = np.zeros((len(weights), len(log_edges()) - 1))
        for mass, own, of_width, results in zip(masses, weights, shares, past.log_ms, strict=True):
            used = np.flatnonzero(own > 0)
            used = used[np.argsort(results[used])]
            wide = np.zeros(len(mass) // _COARSE)
            for width, share in zip(self.widths, of_width, strict=True):
                target, edges = (wide, log_edges()[::_COARSE]) if width > _WIDE else (mass, log_edges())
                _add_laplace(target, edges, results[used], width, own[used] * share)
            mass += np.repeat(wide / np.diff(log_edges()[::_COARSE]), _COARSE) * code_widths()
        total = masses.sum(axis=1, keepdims=True)
        return masses / np.where(total > 0, total, 1.0)


@dataclass(frozen=True)
class Experts:
    """The rules of all kinds of past results, and how much each part of an answer counts.

    The parts are the model; the model that is given less of the destination, as each of CUTS says; and an expert for each
    kind of past results. The odds of a part against the model are the exponential of a linear function: of the SITUATION of
    the query and, for an expert, of the features of its past results.
    """

    experts: Mapping[str, Expert]  # by kind: "pair", "others"
    cuts: tuple[tuple[float, ...], ...]  # (CUTS, 1 + SITUATION): log odds
    odds: Mapping[str, tuple[float, ...]]  # (F + SITUATION,): log odds, by kind

    def weights(self, pasts: Mapping[str, Past], situation: np.ndarray, cut: np.ndarray) -> np.ndarray:
        """(1 + CUTS + kinds, q) of the model, of the model given less, and of each expert in the order of `experts`.

        `situation` is (q, SITUATION); `cut` (q, CUTS) says where the destination can be cut so. Of what cannot be, and of
        past results that there are none of, the weight is 0; weights below LEAST_WEIGHT become 0.
        """
        constant = np.concatenate([np.ones((len(situation), 1)), situation], axis=1)
        logits = [np.zeros(len(situation))]
        for own, allowed in zip(self.cuts, cut.T, strict=True):
            logits.append(np.where(allowed, constant @ np.array(own), -np.inf))
        for kind in self.experts:
            features = np.concatenate([pasts[kind].features, situation], axis=1)
            logits.append(np.where(pasts[kind].count > 0, features @ np.array(self.odds[kind]), -np.inf))
        weights = np.exp(np.stack(logits) - np.max(logits, axis=0))
        weights /= weights.sum(axis=0)
        weights[1:][weights[1:] < LEAST_WEIGHT] = 0.0
        return weights / weights.sum(axis=0)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Experts:
        """What `to_json` made of them; KeyError or TypeError if it is damaged."""
        experts = {
            kind: Expert(tuple(one["decay"]), tuple(one["widths"]), tuple(map(tuple, one["shares"])))
            for kind, one in values["experts"].items()
        }
        odds = {kind: tuple(values["odds"][kind]) for kind in experts}
        return cls(experts, tuple(map(tuple, values["cuts"])), odds)


def _add_laplace(mass: np.ndarray, edges: np.ndarray, centers: np.ndarray, width: float, weights: np.ndarray) -> None:
    """Adds the probabilities of the codes between `edges` under Laplace kernels with `weights` (E,) around `centers` (E,),
    which ascend, as far as they count.

    The tails of all kernels on one side of a point fall off alike, so their sum at the nearest centre says what it is there.
    """
    if not len(centers):
        return
    near = np.exp(-np.abs(centers[:, None] - centers) / width)  # (E, E)
    below = np.append(0.0, np.cumsum(weights))  # of the kernels before each centre, and of all
    left, right = np.append(0.0, np.tril(near) @ weights), np.append(np.triu(near) @ weights, 0.0)
    before, after = np.append(centers[:1], centers), np.append(centers, centers[-1:])  # beyond them no tail counts
    first = np.maximum(np.searchsorted(edges, centers - _REACH * width) - 1, 0)
    end = np.minimum(np.searchsorted(edges, centers + _REACH * width), len(mass))
    apart = np.flatnonzero(first[1:] > end[:-1])  # between centres whose kernels do not meet
    for low, high in zip(first[np.append(0, apart + 1)], end[np.append(apart, len(end) - 1)], strict=True):
        if low < high:
            x = edges[low : high + 1]
            k = np.searchsorted(centers, x, "right")
            tails = right[k] * np.exp((x - after[k]) / width), left[k] * np.exp((before[k] - x) / width)
            mass[low:high] += np.maximum(np.diff(below[k] + (tails[0] - tails[1]) / 2), 0.0)
