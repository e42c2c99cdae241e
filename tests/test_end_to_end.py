"""The whole line, as a user runs it: synth → prepare → train → ask, and the model has learned something."""

import json

import numpy as np
import pytest

from ping_llm import PingModel, cli, demo
from ping_llm.data.rows import read_manifest


def command(*argv):
    assert cli.main([str(word) for word in argv]) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """dump, rows and run of a small synthetic Internet, after 250 steps: a minute on two cores."""
    out = tmp_path_factory.mktemp("world")
    command("synth", "--out", out / "dump", "--probes", 16, "--targets", 8, "--days", 4, "--workers", 2)
    command("prepare", out / "dump", "--out", out / "rows", "--workers", 2)
    config = out / "tiny.toml"
    config.write_text(
        "[model]\nn_layer = 3\nn_embd = 128\nn_head = 2\nseq_len = 192\n[loss]\nrtt = 3.0\n[train]\nbatch_size = 16\n"
    )
    options = ["--data.rows", out / "rows", "--train.run-dir", out / "run", "--train.total-steps", 250]
    command("train", config, *options)
    return out


@pytest.fixture(scope="module")
def history(world):
    return demo.History.load(world / "rows")


def ends(history, part):
    row = history.table.slice(int(history.queries(part, 1)[0]), 1).to_pylist()[0]
    return [demo.format_address(row[name]) for name in ("src", "dst")]


@pytest.mark.slow
def test_every_line_of_the_dump_is_counted_and_every_measurement_is_in_one_part(world, history):
    manifest = read_manifest(world / "rows")
    assert sum(manifest["lines"]["counters"].values()) == manifest["lines"]["read"]
    assert sum(manifest["parts"].values()) == manifest["measurements"]["written"] == len(history.table)


@pytest.mark.slow
def test_the_model_beats_the_global_median_three_times_over_on_the_future_of_seen_pairs(world, history):
    model, rtt_ms = PingModel.load(world / "run"), history.table.column("rtt_ms").to_numpy()
    places = history.queries("test-s1", 100)
    predicted = np.array([law.median for law in demo.ask(model, history, places, with_context=True)])
    error = np.median(np.abs(predicted - rtt_ms[places]) / rtt_ms[places])
    guess = np.median(rtt_ms[(history.part == "train") & (rtt_ms > 0)])
    assert error < np.median(np.abs(guess - rtt_ms[places]) / rtt_ms[places]) / 3


@pytest.mark.slow
def test_rtt_json_tells_the_whole_answer(world, history, capsys):
    src, dst = ends(history, "test-s1")
    capsys.readouterr()
    command("inference", "rtt", "--model", world / "run", "--src", src, "--dst", dst, "--at", "2026-01-05", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) >= {"p_fail", "median_ms", "mean_ms", "quantiles", "total_probability", "forward_passes"}
    assert answer["forward_passes"] == 2 and answer["context_measurements"] == 0
    assert (
        0.5 < answer["total_probability"] <= 1 and 0 < answer["p_fail"] < 1
    )  # a minute's training, not the demo's three
    quantiles = list(answer["quantiles"].values())
    assert quantiles == sorted(quantiles) and answer["quantiles"]["0.5"] == answer["median_ms"]


@pytest.mark.slow
def test_rtt_draws_its_answer_beside_the_truth(world, history, tmp_path, capsys):
    src, dst = ends(history, "test-s1")
    plot, truth = tmp_path / "rtt.png", world / "dump" / "truth.json"
    asked = ["--src", src, "--dst", dst, "--at", "2026-01-05T06:00:00Z", "--plot", plot, "--truth", truth]
    command("inference", "rtt", "--model", world / "run", *asked)
    assert "true law" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_training_again_into_a_finished_run_takes_no_step_and_another_config_is_refused(world, capsys):
    again = [
        world / "tiny.toml",
        "--data.rows",
        world / "rows",
        "--train.run-dir",
        world / "run",
        "--train.total-steps",
        250,
    ]
    log = (world / "run" / "metrics.jsonl").read_text()
    command("train", *again)
    assert (world / "run" / "metrics.jsonl").read_text() == log
    assert cli.main([str(word) for word in ("train", *again, "--model.n-layer", 2)]) == 1
    assert "holds a run with another model.n_layer" in capsys.readouterr().err
