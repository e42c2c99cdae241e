"""The commands of `ping-llm inference`: the answers of the library, shown to people and to programs; clear refusals."""

import io
import json
import logging
import re
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from ping_llm import cli
from ping_llm.config import Config, ModelConfig
from ping_llm.inference.files import read_table
from ping_llm.inference.model import PingModel
from ping_llm.model.checkpoint import save, save_config
from ping_llm.model.gpt import GPT

SRC, DST = "192.0.2.1", "198.51.100.7"
CONTEXT = [
    {"src_addr": SRC, "dst_addr": f"198.51.100.{i}", "rtt": 5.0 + i, "event_time": f"2026-01-01T00:{i:02}:00Z"}
    for i in range(30)
]
QUERIES = [
    {"query_id": "a", "src_addr": SRC, "dst_addr": DST, "event_time": "2026-01-02T00:00:00Z", "rtt": 12.0},
    {"query_id": "b", "src_addr": SRC, "dst_addr": "198.51.0.0/16", "event_time": None, "rtt": -1.0},
]
BAD = {"query_id": "c", "src_addr": "192.0.2.300", "dst_addr": DST, "event_time": None, "rtt": None}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=128)
    gpt, generator = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.1, generator=generator)
    save_config(folder, Config(model=config))
    save(folder, 1, {name: p.contiguous() for name, p in gpt.state_dict().items()}, {}, {})
    return folder


@pytest.fixture(scope="module")
def model(run_dir):
    return PingModel.load(run_dir, "cpu")


