"""Scores of distributions against numeric integration, and aggregates against plain counting."""

import numpy as np
import pytest
from conftest import make_row, write_rows
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from score_lines import line_of

from ping_llm.data.measurement import format_address
from ping_llm.eval.columns import Measurements, Queries, earlier_measurements
from ping_llm.eval.distribution import INNER_LEVELS, LEAST_WIDTH, LEVELS, SUPPORT, QuantileDistributions, pool
from ping_llm.eval.metrics import Scores, auc, long_table, score, weighted_quantile
from ping_llm.eval.results import source_means


def normal_distributions(mean, sd) -> QuantileDistributions:
    return QuantileDistributions.from_quantiles(stats.norm.ppf(INNER_LEVELS) * np.c_[sd] + np.c_[mean])


def random_distributions(seed: int, count: int = 3) -> QuantileDistributions:
    rng = np.random.default_rng(seed)
    return QuantileDistributions.from_quantiles(
        rng.normal(3, 2, (count, 1)) + rng.normal(0, 1, (count, len(INNER_LEVELS)))
    )


@given(st.integers(0, 10**6), st.floats(-9, 18))
def test_crps_equals_numeric_integration(seed, y):
    distributions = random_distributions(seed)
    inside = np.clip(y, *SUPPORT)
    grid = np.unique(np.r_[np.linspace(*SUPPORT, 20_001), distributions.values.ravel(), inside])
    middle, width = (grid[1:] + grid[:-1]) / 2, np.diff(grid)
    for i in range(len(distributions)):
        cdf = np.interp(middle, distributions.values[i], LEVELS)
        expected = ((cdf - (middle >= inside)) ** 2 * width).sum()
        assert distributions.crps(np.full(len(distributions), y))[i] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(st.integers(0, 10**6))
def test_density_integrates_to_one_and_quantile_inverts_the_cdf(seed):
    distributions = random_distributions(seed, 1)
    middle = (distributions.values[:, 1:] + distributions.values[:, :-1]) / 2
    density = np.array([np.exp(distributions.log_density(x)) for x in middle.T])[:, 0]
    assert (density * np.diff(distributions.values[0])).sum() == pytest.approx(1)
    levels = np.linspace(0.001, 0.999, 50)
    np.testing.assert_allclose(distributions.cdf(distributions.quantile(levels))[0], levels, atol=1e-9)


@given(st.integers(0, 10**6))
def test_cdf_at_many_places_equals_the_cdf_at_each(seed):
    distributions = random_distributions(seed, 5)
    x = np.random.default_rng(seed).uniform(-8, 16, (5, 40))
    expected = [np.interp(row, values, LEVELS) for row, values in zip(x, distributions.values, strict=True)]
    np.testing.assert_allclose(distributions.cdf(x), expected, atol=1e-12)
    np.testing.assert_allclose(
        distributions.cdf(x), np.stack([distributions.cdf(column) for column in x.T], axis=1), atol=1e-12
    )


def test_distributions_of_normal_quantiles_have_the_scores_of_the_normal_distribution():
    """CRPS of N(0, σ) at z: σ (z (2Φ(z) − 1) + 2φ(z) − 1/√π); linear pieces cost under a hundredth of σ."""
    z = np.linspace(-2.5, 2.5, 21)
    distributions = normal_distributions(np.full(21, 4.0), np.full(21, 0.3))
    exact = 0.3 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - np.pi**-0.5)
    np.testing.assert_allclose(distributions.crps(4 + 0.3 * z), exact, atol=0.003)
    draws = np.random.default_rng(0).normal(4, 0.3, 4000)
    nll = -normal_distributions(np.full(4000, 4.0), np.full(4000, 0.3)).log_density(draws).mean()
    assert nll == pytest.approx(-stats.norm.logpdf(draws, 4, 0.3).mean(), abs=0.02)


def test_every_result_has_a_density_and_repeats_no_infinite_one():
    point = QuantileDistributions.from_quantiles(np.full((3, len(INNER_LEVELS)), np.log(20.0)))
    nll = -point.log_density(np.log([20.0, 1e-9, 1e9]))
    assert nll[0] > np.log(LEAST_WIDTH) - 1e-9
    assert (nll[1:] < 11).all()
    edge = QuantileDistributions.from_quantiles(np.stack([np.full(len(INNER_LEVELS), end) for end in (-50.0, 50.0)]))
    assert (np.diff(edge.values) > 0).all()


