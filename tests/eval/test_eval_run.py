"""PingBench end to end on a synthetic Internet, and the arithmetic of its headline."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow.compute import field

from ping_llm import cli
from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data.ingest.prepare import prepare
from ping_llm.data.rows import manifest_sha256, read_manifest
from ping_llm.data.synthetic.synthesize import synthesize
from ping_llm.eval import diagnose
from ping_llm.eval import run as eval_run
from ping_llm.eval.baselines import TreeSettings
from ping_llm.eval.baselines.base import PointBaseline
from ping_llm.eval.baselines.history import ROLLING_MEDIAN, PairHistory
from ping_llm.eval.baselines.neighbours import PROFILE_KNN
from ping_llm.eval.baselines.simple import ADDITIVE, GLOBAL_MEDIAN, SOURCE_MEDIAN
from ping_llm.eval.baselines.stack import Stack
from ping_llm.eval.columns import Measurements, Queries
from ping_llm.eval.distribution import SUPPORT, QuantileDistributions
from ping_llm.eval.metrics import error_quantiles, score, source_weights
from ping_llm.eval.model import TRUE_DISTRIBUTION
from ping_llm.eval.options import EvalOptions
from ping_llm.eval.queries import Cell
from ping_llm.eval.results import SourceBootstrap, geometric_mean, headline, interval, summarize_cell
from ping_llm.eval.run import evaluate, leak_problem
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
    counted = [cell for cell in bench["cells"] if cell["counts"]]
    assert len(counted) >= 33
    for cell in counted:
        crps = {name: one["crps_log"] for name, one in cell["methods"].items()}
        assert crps[TRUE_DISTRIBUTION] < 1.1 * min(crps.values()), (cell["split"], cell["draw"], cell["k"])
        nll = {name: one["nll_nats"] for name, one in cell["methods"].items()}
        assert nll[TRUE_DISTRIBUTION] < min(nll.values()) + 0.1
    line = bench["headline"][TRUE_DISTRIBUTION]
    assert line["interval"][1] < 1 and line["geometric_mean"] < 0.8
    covered = [cell["methods"][TRUE_DISTRIBUTION]["coverage"]["90"] for cell in counted]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.03)


@pytest.mark.slow
def test_every_split_is_reported_and_every_answer_kept(world, bench):
    report = (world / "baselines" / "report.md").read_text()
    counts = read_manifest(world / "rows")["parts"]
    for split in ("test-s1", "test-s2", "test-s3", "test-s4", "test-s5"):
        assert f"\n## {split}\n" in report
        cells = [cell for cell in bench["cells"] if cell["split"] == split]
        assert len(cells) == (11 if counts[split] else 0)
        for cell in cells:
            of_cell = (field("split") == split) & (field("draw") == cell["draw"]) & (field("k") == cell["k"])
            table = pq.read_table(world / "baselines" / "queries.parquet", filters=of_cell)
            assert table.num_rows == bench["splits"][split]["queries"] * len(bench["methods"])
            assert set(table.column("method").to_pylist()) == set(bench["methods"])
    assert {"split", "draw", "k", "query", "src_addr", "dst_addr", "event_time", "rtt", "p_fail", "nll_nats"} | {
        *("crps_log", "pit", "q0.5")
    } <= set(table.column_names)
    assert "Fewer than the 300 wanted" in report  # the new sources are few
    pictures = {path.name for path in (world / "baselines").glob("*.png")}
    assert pictures == {"ratio_by_cell.png", "error_cdf.png", "error_by_k.png", "calibration.png"} | (
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
    assert list(results["splits"]) == ["external"] and results["splits"]["external"]["queries"] == 20
    report = (tmp_path / "out" / "report.md").read_text()
    assert "color:red" in report and "LEAK" in report and "\n## external\n" in report
    assert (tmp_path / "out" / "calibration_far.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name the run folder of a trained model, or give --baselines-only"),
        (["--baselines-only"], "without a run, give --data ROWS and --out DIR"),
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


def test_without_lightgbm_what_to_install_is_said(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    argv = ["eval", "--baselines-only", "--data", str(world / "rows"), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 1
    assert "pip install 'ping-llm[baselines]'" in capsys.readouterr().err


def test_bootstrap_of_a_mean_has_the_spread_of_a_mean():
    """Of 400 standard normal sources the mean spreads by 1 / 20; in strata, by that within them."""
    rng = np.random.default_rng(0)
    sources, values = np.arange(400), rng.normal(0, 1, 400)
    plain = SourceBootstrap.draw(sources, np.zeros(400), np.random.default_rng(1), 4000).means(sources, values)
    assert plain.mean() == pytest.approx(values.mean(), abs=0.005)
    assert plain.std() == pytest.approx(values.std() / 20, rel=0.05)
    low, high = interval(plain)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    apart = np.where(sources < 200, 10.0, -10.0)
    stratified = SourceBootstrap.draw(sources, sources < 200, np.random.default_rng(1), 200).means(sources, apart)
    assert (stratified == 0).all()


def test_bootstrap_compares_within_the_same_sources_and_leaves_out_nan():
    sources = np.arange(50)
    bootstrap = SourceBootstrap.draw(sources, np.zeros(50), np.random.default_rng(0), 300)
    values = np.random.default_rng(1).lognormal(0, 2, 50)
    np.testing.assert_allclose(bootstrap.means(sources, 0.7 * values) / bootstrap.means(sources, values), 0.7)
    some = np.where(sources % 2 == 0, 3.0, np.nan)
    known = bootstrap.means(sources, some)
    assert set(np.round(known[np.isfinite(known)], 9)) == {3.0}
    assert bootstrap.means(sources[:3], values[:3]).shape == (300,)


def point_distributions(medians: np.ndarray) -> QuantileDistributions:
    """All but a thousandth of each distribution lies evenly within ± 0.5 log-ms of its median."""
    knots = np.log(medians)[:, None] + np.array([-0.5, 0, 0.5])
    ends = np.ones((len(medians), 1))
    levels = np.array([0, 0.0005, 0.5, 0.9995, 1])
    return QuantileDistributions(np.concatenate([SUPPORT[0] * ends, knots, SUPPORT[1] * ends], axis=1), levels)


def make_cell(split: str, sources: int, each: int = 20) -> Cell:
    count = sources * each
    columns = [np.zeros(count, dtype=np.int32)] * 2 + [np.repeat(np.arange(sources), each), np.arange(count)]
    table = Measurements(
        *columns, np.full(count, 10.0, np.float32), np.zeros(count, np.int8), np.zeros((1, 16), np.uint8), (split,)
    )
    return Cell(split, "none", 0, Queries(table, np.arange(count), np.zeros((count, 0), dtype=np.int32)))


def test_headline_by_hand():
    """One cell with half of the best baseline's CRPS, one with twice it, one with too few sources to count."""
    kinds = {"good": "baseline", "bad": "baseline", "model": "model"}
    cells = []
    for split, sources, factor in (("a", 30, 0.5), ("b", 30, 2.0), ("c", 2, 0.1)):
        cell = make_cell(split, sources)
        rtt_ms, p_fail = cell.queries.rtt_ms, np.full(len(cell.queries), 0.1)
        good = score(point_distributions(np.full(len(rtt_ms), 15.0)), p_fail, rtt_ms)
        bad = score(point_distributions(np.full(len(rtt_ms), 40.0)), p_fail, rtt_ms)
        scores = {"good": good, "bad": bad, "model": replace(good, crps_log=factor * good.crps_log)}
        bootstrap = SourceBootstrap.draw(np.arange(sources), np.zeros(sources), np.random.default_rng(0), 50)
        cells.append(summarize_cell(cell, scores, kinds, bootstrap))
        assert cells[-1].best_baseline == "good"
        assert cells[-1].methods["model"]["crps_ratio"] == pytest.approx(factor)
        np.testing.assert_allclose(cells[-1].methods["model"]["ratio_interval"], factor)
    line = headline(cells, kinds)
    assert set(line) == {"model"}
    assert line["model"]["geometric_mean"] == pytest.approx(1.0)  # √(0.5 · 2)
    assert line["model"]["by_draw"] == {cells[0].draw: pytest.approx(1.0)}
    assert line["model"]["win_rate"] == 0.5
    assert (line["model"]["cells"], line["model"]["cells_too_small"]) == (2, 1)
    assert geometric_mean([0.5, 0.5, 4]) == pytest.approx(1)


def test_errors_are_ranked_with_each_source_weighing_the_same():
    """One source with one query of error 0.9, another with nine of error 0: half of the weight each."""
    rtt_ms = np.full(10, 10.0, dtype=np.float32)
    scores = score(point_distributions(np.r_[19.0, np.full(9, 10.0)]), np.zeros(10), rtt_ms)
    weights = source_weights(np.r_[0, np.ones(9)])
    quantiles = error_quantiles(scores.columns()["relative_error"], weights)
    np.testing.assert_allclose(quantiles[:25], 0, atol=1e-6)  # up to half
    np.testing.assert_allclose(quantiles[25:], 0.9, atol=1e-6)
