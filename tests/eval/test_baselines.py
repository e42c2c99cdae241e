"""Baselines on made-up networks whose answers are known: they find what there is to find, and see no answer."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    NOISE,
    SMALL_TREES,
    SOURCES,
    euclidean,
    log_low_rank,
    low_rank,
    network,
    queries_of,
    relative_errors,
)
from score_lines import line_of

from ping_llm.eval.baselines import all_baselines, base
from ping_llm.eval.baselines.base import PointBaseline, PointMethod, evidence
from ping_llm.eval.baselines.coordinates import Vivaldi
from ping_llm.eval.baselines.destinations import DestinationBayes, prefix_ranks
from ping_llm.eval.baselines.factors import DMFSGD, LogFactors
from ping_llm.eval.baselines.failure import FailureRates
from ping_llm.eval.baselines.history import EMA_FAST, LAST_SEEN, ROLLING_MEDIAN
from ping_llm.eval.baselines.neighbours import PrefixNeighbours, ProfileNeighbours
from ping_llm.eval.baselines.pairs import Pairs, find
from ping_llm.eval.baselines.simple import Additive, learn_destination, learn_global
from ping_llm.eval.baselines.stack import best_weights, crps_matrices
from ping_llm.eval.baselines.trees import LightGBM
from ping_llm.eval.columns import (
    Queries,
    log_rtt,
    prefix_ids,
)
from ping_llm.eval.distribution import INNER_LEVELS, QuantileDistributions, pool
from ping_llm.eval.metrics import score


@pytest.mark.parametrize(
    ("kind", "learn", "floors"),
    [
        (euclidean, lambda train: Vivaldi(train, 2), 3),
        (euclidean, lambda train: Vivaldi(train, 8), 3),
        (low_rank, lambda train: DMFSGD(train, 10, 1e-3), 2),
        (log_low_rank, lambda train: LogFactors(train, 10, 0.01), 2),
    ],
)
def test_pairs_never_seen_are_predicted_to_a_few_times_the_noise(kind, learn, floors):
    """The noise floor is the median relative error of the true RTT, 0.674 · 2 %."""
    table = network(kind)
    learned = learn(table.of_part("train"))
    error = np.median(relative_errors(learned, queries_of(table, "new_pair")))
    assert error < floors * 0.674 * NOISE
    assert (
        error < 0.3 * np.median(relative_errors(Additive(table.of_part("train")), queries_of(table, "new_pair"))) + 0.01
    )


@pytest.mark.parametrize(
    ("kind", "learn", "least_error"),
    [
        (euclidean, lambda train: Vivaldi(train, 2), 0.06),
        (low_rank, lambda train: DMFSGD(train, 10, 1e-3), 0.08),
        (log_low_rank, lambda train: LogFactors(train, 10, 0.01), 0.05),
        (low_rank, lambda train: ProfileNeighbours(train, 1), 0.25),
        (low_rank, Additive, 0.25),
    ],
)
def test_new_sources_are_placed_by_their_context(kind, learn, least_error):
    table = network(kind)
    learned, queries = learn(table.of_part("train")), queries_of(table, "new_source")
    errors = [np.median(relative_errors(learned, queries.given(k))) for k in (0, 5, 30)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < least_error


def test_profile_neighbours_find_the_twin():
    table = network(low_rank)
    rtt_ms = table.rtt_ms.copy()
    twin = table.src_id == SOURCES - 1  # a new source, made the twin of source 7
    of_seven = {
        d: np.median(rtt_ms[(table.src_id == 7) & (table.dst_id == d) & (rtt_ms > 0)]) for d in set(table.dst_id)
    }
    rtt_ms[twin] = [of_seven[d] for d in table.dst_id[twin]]
    table = replace(table, rtt_ms=rtt_ms)
    train = table.of_part("train")
    queries = queries_of(table, "new_source")
    queries = queries.take(np.flatnonzero(queries.src_id == SOURCES - 1))
    seven = Pairs.of(train.take(train.src_id == 7))
    queried = find(seven.dst_ids, queries.view().dst_id)
    predicted = ProfileNeighbours(train, 1)(queries.given(10).view())
    assert (queried >= 0).sum() > 20
    np.testing.assert_allclose(predicted[queried >= 0], seven.log_ms[queried[queried >= 0]], rtol=1e-6)


def test_prefix_neighbours_take_the_longest_common_prefixes_first():
    table = network(low_rank)
    train = table.of_part("train")
    queries = queries_of(table, "new_pair", 50)
    predicted = PrefixNeighbours(train, neighbours=20)(queries.view())
    pairs = Pairs.of(train)
    for query, found in zip(queries.view().dst_id, predicted, strict=True):
        same = pairs.log_ms[pairs.dst_ids[pairs.destination] == query]  # all sources share their /8
        assert len(same) >= 20 and same.min() <= found <= same.max()


def test_history_is_train_then_the_context():
    """Against plain loops over each pair's series."""
    table = network(euclidean)
    train, queries = table.of_part("train"), queries_of(table, "future", 200, other=False)
    view, rate = queries.view(), 0.3
    found = np.stack([one.learn(train)(view) for one in (LAST_SEEN, EMA_FAST, ROLLING_MEDIAN)], axis=1)
    answered, checked = table.rtt_ms >= 0, 0
    for row, context, got in zip(queries.rows, queries.context, found, strict=True):
        known = np.union1d(table.rows_of_part("train"), context[context >= 0])
        pair = known[(table.src_id[known] == table.src_id[row]) & (table.dst_id[known] == table.dst_id[row])]
        pair = pair[answered[pair]]
        series = np.log(table.rtt_ms[pair[np.argsort(table.time_s[pair])]].astype(float))
        if not len(series):
            continue
        average = series[0]
        for value in series[1:]:
            average += rate * (value - average)
        np.testing.assert_allclose(got, [series[-1], average, np.median(series[-10:])])
        checked += 1
    assert checked > 150