@pytest.fixture
def run_command(run_dir, capsys):
    """Runs a command in this process; its exit code, standard output and standard error."""

    def run_command(command, *argv):
        code = cli.main(["inference", command, "--model", str(run_dir), "--device", "cpu", *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def messages(err):
    """Lines of standard error that are no progress."""
    return [line for line in err.splitlines() if not re.search(r"(queries|measurements)/s", line)]


def read_back(path):
    """A table that was written, as another reader sees it."""
    return duckdb.connect().sql(f"SELECT * FROM '{path}'").to_arrow_table()


def write(path, rows):
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rtt_json_is_the_answer_of_the_library_and_says_how_it_came_about(run_command, model, tmp_path):
    context = write(tmp_path / "c.jsonl", CONTEXT)
    code, out, err = run_command(
        "rtt", "--src", SRC, "--dst", DST, "--at", "2026-01-02", "--context", context, "--json"
    )
    answer = json.loads(out)
    distribution = model.rtt(SRC, DST, "2026-01-02", CONTEXT)
    assert (code, messages(err)) == (0, [])
    assert answer.keys() == distribution.to_dict().keys() | {"context_given"}
    assert answer["median_ms"] == pytest.approx(distribution.median, rel=1e-6)
    assert answer["quantiles"]["0.95"] == pytest.approx(distribution.quantile(0.95), rel=1e-6)
    assert answer["context_given"] == 30 and 0 < answer["context_measurements"] < 30
    assert answer["src_weights"].keys() == distribution.src_weights.keys() and len(distribution.src_weights) > 1
    assert sum(answer["src_weights"].values()) == pytest.approx(1)


def test_several_destinations_are_one_table_with_a_column_each_and_a_list_of_answers(run_command, model, tmp_path):
    options = ["--src", SRC, "--dst", DST, "198.51.100.8", "--dst-prefix", "198.51.0.0/16", "--src-known", "all"]
    _, out, _ = run_command("rtt", *options, "--plot", tmp_path / "p.png")
    header = next(line for line in out.splitlines() if DST in line and "┃" in line)
    assert [cell.strip() for cell in header.split("┃")[2:-1]] == [DST, "198.51.100.8", "198.51.0.0/16"]
    assert (tmp_path / "p.png").stat().st_size > 1000
    _, out, _ = run_command("rtt", *options, "--json")
    for answer in json.loads(out):
        distribution = model.rtt(SRC, answer["dst"], src_known="all")
        assert answer["p_fail"] == pytest.approx(distribution.p_fail, rel=1e-5)


@pytest.mark.parametrize("known", ["none", "24", "all"])
def test_src_known_reaches_the_model(run_command, model, known):
    _, out, _ = run_command("rtt", "--src", SRC, "--dst", DST, "--src-known", known, "--json")
    assert json.loads(out)["p_fail"] == pytest.approx(model.rtt(SRC, DST, src_known=known).p_fail, rel=1e-6)


def test_an_end_that_is_left_out_may_be_any(run_command, model):
    _, out, _ = run_command("rtt", "--src", SRC, "--json")
    assert json.loads(out)["p_fail"] == pytest.approx(model.rtt(SRC, None).p_fail, rel=1e-6)
    code, out, _ = run_command("rtt", "--dst", DST)
    assert code == 0 and f"RTT anywhere → {DST}" in out


def test_of_a_context_that_does_not_fit_the_answer_says_how_much_was_read(run_command, tmp_path):
    context = write(tmp_path / "c.csv", CONTEXT)
    _, out, _ = run_command("rtt", "--src", SRC, "--dst", DST, "--context", context, "--src-known", "none")
    assert " of 30 earlier measurements" in " ".join(out.split())


def test_a_host_of_the_other_family_is_warned_of_on_one_line_and_answered(run_command):
    code, out, err = run_command("rtt", "--src", SRC, "--dst", "2001:db8::7", "--json")
    assert code == 0 and json.loads(out)["median_ms"] > 0
    assert len(messages(err)) == 1 and messages(err)[0].startswith(
        f"warning: {SRC} and 2001:db8::7 are of two families"
    )


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl"])
def test_batch_reads_and_writes_each_format_alike(run_command, model, tmp_path, suffix):
    queries, context = write(tmp_path / f"q{suffix}", QUERIES), write(tmp_path / f"c{suffix}", CONTEXT)
    output = tmp_path / f"p{suffix}"
    code, out, err = run_command("batch", "--input", queries, "--context", context, "--output", output)
    assert (code, out, messages(err)) == (0, "", [])
    answers = read_back(output)
    expected = model.rtt_many(pa.Table.from_pylist(QUERIES), context=pa.Table.from_pylist(CONTEXT))
    assert answers.column_names == expected.column_names
    for name in expected.column_names:
        values, wanted = (table.column(name).to_pylist() for table in (answers, expected))
        assert values == (wanted if name == "query_id" else [None if w is None else pytest.approx(w) for w in wanted])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_batch_goes_from_standard_input_to_standard_output_in_one_format(run_command, monkeypatch, tmp_path, kind):
    monkeypatch.setattr(sys, "stdin", io.StringIO(write(tmp_path / f"q.{kind}", QUERIES).read_text()))
    code, out, _ = run_command("batch", "--input", "-", "--output", "-")
    (tmp_path / f"p.{kind}").write_text(out)
    assert code == 0 and read_back(tmp_path / f"p.{kind}").column("query_id").to_pylist() == ["a", "b"]
    assert out.startswith("{" if kind == "jsonl" else '"query_id"')


def test_bad_rows_are_reported_and_counted_and_the_exit_code_is_3(run_command, tmp_path):
    output = tmp_path / "p.json"
    code, _, err = run_command("batch", "--input", write(tmp_path / "q.jsonl", [*QUERIES, BAD]), "--output", output)
    assert code == 3
    assert messages(err) == ["warning: 1 of 3 queries are bad; their column error says why"]
    answers = json.loads(output.read_text())
    assert [row["query_id"] for row in answers] == ["a", "b", "c"]
    assert [row["error"] for row in answers] == [None, None, "'192.0.2.300' is not an IPv4 or IPv6 address"]
    assert answers[2]["p_fail"] is None and answers[0]["p_fail"] > 0


def test_rank_names_the_likeliest_winner_first_to_people_and_programs(run_command, model, tmp_path):
    ranking = model.rank(SRC, [DST, "198.51.100.8"])
    options = ["--src", SRC, "--dst", DST, "--dst", "198.51.100.8"]
    _, out, _ = run_command("rank", *options, "--json")
    answer = json.loads(out)
    assert [row["dst_addr"] for row in answer["rows"]] == ranking.table.column("dst_addr").to_pylist()
    assert sum(row["p_fastest"] for row in answer["rows"]) + answer["p_none"] == pytest.approx(1)
    _, out, _ = run_command("rank", *options)
    assert DST in out and "P(none answers)" in out
    run_command("rank", *options, "--output", tmp_path / "r.csv")
    assert read_back(tmp_path / "r.csv").column_names == ranking.table.column_names


def test_dst_finds_what_the_library_finds_and_says_how_sure_that_is(run_command, model, tmp_path):
    found = model.destinations(SRC, rtt_max=20.0, prefix="198.51.100.0/29", top=3, src_known="all")
    options = ["--src", SRC, "--rtt-max", "20", "--prefix", "198.51.100.0/29", "--top", "3", "--src-known", "all"]
    _, out, _ = run_command("dst", *options, "--json")
    answer = json.loads(out)
    assert [row["dst_addr"] for row in answer["rows"]] == found.table.column("dst_addr").to_pylist()
    assert (answer["proven"], answer["p_within"]) == (found.proven, pytest.approx(found.p_within))
    _, out, _ = run_command("dst", *options)
    assert "P(RTT ≤ 20 ms)" in out and all(row["dst_addr"] in out for row in answer["rows"])
    run_command("dst", *options, "--output", tmp_path / "d.json")
    assert [row["probability"] for row in json.loads((tmp_path / "d.json").read_text())] == pytest.approx(
        [row["probability"] for row in answer["rows"]]
    )


def test_sample_completes_what_is_given_and_repeats_with_its_seed(run_command):
    options = ["--src", SRC, "--dst", "198.51.0.0/16", "--at", "2026-01-02", "--count", "3", "--json"]
    _, first, _ = run_command("sample", *options, "--seed", "0")
    _, again, _ = run_command("sample", *options, "--seed", "0")
    _, other, _ = run_command("sample", *options, "--seed", "1")
    rows = json.loads(first)["rows"]
    assert first == again != other
    _, new, _ = run_command("sample", *options)
    _, newer, _ = run_command("sample", *options)
    assert new != newer
    assert {row["src_addr"] for row in rows} == {SRC} and {row["event_time"] for row in rows} == {
        "2026-01-02T00:00:00Z"
    }
    assert all(row["dst_addr"].startswith("198.51.") and "/" not in row["dst_addr"] for row in rows)
    _, out, _ = run_command("sample", "--count", "2", "--temperature", "0")
    first, second = out.splitlines()
    assert first == second and "nats" in first


def test_a_context_without_rows_is_a_context_of_nothing(run_command, tmp_path):
    (tmp_path / "c.csv").write_text("src_addr,dst_addr,rtt\n")
    query = ["--src", SRC, "--dst", DST, "--at", "2026-01-02", "--json"]
    code, alone, _ = run_command("rtt", *query)
    assert code == 0
    code, answer, err = run_command("rtt", *query, "--context", tmp_path / "c.csv")
    assert (code, answer) == (0, alone)
    assert "c.csv holds no measurements: it is a context of nothing" in err
    write(tmp_path / "q.json", QUERIES)
    batch = ("batch", "--input", tmp_path / "q.json", "--output", "-")
    code, out, err = run_command(*batch, "--context", tmp_path / "c.csv")
    assert code == 0 and "it is a context of nothing" in err
    assert run_command(*batch)[1] == out


def test_a_table_of_no_rows_is_a_context_of_nothing(model, caplog):
    alone = model.rtt_many(QUERIES)
    for nothing in ([], pa.table({"src_addr": pa.array([], pa.string())})):
        assert model.rtt_many(QUERIES, context=nothing) == alone
        assert "the context has no rows: it is a context of nothing" in caplog.text
        caplog.clear()


def test_score_writes_all_measurements_and_shows_the_most_surprising(run_command, model, tmp_path):
    table = write(tmp_path / "m.csv", CONTEXT)
    scored = model.score(read_table(table))
    run_command("score", "--input", table, "--output", tmp_path / "s.parquet")
    written = read_back(tmp_path / "s.parquet")
    assert written.column("src_addr").to_pylist() == [row["src_addr"] for row in CONTEXT]
    assert written.column("nll_nats").to_pylist() == pytest.approx(scored.column("nll_nats").to_pylist())
    _, out, _ = run_command("score", "--input", table, "--top", "2", "--anomaly-at", "0.5", "--json")
    answer, p_values = json.loads(out), sorted(scored.column("p_value").to_pylist())
    assert [row["p_value"] for row in answer["rows"]] == pytest.approx(p_values[:2])
    assert answer["measurements"] == 30 and answer["anomalies"] == sum(p <= 0.5 for p in p_values)
    _, out, _ = run_command("score", "--input", table, "--top", "2")
    assert "the most surprising measurements" in out and "measurements 30" in out and SRC in out


def test_score_reads_dumps_too(run_command, tmp_path):
    results = [
        {"fw": 5080, "type": "ping", "af": 4, "prb_id": 7, "msm_id": 1001, "timestamp": 1_700_000_000 + i, "lts": 1}
        | {
            "proto": "ICMP",
            "from": SRC,
            "src_addr": SRC,
            "dst_addr": DST,
            "sent": 1,
            "rcvd": 1,
            "result": [{"rtt": 9.5}],
        }
        for i in range(3)
    ]
    dump = write(tmp_path / "dump.json", results)
    run_command("score", "--input", dump, "--output", tmp_path / "s.csv")
    assert read_back(tmp_path / "s.csv").column("rtt").to_pylist() == [9.5] * 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("rtt", "give --src ADDRESS, --dst ADDRESS"),
        ("rtt --src 192.0.2.300 --dst 198.51.100.7", "'192.0.2.300' is not an IPv4 or IPv6 address"),
        ("rtt --src 0.0.0.0 --dst 198.51.100.7", "is the unspecified address"),
        ("rtt --src 192.0.2.0/33 --dst 198.51.100.7", "the prefix length must be a number from 0 to 32"),
        ("rtt --src 192.0.2.1 --dst 198.51.100.7 198.51.100.7", "a destination is given twice"),
        ("rtt --src 192.0.2.1 --dst 198.51.100.7 --src-known most", "src_known='most' must be auto, all, none"),
        (
            "rtt --src 192.0.2.1 --dst 198.51.100.7 --context later.csv --at 2025-01-01",
            "not earlier than the query at 2025-01-01T00:00:00Z",
        ),
        ("rtt --src 192.0.2.9 --dst 198.51.100.7 --context later.csv", "holds a ping of 192.0.2.1, but the query"),
        ("rtt --src 192.0.2.1 --dst 198.51.100.7 --context slow.csv", "context row 1: rtt -7 must be ms"),
        ("rtt --src 192.0.2.1 --dst 198.51.100.7 --context named.csv", "rtt_ms; did you mean rtt?"),
        ("rank --src 192.0.2.1", "--dst"),
        ("rank --src 192.0.2.1 --dst", "no candidates to rank"),
        ("rank --src 192.0.2.1 --dst 198.51.100.7 198.51.100.7", "is named twice"),
        ("rank --src 192.0.2.1 --dst 198.51.100.7 --output r.xlsx", "a table is written as .parquet, .csv"),
        ("dst --src 192.0.2.1 --rtt 5 --rtt-max 5", "not both"),
        ("dst --src 192.0.2.1 --top 0", "top=0 must be at least 1"),
        ("sample --dst 198.51.96.0/20", "give one like /16 or /24"),
        ("batch --input later.csv --output absent/p.csv", "there is no folder absent"),
        ("batch --input empty.csv --output p.csv", "there are no queries"),
        ("batch --input named.csv --output p.csv", "rtt_ms; did you mean rtt?"),
        ("batch --input absent.csv --output p.csv", "no file absent.csv"),
        ("sample --src 192.0.2.0/24 --dst 198.51.0.0/16", "are both prefixes"),
        ("sample --temperature -1", "temperature=-1.0 must be 0"),
        ("score --input absent.bz2", "no file or folder absent.bz2"),
        ("score --input named.csv", "rtt_ms; did you mean rtt?"),
    ],
)
def test_bad_input_is_one_clear_line(run_dir, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "later.csv", CONTEXT)
    write(tmp_path / "slow.csv", [CONTEXT[0] | {"rtt": -7.0}])
    write(tmp_path / "named.csv", [{"src_addr": SRC, "dst_addr": DST, "rtt_ms": 1.0}])
    (tmp_path / "empty.csv").write_text("src_addr,dst_addr\n")
    command, *options = argv.split()
    try:
        code = cli.main(["inference", command, "--model", str(run_dir), "--device", "cpu", *options])
    except SystemExit as stop:  # of the parser of options
        assert stop.code and message in capsys.readouterr().err
        return
    err = capsys.readouterr().err
    assert code == 1 and len(messages(err)) == 1, err
    assert err.startswith("error: ") and message in err


