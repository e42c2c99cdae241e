"""The functions that run on Modal, called here: a folder stands for what a container sees, and commits are written down."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import modal
import numpy as np
import pytest
from paths import ROOT
from pings import ndjson, ping, write
from training_runs import ENVIRONMENT, assert_same_weights, finish, losses, start, wait_until, write_config

from ping_llm.data.ingest.plan import MIN_BUCKETS
from ping_llm.data.ingest.prepare import prepare
from ping_llm.launch import modal_job as cloud
from ping_llm.launch.modal_job import SIGNAL, TIME_IS_UP, Order, measured, parse_gpu
from ping_llm.launch.plan import GPU, plan_cost
from ping_llm.model.checkpoint import load_latest
from ping_llm.model.gpt import flops_per_token

SCRIPT = ROOT / "scripts/train/modal_wrapper.py"
pytestmark = pytest.mark.filterwarnings("ignore:.*executing locally")


def load_script(path: Path = SCRIPT) -> ModuleType:
    spec = importlib.util.spec_from_file_location("modal_wrapper", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def script(tmp_path, monkeypatch) -> ModuleType:
    """The script, whose containers work in a folder; `script.calls` are those of its Volumes."""
    script = load_script()
    script.calls = []
    volume = SimpleNamespace(commit=lambda: script.calls.append("commit"), reload=lambda: script.calls.append("reload"))
    monkeypatch.setattr(script, "WORK", tmp_path)
    monkeypatch.setattr(script, "data_volume", volume)
    monkeypatch.setattr(script, "runs_volume", volume)
    return script


@pytest.fixture
def config(tmp_path, rows_folder) -> Path:
    """A small run whose rows are in the Volume; on the machine of the user there are none."""
    shutil.copytree(rows_folder, tmp_path / "data/rows")
    return write_config(tmp_path / "config.toml", Path("data/rows"), run_dir="runs/small")


def call(script: ModuleType, config: Path, *options: str) -> tuple[str, list[str], int]:
    """What the user's machine sends to the containers."""
    order = Order.parse([*options, str(config)], "train", script.LOCAL_DISK, script._place)
    return order.toml, order.options, order.gpus


def test_functions_may_take_a_day_are_tried_again_and_keep_their_files_in_volumes(monkeypatch):
    given = {}

    def function(self, **options):
        return lambda f: given.update({f.__name__: options}) or f

    monkeypatch.setattr(modal.App, "function", function)
    script = load_script()
    assert given["train_run"]["timeout"] == given["prepare_rows"]["timeout"] == 24 * 3600 > script.STOP_AFTER_S
    assert given["train_run"]["retries"].max_retries >= 3 and given["train_run"]["single_use_containers"]
    assert all({"/data", "/runs"} == set(options["volumes"]) for options in given.values())
    assert (script.REPOSITORY / "constraints.txt").is_file() and (script.REPOSITORY / "pyproject.toml").is_file()