def test_pool_has_the_weighted_cdf_of_its_members():
    narrow, wide = normal_distributions([3.0], [0.05]), normal_distributions([3.4], [0.5])
    pooled = pool([narrow, wide], np.array([[0.3, 0.7]]))
    x = np.linspace(2, 5, 200)[None]
    np.testing.assert_allclose(pooled.cdf(x), 0.3 * narrow.cdf(x) + 0.7 * wide.cdf(x), atol=1e-12)
    np.testing.assert_allclose(pooled.cdf(pooled.quantile(INNER_LEVELS)), INNER_LEVELS[None], atol=1e-9)
    y, density = np.log([20.0]), [np.exp(distribution.log_density(np.log([20.0]))) for distribution in (narrow, wide)]
    assert np.exp(pooled.log_density(y)) == pytest.approx(0.3 * density[0] + 0.7 * density[1])


def test_nll_is_of_the_joint_distribution_of_failure_and_rtt():
    distributions = normal_distributions([3.0, 3.0], [0.2, 0.2])
    scores = score(distributions, np.array([0.1, 0.1]), np.array([20.0, -1.0]))
    density = np.exp(distributions.log_density(np.full(2, np.log(20.0))))[0]
    np.testing.assert_allclose(scores.nll_nats, [-np.log(0.9 * density), -np.log(0.1)])
    columns = scores.columns()
    np.testing.assert_allclose(columns["rtt_nll_nats"][0], -np.log(density))
    assert np.isnan([columns[name][1] for name in ("crps_log", "pit", "rtt_nll_nats", "rtt_bits")]).all()
    mass = integrate.quad(
        lambda x: np.exp(distributions.log_density(np.full(2, x)))[0], np.log(20 / 1.0002), np.log(20 * 1.0002)
    )
    assert columns["rtt_bits"][0] == pytest.approx(-np.log2(mass[0]), abs=0.6)  # 20 ms lies in a code 0.04 % wide


def test_aggregates_of_draws_from_the_distribution_itself_are_calibrated():
    rng = np.random.default_rng(1)
    mean = rng.uniform(1, 5, 20_000)
    fail = rng.uniform(0.05, 0.3, 20_000)
    rtt_ms = np.where(rng.random(20_000) < fail, -1.0, np.exp(rng.normal(mean, 0.2)))
    cell = line_of(score(normal_distributions(mean, np.full(20_000, 0.2)), fail, rtt_ms), rng.integers(0, 400, 20_000))
    for percent, share in cell["coverage"].items():
        assert share == pytest.approx(percent / 100, abs=0.015)
        width = 2 * stats.norm.ppf(0.5 + percent / 200) * 0.2
        assert cell["width_log"][percent] == pytest.approx(width, rel=0.01)
    assert cell["pit_ks"] < 0.015
    np.testing.assert_allclose(cell["pit_histogram"], 0.05, atol=0.006)
    assert cell["median_rel_error"] == pytest.approx(0.2 * stats.norm.ppf(0.75), abs=0.005)
    assert cell["fail_rate"] == pytest.approx(fail.mean(), abs=0.01)
    assert cell["fail_brier"] == pytest.approx((fail * (1 - fail)).mean(), abs=0.005)
    assert cell["queries"] == 20_000 and cell["sources"] == 400 and cell["answered"] == (rtt_ms > 0).sum()
    shifted = line_of(score(normal_distributions(mean + 0.3, np.full(20_000, 0.2)), fail, rtt_ms), np.zeros(20_000))
    assert shifted["pit_ks"] > 0.4 and shifted["crps_log"] > 1.5 * cell["crps_log"] and shifted["coverage"][90] < 0.7


def plain_scores(error: np.ndarray) -> Scores:
    """Scores of medians that are off by these shares of an RTT of 10 ms."""
    count = len(error)
    ones = np.ones(count)
    return Scores(10 * ones, 0.1 * ones, error, error, 0.5 * ones, 10 * (1 + error)[:, None] * np.ones((1, 7)))


