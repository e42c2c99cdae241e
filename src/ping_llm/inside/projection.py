"""Points of many dimensions in, their principal components out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Projection:
    """Points in their first k principal components."""

    places: np.ndarray  # (n, k)
    shares: np.ndarray  # (k,) of the variance that each component holds


def principal_components(points: np.ndarray, components: int = 2) -> Projection:
    """The first components of points (n, D), by the singular value decomposition of the centred points.

    The sign of a component, which is arbitrary, is such that its place of the largest magnitude is positive. Components
    beyond the rank of the points are 0.
    """
    centred = np.asarray(points, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    missing = max(components - len(values), 0)
    values = np.pad(values, (0, missing))
    places = np.pad(left, ((0, 0), (0, missing)))[:, :components] * values[:components]
    largest = places[np.abs(places).argmax(axis=0), np.arange(components)]
    total = (values**2).sum()
    shares = values[:components] ** 2 / total if total > 0 else np.zeros(components)
    return Projection(places * np.where(largest < 0, -1.0, 1.0), shares)


def scaled(points: np.ndarray) -> np.ndarray:
    """Vectors (…, D) with a root mean square of 1, as the blocks and the head read the residual stream."""
    points = np.asarray(points, dtype=np.float64)
    return points / np.sqrt((points**2).mean(axis=-1, keepdims=True) + np.finfo(np.float32).eps)


def explained_by_neighbours(points: np.ndarray, values: np.ndarray, neighbours: int = 5) -> float:
    """R² of predicting each value (n,) by the mean of those of the nearest other points (n, D); NaN for too few.

    How far the place of a point says what its value is: 1 = exactly, 0 or less = not at all.
    """
    points, values = np.asarray(points, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(points) <= neighbours or not np.ptp(values):
        return float("nan")
    squares = (points**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * points @ points.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argpartition(distance, neighbours - 1, axis=1)[:, :neighbours]
    errors = values - values[nearest].mean(axis=1)
    return float(1 - (errors**2).sum() / ((values - values.mean()) ** 2).sum())