def test_settings_are_chosen_and_distributions_calibrated_for_pairs_never_seen():
    """A method that remembers pairs, and guesses the rest badly, is not trusted for what it remembers."""

    def learn(train, remembers: bool):
        pairs, fallback = Pairs.of(train), learn_destination(train) if not remembers else learn_global(train)

        def predict(view):
            at = pairs.at(view)
            return np.where(at >= 0, pairs.log_ms[at], fallback(view))

        return predict

    table = network(log_low_rank)
    method = PointMethod("memory", learn, ({"remembers": True}, {"remembers": False}))
    baseline = PointBaseline(method)
    baseline.fit(table.of_part("train"), queries_of(table, "val", 2000))
    assert baseline.choices == {"remembers": False}
    for part in ("new_pair", "future"):
        queries = queries_of(table, part, 1000).given(0)
        prediction = baseline.predict(queries.view())
        cell = line_of(score(prediction.distributions, prediction.p_fail, queries.rtt_ms), queries.src_id)
        assert 0.8 < cell["coverage"][90] < 0.96, part
        assert (cell["width_log"][90] < 0.12) == (part == "future")  # ± 1.64 · 2 % where the pair is known


def test_evidence_tells_what_is_known_of_the_pair():
    table = network(euclidean)
    pairs = Pairs.of(table.of_part("train"))
    kinds = {
        part: evidence(pairs, queries_of(table, part).given(5).view()) for part in ("future", "new_pair", "new_source")
    }
    assert [int(np.median(kind[:, 0])) for kind in kinds.values()] == [0, 2, 4]
    assert set(kinds["future"][:, 1]) <= {1, 2}
    own = queries_of(table, "new_source", other=False)
    assert (evidence(pairs, own.view())[:, 0] == 5).any()  # the very pair is given


