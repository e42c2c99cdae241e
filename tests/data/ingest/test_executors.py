"""Where the tasks of `prepare` run leaves no trace in the rows, and what goes wrong there is one clear line."""

import json
import os
import signal
import stat
import time

import numpy as np
import pytest
from pings import ndjson, ping, write

from ping_llm.cli import main
from ping_llm.data.ingest import executors, tasks
from ping_llm.data.ingest import prepare as prepare_module
from ping_llm.data.ingest.executors import open_executor, run_tasks
from ping_llm.data.ingest.job_array import read_tasks
from ping_llm.data.ingest.prepare import plan_rows, prepare
from ping_llm.data.synthetic.synthesize import synthesize


def whereabouts(number):
    return {"number": number, "pid": os.getpid()}


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def work_alone(folder):
    """How many tasks of this process are at work at once."""
    mine = folder / f"{os.getpid()}-{time.monotonic_ns()}"
    mine.touch()
    time.sleep(0.1)
    at_once = len(list(folder.glob(f"{os.getpid()}-*")))
    mine.unlink()
    return {"at_once": at_once}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """Three dumps of 600 results each of 40 probes."""
    folder, rng = tmp_path_factory.mktemp("dumps"), np.random.default_rng(0)
    for i in range(3):
        lines = (
            ping(
                prb_id=n % 40,
                msm_id=1000 * i + n,
                timestamp=1_700_000_000 + int(rng.integers(9_000)),
                src_addr=f"192.0.2.{n % 40}",
                dst_addr=f"198.51.{n % 50}.7",
                result=[{"rtt": float(rng.gamma(2, 20))}],
            )
            for n in range(600)
        )
        write(folder / f"{i}.bz2", ndjson(*lines))
    return sorted(folder.iterdir())


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [1, 2])
def test_reports_come_in_the_order_of_the_tasks_and_each_is_announced(workers):
    announced = []
    with open_executor("local", workers) as pool:
        reports = run_tasks(pool, whereabouts, range(20), lambda i, report: announced.append((i, report["number"])))
    assert [report["number"] for report in reports] == list(range(20))
    assert sorted(announced) == [(i, i) for i in range(20)]
    assert ({report["pid"] for report in reports} == {os.getpid()}) == (workers == 1)


def test_a_report_is_announced_before_the_next_task_begins_in_one_process():
    events = []

    def task(number):
        events.append(("begin", number))
        return {}

    with open_executor("local", 1) as pool:
        run_tasks(pool, task, range(2), lambda i, _: events.append(("done", i)))
    assert events == [("begin", 0), ("done", 0), ("begin", 1), ("done", 1)]


def test_what_is_raised_on_a_report_stops_the_tasks_that_have_not_begun():
    begun = []

    def refuse(*_):
        raise ValueError("enough")

    with open_executor("local", 1) as pool, pytest.raises(ValueError, match="enough"):
        run_tasks(pool, lambda n: begun.append(n) or {}, range(9), refuse)
    assert begun == [0]


def test_a_killed_worker_is_one_clear_line():
    with pytest.raises(ValueError, match="a worker was killed, most likely for want of memory; repeat the command"), \
            open_executor("local", 2) as pool:  # fmt: skip
        run_tasks(pool, die, range(4), print)


@pytest.mark.parametrize("name", ["", "dusk", "dask=", "dask=host", "slurm"])
def test_an_unknown_executor_is_named_and_so_are_those_there_are(dumps, tmp_path, name):
    with pytest.raises(ValueError, match=rf"no executor {name!r}; there are local, dask, dask-local, dask-slurm and"):
        prepare(dumps, tmp_path / "out", executor=name)
    assert not (tmp_path / "out").exists()


def test_a_scheduler_that_does_not_answer_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(executors, "CONNECT_TIMEOUT_S", 1)
    with pytest.raises(ValueError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 "), \
            open_executor("dask=tcp://127.0.0.1:9", 1):  # fmt: skip
        pass


@pytest.mark.slow
def test_dask_makes_the_same_bytes_as_processes_of_this_machine(dumps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(dumps, "local", workers=1)
    prepare(dumps, "dask", workers=2, executor="dask-local")
    assert files(tmp_path / "local") == files(tmp_path / "dask")


@pytest.mark.slow
def test_a_worker_with_several_threads_runs_one_task_at_a_time(tmp_path):
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=4, dashboard_address=None) as cluster,
        open_executor(f"dask={cluster.scheduler_address}", 0) as pool,
    ):
        assert run_tasks(pool, work_alone, [tmp_path] * 8, lambda *_: None) == [{"at_once": 1}] * 8


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_over_and_over_is_one_clear_line():
    with pytest.raises(ValueError, match="a worker was killed, most likely for want of memory"), \
            open_executor("dask-local", 1) as pool:  # fmt: skip
        run_tasks(pool, die, range(1), print)


@pytest.mark.slow
def test_slurm_jobs_make_the_same_bytes(dumps, tmp_path, monkeypatch):
    """`sbatch` and `scancel` are small scripts that start a copy of the job, as SLURM does, and end it."""
    import dask

    for name, script in (
        (
            "sbatch",
            f'job={tmp_path}/job-$$; cp "$1" $job || exit; setsid bash $job > $job.log 2>&1 & echo Submitted batch job $!',
        ),
        ("scancel", 'for job in "$@"; do kill -- -$job; done'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    prepare(dumps, tmp_path / "a", workers=1)
    with dask.config.set({"jobqueue.slurm.interface": "lo"}):
        prepare(dumps, tmp_path / "b", workers=2, executor="dask-slurm")
    assert len(list(tmp_path.glob("job-*.log"))) == 2
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_dry_run_prints_the_plan_and_writes_nothing(dumps, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *map(str, dumps), "--out", "rows", "--workers", "2", "--shards", "7", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "3 files" in text and "3 tasks" in text and "7 tasks" in text and "at most 7 of each part" in text
    assert "local, 2 workers" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_what_cannot_be_planned_is_one_clear_line(dumps, capsys):
    assert main(["prepare", "-", "--out", "rows", "--dry-run"]) == 1
    assert "standard input cannot be planned for" in capsys.readouterr().err
    assert main(["prepare", str(dumps[0]), "--out", "rows", "--dry-run", "--executor", "dusk"]) == 1
    assert "no executor 'dusk'" in capsys.readouterr().err


def test_the_plan_is_near_what_a_synthetic_dump_takes(tmp_path):
    count = synthesize(tmp_path / "dump", probes=20, targets=20, days=1, seed=1, workers=1)["lines"]
    plan = plan_rows([tmp_path / "dump"])
    manifest = prepare([tmp_path / "dump"], tmp_path / "rows", workers=1)
    size = sum(path.stat().st_size for path in (tmp_path / "rows").glob("*.arrayrecord"))
    assert plan.buckets >= max(manifest["shards"].values())
    assert 0.5 < plan.results / count < 2
    assert 0.5 < plan.row_bytes / size < 2


def test_tasks_that_an_earlier_version_wrote_are_read(dumps, tmp_path):
    with pytest.raises(SystemExit):
        prepare(dumps, tmp_path, executor="array")
    path = tmp_path / ".partial" / "tasks.json"
    values = json.loads(path.read_text())
    _, now = read_tasks(path)
    values["tasks"] = [task | {"threads": 1} for task in values["tasks"]]
    path.write_text(json.dumps(values))
    assert read_tasks(path) == (tasks.map_dump, now) and len(now) == 3


def test_progress_moves_within_a_dump_and_ends_at_its_size(dumps, tmp_path, monkeypatch):
    shown = []

    class Progress:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return shown.append

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(prepare_module, "show_progress", Progress)
    monkeypatch.setattr(prepare_module, "WATCH_EVERY_S", 0.001)
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", 100_000)
    dump = prepare_module.Dump(dumps[0], "a.bz2", 1_000_000, "")
    task = tasks.MapTask(dumps[0], "a.bz2", tmp_path / "input-00000", 1, "one", 0)
    aside = tasks._fresh_folder(task.folder)
    with prepare_module._map_progress([task], [dump]) as finished:
        for piece in range(3):
            before = len(shown)
            (aside / f"piece-{piece:05d}.arrow").touch()
            while not any(shown[before:]):
                time.sleep(0.001)
        assert 0 < sum(shown) < 1
        finished(0)
        time.sleep(0.01)
    assert sum(shown) == pytest.approx(1)
    assert min(shown) >= 0
