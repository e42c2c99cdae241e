"""The functions that run on Modal, called here: a folder stands for what a container sees, and commits are written down."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import modal
import pytest
from paths import ROOT
from training_runs import ENVIRONMENT, assert_same_weights, finish, losses, start, wait_until, write_config

from ping_llm.launch import modal_job as cloud
from ping_llm.launch.modal_job import SIGNAL, TIME_IS_UP, Order
from ping_llm.model.checkpoint import load_latest

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


@pytest.fixture
def options(monkeypatch) -> dict[str, dict]:
    """What each function of the script asks of Modal."""
    asked, function = {}, modal.App.function

    def watched(self, **options):
        return lambda f: asked.update({f.__name__: options}) or function(self, **options)(f)

    monkeypatch.setattr(modal.App, "function", watched)
    load_script()
    return asked


MODAL_LONGEST_S = 86_400  # as its documentation says


def test_training_saves_and_is_tried_again_before_its_time_at_modal_is_up(script, config, options, monkeypatch):
    """The ranks are stopped early enough for a step and a save, which may take minutes, and late enough to be worth it."""
    stops = []
    monkeypatch.setattr(cloud, "run_ranks", lambda *given: stops.append(given[-1] - time.monotonic()) or (1, ""))
    script.train_run.local(*call(script, config), "none")
    limit_s = options["train_run"]["timeout"]
    assert limit_s <= MODAL_LONGEST_S and limit_s - 3600 < stops[0] < limit_s - 600
    retries = options["train_run"]["retries"]
    assert retries.max_retries * limit_s >= 7 * 86_400  # a week, if each try ends by its time
    assert options["train_run"]["single_use_containers"]  # a try that failed leaves no process behind


def test_what_functions_read_and_write_lies_in_the_volumes_that_they_mount(options):
    script = load_script()
    places = [script._place("data.rows", Path("data/rows")), script._place("train.run_dir", Path("runs/a"))]
    for name, asked in options.items():
        assert {str(Path(place).parent) for place in places} == set(asked["volumes"]), name


def test_the_image_is_made_from_files_that_are_there():
    script = load_script()
    assert tomllib.loads((script.REPOSITORY / "pyproject.toml").read_text())["project"]["name"] == "ping-llm"
    pinned = {line.partition("==")[0] for line in (script.REPOSITORY / "constraints.txt").read_text().splitlines()}
    assert {"torch", "duckdb", "modal"} <= pinned


def test_a_container_can_import_the_script_without_the_repository(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    command = [sys.executable, "-c", "import modal_wrapper; modal_wrapper.train_run"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


# Preparing


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
    there("train_run", lambda *run: {"step": 3 * run[2]})  # a number that only its answer has
    return started


def test_a_run_is_priced_and_looked_at_before_gpus_are_taken(script, config, remote, capsys):
    script.train("--gpu", "A100:4", "--tokens-per-s", "1000000", str(config), "--train.total-steps", "250")
    (first, cheap, _), (second, machine, run) = remote
    assert (first, second) == ("look", "train_run") and cheap == {"secrets": []}
    assert machine["gpu"] == "A100-80GB:4" and run[2:] == (4, "/tmp")
    out = capsys.readouterr().out
    assert "1,000,000 tokens/s were measured" in out
    assert out.index("dollars") < out.index("0 steps are done") < out.index("all 12 steps are done")  # of 4 GPUs


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
