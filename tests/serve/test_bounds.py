"""What is too much, too late, too many or wrong is refused in one line, before it costs the model anything."""

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_runs import CONTEXT, DST, PING, SRC, held, make_run, serving
from servers import wait_for
from starlette.testclient import TestClient

from ping_llm import cli
from ping_llm.inference.model import PingModel
from ping_llm.serve.app import make_app
from ping_llm.serve.limits import Limits
from ping_llm.serve.logs import json_logs
from ping_llm.serve.service import Service

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run_dir):
    return PingModel.load(run_dir, "cpu")


@pytest.fixture(scope="module")
def client(model):
    with serving(model, Limits(body_bytes=20_000, queries=40, measurements=30, quantiles=3)) as (client, _):
        yield client


def reason(response, status):
    """The one line that says why; errors have no other shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and set(response.json()) == {"error"}
    (line,) = response.json()["error"].splitlines()
    return line


@pytest.mark.parametrize(
    ("body", "argv"),
    [
        ({"src": "192.0.2.300", "dst": DST}, ["--src", "192.0.2.300", "--dst", DST]),
        ({"src": SRC, "dst": "198.51.0.0/40"}, ["--src", SRC, "--dst", "198.51.0.0/40"]),
        ({"src": SRC, "dst": DST, "at": "01/03/2026"}, ["--src", SRC, "--dst", DST, "--at", "01/03/2026"]),
        ({"src": SRC, "dst": DST, "src_known": "some"}, ["--src", SRC, "--dst", DST, "--src-known", "some"]),
        (
            {"src": SRC, "dst": DST, "at": "2025-01-01", "context": CONTEXT},
            ["--src", SRC, "--dst", DST, "--at", "2025-01-01", "--context", "c.json"],
        ),
        ({"src": "192.0.2.2", "context": CONTEXT}, ["--src", "192.0.2.2", "--context", "c.json"]),
        (
            {"src": SRC, "context": [CONTEXT[0] | {"rtt": "fast"}]},
            ["--src", SRC, "--context", "bad.json"],
        ),
    ],
)
def test_the_reason_is_that_of_the_command_line(client, run_dir, tmp_path, monkeypatch, capsys, body, argv):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(CONTEXT))
    (tmp_path / "bad.json").write_text(json.dumps([CONTEXT[0] | {"rtt": "fast"}]))
    assert cli.main(["inference", "rtt", "--model", str(run_dir), "--json", *argv]) == 1
    said = capsys.readouterr().err.removeprefix("error: ").strip()
    assert reason(client.post("/v1/rtt", json=body), 400) == said


@pytest.mark.parametrize(
    ("route", "body", "line"),
    [
        ("rtt", b"{", "the body is no JSON (Expecting property name enclosed in double quotes at character 1)"),
        ("rtt", b"\xff\xfe\0", "the body is no JSON in UTF-8, or is nested too deeply"),
        ("rtt", b"[" * 10_000, "the body is no JSON in UTF-8, or is nested too deeply"),
        ("rtt", b"", "the body must be an object of JSON; send it with Content-Type: application/json"),
        ("rtt", b"[]", "the body must be an object of JSON; send it with Content-Type: application/json"),
        ("rtt", {}, "give the source or the destination of the ping, or both"),
        ("rtt", {"src": SRC, "dts": DST}, "no field 'dts'; did you mean dst?"),
        ("rtt", {"queries": [{"queries": []}]}, "no field 'queries in queries 1'"),
        ("rtt", {"src": SRC, "queries": [{"dts": DST}]}, "no field 'dts in queries 1'; did you mean dst?"),
        ("rtt", {"src": SRC, "context": [{}]}, "the context has no column src_addr; it has none"),
        ("rtt", {"src": "x" * 5000}, "x" * 999 + "…"),
        ("rtt", {"src": 7}, "src: input should be a valid string"),
        ("rtt", {"src": SRC, "at": {}}, "at: input should be text or a number"),
        ("rtt", {"src": SRC, "quantiles": [2]}, "quantiles 1: input should be less than or equal to 1"),
        (
            "rtt",
            {"src": SRC, "context": [{"rtt": [1]}]},
            "row 1: rtt: a list is neither text, nor a number, nor a time",
        ),
        ("rtt", {"src": SRC, "quick": True, "density": True}, "quick answers have no density"),
        ("rtt", {"queries": []}, "queries: list should have at least 1 item"),
        ("rtt", {"queries": [{"src": SRC}, {"src": "x"}]}, "query 2: 'x' is not an IPv4 or IPv6 address"),
        ("rtt", {"src": "\ud800"}, "'\\ud800' is not an IPv4 or IPv6 address"),
        ("rank", {"src": SRC}, "dst is missing"),
        ("rank", {"src": SRC, "dst": []}, "no candidates to rank"),
        ("rank", {"src": SRC, "dst": [DST, DST]}, f"candidate '{DST}' is named twice"),
        ("destinations", {"src": SRC, "rtt": 1, "rtt_max": 2}, "give rtt, the RTT in ms, or rtt_max"),
        ("destinations", {"src": SRC, "top": 101}, "top: input should be less than or equal to 100"),
        ("score", {"measurements": []}, "no measurements to score"),
        ("score", {"measurements": [{"src_addr": SRC}]}, "the table of measurements has no column dst_addr"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(client, route, body, line):
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(f"/v1/{route}", content=given, headers={"Content-Type": "application/json"})
    assert line in reason(response, 400)


@pytest.mark.parametrize(
    ("route", "body", "line"),
    [
        ("rtt", {"queries": [{"src": SRC}] * 41}, "41 queries in a request, at most 40 are taken"),
        ("rtt", {"src": "192.0.0.0/9", "dst": DST}, "stand for 128 of whole bytes, at most 40 are taken"),
        ("rtt", {"src": "192.0.0.0/13", "dst": "198.51.0.0/20"}, "stand for 128 of whole bytes"),
        ("rtt", {"src": SRC, "context": CONTEXT * 3}, "36 rows in a request, at most 30 are taken"),
        ("rtt", {"queries": [{"src": SRC, "context": CONTEXT * 2} for _ in range(2)]}, "48 rows in a request"),
        ("rtt", {"src": SRC, "quantiles": [0.1, 0.2, 0.3, 0.4]}, "4 quantiles, at most 3 are given"),
        ("rank", {"src": SRC, "dst": [f"198.51.100.{i}" for i in range(65)]}, "65 candidates, at most 64 are ranked"),
        ("rank", {"src": SRC, "dst": ["198.0.0.0/9"]}, "stand for 128 of whole bytes"),
        ("destinations", {"src": "192.0.0.0/9"}, "stand for 128 of whole bytes"),
        ("score", {"measurements": CONTEXT * 3}, "36 rows in a request"),
        ("rtt", {"src": SRC, "context": [CONTEXT[0] | {"note": "x" * 20_000}]}, "the body has more than 20,000 bytes"),
    ],
)
def test_what_is_too_much_is_refused(client, route, body, line):
    assert line in reason(client.post(f"/v1/{route}", json=body), 413)


def test_a_context_that_several_queries_share_counts_once(client):
    body = {"src": SRC, "context": CONTEXT * 2, "src_known": "all", "queries": [{"dst": DST}, {"dst": "192.0.2.9"}]}
    assert client.post("/v1/rtt", json=body).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/rtt", 405), ("GET", "/v2", 404), ("PUT", "/", 405)]
)
def test_other_methods_and_paths_are_refused(client, method, path, status):
    assert reason(client.request(method, path), status)


def test_nobody_else_s_page_may_read_answers(client):
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/rtt", headers=headers).status_code == 405
    response = client.post("/v1/rtt", json=PING, headers=headers)
    assert not [name for name in response.headers if name.startswith("access-control")]
    # What a form of another page can send without a question is not taken.
    response = client.post("/v1/rtt", content=json.dumps(PING), headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in reason(response, 400)


def test_a_full_queue_and_too_many_of_one_client_are_told_to_come_again(model):
    with serving(model, Limits(waiting=1, per_client=3)) as (client, service), ThreadPoolExecutor(3) as threads:
        with held(service):
            first = threads.submit(client.post, "/v1/rtt", json=PING)
            wait_for(lambda: service.worker.waiting == 1)
            response = client.post("/v1/rtt", json=PING)
            assert reason(response, 503) == "too many requests are waiting" and response.headers["retry-after"] == "1"
            service.worker.most_jobs = 9
            more = [threads.submit(client.post, "/v1/rtt", json=PING) for _ in range(2)]
            wait_for(lambda: service.worker.waiting == 3)
            response = client.post("/v1/rtt", json=PING)
            assert reason(response, 429).startswith("3 requests of one client are under way")
            assert response.headers["retry-after"] == "1"
            assert client.get("/healthz").status_code == 200
        assert [one.result().status_code for one in (first, *more)] == [200] * 3
        assert client.post("/v1/rtt", json=PING).status_code == 200  # they no longer count


def test_one_that_stops_takes_no_more(model):
    with serving(model) as (client, service):
        service.worker.refuse()
        for response in (client.post("/v1/rtt", json=PING), client.get("/readyz")):
            assert reason(response, 503) == "the service is stopping"
        assert client.get("/healthz").status_code == 200


def test_what_is_not_answered_in_time_is_dropped_unread(model, monkeypatch):
    monkeypatch.setattr(PingModel, "rtt_many", lambda *_, **__: pytest.fail("nobody waits for that"))
    with serving(model, Limits(answer_s=0.05)) as (client, service):
        with held(service):
            assert reason(client.post("/v1/rtt", json=PING), 504).startswith("no answer within 0.05 s")
        wait_for(lambda: service.worker.waiting == 0)
        assert 'ping_llm_dropped_total{why="gone"} 1.0' in client.get("/metrics").text


def test_who_leaves_is_dropped_unread(model, monkeypatch):
    monkeypatch.setattr(PingModel, "rtt_many", lambda *_, **__: pytest.fail("nobody waits for that"))
    with serving(model) as (client, service):
        messages = [{"type": "http.request", "body": json.dumps(PING).encode()}, {"type": "http.disconnect"}]
        sent = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/rtt", "headers": headers, "query_string": b""}
        with held(service):
            asyncio.run(client.app(scope, receive, send))
        wait_for(lambda: service.worker.waiting == 0)
        assert 'ping_llm_requests_total{route="/v1/rtt",status="499"} 1.0' in client.get("/metrics").text
        assert 'ping_llm_dropped_total{why="gone"} 1.0' in client.get("/metrics").text


def test_a_token_guards_answers_and_metrics_and_no_page(model):
    with serving(model, token=TOKEN) as (client, _):
        for given in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": b"Bearer \xff"},
        ):
            for path in ("/v1/model", "/metrics", "/v1/nothing"):
                response = client.get(path, headers=given)
                assert reason(response, 401) == "give the token: Authorization: Bearer TOKEN"
                assert response.headers["www-authenticate"] == "Bearer"
        given = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/model", headers=given).status_code == 200
        assert client.post("/v1/rtt", json=PING, headers=given).status_code == 200
        assert all(client.get(path).status_code == 200 for path in ("/", "/docs", "/healthz", "/readyz"))
        described = client.get("/openapi.json").json()
        assert described["paths"]["/v1/rtt"]["post"]["security"] == [{"token": []}]
        assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


@pytest.mark.parametrize("addresses", [False, True])
def test_the_log_says_addresses_only_if_they_are_wanted(model, capsys, addresses):
    with json_logs(addresses), serving(model, log_addresses=addresses) as (client, _):
        client.post("/v1/rtt", json={"src": SRC, "dst": "2001:db8::7", "src_known": "all"})  # warned of: two families
        client.post("/v1/rtt", json={"src": SRC, "dst": "198.51.100.777"})
        client.get(f"/{SRC}")
        client.get("/healthz")
    err = capsys.readouterr().err
    lines = [json.loads(line) for line in err.splitlines()]
    requests = [(line["method"], line["route"], line["status"]) for line in lines if line["event"] == "request"]
    assert requests == [("POST", "/v1/rtt", 200), ("POST", "/v1/rtt", 400), ("GET", "page", 404)]
    assert any(line["level"] == "warning" and "are of two families" in line["event"] for line in lines)
    assert (SRC in err, "2001:db8::7" in err, "testclient" in err) == (addresses,) * 3
    assert all(line["ms"] >= 0 for line in lines if line["event"] == "request")


def test_the_logs_are_as_they_were_afterwards(capsys):
    log = logging.getLogger("ping_llm")
    before = (log.handlers, log.level, log.propagate)
    with json_logs(False):
        log.info("%s was there", "somebody")
    assert (log.handlers, log.level, log.propagate) == before
    assert json.loads(capsys.readouterr().err)["event"] == "%s was there"


def test_a_failure_is_one_line_to_the_client_and_a_place_in_the_log(model, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError(f"about {SRC}")

    monkeypatch.setattr(PingModel, "rtt_many", fail)
    with json_logs(False), serving(model) as (client, _):
        assert reason(client.post("/v1/rtt", json=PING), 500) == "the service failed; its log says more"
        monkeypatch.undo()
        assert client.post("/v1/rtt", json=PING).status_code == 200
    err = capsys.readouterr().err
    (failed,) = (line for line in map(json.loads, err.splitlines()) if line["level"] == "error")
    assert failed["error"] == "RuntimeError" and any("service.py" in place for place in failed["at"])
    assert SRC not in err


def test_a_dead_thread_is_not_healthy(model):
    client = TestClient(make_app(Service(model, "run", Limits())))  # its thread has never begun
    assert reason(client.get("/healthz"), 500) == "the thread of the model has ended"
    assert client.get("/readyz").status_code == 503


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="--body-bytes 0 must be more than 0"):
        Limits(body_bytes=0)
