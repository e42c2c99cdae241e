"""What a measurement says has the same probability as token by token; what is scored stands after its own past."""

import dataclasses
from itertools import permutations

import numpy as np
import pyarrow as pa
import pytest
import torch
from pings import ndjson, ping, write
from random_model import random_model

from ping_llm.config import ModelConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.ingest.prepare import prepare
from ping_llm.inference.calibration import Calibration, Surprise
from ping_llm.inference.files import dump_table
from ping_llm.inference.model import PingModel
from ping_llm.model.gpt import GPT

MEASUREMENTS = [
    {"src_addr": "192.0.2.1", "dst_addr": "198.51.100.9", "rtt": 12.5, "event_time": 1_700_000_000},
    {"src_addr": "192.0.2.1", "dst_addr": "2001:db8::9", "rtt": -1.0, "event_time": 1_700_000_100},
    {"src_addr": "192.0.2.1", "dst_addr": "::fffe:0:7", "rtt": 80.0, "event_time": 1_700_009_000},
]
ROLES = {"src": (1, 2), "dst": (3, 4), "rtt": (8, 10), "time": (5, 6, 7)}
BYTES = range(tk.BYTE_0, tk.VOCAB_SIZE)


@pytest.fixture(scope="module")
def model() -> PingModel:
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(n_layer=2, n_embd=16, n_head=2, seq_len=128)).eval()
    for parameter in gpt.parameters():  # zero-initialised projections would make every answer alike
        torch.nn.init.normal_(parameter, std=0.3)
    return PingModel(gpt, torch.device("cpu"))


def address(text: str, ipv4_role: int) -> tuple[int, list[int]]:
    import ipaddress

    packed = ipaddress.ip_address(text).packed
    return ipv4_role + (len(packed) == 16), list(packed)


def field_tokens(row: dict, name: str, clock: int | None) -> list[int]:
    """Role and bytes of one field, by hand."""
    if name == "rtt":
        role, value = (10, []) if row["rtt"] < 0 else (8, list(int(tk.encode_rtt(row["rtt"])).to_bytes(2, "big")))
    elif name == "time":
        delta = row["event_time"] - (clock or 0)
        role, width = (5, 8) if clock is None else (6, 1) if delta < 256 else (7, 4)
        value = list(delta.to_bytes(width, "big"))
    else:
        role, value = address(row[f"{name}_addr"], {"src": 1, "dst": 3}[name])
    return [role, *(tk.BYTE_0 + byte for byte in value)]


def chain(gpt, prompt: list[int], row: dict, order, clock: int | None) -> float:
    """log P of the fields in order after a prompt: no cache, a softmax over what competes at each token."""
    tokens, competing = [*prompt, tk.MEASUREMENT_START], []
    for name in order:
        encoded = field_tokens(row, name, clock)
        roles = ROLES[name] if name != "time" else (5,) if clock is None else (6, 7)
        competing += [list(roles), *([list(BYTES)] * (len(encoded) - 1))]
        if encoded[0] in (2, 4) and encoded[1:12] == [tk.BYTE_0] * 10 + [tk.BYTE_0 + 255]:
            competing[-5] = list(BYTES)[:255]  # with 255 it would be an IPv4 address
        if encoded[0] == 5:
            competing[-8] = list(BYTES)[:128]  # of a time below 2^63
        if encoded[0] == 7:
            assert encoded[1] == encoded[2] == tk.BYTE_0
            competing[-2] = list(BYTES)[1:]  # of a delta above 255 s
        tokens += encoded
    with torch.no_grad():
        logits = gpt(torch.tensor([tokens]))[0].double()
    first = len(prompt)
    return sum(
        float(logits[first + i, allowed].log_softmax(-1)[allowed.index(tokens[first + i + 1])])
        for i, allowed in enumerate(competing)
    )


@pytest.mark.parametrize("fields", [("src", "dst", "rtt"), ("src", "dst", "rtt", "time"), ("dst", "rtt")])
def test_log_prob_is_the_chain_of_its_tokens_in_every_order(model, fields):
    for order in permutations(fields):
        expected = [chain(model.gpt, [], row, order, None) for row in MEASUREMENTS]
        np.testing.assert_allclose(model.log_prob(MEASUREMENTS, order), expected, rtol=1e-5)


