"""Training measurements in, a factor for each source and destination out, whose product is the RTT or its logarithm.

DMFSGD: Liao, Du, Geurts, Leduc, "DMFSGD: A Decentralized Matrix Factorization Algorithm for Network Distance Prediction",
IEEE/ACM ToN 21, 2013: factors of RTT / p99, non-negative, by stochastic descent of the regularised absolute error. A host
has a factor as source and one as destination, and one RTT serves both directions (Algorithm 1). In place of single nodes
random batches are taken, and the rate falls linearly to 0. Biased log factorisation: log RTT = mean + biases + product, by
Adam on the Huber loss. Both place new sources by their context.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ping_llm.eval.baselines.base import Learned, PointMethod
from ping_llm.eval.baselines.pairs import Pairs
from ping_llm.eval.baselines.simple import Additive
from ping_llm.eval.columns import Measurements, QueryView

LEAST_RTT_MS = 0.1
HUBER_LOG_MS = 0.5


class DMFSGD:
    """RTT = scale · source factor · destination factor, all non-negative unless wished otherwise."""

    def __init__(
        self,
        train: Measurements,
        rank: int = 10,
        reg: float = 1e-2,
        rate: float = 0.02,
        passes: int = 150,
        non_negative: bool = True,
        seed: int = 0,
    ) -> None:
        self.pairs, self.additive = Pairs.of(train), Additive(train)
        self.reg, self.rate, self.least = reg, rate, 0.0 if non_negative else -np.inf
        source, destination, log_ms = _both_ways(self.pairs)
        rtt_ms, sizes = np.exp(log_ms), (len(self.pairs.probes), len(self.pairs.dst_ids))
        self.scale_ms = float(np.quantile(rtt_ms, 0.99))
        value = rtt_ms / self.scale_ms
        self.source, self.destination = absolute_error_factors(
            source, destination, value, sizes, rank, reg, rate, passes, self.least, seed
        )

    def __call__(self, view: QueryView) -> np.ndarray:
        pairs, predicted = self.pairs, self.additive(view)
        source, destination = pairs.source_of(view.probe), pairs.destination_of(view.dst_id)
        known = np.flatnonzero((source >= 0) & (destination >= 0))
        predicted[known] = self._log_product(self.source[source[known]], destination[known])
        told = (pairs.destination_of(view.context_dst_id) >= 0) & ~np.isnan(view.context_log_ms)
        new = np.flatnonzero((source < 0) & (destination >= 0) & told.any(axis=1))
        if len(new):
            predicted[new] = self._log_product(self._place(view.take(new), told[new]), destination[new])
        return predicted

    def _log_product(self, factors: np.ndarray, destination: np.ndarray) -> np.ndarray:
        product_ms = self.scale_ms * (factors * self.destination[destination]).sum(axis=1)
        return np.log(np.maximum(product_ms, LEAST_RTT_MS))

    def _place(self, view: QueryView, told: np.ndarray, passes: int = 60) -> np.ndarray:
        """(q, r) factors of new sources: the mean source, moved by the same descent on what it is told."""
        there = self.destination[self.pairs.destination_of(view.context_dst_id)]  # (q, K, r)
        value = np.where(told, np.exp(np.where(told, view.context_log_ms, 0.0)) / self.scale_ms, 0.0)
        mean = self.source.mean(axis=0)
        factors = np.tile(mean, (len(view), 1))
        count = told.sum(axis=1)[:, None]
        for turn in range(passes):
            step = 10 * self.rate * (1 - turn / passes)
            sign = np.where(told, np.sign(value - np.einsum("qkr,qr->qk", there, factors)), 0.0)
            toward = np.einsum("qk,qkr->qr", sign, there) / count - self.reg * (factors - mean)
            factors = np.maximum(factors + step * toward, self.least)
        return factors


def absolute_error_factors(
    source: np.ndarray,
    destination: np.ndarray,
    value: np.ndarray,
    sizes: tuple[int, int],
    rank: int,
    reg: float,
    rate: float,
    passes: int,
    least: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Factors (S, r), (D, r) whose products fit the positive values (P,), of which few exceed 1, in absolute error.

    A symmetric matrix is given by both of its triangles. `least` bounds the factors from below.
    """
    rng = np.random.default_rng([seed, rank])
    start = np.sqrt(value.mean() / rank)
    factors = [start * rng.uniform(0.5, 1.5, (size, rank)) for size in sizes]
    for turn in range(passes):
        step = rate * (1 - turn / passes)
        for batch in batches(len(value), rng):
            s, d = source[batch], destination[batch]
            here, there = factors[0][s], factors[1][d]
            sign = np.sign(value[batch] - (here * there).sum(axis=1))[:, None]
            for factor, node, toward in (
                (factors[0], s, sign * there - reg * here),
                (factors[1], d, sign * here - reg * there),
            ):
                places = node[:, None] * rank + np.arange(rank)
                np.add.at(factor.reshape(-1), places.ravel(), step * toward.ravel())  # four times as fast as by rows
                np.maximum(factor, least, out=factor)
    return factors[0], factors[1]


