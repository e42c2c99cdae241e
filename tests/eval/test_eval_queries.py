"""The queries of PingBench: what is given with them, and that nothing of them depends on an answer."""

from dataclasses import replace

import numpy as np
import pytest

from ping_llm.eval.baselines.base import PointBaseline
from ping_llm.eval.baselines.history import ROLLING_MEDIAN
from ping_llm.eval.baselines.neighbours import PROFILE_KNN
from ping_llm.eval.baselines.simple import ADDITIVE, GLOBAL_MEDIAN
from ping_llm.eval.columns import Measurements
from ping_llm.eval.queries import COUNTS, QUERIES_PER_SOURCE, SplitQueries, choose_rows, draw_splits, draw_val

PARTS = ("train", "val", "test-s1")
SOURCES, DESTINATIONS = 12, 9


def make_table(count: int = 4_000, seed: int = 0) -> Measurements:
    """Random pings of 12 sources to 9 destinations, many in one second; the parts follow each other in time."""
    rng = np.random.default_rng(seed)
    addresses = np.zeros((SOURCES + DESTINATIONS, 16), dtype=np.uint8)
    addresses[:, 10:12], addresses[:, 12], addresses[:, 15] = 255, 30, np.arange(len(addresses))
    src = rng.integers(0, SOURCES, count)
    time_s = np.sort(rng.integers(0, count // 4, count)) + 1_700_000_000
    rtt_ms = 10 * rng.lognormal(0, 0.4, count) * (1 + src)
    rtt_ms[rng.random(count) < 0.1] = -1
    part = np.digitize(np.arange(count) / count, (0.5, 0.7)).astype(np.int8)
    dst = SOURCES + rng.integers(0, DESTINATIONS, count)
    ids = (src.astype(np.int32), dst.astype(np.int32), src.astype(np.int64), time_s)
    return Measurements(*ids, rtt_ms.astype(np.float32), part, addresses, PARTS)


def predict(train, val, view):
    """The distributions and failures that four baselines predict."""
    predictions = []
    for method in (GLOBAL_MEDIAN, ADDITIVE, ROLLING_MEDIAN, PROFILE_KNN):
        baseline = PointBaseline(method)
        baseline.fit(train, val)
        prediction = baseline.predict(view)
        predictions += [prediction.distributions.values, prediction.p_fail]
    return predictions


def assert_same_predictions(before, after):
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_given_is_earlier_of_the_same_source_nested_and_the_latest():
    table = make_table()
    split = SplitQueries.draw(table, "test-s1", 300, seed=1)
    for draw, queries in (("recent", split.recent), ("other", split.other)):
        for row, context in zip(queries.rows, queries.context, strict=True):
            allowed = (table.probe == table.probe[row]) & (table.time_s < table.time_s[row])
            if draw == "other":
                allowed &= table.dst_id != table.dst_id[row]
            given, places = context[context >= 0], np.flatnonzero(allowed)
            assert len(np.unique(given)) == len(given) == min(30, len(places))
            assert allowed[given].all() and (np.diff(table.time_s[given]) <= 0).all()
            assert table.time_s[given].min() >= np.sort(table.time_s[places])[-len(given)]
    cells = {(cell.draw, cell.k): cell.queries for cell in split.cells()}
    assert set(cells) == {("none", 0)} | {(draw, k) for draw in ("recent", "other") for k in COUNTS[1:]}
    for (draw, k), queries in cells.items():
        whole = getattr(split, draw).context if k else split.recent.context
        assert queries.context.shape[1] == k and (queries.context == whole[:, :k]).all()


def test_a_source_has_fifty_queries_at_most_and_all_have_their_turn():
    probe = np.repeat(np.arange(5), (3, 40, 60, 500, 1000))
    rows = choose_rows(probe, np.arange(len(probe)), 10_000, np.random.default_rng(0))
    assert np.bincount(probe[rows]).tolist() == [3, 40, *[QUERIES_PER_SOURCE] * 3]
    fewer = choose_rows(probe, np.arange(len(probe)), 100, np.random.default_rng(0))
    assert (fewer == rows[:100]).all()
    counts = np.bincount(probe[fewer])
    assert counts[0] == 3 and np.ptp(counts[1:]) <= 1


def test_the_same_seed_gives_the_same_queries_and_another_does_not():
    table = make_table()
    one, same, other = (SplitQueries.draw(table, "test-s1", 200, seed) for seed in (3, 3, 4))
    for name in ("recent", "other"):
        assert getattr(one, name).rows.tobytes() == getattr(same, name).rows.tobytes()
        assert getattr(one, name).context.tobytes() == getattr(same, name).context.tobytes()
    assert (one.recent.rows != other.recent.rows).any()


def test_no_answer_of_a_test_part_reaches_a_prediction_but_by_the_context_of_its_query():
    """Test parts that lie between train and val in time, as new pairs and new destinations do: all of their answers may be
    others, and what is fitted, and said without context, stays as it is."""
    table = make_table()
    held_out = table.dst_id % 3 == 0
    table = replace(table, part=np.where(held_out, 3, table.part).astype(np.int8), parts=(*PARTS, "test-s2"))
    tests = np.isin(table.part, [2, 3])
    rtt_ms = table.rtt_ms.copy()
    rtt_ms[tests] = np.random.default_rng(1).permutation(rtt_ms[tests])
    assert (rtt_ms != table.rtt_ms).sum() > 1000
    predictions = []
    for shown in (table, replace(table, rtt_ms=rtt_ms)):
        train, val = shown.of_part("train"), draw_val(shown, 200, seed=0)
        assert np.isin(val.measurements.part, [0, 1]).all() and (val.context >= 0).sum() > 1000
        view = SplitQueries.draw(shown, "test-s2", 200, seed=0).recent.given(0).view()
        predictions.append(predict(train, val, view))
    assert_same_predictions(*predictions)


@pytest.mark.parametrize("k", [0, 5])
def test_the_answers_of_a_test_part_change_no_query_and_no_prediction(k):
    """Those that are given with no query: what is given of the past may well be used."""
    table = make_table()
    split = SplitQueries.draw(table, "test-s1", 200, seed=0)
    hidden = np.setdiff1d(table.rows_of_part("test-s1"), split.recent.context[:, :k])
    assert len(np.intersect1d(hidden, split.recent.rows)) > (50 if k else 199)
    rtt_ms = table.rtt_ms.copy()
    rtt_ms[hidden] = np.random.default_rng(1).permutation(rtt_ms[hidden])
    predictions = []
    for shown in (table, replace(table, rtt_ms=rtt_ms)):
        again = SplitQueries.draw(shown, "test-s1", 200, seed=0)
        assert (again.recent.rows == split.recent.rows).all() and (again.other.context == split.other.context).all()
        train, val = shown.of_part("train"), SplitQueries.draw(shown, "val", 200, seed=0).mixed()
        view = again.recent.given(k).view()
        predictions.append(predict(train, val, view))
    assert_same_predictions(*predictions)


def test_a_split_without_measurements_is_drawn_as_empty_and_none_at_all_is_refused():
    table = make_table()
    table = replace(table, parts=(*PARTS, "test-s5"))
    assert [len(one) for one in draw_splits(table, ("test-s1", "test-s5"), 50, 0)] == [50, 0]
    with pytest.raises(ValueError, match=r"not one query in test-s5; prepare more measurements"):
        draw_splits(table, ("test-s5",), 50, 0)
