"""What is chosen on val, and what is left out: of settings, uses of context, chances of failure, neighbours, practice."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from networks import last_query, ping_table

from ping_llm.eval.baselines import base, failure
from ping_llm.eval.baselines.base import PointMethod, Task
from ping_llm.eval.baselines.failure import FailureChoice, FailureRates
from ping_llm.eval.baselines.neighbours import ProfileNeighbours
from ping_llm.eval.baselines.pairs import find, hide
from ping_llm.eval.columns import Measurements, Queries, pair_keys

HERE, TWIN, OTHER = "20.0.0.1", "21.0.0.1", "22.0.0.1"
THERE, FIRST, SECOND, THIRD = "30.0.0.1", "31.0.0.1", "32.0.0.1", "33.0.0.1"


def no_context(table: Measurements, rows: np.ndarray) -> Queries:
    return Queries(table, rows, np.zeros((len(rows), 0), dtype=np.int64))


@pytest.fixture
def task(monkeypatch) -> Task:
    """Val asks 90 times for a pair of train (kind 0), and 30 times for a new one of known endpoints (kind 2)."""
    monkeypatch.setattr(base, "FailureChoice", lambda train, val: SimpleNamespace(p_fail=None))
    train = [(HERE, THERE, 1, 1.0), (HERE, FIRST, 1, 1.0), (TWIN, FIRST, 1, 1.0)]
    table = ping_table(*train, *[(HERE, THERE, 2, 1.0)] * 90, *[(TWIN, THERE, 2, 1.0)] * 30)
    return Task(table.take(slice(3)), no_context(table, np.arange(3, len(table))))


def off_by(train: Measurements, known_pair: dict[float, float], new_pair: dict[float, float]):
    """A method learned that is off by so many log-ms, by use, on pairs of train and on others."""

    def predict(view, moves_known: float = 0.0):
        is_known = find(np.sort(pair_keys(train.src_id, train.dst_id)), pair_keys(view.src_id, view.dst_id)) >= 0
        return np.where(is_known, known_pair[moves_known], new_pair[moves_known])

    return predict


def test_each_kind_of_query_is_answered_by_the_use_that_errs_least_on_it(task):
    learn = partial(off_by, known_pair={0.0: 0.1, 1.0: 0.5}, new_pair={0.0: 0.5, 1.0: 0.2})
    method = PointMethod("made_up", learn, uses=({"moves_known": 0.0}, {"moves_known": 1.0}))
    chosen = task.choice(method).describe(method)["moves_known"]
    assert chosen[0] == 0.0 and chosen[2] == 1.0
    assert {chosen[kind] for kind in range(10) if kind not in (0, 2)} == {0.0}  # 0.1 · 0.5 < 0.5 · 0.2: best of all
    predicted = task.learned(method)(task.answered_val.view())
    np.testing.assert_array_equal(predicted, np.repeat([0.1, 0.2], [90, 30]))


def test_each_kind_weighs_the_same_in_the_choice_of_a_setting_however_many_its_queries(task):
    """Over queries the first errs by 0.175 and the second by 0.2; over kinds by 0.25 and by 0.15."""
    errors = ({"known_pair": {0.0: 0.1}, "new_pair": {0.0: 0.4}}, {"known_pair": {0.0: 0.25}, "new_pair": {0.0: 0.05}})
    assert task.choice(PointMethod("made_up", off_by, errors)).setting == errors[1]


def test_a_context_adds_to_the_profile_that_train_holds_of_a_source():
    """By both, the twin differs by log 1.5 at three destinations; by the context alone the other would be nearer."""
    twin = [(TWIN, FIRST, 1, 10.0), (TWIN, SECOND, 1, 10.0), (TWIN, THIRD, 1, 30.0), (TWIN, THERE, 1, 50.0)]
    other = [(OTHER, FIRST, 1, 100.0), (OTHER, SECOND, 1, 100.0), (OTHER, THIRD, 1, 20.0), (OTHER, THERE, 1, 90.0)]
    lines = [*twin, *other, (HERE, FIRST, 1, 10.0), (HERE, SECOND, 1, 10.0), (HERE, THIRD, 2, 20.0)]
    table, view = last_query(*lines, (HERE, THERE, 3, 1.0), context=(10,))
    found = ProfileNeighbours(table.take(slice(10)), 1)(view, moves_known=1.0)
    np.testing.assert_allclose(np.exp(found), 50.0, rtol=1e-6)


@pytest.mark.parametrize("moves_known", [0.0, 1.0])
def test_a_known_source_is_no_neighbour_of_its_own(moves_known):
    known = [(HERE, FIRST, 1, 10.0), (HERE, THERE, 1, 10.0), (TWIN, FIRST, 1, 12.0), (TWIN, THERE, 1, 50.0)]
    table, view = last_query(*known, (HERE, FIRST, 2, 10.0), (HERE, THERE, 3, 1.0), context=(4,))
    found = ProfileNeighbours(table.take(slice(4)), 1)(view, moves_known=moves_known)
    np.testing.assert_allclose(np.exp(found), 50.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("of_rates", "of_trees", "chosen"), [(0.5, 0.25, "failure_trees"), (0.25, 0.5, "failure_rates")]
)
def test_the_chance_of_failure_is_taken_from_what_has_less_log_loss_on_val(monkeypatch, of_rates, of_trees, chosen):
    """One ping of four fails: a chance of ¼ costs ln 4 / 4 + 3 ln(4/3) / 4 = 0.5623, one of ½ costs ln 2 = 0.6931."""

    def made_up(name: str, chance: float):
        def p_fail(view) -> np.ndarray:
            return np.full(len(view), chance)

        return lambda *_: SimpleNamespace(name=name, p_fail=p_fail, choices={f"{name}_setting": 1})

    monkeypatch.setattr(failure, "FailureRates", made_up("failure_rates", of_rates))
    monkeypatch.setattr(failure, "FailureTrees", made_up("failure_trees", of_trees))
    table = ping_table(*[(HERE, THERE, second, ms) for second, ms in enumerate((-1.0, 9.0, 9.0, 9.0))])
    val = no_context(table, np.arange(4))
    choice = FailureChoice(table, val)
    assert choice.p_fail(val.view()).tolist() == [0.25] * 4
    losses = {
        f"failure_{name}_log_loss": {0.25: 0.5623, 0.5: 0.6931}[chance]
        for name, chance in (("rates", of_rates), ("trees", of_trees))
    }
    assert choice.choices == {"p_fail": chosen, f"{chosen}_setting": 1} | losses


def test_a_ping_of_the_context_that_train_holds_counts_once_in_failure_rates():
    """Train: 1 of 2 failed, of the destination too; with the one that train lacks 2 of 3 of the source and of the pair."""
    lines = [(HERE, THERE, 5, -1.0), (HERE, THERE, 6, 9.0), (HERE, THERE, 7, -1.0)]
    table, view = last_query(*lines, (HERE, THERE, 10, 1.0), context=(2, 1, 0))
    train = table.take(slice(2))
    rates = FailureRates(train, no_context(train, np.arange(2)))
    source = (2 + 0.5) / (3 + 1)  # shrunk to ½, as are its /24 and the destination: their odds are 1
    expected = (2 + 2 * source) / (3 + 2)
    assert rates.p_fail(view, pair_strength=2.0, endpoint_strength=1.0)[0] == pytest.approx(expected)


def mesh() -> Measurements:
    """12 addresses in six /24, each of which pings all others."""
    texts = [f"20.0.{net}.{host}" for net in range(6) for host in (1, 2)]
    return ping_table(*[(one, other, 1, 9.0) for one in texts for other in texts if one != other])


@pytest.mark.parametrize("shares", [{"sources": 0.4}, {"prefixes": 0.4}])
def test_what_is_hidden_is_gone_as_either_endpoint(shares):
    left = hide(mesh(), 1, **{"pairs": 0, "sources": 0, "prefixes": 0} | shares)
    kept = np.unique(left.src_id)
    assert 2 < len(kept) < 12 and np.array_equal(kept, np.unique(left.dst_id))
    assert len(left) == len(kept) * (len(kept) - 1)  # and nothing else is missing
    if "prefixes" in shares:
        assert (np.bincount(left.prefix[kept], minlength=6) % 2 == 0).all()  # whole /24


def test_a_hidden_pair_is_gone_either_way():
    left = hide(mesh(), 1, pairs=0.4, sources=0, prefixes=0)
    pairs = set(zip(left.src_id.tolist(), left.dst_id.tolist(), strict=True))
    assert 12 < len(pairs) < 132 and pairs == {(other, one) for one, other in pairs}
