"""Runs are grouped by config, compared by seed, and shown in a table that says what exceeds the noise."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from ping_llm.cli import main
from ping_llm.config import Config, LossConfig, ModelConfig, TrainConfig
from ping_llm.eval.compare import Comparison, compare
from ping_llm.eval.curves import curve, mean_curve
from ping_llm.eval.outcomes import SHARE, Outcome, benchmark, group_runs, quantities, read_runs
from ping_llm.model.checkpoint import save_config
from ping_llm.model.gpt import flops_per_token, parameter_count

MODEL = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=64)
TRAIN = TrainConfig(batch_size=8, total_steps=20)
BEST = -0.5  # from the loss at the end to that at the best step


def write_run(folder: Path, loss: float, seed: int = 0, init_seed: int = 0, steps: int = 20, **model) -> Path:
    """A run that was evaluated at its beginning, after half of it, where its loss is least, and at its end."""
    config = Config(model=dataclasses.replace(MODEL, **model), train=TRAIN, seed=seed, init_seed=init_seed)
    save_config(folder, config)
    lines = [{"step": 0, "time_s": 0.0, "tokens": 0, "val_loss": 5.5, "val_loss_rtt": 5.5}]
    for step, value in ((steps // 2, loss + BEST), (steps, loss)):
        evaluated = {
            "val_loss": value,
            "val_loss_rtt": 2 * value,
            "val_rtt_bits": 4 * value,
            "val_median_rel_error": 0.1,
        }
        speed = {"time_s": step / 10, "tokens": 400 * step, "tokens_per_s": 4000.0, "loss": value}
        lines.append({"step": step} | speed | evaluated)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_results(folder: Path, run: Path, **ratios: float) -> Path:
    """Results of PingBench whose k = 0 cell of each part has the given ratio, and the one with 10 others four times it."""
    cells = []
    for part, ratio in ratios.items():
        split = part.replace("_", "-")
        for draw, k, value in (("none", 0, ratio), ("other", 10, 4 * ratio), ("recent", 10, 99.0), ("other", 5, 99.0)):
            for family, factor in (("ping", 1), ("target", 7)):
                method = {"crps_ratio": factor * value, "crps_log": factor * value / 10}
                cell = {"family": family, "split": split, "draw": draw, "k": k}
                cells.append(cell | {"methods": {"model": method, "stack": method | {"crps_ratio": 1.0}}})
    methods = {"stack": {"kind": "baseline"}, "model": {"kind": "model"}}
    folder.mkdir(parents=True)
    results = {"run": str(run), "methods": methods, "cells": cells, "model_queries_per_cell": 75}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two configs with two seeds: the wide one is 0.4 and 0.6 better, and seeds differ by 0.1 and 0.3."""
    folder = tmp_path / "sweep"
    for name, width, losses in (("n_embd=32", 32, (2.0, 2.1)), ("n_embd=64", 64, (1.6, 1.5))):
        for seed, loss in enumerate(losses):
            write_run(folder / f"{name},seed={seed}", loss, seed, n_embd=width)
    (folder / "notes").mkdir()
    return folder


