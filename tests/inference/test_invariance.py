"""An answer is that of its query: whatever else is queried beside it, however it is computed, by the definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_model import random_model

from ping_llm.config import ModelConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import is_ipv4
from ping_llm.data.times import parse_time
from ping_llm.inference import mixture
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Focus
from ping_llm.inference.familiar import Familiar
from ping_llm.inference.mixture import LEAST_WEIGHT, distributions_under
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Endpoint, Query
from ping_llm.model.gpt import GPT

SHARES = {"none": 0.1, "/8": 0.15, "/16": 0.2, "/24": 0.25, "all": 0.3}
SRC, DST, AT = "192.0.2.1", "198.51.100.7", "2026-01-02T00:01:00Z"
CONTEXT = [
    {"src_addr": SRC, "dst_addr": "198.51.100.9", "rtt": 12.5, "event_time": "2026-01-01T00:00:00Z"},
    {"src_addr": SRC, "dst_addr": "2001:db8::9", "rtt": -1.0, "event_time": "2026-01-01T00:04:00Z"},
    {"src_addr": SRC, "dst_addr": DST, "rtt": 80.0, "event_time": "2026-01-02T00:00:00Z"},
]
UNTIMED = [{name: row[name] for name in ("src_addr", "dst_addr", "rtt")} for row in CONTEXT]
IPV6 = [{"src_addr": "2001:db8::1", "dst_addr": "2001:db8::9", "rtt": 3.0, "event_time": "2026-01-01T00:00:00Z"}]
QUERIES = [
    (SRC, DST, None, None),
    (SRC, DST, AT, CONTEXT),
    (SRC, "198.51.100.8", AT, CONTEXT),
    (SRC, DST, None, UNTIMED),
    (SRC, DST, AT, CONTEXT[:1]),
    ("2001:db8::1", "2001:db8::7", AT, IPV6),
    ("2001:db8::/32", "2001:db8::7", None, None),
    ("192.0.2.0/24", "198.51.0.0/16", None, None),
    ("192.0.2.0/24", "198.51.0.0/16", AT, CONTEXT),
    (SRC, "198.51.100.4/30", AT, None),
    (None, DST, AT, None),
    (SRC, None, None, None),
    (SRC, None, AT, CONTEXT),
]
KNOWN = ("auto", "all", "none", 16)


def random_gpt(seed: int, deviation: float = 0.3, **sizes) -> GPT:
    """Zero-initialised projections would make every answer alike, so every weight is normal."""
    gpt = GPT(ModelConfig(**{"n_layer": 2, "n_embd": 32, "n_head": 2, "seq_len": 128} | sizes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=deviation, generator=generator)
    return gpt


def model_of(gpt: GPT, **fields) -> PingModel:
    calibration = Calibration({"ipv4": SHARES})
    return PingModel(gpt, torch.device("cpu"), **{"calibration": calibration, "least_mass": 0.0} | fields)


@pytest.fixture(scope="module")
def model() -> PingModel:
    return model_of(random_gpt(0))


@pytest.fixture(scope="module")
def exact() -> PingModel:
    """The same in float64."""
    return model_of(random_gpt(0).double())


def queries() -> list[Query]:
    return [Query.parse(src, dst, at, Context.parse(context)) for src, dst, at, context in QUERIES]


@pytest.fixture(scope="module")
def alone(model) -> dict:
    """Each query's own answer, under each of KNOWN."""
    return {known: [model.rtt_many([query], known)[0] for query in queries()] for known in KNOWN}


