"""Files are read by their names and contents as they are, ids come back as they were given, and damage is told."""

import json
import os
import threading

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pings import ndjson, ping, write
from random_model import random_model

from ping_llm.inference.files import read_measurements, read_table, write_table
from ping_llm.inference.model import PingModel

SRC, DST = "192.0.2.1", "198.51.100.7"
ROW = {"src_addr": SRC, "dst_addr": DST, "rtt": 12.5}
AS_WRITTEN = [
    "1e3",
    "10e2",
    "1.10",
    "007",
    "t",
    "12:30",
    "2026-1-4",
    "NULL",
    "98446744073709551615",
    "6F9619FF-8B86-D011",
]


@pytest.fixture
def run(monkeypatch):
    """Runs a command with a model of random weights; its exit code."""
    model = random_model(16, 128)
    monkeypatch.setattr(PingModel, "load", lambda *_: model)

    def run(command, *argv):
        from ping_llm.cli import main

        return main(["inference", command, "--model", "run", *map(str, argv)])

    return run


def csv(path, ids, **more):
    names = ["query_id", "src_addr", "dst_addr", *more]
    rows = [",".join(map(str, (one, SRC, DST, *more.values()))) for one in ids]
    path.write_text("\n".join([",".join(names), *rows]) + "\n")
    return path


def lines_of(path):
    return path.read_text().splitlines()


def given_back(path):
    return [row["query_id"] for row in map(json.loads, lines_of(path))]


@pytest.mark.parametrize("ids", [AS_WRITTEN, *([one, one] for one in AS_WRITTEN)])
def test_ids_of_csv_come_back_as_they_were_given(run, tmp_path, ids):
    assert run("batch", "--input", csv(tmp_path / "q.csv", ids), "--output", tmp_path / "p.csv") == 0
    answers = duckdb.read_csv(str(tmp_path / "p.csv"), all_varchar=True).fetchall()
    assert [row[0] for row in answers] == ids


def test_ids_of_json_come_back_with_their_types_and_as_they_are_written(run, tmp_path):
    ids = ["7", '"7"', "98446744073709551615", "1.10", '"a"', "null", "true"]
    lines = [f'{{"query_id": {one}, "src_addr": "{SRC}", "dst_addr": "{DST}"}}' for one in ids]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert run("batch", "--input", tmp_path / "q.jsonl", "--output", tmp_path / "p.jsonl") == 0
    assert [line.partition('"query_id": ')[2].partition(", ")[0] for line in lines_of(tmp_path / "p.jsonl")] == ids
    assert run("batch", "--input", tmp_path / "q.jsonl", "--output", tmp_path / "p.parquet") == 0
    texts = ["7", "7", "98446744073709551615", "1.10", "a", None, "true"]
    assert pq.read_table(tmp_path / "p.parquet").column("query_id").to_pylist() == texts


@pytest.mark.parametrize(
    ("ids", "kind"), [(["7", "-8", "null"], pa.int64()), (["7", "08"], None), (["1.0", "2"], pa.string())]
)
def test_ids_of_json_are_whole_numbers_in_parquet_only_if_all_are_written_so(run, tmp_path, ids, kind):
    lines = [f'{{"query_id": {one}, "src_addr": "{SRC}", "dst_addr": "{DST}"}}' for one in ids]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    code = run("batch", "--input", tmp_path / "q.jsonl", "--output", tmp_path / "p.parquet")
    assert code == (kind is None)  # 08 is no JSON
    if kind:
        assert pq.read_table(tmp_path / "p.parquet").schema.field("query_id").type == kind