def test_runs_of_a_sweep_are_compared_by_config_and_seed(sweep):
    found = compare([sweep])
    assert [group.name for group in found.groups] == ["n_embd=32", "n_embd=64"]
    assert found.groups[1].differs_from(found.groups[0]) == ["model.n_embd=64"]
    one = found.differences["end_val_loss"]["n_embd=64"]
    assert one.value == pytest.approx(-0.5) and one.pairs == 2  # −0.4 and −0.6; deviation 0.1·√2
    assert one.interval == pytest.approx((-0.5 - 12.7062 * 0.1, -0.5 + 12.7062 * 0.1), abs=1e-4)
    noise = found.noise["end_val_loss"]  # 0.05² four times over two degrees of freedom
    assert noise.deviation == pytest.approx(0.1 / np.sqrt(2)) and noise.freedom == 2
    assert one.exceeds_noise is True  # 0.5 > 4.303 · 0.0707 · 1 = 0.304
    assert found.differences["best_val_loss"]["n_embd=64"].value == pytest.approx(-0.5)
    head, rows = found.table()
    assert head == ["", "n_embd=32, 2 runs", "n_embd=64, 2 runs", "Δ to n_embd=32", "noise"]
    table = {row[0]: row[1:] for row in rows}
    assert table["val loss, nats, end"] == [
        "2.0500 ± 0.0707", "1.5500 ± 0.0707", "−0.5000 (−1.7706 to +0.7706, n = 2) *", "0.0707"
    ]  # fmt: skip
    assert table["val loss, nats, best step"][0] == "1.5500 ± 0.0707"
    assert table["bits per RTT, end"][0] == "8.200 ± 0.283" and table["val RTT, nats, end"][0] == "4.1000 ± 0.1414"
    assert table["median error of val, end"] == ["10.00%", "10.00%", "+0.00% (+0.00% to +0.00%, n = 2)", "0.00%"]
    assert table["parameters"][:2] == [
        f"{parameter_count(dataclasses.replace(MODEL, n_embd=width)):,}" for width in (32, 64)
    ]
    assert table["tokens"][:2] == ["8,000", "8,000"] and table["tokens/s, median"][2:] == ["–", "–"]
    assert table["FLOPs of training"][0] == f"{20 * 8 * 64 * flops_per_token(MODEL):.3g}"
    (verdict,) = found.verdicts()
    assert verdict.startswith(
        "n_embd=64 (model.n_embd=64): lower: val loss, nats, end; val RTT, nats, end; bits per RTT"
    )


def test_the_other_way_round_signs_change(sweep):
    found = Comparison.of(read_runs([sweep]), against="n_embd=64")
    assert [group.name for group in found.groups] == ["n_embd=64", "n_embd=32"]
    assert found.differences["end_val_loss"]["n_embd=32"].value == pytest.approx(0.5)
    assert "higher: val loss, nats, end" in found.verdicts()[0]
    with pytest.raises(ValueError, match=r"no config is called 'wide'; there are n_embd=32, n_embd=64"):
        Comparison.of(read_runs([sweep]), against="wide")


def test_one_seed_cannot_tell_until_a_noise_study_is_named(sweep, tmp_path):
    runs = [sweep / "n_embd=32,seed=0", sweep / "n_embd=64,seed=0"]
    alone = compare(runs)
    assert alone.noise == {} and alone.differences["end_val_loss"]["n_embd=64"].exceeds_noise is None
    assert alone.verdicts() == ["n_embd=64 (model.n_embd=64): cannot be told from noise."]
    assert "no difference can be told from noise" in alone.markdown()
    for seed in range(2):
        for init in (1, 2):
            loss = 3 + 0.1 * seed + 0.01 * (init - 1)
            write_run(tmp_path / f"noise/base,seed={seed},init={init}", loss, seed, init, n_embd=96)
    judged = compare(runs, noise=[tmp_path / "noise"])
    assert [group.name for group in judged.groups] == ["n_embd=32", "n_embd=64"]
    assert judged.noise["end_val_loss"].freedom == 3
    assert judged.differences["end_val_loss"]["n_embd=64"].exceeds_noise is True
    over_training, over_initial = judged.notes
    assert re.match(r"val loss at the end deviates by 0\.0707 over training seeds, the same initial", over_training)
    assert re.match(r"val loss at the end deviates by 0\.0071 over initial weights, the same training", over_initial)


def test_runs_are_of_one_config_if_only_seeds_and_what_does_not_change_learning_differ(tmp_path):
    same = [write_run(tmp_path / f"a,seed={seed}", 2.0, seed) for seed in range(2)]
    config = Config(model=MODEL, train=dataclasses.replace(TRAIN, log_every=3, run_dir=Path("x")), seed=2)
    save_config(same[1], config)
    other = write_run(tmp_path / "b", 2.0, 0)
    save_config(other, Config(model=MODEL, train=dataclasses.replace(TRAIN, total_steps=21)))
    again = write_run(tmp_path / "a", 2.0, 0)
    groups, notes = group_runs(read_runs([*same, other, again, same[0]]))
    assert [(group.name, [one.seeds for one in group.outcomes]) for group in groups] == [
        ("a", [(0, 0), (2, 2)]), ("b", [(0, 0)])
    ]  # fmt: skip
    assert notes == [f"{again} is left out: another run has its config and its seeds"]