def assert_same(distribution, other, rel: float):
    np.testing.assert_allclose(distribution.code_probability, other.code_probability, rtol=rel, atol=1e-12)
    assert distribution.p_fail == pytest.approx(other.p_fail, rel=rel)
    assert distribution.total_probability == pytest.approx(other.total_probability, rel=rel)
    assert distribution.context_measurements == other.context_measurements
    assert dict(distribution.src_weights) == pytest.approx(dict(other.src_weights), rel=rel)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    which=st.lists(st.integers(0, len(QUERIES) - 1), min_size=2, max_size=len(QUERIES)),
    known=st.sampled_from(KNOWN),
    chunk=st.sampled_from([3, 64]),
)
def test_an_answer_does_not_depend_on_what_is_queried_beside_it_or_in_which_order(model, alone, which, known, chunk):
    every = queries()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "CHUNK", chunk)
        together = model.rtt_many([every[i] for i in which], known)
    for i, distribution in zip(which, together, strict=True):
        assert_same(distribution, alone[known][i], rel=1e-4)


def test_all_queries_at_once_get_the_answers_they_get_alone(model, alone):
    for known in KNOWN:
        for distribution, own in zip(model.rtt_many(queries(), known), alone[known], strict=True):
            assert_same(distribution, own, rel=1e-4)


@settings(max_examples=6, deadline=None)
@given(st.floats(1e-6, 0.3), st.sampled_from(KNOWN))
def test_no_event_is_off_by_more_than_the_mass_that_was_not_looked_into(exact, least_mass, known):
    some = [query for query in queries() if query.dst is None or not query.dst.extra_bits]
    (distributions,) = dataclasses.replace(exact, least_mass=least_mass).distributions(some, known)
    (full,) = exact.distributions(some, known)
    assert (
        total_variation(distributions, full) <= distributions.unresolved + 1e-12
    ).all() and not full.unresolved.any()
    assert distributions.unresolved.max() > 0 or least_mass < 1e-3  # so that it has been tried


def test_an_rtt_that_was_computed_to_byte_1_is_uniform_within_it(exact):
    left = next(dataclasses.replace(exact, least_mass=0.02).distributions([Query.parse(SRC, DST)], "all"))
    codes, full = (
        of.code_probability.reshape(256, 256)
        for of in (left, next(exact.distributions([Query.parse(SRC, DST)], "all")))
    )
    not_followed = np.ptp(codes, axis=1) == 0
    assert not_followed.any() and codes[not_followed].sum() == pytest.approx(left.unresolved[0], rel=1e-5)
    # Bytes 1 keep their mass, but for what is no byte after them.
    assert codes.sum(axis=1)[not_followed] == pytest.approx(full.sum(axis=1)[not_followed], rel=0.2)


def total_variation(distributions: RTTDistribution, others: RTTDistribution) -> np.ndarray:
    """The largest difference of the probability of any event, (B,)."""
    codes = np.abs(distributions.code_probability - others.code_probability).sum(axis=1)
    return (codes + np.abs(distributions.p_fail - others.p_fail)) / 2


def results(gpt: GPT, tokens: list[int]) -> tuple[np.ndarray, float]:
    """P of each answer (256, 256) and of FAILED after `tokens`, by the tokens' own probabilities: no cache, no mask."""
    byte_1 = torch.arange(tk.BYTE_0, tk.VOCAB_SIZE)[:, None]
    lines = torch.cat([torch.tensor(tokens).expand(256, -1), torch.full((256, 1), tk.RTT_START), byte_1], 1)
    with torch.no_grad():
        p = gpt(lines).double().softmax(-1)[:, -3:]
    bytes_ = slice(tk.BYTE_0, tk.VOCAB_SIZE)
    return p[0, 0, tk.RTT_START].item() * (p[0, 1, bytes_, None] * p[:, 2, bytes_]).numpy(), p[0, 0, tk.FAILED].item()


def address(role_ipv4: int, text: str, known_bytes: int = 16) -> list[int]:
    """Role and bytes, by hand."""
    packed = np.frombuffer(Endpoint.parse(text).packed, np.uint8)
    ipv4 = bool(is_ipv4(packed[None])[0])
    known = packed[12 if ipv4 else 0 :][:known_bytes]
    return [role_ipv4 + (not ipv4), *(tk.BYTE_0 + int(byte) for byte in known)]