@pytest.mark.parametrize("order", [("src", "dst", "rtt"), ("rtt", "time", "dst", "src"), ("time", "src")])
def test_log_prob_after_a_context_goes_on_from_its_tokens_and_its_clock(model, order):
    first, *others = MEASUREMENTS
    names = ("src", "dst", "time", "rtt") if "time" in order else ("src", "dst", "rtt")
    prompt = [tk.MEASUREMENT_START, *(token for name in names for token in field_tokens(first, name, None))]
    clock = first["event_time"]
    expected = [chain(model.gpt, prompt, row, order, clock) for row in others]
    # 100 s take one byte, 9,000 s in four.
    np.testing.assert_allclose(model.log_prob(others, order, [first]), expected, rtol=1e-5)


def test_the_probabilities_of_all_results_sum_to_one(model):
    rtt_ms = np.append(tk.decode_rtt(np.arange(tk.RTT_CODES)), -1.0)
    table = pa.table({"src_addr": ["192.0.2.1"] * len(rtt_ms), "dst_addr": ["192.0.2.2"] * len(rtt_ms), "rtt": rtt_ms})
    assert np.exp(model.log_prob(table, ("rtt",))).sum() == pytest.approx(1, abs=1e-6)


def test_a_long_context_keeps_the_most_recent_that_fit(model):
    rows = [MEASUREMENTS[0] | {"event_time": 10**9 + 1000 * i, "rtt": float(i + 1)} for i in range(40)]
    query, order = [MEASUREMENTS[0]], ("time", "src", "dst", "rtt")
    together = model.log_prob(query, order, rows)
    alike = [count for count in range(1, 41) if model.log_prob(query, order, rows[-count:]) == pytest.approx(together)]
    assert alike == list(range(min(alike), 41)) and 3 <= min(alike) <= 6


def test_order_consistency_is_the_spread_over_all_orders(model):
    consistency = model.order_consistency(MEASUREMENTS)
    by_hand = np.array([model.log_prob(MEASUREMENTS, order) for order in permutations(("src", "dst", "rtt"))])
    assert consistency.std_nats == pytest.approx(by_hand.std(axis=0).mean())
    assert consistency.std_nats > 0.1  # a random model is far from consistent
    assert list(consistency.mean_log_prob.values()) == pytest.approx(by_hand.mean(axis=1))
    assert list(consistency.mean_log_prob)[3] == "dst rtt src"


def test_score_asks_after_the_last_measurements_of_the_same_source(model):
    rng = np.random.default_rng(0)
    rows = [
        {
            "src_addr": f"192.0.2.{1 + i % 2}",
            "dst_addr": f"198.51.100.{rng.integers(1, 9)}",
            "rtt": -1.0 if i % 5 == 0 else float(rng.lognormal(3)),
            "event_time": 10**9 + int(rng.integers(10**6)),
            "note": i,
        }
        for i in range(12)
    ]
    knowing = random_model(16, 128, knows_bytes=True)
    scored = knowing.score(pa.Table.from_pylist(rows), anomaly_at=0.3).to_pylist()  # six of a source fit a window
    assert [row["note"] for row in scored] == list(range(12))
    for row, line in zip(rows, scored, strict=True):
        earlier = [r for r in rows if r["src_addr"] == row["src_addr"] and r["event_time"] < row["event_time"]]
        context = sorted(earlier, key=lambda r: r["event_time"])
        distribution = knowing.rtt(row["src_addr"], row["dst_addr"], row["event_time"], context)
        assert line["nll_nats"] == pytest.approx(-distribution.log_density(row["rtt"]), abs=1e-4)
        assert (line["pit"] is None) == (row["rtt"] < 0)
        if row["rtt"] > 0:
            assert line["pit"] == pytest.approx(distribution.cdf(row["rtt"]), abs=1e-4)
        assert line["anomaly"] == (line["p_value"] <= 0.3)


def test_without_times_the_past_is_what_stands_before():
    knowing = random_model(16, 128, knows_bytes=True)
    rows = [{name: row[name] for name in ("src_addr", "dst_addr", "rtt")} for row in MEASUREMENTS]
    last = knowing.score(rows)[-1]
    distribution = knowing.rtt(rows[2]["src_addr"], rows[2]["dst_addr"], context=rows[:2])
    assert last["nll_nats"] == pytest.approx(-distribution.log_density(80.0), abs=1e-4)


def test_p_values_are_read_against_those_of_val(model):
    own = np.array([row["p_value"] for row in model.score(MEASUREMENTS)])
    surprise = Surprise.fit(np.linspace(0, 0.5, 10_001))  # val was more surprising than the model says
    calibrated = dataclasses.replace(model, calibration=Calibration(surprise=surprise)).score(MEASUREMENTS)
    assert [row["p_value"] for row in calibrated] == pytest.approx(np.minimum(2 * own, 1), abs=0.01)
    flagged = dataclasses.replace(model, calibration=Calibration()).score(MEASUREMENTS, anomaly_at=float(own[0]))
    assert flagged[0]["anomaly"] is True


def test_what_was_scored_before_is_scored_anew_under_the_same_names(model):
    old = pa.Table.from_pylist([row | {"p_value": "old", "pit": "old", "anomaly": "old"} for row in MEASUREMENTS])
    scored, fresh = model.score(old, anomaly_at=0.3), model.score(pa.Table.from_pylist(MEASUREMENTS), anomaly_at=0.3)
    assert sorted(scored.column_names) == sorted(fresh.column_names)
    assert scored.select(fresh.column_names).equals(fresh)
    assert model.score(old).column("anomaly").to_pylist() == ["old"] * len(MEASUREMENTS)  # was not asked for


def test_no_measurements_are_scored_as_none(model):
    nothing = pa.table({name: pa.array([], kind) for name, kind in (("src_addr", "string"), ("dst_addr", "string"))})
    scored = model.score(nothing.append_column("rtt", pa.array([], "double")))
    assert scored.num_rows == 0 and {"nll_nats", "pit", "p_value"} < set(scored.column_names)
    assert model.log_prob([]).shape == (0,)


def test_a_dump_and_its_rows_are_the_same_table(tmp_path):
    results = [ping(prb_id=1 + i % 2, src_addr=f"192.0.2.{1 + i % 2}", timestamp=10**9 + 240 * i) for i in range(6)]
    dump = write(tmp_path / "dump.json.bz2", ndjson(*results))
    prepare([str(dump)], tmp_path / "rows", split="none", workers=1)
    tables = [dump_table(path).sort_by("event_time") for path in (dump, tmp_path / "rows")]
    assert tables[0].equals(tables[1]) and tables[0].num_rows == 6
    assert set(tables[0].column("src_addr").to_pylist()) == {"192.0.2.1", "192.0.2.2"}
    assert tables[0].column("event_time").cast("int64").to_pylist() == [10**9 + 240 * i for i in range(6)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.log_prob(MEASUREMENTS, ("src", "dest")), "must hold some of src, dst, rtt, time"),
        (lambda m: m.log_prob(MEASUREMENTS, ("src", "src")), "each at most once"),
        (lambda m: m.log_prob([{**MEASUREMENTS[0], "rtt": -2}]), "row 1: rtt -2 must be ms"),
        (lambda m: m.log_prob([*MEASUREMENTS, {**MEASUREMENTS[0], "dst_addr": "x"}]), "row 4: 'x' is not an IPv4"),
        (
            lambda m: m.log_prob([{"src_addr": "::1", "dst_addr": "::2", "rtt": 1}], ("time",)),
            "no column event_time; add it",
        ),
        (lambda m: m.log_prob(MEASUREMENTS[:1], ("time", "rtt"), MEASUREMENTS[1:]), "not earlier than the query"),
        (
            lambda m: m.log_prob(MEASUREMENTS, context=[{**MEASUREMENTS[0], "src_addr": "192.0.2.9"}]),
            "holds a ping of 192.0.2.9, but the query is about 192.0.2.1",
        ),
        (lambda m: m.score(MEASUREMENTS, history=-1), "history=-1 must be"),
        (lambda m: m.score(MEASUREMENTS, anomaly_at=5), "anomaly_at=5 must be"),
        (lambda m: m.score([{"src_addr": "192.0.2.1", "rtt": 1.0}]), "no column dst_addr"),
        (lambda m: m.score([{**MEASUREMENTS[0], "event_time": "soon"}]), "row 1: 'soon' is not a time"),
        (lambda m: m.order_consistency([]), "no measurements"),
    ],
)
def test_bad_measurements_are_one_clear_error(model, call, message):
    with pytest.raises(ValueError, match=r".") as error:
        call(model)
    assert message in str(error.value) and "\n" not in str(error.value)