def test_groups_of_one_name_are_called_by_their_folders(tmp_path):
    for place, width in (("one", 32), ("two", 64)):
        write_run(tmp_path / place / "base,seed=0", 2.0, n_embd=width)
    groups, _ = group_runs(read_runs([tmp_path / "one", tmp_path / "two"]))
    assert [group.name for group in groups] == ["one/base", "two/base"]


def test_runs_on_other_rows_are_other_configs_and_said_to_have_other_windows(tmp_path):
    for name in "ab":
        (write_run(tmp_path / name, 2.0) / "rows_manifest.json").write_text(f'{{"rows": "{name}"}}')
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert found.groups[1].differs_from(found.groups[0]) == ["other rows"]
    assert found.notes == ["the runs differ in rows: their losses on val are of other windows"]


def test_runs_of_a_folder_stand_in_the_order_of_the_numbers_in_their_names(tmp_path):
    for name in ("n_embd=160,seed=0", "n_embd=96,seed=10", "n_embd=96,seed=9", "base", "9"):
        write_run(tmp_path / name, 2.0)
    names = [one.folder.name for one in read_runs([tmp_path])]
    assert names == ["9", "base", "n_embd=96,seed=9", "n_embd=96,seed=10", "n_embd=160,seed=0"]


def test_an_unfinished_run_is_named(tmp_path):
    run = write_run(tmp_path / "run", 2.0, steps=10)
    assert compare([run]).notes == [f"{run} is not finished: 50%, step 10"]
    other = write_run(tmp_path / "other", 2.0, seed=1)
    assert f"{run} is not finished: 50%, step 10" in compare([other], noise=[run]).notes


def test_a_run_that_has_logged_nothing_is_named_and_left_out(tmp_path):
    write_run(tmp_path / "sweep/a,seed=0", 2.0)
    failed, begun = tmp_path / "sweep/b,seed=0", write_run(tmp_path / "sweep/c,seed=0", 2.0, n_embd=64)
    failed.mkdir()
    (failed / "train.log").touch()
    (begun / "metrics.jsonl").unlink()
    found = compare([tmp_path / "sweep"])
    assert [group.name for group in found.groups] == ["a"]
    assert found.notes == [f"{run} has logged nothing and is left out" for run in (failed, begun)]


def test_a_loss_that_each_config_weights_its_own_way_is_shown_and_not_judged(sweep, tmp_path):
    """Of two runs that know every field equally well, the one that weights RTTs more has the larger mean."""
    for seed in range(2):
        run = write_run(tmp_path / f"rtt=3,seed={seed}", 9.0 + seed, seed)
        save_config(run, Config(model=MODEL, train=TRAIN, loss=LossConfig(rtt=3.0), seed=seed))
    weighted = [tmp_path / f"rtt=3,seed={seed}" for seed in range(2)]
    found = compare([sweep / "n_embd=32,seed=0", sweep / "n_embd=32,seed=1", *weighted])
    assert set(found.differences) == {
        f"{at}_{name}" for at in ("end", "best") for name in ("val_loss_rtt", "val_rtt_bits", "val_median_rel_error")
    }
    table = {row[0]: row[1:] for row in found.table()[1]}
    assert table["val loss, nats, end"] == ["2.0500 ± 0.0707", "9.5000 ± 0.7071", "–", "–"]
    assert "val loss is a mean of its own for each, and is not judged" in found.notes[0]
    assert "end_val_loss" not in compare([sweep], noise=weighted).differences  # nor by the deviation of another mean
    assert "end_val_loss" in compare([sweep]).differences


# PingBench


def test_of_pingbench_the_parts_of_val_count_in_the_two_contexts_of_the_primary_result(tmp_path):
    results = json.loads(
        (write_results(tmp_path / "e", tmp_path, val_s1=0.5, val_s4=2.0, test_s1=9.0) / "results.json").read_text()
    )
    values = benchmark(results)
    assert values == pytest.approx({
        "ratio_val-s1": 1.0, "ratio_val-s4": 4.0, "ratio_val": 2.0,
        "crps_val-s1": 0.1, "crps_val-s4": 0.4, "crps_val": 0.2,
    })  # fmt: skip


