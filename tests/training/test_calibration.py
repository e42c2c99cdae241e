"""What is fitted on val is found again where it is known, and weighs how much of a source is known."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_row
from training_runs import make_batches, make_config, val_windows, write_config

import ping_llm.inference.mixture as mixture
import ping_llm.training.calibration as calibration_module
import ping_llm.training.trainer as trainer
from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig, load_config
from ping_llm.data.rows import RowReader
from ping_llm.inference.calibration import CALIBRATION_NAME, LEAST_SHARE, Calibration, Surprise
from ping_llm.inference.context import Context
from ping_llm.inference.engine import ReadContexts
from ping_llm.inference.evidence import recalled
from ping_llm.inference.experts import LEAST_WEIGHT, Expert, Experts
from ping_llm.inference.familiar import Familiar
from ping_llm.inference.model import PingModel
from ping_llm.inference.packed import Windows, foresee
from ping_llm.inference.query import Endpoint
from ping_llm.inference.score import HISTORY
from ping_llm.model import checkpoint
from ping_llm.model.gpt import GPT
from ping_llm.training.calibration import (
    CONTEXT,
    calibrate,
    draw_results,
    sample_results,
    under_known_lengths,
    val_surprise,
)
from ping_llm.training.experts import LEAST_RESULTS
from ping_llm.training.trainer import Feed, train
from ping_llm.training.validation import ValQueries

SHARES = {"none": 0.05, "/8": 0.05, "/16": 0.1, "/24": 0.1, "all": 0.7}
PAST = [{"src_addr": "192.0.2.1", "dst_addr": "198.51.100.9", "rtt": 12.5}]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=128)).eval()
    for parameter in gpt.parameters():  # zero-initialised projections would make every answer alike
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt


@pytest.fixture
def config(rows_folder) -> Config:
    return Config(data=DataConfig(rows=rows_folder), train=TrainConfig(eval_queries=16))


def test_calibration_is_read_back_as_it_was_written(tmp_path):
    experts = Experts(
        {"pair": Expert((-2.0, 0.0), (0.1, 0.2), ((0.0,) * 4, (1.0,) * 4))}, ((0.5,) * 4,) * 2, {"pair": (0.25,) * 7}
    )
    surprise = Surprise(3, (0.1, 1.0), (0.2, 0.5), 0.8, -0.1)
    familiar = Familiar.of_rows([make_row(20)])
    calibration = Calibration({"ipv4": SHARES}, {"ipv6": {"all": 1.0}}, familiar, experts, surprise, "f" * 64)
    calibration.save(tmp_path)
    checkpoint = tmp_path / "checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    assert Calibration.load(tmp_path) == Calibration.load(checkpoint) == calibration
    assert Calibration.load(tmp_path / "checkpoints") == Calibration()
    parts = '"experts": {}', '"met": {"src": "?"}', '"p_values": {"count": 3}'
    for damaged in ("{}", "[]", *(f'{{"src_weights": {{}}, {part}}}' for part in parts)):
        (tmp_path / CALIBRATION_NAME).write_text(damaged)
        with pytest.raises(ValueError, match="is damaged; delete it"):
            Calibration.load(tmp_path)


def test_a_calibration_written_before_gives_its_weights_alone(tmp_path):
    old = {"src_weights": {"ipv4": SHARES}, "surprise": [0.1, 0.5], "familiar": {"ipv4": -12.5}}
    (tmp_path / CALIBRATION_NAME).write_text(json.dumps(old))
    assert Calibration.load(tmp_path) == Calibration({"ipv4": SHARES})


def saved_run(run_dir: Path, losses: dict[int, float]) -> dict[int, str]:
    """A run folder with checkpoints by step and val loss; the hash of the weights of each."""
    config = Config(model=ModelConfig(n_layer=1, n_embd=16, n_head=2, seq_len=64))
    checkpoint.save_config(run_dir, config)
    hashes = {}
    for step, val_loss in losses.items():
        weights = GPT(config.model, generator=torch.Generator().manual_seed(step)).state_dict()
        folder = checkpoint.save(run_dir, step, weights, {}, {"val_loss": val_loss})
        hashes[step] = json.loads((folder / checkpoint.STATE_NAME).read_text())["sha256"][checkpoint.MODEL_NAME]
    return hashes


def test_only_the_checkpoint_that_a_calibration_was_fitted_for_takes_it(tmp_path, caplog):
    hashes = saved_run(tmp_path, {1: 1.0, 2: 2.0})
    calibration = Calibration({"ipv4": SHARES}, model_sha256=hashes[1])
    calibration.save(tmp_path)
    assert PingModel.load(tmp_path).calibration == calibration
    assert PingModel.load(tmp_path / "checkpoints/step-00000001").calibration == calibration
    assert not caplog.records
    assert PingModel.load(tmp_path / "checkpoints/step-00000002").calibration == Calibration()
    (line,) = caplog.messages
    assert "fitted for another checkpoint" in line and "name the run folder" in line and "\n" not in line
    caplog.clear()
    dataclasses.replace(calibration, model_sha256=hashes[2]).save(tmp_path)  # then the run went on to a better one
    assert PingModel.load(tmp_path).calibration == Calibration() and len(caplog.records) == 1


def test_a_calibration_that_knows_no_checkpoint_is_that_of_the_run_folder(tmp_path, caplog):
    saved_run(tmp_path, {1: 1.0, 2: 2.0})
    calibration = Calibration({"ipv4": SHARES})
    calibration.save(tmp_path)
    assert PingModel.load(tmp_path).calibration == calibration and not caplog.records
    assert PingModel.load(tmp_path / "checkpoints/step-00000002").calibration == Calibration()
    assert len(caplog.records) == 1


def test_of_sources_that_training_has_not_met_the_shares_of_new_ones_count():
    row = make_row(20, ipv6_share=0)
    src = Endpoint.whole(row.src_addresses[0].tobytes())
    new = Endpoint.parse("203.0.113.250")
    shares = {"none": 0.5, "/16": 0.3, "all": 0.2}
    calibration = Calibration({"ipv4": SHARES}, {"ipv4": shares}, Familiar.of_rows([row]))
    assert not calibration.is_new(src) and calibration.is_new(new) and not calibration.is_new(new.cut(2))
    for end, own in ((src, SHARES), (new, shares)):
        known = [end.cut(length) for length in range(5)]
        assert np.exp(calibration.log_weights(known)) == pytest.approx([own.get(name, 0.0) for name in SHARES])
    assert not Calibration({"ipv4": SHARES}, {"ipv4": shares}).is_new(new)  # what was met is not known
    endpoints = [new.cut(length) for length in range(5)]
    assert np.exp(Calibration().log_weights(endpoints)) == pytest.approx([LEAST_SHARE] * 4 + [1.0])
    only_seen = Calibration({"ipv4": SHARES}, {}, Familiar.of_rows([row]))  # val had too few new ones
    assert np.exp(only_seen.log_weights(endpoints)) == pytest.approx(list(SHARES.values()))


def test_a_length_without_a_share_is_not_looked_at(gpt):
    model = PingModel(gpt, torch.device("cpu"), Calibration({"ipv4": {"/16": 0.4, "all": 0.6}}))
    assert dict(model.rtt("192.0.2.1", "198.51.100.7").src_weights) == pytest.approx({"/16": 0.4, "all": 0.6})
    assert dict(model.rtt("192.0.2.1", "198.51.100.7", context=PAST).src_weights).keys() == {"/16", "all"}
    alone = PingModel(gpt, torch.device("cpu"), Calibration({"ipv4": {"all": 1.0}}))
    same = alone.rtt("192.0.2.1", "198.51.100.7", src_known="all").code_probability
    np.testing.assert_array_equal(alone.rtt("192.0.2.1", "198.51.100.7").code_probability, same)


def test_all_that_is_told_of_a_prefix_counts_for_the_longer_ones_too():
    endpoints = [Endpoint.parse("192.0.0.0/16").cut(length) for length in range(3)]
    assert np.exp(Calibration({"ipv4": SHARES}).log_weights(endpoints)) == pytest.approx([0.05, 0.05, 0.9])


@pytest.mark.parametrize("best", ["none", "/16", "all"])
def test_the_length_that_makes_the_context_likely_is_the_one_that_answers(gpt, monkeypatch, best):
    read = mixture.read_contexts
    model = PingModel(gpt, torch.device("cpu"), Calibration({"ipv4": SHARES}))
    likelihood = np.where(np.array(list(SHARES)) == best, -3.0, -6.0)  # known lengths come in this order

    def with_likelihood(reader, contexts, likelihoods) -> ReadContexts:
        assert len(contexts) == len(SHARES)
        return dataclasses.replace(read(reader, contexts), log_likelihood=likelihood)

    monkeypatch.setattr(mixture, "read_contexts", with_likelihood)
    distribution = model.rtt("192.0.2.1", "198.51.100.7", context=PAST)
    posterior = np.array(list(SHARES.values())) * np.exp(likelihood)
    assert list(distribution.src_weights.values()) == pytest.approx(posterior / posterior.sum(), rel=1e-3)
    assert max(distribution.src_weights, key=distribution.src_weights.get) == best


def test_the_grams_are_those_of_the_answers_under_each_known_length(gpt, config):
    found = draw_results(config.data.rows, 30, np.random.default_rng(0))
    rows = [i for i, query in enumerate(found.queries) if query.src.width == 4][:6]
    some = found.take(np.array(rows))
    for i, query in enumerate(some.queries):  # so that as much of the context fits whatever is known of the source
        latest = slice(max(0, len(query.context) - 3), None)
        some.queries[i] = dataclasses.replace(query, context=query.context.take(latest))
    names, gram, evidence = under_known_lengths(PingModel(gpt, torch.device("cpu")), some)
    assert names == list(SHARES) and gram.shape == (len(rows), 5, 5) and evidence.shape == (len(rows), 5)
    for i, query in enumerate(some.queries):
        for place, known in enumerate(("none", 8, 16, 24, "all")):
            exact = PingModel(gpt, torch.device("cpu"), least_mass=1.0).rtt_many([query], known)[0]
            assert gram[i, place, place] == pytest.approx(exact.crps(np.exp(some.log_ms[i])), rel=0.01)
        assert (len(query.context) == 0) == (not evidence[i].any())


def test_results_are_drawn_evenly_from_the_parts_of_val_without_context_with_it_and_with_that_of_other_networks(config):
    found = draw_results(config.data.rows, 300, np.random.default_rng(0))
    parts = RowReader(config.data.rows, "val").parts
    counts = np.bincount(found.part, minlength=len(parts))
    assert (counts <= -(-300 // len(parts))).all() and (counts > 0).all()
    assert np.isfinite(found.log_ms).all()
    of_own = [
        (query.context.dst == np.frombuffer(query.dst.packed, np.uint8)).all(axis=1).any() for query in found.queries
    ]
    lengths = np.array([len(query.context) for query in found.queries])
    assert (lengths == 0).mean() > 0.3 and lengths.max() == CONTEXT and 0 < np.mean(of_own) < 0.4
    assert all((query.context.time_s < query.time_s).all() for query in found.queries if len(query.context))
    assert all(query.src.covers(query.context.src).all() for query in found.queries if len(query.context))


def test_calibration_is_of_the_results_of_val_with_their_past(gpt, config):
    calibration = calibrate(gpt, config, torch.device("cpu"), 400)
    again = calibrate(gpt, config, torch.device("cpu"), 400)
    assert calibration == again and calibration.surprise.count == RowReader(config.data.rows, "val").measurements.sum()
    assert calibration.src_weights or calibration.new_src_weights
    for weights in (*calibration.src_weights.values(), *calibration.new_src_weights.values()):
        assert sum(weights.values()) == pytest.approx(1) and min(weights.values()) >= LEAST_WEIGHT
    assert calibration.experts is not None and "pair" in calibration.experts.experts
    assert all(np.isfinite(own).all() for own in calibration.experts.odds.values())
    train = next(iter(RowReader(config.data.rows, "train")))
    assert not calibration.is_new(Endpoint.whole(train.src_addresses[0].tobytes()))
    queries, _ = sample_results(RowReader(config.data.rows, "val"), 32, np.random.default_rng(config.seed))
    assert max(len(query.context) for query in queries) == HISTORY


def test_a_known_length_with_a_small_share_is_none_and_too_few_results_give_no_shares(gpt, config, monkeypatch):
    names = ["none", "/8", "/16", "/24", "all"]
    monkeypatch.setattr(calibration_module, "under_known_lengths", lambda *_: (names, None, None))
    shares = np.array([LEAST_WEIGHT * 0.99, 0.2, 0.2, 0.2, 0.4 - LEAST_WEIGHT * 0.99])
    monkeypatch.setattr(calibration_module, "fit_shares", lambda *_: shares)
    reader = PingModel(gpt, torch.device("cpu"))
    found = draw_results(config.data.rows, 300, np.random.default_rng(0))
    given = [own for weights in calibration_module.fit_src_weights(reader, found) for own in weights.values()]
    expected = dict(zip(names[1:], (shares[1:] / shares[1:].sum()).tolist(), strict=True))
    assert given and all(own == pytest.approx(expected) for own in given)
    few = found.take(np.arange(LEAST_RESULTS - 1))
    assert calibration_module.fit_src_weights(reader, few) == ({}, {})


@pytest.mark.parametrize("mesh", [0.0, 0.5])
def test_experts_are_fitted_to_queries_that_have_recalled_what_they_will_be_given(gpt, config, monkeypatch, mesh):
    """With other sources as evidence where the run learned from meshes, as a model of the run is loaded."""
    seen = []

    def fit_nothing(reader, found):
        seen.append((reader.memory, found.queries))

    monkeypatch.setattr(calibration_module, "fit_experts", fit_nothing)
    monkeypatch.setattr(calibration_module, "fit_src_weights", lambda reader, found: ({}, {}))
    monkeypatch.setattr(calibration_module, "val_surprise", lambda *_: None)
    meshed = dataclasses.replace(config, data=dataclasses.replace(config.data, mesh=mesh))
    calibrate(gpt, meshed, torch.device("cpu"), 60)
    ((memory, queries),) = seen
    assert memory.other_sources is (mesh > 0) and len(memory) == RowReader(config.data.rows, "train").measurements.sum()
    drawn = draw_results(config.data.rows, 60, np.random.default_rng(config.seed)).queries
    expected = recalled(memory, drawn, gpt.config.seq_len)
    assert [len(query.context) for query in queries] == [len(query.context) for query in expected]
    assert sum(len(query.context) for query in queries) > sum(len(query.context) for query in drawn)


def test_p_values_are_fitted_to_as_many_results_of_val_as_are_wanted_or_to_all(gpt, config, caplog, monkeypatch):
    rows = RowReader(config.data.rows, "val")
    reader, rng = PingModel(gpt, torch.device("cpu")), np.random.default_rng(0)
    monkeypatch.setattr(calibration_module, "_STRETCH", 4)
    some = val_surprise(reader, rows, 40, rng)
    assert 40 <= some.count < rows.measurements.sum()
    caplog.clear()
    every = val_surprise(reader, rows, 10**6, rng)
    assert every.count == rows.measurements.sum() and "all " in caplog.text
    own = []
    for row in rows:
        measured = Context.of_measurements(row.to_measurements())
        own.append(foresee(reader, Windows(measured, HISTORY, reader.seq_len))[1].p_value)
    # Stretches see the end of the history before them, so only their windows begin elsewhere.
    expected = Surprise.fit(np.concatenate(own))
    assert every.quantiles[20:] == pytest.approx(expected.quantiles[20:], rel=0.2)


def test_a_run_that_is_over_leaves_its_calibration_and_one_that_is_stopped_none(tmp_path, rows_folder, monkeypatch):
    monkeypatch.setattr(trainer, "write_report", lambda run_dir: run_dir)  # its plots take seconds
    config = load_config(write_config(tmp_path / "config.toml", rows_folder, total_steps=2))

    def stopping(*args):
        for number, batch in enumerate(make_batches(*args)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    stopped = dataclasses.replace(
        config, train=dataclasses.replace(config.train, total_steps=9, run_dir=tmp_path / "s")
    )
    assert train(stopped, Feed(stopping, val_windows, ValQueries.load)).step == 2
    assert not (tmp_path / "s" / CALIBRATION_NAME).exists()
    train(config, Feed(make_batches, val_windows, ValQueries.load))
    found = Calibration.load(config.train.run_dir)
    assert found.familiar is not None
    assert found.surprise.count == RowReader(rows_folder, "val").measurements.sum()
    (folder,) = (config.train.run_dir / "checkpoints").glob("step-*2")
    assert found.model_sha256 == json.loads((folder / "state.json").read_text())["sha256"]["model.safetensors"]
    assert PingModel.load(config.train.run_dir).calibration == found
    dataclasses.replace(found, model_sha256="of another").save(
        config.train.run_dir
    )  # as if it was stopped before it fitted
    train(config, Feed(make_batches, val_windows, ValQueries.load))
    assert Calibration.load(config.train.run_dir).model_sha256 == found.model_sha256
    quiet = make_config(tmp_path / "quiet", total_steps=1)
    train(quiet, Feed(make_batches, val_windows, lambda config: None))
    assert not (tmp_path / "quiet" / CALIBRATION_NAME).exists()
