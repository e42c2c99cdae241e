"""Every statistic of an RTTDistribution equals what sums over its codes, or many samples, say."""

import numpy as np
import pytest
from rtt_statistics import entropy, interval, kl, mode, wasserstein
from scipy import stats

from ping_llm.data.tokenization import RTT_CODES, decode_rtt, encode_rtt, rtt_code_edges_ms
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.plots import plot_rtt

LOGNORMAL = stats.lognorm(s=0.4, scale=50.0)


def of_distribution(distribution, p_fail=0.1) -> RTTDistribution:
    mass = np.diff(distribution.cdf(rtt_code_edges_ms()))
    return RTTDistribution(mass / mass.sum() * (1 - p_fail), p_fail)


def test_statistics_equal_those_of_the_distribution_it_was_made_from():
    d = of_distribution(LOGNORMAL)
    x = np.array([5.0, 20.0, 50.0, 77.7, 300.0])
    np.testing.assert_allclose(d.cdf(x), LOGNORMAL.cdf(x), atol=1e-7)
    np.testing.assert_allclose(d.pdf(x), LOGNORMAL.pdf(x), rtol=2e-3)
    q = np.array([0.001, 0.05, 0.5, 0.95, 0.999])
    np.testing.assert_allclose(d.quantile(q), LOGNORMAL.ppf(q), rtol=1e-6)
    assert d.median == pytest.approx(50.0, rel=1e-6)
    assert d.mean == pytest.approx(LOGNORMAL.mean(), rel=1e-5)


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
    d = of_distribution(LOGNORMAL)
    edges = rtt_code_edges_ms()
    middle = np.sqrt(edges[:-1] * edges[1:])
    assert (d.pdf(middle) * middle * np.diff(np.log(edges))).sum() == pytest.approx(1.0)
    assert d.pdf(1e-9) == 0 and d.pdf(1e12) == 0


def test_pdf_is_the_derivative_of_the_cdf_per_ms():
    d = of_distribution(LOGNORMAL)
    x = decode_rtt(encode_rtt(np.array([12.0, 50.0, 130.0])))  # within a code, where the density is smooth
    step = 1e-5 * x
    np.testing.assert_allclose(d.pdf(x), (d.cdf(x + step) - d.cdf(x - step)) / (2 * step), rtol=1e-6)
    with pytest.raises(ValueError, match="fails with certainty"):
        RTTDistribution(np.zeros(RTT_CODES), 1.0).pdf(5.0)


def test_samples_follow_the_distribution_and_the_seed():
    d = of_distribution(LOGNORMAL, p_fail=0.2)
    sample = d.sample(20_000, seed=1)
    assert abs((sample < 0).mean() - 0.2) < 0.01
    assert stats.kstest(sample[sample > 0], LOGNORMAL.cdf).pvalue > 1e-3
    assert (sample == d.sample(20_000, seed=1)).all() and (sample != d.sample(20_000, seed=2)).any()


def test_without_a_seed_samples_of_two_distributions_are_independent():
    """Draws of one seed had the same ranks: of two alike, A was never before B, and of two apart always or never."""
    a, b = (of_distribution(LOGNORMAL, p_fail=0.0) for _ in range(2))
    first, second = a.sample(20_000), b.sample(20_000)
    assert (first != a.sample(20_000)).any()
    assert (first < second).mean() == pytest.approx(0.5, abs=0.03)
    assert abs(stats.spearmanr(first, second).statistic) < 0.05


def test_certain_failure_has_no_rtt():
    d = RTTDistribution(np.zeros(RTT_CODES), 1.0)
    assert (d.sample(5) == -1).all()
    assert d.to_dict()["median_ms"] is None and d.to_dict()["p_fail"] == 1.0
    with pytest.raises(ValueError, match="fails with certainty"):
        d.cdf(5.0)


def crps_by_simpson(d: RTTDistribution, rtt_ms: float) -> float:
    """∫ (F − [x ≥ y])² over log-ms; the square is a parabola between code edges and y, where Simpson's rule is exact."""
    y = np.log(rtt_ms)
    edges = np.log(rtt_code_edges_ms())
    x = np.sort(np.append(edges, y))
    cdf = np.concatenate([[0], np.cumsum(d.code_probability) / d.code_probability.sum()])
    left, right = x[:-1], x[1:]
    middle = (left + right) / 2
    above = middle > y
    ends, centre = (
        [(np.interp(v, edges, cdf) - above) ** 2 for v in (left, right)],
        np.interp(middle, edges, cdf) - above,
    )
    return float(((right - left) * (ends[0] + 4 * centre**2 + ends[1]) / 6).sum())


