"""Claims about real processes that train and are killed, stopped, or run out of disk."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from training_runs import (
    FORKS,
    alone,
    assert_same_weights,
    error_lines,
    finish,
    last_step,
    losses,
    metrics,
    start,
    wait_until,
    write_config,
)
from waiting import HANG_S

from ping_llm import cli
from ping_llm.config import Config, load_config
from ping_llm.data.loader import training_batches, validation_windows
from ping_llm.model import checkpoint
from ping_llm.model.checkpoint import load_latest
from ping_llm.training import objective
from ping_llm.training.trainer import Feed, train

KILLS = 20
LIMITS = {"total_steps": 120, "checkpoint_every": 3, "eval_every": 20, "average": 0.3}

pytestmark = pytest.mark.slow


def command(argv: list[str]) -> None:
    """`ping-llm …` in a process that was forked for it, at a pace at which a test sees each save and hits each step."""
    torch.set_num_threads(1)
    write, backward = checkpoint._write_tensors, objective.Objective.backward
    checkpoint._write_tensors = lambda *given: (time.sleep(0.02), write(*given))[1]
    objective.Objective.backward = lambda *given, **named: (time.sleep(0.01), backward(*given, **named))[1]
    sys.exit(cli.main(argv))


def fork(config: Path) -> FORKS.Process:
    process = FORKS.Process(target=command, args=(["train", str(config)],))
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(rows_folder, tmp_path_factory) -> Path:
    """The run folder of a run that nothing happened to."""
    config = write_config(tmp_path_factory.mktemp("whole") / "config.toml", rows_folder, **LIMITS)
    process = fork(config)
    process.join(HANG_S)
    assert process.exitcode == 0
    return config.parent / "run"


def assert_same_run(run_dir: Path, uninterrupted: Path) -> None:
    assert losses(run_dir) == losses(uninterrupted)
    assert_same_weights(run_dir, uninterrupted)


def saves_under_way(run_dir: Path) -> set[tuple[Path, int]]:
    """Folders that are being written, or were when their process was killed, and when they changed."""
    found = set()
    for aside in run_dir.glob("checkpoints/*.partial"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found.add((aside, aside.stat().st_mtime_ns))
    return found


def test_a_run_killed_at_twenty_random_moments_ends_as_if_nothing_had_been(rows_folder, uninterrupted, tmp_path):
    """Every third kill falls into a save, every third soon after the start, the others some steps later."""
    config, run_dir, rng = (
        write_config(tmp_path / "config.toml", rows_folder, **LIMITS),
        tmp_path / "run",
        random.Random(0),
    )
    cut_saves = 0
    for number in range(KILLS):
        left = saves_under_way(run_dir)  # by processes killed before: they stay for the next to deal with
        process, begun = fork(config), last_step(run_dir)
        if number % 3 == 0:
            wait_until(lambda left=left: saves_under_way(run_dir) - left, process, every_s=0.0002)
        elif number % 3 == 1:
            process.join(rng.uniform(0, 0.3))
        else:
            goal = max(begun, 0) + rng.randint(1, 12)
            wait_until(lambda goal=goal: last_step(run_dir) >= goal, process)
            process.join(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, number
        cut_saves += bool(saves_under_way(run_dir) - left)
    assert cut_saves >= 3 and 20 < last_step(run_dir) < 120
    process = fork(config)
    process.join(HANG_S)
    assert process.exitcode == 0
    assert_same_run(run_dir, uninterrupted)
    assert not saves_under_way(run_dir)


def test_signals_finish_the_step_save_it_and_end_well(rows_folder, tmp_path):
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        (tmp_path / number.name).mkdir()
        limits = LIMITS | {"total_steps": 10**6, "checkpoint_every": 10**6}
        config = write_config(tmp_path / number.name / "config.toml", rows_folder, **limits)
        processes[number] = start(config)
    run_dirs = {number: tmp_path / number.name / "run" for number in processes}
    try:
        for number, process in processes.items():
            wait_until(lambda number=number: last_step(run_dirs[number]) >= 5, process, every_s=0.05)
        for number, process in processes.items():
            process.send_signal(number)
    finally:
        ends = {number: finish(process) for number, process in processes.items()}
    for number, (code, out, errors) in ends.items():
        assert code == 0 and not errors, (number, errors)
        saved = load_latest(run_dirs[number])
        assert 5 <= saved.step == last_step(run_dirs[number]) < 10**6
        assert f"stopped after step {saved.step:,}; run the same command again to continue" in out


def test_a_full_disk_is_told_costs_no_training_and_with_room_the_run_continues(rows_folder, uninterrupted, tmp_path):
    """One checkpoint has room, a second one beside it has not."""
    disk, run_dir = tmp_path / "disk", tmp_path / "disk" / "run"
    limits = LIMITS | {"checkpoint_every": 30, "run_dir": str(run_dir)}
    config = write_config(tmp_path / "config.toml", rows_folder, **limits)
    largest = max(sum(f.stat().st_size for f in folder.iterdir()) for folder in uninterrupted.glob("checkpoints/*"))
    with small_disk(disk, kilobytes=int(1.6 * largest / 1024)) as resize:
        code, out, errors = finish(start(config))
        assert code == 1
        (line,) = errors.splitlines()
        assert line.startswith("error: the checkpoint of step 120 could not be written (No space left on device); ")
        assert line.endswith(
            f"the last good one is step-00000030; make room in {run_dir} and run the same command again"
        )
        assert "warning: the checkpoint of step 60 could not be written" in out and "and training goes on" in out
        assert last_step(run_dir) == 120 and load_latest(run_dir).step == 30 and not saves_under_way(run_dir)
        resize(100_000)
        code, out, errors = finish(start(config))
        assert code == 0 and "continues after step 30" in out, errors
        assert_same_run(run_dir, uninterrupted)


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int):
    """A file system of some kB in memory, and a function that gives it another size; it needs the right to mount."""

    def mount(kilobytes: int, remount: str = "remount,") -> bool:
        how = ["mount", "-t", "tmpfs", "-o", f"{remount}size={kilobytes}k", "tmpfs", str(folder)]
        return subprocess.run(how, capture_output=True).returncode == 0

    folder.mkdir()
    if not shutil.which("mount") or not mount(kilobytes, remount=""):
        pytest.skip("may not mount a small file system")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def limit_file_size(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_without_room_for_any_checkpoint_training_ends_with_one_line(rows_folder, tmp_path):
    config = write_config(tmp_path / "config.toml", rows_folder)
    code, out, errors = finish(start(config, preexec_fn=lambda: limit_file_size(100_000)))
    assert code == 1 and last_step(tmp_path / "run") == 12
    (line,) = errors.splitlines()
    assert error_lines(errors) == [line]
    assert "the checkpoint of step 12 could not be written (File too large); the last good one is none" in line
    assert out.count("warning: the checkpoint of step") == 2


def train_with_a_file_limit(config: Config, steps: range) -> int:
    """Trains in this process, whose files cannot grow while the batches of `steps` are fetched and trained on."""

    def batches(config, start_step, device, rank, world):
        for step, tokens in enumerate(training_batches(config, start_step, device, rank, world), start_step):
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            limit_file_size(20_000 if step in steps else resource.RLIM_INFINITY)
            yield tokens

    return train(config, Feed(batches, validation_windows, lambda config: None)).step


def test_a_save_that_succeeds_later_makes_the_run_succeed(rows_folder, tmp_path):
    """The checkpoint of step 6 fails, those of 3 and 9 do not."""
    limits = {"total_steps": 12, "checkpoint_every": 3, "eval_every": 12, "keep_checkpoints": 9}
    config = load_config(write_config(tmp_path / "config.toml", rows_folder, **limits))
    assert alone(train_with_a_file_limit, config, range(4, 8)) == 12
    kept = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000009", "step-00000012"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(13))
