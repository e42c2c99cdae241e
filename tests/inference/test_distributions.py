"""A batch says of each distribution what that one says alone, and all keep the identities of their statistics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rtt_statistics import entropy, interval, kl, mode, wasserstein

from ping_llm.data.tokenization import RTT_CODES, rtt_code_edges_ms
from ping_llm.inference.distribution import RTTDistribution

EDGES = rtt_code_edges_ms()


def ragged(count: int, seed: int = 0, dtype=np.float64) -> RTTDistribution:
    """Distributions from nearly continuous to a few spikes, each of a few hundred codes; 0 to 50 % fail."""
    rng = np.random.default_rng(seed)
    codes = np.zeros((count, RTT_CODES))
    for row in codes:
        first, width = rng.integers(RTT_CODES - 1000), rng.integers(1, 1000)
        row[first : first + width] = rng.gamma(10 ** rng.uniform(-2, 1), size=width) + 1e-300
    p_fail = rng.uniform(0, 0.5, count)
    codes *= ((1 - p_fail) / codes.sum(axis=1))[:, None]
    return RTTDistribution(codes.astype(dtype), p_fail, rng.uniform(size=count), 2, np.arange(count))


@pytest.fixture(scope="module")
def batch() -> RTTDistribution:
    """20 distributions: more than are gone through at once."""
    return ragged(20)


@pytest.fixture(scope="module")
def observed(batch) -> np.ndarray:
    return batch.quantile(0.37) * np.linspace(0.9, 1.1, len(batch))


def test_a_batch_says_of_each_distribution_what_it_says_alone(batch, observed):
    q, x = np.linspace(0, 1, 101), np.geomspace(1e-4, 1e7, 101)  # more points than are looked up at once
    other = batch[::-1]
    alone = list(batch)
    assert [single.p_fail for single in alone] == batch.p_fail.tolist()
    for one in (
        lambda d, i: d.quantile(q),
        lambda d, i: d.quantile(q.reshape(1, 101, 1)),
        lambda d, i: d.cdf(x),
        lambda d, i: d.pdf(x),
        lambda d, i: interval(d, 0.8),
        lambda d, i: d.median,
        lambda d, i: d.mean,
        lambda d, i: mode(d),
        lambda d, i: entropy(d),
        lambda d, i: d.log_density(observed if i is None else observed[i]),
        lambda d, i: d.crps(observed if i is None else observed[i]),
        lambda d, i: d.pit(observed if i is None else observed[i]),
        lambda d, i: kl(d, other if i is None else other[i]),
        lambda d, i: wasserstein(d, other if i is None else other[i]),
    ):
        together = one(batch, None)
        np.testing.assert_allclose(together, np.stack([one(single, i) for i, single in enumerate(alone)]), rtol=1e-9)


def test_distributions_that_cannot_answer_are_nan_and_leave_the_others_alone(batch, observed):
    never = RTTDistribution(np.zeros((1, RTT_CODES)), [1.0])
    mixed = RTTDistribution.concatenate([batch[:2], never, batch[2:4]])
    kept = np.array([0, 1, 3, 4])
    observed = np.insert(observed[:4], 2, 7.0)
    with np.errstate(all="raise"):
        answers = {
            "quantile": mixed.quantile([0.0, 0.3, 1.0]),
            "cdf": mixed.cdf([0.0, 5.0, 1e9]),
            "pdf": mixed.pdf([0.0, 5.0, 1e9]),
            "interval": interval(mixed, 0.5),
            "mean": mixed.mean,
            "mode": mode(mixed),
            "crps": mixed.crps(observed),
            "pit": mixed.pit(observed),
            "wasserstein": wasserstein(mixed, mixed[::-1]),
        }
    for name, answer in answers.items():
        assert np.isnan(answer[2]).all(), name
        assert np.isfinite(answer[kept]).all(), name
    assert mixed.log_density(observed)[2] == -np.inf and mixed.log_density(-1)[2] == 0
    np.testing.assert_array_equal(answers["quantile"][kept], batch[:4].quantile([0.0, 0.3, 1.0]))


def test_failed_pings_have_a_log_density_and_no_crps_or_pit(batch):
    observed = np.where(np.arange(len(batch)) % 2, -1.0, batch.median)
    np.testing.assert_allclose(batch.log_density(observed)[1::2], np.log(batch.p_fail[1::2]))
    for score in (
        batch.crps(observed),
        batch.pit(observed),
        batch.pit(observed, np.random.default_rng(0)),
    ):
        assert np.isnan(score[1::2]).all() and np.isfinite(score[::2]).all()


def test_float32_takes_half_the_memory_and_changes_nothing_that_matters(batch, observed):
    half = ragged(20, dtype=np.float32)
    assert half.code_probability.dtype == np.float32
    assert round(half.code_probability[0].nbytes / 1e6, 2) == 0.26
    assert round(batch.code_probability[0].nbytes / 1e6, 2) == 0.52
    np.testing.assert_allclose(half.crps(observed), batch.crps(observed), rtol=1e-7)
    np.testing.assert_allclose(half.mean, batch.mean, rtol=1e-9)
    np.testing.assert_allclose(half.median, batch.median, rtol=1e-9)


def test_distributions_are_taken_apart_and_put_together_without_loss(batch):
    assert len(batch) == 20 and isinstance(batch[3], RTTDistribution)
    again = RTTDistribution.concatenate([batch[i] for i in range(5)])
    again = RTTDistribution.concatenate([again, batch[5:7], batch[[9, 8]]])
    expected = batch[[0, 1, 2, 3, 4, 5, 6, 9, 8]]
    for column in ("code_probability", "p_fail", "total_probability", "forward_passes", "context_measurements"):
        np.testing.assert_array_equal(getattr(again, column), getattr(expected, column))
    assert batch[7].context_measurements == 7 and batch[7].total_probability == batch.total_probability[7]
    with pytest.raises(IndexError):
        batch[20]
    with pytest.raises(ValueError, match="no distributions"):
        RTTDistribution.concatenate([])


def test_no_distributions_have_no_answers():
    none = RTTDistribution(np.zeros((0, RTT_CODES)), np.zeros(0))
    assert none.quantile([0.1, 0.9]).shape == (0, 2) and none.crps(np.zeros(0)).shape == none.mean.shape == (0,)


def test_mixture_of_each_group_is_the_mixture_of_its_distributions(batch):
    weights = np.random.default_rng(1).dirichlet(np.ones(5), size=4)
    weights[2] = [0, 0, 1, 0, 0]
    mixed = batch.mixture(weights.ravel(), np.repeat(np.arange(4), 5))
    assert len(mixed) == 4
    alone = batch[:5].mixture(weights[0])
    np.testing.assert_allclose(mixed.code_probability[0], alone.code_probability, rtol=1e-12)
    np.testing.assert_allclose(mixed.code_probability[2], batch.code_probability[12], rtol=1e-12)
    assert mixed.context_measurements.tolist() == [4, 9, 14, 19]
    with pytest.raises(ValueError, match="20 distributions need as many weights"):
        batch.mixture(np.full(15, 0.2), np.repeat(np.arange(3), 5))


def test_wrong_columns_are_refused_and_the_distribution_is_named(batch):
    codes = batch.code_probability[:3].copy()
    codes[1] *= 0.5
    with pytest.raises(ValueError, match="those of distribution 1 sum to"):
        RTTDistribution(codes, batch.p_fail[:3])
    with pytest.raises(ValueError, match="p_fail must be one number for each of 20 pings"):
        RTTDistribution(batch.code_probability, np.zeros(3))
    with pytest.raises(ValueError, match="p_fail must be one number"):
        RTTDistribution(batch.code_probability[0], batch.p_fail)
    with pytest.raises(ValueError, match="one observed RTT, not"):
        batch.crps(np.ones(3))
    with pytest.raises(ValueError, match="NaN is no RTT"):
        batch.cdf([1.0, np.nan])
    for no_batch in (lambda: len(batch[0]), lambda: batch[0][0]):
        with pytest.raises(TypeError, match="of one ping"):
            no_batch()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_identities_of_any_distributions(seed):
    batch = ragged(3, seed)
    rng = np.random.default_rng(seed)
    q = rng.random(20)
    rtt_ms = batch.quantile(q)
    np.testing.assert_allclose(
        [single.cdf(x) for single, x in zip(batch, rtt_ms, strict=True)],
        np.tile(q, (3, 1)),
        atol=1e-9,
    )
    assert (np.diff(batch.cdf(np.sort(EDGES[rng.integers(RTT_CODES, size=50)])), axis=1) >= -1e-15).all()
    low, high = interval(batch, 0.8).T
    assert (low <= batch.median).all() and (batch.median <= high).all()

    one, other, third = (batch[[i]] for i in range(3))
    distance = wasserstein(one, other)
    assert distance == pytest.approx(wasserstein(other, one), rel=1e-9) and distance > 0
    assert distance <= (wasserstein(one, third) + wasserstein(third, other)) * (1 + 1e-9)
    assert kl(one, other) >= 0 and kl(one, one) == 0 and wasserstein(one, one) == 0
    assert (batch.crps(10 ** rng.uniform(-4, 7, 3)) > 0).all()

    weights = rng.dirichlet(np.ones(3))
    x = EDGES[rng.integers(RTT_CODES, size=20)]
    below = weights * batch.p_answer @ batch.cdf(x)
    np.testing.assert_allclose(batch.mixture(weights).cdf(x), below / (weights @ batch.p_answer), atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_distribution_scores_its_own_samples_best(seed):
    one, other = ragged(2, seed)
    truth = RTTDistribution.concatenate([one, other]).mixture([0.7, 0.3])
    rtt_ms = truth.quantile((np.arange(200) + 0.5) / 200)
    expected = [np.mean([single.crps(x) for x in rtt_ms]) for single in (truth, one, other)]
    assert expected[0] == min(expected)