def timestamp(text: str, before: str | None) -> list[int]:
    seconds = parse_time(text) - (parse_time(before) if before else 0)
    role, width = (tk.TIMESTAMP_ABS, 8) if before is None else (tk.TIMESTAMP_DELTA1, 1)
    role, width = (tk.TIMESTAMP_DELTA4, 4) if before and seconds > 255 else (role, width)
    return [role, *(tk.BYTE_0 + byte for byte in seconds.to_bytes(width, "big"))]


def context_tokens(context: list[dict], known_share: float = 1.0) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of measurements in the order src, dst, time, result, and of each result: its first token and its end."""
    tokens, places, before = [], [], None
    for row in context:
        tokens += [tk.MEASUREMENT_START, *address(tk.SRC_IPV4, row["src_addr"], int(known_share * 4))]
        tokens += address(tk.DST_IPV4, row["dst_addr"])
        if "event_time" in row:
            tokens += timestamp(row["event_time"], before)
            before = row["event_time"]
        code = int(tk.encode_rtt(row["rtt"])) if row["rtt"] >= 0 else None
        places.append((len(tokens), len(tokens) + (1 if code is None else 3)))
        tokens += [tk.FAILED] if code is None else [tk.RTT_START, *(tk.BYTE_0 + b for b in code.to_bytes(2, "big"))]
    return tokens, places


def evidence(gpt: GPT, context: list[dict], known_share: float) -> float:
    """log P of the results of a context, to byte 1: each from its own pass over what stands before it."""
    tokens, places = context_tokens(context, known_share)
    log_p = 0.0
    for place, end in places:
        competing = [tk.RTT_START, tk.FAILED], list(range(tk.BYTE_0, tk.VOCAB_SIZE))
        for at, allowed in zip(range(place, min(end, place + 2)), competing, strict=False):
            with torch.no_grad():
                logits = gpt(torch.tensor([tokens[:at]]))[0, -1].double()
            log_p += logits[allowed].log_softmax(-1)[allowed.index(tokens[at])].item()
    return log_p


# Of these only the last ones fit, and the fewer, the more of the source is known.
LONG = [row | {"dst_addr": f"198.51.{i}.9", "rtt": 5.0 * i} for i, row in enumerate(CONTEXT[:1] * 8)]
LONG = [row | {"event_time": f"2026-01-01T{i:02d}:00:00Z"} for i, row in enumerate(LONG)]


@pytest.mark.parametrize("context", [UNTIMED, CONTEXT, UNTIMED[1:2], LONG])
@pytest.mark.parametrize("new", [False, True])
def test_auto_weighs_the_lengths_by_bayes(exact, context, new):
    shares = dict(zip(SHARES, (0.3, 0.25, 0.2, 0.15, 0.1), strict=True)) if new else SHARES
    familiar = Familiar.of_rows([])  # with it every source is new
    calibration = Calibration({"ipv4": SHARES}, {"ipv4": shares}, familiar if new else None)
    model = dataclasses.replace(exact, calibration=calibration)
    at = AT if "event_time" in context[0] else None
    distribution = model.rtt(SRC, DST, at, context)
    kept = context[-distribution.context_measurements :]
    assert distribution.context_measurements == model.rtt(SRC, DST, at, context, "all").context_measurements
    assert (len(kept) < len(context)) == (context is LONG)
    prior = np.array(list(shares.values()))
    weights = prior * np.exp([evidence(model.gpt, kept, known / 4) for known in range(5)])
    weights /= weights.sum()
    used = weights >= LEAST_WEIGHT
    expected = dict(zip(np.array(list(SHARES))[used].tolist(), weights[used] / weights[used].sum(), strict=True))
    assert dict(distribution.src_weights) == pytest.approx(expected, rel=1e-6)
    assert sum(distribution.src_weights.values()) == pytest.approx(1, abs=1e-12)
    distributions = {name: model.rtt(SRC, DST, at, kept, name.strip("/")) for name in distribution.src_weights}
    mixed = sum(weight * distributions[name].code_probability for name, weight in distribution.src_weights.items())
    np.testing.assert_allclose(distribution.code_probability, mixed, rtol=1e-9)
    assert distribution.p_fail == pytest.approx(
        sum(w * distributions[name].p_fail for name, w in distribution.src_weights.items()), rel=1e-9
    )


def test_where_the_source_changes_nothing_the_weights_are_those_of_val_and_the_answer_that_of_any_length():
    gpt = random_gpt(1).double()
    for block in gpt.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)  # each token is all that the next one depends on
    model = model_of(gpt, calibration=Calibration({"ipv4": SHARES}))
    distribution = model.rtt(SRC, DST, AT, CONTEXT)
    assert dict(distribution.src_weights) == pytest.approx(SHARES, rel=1e-9)
    for known in ("none", 8, 16, 24, "all"):
        same = model.rtt(SRC, DST, AT, CONTEXT, known)
        np.testing.assert_allclose(distribution.code_probability, same.code_probability, rtol=1e-9)
        assert distribution.p_fail == pytest.approx(same.p_fail, rel=1e-9)


ONE_END = [
    (None, DST, None, None),
    (None, DST, AT, None),
    (None, "198.51.0.0/16", None, None),
    (None, "2001:db8::7", None, None),
    (SRC, None, None, None),
    (SRC, None, AT, None),
    ("192.0.2.0/24", None, None, None),
    ("2001:db8::/32", None, None, None),
    (SRC, None, None, UNTIMED),
    (SRC, None, AT, CONTEXT),
]


@pytest.mark.parametrize(("src", "dst", "at", "context"), ONE_END)
def test_with_one_end_given_the_answer_is_that_of_a_ping_whose_other_end_follows_its_result(
    exact, src, dst, at, context
):
    tokens, _ = context_tokens(context or [])
    end = Endpoint.parse(src or dst)
    tokens += [
        tk.MEASUREMENT_START,
        *address(tk.SRC_IPV4 if src else tk.DST_IPV4, str(end).split("/")[0], end.known_bytes),
    ]
    before = context[-1]["event_time"] if at and context else None
    tokens += timestamp(at, before) if at else []
    answers, failed = results(exact.gpt, tokens)
    distribution = exact.rtt(src, dst, at, context, "all")
    mass = answers.sum() + failed
    np.testing.assert_allclose(distribution.code_probability, answers.ravel() / mass, rtol=1e-9)
    assert distribution.p_fail == pytest.approx(failed / mass, rel=1e-9)
    if at:  # nothing else than the other end may follow the time
        other = [tk.DST_IPV4, tk.DST_IPV6] if src else [tk.SRC_IPV4, tk.SRC_IPV6]
        with torch.no_grad():
            p_other = exact.gpt(torch.tensor([tokens]))[0, -1].double().softmax(-1)[other].sum().item()
        assert distribution.total_probability == pytest.approx(mass / (1 - p_other), rel=1e-9)


@pytest.mark.parametrize(("src", "dst", "order"), [(None, DST, ("dst", "rtt")), (SRC, None, ("src", "rtt"))])
def test_the_distribution_of_one_end_is_a_quotient_of_joint_probabilities_in_the_order_of_its_fields(
    exact, src, dst, order
):
    byte_1, distribution = 150, exact.rtt(src, dst, src_known="all")
    rtt_ms = tk.decode_rtt(256 * byte_1 + np.arange(256))
    rows = [{"src_addr": SRC, "dst_addr": DST, "rtt": float(ms)} for ms in rtt_ms]
    given_end = np.exp(exact.log_prob(rows, order) - exact.log_prob(rows[:1], order[:1]))  # (256,) P(result | end)
    own = distribution.code_probability[256 * byte_1 :][:256]
    # `log_prob` lets each byte sum to 1, the distribution all results together: within one byte 1 they are proportional.
    np.testing.assert_allclose(own / own.sum(), given_end / given_end.sum(), rtol=1e-9)
    assert own.std() > 0.1 * own.mean()


@pytest.mark.parametrize("seed", range(3))
def test_bf16_answers_as_fp32_does(seed):
    """The bound in the docstring of `PingModel.load`, here of random models; test_end_to_end.py has a trained one."""
    gpt = random_gpt(seed, 0.1, n_layer=3, n_embd=128)
    some = [query for query in queries() if query.dst is None or not query.dst.extra_bits]
    fp32, bf16 = (next(model_of(gpt, precision=precision).distributions(some, "all")) for precision in ("fp32", "bf16"))
    assert 0 < total_variation(fp32, bf16).max() < 0.02


@pytest.mark.parametrize("known", KNOWN)
def test_what_is_wanted_of_an_answer_is_that_of_the_whole_distribution(known):
    """Quantiles and the density of a result lie in bytes that are followed; the rest is bounded by what is not."""
    model = dataclasses.replace(random_model(16, 128, knows_bytes=True), least_mass=1e-7)
    some = [query for query in queries() if not query.has_partial_byte]
    observed, levels = np.geomspace(0.1, 900, len(some)), np.array([0.05, 0.5, 0.95])
    (full,) = dataclasses.replace(model, least_mass=0.0).distributions(some, known)
    focus = Focus.on(levels, len(some), np.arange(len(some)), observed)
    (wanted,) = model.distributions(some, known, focus)
    assert wanted.unresolved.max() > 0.01 and (wanted.unresolved < 0.256).all()  # of 256 values less than 1e-3 each
    np.testing.assert_allclose(wanted.p_fail, full.p_fail, rtol=1e-6)
    np.testing.assert_allclose(wanted.quantile(levels), full.quantile(levels), rtol=1e-5)
    np.testing.assert_allclose(wanted.log_density(observed), full.log_density(observed), atol=1e-5)
    assert (np.abs(wanted.pit(observed) - full.pit(observed)) < 1e-6).all()
    np.testing.assert_allclose(wanted.crps(observed), full.crps(observed), rtol=2e-3)
    together = next(distributions_under(model, some, [known, "all"], focus))
    np.testing.assert_allclose(together[0].quantile(levels), full.quantile(levels), rtol=1e-5)


def test_the_focus_of_some_queries_is_theirs():
    focus = Focus.on(np.array([0.5]), 4, np.array([0, 1, 2, 3, 3]), np.array([1.0, 5.0, -1.0, np.nan, 80.0]))
    (code_5, code_80) = tk.encode_rtt(np.array([5.0, 80.0])) >> 8
    taken = focus.take(np.array([3, 1, 2])).observed
    assert [np.flatnonzero(row).tolist() for row in taken] == [[code_80], [code_5], []]
    byte_1 = torch.zeros(3, 256, dtype=torch.float64)
    byte_1[:, 7], byte_1[:, 9] = 0.4, 0.3  # more than half of what answers is up to the seventh
    held = focus.take(np.array([3, 1, 2])).values(byte_1)
    assert [np.flatnonzero(row).tolist() for row in held] == [[7, code_80], [7, code_5], [7]]


def test_a_length_of_hardly_any_weight_is_left_out_of_each_mixture_alone(exact, monkeypatch):
    """Though another of the mixtures that are made of the same passes is of that length."""
    monkeypatch.setattr(mixture, "LEAST_WEIGHT", 0.12)
    weighing, query = dataclasses.replace(exact, calibration=Calibration({"ipv4": SHARES})), Query.parse(SRC, DST)
    auto, none = next(distributions_under(weighing, [query], ["auto", "none"]))
    (alone,) = next(distributions_under(weighing, [query], ["auto"]))
    assert auto.src_weights[0] == pytest.approx(alone.src_weights[0]) and "none" not in auto.src_weights[0]
    np.testing.assert_allclose(auto.code_probability, alone.code_probability, atol=1e-9)
    assert np.abs(auto.code_probability - none.code_probability).max() > 1e-7
