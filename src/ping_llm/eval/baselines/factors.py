"""Training measurements in, a factor for each source and destination out, whose product is the RTT or its logarithm.

DMFSGD: Liao, Du, Geurts, Leduc, "DMFSGD: A Decentralized Matrix Factorization Algorithm for Network Distance Prediction",
IEEE/ACM ToN 21, 2013: factors of RTT / p99, non-negative, by stochastic descent of the regularised absolute error. A host
has a factor as source and one as destination, and one RTT serves both directions (Algorithm 1). In place of single nodes
random batches are taken, and the rate falls linearly to 0. Biased log factorisation: log RTT = mean + biases + product, by
Adam on the Huber loss. Both let the context move a source from its factor, that of its /24 or /48, or the mean one.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from ping_llm.eval.baselines.base import USES_OF_CONTEXT, PointMethod
from ping_llm.eval.baselines.pairs import Pairs, SourceBackoff, find
from ping_llm.eval.baselines.simple import Additive, Placing
from ping_llm.eval.columns import Measurements, QueryView, pair_keys

LEAST_RTT_MS = 0.1
HUBER_LOG_MS = 0.5
RATE, PASSES, PLACING_PASSES = 0.02, 150, 60  # of DMFSGD
STEPS = 400  # of Adam


class DMFSGD(Placing):
    """RTT = scale · source factor · destination factor, all non-negative."""

    def __init__(self, train: Measurements, rank: int, reg: float = 1e-2) -> None:
        self.pairs, self.fallback, self.reg = Pairs.of(train), Additive(train), reg
        source, destination, log_ms = _both_ways(self.pairs)
        rtt_ms, sizes = np.exp(log_ms), (len(self.pairs.src_ids), len(self.pairs.dst_ids))
        self.scale_ms = float(np.quantile(rtt_ms, 0.99))
        of_source, self.destination = absolute_error_factors(
            source, destination, rtt_ms / self.scale_ms, sizes, rank, reg
        )
        self.backoff = SourceBackoff(self.pairs.src_ids, train.addresses)
        self.source = self.backoff.extend(of_source)

    def unmoved(self, start: np.ndarray, destination: np.ndarray) -> np.ndarray:
        return self._log_product(self.source[start], destination)

    def moved(
        self, start: np.ndarray, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray
    ) -> np.ndarray:
        """The product with the source's factor, moved by the same descent on the context."""
        anchors = self.destination[there]  # (q, K, r)
        value = np.where(given, np.exp(np.where(given, log_ms, 0.0)) / self.scale_ms, 0.0)
        first = factors = self.source[start]
        count = given.sum(axis=1)[:, None]
        for turn in range(PLACING_PASSES):
            step = 10 * RATE * (1 - turn / PLACING_PASSES)
            sign = np.where(given, np.sign(value - np.einsum("qkr,qr->qk", anchors, factors)), 0.0)
            toward = np.einsum("qk,qkr->qr", sign, anchors) / count - self.reg * (factors - first)
            factors = np.maximum(factors + step * toward, 0.0)
        return self._log_product(factors, destination)

    def _log_product(self, factors: np.ndarray, destination: np.ndarray) -> np.ndarray:
        product_ms = self.scale_ms * (factors * self.destination[destination]).sum(axis=1)
        return np.log(np.maximum(product_ms, LEAST_RTT_MS))