@pytest.mark.parametrize(
    "kind", [pa.int32(), pa.uint64(), pa.float64(), pa.string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_ids_of_parquet_keep_their_type(run, tmp_path, kind):
    ids = pa.array(["1", "2"]).cast(kind)
    pq.write_table(pa.table({"query_id": ids, "src_addr": [SRC] * 2, "dst_addr": [DST] * 2}), tmp_path / "q.parquet")
    assert run("batch", "--input", tmp_path / "q.parquet", "--output", tmp_path / "p.parquet") == 0
    column = pq.read_table(tmp_path / "p.parquet").column("query_id")
    assert column.type == kind and column.combine_chunks().to_pylist() == ids.to_pylist()


@pytest.mark.parametrize("name", ["q[1].csv", "q*.csv", "run [v2]/q.csv", "{q}.csv"])
def test_a_name_is_no_pattern(run, tmp_path, name):
    for other in ("q1.csv", "qx.csv", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        csv(tmp_path / other, [other], rtt=12.5)
    assert run("batch", "--input", tmp_path / name, "--output", tmp_path / "p.jsonl") == 0
    assert given_back(tmp_path / "p.jsonl") == [name]
    assert run("score", "--input", tmp_path / name, "--output", tmp_path / "s.jsonl") == 0
    assert given_back(tmp_path / "s.jsonl") == [name]
    with pytest.raises(ValueError, match=r"no file .*absent\*"):
        read_table(tmp_path / "absent*.csv")


@pytest.mark.parametrize("name", ["dump[1].json.gz", "d*.json"])
def test_a_name_of_a_dump_is_no_pattern(tmp_path, name):
    for other in ("dump1.json.gz", "dx.json", name):
        write(tmp_path / other, ndjson(ping(src_addr=SRC if other == name else "192.0.2.9")))
    assert read_measurements(tmp_path / name).column("src_addr").to_pylist() == [SRC]


def test_a_pipe_is_read_as_a_file_is(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    csv(tmp_path / "q.csv", ["a"])
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[(tmp_path / "q.csv").read_bytes()])
    writer.start()
    assert run("batch", "--input", tmp_path / "pipe", "--output", tmp_path / "p.jsonl") == 0
    writer.join()
    assert given_back(tmp_path / "p.jsonl") == ["a"]


def test_a_dump_that_is_cut_off_is_an_error_unless_the_user_goes_on(run, tmp_path, capsys):
    results = ndjson(*(ping(timestamp=10**9 + 240 * i, prb_id=i) for i in range(40)))
    whole = write(tmp_path / "dump.json.gz", results).read_bytes()
    (tmp_path / "dump.json.gz").write_bytes(whole[: len(whole) // 2])
    options = ["--input", tmp_path / "dump.json.gz", "--output", tmp_path / "s.csv"]
    assert run("score", *options) == 1
    err = capsys.readouterr().err
    assert "error: dump.json.gz is cut off" in err and "--keep-going" in err and not (tmp_path / "s.csv").exists()
    assert run("score", *options, "--keep-going") == 0
    assert "warning: dump.json.gz is cut off" in capsys.readouterr().err
    assert 0 < len((tmp_path / "s.csv").read_text().splitlines()) - 1 < 40


@pytest.mark.parametrize(
    "more", [{"result": "ok"}, {"result": [1]}, {"fw": 5080, "prb_id": 1, "msm_id": 2, "result": []}]
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_table_may_have_a_column_result(run, tmp_path, more, suffix):
    rows = [ROW | more, ROW]
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"t{suffix}").write_text(text)
    assert run("score", "--input", tmp_path / f"t{suffix}", "--output", tmp_path / "s.jsonl") == 0
    scored = [*map(json.loads, lines_of(tmp_path / "s.jsonl"))]
    assert [row["result"] for row in scored] == [more["result"], None]
    assert [row["rtt"] for row in scored] == [12.5] * 2


def test_results_of_atlas_are_a_dump_in_any_shape_of_json(tmp_path):
    results = [ping(timestamp=10**9 + 240 * i) for i in range(3)]
    texts = {"a.json": json.dumps(results), "b.jsonl": ndjson(*results).decode(), "c.json": json.dumps({"7": results})}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert read_measurements(tmp_path / name).num_rows == 3
    (tmp_path / "slip.json").write_text(json.dumps([{"src": SRC, "dst_addr": DST, "latency": 1.0}]))
    with pytest.raises(ValueError, match="unknown column src; did you mean src_addr"):
        read_measurements(tmp_path / "slip.json")


def test_rtts_of_csv_are_written_as_numbers_and_all_else_as_it_was(run, tmp_path):
    csv(tmp_path / "m.csv", ["007"], rtt="12.50", event_time="2026-01-03 12:00", note="1e3")
    assert run("score", "--input", tmp_path / "m.csv", "--output", tmp_path / "s.jsonl") == 0
    (row,) = map(json.loads, lines_of(tmp_path / "s.jsonl"))
    assert (row["query_id"], row["rtt"], row["event_time"], row["note"]) == ("007", 12.5, "2026-01-03 12:00", "1e3")


def test_nested_values_of_json_are_written_as_they_were_read(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": {"b": [1.10, null, "x"]}, "c": 1e3}\n{"c": -5}\n')
    table = read_table(tmp_path / "t.jsonl")
    write_table(table, tmp_path / "u.jsonl")
    assert (tmp_path / "u.jsonl").read_text() == '{"a": {"b": [1.10, null, "x"]}, "c": 1e3}\n{"a": null, "c": -5}\n'
    write_table(table, tmp_path / "u.parquet")
    written = pq.read_table(tmp_path / "u.parquet").to_pydict()
    assert written == {"a": ['{"b": [1.10, null, "x"]}', None], "c": [1000.0, -5.0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("query_id,src_addr,dst_addr\na,192.0.2.1,198.51.100.7\nb,192.0.2.1\n", "row 2: it has 2 fields, the header 3"),
        ('{"src_addr": "192.0.2.1", "dst_addr": "198.51.100.7"}\n{"src_addr": "192.0', "row 2: it is no JSON"),
    ],
)
def test_a_table_that_is_cut_off_is_one_clear_line(run, tmp_path, capsys, content, message):
    path = tmp_path / ("q.csv" if content.startswith("q") else "q.jsonl")
    path.write_text(content)
    assert run("batch", "--input", path, "--output", tmp_path / "p.csv") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: {message}") and err.count("\n") == 1