def test_a_container_can_import_the_script_without_the_repository(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    command = [sys.executable, "-c", "import modal_wrapper; modal_wrapper.train_run"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


# Preparing


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """Three dumps of 100 results each of 20 probes."""
    folder, rng = tmp_path_factory.mktemp("dumps"), np.random.default_rng(0)
    for i in range(3):
        times = rng.integers(1_700_000_000, 1_700_009_000, 100).tolist()
        sources = [{"prb_id": n % 20, "src_addr": f"192.0.2.{n % 20}", "msm_id": 1000 * i + n} for n in range(100)]
        lines = (ping(timestamp=time_s, **source) for time_s, source in zip(times, sources, strict=True))
        write(folder / f"{i}.bz2", ndjson(*lines))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_containers_make_the_same_bytes_over_a_volume_that_is_kept_up_to_date(script, dumps, tmp_path, monkeypatch):
    shutil.copytree(dumps, tmp_path / "data/dumps")
    monkeypatch.setattr(script, "CONTAINERS", 1)  # one thread: here the tasks share a process
    monkeypatch.setattr(script, "run_task", SimpleNamespace(remote=script.run_task.local))
    options = {"packets": "one", "split": "pingbench", "traceroute": "off"}
    counts = script.prepare_rows.local([str(tmp_path / "data/dumps")], str(tmp_path / "data/rows"), options)
    prepare([dumps], tmp_path / "here", workers=1)
    assert files(tmp_path / "data/rows") == files(tmp_path / "here")
    assert (
        sum(counts["parts"].values()) + counts["measurements"]["dropped_held_out"] == 300 and counts["parts"]["test-s4"]
    )
    assert script.calls == ["commit", "reload", "commit", "reload"] * (3 + MIN_BUCKETS) + ["commit"]


def test_preparing_what_is_not_in_the_volume_is_one_clear_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "prepare_rows", SimpleNamespace(remote=script.prepare_rows.local))
    with pytest.raises(SystemExit, match="1"):
        script.prepare("data/dumps", "--out", "data/rows")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "data/dumps" in line
    with pytest.raises(SystemExit, match="1"):
        script.prepare("../dumps", "--out", "data/rows")
    assert capsys.readouterr().err.startswith("error: INPUT ../dumps must lie below data/, the Volume ping-llm-data")


# Training, as the user starts it


@pytest.fixture
def remote(script, monkeypatch):
    """What was started on which machines; `look` looks, training only says that it is done."""
    started = []

    def there(name, answer):
        def with_options(**machine):
            return SimpleNamespace(remote=lambda *run: started.append((name, machine, run)) or answer(*run))

        monkeypatch.setattr(script, name, SimpleNamespace(with_options=with_options))

    there("look", script.look.local)
    there("train_run", lambda *run: {"step": 12})
    return started


def test_a_run_is_priced_and_looked_at_before_gpus_are_taken(script, config, remote, capsys):
    script.train("--gpu", "A100:4", "--tokens-per-s", "1000000", str(config), "--train.total-steps", "250")
    (first, cheap, _), (second, machine, run) = remote
    assert (first, second) == ("look", "train_run") and cheap == {"secrets": []}
    assert machine["gpu"] == "A100-80GB:4" and run[2:] == (4, "/tmp")
    out = capsys.readouterr().out
    assert "1,000,000 tokens/s were measured" in out
    assert out.index("dollars") < out.index("0 steps are done") < out.index("all 12 steps are done")


def test_the_options_of_a_run_reach_the_container(script, config, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(cloud, "run_ranks", lambda ranks, argv, *_: seen.update(argv=argv) or (1, ""))
    toml, options, gpus = call(script, config, "--gpu", "H100:2")
    script.train_run.local(toml, [*options, "--seed", "3"], gpus, "none")
    assert seen["argv"][1:] == [
        "--data.rows", str(tmp_path / "data/rows"), "--train.run-dir", str(tmp_path / "runs/small"), "--seed", "3"
    ]  # fmt: skip
    assert toml == config.read_text()


def refuse_secret(self):
    raise modal.exception.NotFoundError("no such secret")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "H100:3"], "train.batch_size=8 must be a multiple of"),
        (["--gpu", "H100:9"], "--gpu H100:9 must be a kind and a number from 1 to 8"),
        (["--gpu", "H100:"], "--gpu H100: must be a kind and a number from 1 to 8"),
        (["--gpu", "K80"], "has no price of 'K80', only of a100"),
        (["--train.run-dir", "elsewhere/run"], "must lie below runs/, the Volume ping-llm-runs"),
        (["--train.run-dir", "runs"], "must lie below runs/, the Volume ping-llm-runs"),
        (["--data.rows", "data/../rows"], "must lie below data/, the Volume ping-llm-data"),
        (
            ["--data.rows", "data/other"],
            "the Volume ping-llm-data holds no rows at data/other; make them with ::prepare",
        ),
        (["--train.wandb", "online"], "there is no Modal secret 'wandb' with WANDB_API_KEY; make it with modal secret"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_line_and_takes_no_gpu(
    script, config, remote, options, message, monkeypatch, capsys
):
    monkeypatch.setattr(modal.Secret, "hydrate", refuse_secret)
    own = options if options[0] == "--gpu" else []
    with pytest.raises(SystemExit, match="1"):
        script.train(*own, str(config), *([] if own else options))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert "train_run" not in [name for name, *_ in remote]


def test_a_container_without_the_key_says_so(script, config, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    toml, options, gpus = call(script, config)
    answer = script.look.local(toml, [*options, "--train.wandb", "online"], gpus)
    assert "WANDB_API_KEY is not set; pass --wandb-secret NAME" in answer["error"]


def test_a_local_disk_that_is_too_small_is_reported_and_not_tried_again(script, config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    answer = script.train_run.local(*call(script, config), str(tmp_path))
    assert "the rows take" in answer["error"] and "has 0.0 MB free" in answer["error"]
    assert not (tmp_path / "runs").exists()


def save_step(run_dir: Path, step: int) -> None:
    folder = run_dir / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "tokens": 100 * step, "elapsed_s": 1.0}))


