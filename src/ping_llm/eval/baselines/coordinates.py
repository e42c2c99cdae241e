"""Training measurements in, network coordinates out: RTT = distance in a Euclidean space + two heights.

Vivaldi with the height vector: Dabek, Cox, Kaashoek, Morris, "Vivaldi: A Decentralized Network Coordinate System", SIGCOMM
2004, with its adaptive time step. Each measurement pulls both endpoints like a spring, by a step that depends on how sure
either is of its position. Measurements are taken in random batches instead of one by one; the pulls of one node within a
batch are averaged. An address that is a source and a destination is one node.
"""

from __future__ import annotations

import numpy as np

from ping_llm.eval.baselines.base import Learned, PointMethod
from ping_llm.eval.baselines.pairs import Pairs
from ping_llm.eval.baselines.simple import Additive
from ping_llm.eval.columns import Measurements, QueryView

ERROR_STEP = POSITION_STEP = 0.25
"""Vivaldi's ce and cc."""

PLACING_PASSES = 60
"""Pulls of a new source by its context."""

LEAST_RTT_MS, LEAST_HEIGHT_MS = 0.1, 0.05
BATCHES = 32
"""A pass has about as many batches; a node of few pairs is then pulled by one at a time."""


class Coordinates:
    """Positions (n, dims), heights (n,) in ms and confidence (n,) of nodes, moved by measured RTTs."""

    def __init__(self, nodes: int, dims: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng([seed, dims])
        self.position = self._rng.normal(0, 1, (nodes, dims))
        self.height = np.full(nodes, 1.0)
        self.error = np.ones(nodes)  # the relative error that each node expects of itself

    def fit(self, endpoints: np.ndarray, rtt_ms: np.ndarray, passes: int) -> Coordinates:
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

    def _pull(self, endpoints: np.ndarray, rtt_ms: np.ndarray) -> None:
        """Moves both endpoints (2, b) of a batch of pairs."""
        node, other = np.concatenate([endpoints, endpoints[::-1]], axis=1)
        rtt_ms = np.tile(rtt_ms, 2)
        weight = self.error[node] / (self.error[node] + self.error[other])
        away, height_share, distance = _spring(
            self.position[node], self.height[node], self.position[other], self.height[other]
        )
        relative_error = np.abs(distance - rtt_ms) / rtt_ms
        force = POSITION_STEP * weight * (rtt_ms - distance)
        count = np.maximum(np.bincount(node, minlength=len(self.height)), 1)
        for column in range(self.position.shape[1]):
            pulls = np.bincount(node, force * away[:, column], len(self.height))
            self.position[:, column] += pulls / count
        self.height = np.maximum(
            self.height + np.bincount(node, force * height_share, len(self.height)) / count, LEAST_HEIGHT_MS
        )
        step = ERROR_STEP * weight * (np.minimum(relative_error, 1.0) - self.error[node])
        self.error += np.bincount(node, step, len(self.height)) / count


class Vivaldi:
    """Coordinates of sources and destinations; new sources are placed by their context."""

    def __init__(self, train: Measurements, dims: int, passes: int = 60, seed: int = 0) -> None:
        self.pairs = pairs = Pairs.of(train)
        self.additive = Additive(train)
        self._node = _destination_nodes(pairs)  # (D,) after the sources, which are nodes 0 … S − 1
        nodes = len(pairs.probes) + len(pairs.dst_ids)
        endpoints = np.stack([pairs.source, self._node[pairs.destination]])  # (2, P)
        self.coordinates = Coordinates(nodes, dims, seed).fit(endpoints, np.exp(pairs.log_ms), passes)

    def __call__(self, view: QueryView) -> np.ndarray:
        pairs, predicted = self.pairs, self.additive(view)
        source, destination = pairs.source_of(view.probe), pairs.destination_of(view.dst_id)
        known = np.flatnonzero((source >= 0) & (destination >= 0))
        predicted[known] = np.log(self.coordinates.distance_ms(source[known], self._node[destination[known]]))
        told = (pairs.destination_of(view.context_dst_id) >= 0) & ~np.isnan(view.context_log_ms)
        new = np.flatnonzero((source < 0) & (destination >= 0) & told.any(axis=1))
        if len(new):
            predicted[new] = self._placed(view.take(new), told[new], self._node[destination[new]])
        return predicted

    def _placed(self, view: QueryView, told: np.ndarray, node: np.ndarray) -> np.ndarray:
        """(q,) log-ms from new sources to nodes (q,): the sources are pulled from the middle by their context."""
        known, sources = self.coordinates, slice(len(self.pairs.probes))
        there = self._node[self.pairs.destination_of(view.context_dst_id)]
        anchors, anchor_heights = known.position[there], known.height[there]  # (q, K, dims), (q, K)
        rtt_ms = np.maximum(np.exp(np.where(told, view.context_log_ms, 0.0)), LEAST_RTT_MS)
        count = told.sum(axis=1)
        position = np.tile(known.position[sources].mean(axis=0), (len(view), 1))
        height = np.full(len(view), np.median(known.height[sources]))
        for turn in range(PLACING_PASSES):
            away, height_share, distance = _spring(position[:, None], height[:, None], anchors, anchor_heights)
            force = np.where(told, rtt_ms - distance, 0.0) * (1 - turn / PLACING_PASSES) / count[:, None]
            position = position + (force[:, :, None] * away).sum(axis=1)
            height = np.maximum(height + (force * height_share).sum(axis=1), LEAST_HEIGHT_MS)
        distance = _spring(position, height, known.position[node], known.height[node])[2]
        return np.log(np.maximum(distance, LEAST_RTT_MS))


def _destination_nodes(pairs: Pairs) -> np.ndarray:
    """(D,) the node of each destination: that of the source with its address, else one of its own after the sources."""
    node = len(pairs.probes) + np.arange(len(pairs.dst_ids))
    same = pairs.destination_of(pairs.src_id)
    node[same[same >= 0]] = pairs.source[same >= 0]
    return node


def _spring(
    position: np.ndarray, height: np.ndarray, other: np.ndarray, other_height: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair of nodes the unit vector away from the other (…, dims), its height part (…,), the distance in ms."""
    apart = position - other
    flat = np.sqrt((apart**2).sum(axis=-1))
    distance = flat + height + other_height
    return apart / np.maximum(distance, 1e-9)[..., None], (height + other_height) / distance, distance


def learn_vivaldi(train: Measurements, dims: int, passes: int = 60) -> Learned:
    """See `Vivaldi`."""
    return Vivaldi(train, dims, passes)


VIVALDI_2D = PointMethod("vivaldi_2d", lambda train: learn_vivaldi(train, 2))
VIVALDI_8D = PointMethod("vivaldi_8d", lambda train: learn_vivaldi(train, 8))
