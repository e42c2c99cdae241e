"""What queries share is read once, and only what decides an answer is followed; the answers stay what they are."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model

from ping_llm.data import tokenization as tk
from ping_llm.inference import engine
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.context import Context
from ping_llm.inference.engine import FOCUS_MASS, PASS_TOKENS, TOKENS_OF_A_PASS, Focus, _alike
from ping_llm.inference.model import PingModel
from ping_llm.inference.prompt import build_prompt, build_prompts
from ping_llm.inference.query import Query
from ping_llm.model.gpt import GPT

SHARES = {"none": 0.1, "/8": 0.15, "/16": 0.2, "/24": 0.25, "all": 0.3}
SRC, AT = "192.0.2.1", 1767400000
PAST = Context.parse(
    [{"src_addr": SRC, "dst_addr": f"198.51.100.{i}", "rtt": 5.0 + i, "event_time": AT - 1000 + i} for i in range(12)]
)
LEVELS = np.array([0.05, 0.5, 0.95])


@pytest.fixture(scope="module")
def model() -> PingModel:
    return random_model(32, 128, knows_bytes=True, calibration=Calibration({"ipv4": SHARES}))


@pytest.fixture
def read(monkeypatch) -> list[tuple[int, bool]]:
    """Of each pass the tokens that are no padding, and whether they are values of byte 1 side by side."""
    passes, states = [], GPT.states

    def counted(self, tokens, cache=None, branches=None):
        passes.append((int((tokens >= 0).sum()), branches is not None))
        return states(self, tokens, cache, branches)

    monkeypatch.setattr(GPT, "states", counted)
    return passes


@pytest.mark.parametrize("seq_len", [64, 96, 400])
def test_prompts_are_the_same_built_together_and_alone(seq_len):
    queries = [
        Query.parse(src, dst, at, context)
        for src, dst, at, context in itertools.product(
            (SRC, "192.0.2.0/24", None), ("198.51.100.7", "198.51.0.0/16", None), (None, AT), (None, PAST)
        )
        if (src or dst) and (src or context is None)
    ]
    for query, together in zip(queries, build_prompts(queries, seq_len), strict=True):
        alone = build_prompt(query, seq_len)
        for one, other in zip(dataclasses.astuple(together), dataclasses.astuple(alone), strict=True):
            np.testing.assert_array_equal(one, other)
        assert len(together.tokens) < seq_len - 1


def test_the_source_and_the_context_that_queries_share_are_read_once(model, read):
    queries = [Query.parse(SRC, f"198.51.100.{i}", AT, PAST.take(slice(3))) for i in range(20)]
    prompt = build_prompt(queries[0], 128)
    stem = prompt.context_length + 1 + 5  # the context, its start and the source
    model.rtt_many(queries, "all")
    assert sum(count for count, second in read if not second) == stem + 20 * (len(prompt.tokens) - stem + 1)
    read.clear()
    model.rtt_many(queries[:1], "all")  # nothing is shared, and no pass is made for it
    assert [count for count, second in read if not second] == [len(prompt.tokens) + 1]


def test_parts_of_a_prefix_share_what_comes_before_their_last_byte(model, read):
    model.rtt(SRC, "198.51.64.0/19", src_known="all")
    shared, own = 1 + 1 + 2, 1 + 5 + 1  # start and 198.51; the last byte, the source, and RTT_START
    first = [count for count, second in read if not second]
    assert shared in first and own * 32 in first  # beside the pass that weighs the bytes


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=8), st.integers(64, 3000))
def test_stretches_are_those_that_cost_least(counts, limit):
    counts = np.sort(counts)

    def cost(ends) -> float:
        widths = [(end - begin, max(1, counts[end - 1])) for begin, end in itertools.pairwise([0, *ends])]
        fits = all(many == 1 or many * width <= limit for many, width in widths)
        return sum(many * width + PASS_TOKENS for many, width in widths) if fits else np.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "TOKENS_OF_A_PASS", limit)
        found = _alike(counts)
    assert [s.start for s in found] == [0, *[s.stop for s in found[:-1]]] and found[-1].stop == len(counts)
    inner = range(1, len(counts))
    every = ([*cuts, len(counts)] for size in range(len(counts)) for cuts in itertools.combinations(inner, size))
    assert cost([s.stop for s in found]) == min(map(cost, every))
    assert TOKENS_OF_A_PASS >= 256  # all values of a prompt fit into one pass


def test_what_is_not_followed_is_less_than_the_mass_of_a_focus(model, monkeypatch):
    sharp = dataclasses.replace(model, least_mass=1e-9)
    sharp.gpt.head.weight.data[tk.BYTE_0 :, 1:] *= 4.0
    followed = []
    second = engine._second_bytes
    monkeypatch.setattr(engine, "_second_bytes", lambda *given: followed.append(given[2]) or second(*given))
    queries = [Query.parse(SRC, f"198.51.100.{i}") for i in range(6)]
    (found,) = sharp.distributions(queries, "all", Focus(LEVELS))
    (full,) = dataclasses.replace(model, least_mass=0.0).distributions(queries, "all")
    sharp.gpt.head.weight.data[tk.BYTE_0 :, 1:] /= 4.0
    byte_1 = full.code_probability.reshape(6, 256, 256).sum(axis=2)
    left = np.where(followed[0].numpy(), 0.0, byte_1)
    assert (left.max(axis=1) < FOCUS_MASS).all() and (left > FOCUS_MASS / 4).any()
    np.testing.assert_allclose(found.quantile(LEVELS), full.quantile(LEVELS), rtol=1e-4)
    np.testing.assert_allclose(found.unresolved, left.sum(axis=1), rtol=1e-3, atol=1e-9)


def test_of_many_parts_the_likeliest_speak_for_the_others(model, read):
    query = Query.parse(SRC, "198.51.128.0/17")
    followed = dataclasses.replace(model, least_mass=1e-7)
    (wanted,) = followed.distributions([query], "auto", Focus(LEVELS))
    branches = sum(count for count, second in read if second)
    (full,) = model.distributions([query], "auto")
    assert branches <= engine.MOST_PARTS * len(LEVELS) * 2  # each quantile's value, and those of much mass
    assert abs(wanted.code_probability - full.code_probability).sum() / 2 <= wanted.unresolved[0]
    np.testing.assert_allclose(wanted.quantile(LEVELS), full.quantile(LEVELS), rtol=2e-3)
    uniform = full.code_probability.reshape(256, 256).sum(axis=1, keepdims=True).repeat(256, axis=1) / 256
    held = [int(tk.encode_rtt(full.quantile(LEVELS)[0])[i]) >> 8 for i in range(len(LEVELS))]
    error = [
        abs(one.reshape(256, 256)[held] - full.code_probability.reshape(256, 256)[held]).sum()
        for one in (wanted.code_probability, uniform)
    ]
    assert error[0] < error[1] / 3  # the shape of the likeliest parts is near that of all
