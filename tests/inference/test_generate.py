"""What is generated is always valid, is drawn from the model's own distribution, and comes with its probability."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ping_llm.config import ModelConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import pack_address
from ping_llm.data.times import LAST_TIME_S
from ping_llm.inference import generate as generation
from ping_llm.inference.context import Context
from ping_llm.inference.engine import Reader
from ping_llm.inference.generate import GENERATED_SCHEMA, Sampling, format_measurements, generate
from ping_llm.inference.grammar import Grammar, follow
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.query import Query
from ping_llm.model.gpt import GPT

CPU = torch.device("cpu")
SRC = [tk.SRC_IPV4, *(tk.BYTE_0 + b for b in (192, 0, 2, 1))]
DST = [tk.DST_IPV4, *(tk.BYTE_0 + b for b in (198, 51, 100, 7))]
AT = [tk.TIMESTAMP_ABS, *(tk.BYTE_0 + b for b in (1_770_000_000).to_bytes(8, "big"))]
GIVEN = [tk.MEASUREMENT_START, *SRC, *AT, *DST]  # all but the result


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=128))
    for parameter in gpt.parameters():  # zero-initialised projections would make every distribution alike
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt


@pytest.fixture
def fed(gpt, monkeypatch):
    """The tokens (B, T) of each forward pass, and how many each cache held before."""
    passes, forward = [], gpt.forward
    monkeypatch.setattr(gpt, "forward", lambda t, c=None: passes.append((t, c.size if c else 0)) or forward(t, c))
    return passes


def masked_log_p(gpt, tokens, **options):
    """Log-probabilities (267,) of the legal tokens after `tokens`, without a cache."""
    grammar = Grammar(1, last_time_s=LAST_TIME_S, **options)
    follow(grammar, tokens)
    with torch.no_grad():
        logits = gpt(torch.tensor([tokens]))[0, -1].double().numpy()
    logits[~grammar.legal()[0]] = -np.inf
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def equal(table, other):
    np.testing.assert_allclose(table["log_prob"], other["log_prob"], rtol=1e-4)
    return table.drop("log_prob") == other.drop("log_prob")


samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-320, 0.3, 1.0, 50.0]),
        "top_k": st.sampled_from([0, 1, 3, 1000]),
        "top_p": st.sampled_from([1e-9, 0.5, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
    }
)


@settings(max_examples=30, deadline=None)
@given(samplings, st.integers(0, 2**63 - 1), st.integers(1, 5), st.integers(1, 2), st.booleans(), st.booleans())
def test_an_untrained_model_generates_only_valid_measurements(gpt, chosen, seed, count, measurements, whole, untrained):
    gpt = GPT(gpt.config, generator=torch.Generator().manual_seed(seed)) if untrained else gpt
    table = generate(Reader(gpt, CPU), count, seed=seed, measurements=measurements, whole_addresses=whole, **chosen)
    assert table.schema == GENERATED_SCHEMA
    assert table["sequence"].to_pylist() == [i for i in range(count) for _ in range(measurements)]
    rtt, log_prob = table["rtt"].to_numpy(), table["log_prob"].to_numpy()
    assert ((rtt == -1) | ((rtt >= 0.001) & (rtt < 4_300_000))).all() and (log_prob < 0).all()
    for name in ("src_addr", "dst_addr"):
        for text in table[name].to_pylist():
            address, slash, bits = text.partition("/")
            assert len(pack_address(address)) == 16
            assert not (whole and slash) and (not slash or int(bits) in range(0, 128, 8))
    for sequence in range(count):
        times = [m["event_time"] for m in table.to_pylist() if m["sequence"] == sequence and m["event_time"]]
        assert times == sorted(times) and all(t.tzinfo for t in times)


def test_the_first_field_is_drawn_from_the_distribution_of_the_model(gpt, fed):
    generate(Reader(gpt, CPU), 1500, seed=3)
    first = np.concatenate([tokens[:, 0].numpy() for tokens, cached in fed if cached == 1])
    distribution = np.exp(masked_log_p(gpt, [tk.MEASUREMENT_START]))
    counts = np.bincount(first, minlength=tk.VOCAB_SIZE)
    assert counts.sum() == 1500 and not counts[distribution == 0].any()
    assert chisquare(counts[distribution > 0], 1500 * distribution[distribution > 0]).pvalue > 1e-3


FILTERED = {"temperature": 1.3, "top_k": 150, "top_p": 0.9, "min_p": 0.02}


def slow_distribution(log_p, temperature, top_k, top_p, min_p):
    """The filters one token at a time, in the order of Hugging Face; ties go to the lower token."""
    scaled = log_p if temperature == 0 else log_p / temperature
    kept = sorted(range(len(log_p)), key=lambda token: (-scaled[token], token))
    kept = kept[:1] if temperature == 0 else kept[: top_k or None]
    p = {token: np.exp(scaled[token] - scaled[kept[0]]) for token in kept}
    p = {token: mass / sum(p.values()) for token, mass in p.items()}
    nucleus, held = {}, 0.0
    for token, mass in p.items():
        if held < top_p:
            nucleus[token] = mass
        held += mass
    p = {token: mass for token, mass in nucleus.items() if mass >= min_p * max(nucleus.values())}
    distribution = np.zeros(len(log_p))
    distribution[list(p)] = np.array(list(p.values())) / sum(p.values())
    return distribution


@pytest.mark.parametrize("chosen", [{}, FILTERED])
def test_draws_follow_the_filtered_distribution(gpt, chosen):
    table = generate(Reader(gpt, CPU), 5000, seed=1, prompt_tokens=[*GIVEN, tk.RTT_START], **chosen)
    byte_1 = tk.encode_rtt(table["rtt"].to_numpy()) >> 8
    log_p = masked_log_p(gpt, [*GIVEN, tk.RTT_START])
    distribution = slow_distribution(log_p, **({"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0} | chosen))[
        tk.BYTE_0 :
    ]
    assert (0.1 < (distribution > 0).mean() < 0.9) == bool(chosen)
    counts = np.bincount(byte_1, minlength=256)
    assert not counts[distribution == 0].any()
    common = 5000 * distribution > 5
    observed, expected = ([*x[common], x[~common].sum()] for x in (counts, 5000 * distribution))
    observed, expected = (x if expected[-1] else x[:-1] for x in (observed, expected))
    assert chisquare(observed, expected).pvalue > 1e-3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-5, 5) | st.just(-np.inf), min_size=2, max_size=12).filter(lambda x: max(x) > -np.inf),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.integers(0, 14),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_filters_equal_their_slow_account(logits, temperature, top_k, top_p, min_p):
    log_p = torch.tensor([logits], dtype=torch.float64).log_softmax(-1)
    slow = slow_distribution(log_p[0].numpy(), temperature, top_k, top_p, min_p)
    almost = {slow_distribution(log_p[0].numpy(), temperature, top_k, p, m).tobytes() for p, m in _near(top_p, min_p)}
    if len(almost) == 1:  # no threshold is hit exactly
        np.testing.assert_allclose(Sampling(temperature, top_k, top_p, min_p).distribution(log_p)[0], slow, atol=1e-12)


def _near(top_p, min_p):
    return [(top_p * (1 + e), min_p * (1 + e)) for e in (-1e-9, 0.0, 1e-9)]


def greedy_without_cache(gpt, prompt, measurements):
    """The likeliest tokens one by one, and the nats of each measurement."""
    tokens, log_prob, begun = list(prompt), [0.0] * measurements, 0
    while True:
        log_p = masked_log_p(gpt, tokens)
        token = int(log_p.argmax())
        log_prob[begun] += log_p[token]
        begun += token == tk.MEASUREMENT_START
        if begun == measurements:
            return tokens, log_prob
        tokens.append(token)


@pytest.mark.parametrize("prompt", [None, [*GIVEN[:-2]], [*GIVEN, tk.FAILED, tk.MEASUREMENT_START]])
def test_greedy_equals_the_argmax_without_a_cache(gpt, prompt):
    tokens, log_prob = greedy_without_cache(gpt, prompt or [0], 2)
    table = generate(Reader(gpt, CPU), 3, temperature=0, prompt_tokens=prompt, measurements=2)
    expected = tk.decode(tokens)[-2:] * 3
    assert table["src_addr"].to_pylist() == [m.src for m in expected]
    assert table["dst_addr"].to_pylist() == [m.dst for m in expected]
    assert table["rtt"].to_pylist() == [m.rtt_ms for m in expected]
    assert table["event_time"].cast(pa.int64()).to_pylist() == [m.time_s for m in expected]
    np.testing.assert_allclose(table["log_prob"], log_prob * 3, rtol=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.floats(0.1, 5), st.integers(0, 100))
def test_top_1_is_greedy_at_any_temperature_and_seed(gpt, temperature, seed):
    greedy = generate(Reader(gpt, CPU), 2, temperature=0)
    assert generate(Reader(gpt, CPU), 2, seed=seed, temperature=temperature, top_k=1).drop("log_prob") == greedy.drop(
        "log_prob"
    )


@pytest.mark.parametrize("top_p", [1e-9, 5e-324])
def test_a_top_p_near_0_is_greedy(gpt, top_p):
    greedy = generate(Reader(gpt, CPU), 2, temperature=0)
    assert generate(Reader(gpt, CPU), 2, seed=3, temperature=2, top_p=top_p).drop("log_prob") == greedy.drop("log_prob")


def test_temperature_1_that_keeps_all_tokens_draws_what_is_drawn_without_options(gpt):
    plain = generate(Reader(gpt, CPU), 3, seed=5)
    everything = {"temperature": 1.0, "top_k": tk.VOCAB_SIZE, "top_p": 1.0, "min_p": 0.0}
    assert generate(Reader(gpt, CPU), 3, seed=5, **everything) == plain
    log_p = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    torch.testing.assert_close(Sampling().distribution(log_p), log_p.exp(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("chosen", [{}, FILTERED])
def test_log_prob_is_that_of_the_unfiltered_model(gpt, chosen):
    table = generate(Reader(gpt, CPU), 20, seed=5, prompt_tokens=GIVEN, **chosen)
    for rtt, log_prob in zip(table["rtt"].to_pylist(), table["log_prob"].to_pylist(), strict=True):
        code = int(tk.encode_rtt(rtt))
        result = [tk.FAILED] if rtt < 0 else [tk.RTT_START, tk.BYTE_0 + (code >> 8), tk.BYTE_0 + (code & 0xFF)]
        steps = [masked_log_p(gpt, [*GIVEN, *result[:i]])[token] for i, token in enumerate(result)]
        assert log_prob == pytest.approx(sum(steps), rel=1e-4)


def test_log_prob_counts_that_the_measurement_ends(gpt):
    """A measurement without a time may go on with one: not to is a choice that has a probability."""
    prompt = [0, *SRC, *DST, tk.FAILED]
    table = generate(Reader(gpt, CPU), 200, seed=2, prompt_tokens=prompt)
    ends = masked_log_p(gpt, prompt)[tk.MEASUREMENT_START]
    without = [m["log_prob"] for m in table.to_pylist() if m["event_time"] is None]
    assert without and np.allclose(without, ends, rtol=1e-4)
    assert len(without) / 200 == pytest.approx(np.exp(ends), abs=0.12)


def test_without_a_seed_every_call_draws_anew(gpt):
    one, other = (generate(Reader(gpt, CPU), 12) for _ in range(2))
    assert one["rtt"] != other["rtt"]


def test_a_seed_gives_the_same_sequences_however_many_and_in_whatever_batches(gpt, monkeypatch):
    table = generate(Reader(gpt, CPU), 12, seed=7, measurements=2)
    assert table == generate(Reader(gpt, CPU), 12, seed=7, measurements=2)
    assert equal(table.slice(0, 2), generate(Reader(gpt, CPU), 1, seed=7, measurements=2))
    assert equal(table.slice(0, 10), generate(Reader(gpt, CPU), 5, seed=7, measurements=2))
    monkeypatch.setattr(generation, "_BATCH", 5)
    assert equal(table, generate(Reader(gpt, CPU), 12, seed=7, measurements=2))
    assert table["rtt"] != generate(Reader(gpt, CPU), 12, seed=8, measurements=2)["rtt"]
    assert len(set(table["dst_addr"].to_pylist())) > 12  # sequences differ from one another


def test_what_a_prompt_holds_is_kept_and_the_rest_is_completed(gpt):
    context = [{"src_addr": "192.0.2.1", "dst_addr": "198.51.100.9", "rtt": 12.5, "event_time": "2026-01-01"}]
    query = Query.parse("192.0.2.1", "198.51.100.7", "2026-01-02", Context.parse(context))
    prompt = build_prompt(query, 128).tokens
    table = generate(Reader(gpt, CPU), 4, prompt_tokens=prompt, measurements=2)
    for first in table.to_pylist()[::2]:
        assert (first["src_addr"], first["dst_addr"]) == ("192.0.2.1", "198.51.100.7")
        assert first["event_time"] == dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    later = [m["event_time"] for m in table.to_pylist()[1::2] if m["event_time"]]
    assert later and min(later) >= dt.datetime(2026, 1, 2, tzinfo=dt.UTC)  # deltas count from the prompt's time
    subnet = generate(Reader(gpt, CPU), 20, prompt_tokens=[0, *DST[:4]])["dst_addr"].to_pylist()
    assert all(text.startswith("198.51.100.") for text in subnet) and len(set(subnet)) > 5


def test_prefixes_are_generated_where_allowed_and_cut_all_sources_of_a_sequence_alike(gpt):
    table = generate(Reader(gpt, CPU), 40, seed=1, measurements=2, whole_addresses=False)
    for name in ("src_addr", "dst_addr"):
        assert any("/" in text for text in table[name].to_pylist())
    pairs = zip(table["src_addr"].to_pylist()[::2], table["src_addr"].to_pylist()[1::2], strict=True)
    same_family = [(a, b) for a, b in pairs if (":" in a) == (":" in b)]
    assert same_family and all(a.partition("/")[2] == b.partition("/")[2] for a, b in same_family)


def test_the_model_reads_all_of_seq_len_and_no_more_and_the_error_says_how_many_fit(gpt, fed):
    with pytest.raises(
        ValueError, match=r"may take 175 tokens after a prompt of 1, .* 128: 2 fit; pass measurements=2"
    ):
        generate(Reader(gpt, CPU), 1, measurements=4)
    assert len(generate(Reader(gpt, CPU), 1, measurements=2)) == 2
    answered = [0, *SRC, *DST, tk.RTT_START, 20, 20]  # 14 tokens
    fed.clear()
    generate(Reader(gpt, CPU), 100, temperature=50, prompt_tokens=[*answered * 5, *answered[:-3], tk.FAILED, 0])
    assert max(cached + tokens.shape[1] for tokens, cached in fed) == 128  # 83 given, 46 drawn, the last is not read
    one_too_many = [*GIVEN, tk.FAILED, *[0, *SRC, *DST, tk.FAILED] * 2, *answered * 3, 0]
    with pytest.raises(ValueError, match=r"may take 42 tokens after a prompt of 88, .* 128: 0 fit; shorten the prompt"):
        generate(Reader(gpt, CPU), 1, prompt_tokens=one_too_many)


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-53])
def test_the_outermost_noise_draws_a_legal_token(noise):
    logits = torch.randn(300, 9, generator=torch.Generator().manual_seed(0))
    legal = torch.tensor([False, False, True, True, False, True, True, False, False]).expand(300, -1)
    token, log_p = generation._draw(logits, legal, torch.full((300,), noise, dtype=torch.float64), Sampling())
    assert (token == (6 if noise else 2)).all() and log_p.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0 must be at least 1"),
        ({"measurements": 0}, "measurements=0 must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"temperature": float("inf")}, "temperature=inf must be 0"),
        ({"top_k": -1}, "top_k=-1 must be the number of tokens to keep, or 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.01}, "top_p=1.01 must be above 0"),
        ({"min_p": 1.5}, "min_p=1.5 must lie between 0"),
        ({"seed": -1}, "seed=-1 must be from 0"),
        ({"prompt_tokens": [0, 1, 11, 3]}, "the prompt breaks the grammar at token 3: expected a byte, found DST_IPV4"),
        ({"prompt_tokens": [0, 1, 11, 3]}, "pass whole_addresses=False"),
        ({"prompt_tokens": [*GIVEN, tk.FAILED]}, "append MEASUREMENT_START to begin the next one"),
    ],
)
def test_bad_options_are_one_clear_error(gpt, options, message):
    with pytest.raises(ValueError) as error:
        generate(Reader(gpt, CPU), **({"count": 1} | options))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_measurements_are_shown_in_aligned_lines():
    time = dt.datetime(2026, 2, 2, 2, 40, tzinfo=dt.UTC)
    rows = [
        ("192.0.2.1", "198.51.100.7", time, 12.5, -20.0, 0),
        ("2001:db8::/32", "192.0.2.200", None, -1.0, -101.26, 0),
    ]
    table = pa.Table.from_pylist(
        [dict(zip(GENERATED_SCHEMA.names, row, strict=True)) for row in rows], schema=GENERATED_SCHEMA
    )
    assert format_measurements(table).splitlines() == [
        "192.0.2.1      → 198.51.100.7  2026-02-02T02:40:00Z  12.500 ms   -20.0 nats",
        "2001:db8::/32  → 192.0.2.200   no time               no answer  -101.3 nats",
    ]
    assert format_measurements(table.slice(0, 0)) == ""
