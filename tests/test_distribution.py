"""Every statistic of an RTTDistribution equals what sums over its codes, or many samples, say."""

import numpy as np
import pytest
from scipy import stats

from ping_llm.data.tokenization import RTT_CODES, decode_rtt, encode_rtt, rtt_code_edges_ms
from ping_llm.inference.distribution import RTTDistribution

LAW = stats.lognorm(s=0.4, scale=50.0)


def of_law(law, p_fail=0.1) -> RTTDistribution:
    mass = np.diff(law.cdf(rtt_code_edges_ms()))
    return RTTDistribution(mass / mass.sum() * (1 - p_fail), p_fail)


def test_statistics_equal_those_of_the_law_it_was_made_from():
    d = of_law(LAW)
    x = np.array([5.0, 20.0, 50.0, 77.7, 300.0])
    np.testing.assert_allclose(d.cdf(x), LAW.cdf(x), atol=1e-7)
    np.testing.assert_allclose(d.pdf(x), LAW.pdf(x) * x, rtol=2e-3)
    q = np.array([0.001, 0.05, 0.5, 0.95, 0.999])
    np.testing.assert_allclose(d.quantile(q), LAW.ppf(q), rtol=1e-6)
    assert d.median == pytest.approx(50.0, rel=1e-6)
    assert d.mean == pytest.approx(LAW.mean(), rel=1e-5)


def test_quantile_inverts_cdf_and_skips_codes_without_mass():
    probability = np.zeros(RTT_CODES)
    low, high = encode_rtt(np.array([10.0, 200.0]))
    probability[[low, high]] = 0.25, 0.75
    d = RTTDistribution(probability, 0.0)
    edges = rtt_code_edges_ms()
    assert edges[low] <= d.quantile(0.0) <= d.quantile(0.25) <= edges[low + 1]
    assert edges[high] <= d.quantile(0.2500001) <= d.quantile(1.0) <= edges[high + 1]
    assert d.cdf(100.0) == pytest.approx(0.25)
    q = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(d.cdf(d.quantile(q)), q, atol=1e-9)
    assert d.mean == pytest.approx(0.25 * decode_rtt(low) + 0.75 * decode_rtt(high))


def test_pdf_integrates_to_one_over_log_rtt_and_is_zero_outside():
    d = of_law(LAW)
    edges = rtt_code_edges_ms()
    middle = np.sqrt(edges[:-1] * edges[1:])
    assert (d.pdf(middle) * np.diff(np.log(edges))).sum() == pytest.approx(1.0)
    assert d.pdf(1e-9) == 0 and d.pdf(1e12) == 0


def test_samples_follow_the_distribution_and_the_seed():
    d = of_law(LAW, p_fail=0.2)
    sample = d.sample(20_000, seed=1)
    assert abs((sample < 0).mean() - 0.2) < 0.01
    assert stats.kstest(sample[sample > 0], LAW.cdf).pvalue > 1e-3
    assert (sample == d.sample(20_000, seed=1)).all() and (sample != d.sample(20_000, seed=2)).any()


def test_certain_failure_has_no_rtt():
    d = RTTDistribution(np.zeros(RTT_CODES), 1.0)
    assert (d.sample(5) == -1).all()
    assert d.to_dict()["median_ms"] is None and d.to_dict()["p_fail"] == 1.0
    with pytest.raises(ValueError, match="fails with certainty"):
        d.cdf(5.0)


def test_probabilities_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        RTTDistribution(np.full(RTT_CODES, 1 / RTT_CODES), 0.1)
    with pytest.raises(ValueError, match="65536 finite"):
        RTTDistribution(np.ones(3) / 3, 0.0)


def test_quantile_of_no_share_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        of_law(LAW).quantile(1.5)


def test_plot_writes_a_picture_with_the_truth_beside_it(tmp_path):
    class Truth:
        p_fail, median = 0.05, 52.0
        cdf, quantile = staticmethod(LAW.cdf), staticmethod(LAW.ppf)

    of_law(LAW).plot(tmp_path / "deep" / "rtt.png", "a → b", truth=Truth())
    assert (tmp_path / "deep" / "rtt.png").read_bytes().startswith(b"\x89PNG")
