"""An exported folder answers as the run does, says what it is, tells nothing of the machine, and is whole or not there."""

import dataclasses
import json
import re

import pyarrow as pa
import pytest
import torch
from conftest import make_row, write_rows
from exports import SECRET, SOURCE, random_run
from huggingface_hub import ModelCard
from training_runs import make_config
from transformers import AutoModelForCausalLM

from ping_llm import PingModel
from ping_llm.cli import main
from ping_llm.hf import export as export_module
from ping_llm.hf.export import export
from ping_llm.inference.calibration import CALIBRATION_NAME, Calibration, Surprise
from ping_llm.inference.sources import EXPORT_NAME, load
from ping_llm.model.checkpoint import MODEL_NAME, load_config
from ping_llm.system.files import file_sha256
from ping_llm.training.base import Base

KINDS = {"nanochat": {"n_kv_head": 2}, "ours": {"field_aware": True, "grammar": True, "bigrams": True}}
DESTINATION = "198.51.100.3"
PAST = [
    {"src_addr": SOURCE, "dst_addr": DESTINATION, "rtt": 12.5, "event_time": "2026-01-01T00:00:00Z"},
    {"src_addr": SOURCE, "dst_addr": "198.51.100.9", "rtt": 31.0, "event_time": "2026-01-01T00:01:00Z"},
]


def answers(model: PingModel) -> list[tuple]:
    """What takes all parts of a model: known lengths, what was met, experts, p-values."""
    found = [
        model.rtt(SOURCE, DESTINATION, at="2026-01-01T01:00:00Z", context=PAST),
        model.rtt("203.0.113.5", DESTINATION),
    ]
    scored = model.score(pa.Table.from_pylist(PAST))
    told = [(one.p_fail, one.median, one.quantile(0.9), tuple(one.src_weights.items())) for one in found]
    return [*told, tuple(scored["p_value"].to_pylist())]


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_in_fp32_answers_as_its_run_to_the_bit(tmp_path, kind):
    run = random_run(tmp_path, **KINDS[kind])
    folder = export(run, tmp_path / "out")
    asked, exported = PingModel.load(run), PingModel.load(folder)
    assert answers(exported) == answers(asked)
    assert asked.calibration.experts is not None  # without it, or without what was met, answers are others
    bare = dataclasses.replace(asked, calibration=dataclasses.replace(asked.calibration, experts=None))
    assert answers(bare) != answers(asked)
    uncalibrated = dataclasses.replace(asked.calibration, surprise=Surprise())
    assert answers(dataclasses.replace(asked, calibration=uncalibrated))[-1] != answers(asked)[-1]
    unmet = dataclasses.replace(asked, calibration=dataclasses.replace(asked.calibration, familiar=None))
    assert answers(unmet) != answers(asked)
    found, was = load(folder), load(run)
    assert found.config.model == was.config.model and found.config.data.mesh == was.config.data.mesh == 0.25
    assert found.state == {"step": 40, "val_loss": 1.5, "rows_sha256": "ab" * 32, "tokens": 4096}
    again = export(folder, tmp_path / "again")
    assert (again / MODEL_NAME).read_bytes() == (folder / MODEL_NAME).read_bytes()
    assert answers(PingModel.load(again)) == answers(asked)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_in_bf16_holds_the_rounded_weights_and_says_that_the_calibration_is_of_others(tmp_path, kind):
    run = random_run(tmp_path, **KINDS[kind])
    folder = export(run, tmp_path / "out", "bf16")
    small, whole = (folder / MODEL_NAME).stat().st_size, (export(run, tmp_path / "fp32") / MODEL_NAME).stat().st_size
    assert small < 0.6 * whole
    was, found = load(run), load(folder)
    rows = 267  # of tables of tokens: what pads them is kept, or not, by the architecture
    for name, weight in found.gpt.state_dict().items():
        wanted = was.gpt.state_dict()[name]
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight[:rows], wanted.bfloat16().float()[:rows], rtol=0, atol=0)
    assert dataclasses.replace(found.calibration, model_sha256=None) == dataclasses.replace(
        was.calibration, model_sha256=None
    )
    assert found.calibration.model_sha256 == file_sha256(folder / MODEL_NAME) != was.calibration.model_sha256
    said = "The calibration was fitted to the fp32 weights that these are rounded from."
    for again in (folder, export(folder, tmp_path / "wide"), export(folder, tmp_path / "same", "bf16")):
        assert json.loads((again / EXPORT_NAME).read_text())["calibration"] == said
        assert said in (again / "README.md").read_text()
    assert torch.equal(load(tmp_path / "wide").gpt.embedding.weight, found.gpt.embedding.weight)


