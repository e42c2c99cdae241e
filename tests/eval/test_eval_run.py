"""PingBench end to end on a synthetic Internet, and the arithmetic of its summaries."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow.compute import field

from ping_llm import cli
from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.rows import RowReader, manifest_sha256, read_manifest
from ping_llm.data.synthetic.synthesize import synthesize
from ping_llm.eval import diagnose
from ping_llm.eval import run as eval_run
from ping_llm.eval.baselines import TreeSettings
from ping_llm.eval.baselines.base import PointBaseline
from ping_llm.eval.baselines.history import ROLLING_MEDIAN, PairHistory
from ping_llm.eval.baselines.neighbours import PROFILE_KNN
from ping_llm.eval.baselines.simple import ADDITIVE, GLOBAL_MEDIAN, SOURCE_MEDIAN
from ping_llm.eval.baselines.stack import Stack
from ping_llm.eval.model import TRUE_DISTRIBUTION, model_queries
from ping_llm.eval.options import EvalOptions
from ping_llm.eval.queries import SPLITS, VAL_SPLITS
from ping_llm.eval.run import evaluate, leak_problem
from ping_llm.inference.context import Context
from ping_llm.inference.evidence import recalled
from ping_llm.training.run_state import ROWS_MANIFEST_NAME


def few_baselines(trees: TreeSettings | None) -> list:
    """Those that are fitted at once, and a stack of two."""
    pair_history, profile_knn = PairHistory(), PointBaseline(PROFILE_KNN)
    methods = (GLOBAL_MEDIAN, SOURCE_MEDIAN, ADDITIVE, ROLLING_MEDIAN)
    simple = [PointBaseline(method) for method in methods]
    return [*simple, pair_history, profile_knn, Stack([pair_history, profile_knn])]


@pytest.fixture(scope="module", autouse=True)
def fast():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_run, "all_baselines", few_baselines)
        patch.setattr(diagnose, "QUICK_DESTINATIONS", 5)
        patch.setattr(diagnose, "QUICK_MEASUREMENTS", 20)
        patch.setattr(diagnose, "QUICK_WINDOWS", 4)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a synthetic dump and its rows."""
    folder = tmp_path_factory.mktemp("world")
    synthesize(folder / "dump", probes=80, targets=25, days=0.15, seed=2, workers=1)
    prepare([str(folder / "dump")], folder / "rows", workers=1)
    return folder


@pytest.fixture(scope="module")
def run(world) -> Path:
    """A run that hardly learned anything."""
    from ping_llm.training.trainer import train

    train(
        Config(
            model=ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=96),
            data=DataConfig(rows=world / "rows", workers=0),
            train=TrainConfig(
                run_dir=world / "run",
                total_steps=4,
                batch_size=4,
                eval_windows=4,
                eval_queries=0,
                compile=False,
                device="cpu",
                sample_every=0,
                checkpoint_every=4,
                eval_every=4,
            ),
        )
    )
    return world / "run"


@pytest.fixture(scope="module")
def bench(world) -> dict:
    """The baselines and the true distribution."""
    options = EvalOptions(
        data=world / "rows", out=world / "baselines", baselines_only=True, queries=300, truth=world / "dump"
    )
    return evaluate(options)


@pytest.mark.slow
def test_no_method_beats_the_distribution_that_made_the_pings(bench):
    """In each cell the true distribution may be behind by chance only; over all of them, by nothing."""
    assert "stack" in bench["methods"]
    counted = [cell for cell in bench["cells"] if cell["answered"] >= 50 and cell["sources"] >= 5]
    assert len(counted) >= 50
    for cell in counted:
        crps = {name: one["crps_log"] for name, one in cell["methods"].items()}
        assert crps[TRUE_DISTRIBUTION] < 1.1 * min(crps.values()), (cell["split"], cell["draw"], cell["k"])
        nll = {name: one["nll_nats"] for name, one in cell["methods"].items()}
        assert nll[TRUE_DISTRIBUTION] < min(nll.values()) + 0.1
    line = bench["primary"]["methods"][TRUE_DISTRIBUTION]
    assert line["geometric_mean"] < 0.8 and max(line["ratio"]) < 1.1
    covered = [cell["methods"][TRUE_DISTRIBUTION]["coverage"]["90"] for cell in counted]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.03)


