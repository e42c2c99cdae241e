"""A sweep on SLURM: what is submitted, and what each job of the array runs, with stand-ins for SLURM's programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from waiting import HANG_S

from ping_llm.launch.sweep import read_sweep

WRITES_DOWN = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$CALLS"\n'
SCONTROL = """\
case "$1 $2" in
    "show job") echo "   Command=$SCRIPT $LIST" ;;
    "show hostnames") echo n1 ;;
    "show node") echo "NodeName=n1 NodeAddr=127.0.0.1 NodeHostName=n1" ;;
esac
"""
PYTHON = 'case $3 in check) echo "5 0" ;; judge) echo "printed by judge"; exit 75 ;; esac\n'


@pytest.fixture
def programs(tmp_path):
    """A folder of stand-ins that write down how they were called, and the environment that finds them."""
    folder = tmp_path / "venv/bin"
    folder.mkdir(parents=True)
    for name, does in {"sbatch": "", "srun": "", "sleep": "", "scontrol": SCONTROL, "python": PYTHON}.items():
        (folder / name).write_text(WRITES_DOWN + does)
        (folder / name).chmod(0o755)
    (tmp_path / "site.sh").write_text(
        "PARTITION= CPU_PARTITION= ACCOUNT= GRES=gpu:1 CPUS= MEM= MODULES=() LOCAL_DISK= RANKS_PER_NODE=\n"
        f"VENV=${{PROGRAMS:-{sys.prefix}}}\n"
    )
    return os.environ | {
        "CALLS": str(tmp_path / "calls"),
        "PING_LLM_SITE": str(tmp_path / "site.sh"),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }


@pytest.fixture
def sweep(tmp_path, rows_folder) -> Path:
    """Of three runs, of which the second is done."""
    path = tmp_path / "sweep.toml"
    text = f"out = '{tmp_path}/runs'\nseeds = [0, 1, 2]\n[config]\ndata.rows = '{rows_folder}'\ntrain.device = 'cpu'\n"
    path.write_text(text)
    done = read_sweep(path)[1].folder
    done.mkdir(parents=True)
    (done / "DONE").touch()
    return path


def run(command: list, environment: dict) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=HANG_S, cwd="/"
    )


def test_an_array_is_submitted_of_the_runs_that_are_left(programs, sweep, tmp_path):
    done = run([ROOT / "slurm/submit", "--nodes=2", "sweep", sweep], programs)
    assert done.returncode == 0, done.stderr
    (call,) = (tmp_path / "calls").read_text().splitlines()
    (listed,) = (tmp_path / "runs").glob("runs-*.txt")
    assert call == f"sbatch --gres=gpu:1 --nodes=2 --array=0,2 {ROOT}/slurm/sweep.sbatch {listed}"
    assert listed.read_text().splitlines() == [f"{tmp_path}/runs/base,seed={seed}/run.toml" for seed in range(3)]


def test_a_mistake_in_the_sweep_or_one_that_is_done_submits_nothing(programs, sweep, tmp_path):
    text = sweep.read_text()
    sweep.write_text(text + "[grid]\nmodel.n_layers = [1]\n")
    done = run([ROOT / "slurm/submit", "sweep", sweep], programs)
    assert done.returncode == 1 and "unknown key model.n_layers; did you mean model.n_layer?" in done.stderr
    sweep.write_text(text.replace("[0, 1, 2]", "[1]"))
    done = run([ROOT / "slurm/submit", "sweep", sweep], programs)
    assert (done.returncode, done.stderr) == (0, f"all 1 runs in {tmp_path}/runs are done\n")
    assert not (tmp_path / "calls").exists()


def test_a_list_that_could_not_be_printed_is_an_error(programs, sweep):
    """Else slurm/submit would take no runs for a sweep that is done."""
    command = [sys.executable, "-m", "ping_llm.launch.sweep_array", sweep]
    lost = run(["bash", "-c", 'exec "$@" >/dev/full', "_", *command], programs)
    assert lost.returncode == 1 and lost.stderr.startswith("error: standard output did not take what was printed")


def test_a_job_of_the_array_trains_its_run_writes_its_log_and_goes_back_to_the_queue_alone(programs, tmp_path):
    """The last job of an array has the number of the whole array: it must not put all of it back."""
    config = tmp_path / "runs/b/run.toml"
    config.parent.mkdir(parents=True)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/runs/a/run.toml\n{config}\n")
    job = {"SLURM_JOB_ID": "40", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    of_job = {"SCRIPT": str(ROOT / "slurm/sweep.sbatch"), "LIST": "list.txt", "PROGRAMS": str(tmp_path / "venv")}
    done = run(["bash", ROOT / "slurm/sweep.sbatch", tmp_path / "list.txt"], programs | job | of_job)
    assert done.returncode == 75
    assert (done.stdout, done.stderr) == (f"{config}: see {config.parent}/train.log\n", "")
    assert (config.parent / "train.log").read_text() == "printed by judge\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    ranks = "srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none python -m ping_llm.launch.slurm_job"
    assert [call for call in calls if not call.startswith("scontrol show")] == [
        f"python -m ping_llm.launch.slurm_job check {config}",
        f"{ranks} node {config}",
        f"{ranks} ranks {config}",
        f"python -m ping_llm.launch.slurm_job judge 0 5 0 {config}",
        "scontrol requeue 40_1",
        "sleep 60",
    ]


def test_a_job_that_is_no_array_goes_back_by_its_number(programs, tmp_path):
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n1", "PROGRAMS": str(tmp_path / "venv"), "LIST": ""}
    environment = programs | job | {"SCRIPT": str(ROOT / "slurm/train.sbatch")}
    assert run(["bash", ROOT / "slurm/train.sbatch", "config.toml"], environment).returncode == 75
    assert "scontrol requeue 41" in (tmp_path / "calls").read_text().splitlines()