def test_a_checkpoint_of_a_newer_format_says_what_to_do(run_dir, tmp_path, capsys):
    for file in run_dir.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    state = next(tmp_path.rglob("state.json"))
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format_version": 99}))
    assert cli.main(["inference", "rtt", "--model", str(tmp_path), "--src", SRC, "--dst", DST]) == 1
    err = capsys.readouterr().err
    assert "is of format 99" in err and "update ping-llm" in err and err.count("\n") == 1


def test_warnings_of_one_kind_are_shown_three_times_and_then_counted(run_command, tmp_path):
    rows = [{"src_addr": SRC, "dst_addr": f"2001:db8::{i}"} for i in range(1, 9)]
    code, _, err = run_command("batch", "--input", write(tmp_path / "q.csv", rows), "--output", tmp_path / "p.csv")
    lines = messages(err)
    assert code == 0 and len(lines) == 4 and all(line.startswith("warning: ") for line in lines)
    assert lines[-1] == "warning: 5 more of the kinds above"
    assert not [h for h in logging.getLogger("ping_llm").handlers if type(h).__name__ == "_WarningLines"]


HOSTS = [row | {"src_addr": "2001:db8::1"} for row in CONTEXT[:3]]


@pytest.mark.parametrize("command", ["rtt", "rank", "dst"])
def test_one_host_lets_other_addresses_into_the_context(run_command, tmp_path, command):
    options = ["--src", SRC, "--context", write(tmp_path / "c.csv", HOSTS), "--src-known", "all", "--json"]
    options += ["--prefix", "198.51.100.0/30"] if command == "dst" else ["--dst", DST]
    code, _, err = run_command(command, *options)
    assert code == 1 and "pass one_host=True (--one-host)" in err and len(messages(err)) == 1
    code, out, _ = run_command(command, *options, "--one-host")
    _, without, _ = run_command(command, *options[:2], *options[4:])
    assert code == 0 and json.loads(out) != json.loads(without)