@pytest.mark.parametrize(
    ("code", "reason", "step", "raised"),
    [
        (0, "", 12, None),
        (1, SIGNAL, 12, None),  # it was over anyway
        (0, SIGNAL, 7, KeyboardInterrupt),
        (1, SIGNAL, 4, KeyboardInterrupt),
        (0, TIME_IS_UP, 7, RuntimeError),
        (1, "", 7, RuntimeError),
        (1, "", 4, "training ended with code 1 before it saved a step after 4"),
    ],
)
def test_a_try_is_repeated_only_where_that_may_help(script, config, tmp_path, monkeypatch, code, reason, step, raised):
    save_step(tmp_path / "runs/small", 4)

    def ranks(*_):
        if step > 4:
            save_step(tmp_path / "runs/small", step)
        return code, reason

    monkeypatch.setattr(cloud, "run_ranks", ranks)
    if isinstance(raised, type):
        with pytest.raises(raised):
            script.train_run.local(*call(script, config), "none")
    else:
        answer = script.train_run.local(*call(script, config), "none")
        assert answer == {"step": 12} if raised is None else raised in answer["error"]


# The cost


def test_a_speed_that_was_measured_on_the_same_gpus_counts(tmp_path):
    order = Order.parse(["--gpu", "H100:8", str(ROOT / "configs/full.toml")], "train", "/tmp", lambda *_: "")
    run, gpu, flops = tmp_path / "run", GPU.named("h100"), flops_per_token(order.config.model)
    assert measured(run) is None
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 0}\n{"step": 1, "tokens_per_s": 9.0}\n{"step": 2, "tokens_per_s": 5e5}\n'
    )
    (run / "machine.json").write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "processes": 8}))
    plan = plan_cost(order.config, gpu, 8, mfu=5e5 * flops / (8 * gpu.peak_flops))
    assert plan.hours == pytest.approx(plan.tokens / 5e5 / 3600)
    assert order.cost(measured(run)) == [*plan.lines, "500,000 tokens/s were measured; CPUs and memory come on top"]
    for other in ({"device": "NVIDIA A100-SXM4-80GB"}, {"processes": 4}):
        assumed = order.cost(measured(run) | other)
        assert assumed[:-1] == plan_cost(order.config, gpu, 8).lines and "no speed was measured" in assumed[-1]
    assert dataclasses.replace(order, tokens_per_s=5e5).cost() == order.cost(measured(run))


def test_a_run_that_ends_by_the_clock_costs_its_minutes():
    arguments = [
        "--gpu",
        "H100:2",
        str(ROOT / "configs/small.toml"),
        "--train.max-minutes",
        "90",
        "--train.total-steps",
        "0",
    ]
    order = Order.parse(arguments, "train", "/tmp", lambda *_: "")
    assert order.cost() == [f"at most 1.5 hours, {1.5 * 2 * 3.95:.2f} dollars"]
    assert parse_gpu("l4") == ("l4", 1)


# Ranks, signals and commits, in real processes.

SAVES_WHEN_TOLD = """
import pathlib, signal, sys
run_dir = pathlib.Path(sys.argv[1])
def save(*_):
    (run_dir / "checkpoints/step-00000002").mkdir()
    sys.exit()
signal.signal(signal.SIGTERM, save)
(run_dir / "checkpoints/step-00000001").mkdir(parents=True)
signal.alarm(3600)
signal.pause()
"""


@pytest.mark.parametrize("cause", [TIME_IS_UP, InterruptedError])
def test_ranks_are_signalled_to_save_when_their_time_is_up_or_their_call_is_cancelled(tmp_path, monkeypatch, cause):
    """Modal cancels a call by an exception, here out of the first commit."""
    popen, kept, stop_at_s = subprocess.Popen, [], time.monotonic() + 10_000

    def keep():
        kept.append(sorted(folder.name for folder in tmp_path.glob("checkpoints/*")))
        if cause is TIME_IS_UP:
            monkeypatch.setattr(cloud.time, "monotonic", lambda: stop_at_s + 1)
        elif len(kept) == 1:
            raise cause

    command = [sys.executable, "-c", SAVES_WHEN_TOLD, str(tmp_path)]
    monkeypatch.setattr(cloud.subprocess, "Popen", lambda _, **options: popen(command, **options))
    if cause is TIME_IS_UP:
        assert cloud.run_ranks(1, [], "none", tmp_path, keep, stop_at_s) == (0, TIME_IS_UP)
    else:
        with pytest.raises(cause):
            cloud.run_ranks(1, [], "none", tmp_path, keep, stop_at_s)
    assert kept[0] == ["step-00000001"] and kept[-1] == ["step-00000001", "step-00000002"]


