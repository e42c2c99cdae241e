"""Rows, and a run if there is one, in; every method's answers to every query of PingBench, and how good they are, out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.rows import read_manifest
from ping_llm.data.synthetic.truth import Truth
from ping_llm.eval.baselines import TreeSettings, all_baselines
from ping_llm.eval.baselines.base import Baseline
from ping_llm.eval.baselines.destinations import DestinationBayes
from ping_llm.eval.columns import Measurements, Queries
from ping_llm.eval.diagnose import model_extras
from ping_llm.eval.leak import LeakCheck, check_leak
from ping_llm.eval.metrics import score
from ping_llm.eval.model import ModelMethod, TrueDistribution
from ping_llm.eval.options import EvalOptions
from ping_llm.eval.plots import plot_results
from ping_llm.eval.queries import EXTERNAL, SPLITS, SplitQueries, draw_splits, draw_val
from ping_llm.eval.report import write_report
from ping_llm.eval.results import CellScores, headline, make_bootstrap, score_writer, summarize_cell
from ping_llm.model.checkpoint import load_config, load_model
from ping_llm.system.files import write_atomically
from ping_llm.system.progress import show_progress

RESULTS_NAME, TABLE_NAME = "results.json", "queries.parquet"
QUICK_TREES = TreeSettings(trees=100, leaves=31, rate=0.1, least_leaf=50, practice_queries=10_000)
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Bench:
    """What is learned from, what settings are chosen on, and what is queried."""

    train: Measurements
    val: Queries
    splits: list[SplitQueries]
    empty: tuple[str, ...] = ()  # splits without a measurement

    @classmethod
    def load(cls, data: Path, train_rows: Path, queries: int, seed: int) -> Bench:
        """The test parts of `data`, or, where `train_rows` is another folder, all of it as one split; see `draw_splits`."""
        counts = read_manifest(data)["parts"]
        if data.resolve() == train_rows.resolve():
            splits = tuple(split for split in SPLITS if counts.get(split))
            if not splits:
                raise ValueError(
                    f"{data} holds no test part; prepare it with --split pingbench, or name with --train-rows the rows that "
                    "the baselines learn from: then all of it is queried"
                )
            table = Measurements.from_rows(data, ("train", "val", *splits))
            empty = tuple(split for split in SPLITS if split not in splits)
        else:
            splits, empty = (EXTERNAL,), ()
            known = Measurements.from_rows(train_rows, ("train", "val"))
            other = Measurements.from_rows(data, [part for part, count in counts.items() if count])
            other = replace(other, part=np.zeros(len(other), dtype=np.int8), parts=splits)
            table = Measurements.concatenate([known, other])
        drawn = draw_splits(table, splits, queries, seed)
        return cls(table.of_part("train"), draw_val(table, queries, seed), drawn, empty)


def fit_baselines(train: Measurements, val: Queries, trees: TreeSettings | None) -> list[Baseline]:
    """All baselines, learned from train, their settings chosen on val; ModuleNotFoundError without LightGBM."""
    import lightgbm  # noqa: F401  what is missing is said before anything is done

    baselines = all_baselines(trees)
    with show_progress("fit the baselines", len(baselines), "baselines") as advance:
        for baseline in baselines:
            baseline.fit(train, val)
            advance(1)
    return baselines


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """Answers all queries, writes results.json, report.md, pictures and, query by query, queries.parquet; the results.

    ValueError: nothing to query, the run may have learned the answers, or a file is missing or damaged.
    """
    options.check()
    models, leak, train_rows = _open_run(options)
    bench = Bench.load(options.rows, train_rows, options.queries_per_split, options.seed)
    baselines = fit_baselines(bench.train, bench.val, QUICK_TREES if options.quick else None)
    truth = [TrueDistribution(Truth.load(options.truth))] if options.truth else []
    kinds = {one.name: "baseline" for one in baselines} | {one.name: "truth" for one in truth}
    kinds |= {one.name: "model" for one in models}
    choices = {one.name: one.choices for one in baselines}
    options.folder.mkdir(parents=True, exist_ok=True)
    cells = _answer_all(options, bench.splits, [*baselines, *truth], models, kinds)
    results = {
        "format_version": FORMAT_VERSION,
        "data": str(options.rows),
        "run": str(options.run) if models else None,
        "train_rows": str(train_rows),
        "quick": options.quick,
        "seed": options.seed,
        "leak": leak.problem,
        "model_queries_per_cell": options.model_queries_per_cell if models else 0,
        "splits": {one.split: one.describe() for one in bench.splits} | dict.fromkeys(bench.empty),
        "methods": {name: {"kind": kind, "choices": choices.get(name, {})} for name, kind in kinds.items()},
        "cells": [cell.to_json() for cell in cells],
        "headline": headline(cells, kinds),
    }
    if models:
        bayes = DestinationBayes(bench.train, bench.val)
        results |= model_extras(models[0].model, options, bayes, bench.splits, baselines[-1])
    results = _plain(results)
    write_atomically(options.folder / RESULTS_NAME, json.dumps(results, indent=1) + "\n")
    write_report(results, options.folder, plot_results(results, options.folder))
    return results


def _open_run(options: EvalOptions) -> tuple[list[ModelMethod], LeakCheck, Path]:
    """The model under each of `src_known`, whether it may know the answers, and the rows that baselines learn from."""
    if options.baselines_only:
        return [], LeakCheck(same_rows=True), options.train_rows or options.rows
    _, config, state = load_model(options.trained)
    run = options.trained if load_config(options.trained) else options.trained.parent.parent  # one checkpoint was named
    leak = check_leak(run, config.data.rows, state["rows_sha256"], options.rows)
    leak.refuse(options.allow_leak)
    models = ModelMethod.load(options)
    train_rows = options.train_rows or (options.rows if leak.same_rows else config.data.rows)
    if leak.same_rows and train_rows.resolve() != options.rows.resolve():
        # Of another folder all parts are queried, also those that the run has learned from.
        problem = f"{run} has learned from {options.rows}, of which --train-rows makes everything a question"
        leak = LeakCheck(False, problem)
        leak.refuse(options.allow_leak)
    if not (train_rows / "manifest.json").is_file():
        raise ValueError(f"the rows {train_rows}, that {run} learned from, are gone; name them with --train-rows")
    return models, leak, train_rows


def _answer_all(
    options: EvalOptions,
    splits: Sequence[SplitQueries],
    predictors: Sequence[Baseline | TrueDistribution],
    models: Sequence[ModelMethod],
    kinds: dict[str, str],
) -> list[CellScores]:
    """The scores of every cell; those of each query are on the disk. Models answer the first queries of a cell."""
    bootstrap, done = make_bootstrap(splits, options.seed), []
    cells = [cell for split in splits for cell in split.cells()]
    first = slice(options.model_queries_per_cell)
    total = sum(len(predictors) * len(c.queries) + len(models) * len(c.queries.take(first)) for c in cells)
    with score_writer(options.folder / TABLE_NAME) as write, show_progress("answer", total, "queries") as advance:
        for number, cell in enumerate(cells):
            rng, view = np.random.default_rng([options.seed, number, 0xE7A1]), cell.queries.view()
            scores = {}
            for predictor in predictors:
                prediction = predictor.predict(view)
                scores[predictor.name] = score(prediction.distributions, prediction.p_fail, cell.queries.rtt_ms)
                advance(len(view))
            for model in models:
                scores[model.name] = model.scores(cell.queries.take(first), rng, advance)
            write(cell, scores)
            done.append(summarize_cell(cell, scores, kinds, bootstrap))
    return done


def _plain(value: Any) -> Any:
    """The value as JSON can say it: NaN and infinities are null."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
