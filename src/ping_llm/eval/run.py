"""Rows, and a run if there is one, in; every method's answers to every query of PingBench, and how good they are, out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.data.rows import read_manifest
from ping_llm.eval.baselines import TreeSettings, all_baselines
from ping_llm.eval.columns import Measurements, Queries
from ping_llm.eval.leak import LeakCheck
from ping_llm.eval.metrics import Scores, score
from ping_llm.eval.plots import plot_results
from ping_llm.eval.queries import EXTERNAL, QUERIES_PER_SPLIT, SPLITS, Cell, SplitQueries, draw_splits, draw_val
from ping_llm.eval.report import write_report
from ping_llm.eval.results import CellScores, ScoreWriter, headline, make_bootstrap, summarize_cell
from ping_llm.system.files import write_atomically
from ping_llm.system.progress import show_progress

if TYPE_CHECKING:
    from ping_llm.eval.model import ModelMethod

RESULTS_NAME = "results.json"
QUICK_QUERIES, QUICK_MODEL_QUERIES = 2_000, 75
QUICK_TREES = TreeSettings(trees=100, leaves=31, rate=0.1, least_leaf=50, practice_queries=10_000)
FORMAT_VERSION = 1
LEAST_MASS = 1e-5  # of a value of byte 1 that is looked into: scores do not feel the rest, and the model answers faster


@dataclass(frozen=True)
class EvalOptions:
    """What is asked, of whom, and where the answers go; 0 queries = as many as `quick` says."""

    data: Path
    out: Path
    run: Path | None = None
    quick: bool = False
    queries: int = 0
    model_queries: int = 0
    seed: int = 0
    src_known: tuple[str, ...] = ("auto", "all", "none")
    allow_leak: bool = False
    train_rows: Path | None = None
    truth: Path | None = None
    device: str = "auto"
    precision: str = "fp32"
    trees: TreeSettings | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "model_queries", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")

    @property
    def asked(self) -> int:
        """Queries of a split at most."""
        return self.queries or (QUICK_QUERIES if self.quick else QUERIES_PER_SPLIT)

    @property
    def model_asked(self) -> int:
        """Queries of a cell that the model answers at most."""
        return min(self.asked, self.model_queries or (QUICK_MODEL_QUERIES if self.quick else self.asked))


@dataclass(frozen=True, eq=False)
class Bench:
    """What is learned from, what settings are chosen on, and what is asked."""

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
                    "the baselines learn from: then all of it is asked"
                )
            table = Measurements.from_rows(data, ("train", "val", *splits))
        else:
            splits = (EXTERNAL,)
            known = Measurements.from_rows(train_rows, ("train", "val"))
            asked = Measurements.from_rows(data, [part for part, count in counts.items() if count])
            asked = replace(asked, part=np.zeros(len(asked), dtype=np.int8), parts=splits)
            table = Measurements.concatenate([known, asked])
        val = draw_val(table, queries, seed)
        drawn = draw_splits(table, splits, queries, seed)
        empty = () if EXTERNAL in splits else tuple(split for split in SPLITS if split not in splits)
        return cls(table.of_part("train"), val, drawn, empty)


@dataclass
class Methods:
    """Who answers: predictors of the same view, and the model."""

    predictors: list = field(default_factory=list)  # fitted baselines, the true law
    models: list[ModelMethod] = field(default_factory=list)

    def kinds(self) -> dict[str, str]:
        """baseline, truth or model, by name."""
        from ping_llm.eval.model import TRUE_LAW

        kinds = {one.name: "truth" if one.name == TRUE_LAW else "baseline" for one in self.predictors}
        return kinds | {one.name: "model" for one in self.models}

    def answer(
        self, cell: Cell, model_asked: int, rng: np.random.Generator, advance: Callable[[float], None]
    ) -> dict[str, Scores]:
        """The scores of every method; the model answers the first `model_asked` of the queries."""
        scores, view, rtt_ms = {}, cell.queries.view(), cell.queries.rtt_ms
        for predictor in self.predictors:
            prediction = predictor.predict(view)
            scores[predictor.name] = score(prediction.laws, prediction.p_fail, rtt_ms)
            advance(len(view))
        for method in self.models:
            scores[method.name] = method.scores(cell.queries.take(slice(0, model_asked)), rng, advance)
        return scores


def fit_baselines(train: Measurements, val: Queries, trees: TreeSettings | None) -> list:
    """All baselines, learned from train, their settings chosen on val; ModuleNotFoundError without LightGBM."""
    import lightgbm  # noqa: F401  what is missing is said before anything is done

    baselines = all_baselines(trees)
    members = getattr(baselines[-1], "members", [])
    with show_progress("fit the baselines", len(baselines), "baselines") as advance:
        for baseline in baselines:
            if not any(baseline is member for member in members):  # the stack fits its members
                baseline.fit(train, val)
            advance(1)
    return baselines


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """Answers all queries, writes results.json, report.md, pictures and, query by query, Parquet files; the results.

    ValueError: nothing to ask, the run may have learned what it would be asked, or a file is missing or damaged.
    """
    models, leak, train_rows = _open_run(options)
    bench = Bench.load(options.data, train_rows, options.asked, options.seed)
    trees = options.trees or (QUICK_TREES if options.quick else None)
    methods = Methods(fit_baselines(bench.train, bench.val, trees) + _truth(options), models)
    options.out.mkdir(parents=True, exist_ok=True)
    cells = _answer_all(options, bench, methods)
    results = {
        "format_version": FORMAT_VERSION,
        "data": str(options.data),
        "run": str(options.run) if options.run else None,
        "train_rows": str(train_rows),
        "quick": options.quick,
        "seed": options.seed,
        "leak": leak.problem,
        "model_queries_per_cell": options.model_asked if models else 0,
        "splits": {one.split: one.describe() for one in bench.splits} | dict.fromkeys(bench.empty),
        "methods": {
            name: {"kind": kind, "choices": next((m.choices for m in methods.predictors if m.name == name), {})}
            for name, kind in methods.kinds().items()
        },
        "cells": [cell.to_json() for cell in cells],
        "headline": headline(cells, methods.kinds()),
    }
    if models:
        from ping_llm.eval.extras import model_extras

        results |= model_extras(options, methods, bench)
    results = _plain(results)
    write_atomically(options.out / RESULTS_NAME, json.dumps(results, indent=1) + "\n")
    write_report(results, options.out, plot_results(results, options.out))
    return results


def resolve_folders(run: Path | None, data: Path | None, out: Path | None, baselines_only: bool) -> tuple[Path, Path]:
    """The rows to ask and the folder for results, where the command line may leave them out; ValueError if it may not."""
    if run is None and not baselines_only:
        raise ValueError("name the run folder of a trained model, or give --baselines-only")
    if data is None and run is not None:
        from ping_llm.model.checkpoint import load_model

        data = load_model(run)[1].data.rows
    if data is None or (out is None and run is None):
        raise ValueError("without a run, give --data ROWS and --out DIR")
    return Path(data), out or run / "eval"


def _open_run(options: EvalOptions) -> tuple[list[ModelMethod], LeakCheck, Path]:
    """The model under each of `src_known`, whether it may know the answers, and the rows that baselines learn from."""
    if options.run is None:
        return [], LeakCheck(same_rows=True), options.train_rows or options.data
    from ping_llm.eval.leak import check_leak
    from ping_llm.eval.model import ModelMethod
    from ping_llm.inference.model import PingModel
    from ping_llm.model.checkpoint import load_config, load_model

    _, config, state = load_model(options.run)
    run = options.run if load_config(options.run) else options.run.parent.parent  # one checkpoint was named
    leak = check_leak(run, config.data.rows, state["rows_sha256"], options.data)
    leak.refuse(options.allow_leak)
    model = replace(PingModel.load(options.run, options.device, options.precision), least_mass=LEAST_MASS)
    train_rows = options.train_rows or (options.data if leak.same_rows else config.data.rows)
    if leak.same_rows and train_rows.resolve() != options.data.resolve():
        # Of another folder all parts are asked, also those that the run has learned from.
        leak = LeakCheck(
            False, f"{run} has learned from {options.data}, of which --train-rows makes everything a question"
        )
        leak.refuse(options.allow_leak)
    if not (train_rows / "manifest.json").is_file():
        raise ValueError(f"the rows {train_rows}, that {run} learned from, are gone; name them with --train-rows")
    return [ModelMethod(model, known) for known in options.src_known], leak, train_rows


def _truth(options: EvalOptions) -> list:
    if options.truth is None:
        return []
    from ping_llm.data.synthetic.truth import Truth
    from ping_llm.eval.model import TrueLaw

    return [TrueLaw(Truth.load(options.truth))]


def _answer_all(options: EvalOptions, bench: Bench, methods: Methods) -> list[CellScores]:
    """The scores of every cell; those of each query are on the disk."""
    bootstrap = make_bootstrap(bench.splits, options.seed)
    cells = [cell for split in bench.splits for cell in split.cells()]
    per_query = [len(methods.predictors) * len(c.queries) for c in cells]
    asked = [min(options.model_asked, len(c.queries)) for c in cells]
    total = sum(per_query) + len(methods.models) * sum(asked)
    folder, done = options.out / "queries", []
    folder.mkdir(parents=True, exist_ok=True)
    with show_progress("answer", total, "queries") as advance:
        for number, cell in enumerate(cells):
            rng = np.random.default_rng([options.seed, number, 0xE7A1])
            scores = methods.answer(cell, options.model_asked, rng, advance)
            with ScoreWriter(folder / f"{cell.name}.parquet", cell) as writer:
                for name, of_method in scores.items():
                    writer.write(name, of_method)
            done.append(summarize_cell(cell, scores, methods.kinds(), bootstrap))
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
