"""Rows, and a run if there is one, in; every method's answers to every query of PingBench, and how good they are, out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.rows import FORMAT_VERSION as ROWS_VERSION
from ping_llm.data.rows import MANIFEST_NAME, manifest_sha256, read_manifest
from ping_llm.data.synthetic.truth import Truth
from ping_llm.eval.baselines import TreeSettings, all_baselines
from ping_llm.eval.baselines.base import Baseline
from ping_llm.eval.baselines.destinations import DestinationBayes
from ping_llm.eval.borrowed import RESULTS_NAME, TABLE_NAME, BorrowedScores, all_methods
from ping_llm.eval.columns import Measurements, Queries
from ping_llm.eval.diagnose import model_extras
from ping_llm.eval.metrics import Scores, score
from ping_llm.eval.model import ModelMethods, TrueDistribution, fitted
from ping_llm.eval.options import EvalOptions
from ping_llm.eval.plots import plot_results
from ping_llm.eval.queries import (
    EXTERNAL,
    SPLITS,
    SplitQueries,
    draw_splits,
    draw_val,
    learned_from,
    mixed_queries,
)
from ping_llm.eval.report import REPORT_NAME, write_report
from ping_llm.eval.results import CellScores, comparator_of, make_resamples, score_writer, summaries, summarize_cell
from ping_llm.model.checkpoint import load_config, load_model
from ping_llm.system.files import file_sha256, try_folder, write_atomically
from ping_llm.system.progress import show_progress
from ping_llm.training.base import ROWS_MANIFEST_NAME, inputs_of, learned_beside

QUICK_TREES = TreeSettings(trees=100, leaves=31, rate=0.1, least_leaf=50, practice_queries=10_000)
FORMAT_VERSION = 2


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """Answers all queries, writes results.json, report.md, pictures and, query by query, queries.parquet; the results.

    ValueError: nothing to query, the run may have learned the answers, or a file is missing or damaged.
    ModuleNotFoundError without LightGBM.
    """
    options.check()
    if options.run is None or options.run.is_dir():  # else there is nothing to do
        try_folder(options.folder, RESULTS_NAME, REPORT_NAME, TABLE_NAME)
    borrowed = [BorrowedScores.load(folder) for folder in options.scores]
    held = all_methods(borrowed)
    fits = not options.model_only and not any(one["kind"] == "baseline" for one in held.values())
    if fits:
        import lightgbm  # noqa: F401  what is missing is said before anything is done
    models, leak, train_rows = _open_run(options)
    train, splits = _load_queries(options, train_rows)
    val = mixed_queries([split for split in splits if split.is_val])
    baselines = _fit_baselines(train, val, options.quick) if fits else []
    truth = [TrueDistribution(Truth.load(options.truth))] if options.truth else []
    methods = {one.name: {"kind": "baseline", "choices": one.choices} for one in baselines} | held
    methods |= {one.name: {"kind": "truth", "choices": {}} for one in truth}
    methods |= {name: {"kind": "model", "choices": {}} for name in (models.names if models else ())}
    described: dict[str, dict[str, dict[str, Any]]] = {}
    for one in splits:
        band, _, number = one.split.rpartition("-")
        described.setdefault(band or EXTERNAL, {}).setdefault(one.family, {})[number] = one.describe()
    kinds = {name: one["kind"] for name, one in methods.items()}
    cells = _answer_all(options, splits, [*baselines, *truth], models, borrowed, kinds)

    def first(own: Any, name: str) -> Any:
        """What is known here, else of the first folder of scores that knows it."""
        return own or next((folder.results[name] for folder in borrowed if folder.results[name]), own)

    results = {
        "format_version": FORMAT_VERSION,
        "data": str(options.rows),
        "run": first(str(options.run) if models else None, "run"),
        "train_rows": str(train_rows),
        "quick": first(options.quick, "quick"),
        "seed": options.seed,
        "leak": first(leak, "leak"),
        "model_queries_per_cell": first(options.model_queries_per_cell if models else 0, "model_queries_per_cell"),
        "splits": described,
        "methods": methods,
        "failures": first(baselines[-1].task.failure.choices if baselines else {}, "failures"),
        "cells": [cell.to_json() for cell in cells],
        **summaries(cells),
    }
    for folder in borrowed:
        results |= folder.extras(options.val_only)
    if models:
        tested = [split for split in splits if split.is_val == options.val_only]
        bayes, beside = DestinationBayes(train, val), baselines[-1] if baselines else None
        results |= model_extras(models.model, options, bayes, tested, beside)
    text = json.dumps(results, default=lambda value: value.tolist())
    results = json.loads(text, parse_constant=lambda _: None)  # NaN and infinities are null
    write_atomically(options.folder / RESULTS_NAME, json.dumps(results, indent=1) + "\n")
    write_report(results, options.folder, plot_results(results, options.folder))
    return results


def _fit_baselines(train: Measurements, val: Queries, quick: bool) -> list[Baseline]:
    baselines = all_baselines(QUICK_TREES if quick else None)
    with show_progress("fit the baselines", len(baselines), "baselines") as advance:
        for baseline in baselines:
            baseline.fit(train, val)
            advance(1)
    return baselines


def _open_run(options: EvalOptions) -> tuple[ModelMethods | None, str, Path]:
    """The model under each of `src_known`, why it may know the answers, and the rows that baselines learn from."""
    if options.run is None or options.baselines_only:
        return None, "", options.train_rows or options.rows
    _, config, state = load_model(options.trained)
    run = options.trained if load_config(options.trained) else options.trained.parent.parent  # one checkpoint was named
    problem = leak_problem(run, config.data.rows, state["rows_sha256"], options.rows)
    same_rows = manifest_sha256(options.rows) == state["rows_sha256"]
    train_rows = options.train_rows or (options.rows if same_rows else config.data.rows)
    if same_rows and train_rows.resolve() != options.rows.resolve():
        # Of another folder all parts are queried, also those that the run has learned from.
        problem = f"{run} has learned from {options.rows}, all of which --train-rows makes queries"
    if problem and not options.allow_leak:
        raise ValueError(f"{problem}; give rows of other measurements, or --allow-leak to see the numbers anyway")
    if not (train_rows / MANIFEST_NAME).is_file():
        raise ValueError(f"the rows {train_rows}, that {run} learned from, are gone; name them with --train-rows")
    return ModelMethods.load(options, None if options.no_memory else train_rows), problem, train_rows


def leak_problem(run: Path, trained_rows: Path, rows_sha256: str, data: Path) -> str:
    """What speaks against querying `data`; empty if nothing does.

    `trained_rows` and `rows_sha256` are where the run's rows were, and the hash of their manifest. Rows with that manifest
    have test parts that were kept from the run. Any others must share no input file with it, nor with what it began with.
    """
    if manifest_sha256(data) == rows_sha256:
        return ""
    manifests = (path for path in (run / ROWS_MANIFEST_NAME, trained_rows / MANIFEST_NAME) if path.is_file())
    trained = next((path for path in manifests if file_sha256(path) == rows_sha256), None)
    if trained is None:
        return f"what {run} learned from is not known: {trained_rows} is gone or was prepared again"
    seen = inputs_of(json.loads(trained.read_text())) | learned_beside(run)
    shared = [one["name"] for one in read_manifest(data).get("inputs", ()) if one.get("sha256") in seen]
    more = f" and {len(shared) - 1} more files" if len(shared) > 1 else ""
    return f"{run} may have learned from {data}: both were made of {shared[0]}{more}" if shared else ""


def _load_queries(options: EvalOptions, train_rows: Path) -> tuple[Measurements, list[SplitQueries]]:
    """What baselines learn from, and the queries of val, then those of the test parts, or of all of the data as one split
    where `train_rows` is another folder."""
    data, count, seed = options.rows, options.queries_per_split, options.seed
    for rows in {data, train_rows}:
        if read_manifest(rows)["format_version"] < ROWS_VERSION:
            older = "are rows of an older format, whose train part shows endpoints of the test parts"
            raise ValueError(f"{rows} {older}; prepare them again")
    if options.val_only:
        if data.resolve() != train_rows.resolve():
            raise ValueError("--val-only is about the rows that the run learned from; leave out --data")
        table = Measurements.from_rows(train_rows, ("train", "val"))
        return learned_from(table), draw_val(table, count, seed)
    held = [part for part, measurements in read_manifest(data)["parts"].items() if measurements]
    if data.resolve() == train_rows.resolve():
        splits = [split for split in SPLITS if split in held]
        if not splits:
            raise ValueError(
                f"{data} holds no test part; prepare it with --split pingbench, or name with --train-rows the rows that "
                "the baselines learn from: then all of it is queried"
            )
        table = Measurements.from_rows(data, ("train", "val", *splits))
    else:
        splits = [EXTERNAL]
        other = Measurements.from_rows(data, held)
        other = replace(other, part=np.zeros_like(other.part), parts=(EXTERNAL,))
        table = Measurements.concatenate([Measurements.from_rows(train_rows, ("train", "val")), other])
    return learned_from(table), [*draw_val(table, count, seed), *draw_splits(table, splits, count, seed)]


def _answer_all(
    options: EvalOptions,
    splits: Sequence[SplitQueries],
    predictors: Sequence[Baseline | TrueDistribution],
    models: ModelMethods | None,
    borrowed: Sequence[BorrowedScores],
    kinds: Mapping[str, str],
) -> list[CellScores]:
    """The scores of every cell, those of val first; those of each query are on the disk.

    Models answer the first queries of a cell. All methods are given what of a context fits in a prompt of the model.
    """
    seq_len = options.seq_len or (models.model.seq_len if models else 0)
    resamples, done = make_resamples(splits, options.seed), list[CellScores]()
    cells = [cell for split in splits if len(split) for cell in split.cells() if cell.k in options.counts]
    if seq_len:
        cells = [replace(cell, queries=fitted(cell.queries, seq_len)) for cell in cells]
    for folder in borrowed:
        for cell in cells:
            folder.check(cell)
    first = slice(options.model_queries_per_cell)
    answered = len(predictors), int(models is not None)
    total = sum(np.dot(answered, (len(c.queries), len(c.queries.take(first)))) for c in cells)
    with score_writer(options.folder / TABLE_NAME) as write, show_progress("answer", total, "queries") as advance:
        for number, cell in enumerate(cells):
            queries, view, scores = cell.queries, cell.queries.view(), dict[str, Scores]()
            for folder in borrowed:
                scores |= folder.scores(cell)
            rng = np.random.default_rng([options.seed, number, 0xE7A1])
            for predictor in predictors:
                prediction = predictor.predict(view)
                scores[predictor.name] = score(prediction.distributions, prediction.p_fail, queries.rtt_ms)
                advance(len(view))
            if models:
                scores |= models.scores(queries.take(first), rng, advance)
            write(cell, scores)
            context_fitted = float((queries.context >= 0).sum(axis=1).mean())
            comparator = comparator_of(cell, done, kinds)
            done.append(summarize_cell(cell, scores, kinds, resamples, comparator, context_fitted))
    return done
