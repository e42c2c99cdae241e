"""The model's scores in PingBench are those of its single answers, query for query."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_rows

from ping_llm.config import ModelConfig
from ping_llm.data.measurement import format_address, pack_address
from ping_llm.data.rows import ProbeRow
from ping_llm.eval.columns import Measurements
from ping_llm.eval.metrics import QUANTILE_LEVELS
from ping_llm.eval.model import ModelMethods, fitted, model_queries
from ping_llm.eval.queries import Seen, SplitQueries, learned_from
from ping_llm.inference.memory import Memory
from ping_llm.inference.model import PingModel
from ping_llm.inference.prompt import build_prompt
from ping_llm.model.gpt import GPT


@pytest.fixture(scope="module")
def model() -> PingModel:
    gpt = GPT(ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=256)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in gpt.parameters():  # zero-initialised projections would make every answer alike
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return PingModel(gpt, torch.device("cpu"), least_mass=0.0)


@pytest.fixture(scope="module")
def queries():
    """Pings of three sources, one of them with an IPv6 destination, in no order; some fail."""
    rng = np.random.default_rng(0)
    texts = ["192.0.2.1", "192.0.2.2", "198.51.100.3", "203.0.113.4", "203.0.113.5", "2001:db8::6"]
    addresses = np.array([list(pack_address(text)) for text in texts], dtype=np.uint8)
    count = 120
    src, dst = rng.integers(0, 3, count), rng.integers(3, 6, count)
    rtt_ms = np.where(rng.random(count) < 0.2, -1, rng.lognormal(3, 1, count)).astype(np.float32)
    time_s = 1_700_000_000 + np.sort(rng.integers(0, 10_000, count))
    part = np.where(np.arange(count) < 60, 0, 1).astype(np.int8)
    columns = (src.astype(np.int32), dst.astype(np.int32), src.astype(np.int64), time_s, rtt_ms)
    table = Measurements(*columns, np.zeros(count, np.uint8), part, addresses, ("train", "external"))
    return SplitQueries.draw(table, Seen(learned_from(table)), "ping", "external", 24, seed=1).recent


def test_what_fits_is_what_the_prompt_of_the_model_holds(queries):
    """In 128 tokens a query of many IPv6 pings has no room for all of them; of one it is known which stay."""
    kept = fitted(queries, 128)
    assert (kept.context >= 0).sum() < (queries.context >= 0).sum()
    for i, query in enumerate(model_queries(queries)):
        prompt = build_prompt(query, 128)
        given = kept.context[i][kept.context[i] >= 0]
        assert len(given) == prompt.context_measurements
        assert np.isin(given, queries.context[i]).all() and (np.diff(given) < 0).all()
        again = build_prompt(model_queries(kept.take(slice(i, i + 1)))[0], 128)
        assert again.tokens.tolist() == prompt.tokens.tolist()
    assert fitted(queries, 4096).context.tolist() == queries.context.tolist()


def test_with_a_memory_the_scores_are_those_of_answers_that_look_into_it(model, queries, tmp_path):
    table = queries.measurements
    train = table.rows_of_part("train")
    ids = table.src_id[train].astype(np.int64), table.dst_id[train].astype(np.int64)
    zeros = np.zeros(len(train), dtype=np.int64)
    columns = (table.time_s[train], zeros, *ids, table.rtt_ms[train], zeros.astype(np.uint8))
    row = ProbeRow.from_codes(1, *columns, table.addresses, table.addresses)
    remembers = replace(model, memory=Memory.open(write_rows(tmp_path, {"train": [row]}, shards=1)))
    few = queries.given(0).take(slice(8))
    rng = np.random.default_rng(0)
    alone, scores = (ModelMethods(one, ("all",)).scores(few, rng)["ping-llm, source all"] for one in (model, remembers))
    answers = remembers.rtt_many(model_queries(few), "all")
    assert all(answer.context_measurements for answer in answers)
    np.testing.assert_allclose(scores.p_fail, [answer.p_fail for answer in answers], rtol=1e-3)
    assert (np.abs(scores.p_fail / alone.p_fail - 1) > 1e-2).any()


@pytest.mark.parametrize("src_known", ["all", "none", "auto"])
def test_scores_are_those_of_single_answers(model, queries, src_known):
    queries = queries.given(5)
    together = ModelMethods(model, ("all", "none", "auto")).scores(queries, np.random.default_rng(0))
    scores = together[f"ping-llm, source {src_known}"]
    table = queries.measurements
    text = [format_address(address.tobytes()) for address in table.addresses]
    assert (np.diff(queries.src_id) < 0).any() and (queries.rtt_ms < 0).any()  # they are put in order, and back
    for i, row in enumerate(queries.rows):
        context = [
            {"src_addr": text[table.src_id[j]], "dst_addr": text[table.dst_id[j]], "event_time": int(table.time_s[j])}
            | {"rtt": float(table.rtt_ms[j])}
            for j in queries.context[i][queries.context[i] >= 0][::-1]
        ]
        pair = text[table.src_id[row]], text[table.dst_id[row]], int(table.time_s[row])
        distribution, rtt_ms = model.rtt(*pair, context, src_known), float(table.rtt_ms[row])
        assert scores.p_fail[i] == pytest.approx(distribution.p_fail, rel=1e-3)
        assert scores.nll_nats[i] == pytest.approx(-distribution.log_density(rtt_ms), rel=1e-3, abs=1e-4)
        np.testing.assert_allclose(scores.quantiles_ms[i], distribution.quantile(np.array(QUANTILE_LEVELS)), rtol=1e-2)
        if rtt_ms > 0:
            assert scores.crps_log[i] == pytest.approx(distribution.crps(rtt_ms), rel=1e-3)
            assert scores.pit[i] == pytest.approx(distribution.pit(rtt_ms), abs=1e-2)
        else:
            assert np.isnan(scores.crps_log[i]) and np.isnan(scores.pit[i])
