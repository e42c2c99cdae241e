"""A folder in, a SLURM cluster of virtual nodes on this machine out; for tests.

    python tests/slurm_cluster.py up /tmp/cluster --nodes 2 --gpus 2
    export SLURM_CONF=/tmp/cluster/slurm.conf
    sbatch …
    python tests/slurm_cluster.py down /tmp/cluster

All daemons listen on the loopback interface, and all their files are in the folder, which others may pass through. Needs
root and Debian's packages slurm-wlm and munge. The GPUs are empty files: SLURM hands them out, no program can use them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from waiting import HANG_S

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
UP_TIMEOUT_S, DOWN_TIMEOUT_S = HANG_S, HANG_S
CONF_NAME = "slurm.conf"

SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
KillWait=5
InactiveLimit=0
MinJobAge=86400
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def problem() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root here; run as root"
    missing = [name for name in DAEMONS if not _find(name)]
    return f"{', '.join(missing)} not found; apt-get install slurm-wlm munge" if missing else ""


def up(folder: Path, nodes: int = 2, gpus: int = 2, cpus: int = 2) -> dict[str, str]:
    """Starts a cluster and waits until its nodes are idle; gives the environment that its clients need.

    cpus: of each node, at most those of this machine. On failure all that was started is stopped again.
    """
    if reason := problem():
        raise ValueError(reason)
    if cpus > (os.cpu_count() or 1):
        raise ValueError(f"{cpus=} must not exceed the {os.cpu_count()} of this machine")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "state").mkdir(exist_ok=True)
    environment = os.environ | {"SLURM_CONF": str(folder / CONF_NAME)}
    names = [f"n{number}" for number in range(1, nodes + 1)]
    try:
        _write_conf(folder, names, gpus, cpus)
        _start_munged(folder)
        _start([_find("slurmctld"), "-i", "-c"], environment)
        for name in names:
            (folder / f"spool-{name}").mkdir(exist_ok=True)
            _start([_find("slurmd"), "-N", name], environment)
        _wait_until(
            lambda: _idle_nodes(environment) == nodes, UP_TIMEOUT_S, f"the nodes are not idle; see {folder}/*.log"
        )
    except BaseException:
        down(folder)
        raise
    return {"SLURM_CONF": environment["SLURM_CONF"]}


def down(folder: Path) -> None:
    """Ends all jobs, then the daemons, by the numbers of their processes; what does not end is killed."""
    conf = folder / CONF_NAME
    environment = os.environ | {"SLURM_CONF": str(conf)}
    if (folder / "slurmctld.pid").exists():
        with contextlib.suppress(ValueError):
            _ask(["scancel", "--user=root"], environment)
            _wait_until(lambda: not _ask(["squeue", "--noheader"], environment), DOWN_TIMEOUT_S, "jobs do not end")
    _end(job_processes(folder), signal.SIGKILL)  # else slurmd would wait for them
    for name in ("slurmctld", "slurmd-*", "munged"):
        pids = [int(file.read_text()) for file in folder.glob(f"{name}.pid") if file.read_text().strip()]
        _end([pid for pid in pids if _is_daemon(pid)], signal.SIGTERM)
    _end(job_processes(folder), signal.SIGKILL)


def job_processes(folder: Path) -> list[int]:
    """Processes of jobs of a cluster: found by their environment, and the daemon that watches over each by its place."""
    setting, found = f"SLURM_CONF={folder / CONF_NAME}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables, name = (process / "environ").read_bytes().split(b"\0"), (process / "cmdline").read_bytes()
            is_job = setting in variables and any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
            if is_job or (name.startswith(b"slurmstepd") and Path(os.readlink(process / "cwd")) == folder):
                found.append(int(process.name))
        except OSError:
            continue  # has ended meanwhile
    return [pid for pid in found if pid != os.getpid()]


def _find(name: str) -> str | None:
    """The path of a program; daemons are not on every user's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _write_conf(folder: Path, names: list[str], gpus: int, cpus: int) -> None:
    """slurm.conf and gres.conf, with ports that are free."""
    host = socket.gethostname().partition(".")[0]
    controller_port, *ports = _free_ports(1 + len(names))
    for number in range(gpus):
        (folder / f"gpu{number}").touch()
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    hardware = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb}{gres} State=UNKNOWN"
    nodes = [f"NodeName={name} Port={port} {hardware}" for name, port in zip(names, ports, strict=True)]
    text = SLURM_CONF.format(host=host, controller_port=controller_port, folder=folder, nodes="\n".join(nodes))
    (folder / CONF_NAME).write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # v2 would ask systemd, which may not be there
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n" if gpus else "")


def _start_munged(folder: Path) -> None:
    """An authentication service of its own, beside any that the machine may run."""
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    _start(
        [_find("munged"), "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", *files], dict(os.environ)
    )


def _start(command: list[str], environment: dict[str, str]) -> None:
    """Runs a daemon that goes to the background by itself."""
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=UP_TIMEOUT_S
    )
    if done.returncode:
        raise ValueError(f"{command[0]} did not start: {done.stderr.strip() or done.stdout.strip()}")


def _idle_nodes(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N %t"]
    return sum(line.split()[1] == "idle" for line in _ask(command, environment).splitlines())


def _ask(command: list[str], environment: dict[str, str]) -> str:
    """What a client of the cluster prints; nothing if there is no answer."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=UP_TIMEOUT_S).stdout


def _free_ports(count: int) -> list[int]:
    """Ports that no one listens on; all are held until the last is found, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _is_daemon(pid: int) -> bool:
    """Whether a number in an old file is still that of a daemon, not of another process since."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False
    return Path(name.decode(errors="replace")).name in DAEMONS


def _end(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        _kill(pid, number)
    try:
        _wait_until(lambda: not any(map(_alive, pids)), DOWN_TIMEOUT_S, "")
    except ValueError:
        for pid in pids:
            _kill(pid, signal.SIGKILL)


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_until(condition: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise ValueError(otherwise)
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description="A SLURM cluster of virtual nodes on this machine.")
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("folder", type=Path, help="for the files of its daemons")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2, help="empty files, of each node")
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="of each node")
    options = parser.parse_args()
    folder = options.folder.absolute()
    try:
        if options.action == "down":
            down(folder)
        else:
            for name, value in up(folder, options.nodes, options.gpus, options.cpus).items():
                print(f"export {name}={value}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
