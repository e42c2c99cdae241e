"""Claims about a run that goes on from another's weights: what it learns, keeps and refuses, that it is a run as others."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import write_rows
from finetune_runs import base_config, internet_rows
from training_runs import alone, assert_same_weights, gang, losses

from ping_llm import PingModel
from ping_llm.cli import main
from ping_llm.config import Config
from ping_llm.data.loader import training_batches
from ping_llm.data.rows import RowReader
from ping_llm.eval.run import leak_problem
from ping_llm.inference.familiar import Familiar
from ping_llm.model.checkpoint import load_config, load_latest, load_model
from ping_llm.training import finetune as finetuning
from ping_llm.training.base import BASE_NAME, met, wanted_base
from ping_llm.training.calibration import calibrate
from ping_llm.training.finetune import finetune
from ping_llm.training.options import FinetuneOptions
from ping_llm.training.report import FINETUNE_NAME
from ping_llm.training.trainer import Feed, train

SHORT = ("--train.total-steps", "40", "--train.eval-every", "40", "--train.checkpoint-every", "40")


@pytest.fixture(autouse=True, scope="module")
def few_measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "WINDOWS", 16)
        patch.setattr(finetuning, "QUERIES", 40)
        patch.setattr("ping_llm.training.report.plot_run", lambda run_dir: [])  # which takes longer than training
        yield


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    return internet_rows(tmp_path_factory.mktemp("old") / "rows", seed=0, measurements=3000)


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> Path:
    """Twenty pings a minute for an hour, of an Internet with other addresses."""
    return internet_rows(tmp_path_factory.mktemp("new") / "rows", seed=1, measurements=1200)


@pytest.fixture(scope="module")
def base(tmp_path_factory, old) -> Path:
    run = tmp_path_factory.mktemp("base") / "run"
    train(base_config(run, old, total_steps=100))
    return run


RATES = ("--optim.adamw-lr", "0.01", "--optim.embedding-lr", "0.2")  # of low rank: so small a model, in so few steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, new) -> dict[str, tuple[Path, dict]]:
    """Fine-tuned runs and what `finetune` says of them: whole with the base's rows mixed in and without, and of rank 4."""
    folder, found = tmp_path_factory.mktemp("finetuned"), {}
    for name, options in {"replay": {}, "none": {"replay": "none"}, "lora": {"lora": 4}}.items():
        chosen = FinetuneOptions(str(base), new, folder / name, **options)
        found[name] = chosen.out, finetune(chosen, [*SHORT, *(RATES if chosen.lora else ())])
    return found


def change(found: dict, rows: str, value: str = "val_rtt_bits") -> float:
    return found[rows]["after"][value] - found[rows]["before"][value]


@pytest.mark.parametrize("name", ["replay", "lora"])
def test_the_new_network_is_learned_and_the_old_one_kept(runs, name):
    _, found = runs[name]
    error = [found["new"][when]["val_median_rel_error"] for when in ("before", "after")]
    assert error[0] > 0.3 and error[1] < error[0] / 3
    assert change(found, "new") < -3 and change(found, "old") < 0.5


def test_without_the_old_rows_the_old_network_is_forgotten(runs):
    with_rows, without = (change(runs[name][1], "old", "val_loss") for name in ("replay", "none"))
    assert without > 0.4 and with_rows < without / 2


def test_before_is_the_base_and_after_is_the_run(runs, base, old):
    run, found = runs["replay"]
    device = torch.device("cpu")
    for when, source in (("before", base), ("after", run)):
        config = finetuning.measured_on(load_config(run), old)
        assert found["old"][when] == finetuning.measure(load_model(source)[0], config, device)
    assert found["base"] == str(base) and found["base_step"] == 100 and found["old"]["rows"] == str(old)
    assert json.loads((run / FINETUNE_NAME).read_text()) == found
    report = (run / "report.md").read_text()
    assert f"Begun with `{base}`, step 100." in report
    value = f"{100 * found['new']['after']['val_median_rel_error']:.4g}"
    assert "| the new rows | median relative error of the RTT (%) |" in report and f"| {value} |" in report


