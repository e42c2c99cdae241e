"""The rows of the demo's table are what their labels say."""

import json

import pyarrow as pa
import pytest

from ping_llm import demo
from ping_llm.cli import main
from ping_llm.config import parse_config
from ping_llm.data.ingest.splits import PARTS
from ping_llm.data.rows import RowReader
from ping_llm.demo import INTERNET
from ping_llm.demo import PARTS as SHOWN


def test_training_is_bound_by_its_steps_and_not_by_the_clock(tmp_path, monkeypatch, capsys):
    commands, clock = [], iter(range(0, 10_000, 1000))  # a machine on which every stage takes 1,000 s
    monkeypatch.setattr(demo.cli, "main", lambda command: commands.append(command))
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(clock))
    found = {"seen_pairs": {"model": 0.01, "global_median": 0.6, "queries": 1}}
    monkeypatch.setattr(demo, "evaluate", lambda out: (found, {"seen_pairs": 0.99}, []))
    monkeypatch.setattr(demo, "_print_report", lambda *report: None)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(demo.shutil, "rmtree", lambda *path, **options: None)
    demo.demo(tmp_path / "out", steps=7)
    (train,) = [command for command in commands if command[0] == "train"]
    assert train[train.index("--train.total-steps") + 1] == "7"
    assert not [word for word in train if "minutes" in word]
    config = parse_config(train[1:], "train")
    assert config.train.total_steps == 7 and config.train.max_minutes == config.train.target_tokens == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["steps"] == 7 and report["stages_s"]["train"] == 1000 and "cores" in report["machine"]
    assert "7 steps of training in 1000 s" in capsys.readouterr().out


SMALL = ("--probes", "60", "--targets", "40", "--days", "0.2")


@pytest.mark.parametrize("size", [SMALL, pytest.param(INTERNET, marks=pytest.mark.slow)])
def test_what_the_demo_calls_never_seen_is_nowhere_in_train(tmp_path, size):
    assert main(["synth", "--out", str(tmp_path / "dump"), *size, "--workers", "1"]) == 0
    assert main(["prepare", str(tmp_path / "dump"), "--out", str(tmp_path / "rows"), "--workers", "1"]) == 0
    tables = {
        part: pa.concat_tables([row.to_measurements() for row in RowReader(tmp_path / "rows", part)]) for part in PARTS
    }
    assert all(table.num_rows >= (100 if size == INTERNET else 1) for table in tables.values())
    src, dst = ({part: set(table[end].to_pylist()) for part, table in tables.items()} for end in ("src", "dst"))
    pairs = {
        part: set(zip(table["src"].to_pylist(), table["dst"].to_pylist(), strict=True))
        for part, table in tables.items()
    }
    assert not src[SHOWN["unseen_sources"]] & (src["train"] | dst["train"])
    unseen = pairs[SHOWN["unseen_pairs"]]
    assert not (unseen | {(d, s) for s, d in unseen}) & pairs["train"]
    hosts = src["train"] | dst["train"]
    assert all(s in hosts and d in hosts for s, d in unseen)
    assert pairs[SHOWN["seen_pairs"]] <= pairs["train"]
    train, later = (tables[part]["time_s"].to_numpy() for part in ("train", SHOWN["seen_pairs"]))
    assert train.max() < later.min()