def test_one_host_reaches_batch_and_score(run_command, model, tmp_path):
    rows, table = [*HOSTS, QUERIES[0]], write(tmp_path / "t.csv", [row | {"query_id": None} for row in HOSTS])
    queries, output = write(tmp_path / "q.csv", QUERIES), tmp_path / "p.parquet"
    run_command("batch", "--input", queries, "--context", table, "--output", output, "--one-host")
    answers, apart = read_back(output), model.rtt_many(QUERIES, context=HOSTS)
    expected = [row["mean_ms"] for row in model.rtt_many(QUERIES, context=HOSTS, one_host=True)]
    assert answers.column("mean_ms").to_pylist() == pytest.approx(expected)
    assert expected != pytest.approx([row["mean_ms"] for row in apart])
    measured = write(tmp_path / "m.csv", [{name: row[name] for name in HOSTS[0]} for row in rows])
    run_command("score", "--input", measured, "--output", output, "--one-host")
    expected = model.score(read_table(measured), one_host=True).column("nll_nats").to_pylist()
    assert read_back(output).column("nll_nats").to_pylist() == pytest.approx(expected)
    assert expected != pytest.approx(model.score(read_table(measured)).column("nll_nats").to_pylist())


def test_an_unordered_context_is_put_in_order_with_a_warning(run_command, tmp_path):
    answers = []
    for name, rows in (("a.csv", CONTEXT), ("b.csv", CONTEXT[::-1])):
        context = write(tmp_path / name, rows)
        _, out, err = run_command(
            "rtt", "--src", SRC, "--dst", DST, "--at", "2026-01-02", "--context", context, "--json"
        )
        answers.append(json.loads(out)["median_ms"])
    assert messages(err) == ["warning: the context is not in the order of event_time; it was put in order"]
    assert np.ptp(answers) == 0
