"""The chances of candidates to be nearest are those of a race of independent pings, and sum to one."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.config import ModelConfig
from ping_llm.inference import rank as ranking
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.model import PingModel
from ping_llm.inference.rank import fastest
from ping_llm.model.gpt import GPT


@pytest.fixture(scope="module")
def model() -> PingModel:
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=128)).eval()
    for parameter in gpt.parameters():  # zero-initialised projections would make every answer alike
        torch.nn.init.normal_(parameter, std=0.3)
    return PingModel(gpt, torch.device("cpu"))


def atoms(*distributions: dict[int, float], codes: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Distributions of some of the first so many codes; what they lack of 1 is failure."""
    codes = np.zeros((len(distributions), codes))
    for row, distribution in zip(codes, distributions, strict=True):
        row[list(distribution)] = list(distribution.values())
    return codes, 1 - codes.sum(axis=1)


def test_two_candidates_by_hand():
    wins, rank = fastest(*atoms({10: 0.5, 20: 0.25}, {20: 0.5, 30: 0.5}))
    # The second wins where the first fails, and half of the ties at 20.
    assert wins == pytest.approx([0.5 + 0.25 * (0.5 + 0.25), 0.25 + 0.25 * 0.25])
    assert rank == pytest.approx([1 + wins[1], 1 + wins[0]])


def test_three_candidates_by_hand():
    wins, _ = fastest(*atoms({10: 0.5}, {10: 0.5, 20: 0.5}, {20: 0.5}))
    # At 10: the first alone ¼, both ¼. Else at 20, where the second is (¼): alone, or shared with the third.
    assert wins == pytest.approx([0.25 + 0.125, 0.25 + 0.125 + 0.25 * 0.75, 0.25 * 0.25 + 0.25 * 0.0])


@pytest.mark.parametrize("n", [2, 8, 9, 300])
def test_equals_share_alike(n):
    wins, rank = fastest(*atoms(*[{5: 0.3, 7: 0.6}] * n))
    assert wins == pytest.approx(np.full(n, (1 - 0.1**n) / n)) and rank == pytest.approx(np.full(n, (n + 1) / 2))


def test_a_certain_winner_ends_the_race():
    wins, rank = fastest(*atoms({1: 1.0}, {2: 1.0}, {1: 1e-30, 2: 0.5}))
    assert wins == pytest.approx([1.0, 0.0, 0.0]) and rank == pytest.approx([1.0, 2.25, 2.75])


@given(st.integers(1, 12), st.integers(0, 2**32))
def test_chances_with_nobody_sum_to_one_and_ranks_to_their_sum(n, seed):
    rng = np.random.default_rng(seed)
    distributions = [
        dict(zip(rng.integers(500, 530, 4).tolist(), rng.dirichlet(np.ones(5))[:4].tolist(), strict=True))
        for _ in range(n)
    ]
    codes, p_fail = atoms(*distributions)
    wins, rank = fastest(codes, p_fail)
    assert wins.sum() + p_fail.prod() == pytest.approx(1, abs=1e-12) and wins.min() >= 0
    assert rank.sum() == pytest.approx(n * (n + 1) / 2) and (rank >= 1 - 1e-12).all() and (rank <= n + 1e-12).all()


def test_chances_are_those_of_simulated_races():
    rng = np.random.default_rng(3)
    n, races = 12, 200_000
    distributions = [
        dict(zip(range(40), (rng.dirichlet(np.full(40, 0.3)) * rng.uniform(0.5, 1)).tolist(), strict=True))
        for _ in range(n)
    ]
    codes, p_fail = atoms(*distributions)
    wins, rank = fastest(codes, p_fail)
    results = np.stack(
        [rng.choice(41, races, p=np.append(row[:40], failed)) for row, failed in zip(codes, p_fail, strict=True)]
    ) + rng.random((n, races))
    first = np.bincount(results.argmin(axis=0)[results.min(axis=0) < 40], minlength=n) / races
    np.testing.assert_allclose(wins, first, atol=4 * np.sqrt(0.25 / races))
    np.testing.assert_allclose(rank, (results.argsort(axis=0).argsort(axis=0) + 1).mean(axis=1), atol=0.05)


