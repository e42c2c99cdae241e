"""What baselines make of a few pings, worked out by hand; what they may not depend on."""

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
from networks import (
    SMALL_TREES,
    SOURCES,
    euclidean,
    last_query,
    log_low_rank,
    low_rank,
    network,
    ping_table,
    queries_of,
    relative_errors,
)

from ping_llm.eval.baselines import all_baselines
from ping_llm.eval.baselines.coordinates import Vivaldi
from ping_llm.eval.baselines.factors import DMFSGD, LogFactors
from ping_llm.eval.baselines.failure import FailureFeatures, FailureRates
from ping_llm.eval.baselines.history import NO_HISTORY, Backoff
from ping_llm.eval.baselines.neighbours import PrefixNeighbours, weighted_medians
from ping_llm.eval.baselines.simple import Additive
from ping_llm.eval.columns import (
    Measurements,
    Queries,
    QueryView,
    earlier_measurements,
)

HERE, MATE, FAR = "20.0.0.1", "20.0.0.2", "21.0.0.1"
THERE, NEAR, WIDE = "30.0.0.1", "30.0.0.2", "30.0.1.1"


@pytest.mark.parametrize(
    ("known", "level", "expected"),
    [
        ([(HERE, THERE, 5, 8.0), (HERE, THERE, 4, 4.0), (MATE, THERE, 6, 2.0)], 0, [8.0, 4.0]),
        ([(HERE, THERE, 9, 8.0), (HERE, THERE, 10, 4.0), (HERE, THERE, 11, 4.0)], 0, [8.0]),  # strictly earlier than 10
        ([(HERE, THERE, 10, 8.0), (MATE, THERE, 6, 2.0), (HERE, NEAR, 6, 3.0)], 1, [2.0]),
        ([(HERE, NEAR, 6, 3.0), (MATE, NEAR, 7, 4.0), (HERE, WIDE, 8, 6.0)], 2, [3.0]),
        ([(MATE, NEAR, 7, 4.0), (HERE, WIDE, 8, 6.0)], 3, [4.0]),
        ([(HERE, WIDE, 8, 6.0), (HERE, WIDE, 9, -1.0), (FAR, THERE, 9, 9.0)], 4, [6.0]),
        ([(FAR, THERE, 9, 9.0)], NO_HISTORY, []),
    ],
)
def test_a_history_is_of_the_nearest_addresses_that_have_one_before_the_query(known, level, expected):
    train, view = last_query(*known, (HERE, THERE, 10, 1.0))
    history, found = Backoff(train).history(view, 3)
    assert found.tolist() == [level]
    np.testing.assert_allclose(np.exp(history[0, : len(expected)]), expected, rtol=1e-6)
    assert np.isnan(history[0, len(expected) :]).all()


def test_a_ping_of_the_context_that_train_holds_counts_once_in_a_history():
    lines = [(HERE, THERE, 5, 8.0), (HERE, THERE, 6, 4.0), (HERE, THERE, 7, 2.0), (HERE, THERE, 10, 1.0)]
    table = ping_table(*lines)
    view = Queries(table, np.array([3]), np.array([[2, 1, 0]])).view()
    history, _ = Backoff(table.take(slice(2))).history(view, 5)  # train holds the first two
    np.testing.assert_allclose(np.exp(history[0, :3]), [2.0, 4.0, 8.0])
    assert np.isnan(history[0, 3:]).all()