def test_with_rows_the_calibration_is_fitted_to_the_weights_as_they_are_written(tmp_path, monkeypatch):
    asked = []

    def fit(gpt, config, device):
        asked.append((gpt.embedding.weight.clone(), config.data.rows))
        return Calibration({"ipv4": {"all": 1.0}})

    monkeypatch.setattr("ping_llm.training.calibration.calibrate", fit)
    run, rows = random_run(tmp_path), write_rows(tmp_path, {"train": [make_row(30), make_row(20, 1)]}, shards=1)
    with pytest.raises(ValueError, match="are not the rows that the run learned from"):
        export(run, tmp_path / "out", rows=rows)
    assert not asked
    monkeypatch.setattr(export_module, "manifest_sha256", lambda folder: "ab" * 32)
    folder = export(run, tmp_path / "out", "bf16", rows=rows)
    ((weight, given),) = asked
    assert given == rows and torch.equal(weight, load(folder).gpt.embedding.weight)
    assert load(folder).calibration == Calibration(
        {"ipv4": {"all": 1.0}}, model_sha256=file_sha256(folder / MODEL_NAME)
    )
    for fitted in (folder, export(folder, tmp_path / "again", "bf16"), export(run, tmp_path / "run")):
        said = json.loads((fitted / EXPORT_NAME).read_text())["calibration"]
        assert said == "The calibration was fitted to these weights."
    held = [make_row(30), make_row(20, 1)]
    ends = [
        len({bytes(end) for row in held for end in getattr(row, name)}) for name in ("src_addresses", "dst_addresses")
    ]
    card = (folder / "README.md").read_text()
    assert f"{ends[0]} addresses of sources, {ends[1]} of destinations." in card and "Pings of " in card
    asked.clear()
    export(folder, tmp_path / "told", "bf16", rows=rows)  # what fits the weights already is not fitted again
    assert not asked and "of destinations." in (tmp_path / "told/README.md").read_text()


def test_a_run_without_a_calibration_becomes_an_export_without_one_wherever_that_lies(tmp_path, caplog):
    run = random_run(tmp_path)
    (run / CALIBRATION_NAME).rename(tmp_path / "kept")
    folder = export(run, run / "exports" / "first")
    (tmp_path / "kept").rename(run / CALIBRATION_NAME)
    assert load(folder).calibration == Calibration() and not (folder / CALIBRATION_NAME).exists()
    assert not caplog.records and "There is no calibration" in (folder / "README.md").read_text()


def test_nothing_of_the_machine_gets_out(tmp_path):
    folder = export(random_run(tmp_path, **KINDS["ours"]), tmp_path / "out")
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", MODEL_NAME, CALIBRATION_NAME, EXPORT_NAME, "README.md"} <= files
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444, path
        assert SECRET.encode() not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes(), path


def test_the_card_has_metadata_that_the_hub_takes_and_the_numbers_of_the_run(tmp_path):
    run = random_run(tmp_path, src_bits_ipv4=24, src_bits_ipv6=48)
    folder = export(run, tmp_path / "out", licence="cc-by-4.0", address="someone/pings")
    text = (folder / "README.md").read_text()
    card = ModelCard(text, ignore_metadata_errors=False)
    told = card.data.to_dict()
    assert told["license"] == "cc-by-4.0" and told["library_name"] == "transformers"
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert results == {"loss": 1.5, "rtt_bits": 11.25} and card.data.model_name == "pings"
    assert 'PingModel.load("someone/pings")' in text
    assert "1,234 pings of 2 input files; all from before 2026-01-01 00:00 UTC; 101 more were kept apart" in text
    assert "| bits per RTT | 11.25 |" in text and "Licence of the weights: cc-by-4.0" in text
    assert "Of sources it reads 24 bits (IPv4) or 48 (IPv6); calibration.json holds hashes" in text
    assert 'from_pretrained("someone/pings", trust_remote_code=True)' in text
    plain = (export(random_run(tmp_path / "plain"), tmp_path / "nanochat") / "README.md").read_text()
    assert 'from_pretrained("nanochat")' in plain and "It reads sources whole" in plain
    assert (
        "Whoever publishes the weights names their licence" in plain
        and "license" not in ModelCard(plain).data.to_dict()
    )


