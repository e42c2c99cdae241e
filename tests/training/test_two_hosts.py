"""Two machines that train together: network namespaces with an address and a name of their own, joined by a cable."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from training_runs import (
    ENVIRONMENT,
    alone,
    error_lines,
    finish,
    last_step,
    losses,
    wait_until,
    write_config,
)

from ping_llm.config import load_config
from ping_llm.model.checkpoint import load_latest
from ping_llm.training.trainer import train

TOLERANCE = 1e-4  # of a loss, relative: sums are taken in another order, and bf16 inside Muon enlarges the difference
TOOLS = ("ip", "unshare", "hostname")
PORT = 29400  # in namespaces of the test's own
HANGS_S = 600.0
"""Nothing takes so long but what hangs. torchrun itself waits up to 300 s, if one of its agents leaves without a word."""
# Found by every process of the two hosts: steps that last long enough to be interrupted.
SITECUSTOMIZE = """\
import os, time
from ping_llm.training import schedule

lr_scale = schedule.lr_scale

def slow(progress, config):
    time.sleep(float(os.environ["STEP_S"]))
    return lr_scale(progress, config)

schedule.lr_scale = slow
"""


def reason_to_skip() -> str:
    """Why there can be no second host here; empty if there can."""
    missing = [name for name in TOOLS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not found; two hosts need iproute2 and util-linux"
    name = f"ping-llm-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"may not make a network namespace: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


no_hosts = reason_to_skip()
pytestmark = pytest.mark.skipif(bool(no_hosts), reason=no_hosts or "two hosts can be made")


@dataclass(frozen=True)
class Host:
    """A network namespace; what runs in it sees only its own address, and has the host's name."""

    name: str
    namespace: str
    address: str
    interface: str

    def start(self, *command: object, **variables: str) -> subprocess.Popen:
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *map(str, command)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": self.interface} | variables
        return subprocess.Popen([*enter, *named], env=environment, **pipes)

    def crash(self) -> None:
        """Kills every process of this host at once, torchrun and its ranks."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        for pid in map(int, listed.stdout.split()):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    number = os.getpid()
    pair = tuple(
        Host(
            f"host-{side}",
            f"ping-llm-{number}-{side}",
            f"10.{77 + number % 100}.{number // 100 % 256}.{i}",
            f"cable-{side}",
        )
        for i, side in enumerate("ab", 1)
    )
    names = Path("/etc/netns")  # `ip netns exec` lays these files over those of /etc
    begun = names.exists()
    try:
        for host in pair:
            _ip("netns", "add", host.namespace)
            (names / host.namespace).mkdir(parents=True)
            known = "".join(f"{each.address} {each.name}\n" for each in pair)
            (names / host.namespace / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        a, b = pair
        _ip("-n", a.namespace, "link", "add", a.interface, "type", "veth", "peer", b.interface, "netns", b.namespace)
        for host in pair:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/30", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield pair
    finally:
        for host in pair:
            if host.namespace in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout:
                host.crash()
                _ip("netns", "delete", host.namespace)  # and with it the cable
            shutil.rmtree(names / host.namespace, ignore_errors=True)
        if not begun:
            with contextlib.suppress(OSError):  # someone else's hosts are there by now
                names.rmdir()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def torchrun(host: Host, first: Host, config: Path, step_s: float, folder: Path) -> subprocess.Popen:
    """The line of the README, typed on one of two machines."""
    where = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.name}:{PORT}"]
    command = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "ping_llm.train", config]
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return host.start(*command, PYTHONPATH=paths, STEP_S=str(step_s))


@pytest.mark.slow
def test_a_run_on_two_hosts_outlives_the_crash_of_one(hosts, rows_folder, tmp_path):
    """The other ends with a clear line; both started again continue, and the losses are those of one process."""
    a, b = hosts
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    whole = write_config(tmp_path / "whole.toml", rows_folder, run_dir=str(tmp_path / "whole"))
    alone(train, load_config(whole))
    config, run_dir = write_config(tmp_path / "config.toml", rows_folder, checkpoint_every=4), tmp_path / "run"

    there, here = torchrun(b, a, config, 0.3, tmp_path), torchrun(a, a, config, 0.3, tmp_path)
    try:
        wait_until(lambda: last_step(run_dir) >= 6, here, HANGS_S)
        b.crash()
    finally:
        (_, _, errors), (killed, _, _) = finish(here, HANGS_S), finish(there, HANGS_S)
    assert here.returncode not in (0, None) and killed == -signal.SIGKILL
    (line,) = error_lines(errors)
    assert re.search(r"process [01] of 2 stops, because another one of this run ended", line), errors
    assert "Run the same command again to continue" in line
    step = load_latest(run_dir).step
    assert step in (4, 8) and last_step(run_dir) < 12

    there, here = torchrun(b, a, config, 0.0, tmp_path), torchrun(a, a, config, 0.0, tmp_path)
    ends = [finish(process, HANGS_S) for process in (here, there)]
    assert [code for code, *_ in ends] == [0, 0], ends
    said = "".join(out for _, out, _ in ends)
    assert f"continues after step {step}: " in said and "2 processes" in said
    ours, theirs = losses(run_dir), losses(tmp_path / "whole")
    assert [(line["step"], line["tokens"]) for line in ours] == [(line["step"], line["tokens"]) for line in theirs]
    for name in ("loss", "val_loss"):
        expected = [line.get(name) for line in theirs if line.get(name) is not None]
        assert [line.get(name) for line in ours if line.get(name) is not None] == pytest.approx(expected, rel=TOLERANCE)


def test_hosts_know_each_other_by_name_and_no_one_else(hosts):
    a, b = hosts
    code = "import socket; print(socket.gethostname(), socket.gethostbyname('host-a'), socket.if_nameindex())"
    for host in hosts:
        _, out, errors = finish(host.start(sys.executable, "-c", code), HANGS_S)
        assert out.split()[:2] == [host.name, a.address] and host.interface in out, errors
    assert not {a.interface, b.interface} & set(dict(socket.if_nameindex()).values())
