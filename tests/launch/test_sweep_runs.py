"""A sweep trains its runs in real processes: killed or stopped it goes on, and a run that fails does not end the others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import ENVIRONMENT, assert_same_weights, finish, last_step, losses, start, wait_until, write_config
from waiting import HANG_S

from ping_llm.cli import main
from ping_llm.launch import sweep_local
from ping_llm.launch.sweep import read_sweep
from ping_llm.launch.sweep_local import progress, run_sweep, share_of_machine
from ping_llm.model.checkpoint import load_latest
from ping_llm.system.files import write_lock


def write_sweep(folder: Path, rows: Path, more: str, **train) -> Path:
    """A sweep over a small base config, whose runs go into `folder`/runs."""
    write_config(folder / "base.toml", rows, **train)
    path = folder / "sweep.toml"
    path.write_text(f"base = 'base.toml'\nout = '{folder / 'runs'}'\n{more}")
    return path


def start_sweep(path: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ping_llm", "sweep", str(path), *options]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_then_stopped_ends_as_one_that_is_not(tmp_path, rows_folder):
    """Runs save at their end or when they are told: what SIGKILL of the sweep leaves shows that they were."""
    limits = {"total_steps": 600, "checkpoint_every": 10_000, "eval_every": 600, "eval_queries": 0}
    path = write_sweep(tmp_path, rows_folder, "seeds = [0, 1]\n", **limits)
    runs = [tmp_path / f"runs/base,seed={seed}" for seed in (0, 1)]

    sweep = start_sweep(path, "--jobs", "2")
    wait_until(lambda: all(last_step(run) > 5 for run in runs), sweep)
    sweep.kill()
    finish(sweep)
    end = time.monotonic() + HANG_S
    while not all(load_latest(run) for run in runs):
        assert time.monotonic() < end
        time.sleep(0.05)
    killed = [load_latest(run).step for run in runs]
    assert all(5 < step < 600 for step in killed)

    sweep = start_sweep(path, "--jobs", "2")
    wait_until(lambda: all(last_step(run) > step + 5 for run, step in zip(runs, killed, strict=True)), sweep)
    sweep.terminate()
    code, out, errors = finish(sweep)
    stopped = [load_latest(run).step for run in runs]
    assert (code, errors) == (130, "stopped\n") and "0 of 2 runs are done; the same command goes on" in out
    assert all(step < at <= 600 for step, at in zip(killed, stopped, strict=True))

    code, out, errors = finish(start_sweep(path, "--jobs", "2"))
    assert (code, errors) == (0, "") and "all 2 runs are done; ping-llm compare" in out
    assert all((run / "DONE").exists() and (run / "report.md").exists() for run in runs)
    assert (runs[0] / "train.log").read_text().count("continues after step") == 2
    code, out, _ = finish(start_sweep(path))
    assert code == 0 and "2 runs in" in out and ", 0 of them to do" in out

    config = tmp_path / "base.toml"
    assert finish(start(config, "--seed", "1", "--train.run-dir", str(tmp_path / "whole")))[0] == 0
    assert_same_weights(runs[1], tmp_path / "whole")
    assert losses(runs[1]) == losses(tmp_path / "whole")
    assert losses(runs[0]) != losses(runs[1])


@pytest.mark.slow
def test_a_run_that_fails_does_not_end_the_others_and_is_named_with_its_log(tmp_path, rows_folder, capsys):
    """Its device is not there."""
    more = "[[runs]]\nname = 'bad'\ntrain.device = 'nowhere'\n[[runs]]\nname = 'good'\n"
    path = write_sweep(tmp_path, rows_folder, more, total_steps=2, eval_queries=0)
    assert main(["sweep", str(path)]) == 1
    out, errors = capsys.readouterr()
    (line,) = errors.splitlines()
    log = tmp_path / "runs/bad,seed=0/train.log"
    assert line.startswith("error: 1 of 2 runs failed: bad,seed=0 (error: ") and line.endswith(f"; see {log})")
    assert "nowhere" in line and "nowhere" in log.read_text()
    assert "good,seed=0: done, 2 steps" in out and (tmp_path / "runs/good,seed=0/DONE").exists()
    assert not (tmp_path / "runs/bad,seed=0/DONE").exists()

    assert main(["sweep", str(path), "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in listed] == ["not begun", "done"]


def test_an_unknown_key_is_named_before_anything_is_written(tmp_path, rows_folder, capsys):
    path = write_sweep(tmp_path, rows_folder, "[grid]\nmodel.n_layers = [1, 2]\n")
    for option in ([], ["--dry-run"]):
        assert main(["sweep", str(path), *option]) == 1
        assert "unknown key model.n_layers; did you mean model.n_layer?" in capsys.readouterr().err
    assert main(["sweep", str(path), "--jobs", "0"]) == 1
    assert capsys.readouterr().err == "error: --jobs 0 must be at least 1\n"
    assert not (tmp_path / "runs").exists()


def test_two_sweeps_of_one_folder_are_kept_apart(tmp_path, rows_folder, monkeypatch):
    runs = read_sweep(write_sweep(tmp_path, rows_folder, ""))
    with write_lock(tmp_path / "runs", tmp_path / "runs/.lock"), pytest.raises(ValueError, match="another process"):
        run_sweep(runs, runs)
    runs[0].folder.mkdir()
    monkeypatch.setattr(sweep_local, "LOCK_WAIT_S", 0.2)
    with write_lock(runs[0].folder, runs[0].folder / ".lock"), pytest.raises(ValueError, match=r"writes to .*seed=0"):
        run_sweep(runs, runs)
    assert not runs[0].log.exists()


# What a run is given, and how far it is


def test_runs_side_by_side_share_the_cores_and_take_turns_on_the_gpus(monkeypatch):
    monkeypatch.setattr(sweep_local, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert share_of_machine(0, 1, "auto") == {"OMP_NUM_THREADS": "8"}
    shares = [share_of_machine(place, 3, "auto") for place in range(3)]
    assert shares == [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("4", "6", "4")]
    assert share_of_machine(1, 16, "cpu") == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert share_of_machine(0, 2, "cpu") == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert share_of_machine(0, 2, "auto") == {"OMP_NUM_THREADS": "2"}


def test_progress_is_that_of_the_last_whole_line_of_the_metrics(tmp_path, rows_folder):
    (run,) = read_sweep(write_sweep(tmp_path, rows_folder, "", total_steps=50))
    assert progress(run) == 0
    run.folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "padding": "x" * 200}) for step in range(0, 31, 1)] * 10
    (run.folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4')
    assert progress(run) == 0.6


def test_the_live_line_says_what_is_done_what_failed_and_how_far_the_others_are(tmp_path, rows_folder, monkeypatch):
    runs = read_sweep(write_sweep(tmp_path, rows_folder, "seeds = [0, 1, 2, 3]\n", total_steps=50))
    clock = [0.0]
    monkeypatch.setattr(sweep_local.time, "monotonic", lambda: clock[0])
    shares = {runs[1].name: 0.0, runs[2].name: 0.0}
    monkeypatch.setattr(sweep_local, "progress", lambda run: shares[run.name])
    sweep = sweep_local._Sweep(runs, runs[1:], 2, [], begun=0.0)
    sweep.going = [sweep_local._Going(run, None, None, 0) for run in runs[1:3]]
    assert sweep._line() == "1 of 4 runs done  base,seed=1 0%  base,seed=2 0%"
    clock[0], shares[runs[1].name] = 60.0, 0.5
    sweep.failures = [sweep_local.Failure(runs[3], "why")]
    # An eighth of all in a minute; five eighths are left.
    assert sweep._line() == "1 of 4 runs done, 1 failed  about 5.0 min left  base,seed=1 50%  base,seed=2 0%"


@pytest.mark.parametrize(
    ("code", "log", "why"),
    [
        (1, "step 1\nerror: no rows\nlast", "error: no rows"),
        (1, "Traceback\nKeyError: 3", "KeyError: 3"),
        (1, "", "ended with code 1 after step 7"),
        (-signal.SIGKILL, "error: earlier", "killed by SIGKILL after step 7"),
        (0, "stopped after step 7", "ended with code 0 after step 7"),
    ],
)
def test_why_a_run_failed_is_the_last_error_of_its_log_or_its_exit_code(tmp_path, rows_folder, code, log, why):
    (run,) = read_sweep(write_sweep(tmp_path, rows_folder, ""))
    run.folder.mkdir(parents=True)
    run.log.write_text(log)
    assert sweep_local._why(run, code, 7) == why


def test_a_process_whose_parent_is_gone_already_ends_at_once():
    arrange = sweep_local._end_with(os.getpid() + 1)  # no parent of ours
    child = os.fork()
    if child == 0:
        arrange()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
