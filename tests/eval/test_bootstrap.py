"""Intervals of macro means and ratios, by hand, against a plain loop, and by how often they cover the truth."""

import numpy as np
import pytest

from ping_llm.eval import bootstrap
from ping_llm.eval.bootstrap import LEAST_CLUSTERS, Clusters, Resamples, geometric_mean


def bench(rng, sources, prefixes, queries, spread_src, spread_dst, noise=0.3):
    """Scores of two methods, and the truth: log-normal effects of source, prefix and query; some prefixes are popular."""
    src = np.repeat(np.arange(sources), queries)
    popularity = rng.random(prefixes) ** 2 + 0.05
    dst = rng.choice(prefixes, len(src), p=popularity / popularity.sum())
    u, v = rng.normal(0, spread_src, (2, sources)), rng.normal(0, spread_dst, (2, prefixes))
    shared, e = rng.normal(size=len(src)), rng.normal(0, noise, (2, len(src)))
    one = np.exp(u[0, src] + 0.7 * u[1, src] + v[0, dst] + 0.7 * v[1, dst] + shared + e[0])
    other = np.exp(u[1, src] + v[1, dst] + shared + e[1])
    return src, dst, one, other, np.exp(0.245 * (spread_src**2 + spread_dst**2))  # E exp(N(0, s²)) = exp(s²/2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "prefixes", "queries", "spread_src", "spread_dst", "others"),
    [(30, 30, 20, 0.5, 0.3, 0), (30, 30, 20, 0.1, 0.5, 0), (30, 60, 50, 0.3, 0.3, 0), (30, 30, 20, 0.3, 0.3, 200)],
)
def test_intervals_of_a_bench_of_30_sources_cover_the_truth_95_times_in_100(
    monkeypatch, sources, prefixes, queries, spread_src, spread_dst, others
):
    """Alone, or beside cells of `others` more sources and prefixes that are drawn along."""
    rng, benches = np.random.default_rng(3), 2000
    monkeypatch.setattr(bootstrap, "LEAST_CLUSTERS", 25)  # now and then a prefix has no query
    covered = 0
    for seed in range(benches):
        src, dst, one, other, truth = bench(rng, sources, prefixes, queries, spread_src, spread_dst)
        resamples = Resamples(np.arange(sources + others), np.arange(prefixes + others), seed, draws=200)
        low, high = Clusters(src, dst, resamples).ratio(one, other).interval
        covered += low <= truth <= high
    assert abs(covered / benches - 0.95) <= 0.015


def test_the_macro_mean_weighs_sources_alike_and_ratios_are_of_it():
    src, dst = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 0])
    clusters = Clusters(src, dst, Resamples(src, dst))
    assert clusters.macro_mean(np.array([1.0, 2, 3, 10])) == (2 + 10) / 2
    assert clusters.mean(np.array([1.0, 2, 3, 10])).value == 6
    estimate = clusters.ratio(np.array([1.0, 2, 3, 10]), np.array([2.0, 2, 2, 1]))
    assert estimate.value == pytest.approx(6 / 1.5) and estimate.interval is None


def test_the_draws_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    src, dst, one, other, _ = bench(rng, 40, 35, 5, 0.3, 0.3)
    order = rng.permutation(len(src))
    src, dst, one, other = 3 * src[order] + 7, 100 - dst[order], one[order], other[order]  # ids are any numbers
    resamples = Resamples(np.r_[src, 1], np.r_[dst, 2], seed=1, draws=60)
    clusters = Clusters(src, dst, resamples)
    both = clusters.log_means(np.c_[one, other])
    got = clusters.log_means(one)
    np.testing.assert_allclose(both, np.c_[got, clusters.log_means(other)])
    assert clusters.ratio(one, other, both[:, 0] - both[:, 1]).interval == pytest.approx(
        clusters.ratio(one, other).interval
    )
    assert clusters.mean(one, got) == clusters.mean(one)
    for r in range(60):
        means, weights = [], []
        for source in np.unique(src):
            mine = src == source
            weight = resamples.of_prefixes(dst[mine])[r]
            if weight.sum():
                means.append((weight * one[mine]).sum() / weight.sum())
                weights.append(resamples.of_sources(source)[r])
        assert got[r] == pytest.approx(np.log(np.average(means, weights=weights)))


@pytest.mark.parametrize(("sources", "prefixes", "has"), [(30, 30, True), (29, 40, False), (40, 29, False)])
def test_an_interval_needs_30_sources_and_30_prefixes(sources, prefixes, has):
    assert LEAST_CLUSTERS == 30
    src, dst = (x.ravel() for x in np.meshgrid(np.arange(sources), np.arange(prefixes)))
    scores = np.random.default_rng(0).random((2, len(src)))
    clusters = Clusters(src, dst, Resamples(src, dst))
    for estimate in (clusters.ratio(*scores), clusters.mean(scores[0])):
        assert (estimate.interval is not None) == has
        if has:
            assert estimate.interval[0] < estimate.value < estimate.interval[1]