def absolute_error_factors(
    source: np.ndarray, destination: np.ndarray, value: np.ndarray, sizes: tuple[int, int], rank: int, reg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Factors (S, r), (D, r) whose products fit the positive values (P,), of which few exceed 1, in absolute error.

    A symmetric matrix is given by both of its triangles.
    """
    rng = np.random.default_rng([0, rank])
    start = np.sqrt(value.mean() / rank)
    factors = [start * rng.uniform(0.5, 1.5, (size, rank)) for size in sizes]
    batches = min(len(value), max(1, len(value) // np.clip(len(value) // 64, 1, 4096)))
    for turn in range(PASSES):
        step = RATE * (1 - turn / PASSES)
        for batch in np.array_split(rng.permutation(len(value)), batches):
            s, d = source[batch], destination[batch]
            here, there = factors[0][s], factors[1][d]
            sign = np.sign(value[batch] - (here * there).sum(axis=1))[:, None]
            for factor, node, toward in zip(
                factors, (s, d), (sign * there - reg * here, sign * here - reg * there), strict=True
            ):
                places = node[:, None] * rank + np.arange(rank)
                np.add.at(factor.reshape(-1), places.ravel(), step * toward.ravel())  # four times as fast as by rows
                np.maximum(factor, 0.0, out=factor)
    return factors[0], factors[1]


def _both_ways(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources, destinations and log-ms of the pairs, and of reverse pairs of known hosts that were not measured."""
    src_id, dst_id = pairs.src_ids[pairs.source], pairs.dst_ids[pairs.destination]
    back, there = find(pairs.src_ids, dst_id), find(pairs.dst_ids, src_id)
    rows = np.flatnonzero((back >= 0) & (there >= 0) & (find(pairs.keys, pair_keys(dst_id, src_id)) < 0))
    both = (pairs.source, back[rows]), (pairs.destination, there[rows]), (pairs.log_ms, pairs.log_ms[rows])
    source, destination, log_ms = map(np.concatenate, both)
    return source, destination, log_ms


class LogFactors(Placing):
    """log RTT = mean + biases + product of factors; a context moves its source as far as the prior lets it.

    The prior of (bias, factor) of a new source is the normal distribution of the known sources', around its /24 or /48 if
    train holds that; it is narrower by 1 + n for a source of n pairs. The noise is that of the learned pairs.
    """

    def __init__(self, train: Measurements, rank: int, reg: float) -> None:
        self.pairs, self.additive = Pairs.of(train), Additive(train)
        pairs = self.pairs
        target = pairs.log_ms - self.additive.mean
        source_bias, destination_bias, source, destination = _descend(pairs, target, rank, reg)
        known = np.concatenate([source_bias[:, None], source], axis=1)  # (S, 1 + r)
        self._features = np.concatenate([np.ones((len(destination), 1)), destination], axis=1)  # (D, 1 + r)
        self._bias = self.additive.mean + destination_bias  # (D,)
        self.backoff = SourceBackoff(pairs.src_ids, train.addresses)
        self._source = self.backoff.extend(known)
        centred = known - known.mean(axis=0)
        prior = centred.T @ centred / len(known) + 1e-6 * np.eye(rank + 1)
        self._spread = self._features @ np.linalg.cholesky(prior)
        learned = np.bincount(pairs.source, minlength=self.backoff.count)  # 0 for prefixes and for all
        self._narrow = 1 / np.sqrt(1 + learned)
        rest = pairs.log_ms - self.unmoved(pairs.source, pairs.destination)
        self.noise = max(float(np.mean(np.minimum(np.abs(rest), HUBER_LOG_MS) ** 2)), 1e-4) + reg

    def fallback(self, view: QueryView) -> np.ndarray:
        """The mean source, if only that is new and has no context; else additive biases."""
        start, destination = self.backoff.rows(view.src_id), find(self.pairs.dst_ids, view.dst_id)
        return np.where(destination >= 0, self.unmoved(start, destination), self.additive(view))

    def unmoved(self, start: np.ndarray, destination: np.ndarray) -> np.ndarray:
        return self._bias[destination] + (self._source[start] * self._features[destination]).sum(axis=1)

    def moved(
        self, start: np.ndarray, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray
    ) -> np.ndarray:
        """Gaussian regression of the context's residuals, once more with outliers weighing less."""
        expected = self._bias[there] + np.einsum("qkr,qr->qk", self._features[there], self._source[start])
        rest = np.where(given, log_ms - expected, 0.0)  # (q, K)
        narrow = self._narrow[start][:, None]
        spread = np.where(given[:, :, None], narrow[:, :, None] * self._spread[there], 0.0)  # (q, K, 1 + r)
        covariance = spread @ spread.transpose(0, 2, 1)  # (q, K, K)
        identity, noise = np.eye(covariance.shape[1]), np.full(rest.shape, self.noise)
        for _ in range(3):
            weights = np.linalg.solve(covariance + noise[:, :, None] * identity, rest[:, :, None])[:, :, 0]
            misfit = np.abs(rest - np.einsum("qkl,ql->qk", covariance, weights))
            noise = self.noise * np.maximum(misfit / (2 * np.sqrt(self.noise)), 1.0)
        moved = np.einsum("qkr,qk->qr", spread, weights)
        return self.unmoved(start, destination) + (moved * narrow * self._spread[destination]).sum(axis=1)


def _descend(pairs: Pairs, target: np.ndarray, rank: int, reg: float) -> list[np.ndarray]:
    """Biases (S,), (D,) and factors (S, r), (D, r) that fit target (P,) in log-ms: Huber loss, ridge `reg` a pair."""
    import torch
    from torch.nn.functional import embedding, huber_loss

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations are small: threads cost ten times what they save on a busy machine
    generator = torch.Generator().manual_seed(0)
    sizes = (len(pairs.src_ids), len(pairs.dst_ids))
    weights = [torch.zeros(size, 1) for size in sizes]
    weights += [0.3 / rank**0.5 * torch.randn(size, rank, generator=generator) for size in sizes]
    for weight in weights:
        weight.requires_grad_(True)
    s, d = torch.from_numpy(pairs.source), torch.from_numpy(pairs.destination)
    goal = torch.from_numpy(target.astype(np.float32))
    optimiser = torch.optim.Adam(weights, lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, STEPS)
    for _ in range(STEPS):
        source_bias, destination_bias, source, destination = weights
        here, there = embedding(s, source), embedding(d, destination)  # its gradient is quicker than that of indexing
        biases = embedding(s, source_bias)[:, 0], embedding(d, destination_bias)[:, 0]
        predicted = biases[0] + biases[1] + (here * there).sum(dim=1)
        loss = huber_loss(predicted, goal, delta=HUBER_LOG_MS)
        ridge = (here**2 + there**2).sum(dim=1) + biases[0] ** 2 + biases[1] ** 2
        optimiser.zero_grad()
        (loss + reg / 2 * ridge.mean()).backward()
        optimiser.step()
        schedule.step()
    torch.set_num_threads(threads)
    return [weight.detach().squeeze(1).numpy().astype(np.float64) for weight in weights]


DMFSGD_METHOD = PointMethod(
    "dmfsgd",
    DMFSGD,
    tuple({"rank": rank, "reg": reg} for rank, reg in product((10, 20), (1e-3, 1e-2))),
    USES_OF_CONTEXT,
)
LOG_FACTORS = PointMethod(
    "log_factors",
    LogFactors,
    tuple({"rank": rank, "reg": reg} for rank, reg in product((10, 16, 64), (0.01, 0.05))),
    USES_OF_CONTEXT,
)