def test_crps_is_that_of_the_normal_distribution_of_log_rtt():
    d = of_distribution(LOGNORMAL)
    for z in (-3.0, -0.5, 0.0, 1.0, 6.0):
        exact = 0.4 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
        assert d.crps(50.0 * np.exp(0.4 * z)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("sharp", [False, True])
def test_crps_is_the_integral_to_the_last_digits(sharp):
    rng = np.random.default_rng(3)
    probability = rng.gamma(0.1, size=RTT_CODES)
    if sharp:
        probability = np.where(np.abs(np.arange(RTT_CODES) - 34_000) < 2, probability, 0)
    d = RTTDistribution(probability / probability.sum() * 0.7, 0.3)
    edges = rtt_code_edges_ms()
    inside_a_code = float(edges[34_000] * 0.4 + edges[34_001] * 0.6)
    for rtt_ms in (edges[0] * 1.0001, 0.5, inside_a_code, edges[33_999], 1e5, edges[-1] * 0.9999):
        assert d.crps(rtt_ms) == pytest.approx(crps_by_simpson(d, rtt_ms), rel=1e-9, abs=1e-11)


def test_crps_of_a_single_code_at_its_middle_is_a_twelfth_of_its_width():
    probability = np.zeros(RTT_CODES)
    probability[30_000] = 1
    low, high = np.log(rtt_code_edges_ms()[30_000:30_002])
    d = RTTDistribution(probability, 0.0)
    assert d.crps(float(np.exp((low + high) / 2))) == pytest.approx((high - low) / 12, rel=1e-6)


def test_log_pdf_is_per_ms_given_an_answer_and_log_density_per_log_ms_of_any_result():
    d = of_distribution(LOGNORMAL, p_fail=0.1)
    for rtt_ms in (5.0, 50.0):
        assert d.log_pdf(rtt_ms) == np.log(d.pdf(rtt_ms)) == pytest.approx(LOGNORMAL.logpdf(rtt_ms), abs=2e-3)
        assert d.log_density(rtt_ms) == pytest.approx(d.log_pdf(rtt_ms) + np.log(rtt_ms) + np.log(0.9), abs=2e-3)
    assert d.log_pdf(1e12) == -np.inf and d.log_pdf([5.0, 50.0]).shape == (2,)


def test_an_rtt_between_two_codes_has_the_density_of_the_one_that_it_is_learned_as():
    codes = np.zeros(RTT_CODES)
    learned = int(encode_rtt(np.array(5.001)))  # codes are 2 µs apart there: 5.000 and 5.002 are as near
    codes[learned] = 1.0
    assert RTTDistribution(codes, 0.0).log_density(5.001) == pytest.approx(-np.log(np.log(5.001 / 4.999)), abs=1e-3)


def test_log_density_counts_the_chance_of_an_answer_and_of_failure():
    d = of_distribution(LOGNORMAL, p_fail=0.1)
    for rtt_ms in (20.0, 50.0, 130.0):
        exact = stats.norm.logpdf(np.log(rtt_ms), np.log(50), 0.4) + np.log(0.9)
        assert d.log_density(rtt_ms) == pytest.approx(exact, abs=2e-3)
    assert d.log_density(-1) == pytest.approx(np.log(0.1))
    assert of_distribution(LOGNORMAL, p_fail=0.0).log_density(-1) == -np.inf
    assert RTTDistribution(np.zeros(RTT_CODES), 1.0).log_density(20.0) == -np.inf


def test_densities_of_all_results_integrate_to_one():
    d = of_distribution(LOGNORMAL, p_fail=0.25)
    edges = rtt_code_edges_ms()
    density = [np.exp(d.log_density(rtt_ms)) for rtt_ms in np.sqrt(edges[30_000:36_000] * edges[30_001:36_001])]
    mass = np.array(density) @ np.diff(np.log(edges))[30_000:36_000]
    assert mass + np.exp(d.log_density(-1)) == pytest.approx(
        1.0 - 0.75 * (1 - np.diff(LOGNORMAL.cdf(edges[[30_000, 36_000]]))[0])
    )


def test_pit_of_samples_is_uniform_with_and_without_rng():
    d = of_distribution(stats.lognorm(s=0.001, scale=50.0), p_fail=0.3)  # eight codes wide
    answers = [rtt_ms for rtt_ms in d.sample(3000, seed=4) if rtt_ms > 0]
    rng = np.random.default_rng(5)
    assert stats.kstest([d.pit(rtt_ms) for rtt_ms in answers], "uniform").pvalue > 1e-3
    reported = decode_rtt(encode_rtt(np.array(answers)))  # all RTTs of a code are the same
    assert stats.kstest([d.pit(rtt_ms) for rtt_ms in reported], "uniform").pvalue < 1e-6
    assert stats.kstest([d.pit(rtt_ms, rng) for rtt_ms in reported], "uniform").pvalue > 1e-3


def test_interval_is_central():
    d = of_distribution(LOGNORMAL)
    assert interval(d, 0.9) == pytest.approx((LOGNORMAL.ppf(0.05), LOGNORMAL.ppf(0.95)), rel=1e-6)
    low, high = interval(d, 0.0)
    assert low == high == d.median
    with pytest.raises(ValueError, match=r"between 0 and 1, not"):
        interval(d, 90)


def test_mode_is_the_code_of_highest_density_per_log_ms():
    assert mode(of_distribution(stats.lognorm(s=0.05, scale=50.0))) == pytest.approx(
        50.0, rel=1e-3
    )  # not at exp(−s²) of it
    probability = np.full(RTT_CODES, 0.5 / RTT_CODES)
    probability[[20_000, 40_000]] += 0.25
    edges = rtt_code_edges_ms()
    widths = np.diff(np.log(edges))
    narrower = 20_000 if widths[20_000] < widths[40_000] else 40_000
    assert edges[narrower] < mode(RTTDistribution(probability, 0.0)) < edges[narrower + 1]


def test_entropy_is_that_of_all_65537_results():
    d = of_distribution(LOGNORMAL, p_fail=0.1)
    assert entropy(d) == pytest.approx(stats.entropy(np.append(d.code_probability, 0.1)))
    uniform = RTTDistribution(np.full(RTT_CODES, 1 / 65_537), 1 / 65_537)
    assert entropy(uniform) == pytest.approx(np.log(65_537)) == pytest.approx(11.09, abs=0.001)
    assert entropy(RTTDistribution(np.zeros(RTT_CODES), 1.0)) == 0


def test_kl_is_that_of_all_results_and_infinite_where_the_other_rules_one_out():
    one, other = of_distribution(LOGNORMAL, p_fail=0.1), of_distribution(stats.lognorm(s=0.5, scale=60.0), p_fail=0.3)
    results = [np.append(d.code_probability, d.p_fail) + 1e-300 for d in (one, other)]
    assert kl(one, other) == pytest.approx(stats.entropy(*results))
    assert kl(one, one) == 0
    assert kl(one, of_distribution(LOGNORMAL, p_fail=0.0)) == np.inf
    assert kl(of_distribution(LOGNORMAL, p_fail=0.0), one) == pytest.approx(-np.log(0.9))


def test_wasserstein_is_that_of_normal_distributions_of_log_rtt():
    base = of_distribution(LOGNORMAL, p_fail=0.1)
    assert wasserstein(base, of_distribution(stats.lognorm(s=0.4, scale=55.0), p_fail=0.5)) == pytest.approx(
        np.log(1.1), rel=1e-6
    )
    wider = of_distribution(
        stats.lognorm(s=0.7, scale=50.0)
    )  # the difference of the distributions changes its sign once
    assert wasserstein(base, wider) == pytest.approx(0.3 * np.sqrt(2 / np.pi), rel=1e-6)


def test_wasserstein_is_that_of_scipy_and_exact_where_the_distributions_cross_within_a_code():
    rng = np.random.default_rng(0)
    middles = np.log(decode_rtt(np.arange(RTT_CODES)))
    ragged = [rng.gamma(0.02, size=RTT_CODES) for _ in range(2)]
    one, other = (RTTDistribution(p / p.sum(), 0.0) for p in ragged)
    by_scipy = stats.wasserstein_distance(middles, middles, one.code_probability, other.code_probability)
    assert wasserstein(one, other) == pytest.approx(by_scipy, abs=5e-4)  # a code is a point there

    around, at = np.zeros((2, RTT_CODES))
    around[[30_000, 30_002]] = 0.5
    at[30_001] = 1
    around, at = RTTDistribution(around, 0.0), RTTDistribution(at, 0.0)
    x = np.linspace(*np.log(rtt_code_edges_ms()[[30_000, 30_003]]), 300_001)
    gap = np.abs(around.cdf(np.exp(x)) - at.cdf(np.exp(x)))
    assert wasserstein(around, at) == pytest.approx(np.trapezoid(gap, x), rel=1e-5)


def test_mixture_weighs_results_so_a_distribution_that_mostly_fails_says_little_of_rtt():
    near, far = of_distribution(LOGNORMAL, p_fail=0.0), of_distribution(stats.lognorm(s=0.1, scale=200.0), p_fail=0.8)
    mixed = RTTDistribution.concatenate([near, far]).mixture([0.25, 0.75])
    assert mixed.p_fail == pytest.approx(0.6)
    x = np.array([30.0, 100.0, 200.0])
    answers = np.array([0.25 * 1.0, 0.75 * 0.2])
    np.testing.assert_allclose(mixed.cdf(x), answers @ np.stack([near.cdf(x), far.cdf(x)]) / answers.sum())
    for weights in ([0.5, 0.6], [1.5, -0.5], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="non-negative and sum to 1"):
            RTTDistribution.concatenate([near, far]).mixture(weights)
    with pytest.raises(ValueError, match="2 distributions need as many weights"):
        RTTDistribution.concatenate([near, far]).mixture([1.0])
    with pytest.raises(ValueError, match="no distributions"):
        RTTDistribution.concatenate([])


def test_mixture_tells_the_passes_of_the_batch_and_the_mean_mass():
    codes = of_distribution(LOGNORMAL, 0.0).code_probability
    distributions = [RTTDistribution(codes, 0.0, mass, 2, context) for mass, context in ((0.9, 5), (0.5, 7))]
    mixed = RTTDistribution.concatenate(distributions).mixture([0.5, 0.5])
    assert (mixed.total_probability, mixed.forward_passes, mixed.context_measurements) == (pytest.approx(0.7), 2, 7)


def test_rtts_outside_the_codes_are_scored_at_the_nearest_edge():
    d = RTTDistribution(np.full(RTT_CODES, 0.9 / RTT_CODES), 0.1)
    edges = rtt_code_edges_ms()
    for beyond, edge in ((0.0, edges[0]), (1e-5, edges[0]), (1e9, edges[-1])):
        assert d.log_density(beyond) == d.log_density(edge * 1.0)
        assert d.crps(beyond) == pytest.approx(d.crps(edge))
        assert d.pit(beyond) == pytest.approx(float(beyond > 1))


@pytest.mark.parametrize("rtt_ms", [np.nan, -0.5, -2.0, np.inf])
def test_what_is_no_rtt_is_refused_by_value(rtt_ms):
    d = of_distribution(LOGNORMAL)
    for score in (d.crps, d.log_density, d.pit):
        with pytest.raises(ValueError, match=f"^{rtt_ms} is no RTT"):
            score(rtt_ms)


def test_scores_of_an_answer_refuse_a_failure_and_a_distribution_that_has_no_answer():
    for score in (of_distribution(LOGNORMAL).crps, of_distribution(LOGNORMAL).pit):
        with pytest.raises(ValueError, match="this one failed"):
            score(-1)
    never = RTTDistribution(np.zeros(RTT_CODES), 1.0)
    for statistic in (lambda: never.median, lambda: never.crps(5.0), lambda: never.cdf(5.0)):
        with pytest.raises(ValueError, match="fails with certainty"):
            statistic()


def test_probabilities_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        RTTDistribution(np.full(RTT_CODES, 1 / RTT_CODES), 0.1)
    with pytest.raises(ValueError, match="65536 finite"):
        RTTDistribution(np.ones(3) / 3, 0.0)
    codes = of_distribution(LOGNORMAL, 0.0).code_probability
    for p_fail, wrong in ((np.nan, codes), (0.0, np.where(codes > 1e-4, np.nan, codes)), (1.5, codes * -0.5)):
        with pytest.raises(ValueError, match="finite, non-negative and sum to 1"):
            RTTDistribution(wrong, p_fail)


def test_quantile_of_no_share_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        of_distribution(LOGNORMAL).quantile(1.5)


def test_plot_writes_a_picture_with_the_truth_beside_it(tmp_path):
    class Truth:
        p_fail, median = 0.05, 52.0
        cdf, quantile = staticmethod(LOGNORMAL.cdf), staticmethod(LOGNORMAL.ppf)

    of_distribution(LOGNORMAL).plot(tmp_path / "deep" / "rtt.png", "a → b", truth=Truth())
    assert (tmp_path / "deep" / "rtt.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_many_distributions_names_each_and_refuses_too_many(tmp_path):
    distributions = {
        f"198.51.{i}.0/24": of_distribution(stats.lognorm(s=0.02 + 0.2 * i, scale=20.0 + i)) for i in range(7)
    }
    distributions["dead"] = RTTDistribution(np.zeros(RTT_CODES), 1.0)
    plot_rtt(distributions, tmp_path / "rtt.svg", "eight")
    drawn = (tmp_path / "rtt.svg").read_text()
    assert all(name in drawn for name in distributions) and "always fails" in drawn
    with pytest.raises(ValueError, match="9 distributions"):
        plot_rtt(distributions | {"ninth": distributions["dead"]}, tmp_path / "no.png", "nine")
    with pytest.raises(ValueError, match="every ping fails"):
        plot_rtt({"dead": distributions["dead"]}, tmp_path / "no.png", "none")