def test_a_run_of_low_rank_is_loaded_as_any_other(runs, base):
    run, _ = runs["lora"]
    weights, given = (load_latest(folder).model for folder in (run, base))
    assert weights.keys() == given.keys()
    changed = {name for name, weight in weights.items() if not torch.equal(weight, given[name])}
    assert changed == {n for n in weights if n.startswith("blocks.")} | {"fields.prefixes.weight"}
    for name in sorted(changed - {"fields.prefixes.weight"}):
        assert (torch.linalg.svdvals((weights[name] - given[name]).double()) > 1e-4).sum() == 4
    assert PingModel.load(run).rtt("192.0.2.1", "198.51.100.7").median > 0


def stopped_at(step: int) -> Feed:
    """Of rows; a signal comes while the batch of `step` is fetched."""

    def batches(config: Config, start_step: int, *where):
        for number, batch in enumerate(training_batches(config, start_step, *where), start_step):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return dataclasses.replace(Feed.of_rows(), batches=batches)


@pytest.mark.parametrize("name", ["replay", "lora"])
def test_a_run_goes_on_to_the_same_bits_when_its_base_is_gone(tmp_path, runs, base, name):
    whole, _ = runs[name]
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    config = load_config(whole)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, run_dir=tmp_path / "run", init_from=str(copy))
    )
    assert train(config, stopped_at(7)).step == 8
    shutil.rmtree(copy)
    assert train(config).step == 40
    assert_same_weights(tmp_path / "run", whole)
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path, runs, base):
    """The weights that the main one reads reach the other, which computes changes of low rank from its own gradients."""
    config, found = load_config(runs["lora"][0]), {}
    for name, processes in (("one", 1), ("two", 2)):
        fields = {"run_dir": tmp_path / name, "total_steps": 3}
        own = dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))
        gang(processes, train, own) if processes > 1 else alone(train, own)
        found[name] = load_latest(tmp_path / name).model
    given = load_latest(base).model
    for weight, other in zip(found["one"].values(), found["two"].values(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4)
    for name in ("embedding.weight", "head.weight", "fields.places.weight"):  # which do not learn
        assert torch.equal(found["two"][name], given[name])
    assert not torch.equal(found["two"]["blocks.0.mlp.up.weight"], given["blocks.0.mlp.up.weight"])


def test_the_same_command_leaves_a_finished_run_as_it_is(runs, base, new, capsys):
    run, found = runs["replay"]
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["finetune", str(base), str(new), "--out", str(run), *SHORT]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    assert "the new rows" in out and "the old rows" in out and out.endswith(f"report: {run / 'report.md'}\n")
    assert json.loads((run / FINETUNE_NAME).read_text()) == found


def test_a_run_of_another_base_is_not_gone_on_with(tmp_path, runs, base, new, capsys):
    run, _ = runs["replay"]
    shutil.copytree(base, tmp_path / "base")
    assert main(["finetune", str(tmp_path / "base"), str(new), "--out", str(run), *SHORT]) == 1
    assert (
        f"{run} holds a run with another train.init_from; pass another --out, or what it had" in capsys.readouterr().err
    )


def test_a_base_that_was_trained_on_meanwhile_is_not_compared_with(tmp_path, runs, new, old, base, capsys):
    run, _ = runs["replay"]
    values = json.loads((run / BASE_NAME).read_text()) | {"model_sha256": "0" * 64}
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / BASE_NAME).write_text(json.dumps(values))
    assert main(["finetune", str(base), str(new), "--out", str(tmp_path / "run"), *SHORT]) == 1
    assert f"{base} is another model than when {tmp_path / 'run'} began" in capsys.readouterr().err


def test_rows_that_are_not_at_hand_are_replaced_by_samples_of_the_base(tmp_path, base, new, old):
    """Where the base's rows were moved: the run is kept in mind by what it makes up, and judged by other samples."""
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["config"]["data"]["rows"] = str(tmp_path / "moved")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ping_llm.training.samples.MEASUREMENTS", 400)
        found = finetune(FinetuneOptions(str(tmp_path / "base"), new, tmp_path / "run"), [*SHORT[:1], "10", *SHORT[2:]])
    assert found["old"]["rows"] == str(tmp_path / "run" / "replay") and found["old"]["samples"]
    kept = load_config(tmp_path / "run").data
    assert kept.replay == str(tmp_path / "run" / "replay") and kept.replay_share == finetuning.REPLAY_SHARE
    assert "samples of the base" in (tmp_path / "run" / "report.md").read_text()
    given = finetuning.prepare(
        FinetuneOptions(str(tmp_path / "base"), new, tmp_path / "run2", replay=str(old)), SHORT
    )  # the rows that were moved are known by their manifest
    assert given.old == old and given.config.data.replay == str(old)


