"""What is fitted to results of val is what makes them likeliest, or their CRPS least."""

import numpy as np
import pytest

from ping_llm.inference.experts import PAST, Past
from ping_llm.training.experts import crps_gram, fit_expert, fit_odds, fit_shares

X = np.linspace(-4, 4, 4001)


def normal_cdf(x, mean, deviation):
    from scipy.stats import norm

    return norm.cdf(x, mean, deviation)


def test_the_gram_of_a_distribution_with_itself_is_its_crps():
    cdf = normal_cdf(X, 0.3, 0.5)
    gram = crps_gram(np.stack([cdf, (X >= 0.1).astype(float)])[None], X, np.array([0.7]))
    z = (0.7 - 0.3) / 0.5
    from scipy.stats import norm

    crps = 0.5 * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))  # Gneiting and Raftery 2007, (21)
    assert gram[0, 0, 0] == pytest.approx(crps, abs=1e-3)
    assert gram[0, 1, 1] == pytest.approx(0.6, abs=2e-3)  # of a point: the absolute error
    mixed = crps_gram((0.25 * cdf + 0.75 * (X >= 0.1))[None, None], X, np.array([0.7]))[0, 0, 0]
    weights = np.array([0.25, 0.75])
    assert weights @ gram[0] @ weights == pytest.approx(mixed, abs=1e-9)


def test_shares_are_those_of_the_distribution_that_results_come_from():
    rng = np.random.default_rng(0)
    first = rng.random(600) < 0.7
    results = np.where(first, rng.normal(-1, 0.3, 600), rng.normal(1, 0.3, 600))
    cdfs = np.stack([normal_cdf(X, mean, 0.3) for mean in (-1, 1, 3)])
    gram = crps_gram(np.tile(cdfs, (600, 1, 1)), X, results)
    part = np.arange(600) % 2
    assert fit_shares(gram, np.zeros((600, 3)), part) == pytest.approx([0.7, 0.3, 0.0], abs=0.06)
    told = np.where(first[:, None], [0.0, -30.0, -30.0], [-30.0, 0.0, -30.0])  # the context says which it is
    assert fit_shares(gram, told, part)[2] < 0.35  # then the shares of the two hardly matter


def test_a_part_of_val_counts_as_much_however_small_its_errors_are():
    """With a share a of the first and b = 1 − a the CRPS is s·(1 + 3b²) in one part and 1 + a² in the other. The sum of
    their logarithms is least where 6b / (1 + 3b²) = 2a / (1 + a²), at a = 0.82, whatever s is; their own sum, with s = 0.01,
    where 0.06b = 2a, at a = 0.03. The penalty draws a little to one half."""
    part = np.arange(60) % 2
    gram = np.where(part[:, None, None] == 0, [[1.0, 1.0], [1.0, 4.0]], [[2.0, 1.0], [1.0, 1.0]])
    for scale in (1.0, 0.01):
        scaled = gram * np.where(part == 0, scale, 1.0)[:, None, None]
        assert fit_shares(scaled, np.zeros((60, 2)), part)[0] == pytest.approx(0.82, abs=0.03)
        nothing = np.zeros((60, 2, 3))
        of_model = np.concatenate([np.concatenate([scaled, nothing[..., :1]], axis=2), nothing[:, :1]], axis=1)
        situation, cut = np.zeros((60, 3)), np.tile([True, False], (60, 1))
        fitted = fit_odds({}, of_model, {}, situation, cut, part)
        assert fitted.weights({}, situation, cut)[:, 0] == pytest.approx([0.82, 0.18, 0], abs=0.03)


def test_kernels_are_as_wide_as_results_lie_from_their_past_and_wider_after_longer():
    rng = np.random.default_rng(1)
    n = 1500
    center, hours = rng.normal(3, 1, n), rng.choice([1.0, 100.0], n)
    width = np.where(hours > 10, 0.2, 0.01)
    log_ms = np.full((n, PAST), np.nan)
    log_ms[:, :4] = center[:, None] + rng.laplace(0, 0.001, (n, 4))
    expert = fit_expert(Past(log_ms, hours), center + rng.laplace(0, width))
    two = Past(np.where(np.arange(PAST) < 4, 3.0, np.nan)[None].repeat(2, 0), np.array([1.0, 100.0]))
    inside = np.diff(expert.cdf(two, np.tile([3 - 0.02, 3 + 0.02], (2, 1))), axis=1)[:, 0]
    assert inside[0] == pytest.approx(1 - np.exp(-2), abs=0.08) and inside[1] == pytest.approx(
        1 - np.exp(-0.1), abs=0.08
    )


def test_recent_results_count_more_where_pings_drift():
    rng = np.random.default_rng(2)
    walk = np.cumsum(rng.normal(0, 0.1, (800, PAST + 1)), axis=1)[:, ::-1] + 3
    still = 3 + rng.normal(0, 0.1, (800, PAST + 1)) + rng.normal(0, 1, (800, 1))
    drifting, steady = (fit_expert(Past(own[:, 1:], np.ones(800)), own[:, 0]).decay for own in (walk, still))
    assert np.dot(drifting, [1, np.log(2)]) > np.dot(steady, [1, np.log(2)]) + 1


def test_the_part_that_answers_better_gets_the_weight_where_it_is_better():
    rng = np.random.default_rng(3)
    n = 900
    result, new = rng.normal(0, 0.2, n), rng.random(n) < 0.5
    # The model is about right of destinations that were met, the first cut of new ones, the expert after many results.
    model = np.where(new, 1.5, 0.3)
    count = rng.choice([0, 1, 12], n)
    log_ms = np.where(np.arange(PAST) < count[:, None], 0.0, np.nan)
    means = np.stack([model, np.where(new, 0.0, 1.5), np.full(n, 2.0), np.where(count > 5, 0.0, 3.0)], axis=1)
    gram = crps_gram(normal_cdf(X, means[:, :, None], 0.2), X, result)
    past = {"pair": Past(log_ms, np.ones(n))}
    situation = np.stack([np.zeros(n), new, np.zeros(n)], axis=1)
    cut = np.stack([new, new], axis=1)
    from ping_llm.inference.experts import Expert

    expert = Expert((-2.0, 0.0), (0.2, 0.3), ((0.0,) * 4,) * 2)
    fitted = fit_odds({"pair": expert}, gram, past, situation, cut, np.arange(n) % 3)
    weights = fitted.weights(past, situation, cut)
    assert weights[1, new & (count == 0)].min() > 0.9 and weights[0, ~new & (count == 0)].min() == 1
    assert weights[3, count == 1].max() < 0.2 and weights[3, ~new & (count == 12)].min() > 0.5
    crps = np.einsum("an,nab,bn->n", weights, gram, weights)
    assert crps.mean() < 1.2 * gram[np.arange(n), np.where(new, 1, 0), np.where(new, 1, 0)].mean()