def test_rank_of_a_model_is_the_race_of_its_distributions(model):
    """Under each known length of the source by itself: which it is does not change from candidate to candidate."""
    candidates = ["198.51.100.7", "203.0.113.5", "198.51.100.0/24", "192.0.2.77"]
    given_too = {"at": "2026-01-01", "context": [{"src_addr": "192.0.2.1", "dst_addr": "198.51.100.9", "rtt": 12.5}]}
    ranking = model.rank("192.0.2.1", candidates, **given_too)
    lengths = {"none": "none", "/8": 8, "/16": 16, "/24": 24, "all": "all"}
    distributions = {c: model.rtt("192.0.2.1", c, **given_too) for c in candidates}
    expected = np.zeros(len(candidates))
    for name, known in lengths.items():
        own = [model.rtt("192.0.2.1", c, **given_too, src_known=known) for c in candidates]
        codes, p_fail = (
            np.stack([distribution.code_probability for distribution in own]),
            [distribution.p_fail for distribution in own],
        )
        expected += distributions[candidates[0]].src_weights.get(name, 0.0) * fastest(codes, np.array(p_fail))[0]
    expected = dict(zip(candidates, expected, strict=True))
    rows = ranking.table.to_pylist()
    assert [row["dst_addr"] for row in rows] == sorted(candidates, key=lambda c: -expected[c])
    for row in rows:
        distribution = distributions[row["dst_addr"]]
        assert row["p_fastest"] == pytest.approx(expected[row["dst_addr"]], rel=1e-3)
        assert (row["median_ms"], row["p_fail"]) == pytest.approx((distribution.median, distribution.p_fail), rel=1e-3)
    assert sum(row["p_fastest"] for row in rows) + ranking.p_none == pytest.approx(1, abs=1e-6)


def test_two_worlds_that_agree_on_the_winner_leave_no_doubt(model, monkeypatch):
    """Fast in one world, slow in the other, but A always first: a race of the mixed distributions would say 3/4."""
    slow = {"192.0.2.5": (10, 30), "192.0.2.6": (20, 40)}

    def distributions(reader, queries, src_known="auto"):
        for query in queries:
            codes = np.zeros((1, 65_536))
            codes[0, slow[str(query.dst)][query.src.known_bytes == 0]] = 1.0
            yield RTTDistribution(codes, np.zeros(1))

    def worlds(reader, query, src_known):
        return [dataclasses.replace(query, src=query.src.cut(n)) for n in (0, 4)], np.array([0.5, 0.5])

    monkeypatch.setattr(ranking, "distributions", distributions)
    monkeypatch.setattr(ranking, "weighted_variants", worlds)
    rows = model.rank("192.0.2.1", list(slow)).table.to_pylist()
    assert [(row["dst_addr"], row["p_fastest"]) for row in rows] == [("192.0.2.5", 1.0), ("192.0.2.6", 0.0)]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "no candidates to rank; give at least one address"),
        (["192.0.2.5", "192.0.2.6", "192.0.2.5"], "'192.0.2.5' is named twice"),
        (["2001:db8::1", "2001:0db8::1"], "'2001:0db8::1' is named twice"),
        (["192.0.2.5", "mirror.example"], "'mirror.example' is not an IPv4 or IPv6 address"),
        (["192.0.2.5", ""], "candidate 2 is empty"),
        ("192.0.2.5", "must be a list of addresses"),
    ],
)
def test_bad_candidates_are_one_clear_error(model, candidates, message):
    with pytest.raises(ValueError, match=r".") as error:
        model.rank("192.0.2.1", candidates)
    assert message in str(error.value) and "\n" not in str(error.value)
