"""Run folders in; what each run reached, and which of them are of one config, out."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.config import FIELDS, Config, differing_fields
from ping_llm.eval.borrowed import RESULTS_NAME
from ping_llm.eval.queries import FAMILIES, VAL_SPLITS
from ping_llm.eval.report import subject
from ping_llm.eval.results import PRIMARY_CONTEXTS
from ping_llm.model.checkpoint import CONFIG_NAME, load_config
from ping_llm.model.counts import mean_flops_per_token, parameter_count
from ping_llm.system.files import file_sha256
from ping_llm.training import schedule
from ping_llm.training.metrics import COLUMNS, METRICS_NAME, Metrics, read_metrics
from ping_llm.training.run_state import ROWS_MANIFEST_NAME

SHARE, CRPS = "ratio", "crps"  # PingBench in units of the comparator, or, without one, in log-ms
_VALIDATION = ("val_loss", *(f"val_loss_{field}" for field in FIELDS), "val_rtt_bits", "val_median_rel_error")
_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "val_loss": ("val loss, nats", "{:.4f}".format),
    "val_rtt_bits": ("bits per RTT", "{:.3f}".format),
    "val_median_rel_error": ("median error of val", "{:.2%}".format),
}
_BEGUN = (CONFIG_NAME, "train.log")  # what a run writes first, and what a sweep writes of it
_SEEDS = re.compile(r",seed=\d+(,init=\d+)?$")  # at the end of the name of a sweep's run


@dataclass(frozen=True)
class Quantity:
    """A number that runs reach, and how it is shown."""

    name: str
    label: str
    form: Callable[[float], str] = "{:.4g}".format
    judged: bool = True  # lower is better, so configs are told apart by it


@dataclass(frozen=True)
class Outcome:
    """What one run reached."""

    folder: Path
    config: Config
    metrics: Metrics
    rows: str  # hash of the manifest of its rows, empty if not known
    values: dict[str, float]  # by the names of `quantities`; what it did not log is not there
    bench_queries: int | None = None  # of each cell of PingBench, at most, that were put to its model

    @property
    def seeds(self) -> tuple[int, int]:
        """Of its windows and of its initial weights."""
        return self.config.seed, self.config.weights_seed

    def flops(self, steps: int) -> float:
        """Floating-point operations of the first steps, for all places of their windows."""
        windows = schedule.windows_before(steps, self.config.train)
        return float(windows * self.config.place_tokens * mean_flops_per_token(self.config))

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Of the fields in its loss, on val too."""
        return tuple(getattr(self.config.loss, name) for name in FIELDS)

    @property
    def bench_parts(self) -> list[str]:
        """The parts of val that its numbers of PingBench are of."""
        return [split for split in VAL_SPLITS if f"{CRPS}_{split}" in self.values]

    @property
    def progress(self) -> float:
        """The share of the run that is logged."""
        tokens, time_s = (float(self.metrics.known(name)[1][-1:].sum()) for name in ("tokens", "time_s"))
        return schedule.progress(int(self.metrics.steps[-1]), int(tokens), time_s, self.config.train)

    @classmethod
    def read(cls, folder: Path, results: Mapping[str, Any] | None) -> Outcome:
        """Of a run folder, with the results of PingBench if there are any. ValueError if it is no run or is damaged."""
        config, metrics = load_config(folder), read_metrics(folder)
        if config is None:
            raise ValueError(f"{folder} holds no {CONFIG_NAME}; restore it, or leave the run out")
        manifest = folder / ROWS_MANIFEST_NAME
        rows = file_sha256(manifest) if manifest.is_file() else ""
        values = validation(metrics) | (benchmark(results) if results else {})
        values |= {"parameters": float(parameter_count(config.model))}
        steps, queries = int(metrics.steps[-1]), results.get("model_queries_per_cell") if results else None
        outcome = cls(folder, config, metrics, rows, values, queries)
        values["flops"] = outcome.flops(steps)
        for name, pick in (("tokens", lambda known: known[-1]), ("tokens_per_s", np.median)):
            known = metrics.known(name)[1]
            if len(known):
                values[name] = float(pick(known))
        return outcome