def test_failure_rates_are_shrunk_from_the_pair_to_its_ends():
    table = network(euclidean, repeats=12)
    rtt_ms = np.where(table.rtt_ms < 0, 20, table.rtt_ms).copy()
    rng = np.random.default_rng(3)
    rtt_ms[(table.dst_id == SOURCES) & (rng.random(len(table)) < 0.5)] = -1  # a destination that loses half
    measured = set(table.dst_id[(table.part == 0) & (table.src_id == 0)] - SOURCES) - {0}
    silent = min(measured & set(table.dst_id[(table.part == 0) & (table.src_id == 1)] - SOURCES))
    rtt_ms[(table.src_id == 0) & (table.dst_id == SOURCES + silent)] = -1  # a pair that never answers
    table = replace(table, rtt_ms=rtt_ms)
    rates = FailureRates(table.of_part("train"), queries_of(table, "val", 5000))

    def p_fail(source, destination, k: int = 0, failed: int = 0):
        rows = np.flatnonzero(table.src_id == source)[:1]
        context = np.full((1, 10), -1)
        view = Queries(table, rows, context).view()
        rtt_ms = np.where(np.arange(10) < failed, -1.0, np.where(np.arange(10) < k, 20.0, np.nan))
        dst = np.where(np.arange(10) < k, SOURCES + destination, -1)
        late = np.full((1, 10), table.time_s.max() + 1)
        view = replace(
            view,
            time_s=late[:, 0] + 1,
            dst_id=np.array([SOURCES + destination], dtype=np.int32),
            context_dst_id=dst[None],
            context_rtt_ms=rtt_ms[None],
            context_time_s=late,
        )
        return float(rates.p_fail(view)[0])

    assert p_fail(5, 5) < 0.02
    assert 0.4 < np.mean([p_fail(source, 0) for source in range(40)]) < 0.6
    assert p_fail(0, silent) > 0.6 > 0.1 > p_fail(1, silent)
    new = SOURCES - 1
    assert 0.3 < p_fail(new, 0) < 0.7  # an unknown source: the destination's rate
    assert p_fail(new, 5, k=10, failed=10) > 0.5 > 0.1 > p_fail(new, 5, k=10, failed=0)


@pytest.mark.slow
def test_tree_quantiles_are_roughly_calibrated_where_pairs_are_known_and_new():
    table = network(log_low_rank)
    baseline = LightGBM(SMALL_TREES)
    baseline.fit(table.of_part("train"), queries_of(table, "val", 1500))
    for part in ("future", "new_pair", "new_source"):
        queries = queries_of(table, part, 800).given(10)
        prediction = baseline.predict(queries.view())
        cell = line_of(score(prediction.distributions, prediction.p_fail, queries.rtt_ms), queries.src_id)
        assert {"future": 0.8, "new_pair": 0.68, "new_source": 0.68}[part] < cell["coverage"][90] < 0.98, part
        assert 0.3 < cell["coverage"][50] < 0.7, part
        assert cell["median_rel_error"] < {"future": 0.02, "new_pair": 0.06, "new_source": 0.12}[part]


def test_crps_of_a_pool_is_the_quadratic_form_and_the_weights_minimise_it():
    rng = np.random.default_rng(0)
    y = rng.normal(3, 0.3, 300)
    places = rng.normal(3, 0.2, (300, 1)), y[:, None] + rng.normal(0, 0.4, (300, 1)), np.full((300, 1), 5.0)
    spread = np.linspace(-0.4, 0.4, len(INNER_LEVELS))
    distributions = [QuantileDistributions.from_quantiles(place + spread) for place in places]
    matrices = crps_matrices(distributions, y)
    for i, distribution in enumerate(distributions):
        np.testing.assert_allclose(matrices[:, i, i], distribution.crps(y), rtol=1e-9, atol=1e-12)
    weights = np.tile([0.2, 0.5, 0.3], (300, 1))
    pooled = pool(distributions, weights).crps(y)
    np.testing.assert_allclose(np.einsum("qi,qij,qj->q", weights, matrices, weights), pooled, rtol=1e-9)
    matrix = matrices.mean(axis=0)
    best = best_weights(matrix)
    assert best.sum() == pytest.approx(1) and best[2] < 0.01 and (best >= 0).all()
    for other in rng.dirichlet(np.ones(3), 200):
        assert best @ matrix @ best <= other @ matrix @ other + 1e-6