def test_equal_scores_have_ratio_one_and_a_better_method_wins():
    rng = np.random.default_rng(0)
    src, dst, one, *_ = bench(rng, 60, 60, 30, 0.3, 0.3)
    clusters = Clusters(src, dst, Resamples(src, dst))
    same = clusters.ratio(one, one)
    assert (same.value, same.interval) == (1, (1, 1))
    assert clusters.ratio(one * rng.uniform(0.3, 0.8, len(one)), one).interval[1] < 1
    assert clusters.ratio(one * 1.01, one).interval[1] > 1


def test_a_draw_that_holds_no_query_of_a_cell_is_left_out():
    """All but one source have queries to prefix 0 alone, which one draw in three lacks, and that one is often not drawn."""
    src, dst = np.r_[np.arange(40), np.full(35, 40)], np.r_[np.zeros(40, dtype=int), np.arange(1, 36)]
    one, other = np.random.default_rng(0).lognormal(0, 1, (2, 75))
    clusters = Clusters(src, dst, Resamples(src, dst))
    draws = clusters.log_means(one) - clusters.log_means(other)
    assert 50 < np.isnan(draws).sum() < 300
    assert np.isfinite(clusters.ratio(one, other).interval).all()
    assert np.isfinite(geometric_mean([clusters.ratio(one, other)], [draws], 36).interval).all()


def test_cells_that_share_their_queries_do_not_count_as_independent():
    rng = np.random.default_rng(0)
    src, dst, one, other, _ = bench(rng, 60, 60, 30, 0.3, 0.3)
    clusters = Clusters(src, dst, Resamples(src, dst))
    single, draws = clusters.ratio(one, other), clusters.log_means(one) - clusters.log_means(other)
    nested = geometric_mean([single] * 6, [draws] * 6, 60)
    assert nested.value == pytest.approx(single.value)
    assert np.diff(nested.interval) > 0.9 * np.diff(single.interval)
    assert geometric_mean([single, bootstrap.Estimate(2.0)], [draws, draws], 60).interval is None
    both = geometric_mean([bootstrap.Estimate(0.5), bootstrap.Estimate(4.5)], [], 60)
    assert both.value == pytest.approx(1.5)


def test_degrees_of_freedom_are_satterthwaites_by_hand():
    """Three sources with 2, 1, 1 queries; two prefixes with 3 and 1. The influence u of each query is divided by 3 sources
    and by its source's queries. Squares of sources: (u0 + u1)² + u2² + u3², of prefixes: (u0 + u1 + u2)² + u3²."""
    source, prefix = np.array([0, 0, 1, 2]), np.array([0, 0, 0, 1])
    clusters = Clusters(source, prefix, Resamples(source, prefix))
    u = np.array([0.6, 0.3, -1.2, 0.9]) / (3 * np.array([2, 2, 1, 1]))  # 0.1, 0.05, −0.4, 0.3
    of_sources, of_prefixes = 0.15**2 + 0.4**2 + 0.3**2, 0.25**2 + 0.3**2
    effective = max(1 / (0.75**2 + 0.25**2), 2)  # prefixes that weigh alike: 2, at least
    expected = (of_sources + of_prefixes) ** 2 / (of_sources**2 / 2 + of_prefixes**2 / (effective - 1))
    assert u.tolist() == pytest.approx([0.1, 0.05, -0.4, 0.3])
    assert clusters._degrees_of_freedom(np.array([0.6, 0.3, -1.2, 0.9])) == pytest.approx(expected)


def test_half_the_width_of_an_interval_is_students_quantile_times_the_spread():
    draws = np.log([0.9, 1.0, 1.1, 1.2])
    for degrees, quantile in ((5, 2.5706), (29, 2.0452), (np.inf, 1.9600)):
        estimate = bootstrap.Estimate.of_draws(2.0, draws, degrees)
        assert np.log(estimate.interval[1] / 2.0) == pytest.approx(quantile * draws.std(), rel=1e-4)
        assert np.log(2.0 / estimate.interval[0]) == pytest.approx(quantile * draws.std(), rel=1e-4)


def test_a_geometric_mean_has_one_degree_of_freedom_less_than_its_smallest_cell_has_hosts():
    one, draws = bootstrap.Estimate(1.5, (1.0, 2.0)), np.log([1.4, 1.5, 1.7])
    expected = bootstrap.Estimate.of_draws(1.5, draws, 5)
    assert geometric_mean([one, one], [draws, draws], 6).interval == pytest.approx(expected.interval)


def test_the_interval_of_a_mean_has_the_spread_of_a_mean():
    """Of 400 sources with one query each, to as many prefixes, the mean of log-normal scores spreads by σ √(2 / 400), as the
    draws of sources and of prefixes both count."""
    scores = np.random.default_rng(0).lognormal(0, 0.1, 400)
    ids = np.arange(400)
    low, high = Clusters(ids, ids, Resamples(ids, ids, draws=4000)).mean(scores).interval
    assert np.log(high / low) == pytest.approx(2 * 1.96 * 0.1 * np.sqrt(2 / 400), rel=0.1)