@dataclass(frozen=True)
class Group:
    """Runs of one config, which differ in their seeds."""

    name: str
    outcomes: tuple[Outcome, ...]

    def by_seed(self, quantity: str) -> dict[Any, float]:
        """What its runs reached, by their seeds; without those that did not log it."""
        return {one.seeds: one.values[quantity] for one in self.outcomes if quantity in one.values}

    def differs_from(self, other: Group) -> list[str]:
        """`model.n_embd=96`: the fields in which this config is another one."""
        own = self.outcomes[0]
        names = [name for name in _differing(other.outcomes[0], own) if name != "data.rows"]
        texts = [f"{name}={_value(own.config, name)}" for name in names]
        return texts + (["other rows"] if other.outcomes[0].rows != own.rows else [])


def quantities() -> list[Quantity]:
    """All numbers that runs are compared by, in the order of the table."""
    found = []
    for at, when in (("end", "end"), ("best", "best step")):
        for name in _VALIDATION:
            field = COLUMNS[name].label.partition(" (")[0]
            label, form = _SHOWN.get(name, (f"val {field}, nats", "{:.4f}".format))
            found.append(Quantity(f"{at}_{name}", f"{label}, {when}", form))
    for unit, text in ((SHARE, "CRPS ÷ comparator"), (CRPS, "CRPS, log-ms")):
        found += [Quantity(f"{unit}_{split}", f"{split}, {text}", "{:.3f}".format) for split in (*VAL_SPLITS, "val")]
    found.append(Quantity("tokens_per_s", "tokens/s, median", "{:,.0f}".format, judged=False))
    found.append(Quantity("parameters", "parameters", "{:,.0f}".format, judged=False))
    found.append(Quantity("tokens", "tokens", "{:,.0f}".format, judged=False))
    return [*found, Quantity("flops", "FLOPs of training", "{:.3g}".format, judged=False)]


def validation(metrics: Metrics) -> dict[str, float]:
    """What val showed at the last evaluation and at the one with the lowest loss."""
    values: dict[str, float] = {}
    best = metrics.best_step()
    for name in _VALIDATION:
        steps, known = metrics.known(name)
        if len(known):
            values[f"end_{name}"] = float(known[-1])
        if len(found := known[steps == best]):
            values[f"best_{name}"] = float(found[0])
    return values


def benchmark(results: Mapping[str, Any]) -> dict[str, float]:
    """Of the results of PingBench, for each part of val and for all: the geometric mean over the two contexts of the primary
    result of the model's CRPS, and of that ÷ the comparator's. A part that lacks one of them is left out, for its mean would
    be of other queries. Of parts of test nothing is read: they choose no config."""
    method = subject(results)
    values: dict[str, float] = {}
    for name, key in ((SHARE, "crps_ratio"), (CRPS, "crps_log")):
        logs: dict[str, list[float]] = {}
        for cell in results["cells"]:
            known = cell["methods"].get(method, {}).get(key)
            primary = cell["family"] == FAMILIES[0] and (cell["draw"], cell["k"]) in PRIMARY_CONTEXTS
            if primary and cell["split"] in VAL_SPLITS and known:
                logs.setdefault(cell["split"], []).append(math.log(known))
        logs = {split: found for split, found in logs.items() if len(found) == len(PRIMARY_CONTEXTS)}
        values |= {f"{name}_{split}": math.exp(np.mean(found)) for split, found in logs.items()}
        if logs:
            values[f"{name}_val"] = math.exp(np.mean([log for found in logs.values() for log in found]))
    return values


