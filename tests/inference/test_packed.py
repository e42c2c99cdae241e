"""Windows answer for every measurement after its own past, as a prompt for each alone does."""

import dataclasses

import numpy as np
import pytest
import torch
from random_model import random_model
from scipy import stats

from ping_llm.data import tokenization as tk
from ping_llm.inference.calibration import Calibration, Surprise, _fit_tail
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.mixture import distributions
from ping_llm.inference.packed import Foreseen, Windows, foresee
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.score import expected

SRC4, SRC6, AT = "192.0.2.1", "2001:db8::1", 1_700_000_000
SHARES = {"ipv4": {"none": 0.2, "/8": 0.1, "/16": 0.2, "/24": 0.1}, "ipv6": {"none": 0.3, "/32": 0.2}}
CALIBRATION = Calibration(SHARES)
SEQ_LEN = 128


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "field_aware"])
def model(request):
    return random_model(16, SEQ_LEN, True, CALIBRATION, request.param)


def pings(count: int, seed: int, timed: bool = True, one_host: bool = False) -> Context:
    """Of three sources of both families, out of order; a third share the second of another, some lie days apart."""
    rng = np.random.default_rng(seed)
    gaps = rng.choice([0, 1, 240, 90_000], count, p=[0.3, 0.2, 0.4, 0.1])
    rows = [
        {
            "src_addr": str(rng.choice([SRC4, SRC6, "192.0.2.9"])),
            "dst_addr": str(rng.choice(["198.51.100.7", "203.0.113.1", "2001:db8::7"])),
            "rtt": -1.0 if rng.random() < 0.2 else float(rng.lognormal(3)),
            **({"event_time": int(time_s)} if timed else {}),
        }
        for time_s in AT + np.cumsum(gaps)
    ]
    context = Context.parse(rows, one_host)
    return context.take(rng.permutation(count)) if timed else context


def one_by_one(model, windows: Windows, rows: np.ndarray, src_known) -> Foreseen:
    """What `foresee` answers, from a prompt and a whole distribution for each."""
    batches = list(distributions(model, windows.queries(rows), src_known))
    return Foreseen.of_distributions(RTTDistribution.concatenate(batches), windows.measured.rtt_ms[rows])


@pytest.mark.parametrize("one_host", [False, True])
@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize(("src_known", "history"), [("all", 3), ("auto", 2), ("none", 8), (16, 0)])
def test_windows_answer_as_a_prompt_for_each_measurement(model, src_known, history, timed, one_host):
    measured = pings(24, history, timed, one_host)
    windows = Windows(measured, history, SEQ_LEN)
    rows, found = foresee(model, windows, src_known)
    assert sorted(rows) == list(range(24))
    alone = one_by_one(model, windows, rows, src_known)
    for name in ("p_fail", "faster", "same", "slower", "pit", "p_value"):
        np.testing.assert_allclose(getattr(found, name), getattr(alone, name), atol=1e-4, err_msg=name)
    np.testing.assert_allclose(found.nll_nats, alone.nll_nats, atol=1e-4)
    assert np.ptp(found.p_fail) > 0.02 and np.nanstd(found.pit) > 0.02  # a model whose answers differ
    answered = found.rtt_ms >= 0
    total = found.p_fail + found.faster + found.same + found.slower
    np.testing.assert_allclose(total[answered], 1, atol=1e-12)
    assert np.isnan(total[~answered]).all()


def test_what_is_no_byte_after_rtt_start_takes_from_answers():
    unsure = random_model(16, SEQ_LEN, knows_bytes=True)
    with torch.no_grad():
        unsure.gpt.embedding.weight[tk.RTT_START, 0] = 0.0  # so roles have a chance after it, yet none after a byte
    windows = Windows(pings(12, 1), 2, SEQ_LEN)
    rows, found = foresee(unsure, windows, "all")
    alone, answered = one_by_one(unsure, windows, rows, "all"), found.rtt_ms >= 0
    np.testing.assert_allclose(found.p_fail[answered], alone.p_fail[answered], atol=1e-4)
    np.testing.assert_allclose(found.nll_nats[answered], alone.nll_nats[answered], atol=1e-3)
    tokens = build_prompt(windows.queries(rows[answered][:1])[0], SEQ_LEN).tokens
    with torch.no_grad():
        after = unsure.gpt(torch.from_numpy(np.append(tokens, tk.RTT_START))[None])[0, -1].softmax(-1)
    assert after[: tk.BYTE_0].sum() > 0.01  # else it would be the same without


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("history", [0, 1, 3, 50])
def test_each_measurement_is_answered_once_after_at_least_its_history(seed, history):
    measured = pings(60, seed, one_host=seed % 2 == 1)
    windows = Windows(measured, history, SEQ_LEN)
    answered = np.concatenate([windows.order[window.answered] for window in windows.windows])
    assert sorted(answered) == list(range(60))
    for row, query in enumerate(windows.queries(range(60))):
        assert query.src.packed == measured.src[row].tobytes() and query.dst.packed == measured.dst[row].tobytes()
        earlier = measured.time_s < measured.time_s[row]
        if not measured.one_host:
            earlier &= (measured.src == measured.src[row]).all(axis=1)
        last = np.flatnonzero(earlier)[np.argsort(measured.time_s[earlier], kind="stable")]
        given = query.context.rtt_ms
        assert given.tolist() == measured.rtt_ms[last[len(last) - len(given) :]].tolist()  # the last ones, and no other
        prompt = build_prompt(query, SEQ_LEN)
        assert prompt.context_measurements == len(given)  # all of them fit
        if history == 0:
            assert not len(given)
        elif len(given) < min(history, len(last)):  # one more would not have left room
            assert history == 50 or len(given) >= 1
            assert len(prompt.tokens) > SEQ_LEN / 3


