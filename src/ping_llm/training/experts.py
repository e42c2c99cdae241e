"""Results of val, and what is known before each, in; the rules of the experts, and how much each part counts, out.

The kernels of an expert are those that make the results likeliest. The odds are those that make the CRPS least: the mean
over the parts of val of the logarithm of each one's mean, so that a part where all errors are small counts as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ping_llm.inference.distribution import log_edges
from ping_llm.inference.experts import CUTS, FEATURES, Expert, Experts, Past

GRID = slice(0, None, 8)  # of the borders of the codes: steps of 0.3 %
LEAST_RESULTS = 30  # that an expert is fitted to
_WIDTHS = (0.002, 0.02, 0.2)  # log-ms, to begin with
_PENALTY = 2e-3  # of the squares of the coefficients of kernels
_ODDS_PENALTY = 3e-3  # of those of odds and shares
_CONFUSION = 1e-4  # of a result that no kernel reaches: the density of a uniform one, times this


def fit_expert(past: Past, log_ms: np.ndarray) -> Expert:
    """The kernels that make n results (n,) likeliest after their past."""
    values = torch.from_numpy(np.nan_to_num(past.log_ms))
    there, features = torch.from_numpy(np.isfinite(past.log_ms)), torch.from_numpy(past.features)
    away = (torch.from_numpy(log_ms)[:, None] - values).abs()[..., None]  # (n, E, 1)
    rank = torch.arange(values.shape[1], dtype=torch.float64)
    uniform = _CONFUSION / float(np.ptp(log_edges()[[0, -1]]))

    def negative_log_likelihood(decay: Tensor, widths: Tensor, shares: Tensor) -> Tensor:
        of_each = torch.nn.functional.softplus(decay[0] + decay[1] * features[:, 2])  # (n,)
        weights = torch.exp(-of_each[:, None] * rank) * there
        weights = weights / weights.sum(1, keepdim=True)
        kernels = torch.exp(-away / widths.exp()) / (2 * widths.exp())  # (n, E, W)
        share = (features @ shares.T).softmax(1)  # (n, W)
        density = (weights[..., None] * kernels).sum(1).mul(share).sum(1)
        penalty = shares.square().sum() + (widths - start[1]).square().sum() + 0.1 * (decay - start[0]).square().sum()
        return -torch.log(density + uniform).mean() + _PENALTY * penalty

    start = [torch.tensor(one).double() for one in ((-1.0, 0.0), np.log(_WIDTHS), np.zeros((3, FEATURES)))]
    decay, widths, shares = _minimise(negative_log_likelihood, start)
    return Expert(tuple(decay.tolist()), tuple(widths.exp().tolist()), tuple(map(tuple, shares.tolist())))


def fit_odds(
    experts: Mapping[str, Expert],
    gram: np.ndarray,
    pasts: Mapping[str, Past],
    situation: np.ndarray,
    cut: np.ndarray,
    part: np.ndarray,
) -> Experts:
    """How much each part of an answer counts, from n answered results.

    `gram` (n, P, P) holds ∫ (F_a − 1[x ≥ result]) (F_b − 1[x ≥ result]) dx of each two of P parts, in the order of
    `Experts.weights`: a mixture with weights w has a CRPS of w·gram·w. `part` (n,) numbers the parts of val.
    """
    constant = torch.from_numpy(np.concatenate([np.ones((len(situation), 1)), situation], axis=1))
    features = [torch.from_numpy(np.concatenate([pasts[kind].features, situation], axis=1)) for kind in experts]
    there = [torch.from_numpy(allowed) for allowed in cut.T]
    there += [torch.from_numpy(pasts[kind].count > 0) for kind in experts]
    inputs, grams = [constant] * len(CUTS) + features, torch.from_numpy(gram)
    parts = [torch.from_numpy(np.flatnonzero(part == number)) for number in np.unique(part)]

    def mean_log_crps(*odds: Tensor) -> Tensor:
        logits = [torch.zeros(len(gram), dtype=torch.float64)]
        for own, x, allowed in zip(odds, inputs, there, strict=True):
            logits.append((x @ own).masked_fill(~allowed, -torch.inf))
        weights = torch.stack(logits, dim=1).softmax(1)
        crps = torch.einsum("na,nab,nb->n", weights, grams, weights)
        means = torch.stack([crps[rows].mean() for rows in parts])
        return means.log().mean() + _ODDS_PENALTY * sum(own.square().sum() for own in odds)

    start = [torch.zeros(x.shape[1], dtype=torch.float64) for x in inputs]
    odds = [tuple(own.tolist()) for own in _minimise(mean_log_crps, start)]
    return Experts(dict(experts), tuple(odds[: len(CUTS)]), dict(zip(experts, odds[len(CUTS) :], strict=True)))


def fit_shares(gram: np.ndarray, evidence: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The weights (L,) of L distributions that make the CRPS of their mixtures least; see `fit_odds`.

    `evidence` (n, L) is the log-likelihood of what was seen before each result under each: it counts as in an answer.
    """
    grams, log_likelihood = torch.from_numpy(gram), torch.from_numpy(evidence)
    parts = [torch.from_numpy(np.flatnonzero(part == number)) for number in np.unique(part)]

    def mean_log_crps(logits: Tensor) -> Tensor:
        weights = (logits.log_softmax(0) + log_likelihood).softmax(1)
        crps = torch.einsum("na,nab,nb->n", weights, grams, weights)
        means = torch.stack([crps[rows].mean() for rows in parts])
        return means.log().mean() + _ODDS_PENALTY * logits.square().sum()

    (logits,) = _minimise(mean_log_crps, [torch.zeros(gram.shape[1], dtype=torch.float64)])
    return logits.softmax(0).numpy()


def crps_gram(cdfs: np.ndarray, x: np.ndarray, log_ms: np.ndarray) -> np.ndarray:
    """(n, P, P) as of `fit_odds`, from distribution functions (n, P, X) at ascending x (X,) and results (n,), log-ms.

    By the trapezoidal rule.
    """
    over = cdfs - (x >= log_ms[:, None])[:, None]  # (n, P, X)
    weights = np.diff(x, append=x[-1]) / 2 + np.diff(x, prepend=x[0]) / 2
    return np.einsum("nax,nbx,x->nab", over, over, weights, optimize=True)


def _minimise(loss: Callable[..., Tensor], start: Sequence[Tensor]) -> list[Tensor]:
    """Where a smooth function is least, by L-BFGS from a start."""
    parameters = [value.clone().requires_grad_() for value in start]
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*parameters)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return [value.detach() for value in parameters]