@pytest.mark.slow
def test_every_split_is_reported_and_every_answer_kept(world, bench):
    report = (world / "baselines" / "report.md").read_text()
    counts = read_manifest(world / "rows")["parts"]
    for split in (*VAL_SPLITS, *SPLITS):
        assert (f"\n### {split}, pings\n" in report) == bool(counts[split])
        cells = [cell for cell in bench["cells"] if cell["split"] == split]
        assert len(cells) == (11 if counts[split] else 0) and {cell["family"] for cell in cells} <= {"ping"}
        band, number = split.split("-")
        for cell in cells:
            of_cell = (field("split") == split) & (field("draw") == cell["draw"]) & (field("k") == cell["k"])
            table = pq.read_table(world / "baselines" / "queries.parquet", filters=of_cell)
            assert table.num_rows == bench["splits"][band]["ping"][number]["queries"] * len(bench["methods"])
            assert set(table.column("method").to_pylist()) == set(bench["methods"])
    assert {
        "family",
        "split",
        "draw",
        "k",
        "query",
        "src_addr",
        "dst_addr",
        "event_time",
        "rtt",
        "p_fail",
        "nll_nats",
    } | {*("crps_log", "pit", "q0.5")} <= set(table.column_names)
    pictures = {path.name for path in (world / "baselines").glob("*.png")}
    assert pictures == {"primary.png", "ratio_by_cell.png", "error_cdf.png", "error_by_k.png", "calibration.png"} | (
        {"calibration_far.png"} if counts["test-s5"] else set()
    )
    assert json.loads((world / "baselines" / "results.json").read_text())["cells"] == bench["cells"]


@pytest.mark.slow
def test_a_model_is_scored_beside_the_baselines(world, run):
    options = EvalOptions(
        *(run, world / "rows"),
        out=world / "scored",
        quick=True,
        queries=40,
        model_queries=2,
        device="cpu",
    )
    results = evaluate(options)
    models = [name for name, one in results["methods"].items() if one["kind"] == "model"]
    assert models == ["ping-llm, source auto", "ping-llm, source all", "ping-llm, source none"]
    for cell in results["cells"]:
        assert cell["methods"][models[0]]["queries"] == cell["methods"]["stack"]["queries"] == 2
    of_cell = (field("split") == "test-s1") & (field("draw") == "other") & (field("k") == 5)
    table = pq.read_table(world / "scored" / "queries.parquet", filters=of_cell)
    methods = table.column("method").to_pylist()
    assert methods.count("stack") == 40 and methods.count(models[0]) == 2
    assert set(results["loss_per_field"]["test-s1"]) == {"structure", "src", "dst", "time", "rtt"}
    assert results["order_consistency"]["test-s1"]["std_nats"] >= 0
    assert results["destinations"]["test-s1"]["model"]["bits"] > 0
    report = (world / "scored" / "report.md").read_text()
    assert "LEAK" not in report and "bits per destination" in report and "std of log p" in report
    names = {path.stem for path in (world / "scored").glob("*.png")}
    assert {"loss_per_field", "densities", "ratio_by_cell"} <= names


@pytest.mark.parametrize("other_sources", [False, True])
def test_what_a_memory_adds_to_a_query_is_of_train_and_earlier(world, run, tmp_path, other_sources):
    """Of no part of PingBench does a query get a row that is held out, or one of its own second or later."""
    options = EvalOptions(run, world / "rows", queries=60, device="cpu")
    models, _, train_rows = eval_run._open_run(options)
    memory = replace(models.model.memory, other_sources=other_sources)
    train = measured(RowReader(world / "rows", "train"))
    held_out = measured(RowReader(world / "rows", "val")) | measured(RowReader(world / "rows", "test-s1"))
    assert len(memory) == len(train) and not train & held_out
    _, splits = eval_run._load_queries(options, train_rows)
    assert {split.split for split in splits} == {*VAL_SPLITS, *SPLITS}
    added = Counter()
    for split in splits:
        for queries in (split.recent.given(0), split.other.given(10)):
            asked = model_queries(queries)
            for query, filled in zip(asked, recalled(memory, asked, 512), strict=True):
                given, found = keys_of(query.context), keys_of(filled.context)
                assert found - given <= train
                assert all(time_s < query.time_s for *_, time_s in found)
                added[split.split] += len(found - given)
    assert added["val-s1"] and added["test-s1"] and added["test-s2"]
    assert bool(added["test-s3"]) is other_sources  # of a source that is held out train knows nothing
    assert eval_run._open_run(replace(options, no_memory=True))[0].model.memory is None
    synthesize(tmp_path / "dump", probes=6, targets=5, days=0.05, seed=9, workers=1)
    prepare([str(tmp_path / "dump")], tmp_path / "new", workers=1, split="none")
    other = eval_run._open_run(replace(options, data=tmp_path / "new"))[0].model.memory
    assert len(other) == len(train)  # queries of other rows are answered from what the run has learned from