def read_runs(paths: Sequence[Path], scores: Sequence[Path] = ()) -> list[Outcome]:
    """What the runs reached that are, or lie in, the folders `paths`; a run is read once.

    scores: folders of evaluations that do not lie in RUN/eval. ValueError: no run, or one that is damaged.
    """
    given = dict(_evaluated(folder) for folder in scores)
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in _runs_in(path)))
    shown = {folder.resolve(): folder for path in paths for folder in _runs_in(path)}
    if strangers := given.keys() - set(folders):
        raise ValueError(f"--scores holds an evaluation of {min(strangers)}, which is none of the runs")
    outcomes = []
    for folder in folders:
        results = given.get(folder)
        own = folder / "eval" / RESULTS_NAME
        if results is None and own.is_file():
            results = _read_results(own)
        outcomes.append(Outcome.read(shown[folder], results))
    return outcomes


def begun_only(paths: Sequence[Path]) -> list[Path]:
    """The runs in folders of runs that have logged nothing, in order: `read_runs` knows nothing of them."""
    inside = [folder for path in paths if not (path / CONFIG_NAME).is_file() for folder in sorted(path.iterdir())]
    begun = [folder for folder in inside if any((folder / name).is_file() for name in _BEGUN)]
    return [folder for folder in begun if not (folder / METRICS_NAME).is_file()]


def group_runs(outcomes: Iterable[Outcome]) -> tuple[list[Group], list[str]]:
    """Runs whose configs differ in their seeds alone, together, in the order of their first ones; and notes on those that
    are left out, as another run of the same config has the same seeds."""
    together: list[list[Outcome]] = []
    notes = []
    for one in outcomes:
        alike = next((group for group in together if not _differing(group[0], one)), None)
        if alike is None:
            together.append([one])
        elif one.seeds in [other.seeds for other in alike]:
            notes.append(f"{one.folder} is left out: another run has its config and its seeds")
        else:
            alike.append(one)
    names = _names(together)
    return [Group(name, tuple(group)) for name, group in zip(names, together, strict=True)], notes


def _names(groups: Sequence[Sequence[Outcome]]) -> list[str]:
    """Names of the runs without their seeds; with the folder above, or a number, where that is not enough."""
    first = [group[0].folder.absolute() for group in groups]
    names = [_SEEDS.sub("", folder.name) for folder in first]
    counts = Counter(names)
    names = [
        f"{path.parent.name}/{name}" if counts[name] > 1 else name for path, name in zip(first, names, strict=True)
    ]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _differing(one: Outcome, other: Outcome) -> list[str]:
    """The fields, seeds aside, in which the configs of two runs differ; their rows too."""
    plain, others = (dataclasses.replace(run.config, seed=0, init_seed=0) for run in (one, other))
    return differing_fields(plain, others) + (["data.rows"] if one.rows != other.rows else [])


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _runs_in(path: Path) -> list[Path]:
    """A run folder itself, else the run folders in a folder, by name; numbers in names by their size."""
    if not path.is_dir():
        raise ValueError(f"no run folder {path}; name folders that ping-llm train or ping-llm sweep wrote")
    if (path / CONFIG_NAME).is_file():
        return [path]
    found = [folder for folder in path.iterdir() if (folder / METRICS_NAME).is_file()]
    if not found:
        raise ValueError(f"{path} is no run and holds none; name folders that ping-llm train or ping-llm sweep wrote")
    # Every other piece is a number, so pieces of two names are of one kind where they are compared.
    pieces = {folder: re.split(r"(\d+)", folder.name) for folder in found}
    keys = {folder: [int(p) if place % 2 else p for place, p in enumerate(of)] for folder, of in pieces.items()}
    return sorted(found, key=lambda folder: keys[folder])


def _evaluated(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The run that a folder of scores is of, and the results."""
    results = _read_results(folder / RESULTS_NAME)
    if not results.get("run"):
        raise ValueError(f"{folder} is the evaluation of no run; name those of runs")
    run = Path(results["run"]).resolve()
    return (run.parent.parent if run.parent.name == "checkpoints" else run), results


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); name a folder that ping-llm eval wrote") from None
    if not isinstance(results, dict) or not {"cells", "methods"} <= results.keys():
        raise ValueError(f"{path} holds no results of PingBench; name a folder that ping-llm eval wrote")
    return results
