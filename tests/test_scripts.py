"""Every script starts, runs to its end, and writes what it measured."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import make_row, write_rows
from paths import SCRIPTS

from ping_llm.cli import exit_code
from ping_llm.config import Config, ModelConfig
from ping_llm.data.measurement import is_ipv4

RUN_ELSEWHERE = {
    "bench_train": "training/test_bench_train.py",
    "profile_training": "training/test_bench_train.py",
    "train_variants": "training/test_bench_train.py",
    "draw_docs": "test_docs.py",
    "eval_conditional_rtt": "eval/test_eval_scripts.py",
    "eval_partial_ip": "eval/test_eval_scripts.py",
    "train/modal_wrapper": "launch/test_modal.py",
}
NEEDS_MORE = {"mutants": "mutmut, which is no part of what the tests need"}
sys.path.append(str(SCRIPTS))  # as for the scripts themselves, and for the processes that they start
CONFIG = "[model]\nn_layer = 1\nn_embd = 32\nn_head = 2\nseq_len = 256\n"


def measured(script: ModuleType, folder: Path, *argv: object) -> dict:
    """What a script writes as JSON; numbers in it are finite."""
    path = folder / "numbers.json"
    assert exit_code(lambda: script.main([*map(str, argv), "--json", str(path)])) == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_every_script_is_run_by_a_test():
    here = {name.removeprefix("test_").removesuffix("_measures") for name in globals() if name.startswith("test_")}
    scripts = {str(path.relative_to(SCRIPTS).with_suffix("")) for path in SCRIPTS.rglob("*.py")}
    assert scripts - here == set(RUN_ELSEWHERE) | set(NEEDS_MORE)
    for name, file in RUN_ELSEWHERE.items():
        assert name.rpartition("/")[2] in (SCRIPTS.parent / "tests" / file).read_text()


@pytest.mark.slow
def test_bench_loader_measures(tmp_path, monkeypatch):
    script = importlib.import_module("bench_loader")
    config_of = script.config_of

    def few_and_short(*given) -> Config:
        config = config_of(*given)
        model, train = ModelConfig(seq_len=96), dataclasses.replace(config.train, batch_size=16)
        return dataclasses.replace(config, model=model, train=train)

    monkeypatch.setattr(script, "config_of", few_and_short)
    monkeypatch.setattr(script, "LARGEST_ROW", 100_000)
    monkeypatch.setattr(script, "QUICK", {"seconds": 0.01, "rounds": 1})
    numbers = measured(script, tmp_path, "--quick")
    of_kinds = [numbers["small rows"], numbers["8 MB rows"]]
    assert numbers["tokens_per_s_per_worker"] == min(one["tokens_per_s_per_worker"] for one in of_kinds) > 0
    for one in of_kinds:
        assert one["scaling_2_workers"] == round(one["tokens_per_s_2_workers"] / one["tokens_per_s_per_worker"], 2)
        assert set(one["us_per_window"]) == {"read", "decode", "sample", "encode", "batch", "transfer"}
    assert numbers["encoder_ratio_to_plain"] > 0 and 0 <= numbers["padding"] < 1


@pytest.mark.slow
def test_bench_prepare_measures(tmp_path, monkeypatch):
    script = importlib.import_module("bench_prepare")
    monkeypatch.setattr(script, "DAYS", 0.05)
    monkeypatch.setattr(script, "QUICK_PROBES", 8)
    monkeypatch.setattr(script, "sagan_rate", lambda sample, folder: None)  # it is fetched from a package index
    numbers = measured(script, tmp_path, "--quick", "--results", 2_000)
    assert 0 < numbers["results"] < 8 * 50 * 2 and numbers["sagan_results_per_s"] is None
    assert numbers["memory_lines"] > numbers["memory_tenth_lines"] > 0
    assert numbers["peak_rss_mb"] > 50 and numbers["cpu_ratio_to_unpack"] > 0


@pytest.mark.slow
def test_bench_prepare_measures_how_time_and_memory_grow(tmp_path, monkeypatch):
    """The same results once and twice, in buckets by their size and in four."""
    script = importlib.import_module("bench_prepare")
    monkeypatch.setattr(script, "PROBES", 10)
    numbers = measured(script, tmp_path, "--scale", "--quick", "--results", 3_000)
    assert list(numbers)[1:5] == ["1x", "2x", "1x in 4 buckets", "2x in 4 buckets"]
    for once, twice in (("1x", "2x"), ("1x in 4 buckets", "2x in 4 buckets")):
        once, twice = numbers[once], numbers[twice]
        assert twice["lines"] == 2 * once["lines"] == 2 * numbers["results"] > 0
        more = (twice["cpu_s"] - once["cpu_s"]) / once["lines"]
        assert twice["us_more"] == pytest.approx(1e6 * more, abs=1e6 * 0.1 / once["lines"])  # seconds are rounded
        assert min(once["peak_rss_mb"], twice["peak_rss_mb"]) > 50
    assert 0 < numbers["piece_measurements"] <= numbers["results"]
    for buckets in (4, 256, 6000):
        assert numbers[f"write_{buckets}_buckets_ms"] > 0 and numbers[f"read_{buckets}_buckets_us_a_batch"] > 0


@pytest.mark.slow
def test_bench_score_measures(tmp_path, monkeypatch):
    script = importlib.import_module("bench_score")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.toml").write_text(CONFIG)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "DEMO", tmp_path / "out" / "demo")
    numbers = measured(script, tmp_path, "--quick", "--device", "cpu")
    assert [(case["src_known"], case["history"]) for case in numbers["cases"]] == [
        ("all", script.HISTORY),
        ("all", 10),
        ("auto", script.HISTORY),
        ("auto", 10),
    ]
    for case in numbers["cases"]:
        assert case["least_ratio"] <= case["ratio"] <= case["most_ratio"] and case["mean_history"] > 5
        assert case["windows_nll"] == pytest.approx(case["prompts_nll"], abs=1.0)


@pytest.mark.parametrize(("ipv6_share", "count", "left"), [(1.0, 400, 0), (0.0, 12, 12)])
def test_bench_score_says_in_one_line_that_rows_hold_too_few_to_compare(tmp_path, capsys, ipv6_share, count, left):
    folder = write_rows(tmp_path, {"test-s1": [make_row(count, ipv6_share=ipv6_share)]}, shards=1)
    assert exit_code(lambda: importlib.import_module("bench_score").of_rows(folder, 60)) == 1
    assert capsys.readouterr().err == (
        f"error: {folder} holds only {left} measurements of IPv4 sources in test-s1, fewer than 23; "
        "name other rows with --rows\n"
    )


def test_bench_score_takes_the_measurements_of_ipv4_sources(tmp_path):
    rows = [make_row(400, seed=i, probe_id=i) for i in range(5)]
    measured = importlib.import_module("bench_score").of_rows(write_rows(tmp_path, {"test-s1": rows}, shards=1), 60)
    assert len(measured) == 60 and is_ipv4(measured.src).all()


@pytest.mark.slow
def test_bench_inference_measures(tmp_path, monkeypatch, capsys):
    script = importlib.import_module("bench_inference")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.toml").write_text(CONFIG)
    monkeypatch.setattr(script, "ROOT", tmp_path)  # a checkout where `make demo` has not run
    monkeypatch.setattr(script, "QUICK_QUERIES", 40)
    numbers = measured(script, tmp_path, "--quick", "--device", "cpu")
    assert numbers.pop("model") == "untrained model of the size of tiny" and numbers.pop("precision") == "fp32"
    assert numbers.pop("threads") == script.THREADS and len(numbers) == 7
    for label, pair in numbers.items():
        assert len(pair["ratios"]) == 2 and min(pair["ms"] + pair["ratios"]) > 0, label
    assert "destination /20 ÷ /16, auto" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_serve_measures(tmp_path, monkeypatch, capsys):
    script = importlib.import_module("bench_serve")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.toml").write_text(CONFIG)
    monkeypatch.setattr(script, "ROOT", tmp_path)  # a checkout where `make demo` has not run
    monkeypatch.setattr(script, "QUICK_QUERIES", 2)
    numbers = measured(script, tmp_path, "--quick", "--clients", 1, 2)
    assert list(numbers) == [f"{what}, {count} clients" for what in ("whole", "statistics") for count in (1, 2)]
    for one in numbers.values():
        assert 0 < one["p50_ms"] <= one["p99_ms"] and len(one["ratios"]) == 1
        assert one["ratios"][0] == pytest.approx(one["queries_per_s"] / one["library_queries_per_s"])
        assert one["cpu_ms"] > 0 and one["library_cpu_ms"] > 0
    looks = measured(script, tmp_path, "--soak", 0.02)["looks"]
    assert len(looks) >= 4 and looks[-1]["answers"] > 0 and looks[-1]["files"] > 5 and looks[-1]["rss_mb"] > 50


@pytest.mark.slow
def test_bench_finetune_measures(tmp_path, monkeypatch, capsys):
    from finetune_runs import base_config

    from ping_llm.training import finetune as finetuning
    from ping_llm.training.trainer import train

    script = importlib.import_module("bench_finetune")
    (tmp_path / "old").mkdir()
    rows = write_rows(tmp_path / "old", {"train": [make_row(300)], "val": [make_row(200, 1)]}, shards=1)
    train(base_config(tmp_path / "base", rows, total_steps=2))
    monkeypatch.setattr(finetuning, "WINDOWS", 4)
    monkeypatch.setattr(finetuning, "QUERIES", 4)
    monkeypatch.setattr("ping_llm.training.samples.MEASUREMENTS", 40)
    numbers = measured(script, tmp_path, "--quick", "--base", tmp_path / "base")
    assert list(numbers) == list(script.CASES)
    for one in numbers.values():
        assert one["seconds"] > 0
        for name in finetuning.FINETUNED:
            assert one["new"][name][0] != one["new"][name][1] and len(one["old"][name]) == 2
    assert capsys.readouterr().out.count("median error") >= 2 * len(script.CASES)


def test_bench_watch_measures(tmp_path, monkeypatch, capsys):
    script = importlib.import_module("bench_watch")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.toml").write_text(CONFIG)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "DEMO", tmp_path / "out" / "demo")
    for name, smaller in (("QUICK_PAIRS", 5), ("RESULTS", 36), ("ONSETS", (20, 22))):
        monkeypatch.setattr(script, name, smaller)
    numbers = measured(script, tmp_path, "--quick")
    assert numbers["pairs"] == 5 and 170 < numbers["results"] <= 180 and numbers["ms_a_result"] > 0
    for one in (numbers["watch"], numbers["baseline"]):
        assert 100 < one["clean"] < 145 and [kind["of"] for kind in one["found"].values()] == [1, 1, 1, 1]
    assert numbers["baseline"]["found"]["outage"] == {"of": 1, "found": 1, "median": 1, "q90": 1}
    assert "RTT + 20 %" in capsys.readouterr().out


def test_bench_watch_puts_in_what_it_says_and_counts_it_from_the_first_odd_result(tmp_path, monkeypatch):
    script = importlib.import_module("bench_watch")
    monkeypatch.setattr(script, "DEMO", tmp_path)
    monkeypatch.setattr(script, "load_config", lambda path: Config(model=ModelConfig(n_layer=1, n_embd=32, n_head=2)))
    _, truth, _ = script.load(None, None)
    lines, cases = script.happenings(truth, 20, 1)
    results = script.parse(lines, tmp_path / "lines")[0]
    for pair, case in cases.items():
        own = [result for result in results if script.ends(result) == pair]
        before = [rtt for one in own if one.time_s < case.onset_s for rtt in one.rtt_ms]
        after = [rtt for one in own if one.time_s >= case.onset_s for rtt in one.rtt_ms]
        lost = sum(rtt < 0 for rtt in after) / max(len(after), 1)
        assert sum(rtt < 0 for rtt in before) / len(before) < 0.3
        if case.kind == "nothing":
            assert not after
        elif case.kind == "outage":
            assert lost == 1
        elif case.kind == "half of the packets lost":
            assert 0.3 < lost < 0.75
        else:
            times = 1 + float(case.kind.split()[2]) / 100
            floor = [min(rtt for rtt in some if rtt > 0) for some in (before, after)]
            assert floor[1] == pytest.approx(times * floor[0], rel=0.04)
    one = next(pair for pair, case in cases.items() if case.kind == "outage")
    odd = [result.time_s for result in results if script.ends(result) == one and result.time_s >= cases[one].onset_s]
    found = script.judged(cases, results, [(one, odd[0] - 1), (one, odd[2]), (one, odd[5])])
    assert found["false_alarms"] == 1 and found["found"]["outage"] == {"of": 4, "found": 1, "median": 3, "q90": 3}
    assert script.judged(cases, results, [(one, odd[12])])["found"]["outage"]["found"] == 0


def test_bench_synth_measures(tmp_path):
    numbers = measured(importlib.import_module("bench_synth"), tmp_path, "--quick")
    ratio = numbers["results_per_s"] / numbers["json_dumps_results_per_s"]
    assert numbers["results"] > 1000 and numbers["ratio_to_json_dumps"] == pytest.approx(ratio, rel=0.01)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    rows = [make_row(200 + 50 * i, seed=i, probe_id=i) for i in range(4)]
    return write_rows(tmp_path_factory.mktemp("rows"), {"train": rows}, shards=1)


def test_report_windows_measures(tmp_path, rows):
    numbers = measured(importlib.import_module("report_windows"), tmp_path, rows, "--seq-len", 96, "--windows", 1)
    modes = {mode: columns for mode, columns in numbers.items() if mode != "all"}
    assert numbers["all"]["windows"] == sum(one["windows"] for one in modes.values()) == 64 * 64
    for columns in modes.values():
        assert columns["measurements a window"] <= 96 / columns["tokens a measurement"]


def test_a_script_refuses_a_place_for_its_numbers_before_it_measures(tmp_path, capsys):
    script = importlib.import_module("bench_synth")
    assert exit_code(lambda: script.main(["--quick", "--json", str(tmp_path)])) == 1
    assert capsys.readouterr() == ("", f"error: {tmp_path} is a folder; name a file\n")


@pytest.mark.parametrize("name", ["bench_synth", "report_windows"])
def test_a_script_starts_as_a_program(name):
    import subprocess

    done = subprocess.run([sys.executable, SCRIPTS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout
