"""The batch files of slurm/ on a real SLURM of two virtual nodes end as a run on one machine does, or in one clear line."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import slurm_cluster
from paths import ROOT
from waiting import HANG_S

from ping_llm import cli
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.synthetic.synthesize import synthesize

no_slurm = slurm_cluster.problem()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(no_slurm), reason=no_slurm or "SLURM is there")]

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
JOB_TIMEOUT_S = HANG_S
SITE = """\
PARTITION= CPU_PARTITION= ACCOUNT= GRES={gres} MODULES=() VENV={venv} LOCAL_DISK={disk} RANKS_PER_NODE={ranks}
"""
# In every process of the jobs: steps that take their time in the first turns of a job, a crash, a small disk.
SITECUSTOMIZE = """\
import os, shutil, signal, sys, time
from ping_llm.training import schedule

lr_scale, disk_usage, given = schedule.lr_scale, shutil.disk_usage, os.environ.get

def watched(progress, config):
    if int(given("SLURM_RESTART_COUNT", 0)) < int(given("SLOW_TURNS", 0)):
        time.sleep(0.5)
    if progress >= float(given("CRASH_AT", 2)) and given("CRASH_IN", "") in " ".join(sys.argv):
        os.kill(os.getpid(), signal.SIGKILL)
    return lr_scale(progress, config)

schedule.lr_scale = watched
if given("FREE_BYTES"):
    shutil.disk_usage = lambda path: disk_usage(path)._replace(free=int(given("FREE_BYTES")), total=0)