def test_a_part_of_val_that_lacks_a_context_is_left_out_and_said_to_be(tmp_path):
    """Its mean over one context would stand beside means over two."""
    runs = [write_run(tmp_path / name, 2.0, n_embd=width) for name, width in (("a", 32), ("b", 64))]
    for run in runs:
        write_results(run / "eval", run, val_s1=0.5, val_s2=0.5)
    assert not any("PingBench" in note for note in compare(runs).notes)
    path = runs[1] / "eval/results.json"
    results = json.loads(path.read_text())

    def without(*parts: str) -> None:
        cells = [cell for cell in results["cells"] if cell["draw"] != "other" or cell["split"] not in parts]
        path.write_text(json.dumps(results | {"cells": cells}))

    without("val-s2")
    found = compare(runs)
    assert (
        found.differences["ratio_val-s1"]["b"].value == 0 and "ratio_val-s2" not in found.groups[1].outcomes[0].values
    )
    assert found.notes == [
        "PingBench was put to these models over other parts of val: what is called val is of other queries"
    ]
    without("val-s1", "val-s2")
    (note,) = compare(runs).notes
    assert note.startswith(f"PingBench of {runs[1]} has no part of val with both contexts")


def test_evaluations_are_found_in_run_folders_and_by_the_run_that_they_name(tmp_path):
    runs = [write_run(tmp_path / name, 2.0, n_embd=width) for name, width in (("a", 32), ("b", 64))]
    write_results(runs[0] / "eval", runs[0], val_s1=0.5)
    scores = write_results(tmp_path / "scores", runs[1] / "checkpoints/step-00000020", val_s1=0.25)
    found = compare(runs, scores=[scores])
    assert found.differences[f"{SHARE}_val-s1"]["b"].value == pytest.approx(0.5 - 1.0)
    labels = [quantity.label for quantity in found.quantities]
    assert "val-s1, CRPS ÷ comparator" in labels and "val-s1, CRPS, log-ms" not in labels
    with pytest.raises(ValueError, match=r"--scores holds an evaluation of .*/b, which is none of the runs"):
        compare(runs[:1], scores=[scores])
    values = json.loads((scores / "results.json").read_text())
    (scores / "results.json").write_text(json.dumps(values | {"model_queries_per_cell": 300}))
    assert "PingBench put 75, 300 queries a cell to these models" in compare(runs, scores=[scores]).notes[-1]


def test_without_baselines_the_crps_itself_is_compared(tmp_path):
    run = write_run(tmp_path / "a", 2.0)
    path = write_results(run / "eval", run, val_s1=0.5) / "results.json"
    path.write_text(re.sub(r'"crps_ratio": [\d.]+', '"crps_ratio": null', path.read_text()))
    labels = [quantity.label for quantity in compare([run]).quantities]
    assert "val-s1, CRPS, log-ms" in labels and "val-s1, CRPS ÷ comparator" not in labels


# Curves


def test_curves_are_over_tokens_and_over_the_flops_of_whole_windows(sweep):
    (group, _), _ = group_runs(read_runs([sweep]))
    tokens, losses = curve(group.outcomes[0], "val_loss", "tokens")
    assert tokens.tolist() == [4000, 8000] and losses.tolist() == [1.5, 2.0]
    flops, _ = curve(group.outcomes[0], "val_loss", "flops")
    assert flops.tolist() == [steps * 8 * 64 * flops_per_token(MODEL) for steps in (10, 20)]
    assert mean_curve(group, "val_loss", "tokens")[1] == pytest.approx([1.55, 2.05])
    one = group.outcomes[0]
    beside = dataclasses.replace(one.config, data=dataclasses.replace(one.config.data, short_windows=1))
    saved = 12 * MODEL.n_layer * MODEL.n_embd * (64 - 48)  # of each of 48 tokens, which attend to no more
    expected = 10 * 8 * ((64 + 48) * flops_per_token(MODEL) - 48 * saved)
    assert dataclasses.replace(one, config=beside).flops(10) == pytest.approx(expected)


def test_the_mean_curve_is_over_the_steps_after_which_all_runs_were_evaluated(sweep):
    """One run was evaluated after 10 and 20 steps, the other after 5, 10 and 20, of which 5 is no place of the mean."""
    path = sweep / "n_embd=32,seed=1/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "tokens": 2600, "val_loss": 7.0}\n')
    (group, _), _ = group_runs(read_runs([sweep]))
    assert len(curve(group.outcomes[1], "val_loss", "tokens")[0]) == 3
    places, values = mean_curve(group, "val_loss", "tokens")
    assert places.tolist() == [4000, 8000] and values == pytest.approx([1.55, 2.05])
    path.write_text('{"step": 7, "tokens": 2600, "val_loss": 7.0}\n')
    (group, _), _ = group_runs(read_runs([sweep]))
    assert [len(column) for column in mean_curve(group, "val_loss", "tokens")] == [0, 0]


