"""`make quality` gives the commands of the record run what they take, and refuses a folder without dumps in one line."""

import os
import subprocess
from dataclasses import replace

import pytest
import tyro
from paths import CONFIGS, ROOT

from ping_llm.cli import Prepare
from ping_llm.config import load_config, parse_config
from ping_llm.eval.options import EvalOptions
from ping_llm.inference.sources import PRETRAINED

WRITES_DOWN = '#!/bin/sh\nprintf "%s\\n" "$*" >>"$CALLS"\n'


@pytest.fixture
def make(tmp_path):
    """Runs a target with a Python that writes down how it was called."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(WRITES_DOWN)
    python.chmod(0o755)
    (tmp_path / "venv/installed").touch()  # newer than what it is made of

    def make(*words: str) -> subprocess.CompletedProcess:
        command = ["make", "--no-print-directory", f"VENV={tmp_path}/venv", *words]
        environment = os.environ | {"CALLS": str(tmp_path / "calls")}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return make


def test_quality_prepares_trains_and_evaluates_the_run_of_the_record(make, tmp_path, monkeypatch):
    for name in ("atlas", "more"):
        (tmp_path / "data" / name).mkdir(parents=True)
    done = make("quality", f"DATA={tmp_path}/data", "QUERIES=300")
    assert done.returncode == 0, done.stderr
    calls = [call.split()[2:] for call in (tmp_path / "calls").read_text().splitlines()]
    prepared, with_hops, trained, baselines, evaluated = calls
    assert [call[0] for call in calls] == ["prepare", "prepare", "train", "eval", "eval"]

    rows, hops = (tyro.cli(Prepare, args=call[1:]) for call in (prepared, with_hops))
    assert rows.inputs == (f"{tmp_path}/data/atlas", f"{tmp_path}/data/more")
    assert (rows.traceroute, rows.time_cut) == ("target", ("2020-02-16", "2020-02-19"))
    assert (
        replace(hops, traceroute="target", out=rows.out) == rows and hops.traceroute == "hops"
    )  # one split of one data
    monkeypatch.chdir(ROOT)
    config = parse_config(trained[1:], "train")
    assert config == load_config(CONFIGS / "quality.toml") and config.data.rows == rows.out
    assert config.data.replay == str(hops.out) != str(rows.out)

    first, then = (tyro.cli(EvalOptions, args=call[1:]) for call in (baselines, evaluated))
    first.check(), then.check()
    assert first.baselines_only and first.data == then.data == rows.out
    assert first.seq_len == then.seq_len == config.model.seq_len == 384
    assert (then.run, then.scores, then.src_known) == (config.train.run_dir, (first.out,), ("auto",))
    assert (then.counts, then.model_queries) == ((0, 10), 300)


def test_model_puts_the_run_of_the_record_into_the_package(make, tmp_path):
    done = make("--dry-run", "model")
    assert done.returncode == 0, done.stderr
    *_, export, swap = [line.strip() for line in done.stdout.replace("\\\n", " ").splitlines() if line.strip()]
    words = export.split()[3:]
    assert words[:2] == ["export", str(load_config(CONFIGS / "quality.toml").train.run_dir)]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options == {
        "--to": "out/pretrained", "--dtype": "bf16", "--rows": "data/quality", "--results": "runs/quality/eval",
        "--license": "mit",
    }  # fmt: skip
    assert swap.endswith(f"mv out/pretrained {PRETRAINED.relative_to(ROOT)}")


def test_a_folder_without_dumps_is_one_clear_line_before_anything_is_installed(make, tmp_path):
    (tmp_path / "venv/installed").unlink()
    (tmp_path / "data/atlas").mkdir(parents=True)
    done = make("quality", f"DATA={tmp_path}/data")
    line = f"no folder {tmp_path}/data/more of dumps; say where they are: make quality DATA=path/to/data\n"
    assert done.returncode and done.stderr.startswith(line) and done.stdout == ""
    assert not (tmp_path / "calls").exists()
