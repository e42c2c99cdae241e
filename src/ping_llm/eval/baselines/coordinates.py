"""Training measurements in, network coordinates out: RTT = distance in a Euclidean space + two heights.

Vivaldi with the height vector: Dabek, Cox, Kaashoek, Morris, "Vivaldi: A Decentralized Network Coordinate System", SIGCOMM
2004, with its adaptive time step. Each measurement pulls both endpoints like a spring, by a step that depends on how sure
either is of its position. Measurements are taken in random batches instead of one by one; the pulls of one node within a
batch are averaged. An address that is a source and a destination is one node.
"""

from __future__ import annotations

import numpy as np

from ping_llm.eval.baselines.base import USES_OF_CONTEXT, PointMethod
from ping_llm.eval.baselines.pairs import Pairs, SourceBackoff, find
from ping_llm.eval.baselines.simple import Additive, Placing
from ping_llm.eval.columns import Measurements

ERROR_STEP = POSITION_STEP = 0.25  # Vivaldi's ce and cc
PASSES, BATCHES = 60, 32  # over all pairs, each in so many batches: a node of few pairs is pulled by one at a time
PLACING_PASSES = 60  # pulls of a source by all that is given of it
LEAST_RTT_MS, LEAST_HEIGHT_MS = 0.1, 0.05


class Coordinates:
    """Positions (n, dims), heights (n,) in ms and expected errors (n,) of nodes, moved by measured RTTs."""

    def __init__(self, nodes: int, dims: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng([seed, dims])
        self.position = self._rng.normal(0, 1, (nodes, dims))
        self.height, self.error = np.ones(nodes), np.ones(nodes)  # the error is relative

    def fit(self, endpoints: np.ndarray, rtt_ms: np.ndarray, passes: int = PASSES) -> Coordinates:
        """Pulls by all P pairs of nodes (2, P) and their RTTs (P,), each once a pass in random order; returns itself.

        A symmetric matrix is given by one triangle or by both; sources × destinations by disjoint nodes.
        """
        rtt_ms = np.maximum(rtt_ms, LEAST_RTT_MS)
        for _ in range(passes):
            for batch in np.array_split(self._rng.permutation(len(rtt_ms)), min(BATCHES, len(rtt_ms))):
                self._pull(endpoints[:, batch], rtt_ms[batch])
        return self

    def distance_ms(self, node: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The predicted RTT of nodes to others, any shape."""
        apart = _spring(self.position[node], self.height[node], self.position[other], self.height[other])
        return np.maximum(apart[2], LEAST_RTT_MS)

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


class Vivaldi(Placing):
    """Coordinates of all addresses of train; a context pulls its source from where it stands, a new one from where its /24
    or /48 stands on average, or all sources."""

    def __init__(self, train: Measurements, dims: int) -> None:
        self.pairs = pairs = Pairs.of(train)
        self.fallback = Additive(train)
        nodes = np.union1d(pairs.src_ids, pairs.dst_ids)
        self._destination, sources = find(nodes, pairs.dst_ids), find(nodes, pairs.src_ids)
        endpoints = np.stack([sources[pairs.source], self._destination[pairs.destination]])  # (2, P)
        self.coordinates = Coordinates(len(nodes), dims).fit(endpoints, np.exp(pairs.log_ms))
        self.backoff = SourceBackoff(pairs.src_ids, train.addresses)
        self._position = self.backoff.extend(self.coordinates.position[sources])
        self._height = self.backoff.extend(self.coordinates.height[sources])
        self._height[-1] = np.median(self.coordinates.height[sources])

    def unmoved(self, start: np.ndarray, destination: np.ndarray) -> np.ndarray:
        return self._log_distance(self._position[start], self._height[start], destination)

    def moved(
        self, start: np.ndarray, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray
    ) -> np.ndarray:
        """The distance from where the context pulls the source."""
        nodes = self._destination[there]
        anchors, anchor_heights = (
            self.coordinates.position[nodes],
            self.coordinates.height[nodes],
        )  # (q, K, dims), (q, K)
        rtt_ms = np.maximum(np.exp(np.where(given, log_ms, 0.0)), LEAST_RTT_MS)
        count, position, height = given.sum(axis=1), self._position[start], self._height[start]
        for turn in range(PLACING_PASSES):
            away, height_share, distance = _spring(position[:, None], height[:, None], anchors, anchor_heights)
            force = np.where(given, rtt_ms - distance, 0.0) * (1 - turn / PLACING_PASSES) / count[:, None]
            position = position + (force[:, :, None] * away).sum(axis=1)
            height = np.maximum(height + (force * height_share).sum(axis=1), LEAST_HEIGHT_MS)
        return self._log_distance(position, height, destination)

    def _log_distance(self, position: np.ndarray, height: np.ndarray, destination: np.ndarray) -> np.ndarray:
        node = self._destination[destination]
        ends = self.coordinates.position[node], self.coordinates.height[node]
        return np.log(np.maximum(_spring(position, height, *ends)[2], LEAST_RTT_MS))


def _spring(
    position: np.ndarray, height: np.ndarray, other: np.ndarray, other_height: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair of nodes the unit vector away from the other (…, dims), its height part (…,), the distance in ms."""
    apart = position - other
    flat = np.sqrt((apart**2).sum(axis=-1))
    distance = flat + height + other_height
    return apart / np.maximum(distance, 1e-9)[..., None], (height + other_height) / distance, distance


VIVALDI_2D = PointMethod("vivaldi_2d", lambda train: Vivaldi(train, 2), uses=USES_OF_CONTEXT)
VIVALDI_8D = PointMethod("vivaldi_8d", lambda train: Vivaldi(train, 8), uses=USES_OF_CONTEXT)
