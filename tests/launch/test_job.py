"""What the batch files of slurm/ call, without SLURM: where a job stands, what its end means, tasks of an array."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from paths import ROOT
from pings import ndjson, ping, write

from ping_llm.cli import main as ping_llm
from ping_llm.config import Config
from ping_llm.data.ingest import job_array
from ping_llm.data.ingest.job_array import TASKS_LEFT
from ping_llm.launch.job import copy_rows, saved
from ping_llm.launch.slurm_job import (
    DONE,
    PREEMPTED,
    REQUEUE,
    Node,
    _catches,
    _children,
    check,
    judge,
)


@pytest.fixture
def config(tmp_path, rows_folder):
    """A run of 10 steps of 8 windows."""
    default = Config()
    train = dataclasses.replace(default.train, run_dir=tmp_path / "run", total_steps=10, batch_size=8)
    return dataclasses.replace(default, train=train, data=dataclasses.replace(default.data, rows=rows_folder))


def save_step(config, step):
    folder = config.train.run_dir / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "tokens": 100 * step, "elapsed_s": 1.0}))


def node(nodes=1, ranks=1):
    return Node("n1", 0, nodes, gpus=0, ranks=ranks, local_disk=None, master="127.0.0.1:29500")


def test_a_run_stands_where_its_newest_whole_checkpoint_is(config):
    assert saved(config) == (0, False)
    save_step(config, 4)
    save_step(config, 6)
    (config.train.run_dir / "checkpoints/step-00000008").mkdir()  # without a state
    (config.train.run_dir / "checkpoints/step-00000009.partial").mkdir()
    assert saved(config) == (6, False)
    save_step(config, 10)
    assert saved(config) == (10, True)


def test_a_finished_run_is_marked_done(config):
    save_step(config, 10)
    (config.train.run_dir / PREEMPTED).touch()
    assert judge(0, (4, 0), config) == 0
    assert (config.train.run_dir / DONE).exists() and not (config.train.run_dir / PREEMPTED).exists()
    check(config, node())
    assert not (config.train.run_dir / DONE).exists()


@pytest.mark.parametrize("code", [0, 1, 137])
def test_a_run_that_ends_early_without_being_stopped_does_not_go_back_to_the_queue(config, code):
    save_step(config, 4)
    with pytest.raises(ValueError, match=f"training ended with code {code} after step 4 of"):
        judge(code, (0, 0), config)


def test_a_run_that_crashes_while_it_is_being_stopped_does_not_go_back_to_the_queue(config):
    save_step(config, 4)
    (config.train.run_dir / PREEMPTED).touch()
    with pytest.raises(ValueError, match="training ended with code 1"):
        judge(1, (0, 0), config)
    assert not (config.train.run_dir / PREEMPTED).exists()


def test_a_job_goes_back_to_the_queue_while_it_makes_progress_and_three_idle_turns_longer(config):
    codes = []
    for step in (2, 4, 4, 4, 4, 6, 6, 6, 6):
        before = check(config, node())
        if step > before[0]:
            save_step(config, step)
        config.train.run_dir.mkdir(exist_ok=True)
        (config.train.run_dir / PREEMPTED).touch()
        codes.append(judge(0, before, config))
    assert codes == [REQUEUE] * 9
    before = check(config, node())
    (config.train.run_dir / PREEMPTED).touch()
    with pytest.raises(ValueError, match="stopped 4 times in a row before it had saved a step; ask for more --time"):
        judge(0, before, config)


def test_a_job_that_cannot_train_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(ValueError, match=r"train\.batch_size=8 must be a multiple of .* times the 6 processes"):
        check(config, node(nodes=2, ranks=3))
    nowhere = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no rows in"):
        check(nowhere, node())
    rows = shutil.copytree(config.data.rows, tmp_path / "rows")
    next(rows.glob("val-*")).unlink()
    with pytest.raises(ValueError, match="has lost shards of val, 1 are left; run ping-llm prepare"):
        check(dataclasses.replace(config, data=dataclasses.replace(config.data, rows=rows)), node())
    assert not config.train.run_dir.exists()


def test_a_copy_of_rows_is_whole_made_once_and_holds_what_training_reads(rows_folder, tmp_path, monkeypatch):
    rows, disk = shutil.copytree(rows_folder, tmp_path / "rows"), tmp_path / "disk"
    (rows / "test-s1-00000-of-00001.arrayrecord").touch()
    with pytest.raises(ValueError, match=f"there is no folder {disk}"):
        copy_rows(rows, disk)
    disk.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    with pytest.raises(ValueError, match=r"the rows take \d.\d MB, .* has 0.0 MB free; free some"):
        copy_rows(rows, disk)
    assert not [path for path in disk.iterdir() if path.is_dir()]
    monkeypatch.undo()
    copy = copy_rows(rows, disk)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in rows_folder.iterdir()}
    written = (copy / "manifest.json").stat().st_mtime_ns
    assert copy_rows(rows, disk) == copy and (copy / "manifest.json").stat().st_mtime_ns == written
    (rows / "manifest.json").write_text((rows / "manifest.json").read_text() + "\n")
    assert copy_rows(rows, disk) != copy


def test_a_rank_is_signalled_only_once_it_has_a_handler():
    code = "import signal; signal.signal(signal.SIGUSR1, print); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        assert _catches(process.pid, signal.SIGUSR1) and not _catches(process.pid, signal.SIGUSR2)
        assert process.pid in _children(os.getpid())
        process.kill()
    assert not _catches(process.pid, signal.SIGUSR1)


@pytest.fixture
def dumps(tmp_path):
    (tmp_path / "dumps").mkdir()
    for number in range(3):
        lines = (ping(prb_id=n % 9, msm_id=1000 * number + n, src_addr=f"192.0.2.{n % 9}") for n in range(60))
        write(tmp_path / f"dumps/{number}.bz2", ndjson(*lines))
    return tmp_path / "dumps"


def prepare(dumps, out, *options):
    try:
        return ping_llm(["prepare", str(dumps), "--out", str(out), "--split", "none", *options])
    except SystemExit as end:
        return end.code


def run_array(tasks, stride):
    for first in range(stride):
        assert job_array.main([str(tasks), str(first), str(stride)]) == 0


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("stride", [1, 2, 7])
def test_a_command_repeated_between_arrays_gives_the_bytes_of_one_run(dumps, tmp_path, capsys, stride):
    assert prepare(dumps, tmp_path / "here", "--workers", "1") == 0
    tasks, out = tmp_path / "there/.partial/tasks.json", tmp_path / "there"
    for count in (3, 4):
        assert prepare(dumps, out, "--executor", "array") == TASKS_LEFT
        capsys.readouterr()
        assert job_array.main([str(tasks)]) == 0
        assert int(capsys.readouterr().out) == count
        run_array(tasks, stride)
    assert prepare(dumps, out, "--executor", "array") == 0
    assert files(out) == files(tmp_path / "here")


def test_tasks_that_did_not_end_are_reported_and_tried_again_by_the_next_array(dumps, tmp_path, capsys):
    tasks, out = tmp_path / "out/.partial/tasks.json", tmp_path / "out"
    assert prepare(dumps, out, "--executor", "array") == TASKS_LEFT
    assert job_array.main([str(tasks), "0", "2"]) == 0  # the first and the third
    assert prepare(dumps, out, "--executor", "array") == 1
    assert re.search(r"1 of 3 tasks ended before they were done, the first is \d\.bz2", capsys.readouterr().err)
    assert prepare(dumps, out, "--executor", "array") == TASKS_LEFT
    assert len(job_array.read_tasks(tasks)[1]) == 1


def test_a_damaged_dump_is_reported_once_and_read_again_afterwards(dumps, tmp_path, capsys):
    whole = (dumps / "1.bz2").read_bytes()
    (dumps / "1.bz2").write_bytes(whole[:-20])
    tasks, out = tmp_path / "out/.partial/tasks.json", tmp_path / "out"
    assert prepare(dumps, out, "--executor", "array") == TASKS_LEFT
    run_array(tasks, 1)
    assert prepare(dumps, out, "--executor", "array") == 1
    assert "--keep-going" in capsys.readouterr().err
    assert prepare(dumps, out, "--executor", "array") == TASKS_LEFT
    assert [task.name for task in job_array.read_tasks(tasks)[1]] == ["1.bz2"]
    run_array(tasks, 1)
    assert prepare(dumps, out, "--executor", "array", "--keep-going") == TASKS_LEFT
    run_array(tasks, 1)
    assert prepare(dumps, out, "--executor", "array", "--keep-going") == 0


@pytest.mark.parametrize(
    "text", ["", "[]", '{"function": "exit", "tasks": []}', '{"function": "map_dump", "tasks": [{}]}']
)
def test_what_is_no_file_of_tasks_is_one_clear_line(tmp_path, capsys, text):
    (tmp_path / "tasks.json").write_text(text)
    for path, message in ((tmp_path / "tasks.json", "holds no tasks"), (tmp_path / "none.json", "no tasks in")):
        assert job_array.main([str(path)]) == 1
        assert message in capsys.readouterr().err
    assert job_array.main([str(path), "2", "2"]) == 1
    assert "must be at least 0 and below" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["submit", "prepare.sbatch", "train.sbatch", "sweep.sbatch", "eval.sbatch", "environment.sh", "site.sh"]
)
def test_the_batch_files_are_shell_without_errors_of_syntax(name):
    assert subprocess.run(["bash", "-n", ROOT / "slurm" / name]).returncode == 0