def test_defaults_are_gentle_and_as_long_as_the_new_rows_ask_for(base, new, old, tmp_path, monkeypatch):
    theirs = load_config(base)
    config = finetuning.default_config(theirs, 100, str(base), new, tmp_path)
    assert config.model == theirs.model and config.loss == theirs.loss and config.seed == theirs.seed + 1
    assert config.optim.muon_lr == pytest.approx(finetuning.RATE_SHARE * theirs.optim.muon_lr)
    assert config.optim.weight_decay == 0 and config.train.total_steps == finetuning.LEAST_STEPS
    monkeypatch.setattr(finetuning, "LEAST_STEPS", 1)
    longer = finetuning.default_config(theirs, 10**6, str(base), old, tmp_path)
    tokens = 16 * RowReader(old, "train").measurements.sum()
    assert longer.train.total_steps == round(2 * tokens / (8 * 96 / 2)) > 1
    beside = dataclasses.replace(theirs, data=dataclasses.replace(theirs.data, short_windows=2))
    assert finetuning._steps(old, 10**6, beside) == round(2 * tokens / (8 * 192 / 2)) > 1


def test_a_fine_tuned_run_is_fine_tuned_at_the_same_rates(runs, new, tmp_path):
    once = load_config(runs["lora"][0])
    again = finetuning.default_config(once, 40, "runs/mine", new, tmp_path)
    assert again.optim.matrices == "muon" and again.optim.lora_rank == 0
    assert again.optim.muon_lr == once.optim.muon_lr == pytest.approx(finetuning.RATE_SHARE * 0.02)
    low = finetuning.default_config(load_config(runs["replay"][0]), 40, "runs/mine", new, tmp_path, lora=2)
    assert (low.optim.matrices, low.optim.lora_rank, low.optim.adamw_lr) == ("adamw", 2, finetuning.LORA_RATE)


def test_a_run_goes_on_that_began_before_rows_could_be_mixed_in(tmp_path, old):
    config = base_config(tmp_path, old, total_steps=4)
    assert train(config, stopped_at(1)).step == 2
    path = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    del state["replay_sha256"], state["state_sha256"]  # the first ones had no checksum of their own
    path.write_text(json.dumps(state))
    assert train(config).step == 4 and load_latest(tmp_path).state["replay_sha256"] == ""


def test_a_run_does_not_go_on_with_other_rows_mixed_in(tmp_path, runs, old):
    run, _ = runs["replay"]
    shutil.copytree(old, tmp_path / "other")
    manifest = json.loads((old / "manifest.json").read_text())
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest | {"packets": "all"}))
    config = load_config(run)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, replay=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"holds a run with another data.replay; pass another --out, or what it had"):
        train(config)


def test_what_the_base_has_met_the_run_has_met(runs, old, new, base):
    run, _ = runs["none"]
    both = met(load_config(runs["replay"][0]), (4, 16))
    for folder in (old, new):
        for row in RowReader(folder, "train"):
            assert (both.known_bytes("src", row.src_addresses) == 4).all()
            assert (both.known_bytes("dst", row.dst_addresses) == 4).all()
    alone = met(load_config(run), (4, 16))  # the base has no calibration, so what it has met is not known
    assert alone == Familiar.of_rows(RowReader(new, "train"))


def test_evaluations_know_what_the_base_learned_from(tmp_path, runs, base, new, old):
    """Rows that share an input file with those of the base, or with those mixed in, are refused as what was learned."""
    run, _ = runs["replay"]
    state = load_latest(run).state
    for name in (BASE_NAME, "replay_manifest.json"):
        shutil.copytree(run, tmp_path / name)
        values = json.loads((tmp_path / name / name).read_text())
        listed = [{"name": "a.bz2", "sha256": "aa"}]
        values["inputs"] = {"aa": "a.bz2"} if name == BASE_NAME else listed
        (tmp_path / name / name).write_text(json.dumps(values))
        data = tmp_path / f"{name}-data"
        shutil.copytree(old, data)
        manifest = json.loads((data / "manifest.json").read_text())
        (data / "manifest.json").write_text(json.dumps(manifest | {"inputs": listed}))
        assert "both were made of a.bz2" in leak_problem(tmp_path / name, new, state["rows_sha256"], data)
    assert leak_problem(run, new, state["rows_sha256"], data) == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora", "-1"], "--lora -1 must be a rank of at least 1, or 0 to learn all weights"),
        (["--model.n-embd", "64"], "has model.n_embd=48; set that, or take another one"),
        (["--data.replay-share", "0.01"], "data.replay_share=0.01 of train.batch_size=8 is 0 windows"),
        (["--replay", "nowhere"], "no rows in nowhere"),
        (["--train.run-dir", "elsewhere"], "RUN and --out say what train.run_dir is; leave it out"),
        (["--train.init-from", "elsewhere"], "RUN and --out say what train.init_from is; leave it out"),
        (["--data.rows", "elsewhere"], "ROWS says what data.rows is; leave it out"),
        (["--lorra", "8"], "ping-llm train CONFIG.toml --help"),  # which lists the options that may follow
        (["--lora", "48"], "optim.lora_rank=48 must be below model.n_embd=48"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, base, new, capsys, argv, message):
    code = 2
    try:
        code = main(["finetune", str(base), str(new), "--out", str(tmp_path / "run"), *argv])
    except SystemExit as stopped:
        code = stopped.code
    assert code in (1, 2) and message in capsys.readouterr().err and not (tmp_path / "run" / "config.json").exists()