def test_destinations_are_found_by_their_rtt_and_popularity():
    table = network(euclidean)
    bayes = DestinationBayes(table.of_part("train"), queries_of(table, "val"))
    queries = queries_of(table, "future", 400)
    log_p = bayes.log_probability(queries.src_id, queries.rtt_ms)
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1)
    queried = table.dst_id[queries.rows]
    ids = prefix_ids(table.addresses, 32, 128)
    answered = queries.rtt_ms > 0
    mass = np.exp(log_p[:, :-1])
    ranks = prefix_ranks(mass, ids[bayes.destinations], ids[queried])
    assert (ranks[answered] < 5).mean() > 0.75  # by chance 0.125
    assert (ranks[~answered] < 5).mean() < 0.5
    eights = prefix_ids(table.addresses, 8, 16)
    assert (prefix_ranks(mass, eights[bayes.destinations], eights[queried]) == 0).all()  # all lie in 30.0.0.0/8
    by_hand = [
        (row[: len(bayes.destinations)] >= row[np.searchsorted(bayes.destinations, d)]).sum() - 1
        for row, d in zip(log_p, queried, strict=True)
    ]
    np.testing.assert_array_equal(ranks, by_hand)


@cache
def predictions_with_answers_permuted(seed: int | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What every baseline predicts of test queries; all answers that no query is given were permuted (None: left)."""
    table = network(log_low_rank, repeats=4)
    queried = [queries_of(table, part, 60, k=10) for part in ("new_pair", "new_source", "future")]
    rows = np.concatenate([queries.rows for queries in queried])
    known = np.isin(table.part, [table.parts.index(part) for part in ("train", "val")])
    if seed is not None:
        rtt_ms = table.rtt_ms.copy()
        rtt_ms[~known] = np.random.default_rng(seed).permutation(rtt_ms[~known])
        table = replace(table, rtt_ms=rtt_ms)
    context = np.concatenate([queries.context for queries in queried])
    view = Queries(table, rows, np.where(known[context], context, -1)).view()
    train, val = table.of_part("train"), queries_of(table.take(known), "val", 400, k=10)
    answers = {}
    trees = replace(SMALL_TREES, trees=5, practice_queries=400)
    for baseline in all_baselines(trees):
        baseline.fit(train, val)
        prediction = baseline.predict(view)
        answers[baseline.name] = prediction.distributions.values, prediction.p_fail
    return answers


@pytest.mark.slow
@settings(max_examples=1, deadline=None)
@given(st.integers(0, 10**6))
def test_no_baseline_depends_on_the_answers(seed):
    before, after = predictions_with_answers_permuted(None), predictions_with_answers_permuted(seed)
    assert len(before) == 17 and before.keys() == after.keys()
    for name, arrays in before.items():
        for one, other in zip(arrays, after[name], strict=True):
            assert np.array_equal(one, other), name
    assert all(np.isfinite(values).all() for values, _ in before.values())


@pytest.mark.slow
def test_the_stack_is_better_than_each_member_over_all_and_near_the_best_in_each_part(monkeypatch):
    """Where each kind of query has weights of its own: this val has five new sources, which are drawn like those of test."""
    monkeypatch.setattr(base, "LEAST_HOSTS", 5)
    table = network(log_low_rank, repeats=4)
    train, val = table.of_part("train"), queries_of(table, "val", 800, k=10)
    stack = all_baselines(replace(SMALL_TREES, trees=20))[-1]
    stack.fit(train, val)
    crps = {member.name: [] for member in (*stack.members, stack)}
    for part in ("future", "new_pair", "new_source"):
        queries = queries_of(table, part, 500, k=10)
        queries = queries.take(np.flatnonzero(queries.rtt_ms >= 0))
        view = queries.view()
        for member in (*stack.members, stack):
            crps[member.name].append(member.predict(view).distributions.crps(log_rtt(queries.rtt_ms)).mean())
    best = np.min([crps[member.name] for member in stack.members], axis=0)
    assert (np.array(crps["stack"]) < 1.25 * best).all(), crps
    assert np.sum(crps["stack"]) < min(np.sum(crps[member.name]) for member in stack.members), crps
