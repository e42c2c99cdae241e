"""Claims about what a model in training is measured on: the same windows and queries every time."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_row, write_rows
from training_runs import MODEL, metrics, write_config

from ping_llm.config import Config, DataConfig, TrainConfig, load_config
from ping_llm.data.rows import RowReader
from ping_llm.inference.model import PingModel
from ping_llm.model.gpt import GPT
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective
from ping_llm.training.trainer import train
from ping_llm.training.validation import ValQueries, describe

CPU = torch.device("cpu")
SIZES = (100, 200, 400, 800, 300, 1200)  # measurements of the probes of val: 3,000


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    val = [make_row(size, seed=i, probe_id=i) for i, size in enumerate(SIZES)]
    return write_rows(tmp_path_factory.mktemp("rows"), {"train": val[:1], "val": val})


def make_config(rows: Path, eval_queries: int) -> Config:
    train_config = TrainConfig(eval_queries=eval_queries, batch_size=4, device="cpu", precision="fp32")
    return Config(model=MODEL, data=DataConfig(rows=rows), train=train_config)


def outspoken_model() -> GPT:
    model, generator = GPT(MODEL), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def measurements(val: ValQueries) -> list[tuple]:
    """(time, source, destination, RTT) of each query."""
    return [
        (query.time_s, query.src.packed, query.dst.packed, rtt_ms)
        for query, rtt_ms in zip(val.queries, val.rtt_ms.tolist(), strict=True)
    ]


def test_queries_are_answered_pings_of_val_evenly_spread_and_the_same_every_time(rows):
    val = ValQueries.load(make_config(rows, 60))
    assert measurements(val) == measurements(ValQueries.load(make_config(rows, 60))) and len(val.queries) == 60
    places, first = {}, 0  # of each measurement among all of val
    for row in RowReader(rows, "val"):
        ends = (row.src_addresses[row.src], row.dst_addresses[row.dst])
        for i, (time_s, src, dst, rtt_ms) in enumerate(zip(row.time_s, *ends, row.rtt_ms.tolist(), strict=True), first):
            places[(int(time_s), src.tobytes(), dst.tobytes(), rtt_ms)] = i
        first += len(row)
    assert (val.rtt_ms > 0).all()
    queried = np.array([places[each] for each in measurements(val)])
    gaps = np.diff(queried)
    assert queried[0] < 100 and queried[-1] > 2900 and (gaps > 0).all() and gaps.max() < 3 * 3000 / 60
    shares = np.histogram(queried, np.cumsum([0, *SIZES]))[0]
    assert np.abs(shares - np.array(SIZES) / 50).max() <= 2
    assert all(not query.src.is_prefix and not query.dst.is_prefix for query in val.queries)


def test_no_more_queries_than_wanted_and_none_for_none(rows, tmp_path):
    assert ValQueries.load(make_config(rows, 0)) is None
    assert len(ValQueries.load(make_config(rows, 1)).queries) == 1
    assert len(ValQueries.load(make_config(rows, 10_000)).queries) < 3000  # all there are, without the failed ones
    silent = make_row(50)
    silent = dataclasses.replace(silent, rtt_ms=np.full_like(silent.rtt_ms, -1))
    folder = tmp_path / "silent"
    folder.mkdir()
    assert ValQueries.load(make_config(write_rows(folder, {"val": [silent]}, shards=1), 10)) is None


@pytest.mark.parametrize("count", [1, 4, 37])  # more than one pass of 32
def test_the_median_error_is_that_of_single_queries(rows, count):
    config, model = make_config(rows, count), outspoken_model()
    val, errors = ValQueries.load(config), []
    for query, rtt_ms in zip(val.queries, val.rtt_ms, strict=True):
        (distribution,) = PingModel(model, CPU).rtt_many([query], src_known="all")
        errors.append(abs(float(distribution.median) - rtt_ms) / rtt_ms)
    together = val.median_rel_error(Objective(config, model, Ranks(CPU)), Ranks(CPU))
    assert together == pytest.approx(sorted(errors)[(count - 1) // 2], rel=1e-4)  # of an even number the lower
    assert all(parameter.grad is None for parameter in model.parameters())


MEASUREMENT = re.compile(
    r"(\S+) +→ (\S+) +(no time|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) +(no answer|[\d.]+ ms) +-[\d.]+ nats"
)
ANSWER = re.compile(
    r"(\S+) → (\S+): ([\d.e+]+) ms \(5–95 % ([\d.e+]+)–([\d.e+]+), no answer ([\d.]+)%\); it was ([\d.e+]+) ms"
)


def assert_samples(lines: list[str], val: ValQueries) -> None:
    """Four measurements that could exist, and the answer to a query of val."""
    for line in lines[:4]:
        src, dst, _, _ = MEASUREMENT.fullmatch(line.strip()).groups()
        assert ipaddress.ip_address(src) and ipaddress.ip_address(dst)
    src, dst, median, low, high, failed, actual = ANSWER.fullmatch(lines[4]).groups()
    query = val.queries[0]
    assert ipaddress.ip_address(src) == ipaddress.ip_address(str(query.src))
    assert ipaddress.ip_address(dst) == ipaddress.ip_address(str(query.dst))
    assert float(low) <= float(median) <= float(high) and 0 <= float(failed) <= 100
    assert float(actual) == pytest.approx(val.rtt_ms[0], rel=1e-3)


def test_what_a_model_says_is_valid_and_repeats(rows):
    val, model = ValQueries.load(make_config(rows, 3)), outspoken_model()
    text = describe(model, val, seed=3)
    assert len(text.splitlines()) == 5 and text == describe(model, val, seed=3)
    assert text.splitlines()[0] != describe(model, val, seed=4).splitlines()[0]
    assert_samples(text.splitlines(), val)


def test_a_run_on_rows_evaluates_and_shows_samples_when_due(rows, tmp_path):
    limits = {"total_steps": 5, "eval_every": 2, "sample_every": 2, "eval_queries": 3}
    config = load_config(write_config(tmp_path / "config.toml", rows, **limits))
    train(config)
    lines = {line["step"]: line for line in metrics(tmp_path / "run")}
    values = {"val_loss", "val_loss_rtt", "val_rtt_bits", "val_median_rel_error"}
    assert [step for step, line in lines.items() if values <= line.keys()] == [0, 2, 4, 5]
    assert [step for step, line in lines.items() if values & line.keys()] == [0, 2, 4, 5]
    blocks = (tmp_path / "run" / "samples.txt").read_text().strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["step 2", "step 4", "step 5"]
    for block in blocks:
        assert_samples(block.splitlines()[1:], ValQueries.load(config))


def test_without_queries_no_error_is_logged(rows, tmp_path):
    config = load_config(write_config(tmp_path / "config.toml", rows, total_steps=1, eval_queries=0))
    train(config)
    assert all("val_median_rel_error" not in line for line in metrics(tmp_path / "run"))
    assert "val_loss" in metrics(tmp_path / "run")[-1] and not (tmp_path / "run" / "samples.txt").exists()
