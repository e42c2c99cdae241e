"""A training command and the nodes of a batch job in; ranks started, stopped in time, and the job's end judged out.

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

slurm/train.sbatch calls the first four in this order, slurm/eval.sbatch the last. The run folder tells how a run ended:
DONE, or PREEMPTED while it waits to go on.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ping_llm.config import Config, parse_config
from ping_llm.data.rows import RowReader, manifest_sha256, shard_paths
from ping_llm.training import schedule

DONE, PREEMPTED = "DONE", "PREEMPTED"
REQUEUE = os.EX_TEMPFAIL
SPARE_SHARE = 0.05
"""Of a local disk, left free."""
POLL_S = 0.2
MAX_IDLE_TURNS = 3
"""A job may be stopped before it has saved a step so often in a row, and still go back to the queue."""


@dataclass(frozen=True)
class Node:
    """One node of a job, as its environment tells."""

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
        gpus = int(given("SLURM_GPUS_ON_NODE") or 0)
        ranks = int(given("RANKS_PER_NODE") or (gpus if device != "cpu" else 0) or 1)
        disk = given("LOCAL_DISK") or given("SLURM_TMPDIR") or "none"
        return cls(
            name=given("SLURMD_NODENAME") or socket.gethostname(),
            number=int(given("SLURM_NODEID") or 0),
            nodes=int(given("SLURM_NNODES") or 1),
            gpus=gpus,
            ranks=ranks,
            local_disk=None if disk == "none" else Path(disk),
            master=given("MASTER") or "127.0.0.1:29500",
        )


@dataclass(frozen=True)
class Standing:
    """What a turn of a job begins with."""

    step: int  # of the newest checkpoint
    idle_turns: int  # that the job has just had in a row


def check(config: Config, node: Node) -> Standing:
    """Where the run stands, its markers removed; ValueError if the job cannot train, whatever its nodes are like."""
    config.train.check_processes(node.nodes * node.ranks)
    _shards(config.data.rows)
    marker = config.train.run_dir / PREEMPTED
    standing = Standing(saved(config)[0], int(marker.read_text() or 0) if marker.exists() else 0)
    for name in (DONE, PREEMPTED):
        (config.train.run_dir / name).unlink(missing_ok=True)
    return standing


def check_gpus(device: str, node: Node) -> None:
    """ValueError if fewer GPUs can be used on this node than there are ranks; a job without GPUs may work on the CPU."""
    if device == "cpu" or (device == "auto" and not node.gpus):
        return
    import torch

    usable = torch.cuda.device_count()
    if usable < node.ranks:
        raise ValueError(
            f"{usable} GPUs can be used for {node.ranks} ranks (SLURM gave {node.gpus}); see what nvidia-smi says there, "
            "ask for --gres=gpu:N, or choose the device cpu"
        )


def local_rows(rows: Path, disk: Path) -> Path:
    """Where the copy of rows is: told by their manifest, so that other rows have another place."""
    return disk / f"ping-llm-rows-{manifest_sha256(rows)[:16]}"


def copy_rows(rows: Path, disk: Path) -> Path:
    """Copies what training reads of rows to a local disk, unless it is there; one process a disk copies, others wait.

    ValueError if there is no such disk or no space on it.
    """
    if not disk.is_dir():
        raise ValueError(f"there is no folder {disk} for a copy of the rows; set LOCAL_DISK to another one, or to none")
    copy = local_rows(rows, disk)
    aside = copy.with_name(f"{copy.name}.partial")
    with copy.with_name(f"{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # is released if this process dies
        if copy.exists():
            return copy
        shutil.rmtree(aside, ignore_errors=True)
        files = [*_shards(rows), *(path for path in rows.iterdir() if path.is_file() and path.suffix != ".arrayrecord")]
        needed, space = sum(path.stat().st_size for path in files), shutil.disk_usage(disk)
        if needed > space.free - SPARE_SHARE * space.total:
            raise ValueError(
                f"the rows take {needed / 1e6:,.1f} MB, {disk} has {space.free / 1e6:,.1f} MB free; free some, or set "
                "LOCAL_DISK to another folder, or to none"
            )
        aside.mkdir()
        for path in files:
            shutil.copyfile(path, aside / path.name)
        aside.rename(copy)
    return copy


def run_ranks(argv: Sequence[str], config: Config, node: Node) -> int:
    """Runs this node's ranks; the exit code of torchrun. SIGTERM marks the run as PREEMPTED and has them save and stop.

    SLURM signals every process of a job. torchrun would give its ranks half a minute and then fail, and a loader process
    would die: so they ignore it, as ranks do until they have a handler; when they do, they are told by SIGUSR1.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    rows = local_rows(config.data.rows, node.local_disk) if node.local_disk else config.data.rows
    address, _, port = node.master.rpartition(":")
    where = [f"--nnodes={node.nodes}", f"--node-rank={node.number}", f"--nproc-per-node={node.ranks}"]
    where += [f"--master-addr={address}", f"--master-port={port}", "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *where,
        "-m",
        "ping_llm.train",
        *argv,
        "--data.rows",
        str(rows),
    ]
    torchrun = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    told = set()
    while torchrun.poll() is None:
        if stop.is_set():
            config.train.run_dir.mkdir(parents=True, exist_ok=True)
            (config.train.run_dir / PREEMPTED).touch()
            for rank in _children(torchrun.pid) - told:
                if _catches(rank, signal.SIGUSR1):  # one that does not yet would be killed by it
                    os.kill(rank, signal.SIGUSR1)
                    told.add(rank)
        time.sleep(POLL_S)
    return torchrun.returncode