def test_nothing_of_a_history_or_failure_rate_changes_if_what_is_not_earlier_is_taken_from_train():
    table = network(euclidean)
    train = table.of_part("train")
    moment = int(np.sort(train.time_s)[len(train) // 2])
    val = queries_of(table, "val", 400)
    some = np.flatnonzero(train.time_s >= moment)[:300]
    view = Queries(train, some, earlier_measurements(train, some, 10)).view()
    view = replace(view, time_s=np.full(len(view), moment), context_rtt_ms=np.full((len(view), 10), np.nan, np.float32))
    view = replace(view, context_dst_id=np.full((len(view), 10), -1, dtype=np.int32))
    answers = []
    for known in (train, train.take(train.time_s < moment)):
        history, level = Backoff(known).history(view, 20)
        rates = FailureRates(known, val)
        chances = rates.p_fail(view, 4.0, 16.0)
        answers.append((history, level, chances, FailureFeatures(known)(view)))
    assert (answers[0][1] == 0).sum() > 100
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, other)


def test_failure_rates_by_hand():
    """4 pings, 3 failed; of the pair 2 of 2, of the destination 3 of 3, of the source 2 of 3; the last is not earlier."""
    lines = [(HERE, THERE, 1, -1.0), (HERE, THERE, 2, -1.0), (HERE, WIDE, 3, 9.0), (FAR, THERE, 4, -1.0)]
    train, view = last_query(*lines, (HERE, THERE, 10, 9.0), (HERE, THERE, 10, 1.0))
    rates = FailureRates(train, Queries(train, np.arange(5), np.zeros((5, 0), dtype=np.int64)))
    rate = 4 / 6  # (3 + 1) / (4 + 2)
    destination = (3 + (3 + rate) / 4) / 4  # the address shrunk to its /24, that to all, by strength 1
    source = (2 + (2 + rate) / 4) / 4
    odds = [chance / (1 - chance) for chance in (destination, source, rate)]
    joint = odds[0] * odds[1] / odds[2]
    expected = (2 + 2 * joint / (1 + joint)) / 4
    assert rates.p_fail(view, pair_strength=2.0, endpoint_strength=1.0)[0] == pytest.approx(expected)


def test_additive_moves_a_known_source_by_its_context_as_far_as_it_may():
    lines = [(HERE, THERE, 1, 10.0), (HERE, WIDE, 1, 10.0), (FAR, WIDE, 1, 10.0)]
    train, view = last_query(*lines, (HERE, WIDE, 9, 20.0), (HERE, THERE, 10, 1.0), context=(3,))
    learned = Additive(train.take(slice(3)))
    found = [float(learned(view, moves_known=share)[0]) for share in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(found, np.log(10) + np.log(2) / 6 * np.array([0, 0.5, 1]), rtol=1e-6)  # 1 of 1 + SHRINK


def test_a_new_source_starts_from_the_bias_of_its_24():
    train, view = last_query((HERE, THERE, 1, 40.0), (FAR, THERE, 1, 10.0), (MATE, THERE, 10, 1.0))
    learned = Additive(train)
    assert learned.bias_of(view.src_id) == learned.bias_of(train.src_id[:1]) > 0


@pytest.mark.parametrize("kind", [euclidean, low_rank, log_low_rank])
def test_a_context_moves_a_known_source_that_has_moved(kind):
    """All RTTs of three sources double after train: what was learned of them is wrong, their context says how."""
    table = network(kind)
    moved = (table.src_id < 3) & (table.part != 0)
    table = replace(table, rtt_ms=np.where(moved & (table.rtt_ms > 0), 2 * table.rtt_ms, table.rtt_ms))
    queries = queries_of(table, "future", 4_000, other=False)
    context = np.where((queries.context >= 0) & (table.part[queries.context] != 0), queries.context, -1)
    queries = replace(queries, context=context).take(queries.src_id < 3)
    learn = {euclidean: lambda train: Vivaldi(train, 2), low_rank: lambda train: DMFSGD(train, 10, 1e-3)}
    learned = learn.get(kind, lambda train: LogFactors(train, 10, 0.01))(table.of_part("train"))
    errors = [np.median(relative_errors(partial(learned, moves_known=share), queries)) for share in (0.0, 0.5, 1.0)]
    assert errors[2] < 0.8 * errors[0] and errors[1] < errors[0]


def test_prefix_neighbours_answer_a_known_pair_by_its_median_and_weigh_the_rest_by_agreement():
    lines = [(HERE, THERE, 1, 10.0), (HERE, THERE, 2, 30.0), (FAR, THERE, 3, 50.0), (FAR, WIDE, 4, 70.0)]
    mates = [(f"20.0.0.{byte}", THERE, 5, 50.0) for byte in (3, 4, 5)]  # together they would weigh more than the pair
    train, view = last_query(*lines, *mates, (HERE, THERE, 10, 1.0))
    assert np.exp(PrefixNeighbours(train)(view)) == pytest.approx(np.exp((np.log(10) + np.log(30)) / 2))
    train, view = last_query(*lines, (MATE, THERE, 10, 1.0))  # 4^4 · 2^3 of its /24, 4^4 of FAR, 4^2 of WIDE
    assert np.exp(PrefixNeighbours(train)(view)) == pytest.approx(np.exp((np.log(10) + np.log(30)) / 2))


def test_weighted_medians_by_hand():
    values = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [1.0, 2.0, 9.0]])
    weight = np.array([[1.0, 1.0, 1.0], [5.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    np.testing.assert_allclose(weighted_medians(values, weight), [2.0, 3.0, 5.5])


@pytest.mark.slow
def test_no_prediction_depends_on_which_probe_an_address_belongs_to():
    def predicted(table: Measurements) -> dict[str, np.ndarray]:
        train, val = table.of_part("train"), queries_of(table, "val", 300, k=10, other=False)
        view = queries_of(table, "future", 100, k=10, other=False).view()
        found = {}
        for baseline in all_baselines(replace(SMALL_TREES, trees=3, practice_queries=400)):
            baseline.fit(train, val)
            found[baseline.name] = np.column_stack([(one := baseline.predict(view)).distributions.values, one.p_fail])
        return found

    table = network(log_low_rank, repeats=3)
    shuffled = replace(table, probe=np.random.default_rng(5).permutation(SOURCES)[table.probe])
    before, after = predicted(table), predicted(shuffled)
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)


def test_a_view_holds_nothing_that_an_answer_could_be_read_from():
    names = {field.name for field in fields(QueryView)}
    assert names == {"src_id", "dst_id", "time_s", "context_dst_id", "context_time_s", "context_rtt_ms", "addresses"}
    view = queries_of(network(euclidean), "future", 20).view()
    assert not any(isinstance(value, Measurements | Queries) for value in vars(view).values())
    assert all(len(getattr(view, name)) == 20 for name in names - {"addresses"})
    assert (view.context_time_s[view.context_dst_id >= 0] < view.time_s.max()).all()