CALL = """
import importlib.util, json, sys
from pathlib import Path
from ping_llm.launch.modal_job import Order
path, work, *arguments, log = sys.argv[1:]
spec = importlib.util.spec_from_file_location("modal_wrapper", path)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

class Volume:
    def commit(self):
        held = sorted(folder.name for folder in Path(work).glob("runs/small/checkpoints/step-????????"))
        with open(log, "a") as file:
            print(json.dumps(held), file=file)

script.WORK, script.data_volume, script.runs_volume = Path(work), Volume(), Volume()
order = Order.parse(arguments, "train", work, script._place)
print(json.dumps(script.train_run.local(order.toml, order.options, order.gpus, work)))
"""
STEPS = 120


def start_call(config: Path, log: Path) -> subprocess.Popen:
    """A call of the training function, in a process that may be sent signals."""
    command = [sys.executable, "-W", "ignore", "-c", CALL, SCRIPT, config.parent, "--gpu", "L4", config, log]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, start_new_session=True, **pipes)


def committed(log: Path) -> int:
    """The newest step that was in the Volume when it was last committed; 0 if there was none."""
    held = json.loads(log.read_text().splitlines()[-1]) if log.exists() else []
    return max((int(name.removeprefix("step-")) for name in held), default=0)


@pytest.mark.slow
def test_a_call_that_is_preempted_and_started_again_ends_with_the_weights_of_one_that_is_not(tmp_path, rows_folder):
    """SIGINT, as from Modal, and to every process of the session; then SIGTERM, which must not cut the saving short."""
    shutil.copytree(rows_folder, tmp_path / "data/rows")
    limits = {"total_steps": STEPS, "checkpoint_every": 10, "eval_every": STEPS}
    config = write_config(tmp_path / "config.toml", Path("data/rows"), run_dir="runs/small", **limits)
    run_dir, log = tmp_path / "runs/small", tmp_path / "commits"
    call = start_call(config, log)
    try:
        wait_until(lambda: committed(log), call)
        os.killpg(call.pid, signal.SIGINT)
        call.terminate()
    finally:
        code, out, errors = finish(call)
    assert code != 0 and errors.rstrip().endswith("KeyboardInterrupt"), errors
    stopped = load_latest(run_dir).step
    assert 0 < stopped < STEPS and committed(log) == stopped and f"stopped after step {stopped}" in out

    code, out, errors = finish(start_call(config, log))
    assert code == 0 and json.loads(out.splitlines()[-1]) == {"step": STEPS}, errors
    assert f"continues after step {stopped}" in out and committed(log) == STEPS
    assert [path for path in tmp_path.glob("ping-llm-rows-*") if path.is_dir()]  # on the local disk

    options = ["--data.rows", tmp_path / "data/rows", "--train.run-dir", tmp_path / "whole"]
    assert finish(start(config, *options))[0] == 0
    assert_same_weights(run_dir, tmp_path / "whole")
    assert losses(run_dir) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_queries_of_a_run_in_the_volume_are_answered(script, config, tmp_path):
    options = ["--data.rows", tmp_path / "data/rows", "--train.run-dir", tmp_path / "runs/small"]
    assert finish(start(config, *options))[0] == 0
    query = ["rtt", "--src", "192.0.2.7", "--dst", "198.51.100.3", "--device", "cpu", "--json", "--model"]
    answer = script.run_inference.local([*query, "runs/small"])
    assert answer["code"] == 0 and json.loads(answer["output"])["median_ms"] > 0, answer["errors"]
    assert script.calls == ["reload", "reload", "commit", "commit"]
    answer = script.run_inference.local([*query, "runs/none"])
    assert answer["code"] == 1 and "no checkpoint in runs/none" in answer["errors"]
