"""A watch that trains over a real ssh and a real rsync, on a real sshd of this machine, where those are installed."""

import getpass
import os
import pwd
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from gpu_cloud_server import RENT, TRAIN, go, types
from servers import wait_for

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


def missing():
    """Why there can be no sshd; empty if there can be one."""
    if lacking := [name for name in ("ssh", "ssh-keygen", "rsync") if not shutil.which(name)] + ["sshd"] * (not SSHD):
        return f"{', '.join(lacking)} not installed"
    users = [user.pw_name for user in pwd.getpwall()]
    return "sshd of root needs a user sshd" if os.geteuid() == 0 and "sshd" not in users else ""


@pytest.fixture
def sshd(tmp_path):
    """Options of ssh that lead to an sshd whose users have the home `tmp_path/home`."""
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("host", "mine"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "mine.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "PermitRootLogin": "yes",
        "SetEnv": f"PATH={os.environ['PATH']} LD_LIBRARY_PATH={os.environ.get('LD_LIBRARY_PATH', '/nowhere')}",
        "ForceCommand": f'export HOME={shlex.quote(str(home))}; cd; eval "$SSH_ORIGINAL_COMMAND"',
    }
    (tmp_path / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in config.items()))
    with (tmp_path / "sshd.log").open("w") as log:
        daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=log)

    def listens():
        assert daemon.poll() is None, (tmp_path / "sshd.log").read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listens)
        yield (f"Port={port}", f"IdentityFile={tmp_path / 'mine'}", "IdentitiesOnly=yes")
    finally:
        daemon.terminate()
        daemon.wait()


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_run_is_trained_over_a_real_connection_and_is_brought_back(gpus, tmp_path, sshd, monkeypatch, capsys):
    checkout, disk = tmp_path / "checkout", tmp_path / "large disk"
    (checkout / "configs").mkdir(parents=True)
    (checkout / "configs" / "tiny.toml").write_text("[model]\n")
    (disk / "rows with spaces").mkdir(parents=True)
    (disk / "rows with spaces" / "a'b.arrayrecord").write_bytes(bytes(1000))
    (checkout / "data").symlink_to(disk)  # as checkouts often have it
    (checkout / "runs").symlink_to(disk)
    monkeypatch.chdir(checkout)
    gpus.types = types("us-east-1")
    shout = 'for i in 1 2 3; do echo "line $i é"; sleep 0.2; done'
    train = f"{TRAIN}; cp -r 'data/rows with spaces' runs/tiny; {shout}; exit 4"
    options = RENT | {
        "launch": train,
        "copy": ("configs", "data/rows with spaces"),
        "bring": ("runs/tiny", "configs/tiny.toml"),
        "ssh_user": getpass.getuser(),
        "ssh_option": sshd,
    }
    assert go(gpus, tmp_path, **options, terminate=True) == 4
    out = capsys.readouterr().out.splitlines()
    assert out[4:9] == ["[model]", "trained", "line 1 é", "line 2 é", "line 3 é"]
    assert out[9] == "the command ended with code 4; here: runs/tiny, configs/tiny.toml"
    assert (checkout / "runs").is_symlink() and (disk / "tiny" / "metrics").read_text() == "once\n"
    assert (disk / "tiny" / "rows with spaces" / "a'b.arrayrecord").read_bytes() == bytes(1000)
    assert not (tmp_path / "home" / "ping-llm" / "data").is_symlink()
    assert "ssh-ed25519" in (tmp_path / "state" / "known_hosts").read_text()
    with pytest.raises(ValueError, match=r"did not copy everything: rsync: .*runs/other.*still rented"):
        go(gpus, tmp_path / "b", **options | {"name": "b", "bring": ("runs/other",), "copy": ("configs",)})
