"""Every kept checkpoint answers the same pings; its own answers stand beside its own val loss."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_row, write_rows

from ping_llm.cli import main
from ping_llm.config import Config, DataConfig, ModelConfig
from ping_llm.eval.checkpoints import compare_checkpoints
from ping_llm.inference.model import PingModel
from ping_llm.model.checkpoint import save, save_config
from ping_llm.model.gpt import GPT

PAIRS = ("192.0.2.1", "198.51.100.7"), ("192.0.2.0/24", "198.51.0.0/16")
MODEL = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=96)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    row = make_row(60, seed=1)
    return write_rows(tmp_path_factory.mktemp("rows"), {"train": [row], "val": [make_row(60, seed=2)]}, shards=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, rows):
    """Three checkpoints; the loss of the first is in metrics.jsonl alone, and the second is the best."""
    folder = tmp_path_factory.mktemp("run")
    save_config(folder, Config(model=MODEL, data=DataConfig(rows=rows)))
    for step, state in ((10, {}), (20, {"val_loss": 1.5}), (30, {"val_loss": 1.75})):
        gpt, generator = GPT(MODEL), torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.normal_(std=0.1, generator=generator)
        save(folder, step, gpt.state_dict(), {}, state)
    lines = [{"step": 5, "val_loss": 5.0}, {"step": 10, "val_loss": 2.25}, {"step": 20, "val_loss": 9.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_each_checkpoint_gives_its_own_answers_oldest_first(run):
    found = compare_checkpoints(run, pairs=PAIRS, device="cpu")
    assert [(one.step, one.val_loss, one.best) for one in found.steps] == [
        (10, 2.25, False),
        (20, 1.5, True),
        (30, 1.75, False),
    ]
    assert found.pings == ["192.0.2.1 → 198.51.100.7", "192.0.2.0/24 → 198.51.0.0/16"]
    assert found.observed_ms == [None, None] and not found.notes
    for one in found.steps:
        model = PingModel.load(run / "checkpoints" / f"step-{one.step:08d}", "cpu")
        for (src, dst), answer in zip(PAIRS, one.answers, strict=True):
            expected = model.rtt(src, dst, src_known="all")
            assert answer.median_ms == pytest.approx(expected.median, rel=1e-4)
            assert (answer.low_ms, answer.high_ms) == pytest.approx(
                (expected.quantile(0.05), expected.quantile(0.95)), rel=1e-3
            )
            assert answer.p_fail == pytest.approx(expected.p_fail, rel=1e-4)
            assert answer.total_probability == pytest.approx(expected.total_probability, rel=1e-4)
    assert len({one.answers[0].median_ms for one in found.steps}) == 3


def test_pings_of_val_are_always_the_same_and_known(run, rows):
    first, again = (compare_checkpoints(run, pings=3, device="cpu") for _ in range(2))
    assert first.to_json() == again.to_json() and len(first.pings) == 3
    val = make_row(60, seed=2)
    for ping, observed in zip(first.pings, first.observed_ms, strict=True):
        assert " at 2023-11-1" in ping and observed in val.rtt_ms.astype(float)
    assert compare_checkpoints(run, pings=1, data=rows, device="cpu").pings[0] in ping_names(run)


def ping_names(run) -> list[str]:
    return compare_checkpoints(run, pings=60, device="cpu").pings


def test_the_table_says_what_is_known_in_words(run):
    found = compare_checkpoints(run, pairs=PAIRS[:1], device="cpu")
    answer = found.steps[1].answers[0]
    rows = found.rows(0)
    assert [row[:2] for row in rows] == [["10", "2.2500"], ["20, best", "1.5000"], ["30", "1.7500"]]
    assert rows[1][2:] == [
        f"{answer.median_ms:.4g}",
        f"{answer.low_ms:.4g} to {answer.high_ms:.4g}",
        f"{answer.p_fail:.2%}",
        f"{answer.total_probability:.3%}",
    ]


def test_the_command_prints_tables_and_writes_text_numbers_and_a_picture(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    pairs = [word for pair in PAIRS for word in pair]
    out = tmp_path / "out"
    assert main(["compare", str(run), "--checkpoints", "--pairs", *pairs, "--out", str(out)]) == 0
    printed, text = capsys.readouterr().out, (out / "checkpoints.md").read_text()
    for piece in ("192.0.2.1 → 198.51.100.7", "20, best", "1.5000", "valid is the probability"):
        assert piece in printed and piece in text
    assert "![answers over the steps of training](checkpoints.png)" in text
    assert (out / "checkpoints.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((out / "checkpoints.json").read_text())
    assert [one["step"] for one in numbers["checkpoints"]] == [10, 20, 30]
    assert numbers["pings"][0] == {"ping": "192.0.2.1 → 198.51.100.7", "observed_ms": None}
    assert sorted(file.name for file in out.iterdir()) == ["checkpoints.json", "checkpoints.md", "checkpoints.png"]


def test_what_always_fails_has_no_rtt(run, monkeypatch, tmp_path):
    from ping_llm.inference.distribution import RTTDistribution

    never = RTTDistribution(np.zeros(1 << 16), 1.0)
    monkeypatch.setattr(PingModel, "rtt_many", lambda self, queries, **_: [never] * len(queries))
    found = compare_checkpoints(run, tmp_path / "out", pairs=PAIRS[:1], device="cpu")
    assert found.rows(0)[0][2:5] == ["–", "–", "100.00%"]
    answer = json.loads((tmp_path / "out/checkpoints.json").read_text())["checkpoints"][0]["answers"][0]
    assert answer["median_ms"] is None and answer["p_fail"] == 1


def test_a_damaged_checkpoint_is_left_out_and_one_alone_is_said_to_be(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints/step-00000020/model.safetensors").write_bytes(b"x")
    found = compare_checkpoints(copy, pairs=PAIRS[:1], device="cpu")
    assert [(one.step, one.best) for one in found.steps] == [(10, False), (30, True)]
    assert len(found.notes) == 1 and "step-00000020 is damaged" in found.notes[0]
    shutil.rmtree(copy / "checkpoints/step-00000010")
    notes = compare_checkpoints(copy, pairs=PAIRS[:1], device="cpu").notes
    assert "only one checkpoint is kept" in notes[1]
    (copy / "checkpoints/step-00000030/model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        compare_checkpoints(copy, pairs=PAIRS[:1], device="cpu")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "RUN", "--checkpoints"], "--checkpoints looks at one run"),
        (["RUN", "--pairs", "192.0.2.1", "198.51.100.7"], "--pairs and --data go with --checkpoints"),
        (["RUN", "--checkpoints", "--pairs", "192.0.2.1", "host"], "'host' is not an IPv4 or IPv6 address"),
        (["RUN", "--checkpoints", "--pings", "0"], "--pings 0 must be at least 1"),
        (["RUN", "--checkpoints", "--data", "none"], "no rows in none"),
        (["empty", "--checkpoints"], "empty is no run that has checkpoints"),
        (["--checkpoints"], "name the runs, or folders that hold runs"),
    ],
)
def test_what_cannot_be_looked_at_over_time_is_one_clear_line(run, tmp_path, monkeypatch, capsys, argv, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *(str(run) if word == "RUN" else word for word in argv)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