def test_each_source_weighs_the_same():
    error = np.r_[np.full(98, 0.01), 0.5, 0.5]
    source = np.r_[np.zeros(98), 1, 2]
    cell = line_of(plain_scores(error), source)
    assert cell["crps_log"] == pytest.approx((0.01 + 0.5 + 0.5) / 3)
    assert cell["within"][10] == pytest.approx(1 / 3)
    assert cell["median_rel_error"] == pytest.approx(0.5, abs=0.01)
    means = source_means(long_table({"one": plain_scores(np.r_[error[:99], np.nan])}, source))["one"]
    np.testing.assert_allclose(means["crps_log"], [0.01, 0.5, np.nan])
    np.testing.assert_array_equal(means["source"], [0, 1, 2])


@given(st.integers(0, 10**6))
def test_auc_and_quantile_equal_their_definitions(seed):
    rng = np.random.default_rng(seed)
    chance, happened = rng.integers(0, 5, 30) / 5, rng.random(30) < 0.4
    happened[:2] = True, False
    pairs = chance[happened][:, None] - chance[~happened]
    assert auc(chance, happened, np.ones(30)) == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())
    weights = rng.integers(1, 4, 30).astype(float)
    pairs_weight = np.outer(weights[happened], weights[~happened])
    expected = (((pairs > 0) + (pairs == 0) / 2) * pairs_weight).sum() / pairs_weight.sum()
    assert auc(chance, happened, weights) == pytest.approx(expected)
    values = rng.normal(size=31)
    assert weighted_quantile(values, np.ones(31), 0.5) == pytest.approx(np.median(values))
    assert np.isnan(auc(chance, np.zeros(30, dtype=bool), np.ones(30)))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Measurements:
    parts = {
        "train": [make_row(300, seed=i, probe_id=p) for i, p in enumerate((5, 9, -1))],
        "val": [make_row(50, seed=7)],
    }
    return Measurements.from_rows(write_rows(tmp_path_factory.mktemp("rows"), parts, shards=1), ["train", "val"])


def test_columns_hold_what_the_rows_hold(table):
    assert [len(table.of_part(name)) for name in table.parts] == [900, 50]
    assert len(np.unique(table.addresses, axis=0)) == len(table.addresses)
    row = make_row(300, seed=1, probe_id=9)
    held = table.take(table.probe == 9)
    np.testing.assert_array_equal(held.rtt_ms, row.rtt_ms)
    np.testing.assert_array_equal(held.time_s, row.time_s)
    texts = [format_address(a.tobytes()) for a in table.addresses[held.dst_id[:20]]]
    assert texts == [format_address(a.tobytes()) for a in row.dst_addresses[row.dst[:20]]]
    unknown = table.probe < 0  # grouped by source address: the row used two
    assert unknown.sum() == 300 and len(np.unique(table.probe[unknown])) == len(np.unique(table.src_id[unknown]))
    both = Measurements.concatenate([table.of_part("val"), table.of_part("train")])
    assert len(both) == 950 and len(both.addresses) == len(table.addresses)
    np.testing.assert_array_equal(both.addresses[both.dst_id[50:]], table.addresses[table.dst_id[:900]])
    np.testing.assert_array_equal(both.probe[50:], table.probe[:900])
    assert (both.of_part("val").rtt_ms == table.rtt_ms[900:]).all()


@pytest.mark.parametrize("other", [False, True])
def test_context_is_the_latest_earlier_measurements_of_the_source(table, other):
    rows = np.arange(0, len(table), 7)
    found = earlier_measurements(table, rows, 6, other_destinations=other)
    for row, context in zip(rows, found, strict=True):
        same = (table.src_id == table.src_id[row]) & (table.time_s < table.time_s[row])
        same &= (table.prefix[table.dst_id] != table.prefix[table.dst_id[row]]) | (not other)
        times = np.sort(table.time_s[same])[::-1][:6]
        known = context[context >= 0]
        np.testing.assert_array_equal(table.time_s[known], times)
        assert same[known].all()


def test_a_view_does_not_hold_its_answers(table):
    rows = np.flatnonzero(table.part == 1)
    queries = Queries(table, rows, earlier_measurements(table, rows, 4))
    view = queries.view()
    held = [value for value in vars(view).values() if isinstance(value, np.ndarray)]
    assert not any(np.shares_memory(value, table.rtt_ms) for value in held)
    assert not any(isinstance(value, (Measurements, Queries)) for value in vars(view).values())
    assert queries.given(2).view().context_rtt_ms.shape == (len(rows), 2)
    np.testing.assert_array_equal(queries.given(2).view().context_rtt_ms, view.context_rtt_ms[:, :2])
