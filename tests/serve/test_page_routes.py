"""What a page asks the service for: the map of the IPv4 space, tables as files hold them, rows, and an example."""

import ipaddress
import json

import numpy as np
import pytest
from conftest import make_row, write_rows
from hypothesis import given
from hypothesis import strategies as st
from serve_runs import CONTEXT, DST, SRC, make_run, serving

from ping_llm import cli
from ping_llm.data.rows import RowReader
from ping_llm.data.special_purpose import is_public
from ping_llm.inference.answers import statistics
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Query
from ping_llm.serve import maps
from ping_llm.serve.limits import Limits
from ping_llm.serve.rows import BEFORE, RowsFolder, context_of
from ping_llm.serve.tables import as_rows


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run_dir):
    return PingModel.load(run_dir, "cpu")


@pytest.fixture(scope="module")
def client(model):
    with serving(model, Limits(measurements=30)) as (client, _):
        yield client


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Rows of which the busiest unfamiliar source is known."""
    parts = {
        "train": [make_row(60, seed=1, probe_id=1)],
        "val-s3": [make_row(n, seed=n, probe_id=n) for n in (5, 90, 40)],
    }
    return write_rows(tmp_path_factory.mktemp("held_out"), parts)


@pytest.fixture(scope="module")
def with_rows(model, held_out):
    from starlette.testclient import TestClient
    from waiting import HANG_S

    from ping_llm.serve.app import make_app
    from ping_llm.serve.service import Service

    with TestClient(make_app(Service(model, "run", Limits(answer_s=HANG_S), RowsFolder(held_out)))) as client:
        yield client


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def reason(response, status=400):
    assert response.status_code == status, response.text
    (line,) = response.json()["error"].splitlines()
    return line


def test_a_map_holds_what_the_library_says_of_each_prefix(client, model):
    body = {"src": SRC, "at": "2026-01-02", "context": CONTEXT, "within": "198.51.0.0/16", "first": 98, "count": 5}
    found = ok(client.post("/v1/map", json=body))
    assert found["prefix"] == [f"198.51.{byte}.0/24" for byte in range(98, 103)]
    queries = [Query.parse(SRC, prefix, "2026-01-02", CONTEXT) for prefix in found["prefix"]]
    quick = statistics(model, queries, "auto", (0.05, 0.5, 0.95))
    whole = model.rtt_many(queries)
    for place, (one, exact) in enumerate(zip(quick, whole, strict=True)):
        given = [found[name][place] for name in ("p_fail", "q0.05", "median_ms", "q0.95")]
        for expected, rel in ((one, 1e-4), (exact, 0.02)):
            numbers = [expected.p_fail, *expected.quantile(np.array([0.05, 0.5, 0.95]))]
            assert given == pytest.approx(numbers, rel=rel)


def test_pieces_of_a_map_make_the_whole(client):
    whole = ok(client.post("/v1/map", json={"src": SRC, "src_known": "all", "count": 40}))
    pieces = [
        ok(client.post("/v1/map", json={"src": SRC, "src_known": "all", "first": f, "count": 20})) for f in (0, 20)
    ]
    assert whole["prefix"] == pieces[0]["prefix"] + pieces[1]["prefix"]
    assert whole["prefix"] == [f"{byte}.0.0.0/8" for byte in range(40) if byte not in (0, 10)]
    assert whole["median_ms"] == pytest.approx(pieces[0]["median_ms"] + pieces[1]["median_ms"], rel=1e-4)


@pytest.mark.parametrize(
    ("within", "count"),
    [
        ("0.0.0.0/0", 256 - 3 - 32),
        ("10.0.0.0/8", 0),
        ("172.0.0.0/8", 256 - 16),
        ("192.0.0.0/16", 255),
        ("198.0.0.0/8", 254),
    ],
)
def test_space_without_public_hosts_is_left_out(client, within, count):
    assert len(maps.parts_of_space(within)) == count
    if not count:
        assert ok(client.post("/v1/map", json={"src": SRC, "within": within}))["prefix"] == []


@given(st.integers(0, (1 << 24) - 1), st.sampled_from([8, 16, 24]))
def test_a_prefix_is_blank_exactly_if_no_address_in_it_is_public(number, bits):
    network = ipaddress.IPv4Network((number << 8 & 0xFFFFFFFF << 32 - bits, bits))
    # Special-purpose space of IPv4 is of whole /24: of each the first address says what the others are.
    firsts = np.arange(int(network[0]), int(network[-1]) + 1, 256 << (max(24 - bits - 8, 0)), dtype=np.uint32)
    packed = np.zeros((len(firsts), 16), np.uint8)
    packed[:, 10:12], packed[:, 12:] = 255, firsts.astype(">u4").view(np.uint8).reshape(-1, 4)
    assert maps.may_hold_hosts(network) >= is_public(packed).any()
    if bits >= 16:  # of a /8 only one /24 in 256 was looked at
        assert maps.may_hold_hosts(network) == is_public(packed).any()


@pytest.mark.parametrize("within", ["192.0.2.1", "192.0.2.0/24", "192.0.0.0/12", "2001:db8::/8", "x"])
def test_a_map_of_what_is_no_part_of_the_space_is_refused(client, within):
    assert within.split("/")[0] in reason(client.post("/v1/map", json={"src": SRC, "within": within}))


def test_a_table_is_read_as_a_context_is(client):
    csv = "rtt,src_addr,event_time,dst_addr,note\n12.5,192.0.2.1,2026-01-01 00:00,198.51.100.7,x\n"
    csv += "-1,192.0.2.1,1767225660,2001:db8::1,y\n"
    first = {"src_addr": SRC, "dst_addr": DST, "rtt": 12.5, "event_time": "2026-01-01T00:00:00Z"}
    second = {"src_addr": SRC, "dst_addr": "2001:db8::1", "rtt": -1.0, "event_time": "2026-01-01T00:01:00Z"}
    assert ok(client.post("/v1/table", content=csv))["rows"] == [first, second]
    lines = "\n".join(map(json.dumps, CONTEXT))
    assert ok(client.post("/v1/table", content=lines))["rows"] == CONTEXT
    assert ok(client.post("/v1/table", content=json.dumps(CONTEXT)))["rows"] == CONTEXT
    without = {name: value for name, value in first.items() if name != "event_time"}
    assert ok(client.post("/v1/table", content=json.dumps(without)))["rows"] == [without]


@pytest.mark.parametrize(
    ("content", "status", "line"),
    [
        (b"", 400, "the table is empty"),
        (b"hello", 400, "the table has no column src_addr; it has hello"),
        (b"src_addr,dst_addr\n1.1.1.1,2.2.2.2", 400, "no column rtt"),
        (b"src_addr,dst_addr,rtt\n1.1.1.1,2.2.2.2,fast", 400, "row 1: "),
        (b"src_addr,dst_addr,rtt,event_time\n1.1.1.1,2.2.2.2,3,01/02/2026", 400, "'01/02/2026' is not a time"),
        (b"\x1f\x8b\x08\0rest", 400, "the table is packed as .gz; give CSV, TSV or JSON in plain text"),
        (b"PAR1" + bytes(20), 400, "Parquet or Arrow"),
        (b"src_addr,dst_addr,rtt\n" + b"1.1.1.1,2.2.2.2,5\n" * 31, 413, "31 rows in a table, at most 30 are taken"),
    ],
)
def test_what_is_no_table_of_pings_is_refused_in_one_line(client, content, status, line):
    assert line in reason(client.post("/v1/table", content=content), status)


def test_the_example_of_a_service_with_rows_is_of_an_unfamiliar_source(with_rows, held_out, model):
    example = ok(with_rows.get("/v1/example"))
    rows = RowReader(held_out, "val-s3")
    row = rows[int(rows.measurements.argmax())]
    assert len(row) == 90 and not example["made_up"]
    measured = as_rows(context_of(row, slice(None)))
    assert len(example["context"]) == 6 and all(one in measured for one in example["context"])
    assert {one["src_addr"] for one in example["context"]} == {example["src"]}
    assert not {one["dst_addr"] for one in example["context"]} & set(example["dst"]) and len(example["dst"]) == 3
    assert example["at"] > max(one["event_time"] for one in measured)
    asked = {"src": example["src"], "at": example["at"], "context": example["context"]}
    answers = ok(with_rows.post("/v1/rtt", json=asked | {"queries": [{"dst": dst} for dst in example["dst"]]}))[
        "answers"
    ]
    assert [answer["context_given"] for answer in answers] == [6, 6, 6]


def test_the_example_of_a_service_without_rows_says_that_it_is_made_up(client):
    example = ok(client.get("/v1/example"))
    assert example["made_up"]
    for dst in example["dst"]:
        Query.parse(example["src"], dst, example["at"], example["context"])


def test_rows_are_listed_by_part_the_busiest_first(with_rows, client):
    assert ok(with_rows.get("/v1/model"))["rows"] == {"parts": {"train": 60, "val-s3": 135}}
    listed = ok(with_rows.get("/v1/rows", params={"part": "val-s3"}))
    assert [(row["probe_id"], row["measurements"]) for row in listed["rows"]] == [(90, 90), (40, 40), (5, 5)]
    assert "part='val-s9' is none of train, val-s3" in reason(with_rows.get("/v1/rows", params={"part": "val-s9"}))
    assert reason(with_rows.get("/v1/rows")) == "part is missing"
    assert ok(client.get("/v1/model"))["rows"] is None
    assert "--rows ROWS" in reason(client.get("/v1/rows", params={"part": "train"}))
    assert "--rows ROWS" in reason(client.post("/v1/anomalies", json={"part": "train", "row": 0}))


@pytest.mark.parametrize(("first", "count"), [(0, 30), (50, 100)])
def test_a_stretch_of_a_row_is_scored_as_the_library_scores_it_and_what_is_before(
    with_rows, held_out, model, first, count
):
    listed = ok(with_rows.get("/v1/rows", params={"part": "val-s3"}))["rows"][0]
    body = {"part": "val-s3", "row": listed["row"], "first": first, "count": count, "at": 0.3}
    found = ok(with_rows.post("/v1/anomalies", json=body))
    row = RowReader(held_out, "val-s3")[listed["row"]]
    begin = max(first - BEFORE, 0)
    rows = as_rows(context_of(row, slice(begin, first + count)))
    scored = model.score(rows)[first - begin :]
    assert found["measurements"] == 90 and found["time_s"] == row.time_s[first : first + count].tolist()
    assert found["p_value"] == pytest.approx([one["p_value"] for one in scored], rel=1e-5)
    pits = ([-1 if pit is None else pit for pit in some] for some in (found["pit"], [one["pit"] for one in scored]))
    assert next(pits) == pytest.approx(next(pits), rel=1e-5)
    assert found["rtt"] == [one["rtt"] for one in scored]
    surprising = sorted((one for one in scored if one["p_value"] <= 0.3), key=lambda one: one["p_value"])
    assert [one["p_value"] for one in found["anomalies"]] == pytest.approx([one["p_value"] for one in surprising[:10]])
    assert found["anomalies"] and all(one["q0.05"] < one["q0.5"] < one["q0.95"] for one in found["anomalies"])


def test_a_stretch_that_is_not_there_is_refused(with_rows):
    body = {"part": "val-s3", "row": 0, "first": 0}
    assert "first=90 must be less" in reason(with_rows.post("/v1/anomalies", json=body | {"row": 1, "first": 90}))
    assert "row=3 must be less" in reason(with_rows.post("/v1/anomalies", json=body | {"row": 3}))
    assert "less than or equal to 512" in reason(with_rows.post("/v1/anomalies", json=body | {"count": 513}))


def test_rows_that_are_none_are_refused_before_the_service_listens(run_dir, tmp_path, capsys):
    assert cli.main(["serve", "--model", str(run_dir), "--port", "0", "--rows", str(tmp_path)]) == 1
    assert 'run "ping-llm prepare' in capsys.readouterr().err