@pytest.mark.parametrize("licence", ["CC BY 4.0", "mit: [x", "mit\ntags: x"])
def test_a_licence_that_the_hub_would_refuse_is_refused_here(tmp_path, licence):
    with pytest.raises(ValueError, match=r"is no identifier as the hub has them, such as mit"):
        export(random_run(tmp_path), tmp_path / "out", licence=licence)


def test_a_damaged_manifest_of_rows_is_named(tmp_path):
    run = random_run(tmp_path)
    for damaged in ("{", "[]"):
        (run / "rows_manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"rows_manifest.json is damaged; restore it: it is a copy of"):
            export(run, tmp_path / "out")


def test_the_card_of_a_fine_tuned_model_says_that_its_pings_are_not_all_that_it_learned_from(tmp_path):
    run = random_run(tmp_path)
    Base(SECRET, 1640, "ab" * 32, {"aa": SECRET}, None).save(run)
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "1,234 pings of 2 input files" in text and SECRET not in text
    assert "These are of its fine-tuning: it began with the weights of another model, after 1,640 steps" in text


def test_what_val_said_of_other_weights_is_not_said_of_those_that_were_trained_on(tmp_path):
    trained = AutoModelForCausalLM.from_pretrained(export(random_run(tmp_path), tmp_path / "out"))
    with torch.no_grad():
        trained.lm_head.weight.add_(0.5)
    trained.save_pretrained(tmp_path / "tuned")
    text = (export(tmp_path / "tuned", tmp_path / "again") / "README.md").read_text()
    assert "It was not evaluated on val." in text and "4,096 tokens" not in text
    assert ModelCard(text).data.eval_results is None
    assert load(tmp_path / "again").state["rows_sha256"] == "ab" * 32  # what a fine-tuning is compared with
    kept = (export(tmp_path / "out", tmp_path / "same") / "README.md").read_text()
    assert "1.5 |" in kept and "4,096 tokens" in kept


def test_a_checkpoint_is_exported_with_the_card_of_its_run(tmp_path):
    run = random_run(tmp_path)
    (checkpoint,) = (run / "checkpoints").iterdir()
    text = (export(checkpoint, tmp_path / "out") / "README.md").read_text()
    assert "1,234 pings of 2 input files" in text and "| bits per RTT | 11.25 |" in text


def scores(folder, leak=""):
    """results.json of an evaluation, as far as a card reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"split": "test-s1", "k": 0, "comparator": "stack"}, {"split": "test-s2", "k": 10, "comparator": "pairs"}]
    methods = {"stack": {"kind": "baseline"}, "ping-llm, source auto": {"kind": "model"}}
    own = {"ping-llm, source auto": {"ratio": [0.75, 1.25], "geometric_mean": 0.9682}}
    values = {"leak": leak, "methods": methods, "primary": {"cells": cells, "methods": own}}
    (folder / "results.json").write_text(json.dumps(values))
    return folder


def test_scores_of_pingbench_come_from_the_run_or_from_where_they_are_named(tmp_path):
    run = random_run(tmp_path)
    assert "PingBench" not in (export(run, tmp_path / "none") / "README.md").read_text()
    scores(run / "eval")
    lines = ["| test-s1, no context | stack | 0.75 |", "| test-s2, 10 earlier pings | pairs | 1.25 |", "**0.97**"]
    text = (export(run, tmp_path / "own") / "README.md").read_text()
    assert all(line in text for line in lines)
    text = (export(run, tmp_path / "named", results=scores(tmp_path / "scores")) / "README.md").read_text()
    assert all(line in text for line in lines)
    scores(run / "eval", leak="it learned them")
    assert "PingBench" not in (export(run, tmp_path / "leak") / "README.md").read_text()
    with pytest.raises(ValueError, match=r"holds no scores of a model that did not learn the answers"):
        export(run, tmp_path / "refused", results=run / "eval")
    with pytest.raises(ValueError, match=r"there is no .*results\.json; name the folder of an evaluation"):
        export(run, tmp_path / "refused", results=tmp_path)
    assert not (tmp_path / "refused").exists() and not list(tmp_path.glob("*.partial*"))


def test_an_export_is_whole_or_not_there_and_replaces_nothing(tmp_path, monkeypatch):
    run, to = random_run(tmp_path), tmp_path / "out"
    to.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "model_card", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
        with pytest.raises(OSError, match="No space left"):
            export(run, to)
    assert not any(to.iterdir()) and not list(tmp_path.glob("*.partial*"))
    assert export(run, to) == to
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    with pytest.raises(ValueError, match="is there already and not empty; name a new folder"):
        export(run, to)
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before


def test_weights_that_transformers_would_answer_otherwise_with_are_never_exported(tmp_path, monkeypatch):
    monkeypatch.setattr("ping_llm.model.nanochat._swapped", lambda rows, config: rows)
    with pytest.raises(AssertionError, match="logits that are"):
        export(random_run(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changed(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / MODEL_NAME).unlink(), "model.safetensors cannot be read"),
        (
            lambda folder: (folder / MODEL_NAME).write_bytes((folder / MODEL_NAME).read_bytes()[:-4] + b"1234"),
            "is not what",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / EXPORT_NAME).write_text("[]"), "ping_llm.json is damaged"),
        (lambda folder: (folder / CALIBRATION_NAME).write_text("{}"), "calibration.json is damaged"),
        (
            lambda folder: changed(folder / "config.json", lambda v: v["ping_llm"].update(format_version=2)),
            "of format 2",
        ),
        (lambda folder: changed(folder / EXPORT_NAME, lambda v: v.update(format_version=3)), "of format 3"),
        (
            lambda folder: changed(
                folder / "config.json", lambda v: v["ping_llm"]["config"]["model"].update(n_layer=3)
            ),
            "does not hold the weights",
        ),
        (
            lambda folder: changed(folder / "config.json", lambda v: v["ping_llm"]["config"]["model"].update(n_lay=3)),
            "unknown key model.n_lay",
        ),
        (
            lambda folder: changed(folder / "config.json", lambda v: v["ping_llm"].pop("config")),
            "config.json is damaged",
        ),
    ],
)
def test_a_damaged_export_is_one_line(tmp_path, damage, said):
    folder = export(random_run(tmp_path), tmp_path / "out")
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        PingModel.load(folder)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_the_package_lies_beside_the_weights_and_knows_how_much_they_read(tmp_path):
    folder = export(random_run(tmp_path), tmp_path / "out")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert told["model_max_length"] == 128


def test_an_export_is_no_run(tmp_path):
    folder = export(random_run(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match="is an export, which is no run; name a run folder"):
        load_config(folder)


def test_the_command_exports_and_says_what_is_wrong(tmp_path, capsys):
    run, to = random_run(tmp_path), tmp_path / "out"
    for argv, said in (
        ([run], "give --to DIR, a new folder for the export, or --push OWNER/NAME"),
        ([run, "--push", "someone/pings"], "is no exported folder; with --to DIR it becomes one"),
        ([make_config(tmp_path / "empty").train.run_dir, "--to", to], "no checkpoint in"),
        ([run, "--to", to, "--results", tmp_path], "name the folder of an evaluation"),
    ):
        assert main(["export", *map(str, argv)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line and not to.exists()
    assert main(["export", str(run), "--to", str(to), "--dtype", "bf16", "--license", "mit"]) == 0
    assert capsys.readouterr().out == f"exported: {to}\n" and "license: mit" in (to / "README.md").read_text()
    assert main(["export", str(to), "--push", "someone/pings", "--license", "mit"]) == 1
    assert "go with --to" in capsys.readouterr().err
