"""Laws of several baselines in, their linear pool out, with the weights that have the least CRPS on val.

The CRPS of a pool is a quadratic form of its weights, so each kind of query has one matrix and the best weights are found
on the simplex without evaluating the pool.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ping_llm.eval.baselines.base import Baseline, Prediction, bucket_keys, evidence, task_of
from ping_llm.eval.baselines.pairs import Pairs
from ping_llm.eval.columns import Measurements, Queries, QueryView
from ping_llm.eval.law import SUPPORT, QuantileLaws, pool

LEAST_QUERIES = 300
"""A kind of query with fewer answers on val takes the weights of a coarser kind."""

CHUNK = 2_000


class Stack:
    """The linear pool of fitted baselines; `choices` holds the weights over all queries of val."""

    name = "stack"

    def __init__(self, members: list[Baseline]) -> None:
        self.members = members
        self.choices: dict[str, Any] = {}

    def fit(self, train: Measurements, val: Queries) -> None:
        """Fits the members, and the weights on their predictions from fold 0."""
        task = task_of(train, val)
        for member in self.members:
            member.fit(train, val)
        fold_pairs, matrices, kinds = Pairs.of(task.folds[0]), [], []
        for view, answers in task.val_views:
            laws = [member.fold_laws(task, 0, view) for member in self.members]
            matrices.append(crps_matrices(laws, answers))
            kinds.append(evidence(fold_pairs, view))
        matrices, kinds = np.concatenate(matrices), np.concatenate(kinds)
        overall = best_weights(matrices.mean(axis=0))
        self._tables = []
        for key in bucket_keys(kinds):
            distinct, group, count = np.unique(key, return_inverse=True, return_counts=True)
            full = np.flatnonzero(count >= LEAST_QUERIES)
            self._tables.append({int(distinct[i]): best_weights(matrices[group == i].mean(axis=0)) for i in full})
        self._overall, self._pairs, self._failure = overall, Pairs.of(train), task.failure
        self.choices = {member.name: round(float(w), 3) for member, w in zip(self.members, overall, strict=True)}

    def predict(self, queries: QueryView) -> Prediction:
        """The laws of queries."""
        laws = [member.predict(queries).laws for member in self.members]
        weights = self._weights(evidence(self._pairs, queries))
        return Prediction(pool(laws, weights), self._failure.p_fail(queries))

    def _weights(self, kinds: np.ndarray) -> np.ndarray:
        """(q, m), the finest that there is."""
        weights = np.tile(self._overall, (len(kinds), 1))
        for key, table in reversed(list(zip(bucket_keys(kinds), self._tables, strict=True))):
            for value, of_bucket in table.items():
                weights[key == value] = of_bucket
        return weights


def crps_matrices(laws: list[QuantileLaws], log_ms: np.ndarray) -> np.ndarray:
    """(q, m, m) ∫ (F_i − 1[x ≥ y]) (F_j − 1[x ≥ y]) dx, exact: wᵀ A w is the CRPS of the pool with weights w."""
    parts = []
    for start in range(0, len(log_ms), CHUNK):
        part = slice(start, start + CHUNK)
        chunk = [law.take(part) for law in laws]
        y = np.clip(log_ms[part], *SUPPORT)[:, None]
        knots = np.sort(np.concatenate([*(law.values for law in chunk), y], axis=1), axis=1)  # (q, M)
        cdf = np.stack([law.cdf(knots) for law in chunk])  # (m, q, M)
        width, after = np.diff(knots), (knots[:, :-1] >= y)
        left, right = cdf[:, :, :-1] - after, cdf[:, :, 1:] - after  # a segment lies on one side of y
        diagonal = np.einsum("iqs,jqs,qs->qij", left, left, width) + np.einsum("iqs,jqs,qs->qij", right, right, width)
        crossed = np.einsum("iqs,jqs,qs->qij", left, right, width)
        parts.append((2 * diagonal + crossed + crossed.transpose(0, 2, 1)) / 6)
    return np.concatenate(parts)


def best_weights(matrix: np.ndarray, steps: int = 2_000) -> np.ndarray:
    """(m,) the w ≥ 0 with sum 1 that has the least wᵀ A w, by exponentiated gradients."""
    weights = np.full(len(matrix), 1 / len(matrix))
    rate = 1 / max(np.abs(matrix).max(), 1e-12)
    for _ in range(steps):
        gradient = matrix @ weights
        weights = weights * np.exp(-rate * (gradient - gradient.min()))
        weights /= weights.sum()
    return weights