def test_the_command_prints_the_table_and_writes_text_numbers_and_curves(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    out = tmp_path / "out"
    assert main(["compare", str(sweep), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in ("n_embd=64, 2 runs", "−0.5000 (−1.7706 to +0.7706, n = 2) *", "lower: val loss", "Student's t"):
        assert text in printed and text in (out / "compare.md").read_text()
    assert "![loss against tokens and FLOPs](curves.png)" in (out / "compare.md").read_text()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((out / "compare.json").read_text())
    assert [len(group["runs"]) for group in numbers["groups"]] == [2, 2]
    assert numbers["differences"]["end_val_loss"]["n_embd=64"]["pairs"] == 2
    assert set(numbers["labels"]) <= {quantity.name for quantity in quantities()}


def test_a_table_of_many_configs_is_cut_for_the_terminal_and_whole_in_the_file(tmp_path, capsys, monkeypatch):
    for layers in range(1, 7):
        write_run(tmp_path / f"n_layer={layers}", 2.0, n_layer=layers)
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("┏") == 1 + 3 and all(f"n_layer={layers}" in printed for layers in range(1, 7))
    assert "…" not in printed
    assert len(compare([tmp_path]).table()[0]) == 1 + 1 + 2 * 5 + 1


def test_many_configs_have_a_line_each_the_fewest_bits_first(tmp_path, capsys, monkeypatch):
    for width, loss in ((32, 2.0), (64, 1.9), (96, 2.2), (128, 1.8)):
        for seed in range(2):
            write_run(tmp_path / f"n_embd={width},seed={seed}", loss + 0.01 * seed, seed, n_embd=width)
    found = compare([tmp_path], against="n_embd=64")
    head, rows = found.overview()
    assert head[:4] == ["config", "runs", "val loss, nats, end", "Δ to n_embd=64"] and "bits per RTT, end" in head
    assert [row[0] for row in rows] == [f"n_embd={width}" for width in (128, 64, 32, 96)]
    lines = {row[0]: row for row in rows}
    assert lines["n_embd=96"][1:4] == ["2", "2.2050 ± 0.0071", "+0.3000 (+0.3000 to +0.3000, n = 2) *"]
    assert lines["n_embd=64"][3] == "–"
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert (
        capsys.readouterr().out.index("n_embd=128")
        and "| n_embd=128 | 2 |" in (tmp_path / "out/compare.md").read_text()
    )
    three = [path for path in tmp_path.glob("n_embd=*") if "=96" not in path.name]
    assert "| config | runs |" not in compare(three, tmp_path / "out").markdown()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name the runs, or folders that hold runs"),
        (["none"], "no run folder none; name folders that ping-llm train or ping-llm sweep wrote"),
        (["."], ". is no run and holds none"),
        (["damaged"], "damaged/config.json is damaged"),
        (["run", "--scores", "run"], "run/results.json cannot be read"),
        (["run", "--noise", "none"], "no run folder none"),
        (["run", "--out", "file"], "file is a file, no folder"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(tmp_path, monkeypatch, capsys, argv, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if argv == ["."] else tmp_path)
    write_run(tmp_path / "run", 2.0)
    (write_run(tmp_path / "damaged", 2.0) / "config.json").write_text("{")
    (tmp_path / "file").touch()
    assert main(["compare", *argv]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_run_that_was_never_evaluated_has_no_curve_and_no_losses(tmp_path):
    run = write_run(tmp_path / "run", 2.0)
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "loss": 3.0}\n')
    found = compare([run], tmp_path / "out")
    assert [quantity.label for quantity in found.quantities] == ["parameters", "tokens", "FLOPs of training"]
    assert not (tmp_path / "out/curves.png").exists() and "curves" not in (tmp_path / "out/compare.md").read_text()


def test_an_outcome_knows_how_far_its_run_is(tmp_path):
    assert Outcome.read(write_run(tmp_path / "run", 2.0, steps=4), None).progress == pytest.approx(0.2)
