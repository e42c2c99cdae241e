"""Distributions of several baselines in, their linear pool out, with the weights that have the least CRPS on val.

The CRPS of a pool is a quadratic form of its weights, so each kind of query has one matrix and the best weights are found
on the simplex without evaluating the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ping_llm.eval.baselines.base import Baseline, Buckets, bucket_keys
from ping_llm.eval.columns import QueryView
from ping_llm.eval.distribution import SUPPORT, QuantileDistributions, pool

LEAST_QUERIES = 300  # a kind of query with fewer answers on val takes the weights of a coarser kind
CHUNK = 2_000  # queries whose matrices are made at once
STEPS = 2_000  # of the descent to the best weights


class Stack(Baseline):
    """The linear pool of other baselines; `choices` holds the weights over all queries of val."""

    name = "stack"

    def __init__(self, members: Sequence[Baseline]) -> None:
        self.members = members

    def learn(self) -> dict[str, Any]:
        """Fits the members, and the weights on what they predict after learning from fold 0."""
        for member in self.members:
            member.fit(self.task.learned_from[None], self.task.val)
        views = self.task.val_views
        predicted = (([member.distributions(view, 0) for member in self.members], y) for view, y in views)
        matrices = np.concatenate([crps_matrices(members, y) for members, y in predicted])
        keys = bucket_keys(np.concatenate([self.task.evidence(view, 0) for view, _ in views]))
        self._weights = Buckets(keys, LEAST_QUERIES, lambda rows: best_weights(matrices[rows].mean(axis=0)))
        weights = best_weights(matrices.mean(axis=0)).tolist()
        return {member.name: round(weight, 3) for member, weight in zip(self.members, weights, strict=True)}

    def distributions(self, view: QueryView, fold: int | None = None) -> QuantileDistributions:
        """The pool of what the members predict."""
        members = [member.distributions(view, fold) for member in self.members]
        return pool(members, self._weights(bucket_keys(self.task.evidence(view, fold))))


def crps_matrices(members: list[QuantileDistributions], log_ms: np.ndarray) -> np.ndarray:
    """(q, m, m) ∫ (F_i − 1[x ≥ y]) (F_j − 1[x ≥ y]) dx, exact: wᵀ A w is the CRPS of the pool with weights w."""
    parts = []
    for start in range(0, len(log_ms), CHUNK):
        part = slice(start, start + CHUNK)
        chunk = [member.take(part) for member in members]
        y = np.clip(log_ms[part], *SUPPORT)[:, None]
        knots = np.sort(np.concatenate([*(member.values for member in chunk), y], axis=1), axis=1)  # (q, M)
        cdf = np.stack([member.cdf(knots) for member in chunk])  # (m, q, M)
        after = knots[:, :-1] >= y  # a segment lies on one side of y
        left, right, width = cdf[:, :, :-1] - after, cdf[:, :, 1:] - after, np.diff(knots)
        diagonal = np.einsum("iqs,jqs,qs->qij", left, left, width) + np.einsum("iqs,jqs,qs->qij", right, right, width)
        crossed = np.einsum("iqs,jqs,qs->qij", left, right, width)
        parts.append((2 * diagonal + crossed + crossed.transpose(0, 2, 1)) / 6)
    return np.concatenate(parts)


def best_weights(matrix: np.ndarray) -> np.ndarray:
    """(m,) the w ≥ 0 with sum 1 that has the least wᵀ A w, by exponentiated gradients."""
    weights = np.full(len(matrix), 1 / len(matrix))
    rate = 1 / max(np.abs(matrix).max(), 1e-12)
    for _ in range(STEPS):
        gradient = matrix @ weights
        weights *= np.exp(-rate * (gradient - gradient.min()))
        weights /= weights.sum()
    return weights
