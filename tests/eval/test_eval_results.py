"""Cells by hand: comparators, ratios and their intervals, the ten numbers, and the report of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ping_llm.eval.bootstrap import Clusters, Resamples, geometric_mean
from ping_llm.eval.columns import Measurements, Queries
from ping_llm.eval.distribution import SUPPORT, QuantileDistributions
from ping_llm.eval.metrics import Scores, error_quantiles, score, source_weights
from ping_llm.eval.plots import plot_results
from ping_llm.eval.queries import Cell
from ping_llm.eval.report import write_report
from ping_llm.eval.results import CellScores, comparator_of, summaries, summarize_cell


def point_distributions(medians: np.ndarray) -> QuantileDistributions:
    """All but a thousandth of each distribution lies evenly within ± 0.5 log-ms of its median."""
    knots = np.log(medians)[:, None] + np.array([-0.5, 0, 0.5])
    ends = np.ones((len(medians), 1))
    levels = np.array([0, 0.0005, 0.5, 0.9995, 1])
    return QuantileDistributions(np.concatenate([SUPPORT[0] * ends, knots, SUPPORT[1] * ends], axis=1), levels)


def make_cell(
    split: str, sources: int, prefixes: int = 40, draw: str = "none", k: int = 0, family: str = "ping"
) -> Cell:
    """20 answered queries of each source, to all prefixes in turn."""
    count = 20 * sources
    dst = np.arange(count) % prefixes
    addresses = np.zeros((prefixes, 16), np.uint8)
    addresses[:, 10:12], addresses[:, 12], addresses[:, 14] = 255, 30, np.arange(prefixes)
    table = Measurements(
        *(np.repeat(np.arange(sources), 20).astype(np.int32), dst.astype(np.int32), np.zeros(count, np.int64)),
        *(np.arange(count), np.full(count, 10.0, np.float32), np.zeros(count, np.uint8), np.zeros(count, np.int8)),
        *(addresses, (split,)),
    )
    return Cell(family, split, draw, k, Queries(table, np.arange(count), np.full((count, k), -1, dtype=np.int32)))


KINDS = {"steady": "baseline", "lucky": "baseline", "model": "model"}


def summarized(cell: Cell, lucky: float, model: float, comparator: str | None = None) -> CellScores:
    """A cell where the CRPS of "lucky" and of the model are so many times that of "steady"."""
    rtt_ms = cell.queries.rtt_ms
    steady = score(point_distributions(np.full(len(rtt_ms), 15.0)), np.full(len(rtt_ms), 0.1), rtt_ms)
    others = {name: replace(steady, crps_log=by * steady.crps_log) for name, by in (("lucky", lucky), ("model", model))}
    resamples = Resamples(np.arange(100), np.arange(100), draws=100)
    return summarize_cell(cell, {"steady": steady} | others, KINDS, resamples, comparator, 3.5)


def test_the_comparator_is_the_best_baseline_of_val_whatever_test_says():
    val = summarized(make_cell("val-s2", 30), lucky=2.0, model=0.8)
    assert (val.comparator, val.best_baseline) == ("steady", "steady")
    assert val.methods["model"]["crps_ratio"] == pytest.approx(0.8)
    cell = make_cell("test-s2", 30)
    comparator = comparator_of(cell, [val], KINDS)
    test = summarized(cell, lucky=0.5, model=0.8, comparator=comparator)
    assert (test.comparator, test.best_baseline, test.context_fitted) == ("steady", "lucky", 3.5)
    line = test.methods["model"]
    assert (line["crps_ratio"], line["ratio_best"]) == (pytest.approx(0.8), pytest.approx(1.6))
    np.testing.assert_allclose(line["ratio_interval"], 0.8)  # all queries alike
    assert comparator_of(make_cell("val-s2", 30), [val], KINDS) is None


def test_the_comparator_is_chosen_on_all_queries_of_val_however_few_a_model_answered():
    """ "lucky" is ahead in the first 40 queries alone, which are all that the model answered."""
    cell = make_cell("val-s2", 30)
    rtt_ms = cell.queries.rtt_ms
    steady = score(point_distributions(np.full(len(rtt_ms), 15.0)), np.full(len(rtt_ms), 0.1), rtt_ms)
    by = np.where(np.arange(len(rtt_ms)) < 40, 0.5, 3.0)
    few = Scores(*(column[:40] for column in vars(steady).values()))
    scores = {"steady": steady, "lucky": replace(steady, crps_log=by * steady.crps_log), "model": few}
    val = summarize_cell(cell, scores, KINDS, Resamples(np.arange(100), np.arange(100), draws=100))
    assert (val.answered, val.best_baseline, val.comparator) == (40, "lucky", "steady")
    assert val.baseline_crps["lucky"] == pytest.approx(val.baseline_crps["steady"] * (2 * 0.5 + 28 * 3) / 30)
    assert comparator_of(make_cell("test-s2", 30), [val], KINDS) == "steady"


def test_a_comparator_is_looked_for_in_the_family_if_val_lacks_the_cell_then_anywhere():
    lucky = [summarized(make_cell(f"val-s{i}", 30), lucky=0.1, model=1) for i in (1, 2)]
    steady = summarized(make_cell("val-s3", 30), lucky=20, model=1)
    target = summarized(make_cell("val-s3", 30, family="target"), lucky=3, model=1)
    done = [*lucky, steady, target]
    assert comparator_of(make_cell("test-s3", 30), done, KINDS) == "steady"
    assert comparator_of(make_cell("external", 30), done, KINDS) == "lucky"  # (0.1 · 0.1 · 20)^⅓ < 1
    assert comparator_of(make_cell("test-s5", 30, family="target"), done, KINDS) == "steady"
    assert comparator_of(make_cell("test-s5", 30, draw="other", k=5), done, KINDS) is None
    assert comparator_of(make_cell("test-s5", 30, family="target"), lucky, KINDS) == "lucky"


def test_a_cell_of_val_with_few_sources_or_prefixes_chooses_no_comparator_by_itself():
    steady = [summarized(make_cell(f"val-s{i}", 30), lucky=20, model=1) for i in (1, 2)]
    for sources, prefixes, chosen in ((30, 30, "lucky"), (29, 40, "steady"), (40, 29, "steady")):
        few = summarized(make_cell("val-s5", sources, prefixes), lucky=0.1, model=1)
        assert few.baseline_hosts == (sources, prefixes) and few.comparator == "lucky"
        assert comparator_of(make_cell("test-s5", 30), [*steady, few], KINDS) == chosen  # (20 · 20 · 0.1)^⅓ > 1


def test_what_test_says_chooses_no_comparator():
    done = [summarized(make_cell("val-s2", 30), lucky=2, model=1)]
    done.append(summarized(make_cell("test-s2", 30), lucky=0.01, model=1, comparator="steady"))
    assert comparator_of(make_cell("test-s2", 30), done, KINDS) == "steady"
    assert comparator_of(make_cell("test-s4", 30), done, KINDS) == "steady"


@pytest.mark.parametrize(("sources", "prefixes", "has"), [(30, 30, True), (29, 40, False), (40, 29, False)])
def test_intervals_need_thirty_sources_and_prefixes(sources, prefixes, has):
    line = summarized(make_cell("test-s1", sources, prefixes), 2.0, 0.5, "steady").methods["model"]
    assert (line["ratio_interval"] is not None) == (line["crps_interval"] is not None) == has


def test_the_primary_result_is_ten_numbers_of_test_and_their_geometric_mean():
    cells = []
    for band in ("val", "test"):
        for number in range(1, 6):
            for draw, k in (("none", 0), ("recent", 10), ("other", 10), ("other", 30)):
                cell = make_cell(f"{band}-s{number}", 40 if number < 5 else 5, draw=draw, k=k)
                cells.append(summarized(cell, 2.0, 0.5 if k else 2.0, "steady"))
    cells.append(summarized(make_cell("test-s1", 40, draw="other", k=10, family="target"), 2.0, 0.25, "steady"))
    found = summaries(cells)
    primary = found["primary"]
    assert [(cell["split"], cell["draw"], cell["k"]) for cell in primary["cells"]] == [
        (f"test-s{number}", *rest) for number in range(1, 6) for rest in (("none", 0), ("other", 10))
    ]
    line = primary["methods"]["model"]
    np.testing.assert_allclose(line["ratio"], [2, 0.5] * 5)
    assert line["geometric_mean"] == pytest.approx(1) and line["geometric_mean_interval"] is None  # s5 has 5 sources
    assert [one is None for one in line["interval"]] == [False] * 8 + [True] * 2
    np.testing.assert_allclose(found["repeat"]["methods"]["model"]["ratio"], [0.5] * 5)
    assert found["repeat"]["cells"][0]["draw"] == "recent"
    assert found["target"]["methods"]["model"]["ratio"] == [pytest.approx(0.25)]
    assert found["target"]["methods"]["model"]["geometric_mean_interval"] is not None


def test_a_cell_without_an_answer_has_no_ratio_and_stands_in_no_summary():
    cell = make_cell("test-s4", 3)
    failed = replace(cell.queries.measurements, rtt_ms=np.full(60, -1, np.float32))
    found = summarized(replace(cell, queries=replace(cell.queries, measurements=failed)), 1.0, 1.0, "steady")
    assert found.answered == 0 and found.best_baseline is None
    assert found.methods["model"]["crps_ratio"] is None and np.isnan(found.methods["model"]["crps_log"])
    assert summaries([found])["primary"] == {"cells": [], "methods": {}}


def scores_of(cell: Cell) -> dict[str, Scores]:
    rtt_ms = cell.queries.rtt_ms
    one = score(point_distributions(np.full(len(rtt_ms), 15.0)), np.full(len(rtt_ms), 0.1), rtt_ms)
    return dict.fromkeys(KINDS, one)


@pytest.mark.parametrize(
    ("column", "message"), [("rtt_ms", "answers of model are not those"), ("crps_log", "model has no CRPS of some")]
)
def test_scores_of_other_queries_than_the_cells_are_noticed(column, message):
    cell = make_cell("test-s1", 30)
    scores, resamples = scores_of(cell), Resamples(np.arange(100), np.arange(100), draws=10)
    wrong = getattr(scores["model"], column).copy()
    wrong[7] = -1 if column == "rtt_ms" else np.nan
    with pytest.raises(AssertionError, match=message):
        summarize_cell(cell, scores | {"model": replace(scores["model"], **{column: wrong})}, KINDS, resamples)


def test_failed_queries_are_left_out_of_a_cells_sources_prefixes_and_crps():
    """Sources 0 … 9 have no answer, and prefix 0 has none: 20 sources and 39 prefixes are left."""
    cell = make_cell("test-s1", 30)
    table, queries = cell.queries.measurements, cell.queries
    failed = (table.src_id < 10) | (table.dst_id == 0)
    table = replace(table, rtt_ms=np.where(failed, -1, table.rtt_ms).astype(np.float32))
    cell = replace(cell, queries=replace(queries, measurements=table))
    found = summarize_cell(cell, scores_of(cell), KINDS, Resamples(np.arange(100), np.arange(100), draws=10))
    assert (found.sources, found.prefixes, found.answered) == (20, 39, int((~failed).sum()))
    line = found.methods["model"]
    assert (line["crps_ratio"], line["ratio_interval"]) == (1, None)
    assert line["crps_log"] == pytest.approx(np.nanmean(scores_of(cell)["model"].crps_log))


def test_intervals_of_a_cell_are_those_of_each_method_alone():
    cell, rng = make_cell("test-s1", 40), np.random.default_rng(0)
    queries, resamples = cell.queries, Resamples(np.arange(100), np.arange(100), draws=100)
    scores = {name: replace(one, crps_log=rng.lognormal(0, 1, 800)) for name, one in scores_of(cell).items()}
    found = summarize_cell(cell, scores, KINDS, resamples, "lucky")
    clusters = Clusters(queries.src_id, queries.prefix, resamples)
    for name, one in scores.items():
        line, ratio = found.methods[name], clusters.ratio(one.crps_log, scores["lucky"].crps_log)
        assert line["ratio_interval"] == pytest.approx(ratio.interval) and line["crps_ratio"] == ratio.value
        assert line["crps_interval"] == pytest.approx(clusters.mean(one.crps_log).interval)
    mean = summaries([found])["primary"]["methods"]["model"]["geometric_mean_interval"]
    draws = clusters.log_means(scores["model"].crps_log) - clusters.log_means(scores["lucky"].crps_log)
    ratio = clusters.ratio(scores["model"].crps_log, scores["lucky"].crps_log)
    assert mean == pytest.approx(geometric_mean([ratio], [draws], 40).interval)


def test_a_ratio_is_of_macro_means_by_hand():
    """Of two sources, to two prefixes: one has three answers and the other one."""
    cell = make_cell("test-s1", 2, prefixes=2)
    cell = replace(cell, queries=cell.queries.take(np.array([0, 1, 2, 20])))
    scores = {
        name: replace(one, crps_log=np.array(crps))
        for (name, one), crps in zip(
            scores_of(cell).items(), ([2, 2, 2, 1.0], [9, 9, 9, 0.1], [1, 2, 3, 10.0]), strict=True
        )
    }
    found = summarize_cell(cell, scores, KINDS, Resamples(np.arange(2), np.arange(2), draws=10), "lucky")
    assert found.best_baseline == "steady" and (found.sources, found.prefixes) == (2, 2)
    assert found.methods["model"]["crps_log"] == pytest.approx((2 + 10) / 2)
    assert found.methods["model"]["crps_ratio"] == pytest.approx(6 / 4.55)
    assert found.methods["model"]["ratio_best"] == pytest.approx(6 / 1.5)


def report_of(tmp_path: Path, cells: list[CellScores], kinds: dict[str, str]) -> str:
    """The report of some cells, of which no counts of measurements are known."""
    results = {
        **dict.fromkeys(("data", "train_rows"), "rows"),
        **dict.fromkeys(("run", "leak", "quick", "model_queries_per_cell", "seed"), 0),
        "splits": {},
        "cells": [cell.to_json() for cell in cells],
        "failures": {},
        "methods": {name: {"kind": kind, "choices": {}} for name, kind in kinds.items()},
        **summaries(cells),
    }
    results = json.loads(json.dumps(results, default=lambda value: value.tolist()), parse_constant=lambda _: None)
    write_report(results, tmp_path, plot_results(results, tmp_path))
    return (tmp_path / "report.md").read_text()


def test_a_report_names_the_primary_cells_that_hold_no_answer(tmp_path):
    cells = [summarized(make_cell(f"test-s{i}", 30 if i < 3 else 7), 2.0, 0.5, "steady") for i in (1, 2, 3)]
    report = report_of(tmp_path, cells, KINDS)
    sections = [line for line in report.splitlines() if line.startswith("## ")][:4]
    assert sections == ["## What is queried", "## Primary result", "## The repeat task", "## Targets of traceroutes"]
    primary = report.split("## Primary result")[1].split("\n## ")[0]
    assert "Not here, or without an answer: test-s4 k = 0, test-s5 k = 0, test-s1 other 10," in primary
    assert "of 3 cells of 10" in primary and "| test-s1 | k = 0 | steady |" in primary
    assert "0.500 (0.500–0.500) [0.500]" in primary and "0.500 (—) [0.500]" in primary  # 7 sources have no interval
    assert "No cell of it holds an answered query" in report.split("## Targets of traceroutes")[1].split("\n## ")[0]
    assert "No model was evaluated" not in report


def test_a_report_without_a_model_says_so_and_shows_the_baselines(tmp_path):
    kinds = {"steady": "baseline", "stack": "baseline"}
    cell = make_cell("test-s1", 30)
    scores, resamples = (
        dict.fromkeys(kinds, scores_of(cell)["model"]),
        Resamples(np.arange(99), np.arange(99), draws=10),
    )
    scores["stack"] = replace(scores["stack"], p_fail=scores["stack"].p_fail / 2)
    report = report_of(tmp_path, [summarize_cell(cell, scores, kinds, resamples)], kinds)
    assert "No model was evaluated" in report and "| steady |" in report
    failures = report.split("## Failures")[1].split("\n## ")[0]
    assert "| k = 0 | steady |" in failures and "| k = 0 | stack |" in failures  # they say something else of failures
    same = report_of(tmp_path, [summarize_cell(cell, scores | {"stack": scores["steady"]}, kinds, resamples)], kinds)
    assert "| k = 0 | steady and 1 more |" in same.split("## Failures")[1]


def test_errors_are_ranked_with_each_source_weighing_the_same():
    """One source with one query of error 0.9, another with nine of error 0: half of the weight each."""
    rtt_ms = np.full(10, 10.0, dtype=np.float32)
    scores = score(point_distributions(np.r_[19.0, np.full(9, 10.0)]), np.zeros(10), rtt_ms)
    weights = source_weights(np.r_[0, np.ones(9)])
    quantiles = error_quantiles(scores.columns()["relative_error"], weights)
    np.testing.assert_allclose(quantiles[:25], 0, atol=1e-6)  # up to half
    np.testing.assert_allclose(quantiles[25:], 0.9, atol=1e-6)