def measured(rows: RowReader) -> set[tuple]:
    """The measurements of a part, as of `keys_of`."""
    found = set()
    for row in rows:
        ends = row.src_addresses[row.src], row.dst_addresses[row.dst]
        found |= keys_of(Context(*ends, row.rtt_ms.astype(np.float64), row.time_s))
    return found


def keys_of(context: Context) -> set[tuple]:
    """Source, destination, RTT and second of each measurement."""
    if not len(context):
        return set()
    ends = ([packed.tobytes() for packed in end] for end in (context.src, context.dst))
    return set(zip(*ends, context.rtt_ms.tolist(), context.time_s.tolist(), strict=True))


def parts_of(results: dict) -> set[str]:
    return {cell["split"] for cell in results["cells"]}


def with_cells(folder: Path, kept: Callable[[dict], bool]) -> Path:
    """A folder of the same name whose results hold some of the cells alone."""
    results = json.loads((folder / "results.json").read_text())
    copy = folder.parent / "few" / folder.name
    shutil.copytree(folder, copy)
    (copy / "results.json").write_text(json.dumps(results | {"cells": [c for c in results["cells"] if kept(c)]}))
    return copy


def with_rtt(folder: Path) -> Path:
    """A copy whose queries got other RTTs."""
    copy = folder.parent / "other" / folder.name
    shutil.copytree(folder, copy)
    table = pq.read_table(copy / "queries.parquet")
    place = table.schema.get_field_index("rtt")
    longer = pc.add(table["rtt"], pa.scalar(1, pa.float32()))
    pq.write_table(table.set_column(place, "rtt", longer), copy / "queries.parquet")
    return copy


@pytest.mark.slow
def test_scores_of_other_evaluations_stand_beside_each_other_as_if_made_together(world, run, tmp_path):
    """Baselines here, the model there, and both put together without either: the numbers of one evaluation of both."""
    options = EvalOptions(
        *(run, world / "rows"), quick=True, queries=30, model_queries=3, src_known=("all",), device="cpu", seq_len=96
    )

    def results_of(**changes) -> dict:
        return evaluate(replace(options, **changes))

    together = results_of(out=tmp_path / "together")
    results_of(run=None, baselines_only=True, out=tmp_path / "baselines")
    alone = results_of(model_only=True, out=tmp_path / "model")
    assert set(alone["methods"]) == {"ping-llm, source all"} and not alone["primary"]["cells"]
    assert "LEAK" not in (tmp_path / "model" / "report.md").read_text()
    folders = tmp_path / "baselines", tmp_path / "model"
    for found in (
        results_of(run=None, scores=folders, out=tmp_path / "put"),
        results_of(scores=folders[:1], out=tmp_path / "added"),
    ):
        assert set(found["methods"]) == set(together["methods"])
        assert found["loss_per_field"] == together["loss_per_field"] and found["splits"] == together["splits"]
        for one, other in zip(found["cells"], together["cells"], strict=True):
            assert (one["split"], one["comparator"]) == (other["split"], other["comparator"])
            for method, line in other["methods"].items():
                for name in ("crps_log", "nll_nats", "fail_brier", "median_rel_error", "crps_ratio"):
                    np.testing.assert_allclose(one["methods"][method][name] or 0, line[name] or 0, rtol=1e-4, atol=1e-6)
    val = results_of(scores=folders[:1], out=tmp_path / "val", val_only=True, counts=(0, 5))
    assert {cell["split"] for cell in val["cells"]} == {split for split in VAL_SPLITS if split in parts_of(together)}
    assert {(cell["draw"], cell["k"]) for cell in val["cells"]} == {("none", 0), ("recent", 5), ("other", 5)}
    held = {(cell["split"], cell["draw"], cell["k"]): cell for cell in together["cells"]}
    for cell in val["cells"]:
        same = held[cell["split"], cell["draw"], cell["k"]]
        assert cell["methods"]["ping-llm, source all"]["queries"] == 3 and cell["comparator"] == same["comparator"]
    assert val["primary"]["cells"] and all(cell["split"] in VAL_SPLITS for cell in val["primary"]["cells"])
    assert set(val["destinations"]) | set(val["loss_per_field"]) <= set(VAL_SPLITS)  # nothing of test is read
    with pytest.raises(ValueError, match=r"additive stands in several folders of --scores"):
        results_of(run=None, scores=(folders[0], tmp_path / "together"), out=tmp_path / "x")
    with pytest.raises(ValueError, match=r"baselines holds no val-s1 none 0; name parts and --counts"):
        results_of(run=None, scores=(with_cells(folders[0], lambda cell: cell["k"] > 0),), out=tmp_path / "x")
    with pytest.raises(ValueError, match="answered other queries than these"):
        results_of(run=None, scores=(with_rtt(folders[1]),), out=tmp_path / "x")
    with pytest.raises(ValueError, match=r"gave other contexts .* same --seq-len"):
        results_of(run=None, scores=folders, out=tmp_path / "x", seq_len=40)
    with pytest.raises(ValueError, match=r"gave other contexts|answered other queries"):
        results_of(run=None, scores=folders, out=tmp_path / "x", seed=1)
    (tmp_path / "model" / "queries.parquet").unlink()
    for folder in (tmp_path / "model", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="name a folder that ping-llm eval wrote"):
            results_of(run=None, scores=(folder,), out=tmp_path / "x")


