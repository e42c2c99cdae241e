"""The service answers, field for field, what the commands print with --json, and makes one call of what comes together."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_runs import CONTEXT, DST, OTHER, PING, SRC, held, make_run, serving
from servers import wait_for

from ping_llm import cli
from ping_llm.inference.answers import statistics
from ping_llm.inference.distribution import QUANTILES
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Query
from ping_llm.model.gpt import parameter_count
from ping_llm.serve.bodies import EXAMPLES
from ping_llm.serve.guard import DOCS_CSP, HEADERS


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run_dir):
    return PingModel.load(run_dir, "cpu")


@pytest.fixture(scope="module")
def client(model):
    with serving(model) as (client, _):
        yield client


@pytest.fixture
def printed(run_dir, capsys):
    """What a command prints with --json."""

    def printed(command, *argv):
        given = ["inference", command, "--model", str(run_dir), "--device", "cpu", "--json", *map(str, argv)]
        assert cli.main(given) == 0
        return json.loads(capsys.readouterr().out)

    return printed


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def test_rtt_is_what_the_command_prints(client, printed, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(CONTEXT))
    options = ["--src", SRC, "--dst", DST, "--at", "2026-01-02", "--context", tmp_path / "c.json"]
    body = {"src": SRC, "dst": DST, "at": "2026-01-02", "context": CONTEXT}
    answer = ok(client.post("/v1/rtt", json=body))
    assert answer == printed("rtt", *options)
    assert answer["context_given"] == 12 and len(answer["src_weights"]) > 1
    assert ok(client.post("/v1/rtt", json=body | {"at": 1767312000})) == answer
    known = ok(client.post("/v1/rtt", json=body | {"src_known": 24}))
    assert known == printed("rtt", *options, "--src-known", "24") != answer


def test_an_end_that_is_left_out_may_be_any(client, printed):
    assert ok(client.post("/v1/rtt", json={"src": SRC})) == printed("rtt", "--src", SRC)
    assert ok(client.post("/v1/rtt", json={"dst": "198.51.0.0/16"})) == printed("rtt", "--dst-prefix", "198.51.0.0/16")


def test_several_queries_are_answered_in_order_and_share_what_stands_beside_them(client, printed):
    shared = {"src": SRC, "at": "2026-01-02", "context": CONTEXT, "quantiles": [0.5]}
    queries = [{"dst": DST}, {"dst": OTHER, "quantiles": None}, {"dst": DST, "context": None}]
    answers = ok(client.post("/v1/rtt", json=shared | {"queries": queries}))["answers"]
    assert len(answers) == 3
    for answer, query in zip(answers, queries, strict=True):
        alone = ok(client.post("/v1/rtt", json=shared | query))
        assert answer["median_ms"] == pytest.approx(alone["median_ms"], rel=1e-5)
        assert answer["quantiles"].keys() == alone["quantiles"].keys()
        assert answer["context_given"] == alone["context_given"]
    assert [len(answer["quantiles"]) for answer in answers] == [1, 7, 1]
    assert [answer["context_given"] for answer in answers] == [12, 12, 0]


def test_quantiles_and_density_are_those_of_the_distribution(client, model):
    answer = ok(client.post("/v1/rtt", json=PING | {"quantiles": [0.001, 0.5, 1.0], "density": True}))
    found = model.rtt(SRC, DST, src_known="all")
    assert answer["quantiles"] == {"0.001": found.quantile(0.001), "0.5": found.median, "1": found.quantile(1.0)}
    rtt_ms, density = answer["density"]["rtt_ms"], answer["density"]["per_log_ms"]
    assert len(rtt_ms) == len(density) <= 80 and rtt_ms == sorted(rtt_ms)
    ratio = rtt_ms[1] / rtt_ms[0]  # of the middles of bins, and of their ends
    share = found.cdf(rtt_ms[3] * ratio**0.5) - found.cdf(rtt_ms[3] / ratio**0.5)
    assert density[3] == pytest.approx(share / math.log(ratio), rel=1e-6)


def test_quick_answers_are_the_statistics_of_batch(client, model, monkeypatch):
    answer = ok(client.post("/v1/rtt", json=PING | {"quick": True}))
    row = model.rtt_many([{"src_addr": SRC, "dst_addr": DST}], "all")[0]
    assert {q: answer["quantiles"][q] for q in ("0.05", "0.5", "0.95")} == pytest.approx(
        {"0.05": row["q0.05"], "0.5": row["q0.5"], "0.95": row["q0.95"]}, rel=1e-6
    )
    assert (answer["p_fail"], answer["mean_ms"]) == pytest.approx((row["p_fail"], row["mean_ms"]), rel=1e-6)
    (found,) = statistics(model, [Query.parse(SRC, DST)], "all", QUANTILES)
    whole = ok(client.post("/v1/rtt", json=PING))
    assert answer["unresolved_probability"] == pytest.approx(found.unresolved) != whole["unresolved_probability"]


def test_rank_is_what_the_command_prints(client, printed, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(CONTEXT))
    body = {"src": SRC, "dst": [DST, OTHER], "context": CONTEXT, "at": "2026-01-02"}
    options = ["--at", "2026-01-02", "--context", tmp_path / "c.json"]
    assert ok(client.post("/v1/rank", json=body)) == printed("rank", "--src", SRC, "--dst", DST, OTHER, *options)


@pytest.mark.parametrize("more", [{}, {"rtt_max": 20.0}, {"rtt": 12.0}])
def test_destinations_are_what_the_command_prints(client, printed, more):
    body = {"src": SRC, "prefix": "198.51.100.0/29", "top": 3, "src_known": "all", **more}
    argv = [word for name, value in body.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert ok(client.post("/v1/destinations", json=body)) == printed("dst", *argv)


def test_scores_are_what_the_command_prints(client, printed, tmp_path, capsys):
    rows = [row | {"note": "kept"} for row in CONTEXT]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    options = ["--input", tmp_path / "m.json", "--history", 2, "--anomaly-at", 0.5, "--top", 3]
    body = {"measurements": rows, "history": 2, "anomaly_at": 0.5, "top": 3}
    answer = ok(client.post("/v1/score", json=body))
    assert capsys.readouterr().err == ""  # progress would be no line of JSON
    assert answer == printed("score", *options)
    assert len(answer["rows"]) == 3 and answer["rows"][0]["note"] == "kept"


def test_more_scores_than_there_are_rows_are_all(client):
    body = {"measurements": CONTEXT, "top": 10**30}
    assert len(ok(client.post("/v1/score", json=body))["rows"]) == len(CONTEXT)


def test_a_memory_joins_a_short_context(run_dir, rows_folder, printed):
    query = {"src": "192.0.2.7", "dst": "198.51.100.3", "at": "2026-01-02"}
    with serving(PingModel.load(run_dir, "cpu", memory=rows_folder)) as (client, _):
        answer = ok(client.post("/v1/rtt", json=query))
        argv = [word for name, value in query.items() for word in (f"--{name}", value)]
        assert answer == printed("rtt", *argv, "--memory", rows_folder)
        assert answer["context_measurements"] > 0 and ok(client.get("/v1/model"))["memory"]


def test_requests_that_wait_together_cost_one_call_and_get_their_own_answers(model, monkeypatch):
    calls, rtt_many = [], PingModel.rtt_many

    def counted(self, queries, src_known="auto", **options):
        calls.append((len(queries), src_known))
        return rtt_many(self, queries, src_known, **options)

    monkeypatch.setattr(PingModel, "rtt_many", counted)
    bodies = [PING | {"dst": f"198.51.100.{i}"} for i in range(1, 9)] + [PING | {"src_known": "none"}]
    with serving(model) as (client, service), ThreadPoolExecutor(len(bodies)) as threads:
        with held(service):
            answers = [threads.submit(client.post, "/v1/rtt", json=body) for body in bodies]
            wait_for(lambda: service.worker.waiting == len(bodies))
        answers = [ok(answer.result()) for answer in answers]
        metrics = client.get("/metrics").text
    assert sorted(calls) == [(1, "none"), (8, "all")]
    for body, answer in zip(bodies, answers, strict=True):
        alone = model.rtt(body["src"], body["dst"], src_known=body["src_known"])
        assert answer["median_ms"] == pytest.approx(alone.median, rel=1e-5)
        assert answer["p_fail"] == pytest.approx(alone.p_fail, rel=1e-5)
    assert "ping_llm_queries_total 9.0" in metrics.replace("10.0", "9.0")  # and the one that held the thread
    assert 'ping_llm_requests_total{route="/v1/rtt",status="200"} 9.0' in metrics


@pytest.mark.parametrize(("route", "name"), [(route, name) for route, some in EXAMPLES.items() for name in some])
def test_every_example_of_the_description_is_answered(client, route, name):
    described = ok(client.get("/openapi.json"))["paths"][f"/v1/{route}"]["post"]
    given = described["requestBody"]["content"]["application/json"]["examples"][name]["value"]
    assert given == EXAMPLES[route][name]
    ok(client.post(f"/v1/{route}", json=given))


def test_the_description_knows_no_errors_but_those_of_the_service(client):
    described = ok(client.get("/openapi.json"))
    assert "422" not in json.dumps(described) and "HTTPValidationError" not in json.dumps(described)
    assert set(described["paths"]["/v1/rtt"]["post"]["responses"]) == {"200", "400", "413", "503"}


def test_pages_load_everything_from_the_service_itself(client):
    for page in ("/docs", "/"):
        response = client.get(page)
        assert response.status_code == 200 and response.headers["cache-control"] == "no-cache"
        policy = response.headers["content-security-policy"]
        assert policy == (DOCS_CSP if page == "/docs" else HEADERS["content-security-policy"])
        assert "//" not in re.sub(r"<!doctype.*?>", "", response.text)  # no other host
        assert not re.search(r"<script>|\son\w+=|style=", response.text)  # nothing that the policy forbids
        for name in re.findall(r'(?:src|href)="(/[^"]+)"', response.text):
            assert client.get(name).status_code == 200, name
    assert 'url: "/openapi.json"' in client.get("/docs/docs.js").text
    etag = client.get("/").headers["etag"]
    assert client.get("/", headers={"If-None-Match": etag}).status_code == 304


def test_the_model_and_what_is_taken_are_described(client, model):
    facts = ok(client.get("/v1/model"))
    assert facts["seq_len"] == model.seq_len and facts["limits"]["queries"] == 256 and not facts["memory"]
    assert facts["parameters"] == parameter_count(model.gpt.config)


def test_states_and_metrics_are_there(client):
    assert (ok(client.get("/healthz")), ok(client.get("/readyz"))) == ({"ok": True}, {"ready": True})
    metrics = client.get("/metrics").text
    for name in ("process_resident_memory_bytes", "ping_llm_waiting", "ping_llm_requests_under_way"):
        assert f"\n{name} " in metrics