def saved(config: Config) -> tuple[int, bool]:
    """The step of the newest checkpoint, 0 if there is none, and whether it is the last of the run."""
    for folder in sorted(config.train.run_dir.glob("checkpoints/step-????????"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text())
            done = schedule.progress(state["step"], state["tokens"], state["elapsed_s"], config.train) >= 1
        except (OSError, ValueError, KeyError):
            continue  # damaged: the trainer goes on from the one before, too
        return state["step"], done
    return 0, False


def judge(code: int, before: Standing, config: Config) -> int:
    """The exit code of the job from that of its ranks: 0 and DONE, or REQUEUE if it stopped because it was told to.

    ValueError if it crashed, or was stopped too often before it had saved a step: such a job does not come back for ever.
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
        raise ValueError(
            f"training ended with code {code} after step {step:,} of {run_dir}; the lines above say why. Submitted again, "
            "it continues from there"
        )
    idle_turns = 0 if step > before.step else before.idle_turns + 1
    if idle_turns > MAX_IDLE_TURNS:
        raise ValueError(
            f"{run_dir} was stopped {idle_turns} times in a row before it had saved a step; ask for more --time, then "
            "submit it again"
        )
    (run_dir / PREEMPTED).write_text(str(idle_turns))
    print(f"{run_dir} was stopped after step {step:,}; it goes on when this job has its next turn", flush=True)
    return REQUEUE


def _shards(rows: Path) -> list[Path]:
    """The files that training reads measurements from; ValueError if one is missing."""
    shards = []
    for part in ("train", "val"):
        reader = RowReader(rows, part)
        for name in reader.parts:
            held = shard_paths(rows, name)
            if not held[0].stem.endswith(f"-of-{len(held):05d}"):
                raise ValueError(f"{rows} has lost shards of {name}, {len(held)} are left; run ping-llm prepare again")
        shards += reader.paths
    return shards


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
        numbers = [int(argv.pop(0)) for _ in range(3)] if name == "judge" else []
        config = parse_config(argv, "ping-llm train") if name != "gpus" else None
        asks_no_gpu = "--baselines-only" in argv or any(word in ("cpu", "--device=cpu") for word in argv)
        device = config.train.device if config else "cpu" if asks_no_gpu else "auto"
        node = Node.from_environment(device)
        if name == "check":
            print(*dataclasses.astuple(check(config, node)))
        elif name == "ranks":
            return run_ranks(argv, config, node)
        elif name == "judge":
            return judge(numbers[0], Standing(*numbers[1:]), config)
        else:
            place = f"{node.name}: "
            check_gpus(device, node if config else replace(node, ranks=1))
            if config and node.local_disk:
                print(f"{node.name}: rows in {copy_rows(config.data.rows, node.local_disk)}", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {place}{error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