def test_rows_that_the_run_may_have_seen_are_refused(world, run, tmp_path):
    other_rows = tmp_path / "again"
    prepare([str(world / "dump")], other_rows, workers=1, split="none")  # the same dump, other rows
    trained = (world / "rows", rows_sha256_of(run))
    assert manifest_sha256(world / "rows") == trained[1] and leak_problem(run, *trained, world / "rows") == ""
    assert "both were made of" in leak_problem(run, *trained, other_rows)
    with pytest.raises(ValueError, match=r"may have learned from .* --allow-leak"):
        evaluate(EvalOptions(run, other_rows, out=tmp_path / "out"))
    synthesize(tmp_path / "dump", probes=6, targets=5, days=0.05, seed=9, workers=1)
    prepare([str(tmp_path / "dump")], tmp_path / "new", workers=1, split="none")
    assert manifest_sha256(tmp_path / "new") != trained[1] and leak_problem(run, *trained, tmp_path / "new") == ""
    assert leak_problem(run, tmp_path / "gone", trained[1], tmp_path / "new") == ""  # the run kept the manifest
    kept = (run / ROWS_MANIFEST_NAME).read_text()
    try:
        (run / ROWS_MANIFEST_NAME).unlink()
        assert "is not known" in leak_problem(run, tmp_path / "gone", trained[1], tmp_path / "new")
    finally:
        (run / ROWS_MANIFEST_NAME).write_text(kept)


def rows_sha256_of(run: Path) -> str:
    from ping_llm.model.checkpoint import load_model

    return load_model(run)[2]["rows_sha256"]


@pytest.mark.slow
def test_other_rows_are_one_external_split_and_a_leak_is_reported_in_red(world, run, tmp_path):
    options = EvalOptions(
        *(run, world / "rows"),
        out=tmp_path / "out",
        quick=True,
        queries=20,
        model_queries=2,
        src_known=("all",),
    )
    prepare([str(world / "dump")], tmp_path / "again", workers=1, split="none")
    results = evaluate(replace(options, data=tmp_path / "again", allow_leak=True))
    assert list(results["splits"]) == ["val", "external"]
    assert results["splits"]["external"]["ping"]["external"]["queries"] == 20
    assert {cell["split"] for cell in results["primary"]["cells"]} == {"external"}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "color:red" in report and "LEAK" in report and "\n## external\n" in report
    assert (tmp_path / "out" / "calibration_far.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name the run folder of a trained model, or give --baselines-only"),
        (["--baselines-only"], "without a run, give --data ROWS and --out DIR"),
        (["{out}", "--baselines-only", "--model-only"], "leave nothing to score"),
        (["{out}", "--counts", "7"], "--counts must be some of 0, 1, 2, 5, 10, 30"),
        (["--baselines-only", "--data", "{rows}", "--out", "{out}", "--queries", "-1"], "queries=-1 must be 0 or more"),
        (["--baselines-only", "--data", "{out}", "--out", "{out}"], 'run "ping-llm prepare'),
        (["--baselines-only", "--data", "{plain}", "--out", "{out}"], "holds no test part"),
        (["{out}", "--data", "{rows}", "--out", "{out}"], "no checkpoint in"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(world, tmp_path, capsys, argv, message):
    places = {"rows": world / "rows", "out": tmp_path / "out", "plain": tmp_path / "plain"}
    if "{plain}" in argv:
        prepare([str(world / "dump")], places["plain"], workers=1, split="none")
        capsys.readouterr()
    assert cli.main(["eval", *(word.format(**places) for word in argv)]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and "\n" not in error


def test_rows_of_the_first_format_are_refused(world, tmp_path):
    shutil.copytree(world / "rows", tmp_path / "rows")
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    with pytest.raises(ValueError, match=r"older format, whose train part shows endpoints .*; prepare them again"):
        evaluate(EvalOptions(data=tmp_path / "rows", out=tmp_path / "out", baselines_only=True))


def test_without_lightgbm_what_to_install_is_said(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    argv = ["eval", "--baselines-only", "--data", str(world / "rows"), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 1
    assert "pip install 'ping-llm[baselines]'" in capsys.readouterr().err
