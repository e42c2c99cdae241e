"""The failure classifier on made-up pings whose chance of failure is known."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ping_llm.eval.baselines.failure import FailureFeatures, FailureRates, FailureTrees, FailureTreeSettings
from ping_llm.eval.columns import Measurements, Queries, earlier_measurements

pytest.importorskip("lightgbm")

SOURCES, DESTINATIONS, COUNT = 60, 40, 24_000
SMALL = FailureTreeSettings(trees=150, leaves=15, rate=0.1, practice_queries=12_000, threads=1)


def chance(kind: str, destination: np.ndarray, hour: np.ndarray) -> np.ndarray:
    """A third of the destinations loses most pings in the evening and few else; or 10 % everywhere."""
    if kind == "nothing":
        return np.full(len(hour), 0.1)
    return np.where((destination % 3 == 0) & (hour >= 16), 0.8, 0.03)


@cache
def pings(kind: str) -> tuple[Measurements, np.ndarray]:
    """Four days of pings, the last in parts val and test, and the chance of failure of each."""
    rng = np.random.default_rng(3)
    source, destination = rng.integers(0, SOURCES, COUNT), rng.integers(0, DESTINATIONS, COUNT)
    time_s = 1_699_920_000 + np.sort(rng.integers(0, 4 * 86_400, COUNT))  # from midnight
    p_fail = chance(kind, destination, time_s % 86_400 / 3600)
    rtt_ms = np.where(rng.random(COUNT) < p_fail, -1, 20)
    late = time_s >= time_s.min() + 3 * 86_400
    part = np.where(late, 1 + rng.integers(0, 2, COUNT), 0)
    packed = np.zeros((SOURCES + DESTINATIONS, 16), dtype=np.uint8)
    packed[:, 10:12], packed[:, 12], packed[:, 13] = 255, 20, np.arange(SOURCES + DESTINATIONS)
    table = Measurements(
        *(source.astype(np.int32), (SOURCES + destination).astype(np.int32), source.astype(np.int64), time_s),
        *(rtt_ms.astype(np.float32), np.zeros(COUNT, dtype=np.uint8), part.astype(np.int8), packed),
        ("train", "val", "test"),
    )
    return table, p_fail


def queries_of(table: Measurements, part: str) -> Queries:
    rows = table.rows_of_part(part)
    return Queries(table, rows, earlier_measurements(table, rows, 30))


def brier(chances: np.ndarray, queries: Queries) -> float:
    return float(np.mean((chances - (queries.rtt_ms < 0)) ** 2))


@cache
def trees(kind: str) -> FailureTrees:
    table, _ = pings(kind)
    return FailureTrees(table.of_part("train"), queries_of(table, "val"), SMALL)


@pytest.mark.parametrize("k", [0, 10])
def test_where_loss_depends_on_the_hour_and_the_destination_trees_beat_smoothed_rates(k):
    table, p_fail = pings("evening")
    queries = queries_of(table, "test").given(k)
    least = brier(p_fail[queries.rows], queries)
    found = brier(trees("evening").p_fail(queries.view()), queries)
    rates = brier(FailureRates(table.of_part("train"), queries_of(table, "val")).p_fail(queries.view()), queries)
    assert found < least + 0.2 * (rates - least)


def test_where_there_is_nothing_to_learn_trees_equal_the_base_rate():
    table, _ = pings("nothing")
    queries = queries_of(table, "test").given(10)
    base = np.full(len(queries), (table.of_part("train").rtt_ms < 0).mean())
    assert brier(trees("nothing").p_fail(queries.view()), queries) == pytest.approx(brier(base, queries), rel=0.01)


def test_a_query_does_not_see_its_own_answer_nor_what_was_measured_later():
    """Queries of train itself, all answers from their second on turned round: the features are the same."""
    table, _ = pings("evening")
    train = table.of_part("train")
    middle = np.sort(train.time_s)[len(train) // 2]
    turned = replace(train, rtt_ms=np.where(train.time_s >= middle, np.where(train.rtt_ms < 0, 20, -1), train.rtt_ms))
    rows = np.flatnonzero(train.time_s == middle)
    assert len(rows)
    found = []
    for known in (train, turned):
        found.append(FailureFeatures(known)(Queries(known, rows, earlier_measurements(known, rows, 30)).view()))
    rate = [np.mean(known.rtt_ms < 0) for known in (train, turned)]
    assert rate[0] != rate[1]
    np.testing.assert_array_equal(found[0], found[1])


def test_an_unfamiliar_source_gets_the_chance_of_the_destination():
    table, _ = pings("evening")
    queries = queries_of(table, "test").given(0)
    view = queries.view()
    new = replace(view, src_id=np.full(len(view), SOURCES - 1, dtype=np.int32))
    train = table.of_part("train")
    method = FailureTrees(train.take(train.src_id != SOURCES - 1), queries_of(table, "val"), SMALL)
    chances = method.p_fail(new)
    evening = (view.dst_id - SOURCES) % 3 == 0
    evening &= view.time_s % 86_400 >= 16 * 3600
    assert chances[evening].mean() > 0.6 > 0.1 > chances[~evening].mean()


@pytest.mark.parametrize("rtt_ms", [-1.0, 20.0])
def test_where_all_pings_end_alike_the_rate_is_all_there_is(rtt_ms):
    table, _ = pings("nothing")
    table = replace(table, rtt_ms=np.full(len(table), rtt_ms, dtype=np.float32))
    chances = FailureTrees(table.of_part("train"), queries_of(table, "val"), SMALL).p_fail(
        queries_of(table, "test").view()
    )
    assert np.all(chances == chances[0]) and abs(chances[0] - (rtt_ms < 0)) < 0.001
