"""--memory and --any-source of the commands: what the library answers, and one clear line where a folder is no memory."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from conftest import make_row, write_rows

from ping_llm import cli
from ping_llm.config import Config, ModelConfig
from ping_llm.inference import sources
from ping_llm.inference.model import PingModel
from ping_llm.model.checkpoint import save, save_config
from ping_llm.model.gpt import GPT

SRC, DST, AT = "192.0.2.7", "198.51.100.3", "2023-11-20T00:00:00Z"
FOREIGN = {"src_addr": "203.0.113.9", "dst_addr": DST, "rtt": 80.0, "event_time": "2023-11-19T00:00:00Z"}
QUERY = {"src_addr": SRC, "dst_addr": DST, "event_time": AT}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=256)
    gpt, generator = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3, generator=generator)
    save_config(folder, Config(model=config))
    save(folder, 1, {name: p.contiguous() for name, p in gpt.state_dict().items()}, {}, {})
    return folder


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows").mkdir()
    return write_rows(tmp_path / "rows", {"train": [make_row(400, ipv6_share=0.0)], "val": [make_row(50, seed=1)]})


def table(path, *rows):
    pa.csv.write_csv(pa.Table.from_pylist(list(rows)), path)
    return path


def run(run_dir, capsys, command, *argv):
    code = cli.main(["inference", command, "--model", str(run_dir), "--device", "cpu", *map(str, argv)])
    return code, *capsys.readouterr()


def test_rtt_and_batch_answer_from_a_memory_as_the_library_does(run_dir, rows, tmp_path, capsys):
    model = PingModel.load(run_dir, "cpu", memory=rows)
    expected = model.rtt(SRC, DST, AT)
    assert expected.context_measurements > 3 and not model.memory.other_sources
    code, out, _ = run(run_dir, capsys, "rtt", "--src", SRC, "--dst", DST, "--at", AT, "--memory", rows, "--json")
    answer = json.loads(out)
    assert code == 0 and answer["context_measurements"] == expected.context_measurements
    assert answer["mean_ms"] == pytest.approx(expected.mean, rel=1e-5)
    queries, output = table(tmp_path / "q.csv", QUERY), tmp_path / "p.parquet"
    code, _, _ = run(run_dir, capsys, "batch", "--input", queries, "--memory", rows, "--output", output)
    (mean_ms,) = pa.parquet.read_table(output).column("mean_ms").to_pylist()
    assert code == 0 and mean_ms == pytest.approx(model.rtt_many([QUERY])[0]["mean_ms"], rel=1e-5)
    assert mean_ms != pytest.approx(PingModel.load(run_dir, "cpu").rtt(SRC, DST, AT).mean, rel=1e-3)


@pytest.mark.parametrize("command", ["rtt", "rank", "dst"])
def test_any_source_lets_other_hosts_into_the_context(run_dir, tmp_path, capsys, command):
    options = ["--src", SRC, "--src-known", "all", "--json", "--context", table(tmp_path / "c.csv", FOREIGN)]
    options += ["--prefix", "198.51.100.0/30"] if command == "dst" else ["--dst", DST]
    code, _, err = run(run_dir, capsys, command, *options)
    assert code == 1 and "any_source=True (--any-source)" in err and err.count("\n") == 1
    code, out, _ = run(run_dir, capsys, command, *options, "--any-source")
    _, without, _ = run(run_dir, capsys, command, *options[:5], *options[7:])
    assert code == 0 and json.loads(out) != json.loads(without)
    code, _, err = run(run_dir, capsys, command, *options, "--any-source", "--one-host")
    assert code == 1 and "exclude each other" in err


def test_any_source_reaches_batch(run_dir, tmp_path, capsys):
    queries, context = table(tmp_path / "q.csv", QUERY), table(tmp_path / "c.csv", FOREIGN)
    output = tmp_path / "p.parquet"
    run(run_dir, capsys, "batch", "--input", queries, "--context", context, "--output", output, "--any-source")
    model, answers = PingModel.load(run_dir, "cpu"), []
    for any_source in (True, False):
        answers += [model.rtt_many([QUERY], context=[FOREIGN], any_source=any_source)[0]["mean_ms"]]
    (mean_ms,) = pa.parquet.read_table(output).column("mean_ms").to_pylist()
    assert mean_ms == pytest.approx(answers[0], rel=1e-5) and mean_ms != pytest.approx(answers[1], rel=1e-5)


@pytest.mark.parametrize("command", ["rtt", "batch"])
def test_a_folder_that_is_no_memory_is_one_clear_line(run_dir, rows, tmp_path, capsys, command):
    options = ["--src", SRC, "--dst", DST]
    if command == "batch":
        options = ["--input", table(tmp_path / "q.csv", QUERY), "--output", tmp_path / "p.csv"]
    for shard in rows.glob("train-*"):
        shard.unlink()
    for folder, message in ((tmp_path, "no rows in"), (rows, "is missing or damaged; delete the folder and run")):
        code, _, err = run(run_dir, capsys, command, *options, "--memory", folder)
        assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_other_sources_are_evidence_for_a_run_that_learned_from_windows_of_several_probes(run_dir, rows, monkeypatch):
    loaded = sources.load(run_dir)
    for mesh in (0.0, 0.3):
        config = replace(loaded.config, data=replace(loaded.config.data, mesh=mesh))
        monkeypatch.setattr("ping_llm.inference.model.load", lambda *_, config=config: replace(loaded, config=config))
        assert PingModel.load(run_dir, "cpu", memory=rows).memory.other_sources == (mesh > 0)
