"""Answers of the model are exact: they equal the enumeration of every continuation, alone or in a batch."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
import torch

from ping_llm.config import ModelConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.times import parse_time
from ping_llm.inference.context import Context
from ping_llm.inference.files import read_table
from ping_llm.inference.model import PingModel
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.query import Endpoint, Query
from ping_llm.model.gpt import GPT

CONTEXT = [
    {"src_addr": "192.0.2.1", "dst_addr": "198.51.100.9", "rtt": 12.5, "event_time": "2026-01-01T00:00:00Z"},
    {"src_addr": "192.0.2.1", "dst_addr": "2001:db8::9", "rtt": -1.0, "event_time": "2026-01-01T00:04:00Z"},
    {"src_addr": "192.0.2.1", "dst_addr": "198.51.100.7", "rtt": 80.0, "event_time": "2026-01-02T00:00:00Z"},
]


@pytest.fixture(scope="module", params=[False, True], ids=["all tokens", "legal tokens"])
def model(request) -> PingModel:
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=128, grammar=request.param)).eval()
    for parameter in gpt.parameters():  # zero-initialised projections would make every answer alike
        torch.nn.init.normal_(parameter, std=0.3)
    return PingModel(gpt, torch.device("cpu"), least_mass=0.0)


def enumerate_results(gpt, prompt):
    """log P of each of the 65,536 answers and of FAILED after a prompt: no cache, one sequence for each byte 1."""
    byte_1 = torch.arange(tk.BYTE_0, tk.VOCAB_SIZE)
    sequences = torch.cat(
        [torch.tensor(prompt).expand(256, -1), torch.full((256, 1), tk.RTT_START), byte_1[:, None]], 1
    )
    with torch.no_grad():
        log_p = gpt(sequences).double().log_softmax(-1)
    answers = np.empty((256, 256))
    for b1 in range(256):
        for b2 in range(256):
            steps = (-3, tk.RTT_START), (-2, tk.BYTE_0 + b1), (-1, tk.BYTE_0 + b2)
            answers[b1, b2] = sum(float(log_p[b1, at, token]) for at, token in steps)
    return answers.ravel(), log_p[0, -3].numpy()


@pytest.mark.parametrize("at", [None, "2026-01-03T00:00:00Z"])
@pytest.mark.parametrize("context", [None, CONTEXT])
def test_answer_equals_brute_force_enumeration(model, at, context):
    query = Query.parse("192.0.2.1", "198.51.100.7", at, Context.parse(context))
    answers, after_prompt = enumerate_results(model.gpt, build_prompt(query, 128).tokens)
    failed = np.exp(after_prompt[tk.FAILED])
    mass = np.exp(answers).sum() + failed
    other = 0.0 if at else np.exp(after_prompt[tk.TIMESTAMP_ABS])
    distribution = model.rtt("192.0.2.1", "198.51.100.7", at, context, src_known="all")
    assert at is None or distribution.total_probability == pytest.approx(mass, rel=1e-4)
    np.testing.assert_allclose(distribution.code_probability, np.exp(answers) / mass, rtol=1e-4, atol=1e-12)
    assert distribution.p_fail == pytest.approx(failed / mass, rel=1e-4)
    assert distribution.total_probability == pytest.approx(mass / (1 - other), rel=1e-4)
    total = distribution.code_probability.sum(dtype=np.float64) + distribution.p_fail
    assert total == pytest.approx(1, abs=1e-6)
    assert distribution.forward_passes == 2 and distribution.context_measurements == len(context or [])


def test_answers_do_not_depend_on_the_rest_of_the_batch(model):
    queries = [
        Query.parse("192.0.2.1", "198.51.100.7", None, Context.parse(None)),
        Query.parse("192.0.2.1", "2001:db8::7", "2026-01-03", Context.parse(CONTEXT)),
        Query.parse("192.0.2.0/24", "198.51.0.0/16", None, Context.parse(CONTEXT[:1])),
    ]
    together = model.rtt_many(queries, "all")
    for query, answer in zip(queries, together, strict=True):
        (alone,) = model.rtt_many([query], "all")
        np.testing.assert_allclose(answer.code_probability, alone.code_probability, rtol=1e-3, atol=1e-10)
        assert answer.p_fail == pytest.approx(alone.p_fail, rel=1e-4)


def test_two_forward_passes_are_counted_honestly(model, monkeypatch):
    calls = []
    states = GPT.states
    monkeypatch.setattr(GPT, "states", lambda *a, **k: calls.append(1) or states(*a, **k))
    distribution = model.rtt("192.0.2.1", "198.51.100.7", context=CONTEXT, src_known="all")
    assert len(calls) == distribution.forward_passes == 2


def prompt_text(query, seq_len=128):
    prompt = build_prompt(query, seq_len)
    return prompt, tk.decode([*prompt.tokens.tolist(), tk.FAILED])


def test_prompt_holds_context_then_query_with_the_result_last():
    query = Query.parse("192.0.2.1", "198.51.100.7", "2026-01-02T00:00:30Z", Context.parse(CONTEXT))
    prompt, decoded = prompt_text(query, 256)
    assert [m.dst for m in decoded] == ["198.51.100.9", "2001:db8::9", "198.51.100.7", "198.51.100.7"]
    assert [round(m.rtt_ms, 1) for m in decoded] == [12.5, -1.0, 80.0, -1.0]
    assert decoded[-1].time_s == parse_time("2026-01-02T00:00:30Z") and decoded[-1].time_s - decoded[-2].time_s == 30
    assert prompt.tokens[-1] == tk.BYTE_0 + 30  # the one-byte delta: nothing but the result is still to come


def test_without_a_time_nothing_is_timestamped():
    _, decoded = prompt_text(Query.parse("192.0.2.1", "198.51.100.7", None, Context.parse(CONTEXT)), 256)
    assert [m.time_s for m in decoded] == [None] * 4


def test_context_is_sorted_by_time_and_the_oldest_is_left_out_where_it_does_not_fit():
    rows = [CONTEXT[0] | {"event_time": 1000 * i, "rtt": float(i + 1)} for i in range(30)]
    prompt, decoded = prompt_text(Query.parse("192.0.2.1", "198.51.100.7", 10**6, Context.parse(rows[::-1])))
    assert len(prompt.tokens) + 2 <= 129
    assert prompt.context_measurements == len(decoded) - 1 and 3 <= prompt.context_measurements <= 6
    assert round(decoded[-2].rtt_ms) == 30
    assert decoded[0].time_s == 1000 * (30 - prompt.context_measurements)
    # One more would not have fitted.
    longer = Query.parse("192.0.2.1", "198.51.100.7", 10**6, Context.parse(rows[-prompt.context_measurements - 1 :]))
    assert len(build_prompt(longer, 10_000).tokens) + 1 > 128


def test_prefixes_are_encoded_as_fewer_bytes():
    _, decoded = prompt_text(Query.parse("192.0.2.0/24", "2001:db8::/32", None, Context.parse(CONTEXT[:1])))
    assert (decoded[-1].src, decoded[-1].src_bits) == ("192.0.2.0", 24)
    assert (decoded[-1].dst, decoded[-1].dst_bits) == ("2001:db8::", 32)
    assert decoded[0].src_bits == 24 and decoded[0].dst_bits == 32


@pytest.mark.parametrize(
    ("src", "dst", "at", "context", "message"),
    [
        ("192.0.2.300", "198.51.100.7", None, None, "'192.0.2.300' is not an IPv4 or IPv6 address"),
        ("192.0.2.1\0", "198.51.100.7", None, None, r"'192.0.2.1\x00' is not an IPv4 or IPv6 address"),
        ("192.0.2.0/²", "198.51.100.7", None, None, "the prefix length must be a number from 0 to 32"),
        ("192.0.2.0/٢٤", "198.51.100.7", None, None, "the prefix length must be a number from 0 to 32"),
        ("192.0.2.1", "example.org", None, None, "'example.org' is not an IPv4 or IPv6 address"),
        ("192.0.2.1", "198.51.100.0/", None, None, "must be a number from 0 to 32"),
        ("192.0.2.1", "198.51.100.0/33", None, None, "must be a number from 0 to 32"),
        ("192.0.2.0/20", "198.51.100.7", None, CONTEXT, "give one like /16 or /24"),
        ("192.0.2.1", "198.51.100.0/0", None, None, "covers every destination"),
        ("192.0.2.1", "198.51.100.7", "yesterday", None, "'yesterday' is not a time"),
        ("192.0.2.1", "198.51.100.7", "2025-01-01", CONTEXT, "not earlier than the query at 2025-01-01T00:00:00Z"),
        (
            "192.0.2.1",
            "198.51.100.7",
            None,
            [{"src_addr": "x", "dst_addr": "192.0.2.9", "rtt": 1.0}],
            "context row 1: 'x'",
        ),
        ("192.0.2.1", "198.51.100.7", None, [CONTEXT[0] | {"rtt": "fast"}], "context row 1: rtt 'fast' must be ms"),
        ("192.0.2.1", "198.51.100.7", None, [CONTEXT[0] | {"rtt": float("nan")}], "context row 1: rtt is missing"),
        ("192.0.2.1", "198.51.100.7", None, [{"src_addr": "192.0.2.1", "rtt": 1.0}], "no column dst_addr"),
    ],
)
def test_bad_queries_are_one_clear_error(model, src, dst, at, context, message):
    with pytest.raises(ValueError, match=r".") as error:
        model.rtt(src, dst, at, context)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_prefix_goes_before_a_whole_address_so_that_no_byte_of_it_can_follow():
    prompt, decoded = prompt_text(Query.parse("192.0.2.1", "198.51.0.0/16", None, Context.parse(None)))
    assert (decoded[0].dst_bits, decoded[0].src_bits) == (16, 32)
    assert prompt.tokens[1] == tk.DST_IPV4 and prompt.tokens[4] == tk.SRC_IPV4
    assert prompt.also_legal.tolist() == [tk.TIMESTAMP_ABS]
    both = build_prompt(Query.parse("192.0.2.0/24", "198.51.0.0/16", None, Context.parse(None)), 128)
    assert both.also_legal.tolist() == [tk.TIMESTAMP_ABS, *range(tk.BYTE_0, tk.VOCAB_SIZE)]
    timed = build_prompt(Query.parse("192.0.2.1", "198.51.0.0/16", 0, Context.parse(None)), 128)
    assert not len(timed.also_legal)


def test_no_query_is_no_answer(model):
    assert model.rtt_many([]) == []


@pytest.mark.parametrize("end", ["src", "dst"])
def test_an_empty_address_is_not_any(model, end):
    with pytest.raises(ValueError, match="an address is empty; give one, or a prefix, or None for any"):
        model.rtt(**{"src": "192.0.2.1", "dst": "198.51.100.7"} | {end: ""})
    with pytest.raises(ValueError, match="'' is not a time"):
        model.rtt("192.0.2.1", "198.51.100.7", at="")


def test_addresses_may_be_objects():
    import ipaddress

    query = Query.parse(ipaddress.ip_address("192.0.2.1"), ipaddress.ip_network("198.51.100.0/24"))
    assert (str(query.src), str(query.dst)) == ("192.0.2.1", "198.51.100.0/24")


def test_a_query_of_the_package_takes_a_table_as_context(model):
    from ping_llm import Query as Exported

    query = Exported.parse("192.0.2.1", "198.51.100.7", "2026-01-03", CONTEXT)
    (one,) = model.rtt_many([query], "all")
    assert one.median == model.rtt("192.0.2.1", "198.51.100.7", "2026-01-03", CONTEXT, "all").median
    assert one.context_measurements == len(CONTEXT)
    other = [row | {"src_addr": "192.0.2.9"} for row in CONTEXT]
    assert len(Exported.parse("192.0.2.1", None, None, other, one_host=True).context) == len(CONTEXT)


def test_times_without_a_zone_are_utc():
    assert parse_time(dt.date(2026, 1, 1)) == 1767225600
    assert parse_time("2026-01-01T00:00:00") == parse_time("2026-01-01T01:00:00+01:00") == 1767225600


def test_context_is_read_from_parquet_csv_and_json_alike(tmp_path):
    import json

    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{**row, "event_time": parse_time(row["event_time"])} for row in CONTEXT])
    pq.write_table(table, tmp_path / "c.parquet")
    csv.write_csv(table, tmp_path / "c.csv")
    (tmp_path / "c.json").write_text(json.dumps(CONTEXT))
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, CONTEXT)))
    contexts = [Context.parse(read_table(tmp_path / f"c.{end}")) for end in ("parquet", "csv", "json", "jsonl")]
    for context in contexts:
        assert (context.time_s == contexts[0].time_s).all() and (context.rtt_ms == contexts[0].rtt_ms).all()
        assert (context.dst == contexts[0].dst).all()
    with pytest.raises(ValueError, match="no file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match=r"must be \.parquet"):
        read_table(_touch(tmp_path / "c.txt"))


def _touch(path):
    path.write_text("")
    return path


def test_prefix_of_no_bytes_is_an_unknown_source():
    assert Endpoint.parse("192.0.2.1/0").known_bytes == 0
