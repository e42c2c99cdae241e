"""The queries of PingBench: what is asked for, what is given with them, and that nothing of them depends on an answer."""

from dataclasses import replace

import numpy as np
import pytest

from ping_llm.data.measurement import KINDS, pack_address
from ping_llm.eval.baselines.base import PointBaseline
from ping_llm.eval.baselines.history import ROLLING_MEDIAN
from ping_llm.eval.baselines.neighbours import PROFILE_KNN
from ping_llm.eval.baselines.simple import ADDITIVE, GLOBAL_MEDIAN
from ping_llm.eval.columns import Measurements, Queries, earlier_measurements
from ping_llm.eval.queries import (
    COUNTS,
    QUERIES_PER_SOURCE,
    Seen,
    SplitQueries,
    choose_rows,
    draw_splits,
    draw_val,
    learned_from,
    mixed_queries,
)

PARTS = ("train", "val-s1", "test-s1")
SOURCES, DESTINATIONS = 12, 9


def make_table(count: int = 4_000, seed: int = 0) -> Measurements:
    """Random pings, and a few replies of targets and hops, of 12 sources to 9 destinations, many in one second; the parts
    follow each other in time. Probe i has the addresses 2i and 2i + 1, and the destinations lie in 5 prefixes."""
    rng = np.random.default_rng(seed)
    addresses = np.zeros((SOURCES + DESTINATIONS, 16), dtype=np.uint8)
    addresses[:, 10:12], addresses[:, 12], addresses[:, 15] = 255, 30, np.arange(len(addresses))
    addresses[:, 14] = np.arange(len(addresses)) // 2
    src = rng.integers(0, SOURCES, count)
    time_s = np.sort(rng.integers(0, count // 4, count)) + 1_700_000_000
    rtt_ms = 10 * rng.lognormal(0, 0.4, count) * (1 + src)
    rtt_ms[rng.random(count) < 0.1] = -1
    part = np.digitize(time_s - time_s[0], (count // 8, count * 7 // 40)).astype(np.int8)
    dst = SOURCES + rng.integers(0, DESTINATIONS, count)
    kind = rng.choice(3, count, p=(0.8, 0.1, 0.1)).astype(np.uint8)
    ids = (src.astype(np.int32), dst.astype(np.int32), src.astype(np.int64) // 2, time_s)
    return Measurements(*ids, rtt_ms.astype(np.float32), kind, part, addresses, PARTS)


def draw(table: Measurements, split: str, count: int, seed: int, family: str = "ping") -> SplitQueries:
    return SplitQueries.draw(table, Seen(learned_from(table)), family, split, count, seed)


def make_measurements(*lines: tuple) -> Measurements:
    """Of (part, source, destination, second[, kind[, probe]]); without a probe, the source's address is its own."""
    texts = sorted({text for line in lines for text in line[1:3]})
    addresses = np.array([list(pack_address(text)) for text in texts], dtype=np.uint8)
    parts = tuple(dict.fromkeys(line[0] for line in lines))
    whole = [(*line, *("ping", -2 - texts.index(line[1]))[len(line) - 4 :]) for line in lines]
    part, src, dst, time_s, kind, probe = zip(*whole, strict=True)
    return Measurements(
        np.array([texts.index(text) for text in src], dtype=np.int32),
        np.array([texts.index(text) for text in dst], dtype=np.int32),
        np.array(probe, dtype=np.int64),
        np.array(time_s, dtype=np.int64),
        np.arange(1, len(lines) + 1, dtype=np.float32),
        np.array([KINDS.index(name) for name in kind], dtype=np.uint8),
        np.array([parts.index(name) for name in part], dtype=np.int8),
        addresses,
        parts,
    )


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


@pytest.mark.parametrize("family", ["ping", "target"])
def test_what_is_given_is_strictly_earlier_of_the_same_address_and_family_nested_and_the_latest(family):
    table = make_table()
    split = draw(table, "test-s1", 300, seed=1, family=family)
    prefix, own = table.addresses[:, 14], table.probe.max() + 1
    host = np.r_[np.arange(SOURCES) // 2, own + np.arange(DESTINATIONS)]
    for name, queries in (("recent", split.recent), ("other", split.other)):
        assert (table.kind[queries.rows] == KINDS.index(family)).all()
        for row, context in zip(queries.rows, queries.context, strict=True):
            allowed = (table.src_id == table.src_id[row]) & (table.time_s < table.time_s[row])
            allowed &= table.kind == table.kind[row]
            if name == "other":
                allowed &= prefix[table.dst_id] != prefix[table.dst_id[row]]
                allowed &= host[table.dst_id] != host[table.dst_id[row]]
            given, places = context[context >= 0], np.flatnonzero(allowed)
            assert len(np.unique(given)) == len(given) == min(30, len(places))
            assert allowed[given].all() and (np.diff(table.time_s[given]) <= 0).all()
            assert not len(given) or table.time_s[given].min() >= np.sort(table.time_s[places])[-len(given)]
    cells = {(cell.draw, cell.k): cell.queries for cell in split.cells()}
    assert set(cells) == {("none", 0)} | {(draw, k) for draw in ("recent", "other") for k in COUNTS[1:]}
    for (draw_name, k), queries in cells.items():
        whole = getattr(split, draw_name).context if k else split.recent.context
        assert queries.context.shape[1] == k and (queries.context == whole[:, :k]).all()


def test_other_destinations_are_outside_the_prefix_and_the_host_of_the_querys():
    """Host 7 has an address in each of two prefixes; the query is to the first."""
    table = make_measurements(
        ("train", "192.0.2.1", "198.51.100.7", 1),  # the destination itself
        ("train", "192.0.2.1", "198.51.100.8", 2),  # its /24
        ("train", "192.0.2.1", "203.0.113.7", 3),  # the same host elsewhere
        ("train", "192.0.2.1", "203.0.113.9", 4),  # another host
        ("train", "192.0.2.1", "2001:db8::9", 5),
        ("train", "192.0.2.1", "203.0.113.9", 6, "target"),
        ("train", "192.0.2.2", "203.0.113.9", 7),  # another source
        ("train", "198.51.100.7", "192.0.2.1", 1, "ping", 7),
        ("train", "203.0.113.7", "192.0.2.1", 1, "hop", 7),
        ("test-s1", "192.0.2.1", "198.51.100.7", 9),
    )
    rows = np.array([9])
    assert earlier_measurements(table, rows, 6).tolist() == [[4, 3, 2, 1, 0, -1]]
    assert earlier_measurements(table, rows, 6, other_destinations=True).tolist() == [[4, 3, -1, -1, -1, -1]]


TRAIN = [
    ("train", "192.0.2.1", "198.51.100.1", 1),
    ("train", "192.0.2.2", "198.51.100.2", 2),
    ("train", "192.0.2.3", "198.51.100.3", 3, "hop"),  # what hops show counts for nothing
]


@pytest.mark.parametrize(
    ("split", "pairs", "eligible"),
    [
        ("test-s1", "11 12 91 19 99", "11"),
        ("val-s1", "11 22 33", "11 22"),
        ("test-s2", "12 21 91 19 99 31 13", "12 21"),
        ("test-s3", "91 92 99", "91 92"),
        ("test-s4", "19 29 99", "19 29"),
        ("val-s5", "99 98", "99 98"),
        ("external", "11 12 99", "11 12 99"),
    ],
)
def test_a_query_is_what_the_name_of_its_split_says_by_address(split, pairs, eligible):
    lines = [(split, f"192.0.2.{src}", f"198.51.100.{dst}", 10 + i) for i, (src, dst) in enumerate(pairs.split())]
    table = make_measurements(*TRAIN, *lines)
    drawn = draw(table, split, 100, seed=0)
    ends = table.addresses[:, 15]
    found = {f"{ends[s]}{ends[d]}" for s, d in zip(drawn.recent.src_id, drawn.recent.dst_id, strict=True)}
    assert found == set(eligible.split())
    facts = drawn.describe()
    assert (facts["measurements"], facts["eligible"], facts["queries"]) == (len(lines), len(found), len(found))
    new = sum(src not in "12" for src, _ in pairs.split())
    assert facts["new_source_share"] == pytest.approx(new / len(lines))
    assert facts["pairs"] == len(found) and facts["sources"] == len({pair[0] for pair in found})
    assert facts["prefixes"] == 1


@pytest.mark.parametrize(
    ("split", "src", "dst", "time_s"),
    [
        ("test-s1", "192.0.2.1", "198.51.100.1", 2),  # in the last second of train
        ("test-s2", "192.0.2.1", "198.51.100.1", 9),  # a pair of train
        ("test-s2", "198.51.100.1", "192.0.2.1", 9),  # its reverse
        ("val-s3", "192.0.2.2", "198.51.100.1", 9),  # a source of train
        ("val-s3", "198.51.100.2", "198.51.100.1", 9),  # a source that is a destination in train
        ("test-s4", "192.0.2.9", "198.51.100.2", 9),  # a destination of train
        ("test-s4", "192.0.2.9", "192.0.2.1", 9),  # a destination that is a source in train
        ("test-s5", "192.0.2.2", "198.51.100.9", 9),
        ("test-s5", "192.0.2.9", "198.51.100.2", 9),
        ("test-s5", "192.0.2.9", "192.0.2.2", 9),
        ("test-s5", "198.51.100.2", "198.51.100.9", 9),
    ],
)
def test_rows_that_break_their_rule_are_refused(split, src, dst, time_s):
    table = make_measurements(*TRAIN, (split, src, dst, time_s))
    with pytest.raises(ValueError, match=f"train holds endpoints or times of {split}: these rows are damaged"):
        draw_splits(table, (split,), 10, 0)


def test_val_is_given_nothing_of_test_and_test_all_that_was_earlier():
    lines = [("test-s2", "192.0.2.1", "198.51.100.2", 5), ("val-s2", "192.0.2.2", "198.51.100.1", 6)]
    lines += [("test-s2", "192.0.2.2", "198.51.100.1", 4)]
    table = make_measurements(*TRAIN, *lines)
    (val,) = (split for split in draw_val(table, 10, 0) if len(split))
    given = val.recent.context[val.recent.context >= 0]
    assert val.recent.measurements.time_s[given].tolist() == [2]
    (test,) = (split for split in draw_splits(table, ("test-s2",), 10, 0) if len(split))
    latest = {
        int(table.time_s[row]): context for row, context in zip(test.recent.rows, test.recent.context, strict=True)
    }
    assert table.time_s[latest[5][:1]].tolist() == [1] and table.time_s[latest[4][:1]].tolist() == [2]


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
    one, same, other = (draw(table, "test-s1", 200, seed) for seed in (3, 3, 4))
    for name in ("recent", "other"):
        assert getattr(one, name).rows.tobytes() == getattr(same, name).rows.tobytes()
        assert getattr(one, name).context.tobytes() == getattr(same, name).context.tobytes()
    assert (one.recent.rows != other.recent.rows).any()


def test_no_answer_of_a_test_part_reaches_a_prediction_but_by_the_context_of_its_query():
    """Test parts that lie between train and val in time, as new pairs and new destinations do: all of their answers may be
    others, and what is fitted, and said without context, stays as it is."""
    table = make_table()
    pair_held_out = (table.dst_id + table.src_id) % 5 == 0
    table = replace(table, part=np.where(pair_held_out, 3, table.part).astype(np.int8), parts=(*PARTS, "test-s2"))
    tests = np.isin(table.part, [2, 3])
    rtt_ms = table.rtt_ms.copy()
    rtt_ms[tests] = np.random.default_rng(1).permutation(rtt_ms[tests])
    assert (rtt_ms != table.rtt_ms).sum() > 1000
    predictions = []
    for shown in (table, replace(table, rtt_ms=rtt_ms)):
        train, val = learned_from(shown), mixed_queries(draw_val(shown, 200, seed=0))
        assert np.isin(val.measurements.part, [0, 1]).all() and (val.context >= 0).sum() > 1000
        view = draw(shown, "test-s2", 200, seed=0).recent.given(0).view()
        assert len(view) > 100
        predictions.append(predict(train, val, view))
    assert_same_predictions(*predictions)


@pytest.mark.parametrize("k", [0, 5])
def test_the_answers_of_a_test_part_change_no_query_and_no_prediction(k):
    """Those that are given with no query: what is given of the past may well be used."""
    table = make_table()
    split = draw(table, "test-s1", 200, seed=0)
    hidden = np.setdiff1d(table.rows_of_part("test-s1"), split.recent.context[:, :k])
    assert len(np.intersect1d(hidden, split.recent.rows)) > (50 if k else 199)
    rtt_ms = table.rtt_ms.copy()
    rtt_ms[hidden] = np.random.default_rng(1).permutation(rtt_ms[hidden])
    predictions = []
    for shown in (table, replace(table, rtt_ms=rtt_ms)):
        again = draw(shown, "test-s1", 200, seed=0)
        assert (again.recent.rows == split.recent.rows).all() and (again.other.context == split.other.context).all()
        train, val = learned_from(shown), mixed_queries(draw_val(shown, 200, seed=0))
        view = again.recent.given(k).view()
        predictions.append(predict(train, val, view))
    assert_same_predictions(*predictions)


def test_learned_from_is_train_without_hops():
    table = make_table()
    rows = np.flatnonzero((table.part == 0) & (table.kind != KINDS.index("hop")))
    assert (learned_from(table).time_s == table.time_s[rows]).all()


def test_mixed_queries_have_the_context_of_either_draw_by_turns():
    split = draw(make_table(), "test-s1", 40, seed=0)
    mixed = split.mixed()
    assert (mixed.context[::2] == split.recent.context[::2]).all()
    assert (mixed.context[1::2] == split.other.context[1::2]).all()
    assert (split.recent.context != split.other.context).any()


def test_queries_of_several_splits_stand_one_after_the_other():
    table = make_table()
    one, other = (draw(table, split, 20, seed=0).mixed() for split in ("val-s1", "test-s1"))
    both = Queries.concatenate([one, other])
    assert both.rows.tolist() == [*one.rows, *other.rows] and both.context[20:].tolist() == other.context.tolist()


def test_a_split_without_measurements_is_drawn_as_empty_and_none_at_all_is_refused():
    table = make_table()
    table = replace(table, parts=(*PARTS, "test-s5"))
    drawn = draw_splits(table, ("test-s1", "test-s5"), 50, 0)
    assert [(one.family, len(one)) for one in drawn] == [("ping", 50), ("ping", 0), ("target", 50), ("target", 0)]
    with pytest.raises(ValueError, match=r"not one query in test-s5; prepare more measurements"):
        draw_splits(table, ("test-s5",), 50, 0)