def test_the_folder_of_a_run_that_began_with_nothing_is_not_gone_on_with(base, new, capsys):
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*")}
    assert main(["finetune", str(base), str(new), "--out", str(base), "--replay", "samples"]) == 1
    said = f"{base} holds a run that did not begin with another one; name a new folder with --out"
    assert said in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*")} == before


def test_help_says_what_a_base_is(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    assert "OWNER/NAME of the Hugging Face hub" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_an_exported_folder_is_a_base_as_its_run_is(tmp_path, base, new, old):
    pytest.importorskip("transformers", reason="exports are of transformers")
    from ping_llm.hf.export import export

    export(base, tmp_path / "exported")
    plan = finetuning.prepare(
        FinetuneOptions(str(tmp_path / "exported"), new, tmp_path / "run", replay=str(old)), SHORT
    )
    assert plan.old == old and plan.base.step == 100  # the rows are known by the hash of their manifest
    (began, weights), given = wanted_base(plan.config), load_latest(base).model
    assert began == plan.base and all(torch.equal(weights[name], given[name]) for name in given)


def test_a_fine_tuned_run_is_exported_without_paths(tmp_path, runs):
    pytest.importorskip("transformers", reason="exports are of transformers")
    from ping_llm.hf.export import export

    run, _ = runs["lora"]
    folder = export(run, tmp_path / "exported")
    assert not any(str(run.parent.parent) in path.read_text() for path in folder.glob("*.json"))
    pings = [PingModel.load(one).rtt("192.0.2.1", "198.51.100.7") for one in (run, folder)]
    assert pings[0].median == pings[1].median


def test_several_processes_are_told_what_to_run(tmp_path, base, new, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^finetune is one process; train the config of its report.md by torchrun"):
        finetune(FinetuneOptions(str(base), new, tmp_path / "run"))


def test_rows_that_the_base_holds_out_are_refused_by_the_command(tmp_path, base, new, old, capsys):
    parts = {"train": list(RowReader(old, "val")), "val": list(RowReader(new, "val"))}
    (tmp_path / "rows").mkdir()
    leaky = write_rows(tmp_path / "rows", parts, shards=1)
    assert main(["finetune", str(base), str(leaky), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    table = pa.concat_tables(row.to_measurements() for row in parts["train"]).select(["src", "dst", "time_s"])
    count = len({tuple(one.values()) for one in table.to_pylist()})  # some come twice in a second
    assert said.startswith(
        f"error: the part train of {leaky} holds {count} measurements that {old} keeps for val and test"
    )
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_calibration_of_the_run_knows_what_the_base_has_met(runs, base, old, new, monkeypatch):
    run, _ = runs["replay"]
    monkeypatch.setattr("ping_llm.training.calibration.SURPRISES", 10)
    model, config, _ = load_model(run)
    familiar = calibrate(model, config, torch.device("cpu"), results=3).familiar
    assert familiar == Familiar.of_rows([*RowReader(old, "train"), *RowReader(new, "train")])


def test_a_run_begins_with_a_checkpoint_that_is_named(tmp_path, base, new):
    checkpoint = base / "checkpoints" / "step-00000100"
    plan = finetuning.prepare(FinetuneOptions(str(checkpoint), new, tmp_path / "run"), SHORT)
    assert plan.base.step == 100 and plan.config.train.init_from == str(checkpoint)
