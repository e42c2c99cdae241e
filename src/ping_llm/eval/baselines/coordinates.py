"""Training measurements in, network coordinates out: RTT = distance in a Euclidean space + two heights.

Vivaldi (Dabek et al., SIGCOMM 2004): each measurement pulls source and destination like a spring, by a step that depends on
how sure either is of where it stands. Measurements are taken in random batches; the pulls of one node within a batch are
averaged.
"""

from __future__ import annotations

import numpy as np

from ping_llm.eval.baselines.base import PointMethod
from ping_llm.eval.baselines.pairs import Pairs
from ping_llm.eval.baselines.simple import Additive, Placing
from ping_llm.eval.columns import Measurements

ERROR_STEP = POSITION_STEP = 0.25  # Vivaldi's ce and cc
PASSES, BATCHES = 60, 32  # over all pairs, each in so many batches: a node of few pairs is pulled by one at a time
PLACING_PASSES = 60  # pulls of a new source by all that is given of it
LEAST_RTT_MS, LEAST_HEIGHT_MS = 0.1, 0.05


class Vivaldi(Placing):
    """Positions (n, dims) and heights (n,) in ms of sources, then destinations; new sources are placed by context."""

    def __init__(self, train: Measurements, dims: int) -> None:
        self.pairs = pairs = Pairs.of(train)
        self.fallback, self.sources = Additive(train), len(pairs.probes)
        rng, nodes = np.random.default_rng([0, dims]), self.sources + len(pairs.dst_ids)
        self.position = rng.normal(0, 1, (nodes, dims))
        self.height, self.error = np.ones(nodes), np.ones(nodes)
        rtt_ms = np.maximum(np.exp(pairs.log_ms), LEAST_RTT_MS)
        nodes_of_pairs = np.stack([pairs.source, self.sources + pairs.destination])  # (2, P)
        for _ in range(PASSES):
            for batch in np.array_split(rng.permutation(len(pairs)), min(BATCHES, len(pairs))):
                self._pull(nodes_of_pairs[:, batch], rtt_ms[batch])

    def _pull(self, nodes: np.ndarray, rtt_ms: np.ndarray) -> None:
        """Moves both nodes of each of a batch of pairs, (2, b)."""
        node, other = np.concatenate([nodes, nodes[::-1]], axis=1)
        rtt_ms = np.tile(rtt_ms, 2)
        weight = self.error[node] / (self.error[node] + self.error[other])
        ends = self.position[node], self.height[node], self.position[other], self.height[other]
        away, height_share, distance = _spring(*ends)
        relative_error = np.abs(distance - rtt_ms) / rtt_ms
        force = POSITION_STEP * weight * (rtt_ms - distance)
        count = np.maximum(np.bincount(node, minlength=len(self.height)), 1)
        for column, direction in enumerate(away.T):
            self.position[:, column] += np.bincount(node, force * direction, len(self.height)) / count
        pulls = np.bincount(node, force * height_share, len(self.height)) / count
        self.height = np.maximum(self.height + pulls, LEAST_HEIGHT_MS)
        step = ERROR_STEP * weight * (np.minimum(relative_error, 1.0) - self.error[node])
        self.error += np.bincount(node, step, len(self.height)) / count

    def of_known(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        return self._log_distance(self.position[source], self.height[source], destination)

    def of_new(self, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """The distance from where the context pulls a source that begins in the middle."""
        anchors, anchor_heights = self.position[self.sources + there], self.height[self.sources + there]  # (q, K, dims)
        rtt_ms = np.maximum(np.exp(np.where(given, log_ms, 0.0)), LEAST_RTT_MS)
        count = given.sum(axis=1)
        position = np.tile(self.position[: self.sources].mean(axis=0), (len(there), 1))
        height = np.full(len(there), np.median(self.height[: self.sources]))
        for turn in range(PLACING_PASSES):
            away, height_share, distance = _spring(position[:, None], height[:, None], anchors, anchor_heights)
            force = np.where(given, rtt_ms - distance, 0.0) * (1 - turn / PLACING_PASSES) / count[:, None]
            position = position + (force[:, :, None] * away).sum(axis=1)
            height = np.maximum(height + (force * height_share).sum(axis=1), LEAST_HEIGHT_MS)
        return self._log_distance(position, height, destination)

    def _log_distance(self, position: np.ndarray, height: np.ndarray, destination: np.ndarray) -> np.ndarray:
        there = self.sources + destination
        return np.log(np.maximum(_spring(position, height, self.position[there], self.height[there])[2], LEAST_RTT_MS))


def _spring(
    position: np.ndarray, height: np.ndarray, other: np.ndarray, other_height: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair of nodes the unit vector away from the other (…, dims), its height part (…,), the distance in ms."""
    apart = position - other
    flat = np.sqrt((apart**2).sum(axis=-1))
    distance = flat + height + other_height
    return apart / np.maximum(distance, 1e-9)[..., None], (height + other_height) / distance, distance


VIVALDI_2D = PointMethod("vivaldi_2d", lambda train: Vivaldi(train, 2))
VIVALDI_8D = PointMethod("vivaldi_8d", lambda train: Vivaldi(train, 8))
