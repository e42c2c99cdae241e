"""A training command and the nodes of a batch job in; ranks started, stopped in time, and the exit code of the job out.

    python -m ping_llm.launch.slurm_job check CONFIG.toml …
        once: batch and rows; prints where the run stands
    python -m ping_llm.launch.slurm_job node CONFIG.toml …
        on each node: GPUs; rows copied to the node's own disk
    python -m ping_llm.launch.slurm_job ranks CONFIG.toml …
        on each node: torchrun
    python -m ping_llm.launch.slurm_job judge CODE … CONFIG.toml …
        once: what the ranks' exit code means, after what `check` printed
    python -m ping_llm.launch.slurm_job gpus [--device cpu]
        whether one GPU can be used, if the job has any

slurm/train.sbatch calls the first four in this order, slurm/eval.sbatch the last. A file in the run folder says how a run
ended: DONE, or PREEMPTED while it waits to be continued.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ping_llm.config import Config
from ping_llm.launch.dial import parse_run
from ping_llm.launch.job import DONE, PREEMPTED, check_run, copy_rows, local_rows, saved
from ping_llm.system.streams import steady_streams

REQUEUE = os.EX_TEMPFAIL
POLL_S = 0.2
MAX_IDLE_TURNS = 3  # in a row, stopped before a step was saved, after which a job still goes back to the queue


@dataclass(frozen=True)
class Node:
    """One node of a job, by its environment."""

    name: str
    number: int
    nodes: int
    gpus: int  # that the job may use here
    ranks: int
    local_disk: Path | None
    master: str  # address:port of the first node

    @classmethod
    def from_environment(cls, device: str) -> Node:
        """RANKS_PER_NODE, LOCAL_DISK ("none" = do not copy), MASTER and what SLURM sets; without it, one node."""
        given = os.environ.get
        name, number = given("SLURMD_NODENAME") or socket.gethostname(), int(given("SLURM_NODEID") or 0)
        gpus = int(given("SLURM_GPUS_ON_NODE") or 0)
        ranks = int(given("RANKS_PER_NODE") or (gpus if device != "cpu" else 0) or 1)
        disk = given("LOCAL_DISK") or given("SLURM_TMPDIR") or "none"
        local_disk, master = None if disk == "none" else Path(disk), given("MASTER") or "127.0.0.1:29500"
        return cls(name, number, int(given("SLURM_NNODES") or 1), gpus, ranks, local_disk, master)


def check(config: Config, node: Node) -> tuple[int, int]:
    """What a turn of a job begins with, and no more marks: the step of the newest checkpoint, and the idle turns that the
    job has just had in a row. ValueError if it cannot train, whatever its nodes are like."""
    mark = config.train.run_dir / PREEMPTED
    idle_turns = int(mark.read_text() or 0) if mark.exists() else 0
    check_run(config, node.nodes * node.ranks)
    return saved(config)[0], idle_turns


def check_gpus(device: str, node: Node) -> None:
    """ValueError if fewer GPUs can be used on this node than there are ranks; a job without GPUs may work on the CPU."""
    if device == "cpu" or (device == "auto" and not node.gpus):
        return
    import torch

    usable = torch.cuda.device_count()
    if usable < node.ranks:
        found = f"{usable} GPUs can be used for {node.ranks} ranks (SLURM gave {node.gpus})"
        raise ValueError(f"{found}; see what nvidia-smi says there, ask for --gres=gpu:N, or choose the device cpu")


def run_ranks(argv: Sequence[str], config: Config, node: Node) -> int:
    """Runs this node's ranks; the exit code of torchrun. SIGTERM marks the run as PREEMPTED and has them save and stop.

    SLURM signals every process of a job. On SIGTERM torchrun would give its ranks half a minute and then fail, and a loader
    process would die, so both ignore it, as ranks do until they have a handler. Ranks that have one get SIGUSR1 instead.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    rows = local_rows(config.data.rows, node.local_disk) if node.local_disk else config.data.rows
    address, _, port = node.master.rpartition(":")
    where = [f"--nnodes={node.nodes}", f"--node-rank={node.number}", f"--nproc-per-node={node.ranks}"]
    where += [f"--master-addr={address}", f"--master-port={port}", "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"]
    training = ["-m", "ping_llm.train", *argv, "--data.rows", str(rows)]
    command = [sys.executable, "-m", "torch.distributed.run", *where, *training]
    torchrun = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    signalled: set[int] = set()
    while torchrun.poll() is None:
        if stop.is_set():
            config.train.run_dir.mkdir(parents=True, exist_ok=True)
            (config.train.run_dir / PREEMPTED).touch()
            for rank in _children(torchrun.pid) - signalled:
                if _catches(rank, signal.SIGUSR1):  # one that does not yet would be killed by it
                    os.kill(rank, signal.SIGUSR1)
                    signalled.add(rank)
        time.sleep(POLL_S)
    return torchrun.returncode


def judge(code: int, before: tuple[int, int], config: Config) -> int:
    """The exit code of the job from that of its ranks: 0 and DONE, or REQUEUE if it was preempted. `before` is of `check`.

    ValueError if it crashed, or was stopped too often in a row before it had saved a step: such a job is not requeued.
    """
    run_dir = config.train.run_dir
    step, done = saved(config)
    preempted = (run_dir / PREEMPTED).exists()
    (run_dir / PREEMPTED).unlink(missing_ok=True)
    if code == 0 and done:
        (run_dir / DONE).touch()
        print(f"{run_dir} is done, {step:,} steps", flush=True)
        return 0
    if code or not preempted:
        ended = f"training ended with code {code} after step {step:,} of {run_dir}; the lines above say why"
        raise ValueError(f"{ended}. Submitted again, it continues from there")
    idle_turns = 0 if step > before[0] else before[1] + 1
    if idle_turns > MAX_IDLE_TURNS:
        stopped = f"{run_dir} was stopped {idle_turns} times in a row before it had saved a step"
        raise ValueError(f"{stopped}; ask for more --time, then submit it again")
    (run_dir / PREEMPTED).write_text(str(idle_turns))
    print(f"{run_dir} was stopped after step {step:,}; it goes on when this job has its next turn", flush=True)
    return REQUEUE


def _children(parent: int) -> set[int]:
    """The processes that a process has started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if stat.read_text().rpartition(")")[2].split()[1] == str(parent):
                found.add(int(stat.parent.name))
        except OSError:
            continue  # has ended meanwhile
    return found


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def main(argv: Sequence[str]) -> int:
    """Runs one of the five; exit code 1 after one line that says what was wrong, and on which node."""
    name, *argv = argv
    place = ""
    try:
        if name == "gpus":
            no_gpu = "--baselines-only" in argv or any(word in ("cpu", "--device=cpu") for word in argv)
            device = "cpu" if no_gpu else "auto"
            node = dataclasses.replace(Node.from_environment(device), ranks=1)
            place = f"{node.name}: "
            check_gpus(device, node)
            return 0
        numbers = [int(argv.pop(0)) for _ in range(3)] if name == "judge" else []
        config = parse_run(argv, "ping-llm train")
        node = Node.from_environment(config.train.device)
        if name == "ranks":
            return run_ranks(argv, config, node)
        if name == "judge":
            return judge(numbers[0], (numbers[1], numbers[2]), config)
        if name == "check":
            print(*check(config, node))
        else:
            place = f"{node.name}: "
            check_gpus(config.train.device, node)
            if node.local_disk:
                print(f"{place}rows in {copy_rows(config.data.rows, node.local_disk)}", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {place}{error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    with steady_streams():
        sys.exit(main(sys.argv[1:]))