"""


class Job:
    """A submitted job."""

    def __init__(self, number, environment, folder):
        self.number, self.environment, self.folder = number, environment, folder

    def fields(self):
        """What scontrol shows of the job; of an array, of its last element."""
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", str(self.number)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=True,
        )
        return dict(pair.split("=", 1) for pair in shown.stdout.splitlines()[-1].split() if "=" in pair)

    def wait(self, in_queue_again=lambda: None, turns_of_a_minute=0):
        """Its state once it has ended; a job that went back to the queue need not wait there for two minutes.

        turns_of_a_minute: after so many, the job gets all the time that it needs on however busy a machine.
        """
        end, hurried = time.monotonic() + JOB_TIMEOUT_S, set()
        while (fields := self.fields())["JobState"] not in ENDED:
            assert time.monotonic() < end, f"{fields}\n{self.output()}"
            waits = fields["JobState"] == "PENDING" and fields["Reason"] == "BeginTime"
            if waits and fields["Restarts"] not in hurried:
                hurried.add(fields["Restarts"])
                in_queue_again()
                # Not now: in the second in which a job is put back, nodes refuse it.
                command = ["scontrol", "update", f"JobId={self.number}", "StartTime=now+3"]
                command += ["TimeLimit=10"] if int(fields["Restarts"]) == turns_of_a_minute else []
                subprocess.run(command, env=self.environment, capture_output=True, timeout=HANG_S, check=True)
            time.sleep(0.5)
        return fields["JobState"]

    def output(self):
        return "".join(path.read_text() for path in self.folder.glob(f"*-{str(self.number).replace('_', '-')}.out"))

    def errors(self):
        return [line for line in self.output().splitlines() if line.startswith("error: ")]


class Cluster:
    """Submits as a user does, in a folder of its own for each job."""

    def __init__(self, folder, environment):
        self.folder, self.environment, self.jobs = folder, environment, 0

    def submit(self, kind, *arguments, options=(), gres="", disk="none", ranks=1, venv=sys.prefix, **environment):
        self.jobs += 1
        folder = self.folder / f"job-{self.jobs}"
        folder.mkdir()
        (folder / "site.sh").write_text(SITE.format(gres=gres, venv=venv, disk=disk, ranks=ranks))
        environment = self.environment | {"PING_LLM_SITE": str(folder / "site.sh")} | environment
        submitted = subprocess.run(
            [ROOT / "slurm/submit", "--parsable", *options, kind, *map(str, arguments)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert submitted.returncode == 0, submitted.stderr
        return Job(int(submitted.stdout), environment, folder)


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    (folder / "custom").mkdir()
    (folder / "custom/sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = {"PYTHONPATH": f"{folder / 'custom'}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    try:
        clients = slurm_cluster.up(folder / "slurm", nodes=2, gpus=2, cpus=min(2, os.cpu_count()))
        yield Cluster(folder, os.environ | clients | paths)
    finally:
        slurm_cluster.down(folder / "slurm")
        shutil.rmtree(folder)


def training(rows, run_dir, *options):
    """The arguments of a run of 0.03M parameters."""
    sizes = "--model.n-layer 1 --model.n-embd 32 --model.n-head 2 --model.seq-len 64 --train.batch-size 8"
    rest = "--train.eval-windows 8 --train.eval-queries 8 --train.log-every 1 --train.precision fp32 --train.device cpu"
    where = [ROOT / "configs/tiny.toml", "--data.rows", rows, "--train.run-dir", run_dir]
    return [str(part) for part in (*where, *sizes.split(), *rest.split(), *options)]


def train_here(arguments):
    command = [sys.executable, "-m", "ping_llm.train", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=HANG_S)


def losses(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}


def last_weights(run_dir):
    return max(run_dir.glob("checkpoints/step-*")).joinpath("model.safetensors").read_bytes()


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def long_job(cluster, rows_folder):
    """A job that would need longer than its minute in its first two turns; it runs beside the other tests."""
    run_dir = cluster.folder / "long"
    arguments = training(
        rows_folder, run_dir, "--train.total-steps", 150, "--train.checkpoint-every", 1000, "--data.workers", 1
    )
    options = ("--time=1", "--signal=TERM@5")
    return cluster.submit("train", *arguments, options=options, SLOW_TURNS="2"), run_dir


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dumps")
    synthesize(folder, probes=30, targets=20, days=2.5, seed=0, workers=1)
    assert len(list(folder.glob("*.bz2"))) > 2
    return folder


def chain(job):
    """The numbers of a job of prepare, of the arrays that follow it, and of the jobs that go on after them."""
    numbers, number = [], job.number
    while True:
        here = Job(number, job.environment, job.folder)
        assert here.wait() in ("COMPLETED", "FAILED")
        numbers.append(number)
        if "job array" not in here.output():
            return numbers
        words = here.output().split("job array ")[1].split()
        numbers.append(int(words[0]))
        number = int(words[5])


def test_arrays_prepare_the_same_bytes_as_one_machine(cluster, long_job, dumps, tmp_path):
    prepare([dumps], tmp_path / "here", workers=1)
    job = cluster.submit("prepare", dumps, "--out", tmp_path / "there", MAX_ARRAY="2")
    numbers = chain(job)
    last = Job(numbers[-1], job.environment, job.folder)
    assert len(numbers) == 5 and last.fields()["JobState"] == "COMPLETED", last.output()
    assert "lines read" in last.output()
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_a_damaged_dump_ends_the_arrays_in_one_line_and_is_prepared_once_it_is_mended(
    cluster, long_job, dumps, tmp_path
):
    shutil.copytree(dumps, tmp_path / "dumps")
    damaged = sorted((tmp_path / "dumps").glob("*.bz2"))[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    arguments = (tmp_path / "dumps", "--out", tmp_path / "rows")
    job = cluster.submit("prepare", *arguments)
    last = Job(chain(job)[-1], job.environment, job.folder)
    assert last.fields()["JobState"] == "FAILED"
    (error,) = last.errors()
    assert damaged.name in error
    assert not (tmp_path / "rows/manifest.json").exists()
    damaged.write_bytes(whole)
    job = cluster.submit("prepare", *arguments)
    assert Job(chain(job)[-1], job.environment, job.folder).fields()["JobState"] == "COMPLETED"
    assert (tmp_path / "rows/manifest.json").exists()


def test_two_nodes_of_two_ranks_learn_what_one_process_learns(cluster, long_job, rows_folder, tmp_path):
    disk = tmp_path / "disk"  # of both nodes: they are one machine
    disk.mkdir()
    arguments = training(rows_folder, tmp_path / "there", "--train.total-steps", 6)
    job = cluster.submit("train", *arguments, options=["--nodes=2"], ranks=2, gres="gpu:2", disk=disk)
    train_here(training(rows_folder, tmp_path / "here", "--train.total-steps", 6))
    assert job.wait() == "COMPLETED", job.output()
    assert losses(tmp_path / "there") == pytest.approx(losses(tmp_path / "here"), rel=1e-4)
    assert len(losses(tmp_path / "here")) == 6
    assert json.loads((tmp_path / "there/machine.json").read_text())["processes"] == 4
    assert (tmp_path / "there/DONE").exists() and not (tmp_path / "there/PREEMPTED").exists()
    (copy,) = (path for path in disk.iterdir() if path.is_dir())
    assert files(copy) == files(rows_folder)


def test_a_crash_ends_the_job_in_one_line_and_does_not_bring_it_back(cluster, long_job, rows_folder, tmp_path):
    run_dir = tmp_path / "run"
    arguments = training(rows_folder, run_dir, "--train.total-steps", 10, "--train.checkpoint-every", 2)
    job = cluster.submit("train", *arguments, CRASH_AT="0.5", ranks=2)
    assert job.wait() == "FAILED"
    assert job.fields()["Restarts"] == "0"
    (error,) = job.errors()
    step = max(int(path.name.removeprefix("step-")) for path in run_dir.glob("checkpoints/step-????????"))
    assert step in (2, 4)  # 2 where the crash overtook the disk
    assert f"training ended with code 1 after step {step} of" in error and "Submitted again, it continues" in error
    assert {path.name for path in run_dir.iterdir()}.isdisjoint({"DONE", "PREEMPTED"})
    time.sleep(3)
    assert job.fields()["JobState"] == "FAILED"


def test_a_sweep_is_an_array_of_jobs_that_learn_what_one_machine_learns(cluster, long_job, rows_folder, tmp_path):
    """And a run that fails does not end the others; submitted again, only that one is tried."""
    options = training(rows_folder, "")
    overrides = dict(zip((name.removeprefix("--") for name in options[5::2]), options[6::2], strict=True))
    values = [
        f"{name.replace('-', '_')} = {value if value.isdecimal() else repr(value)}" for name, value in overrides.items()
    ]
    sweep = tmp_path / "sweep.toml"
    text = f"base = '{ROOT}/configs/tiny.toml'\nout = '{tmp_path}/runs'\nseeds = [0, 1]\n[config]\n"
    text += "\n".join([f"data.rows = '{rows_folder}'", "train.total_steps = 6", *values, "[[runs]]", "[[runs]]"])
    sweep.write_text(text + "\nname = 'crash'\nmodel.n_layer = 2\n")
    array = cluster.submit("sweep", sweep, CRASH_AT="0.5", CRASH_IN="crash")
    jobs = [Job(f"{array.number}_{number}", array.environment, array.folder) for number in range(4)]
    states = [job.wait() for job in jobs]
    runs = [tmp_path / "runs" / f"{name},seed={seed}" for name in ("base", "crash") for seed in (0, 1)]
    logs = [(run / "train.log").read_text() for run in runs]
    assert states == ["COMPLETED"] * 2 + ["FAILED"] * 2, logs
    assert [(run / "DONE").exists() for run in runs] == [True, True, False, False]
    assert "training ended with code 1 after step" in logs[2] and f"{runs[0]}/train.log" in jobs[0].output()
    train_here([*training(rows_folder, tmp_path / "here", "--train.total-steps", 6), "--seed", "1"])
    assert last_weights(runs[1]) == last_weights(tmp_path / "here") != last_weights(runs[0])

    again = cluster.submit("sweep", sweep)
    assert [Job(f"{again.number}_{number}", again.environment, again.folder).wait() for number in (2, 3)] == [
        "COMPLETED"
    ] * 2
    assert all((run / "DONE").exists() for run in runs) and (runs[0] / "train.log").read_text() == logs[0]


BAD = {
    "no GPU": (
        {"gres": "gpu:2", "ranks": ""},
        ["--train.device", "auto"],
        ": 0 GPUs can be used for 2 ranks (SLURM gave 2)",
    ),
    "batch": ({"ranks": 3}, [], "train.batch_size=8 must be a multiple of train.grad_accum=1 times the 3 processes"),
    "no rows": ({}, ["--data.rows", "nowhere"], "no rows in nowhere; run"),
    "full disk": ({"disk": "/tmp", "FREE_BYTES": "1000"}, [], "/tmp has 0.0 MB free"),
    "no disk": ({"disk": "/nowhere"}, [], ": there is no folder /nowhere"),
    "no environment": ({"venv": "/nowhere"}, [], "no Python environment in /nowhere; run make install"),
}


@pytest.fixture(scope="module")
def bad_jobs(cluster, long_job, rows_folder):
    """All at once: most of their time is spent importing."""
    jobs = {}
    for name, (settings, options, _) in BAD.items():
        run_dir = cluster.folder / f"run {name}"
        jobs[name] = cluster.submit("train", *training(rows_folder, run_dir, *options), **settings), run_dir
    return jobs


@pytest.mark.parametrize("name", BAD)
def test_a_job_that_cannot_train_is_one_clear_line_and_leaves_nothing(bad_jobs, name):
    job, run_dir = bad_jobs[name]
    assert job.wait() == "FAILED"
    (error,) = job.errors()
    assert BAD[name][2] in error
    assert not run_dir.exists()


def test_evaluation_on_a_node_without_a_usable_gpu_is_one_clear_line(cluster, long_job, tmp_path):
    job = cluster.submit("eval", "run", "--data", "rows", "--out", tmp_path / "report", gres="gpu:1")
    assert job.wait() == "FAILED"
    (error,) = job.errors()
    assert ": 0 GPUs can be used for 1 ranks (SLURM gave 1)" in error
    assert not (tmp_path / "report").exists()


@pytest.mark.skipif("eval" not in cli._COMMANDS, reason="there is no ping-llm eval")
def test_evaluation_gets_the_arguments_as_they_were_given(cluster, long_job, tmp_path):
    job = cluster.submit("eval", tmp_path / "no run", "--data", tmp_path / "no rows", "--out", tmp_path / "report")
    assert job.wait() == "FAILED"
    (error,) = job.errors()
    assert "no run" in error


def test_a_job_that_hits_its_time_limit_twice_ends_with_the_weights_of_one_that_does_not(
    long_job, rows_folder, tmp_path
):
    job, run_dir = long_job
    markers = set()
    state = job.wait(lambda: markers.update(path.name for path in run_dir.iterdir()), turns_of_a_minute=2)
    assert state == "COMPLETED", job.output()
    assert job.fields()["Restarts"] == "2"
    stops = [int(step.replace(",", "")) for step in re.findall(r"was stopped after step ([\d,]+);", job.output())]
    assert len(stops) == 2 and 0 < stops[1] < 150
    assert "PREEMPTED" in markers and "DONE" not in markers
    assert (run_dir / "DONE").exists() and not (run_dir / "PREEMPTED").exists()
    train_here(training(rows_folder, tmp_path, "--train.total-steps", 150))
    assert last_weights(run_dir) == last_weights(tmp_path)
    assert losses(run_dir) == losses(tmp_path)


def test_a_cluster_that_goes_down_leaves_no_process(tmp_path):
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        environment = os.environ | slurm_cluster.up(folder, nodes=1, gpus=0, cpus=1)
        wait = ["sbatch", "--parsable", "--output=/dev/null", "--wrap", "trap '' TERM; sleep 1234 & wait; wait"]
        job = subprocess.run(
            wait, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=HANG_S
        )
        end = time.monotonic() + HANG_S
        while Job(int(job.stdout), environment, tmp_path).fields()["JobState"] != "RUNNING":
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        slurm_cluster.down(folder)
    place = str(folder).encode()
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            known = (
                (process / "environ").read_bytes(),
                (process / "cmdline").read_bytes(),
                os.readlink(process / "cwd").encode(),
            )
            left += [known] if any(place in each for each in known) else []
    shutil.rmtree(folder)
    assert not left
