"""The service as a process: what it refuses to begin with, clients that misbehave, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from paths import ROOT
from serve_runs import PING, SRC, make_run
from servers import wait_for
from waiting import HANG_S

from ping_llm import cli
from ping_llm.serve import server as server_module

BODY = json.dumps(PING).encode()
QUERY = b"POST /v1/rtt HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)
SOON = ["--body-s", "0.5", "--idle-s", "1", "--stalled-s", "1.5", "--answer-s", str(HANG_S)]


class Served:
    """A service in a process of its own."""

    def __init__(self, run_dir: Path, *options: str) -> None:
        command = [sys.executable, "-m", "ping_llm", "serve", "--model", str(run_dir), "--device", "cpu", "--port", "0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([*command, *options], env=environment, text=True, **pipes)
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + self.process.stderr.read()
        self.port = int(found[1])
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=HANG_S, trust_env=False)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def is_well(self) -> bool:
        return self.http.post("/v1/rtt", json=PING).status_code == 200

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self) -> tuple[int, list[dict]]:
        """Exit code and lines of the log."""
        self.process.send_signal(signal.SIGTERM)
        _, err = self.process.communicate(timeout=HANG_S)
        return self.process.returncode, [json.loads(line) for line in err.splitlines()]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def served(run_dir):
    served = Served(run_dir, *SOON)
    yield served
    code, lines = served.end()
    assert code == 0 and {line["level"] for line in lines} <= {"info", "warning"}, lines
    assert SRC not in json.dumps(lines) and "127.0.0.1" not in json.dumps(lines)


def all_that_comes(connection: socket.socket) -> bytes:
    """Until the service closes the connection."""
    found = b""
    try:
        while part := connection.recv(1 << 16):
            found += part
    except ConnectionResetError:
        pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [
        b"\0\1\2\3" * 100,
        b"GET / HTTP/9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"x" * 200_000,
        b"POST /v1/rtt HTTP/1.1\r\nHost: x\r\n",
        b"POST /v1/rtt HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        QUERY.replace(b"%d" % len(BODY), b"99999999999"),
    ],
)
def test_garbage_is_refused_and_its_connection_ends(served, sent):
    with served.connect() as connection:
        connection.sendall(sent)
        answer = all_that_comes(connection)
    assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 431"))
    assert served.is_well()


@pytest.mark.slow
def test_bad_requests_by_the_hundred_change_nothing(served):
    for number in range(300):
        bad = [b"{", b"[]", b"\xff", b'{"src": "nobody"}', b"[" * 5000, b'{"at": 1e999}'][number % 6]
        response = served.http.post("/v1/rtt", content=bad, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and set(response.json()) == {"error"}
    assert served.is_well()


@pytest.mark.slow
def test_slow_clients_are_ended(served):
    before = served.files()
    silent, begun, slow, half = (served.connect() for _ in range(4))
    begun.sendall(b"POST /v1/rtt HT")
    half.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /heal")  # a request, and the begin of another
    slow.sendall(QUERY + BODY[:5])
    answer = all_that_comes(slow)
    assert answer.startswith(b"HTTP/1.1 408") and b"the body did not come within 0.5 s" in answer
    assert all_that_comes(silent) == all_that_comes(begun) == b""
    assert all_that_comes(half).startswith(b"HTTP/1.1 200")
    for one in (silent, begun, slow, half):
        one.close()
    assert served.is_well()
    wait_for(lambda: served.files() <= before)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_ended(served):
    before = served.files()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", served.port))
        asked = b"GET /docs/swagger/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
        deaf.sendall(asked * 8)  # more than the kernel keeps for it
        wait_for(lambda: served.files() > before)
        wait_for(lambda: served.files() <= before)
    assert served.is_well()


@pytest.mark.slow
def test_connections_that_are_cut_leave_nothing_behind(served):
    served.is_well()
    before = served.files()
    for number in range(40):
        with served.connect() as connection:
            connection.sendall((QUERY + BODY)[: 20 + number * 5])
            if number % 2:  # ends with a reset, not in peace
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_for(lambda: served.files() <= before)
    assert served.is_well()
    assert served.metric("ping_llm_requests_under_way") == 1  # the one that asks


@pytest.mark.slow
def test_a_client_that_sends_too_much_hears_so(served):
    for size in (3 << 20, 20 << 20):  # read on, so that it hears; beyond that only its announcement is read
        with served.connect() as connection:
            connection.sendall(QUERY.replace(b"%d" % len(BODY), b"%d" % size))
            if size < 16 << 20:
                connection.sendall(b" " * size)
            answer = b""
            while b"}" not in answer:
                answer += connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 413") and b"more than 2,097,152 bytes" in answer


@pytest.mark.slow
def test_on_sigterm_what_was_taken_is_answered_and_nothing_more_is_taken(run_dir):
    served = Served(run_dir)
    idle = served.connect()
    idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert idle.recv(1 << 16).startswith(b"HTTP/1.1 200")
    body = json.dumps({"src": SRC, "queries": [{"dst": f"198.51.100.{i}"} for i in range(1, 97)]}).encode()
    with served.connect() as taken:
        taken.sendall(QUERY.replace(b"%d" % len(BODY), b"%d" % len(body)) + body)
        end = time.monotonic() + HANG_S
        while served.metric("ping_llm_requests_under_way") < 2 and not served.metric("ping_llm_queries_total"):
            assert time.monotonic() < end
        code, lines = served.end()
        head, _, answer = all_that_comes(taken).partition(b"\r\n\r\n")
    assert code == 0
    assert head.startswith(b"HTTP/1.1 200") and len(json.loads(answer)["answers"]) == 96
    assert all_that_comes(idle) in (b"", b'{"ok": true}')  # and its connection ends
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        served.connect()
    assert [line["status"] for line in lines if line["event"] == "request" and line["route"] == "/v1/rtt"] == [200]


def refusal(capsys, *argv: object) -> str:
    """What the command says instead of serving."""
    assert cli.main(["serve", *map(str, argv)]) == 1
    out, err = capsys.readouterr()
    assert not out
    return err.splitlines()[-1].removeprefix("error: ")


def test_an_address_of_others_needs_a_token(run_dir, capsys):
    for host in ("0.0.0.0", "::", "192.0.2.1", ""):
        said = refusal(capsys, "--model", run_dir, "--host", host, "--port", 0)
        assert (
            said.startswith(f"--host {host} is open to other machines; give --token-file FILE") or "no address" in said
        )
    assert "is no address to listen at" in refusal(capsys, "--model", run_dir, "--host", "no.such.host.invalid")
    server_module.listen_at("0.0.0.0", 0, True).close()
    for host in ("127.0.0.1", "localhost"):
        with server_module.listen_at(host, 0, False) as bound:
            assert server_module.url_of(bound).startswith("http://127.0.0.1:")


def test_a_port_that_is_taken_is_named(run_dir, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refusal(capsys, "--model", run_dir, "--port", port)
    assert said == f"cannot listen at 127.0.0.1 port {port} (Address already in use); give another --port or --host"
    for port in (-1, 65536):
        assert (
            refusal(capsys, "--model", run_dir, "--port", port)
            == f"--port {port} must be from 0, for a free one, to 65535"
        )


@pytest.mark.parametrize(
    "content", [b"", b"short\n", b"two words of a sentence", "dreizehnundeinhält".encode(), b"\xff" * 20]
)
def test_a_token_is_one_long_word(run_dir, tmp_path, capsys, content):
    (tmp_path / "token").write_bytes(content)
    (tmp_path / "token").chmod(0o600)
    said = refusal(capsys, "--model", run_dir, "--token-file", tmp_path / "token")
    assert "must hold one word of at least 16 characters" in said or "cannot be read (it is no text)" in said


def test_a_token_that_is_not_there_or_open_to_all_is_told(run_dir, tmp_path, capsys, caplog):
    said = refusal(capsys, "--model", run_dir, "--token-file", tmp_path / "token")
    assert "cannot be read (No such file or directory); make one: python -c" in said
    (tmp_path / "token").write_text("correct-horse-battery\n")
    (tmp_path / "token").chmod(0o644)
    assert server_module.read_token(tmp_path / "token") == "correct-horse-battery"
    assert "can be read by other users of this machine; chmod 600 it" in caplog.text
    caplog.clear()
    (tmp_path / "token").chmod(0o600)
    assert server_module.read_token(tmp_path / "token") == "correct-horse-battery" and not caplog.text


def test_a_model_is_needed_and_has_to_be_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ping_llm.inference.sources.PRETRAINED", tmp_path)
    said = refusal(capsys)
    assert said.startswith("no model comes with this installation; name one: a run folder")
    assert str(tmp_path) in refusal(capsys, "--model", tmp_path, "--port", 0)


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    out = capsys.readouterr().out
    assert "--token-file" in out and "--body-bytes" in out and "Answer queries over HTTP" in out