def test_a_measurement_of_the_same_second_is_not_seen():
    model = random_model(16, SEQ_LEN)
    second = np.array([0, 1, 2, 2, 2, 3])
    rtt_ms = np.array([5.0, 80.0, 12.0, -1.0, 30.0, 7.0])
    src = np.frombuffer(bytes(10) + b"\xff\xff\xc0\x00\x02\x01", np.uint8)
    measured = Context(np.tile(src, (6, 1)), np.tile(src, (6, 1)), rtt_ms, AT + second)

    def nll(rtt_ms: np.ndarray) -> np.ndarray:
        windows = Windows(dataclasses.replace(measured, rtt_ms=rtt_ms), 8, SEQ_LEN)
        rows, found = foresee(model, windows, "all")
        return found.nll_nats[np.argsort(rows)]

    before = nll(rtt_ms)
    for changed in (2, 3, 4):
        other = rtt_ms.copy()
        other[changed] = 900.0
        moved = np.abs(nll(other) - before) > 1e-9
        assert moved.tolist() == [place == changed or place == 5 for place in range(6)]


def test_more_measurements_of_one_second_than_a_window_holds_have_the_same_past(model):
    time_s = AT + np.array([0, 60, 120] + [180] * 100 + [240])
    src = np.tile(np.frombuffer(bytes(10) + b"\xff\xff\xc0\x00\x02\x01", np.uint8), (104, 1))
    rtt_ms = np.append([5.0, 80.0, 12.0], np.full(101, 30.0))
    for times, past in ((time_s, 2), (np.full(104, AT), 0)):
        windows = Windows(Context(src, src, rtt_ms, times), 2, SEQ_LEN)
        rows, found = foresee(model, windows, "all")
        assert sorted(rows) == list(range(104))
        queries = windows.queries(range(103))
        assert {len(query.context) for query in queries[3:]} <= {past, past + 1}
        np.testing.assert_allclose(found.nll_nats, one_by_one(model, windows, rows, "all").nll_nats, atol=1e-4)


def test_what_was_foreseen_is_read_off_whole_distributions():
    model = random_model(16, SEQ_LEN)
    foreseen = next(distributions(model, Windows(pings(12, 0), 2, SEQ_LEN).queries(range(12)), "all"))
    rtt_ms = np.array([-1.0, 0.0, 1e-4, 0.5, 5.0, 5.001, 80.0, 81.0, 1e3, 1e6, 1e8, -1.0])
    found = Foreseen.of_distributions(foreseen, rtt_ms)
    np.testing.assert_allclose(found.nll_nats, -foreseen.log_density(rtt_ms), rtol=1e-9)
    np.testing.assert_allclose(found.pit, foreseen.pit(rtt_ms), atol=1e-9)


def test_a_p_value_is_twice_the_thinner_tail_and_failure_stands_by_its_probability():
    faster, same, slower = np.array([0.1, 0.9, 0.05, 0.45, np.nan]), np.array([0.02, 0, 0, 0.04, np.nan]), [0] * 4
    p_fail = np.array([0.08, 0.08, 0.9, 0.0, 0.08])
    slower = 1 - p_fail - faster - same
    found = Foreseen(np.array([5.0, 5.0, 5.0, 5.0, -1.0]), p_fail, faster, same, slower)
    # s = 2 · 0.11 / 0.92 is above p_fail, so failure would be more surprising: 0.22 + 0.08. The tail beyond 0.98 is 0.02:
    # s = 2 · 0.02 / 0.92 is below it. Of the third s = 1, of the fourth 0.94; half of a failure's 0.08 counts, and all
    # answers with s below 0.08.
    assert found.p_value == pytest.approx([0.22 + 0.08, 0.04, 0.1 + 0.9, 0.94, 0.08 * 0.92 + 0.04])


