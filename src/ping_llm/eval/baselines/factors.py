"""Training measurements in, a factor for each source and destination out, whose product is the RTT or its logarithm.

DMFSGD (Liao et al., 2013): non-negative factors of RTT / p99 by stochastic descent of the absolute error. Biased log
factorisation: log RTT = mean + biases + product, by Adam on the Huber loss. Both place new sources by their context.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from ping_llm.eval.baselines.base import PointMethod
from ping_llm.eval.baselines.pairs import Pairs, find
from ping_llm.eval.baselines.simple import Additive, Placing
from ping_llm.eval.columns import Measurements, QueryView

LEAST_RTT_MS = 0.1
HUBER_LOG_MS = 0.5
RATE, PASSES, PLACING_PASSES = 0.02, 150, 60  # of DMFSGD
STEPS = 400  # of Adam


class DMFSGD(Placing):
    """RTT = scale · source factor · destination factor, all non-negative."""

    def __init__(self, train: Measurements, rank: int, reg: float) -> None:
        self.pairs, self.fallback, self.reg = Pairs.of(train), Additive(train), reg
        pairs, rng = self.pairs, np.random.default_rng([0, rank])
        rtt_ms = np.exp(pairs.log_ms)
        self.scale_ms = float(np.quantile(rtt_ms, 0.99))
        value = rtt_ms / self.scale_ms
        start = np.sqrt(value.mean() / rank)
        batches = min(len(pairs), max(1, len(pairs) // np.clip(len(pairs) // 64, 1, 4096)))
        self.source = start * rng.uniform(0.5, 1.5, (len(pairs.probes), rank))
        self.destination = start * rng.uniform(0.5, 1.5, (len(pairs.dst_ids), rank))
        for turn in range(PASSES):
            step = RATE * (1 - turn / PASSES)
            for batch in np.array_split(rng.permutation(len(pairs)), batches):
                s, d = pairs.source[batch], pairs.destination[batch]
                here, there = self.source[s], self.destination[d]
                sign = np.sign(value[batch] - (here * there).sum(axis=1))[:, None]
                steps = (step * (sign * there - reg * here), step * (sign * here - reg * there))
                for factors, node, moved in zip((self.source, self.destination), (s, d), steps, strict=True):
                    np.add.at(factors, node, moved)
                    np.maximum(factors, 0.0, out=factors)

    def of_known(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        return self._log_product(self.source[source], destination)

    def of_new(self, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """The product with the mean source, moved by the same descent on the context."""
        anchors = self.destination[there]  # (q, K, r)
        value = np.where(given, np.exp(np.where(given, log_ms, 0.0)) / self.scale_ms, 0.0)
        mean = self.source.mean(axis=0)
        factors, count = np.tile(mean, (len(there), 1)), given.sum(axis=1)[:, None]
        for turn in range(PLACING_PASSES):
            step = 10 * RATE * (1 - turn / PLACING_PASSES)
            sign = np.where(given, np.sign(value - np.einsum("qkr,qr->qk", anchors, factors)), 0.0)
            toward = np.einsum("qk,qkr->qr", sign, anchors) / count - self.reg * (factors - mean)
            factors = np.maximum(factors + step * toward, 0.0)
        return self._log_product(factors, destination)

    def _log_product(self, factors: np.ndarray, destination: np.ndarray) -> np.ndarray:
        product_ms = self.scale_ms * (factors * self.destination[destination]).sum(axis=1)
        return np.log(np.maximum(product_ms, LEAST_RTT_MS))


class LogFactors(Placing):
    """log RTT = mean + biases + product of factors; a new source is the mean of what its context makes of the prior.

    The prior of (bias, factor) is the normal distribution of the known sources', the noise that of the learned pairs.
    """

    def __init__(self, train: Measurements, rank: int, reg: float) -> None:
        self.pairs, self.additive = Pairs.of(train), Additive(train)
        pairs = self.pairs
        target = pairs.log_ms - self.additive.mean
        self.source_bias, self.destination_bias, self.source, self.destination = _descend(pairs, target, rank, reg)
        rest = target - self._product(pairs.source, pairs.destination)
        known = np.concatenate([self.source_bias[:, None], self.source], axis=1)  # (S, 1 + r)
        centred = known - known.mean(axis=0)
        prior = centred.T @ centred / len(known) + 1e-6 * np.eye(rank + 1)
        features = np.concatenate([np.ones((len(self.destination), 1)), self.destination], axis=1)  # (D, 1 + r)
        self.expected = (
            self.additive.mean + self.destination_bias + features @ known.mean(axis=0)
        )  # (D,) the mean source
        self.spread = features @ np.linalg.cholesky(prior)
        self.noise = max(float(np.mean(np.minimum(np.abs(rest), HUBER_LOG_MS) ** 2)), 1e-4) + reg

    def fallback(self, view: QueryView) -> np.ndarray:
        """The mean source, if only that is new and has no context; else additive biases."""
        source, destination = find(self.pairs.probes, view.probe), find(self.pairs.dst_ids, view.dst_id)
        return np.where((source < 0) & (destination >= 0), self.expected[destination], self.additive(view))

    def of_known(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        return self.additive.mean + self._product(source, destination)

    def of_new(self, there: np.ndarray, log_ms: np.ndarray, given: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """Gaussian regression of the context's residuals, once more with outliers weighing less."""
        rest = np.where(given, log_ms - self.expected[there], 0.0)  # (q, K)
        spread = np.where(given[:, :, None], self.spread[there], 0.0)  # (q, K, 1 + r)
        covariance = spread @ spread.transpose(0, 2, 1)  # (q, K, K)
        identity, noise = np.eye(covariance.shape[1]), np.full(rest.shape, self.noise)
        for _ in range(3):
            weights = np.linalg.solve(covariance + noise[:, :, None] * identity, rest[:, :, None])[:, :, 0]
            misfit = np.abs(rest - np.einsum("qkl,ql->qk", covariance, weights))
            noise = self.noise * np.maximum(misfit / (2 * np.sqrt(self.noise)), 1.0)
        moved = np.einsum("qkr,qk->qr", spread, weights)
        return self.expected[destination] + (moved * self.spread[destination]).sum(axis=1)

    def _product(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        product = (self.source[source] * self.destination[destination]).sum(axis=1)
        return self.source_bias[source] + self.destination_bias[destination] + product


def _descend(pairs: Pairs, target: np.ndarray, rank: int, reg: float) -> list[np.ndarray]:
    """Biases (S,), (D,) and factors (S, r), (D, r) that fit target (P,) in log-ms: Huber loss, ridge `reg` a pair."""
    import torch
    from torch.nn.functional import embedding, huber_loss

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations are small: threads cost ten times what they save on a busy machine
    generator = torch.Generator().manual_seed(0)
    sizes = (len(pairs.probes), len(pairs.dst_ids))
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
    "dmfsgd", DMFSGD, tuple({"rank": rank, "reg": reg} for rank, reg in product((10, 20), (1e-3, 1e-2)))
)
LOG_FACTORS = PointMethod(
    "log_factors", LogFactors, tuple({"rank": rank, "reg": reg} for rank, reg in product((10, 16, 64), (0.01, 0.05)))
)