class LogFactors:
    """log RTT = mean + biases + product of factors; a new source is the mean of what its context makes of the prior.

    The prior of (bias, factor) is the normal law of the known sources', the noise that of the pairs that were learned.
    """

    def __init__(self, train: Measurements, rank: int, reg: float, steps: int = 400, seed: int = 0) -> None:
        self.pairs, self.additive = Pairs.of(train), Additive(train)
        pairs = self.pairs
        target = pairs.log_ms - self.additive.mean
        learned = _descend(pairs, target, rank, reg, steps, seed)
        self.source_bias, self.destination_bias, self.source, self.destination = learned
        rest = target - self._product(pairs.source, pairs.destination)
        known = np.concatenate([self.source_bias[:, None], self.source], axis=1)  # (S, 1 + r)
        self.prior_mean = known.mean(axis=0)
        centred = known - self.prior_mean
        prior = centred.T @ centred / len(known) + 1e-6 * np.eye(rank + 1)
        features = np.concatenate([np.ones((len(self.destination), 1)), self.destination], axis=1)  # (D, 1 + r)
        self.features, self.spread = features, features @ np.linalg.cholesky(prior)
        self.noise = max(float(np.mean(np.minimum(np.abs(rest), HUBER_LOG_MS) ** 2)), 1e-4) + reg

    def __call__(self, view: QueryView) -> np.ndarray:
        pairs, predicted = self.pairs, self.additive(view)
        source, destination = pairs.source_of(view.probe), pairs.destination_of(view.dst_id)
        known = np.flatnonzero((source >= 0) & (destination >= 0))
        predicted[known] = self.additive.mean + self._product(source[known], destination[known])
        new = np.flatnonzero((source < 0) & (destination >= 0))
        for rows in np.array_split(new, max(1, len(new) // 5000)):
            predicted[rows] = self._place(view.take(rows), destination[rows])
        return predicted

    def _product(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        product = (self.source[source] * self.destination[destination]).sum(axis=1)
        return self.source_bias[source] + self.destination_bias[destination] + product

    def _place(self, view: QueryView, destination: np.ndarray) -> np.ndarray:
        """(q,) log-ms: Gaussian regression of the context's residuals, once more with outliers weighing less."""
        there = self.pairs.destination_of(view.context_dst_id)
        told = (there >= 0) & ~np.isnan(view.context_log_ms)
        expected = self.additive.mean + self.destination_bias + self.features @ self.prior_mean  # (D,)
        if not told.any():
            return expected[destination]
        rest = np.where(told, view.context_log_ms - expected[there], 0.0)  # (q, K)
        spread = np.where(told[:, :, None], self.spread[there], 0.0)  # (q, K, 1 + r)
        covariance = spread @ spread.transpose(0, 2, 1)  # (q, K, K)
        identity, noise = np.eye(covariance.shape[1]), np.full(rest.shape, self.noise)
        for _ in range(3):
            weights = np.linalg.solve(covariance + noise[:, :, None] * identity, rest[:, :, None])[:, :, 0]
            misfit = np.abs(rest - np.einsum("qkl,ql->qk", covariance, weights))
            noise = self.noise * np.maximum(misfit / (2 * np.sqrt(self.noise)), 1.0)
        moved = np.einsum("qkr,qk->qr", spread, weights)
        return expected[destination] + (moved * self.spread[destination]).sum(axis=1)


def _descend(
    pairs: Pairs, target: np.ndarray, rank: int, reg: float, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Biases (S,), (D,) and factors (S, r), (D, r) that fit target (P,) in log-ms: Huber loss, ridge `reg` a pair."""
    import torch
    from torch.nn.functional import embedding, huber_loss

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations are small: threads cost ten times what they save on a busy machine
    generator = torch.Generator().manual_seed(seed)
    sizes = (len(pairs.probes), len(pairs.dst_ids))
    weights = [torch.zeros(size, 1) for size in sizes]
    weights += [0.3 / rank**0.5 * torch.randn(size, rank, generator=generator) for size in sizes]
    for weight in weights:
        weight.requires_grad_(True)
    s, d = torch.from_numpy(pairs.source), torch.from_numpy(pairs.destination)
    goal = torch.from_numpy(target.astype(np.float32))
    optimiser = torch.optim.Adam(weights, lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    for _ in range(steps):
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
    bias_s, bias_d, source, destination = (weight.detach().numpy().astype(np.float64) for weight in weights)
    return bias_s[:, 0], bias_d[:, 0], source, destination


def batches(count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """All of 0 … count − 1 once, shuffled, in batches that are small beside the whole."""
    return iter(np.array_split(rng.permutation(count), min(count, max(1, count // np.clip(count // 64, 1, 4096)))))


def _both_ways(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources, destinations and log-ms of the pairs, and of reverse pairs of known hosts that were not measured."""
    host = pairs.destination_of(pairs.src_id)  # the source as a destination, −1 = it never was one
    source_of = np.full(len(pairs.dst_ids), -1)
    source_of[host[host >= 0]] = pairs.source[host >= 0]
    back = source_of[pairs.destination]  # the destination as a source
    usable = (host >= 0) & (back >= 0)
    measured = np.isin(back * len(pairs.dst_ids) + host, pairs.source * len(pairs.dst_ids) + pairs.destination)
    rows = np.flatnonzero(usable & ~measured)
    return (
        np.concatenate([pairs.source, back[rows]]),
        np.concatenate([pairs.destination, host[rows]]),
        np.concatenate([pairs.log_ms, pairs.log_ms[rows]]),
    )


def learn_dmfsgd(train: Measurements, rank: int, reg: float) -> Learned:
    """See `DMFSGD`."""
    return DMFSGD(train, rank, reg)


def learn_log_factors(train: Measurements, rank: int, reg: float) -> Learned:
    """See `LogFactors`."""
    return LogFactors(train, rank, reg)


DMFSGD_METHOD = PointMethod(
    "dmfsgd", learn_dmfsgd, tuple({"rank": rank, "reg": reg} for rank in (10, 20) for reg in (1e-3, 1e-2))
)
LOG_FACTORS = PointMethod(
    "log_factors", learn_log_factors, tuple({"rank": rank, "reg": reg} for rank in (10, 16, 64) for reg in (0.01, 0.05))
)