def test_p_values_of_what_was_foreseen_rightly_are_uniform():
    rng = np.random.default_rng(1)
    n = 20_000
    p_fail, u = rng.random(n) * 0.3, rng.random(n)  # answers of a continuous distribution at u
    failed = rng.random(n) < p_fail
    faster = np.where(failed, np.nan, u * (1 - p_fail))
    found = Foreseen(np.where(failed, -1.0, 5.0), p_fail, faster, 0 * faster, 1 - p_fail - faster)
    for share in (0.001, 0.01, 0.1, 0.5):
        count = (found.p_value <= share).sum()
        # The half of an atom that counts moves a little of it, either way, beyond chance.
        assert abs(count - n * share) < 3.3 * np.sqrt(n * share) + 0.05 * n * share


def test_the_tail_of_a_generalised_pareto_distribution_is_found_again():
    rng = np.random.default_rng(2)
    for scale, shape in ((1.0, 0.0), (0.6, -0.2), (1.5, 0.2)):
        own = np.exp(-stats.genpareto.rvs(shape, scale=scale, size=200_000, random_state=rng))  # from a threshold of 1
        surprise = Surprise.fit(own)
        assert surprise.count == 200_000
        for share in (0.5, 0.1, 0.01, 0.001):
            at = np.exp(-stats.genpareto.isf(share, shape, scale=scale))
            assert surprise.calibrated(np.array([at]))[0] == pytest.approx(share, rel=0.2)


@pytest.mark.parametrize("excess", [[3.0, 5.0, 9.0], [0.1, 0.1, 0.2, 0.15], [0.5, 6.0], []])
def test_a_tail_of_few_results_is_the_likeliest_given_that_it_is_expected_near_a_right_one(excess):
    """The density of a generalised Pareto distribution at the excesses, times normal densities of log scale (deviation 1.5)
    and shape (0.3), at its largest: no neighbour of what is found is likelier by more than the grid allows."""
    scale, shape = _fit_tail(np.array(excess))

    def height(log_scale: float, shape: float) -> float:
        density = stats.genpareto.logpdf(excess, shape, scale=np.exp(log_scale)).sum()
        return density + stats.norm.logpdf(log_scale, scale=1.5) + stats.norm.logpdf(shape, scale=0.3)

    best = max(height(s, k) for s in np.linspace(-4, 5, 46) for k in np.linspace(-0.5, 1, 16))
    assert height(np.log(scale), shape) > best - 0.01


def test_few_results_leave_p_values_near_what_they_were():
    assert Surprise().calibrated(np.array([0.3])).tolist() == [0.3]
    assert Surprise.fit(np.zeros(0)) == Surprise()
    some = np.array([0.01, 0.1, 0.25, 0.5, 0.75, 1.0])
    for only in (0.02, 0.3, 0.9):  # one result says little
        assert Surprise.fit(np.array([only])).calibrated(some) == pytest.approx(some, rel=0.5)
    # Beyond the end of a tail that has one, what is less surprising still comes later.
    ends = dataclasses.replace(Surprise.fit(np.linspace(0.01, 1, 400)), shape=-0.5)
    assert ends.calibrated(np.array([1e-9, 1e-8])) == pytest.approx([20 * 1e-9 / 420, 20 * 1e-8 / 420])
    own = (np.arange(40) + 0.5) / 40
    calibrated = Surprise.fit(own).calibrated(np.array([0.1, 0.25, 0.75, 1.0]))
    assert calibrated == pytest.approx([0.1, 0.25, 0.75, 1.0], rel=0.1)
    assert (np.diff(Surprise.fit(own).calibrated(np.linspace(0, 1, 999))) >= 0).all()
    assert Surprise.fit(np.zeros(50)).calibrated(np.array([0.0, 0.5])).max() <= 1  # impossible results of val


def test_what_was_expected_is_of_the_same_past_as_the_score(model):
    rows = [{"src_addr": SRC4, "dst_addr": "198.51.100.7", "rtt": 5.0 + i, "event_time": AT + 60 * i} for i in range(5)]
    last, second = expected(model, rows, [4, 1], history=2, src_known="all")
    assert (last["rtt"], second["rtt"]) == (9.0, 6.0)
    distribution = model.rtt(SRC4, "198.51.100.7", AT + 240, rows[:4], "all")
    assert last["q0.5"] == pytest.approx(distribution.median, rel=1e-6)
    assert last["p_fail"] == pytest.approx(distribution.p_fail, rel=1e-6)
    assert expected(model, rows, []) == []
