"""Distributions of several baselines in, their linear pool out, with the weights that have the least CRPS on val.

The CRPS of a pool is a quadratic form of its weights, so each kind of query has one matrix and the best weights are found
on the simplex without evaluating the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ping_llm.eval.baselines.base import Baseline, Buckets, Hosts, bucket_keys
from ping_llm.eval.columns import QueryView, place_in_group
from ping_llm.eval.distribution import SUPPORT, QuantileDistributions, pool

LEAST_QUERIES = 300  # a kind of query with fewer answers on val takes the weights of a coarser kind
MOST_QUERIES = 1_000  # of one kind, that its weights are fitted on
LEAST_WEIGHT = 0.01  # members of less are dropped, so that not all have to be evaluated
CHUNK = 500  # queries whose matrices are made at once


class Stack(Baseline):
    """The linear pool of all other baselines; `choices` holds the weights over all queries of val."""

    name = "stack"

    def __init__(self, members: Sequence[Baseline]) -> None:
        self.members = members

    def learn(self) -> dict[str, Any]:
        """Fits the members, and for each kind of query the weights of least CRPS on val."""
        for member in self.members:
            member.fit(self.task.train, self.task.val)
        views = [(view, y, self.task.evidence(view)) for view, y in self.task.choice_views]
        rng, matrices, kinds, used = np.random.default_rng(0), [], [], []
        for view, y, kind in views:
            shuffled = rng.permutation(len(view))
            some = np.sort(shuffled[place_in_group(bucket_keys(kind)[0][shuffled]) < MOST_QUERIES])
            members = [member.distributions(view).take(some) for member in self.members]
            matrices.append(crps_matrices(members, y[some]))
            kinds.append(kind[some])
            used.append(view.take(some))
        matrix = np.concatenate(matrices)
        keys = bucket_keys(np.concatenate(kinds))
        self._weights = Buckets(
            keys, Hosts.of(used), LEAST_QUERIES, lambda rows: best_weights(matrix[rows].mean(axis=0))
        )
        weights = self._weights(keys).mean(axis=0).tolist()
        return {member.name: round(one, 3) for member, one in zip(self.members, weights, strict=True) if one}

    def predict_distributions(self, view: QueryView) -> QuantileDistributions:
        """The pool of what the members predict that weigh anything here."""
        weights = self._weights(bucket_keys(self.task.evidence(view)))
        used = np.flatnonzero(weights.any(axis=0)).tolist()
        return pool([self.members[i].distributions(view) for i in used], weights[:, used])


def crps_matrices(members: list[QuantileDistributions], log_ms: np.ndarray) -> np.ndarray:
    """(q, m, m) ∫ (F_i − 1[x ≥ y]) (F_j − 1[x ≥ y]) dx, exact: wᵀ A w is the CRPS of the pool with weights w."""
    parts = []
    for start in range(0, len(log_ms), CHUNK):
        part = slice(start, start + CHUNK)
        chunk = [member.take(part) for member in members]
        y = np.clip(log_ms[part], *SUPPORT)[:, None]
        knots = np.sort(np.concatenate([*(member.values for member in chunk), y], axis=1), axis=1)  # (q, M)
        cdf = np.stack([member.cdf(knots) for member in chunk], axis=1)  # (q, m, M)
        after, width = knots[:, None, :-1] >= y[:, :, None], np.diff(knots)[:, None]  # a segment lies on one side of y
        left, right = cdf[:, :, :-1] - after, cdf[:, :, 1:] - after
        crossed = (left * width) @ right.transpose(0, 2, 1)
        diagonal = (left * width) @ left.transpose(0, 2, 1) + (right * width) @ right.transpose(0, 2, 1)
        parts.append((2 * diagonal + crossed + crossed.transpose(0, 2, 1)) / 6)
    return np.concatenate(parts)


def best_weights(matrix: np.ndarray) -> np.ndarray:
    """(m,) the w ≥ 0 with sum 1 that has the least wᵀ A w; none is below LEAST_WEIGHT but 0.

    The cone w ≥ 0 is searched for the least wᵀ A w + (sum − 1)², which has the same direction.
    """
    used = np.arange(len(matrix))
    scale = np.trace(matrix) / len(matrix) or 1.0
    while True:
        part = matrix[np.ix_(used, used)] / scale
        root = np.linalg.cholesky(part + 1e-9 * np.eye(len(used)))
        found, _ = nnls(np.vstack([root.T, np.ones(len(used))]), np.r_[np.zeros(len(used)), 1.0])
        found /= found.sum()
        if (found >= LEAST_WEIGHT).all():
            weights = np.zeros(len(matrix))
            weights[used] = found
            return weights
        used = used[found >= LEAST_WEIGHT]
