"""A sweep file in, its runs out: each with a checked config, a folder, and a name that says what differs.

base = "../tiny.toml"          # optional: a config, relative to this file
out = "runs/sweeps/depth"      # optional: folder of the runs; runs/sweeps/NAME OF THIS FILE if absent
seeds = [0, 1]                 # optional: of the windows; [0] if absent
init_seeds = [1, 2]            # optional: of the initial weights; those of the windows if absent

[config]                       # optional: for all runs, over the base
train.total_steps = 500

[grid]                         # optional: every combination of these
model.n_layer = [2, 4]
optim.muon_lr = [0.01, 0.02]

[[runs]]                       # optional: one set of overrides after another, each with every combination of the grid
name = "short"
model.seq_len = 128
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ping_llm.config import (
    Config,
    config_from_dict,
    config_to_dict,
    differing_fields,
    from_dict,
    load_config,
    read_toml,
)
from ping_llm.launch.job import DONE, check_run, saved
from ping_llm.model.checkpoint import load_config as load_run_config
from ping_llm.system.files import write_atomically
from ping_llm.training.report import to_toml

CONFIG_NAME, LOG_NAME = "run.toml", "train.log"
SWEEPS = Path("runs/sweeps")
EXAMPLE = "configs/sweeps/example.toml"
PLAIN = "base"  # name of a run without overrides
MAX_NAME = 100
MAX_RUNS = 1000  # of a sweep: more is a mistake, and more than clusters take as one array
_SET_BY_SWEEP = {"train.run_dir": "out", "seed": "seeds", "init_seed": "init_seeds"}


@dataclass(frozen=True)
class SweepFile:
    """The tables of a sweep file."""

    base: str = ""
    out: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    init_seeds: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class SweepRun:
    """One run; its folder is `config.train.run_dir`."""

    name: str
    config: Config

    @property
    def folder(self) -> Path:
        """Of the run, and of its log."""
        return self.config.train.run_dir

    @property
    def log(self) -> Path:
        """What training prints."""
        return self.folder / LOG_NAME

    @property
    def done(self) -> bool:
        """Whether it has ended, its report included."""
        return (self.folder / DONE).exists()

    def write_config(self) -> Path:
        """Writes the whole config as TOML, for `ping-llm train`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / CONFIG_NAME
        write_atomically(path, to_toml(config_to_dict(self.config)) + "\n")
        return path


def read_sweep(path: Path, out: Path | None = None) -> list[SweepRun]:
    """The runs of a sweep, in order; `out` is taken for the folder that the file names.

    ValueError: an unknown key, with the nearest known one, a wrong type, a value out of range, two runs that are the same.
    """
    file = from_dict(read_toml(path, EXAMPLE), SweepFile, str(path))
    folder = out or Path(file.out or SWEEPS / path.stem)
    values = config_to_dict(load_config(path.parent / file.base)) if file.base else {}
    common = flatten(file.config)
    _refuse_own(common, path)
    for key, value in common.items():
        _set(values, key, value, str(path))
    _checked(values, str(path))
    runs = []
    for overrides, given in _combinations(file, path):
        for seed, init_seed in _seeds(file, path):
            name = ",".join([given or PLAIN, f"seed={seed}", *([f"init={init_seed}"] if file.init_seeds else [])])
            where, own = f"{path}, run {name}", json.loads(json.dumps(values))
            for key, value in overrides.items():
                _set(own, key, value, where)
            own |= {"seed": seed, "init_seed": init_seed}
            _set(own, "train.run_dir", str(folder / name), where)
            runs.append(SweepRun(name, _checked(own, where)))
    if len(runs) > MAX_RUNS:
        raise ValueError(f"{path} has {len(runs):,} runs, more than {MAX_RUNS:,}; make it several sweeps")
    _refuse_repeats(runs, path)
    return runs


def check_sweep(runs: list[SweepRun], processes: int = 1) -> list[SweepRun]:
    """The runs that are left to do; ValueError if one of all cannot be trained, or its folder holds another run."""
    for run in runs:
        old = load_run_config(run.folder)
        names = differing_fields(old, run.config) if old is not None else []
        if names:
            holds = f"{run.folder} holds a run with another {', '.join(names)}"
            raise ValueError(f"{holds}; give the sweep another --out, or what it had")
    left = [run for run in runs if not run.done]
    for run in left:
        check_run(run.config, processes)
    return left


def standing(run: SweepRun) -> str:
    """How far a run is, in words."""
    step, done = saved(run.config)
    return "done" if run.done else "trained, without its report" if done else f"{step:,} steps" if step else "not begun"


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tables within tables as one with dotted keys; a key in quotes may be dotted itself."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def describe(overrides: Mapping[str, Any]) -> str:
    """The name of a set of overrides: `n_layer=2,muon_lr=0.01`. What a folder cannot be called, or is too long, is cut and
    a hash of the whole stands at its end. It depends on these overrides alone."""
    texts = {}
    for key, value in overrides.items():
        texts[short_name(key)] = json.dumps(value) if isinstance(value, bool | int | float) else str(value)
    whole = ",".join(f"{key}={text}" for key, text in texts.items())
    plain = re.sub(r"[^\w.,=+-]+", "-", whole, flags=re.ASCII)
    if plain == whole and len(whole) <= MAX_NAME:
        return whole
    return f"{plain[: MAX_NAME - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def short_name(key: str) -> str:
    """A dotted key of the config without its table, if no other table has such a field."""
    last = key.rpartition(".")[2]
    return last if _LEAVES[last] == 1 else key


def _leaves(kind: Any) -> Iterator[str]:
    for f in dataclasses.fields(kind):
        inner = f.default_factory
        if dataclasses.is_dataclass(inner):
            yield from _leaves(inner)
        else:
            yield f.name


_LEAVES = Counter(_leaves(Config))


def _combinations(file: SweepFile, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each set of overrides with each combination of the grid, and its name, empty if nothing is overridden."""
    grid = flatten(file.grid)
    _refuse_own(grid, path)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid {key}={values!r} must be a list of values")
    for place, one in enumerate(file.runs or [{}], 1):
        own = flatten(one)
        name = own.pop("name", "")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]*", name, re.ASCII):
            raise ValueError(f"{path}: name={name!r} of run {place} must be of letters, digits and . _ + -")
        _refuse_own(own, path)
        if twice := own.keys() & grid.keys():
            raise ValueError(f"{path}: {min(twice)} stands in [grid] and in [[runs]]; leave one of them out")
        for chosen in itertools.product(*grid.values()):
            picked = dict(zip(grid, chosen, strict=True))
            parts = [name or describe(own), describe(picked)]
            yield own | picked, ",".join(filter(None, parts))


def _seeds(file: SweepFile, path: Path) -> list[tuple[int, int]]:
    """Every training seed with every initial seed; 0 stands for the initial weights of the training seed."""
    for name, seeds in (("seeds", file.seeds), ("init_seeds", file.init_seeds)):
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{path}: {name}={seeds} holds a seed twice")
    if 0 in file.init_seeds:
        raise ValueError(f"{path}: init_seeds={file.init_seeds} must be 1 or more; 0 stands for the training seed")
    if not file.seeds:
        raise ValueError(f"{path}: seeds=[] must hold one seed or more")
    return list(itertools.product(file.seeds, file.init_seeds or [0]))


def _refuse_own(overrides: Mapping[str, Any], path: Path) -> None:
    for key, instead in _SET_BY_SWEEP.items():
        if key in overrides:
            raise ValueError(f"{path}: {key} is set by the sweep; give {instead} at the top of the file")


def _set(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets a dotted key in tables within tables."""
    *tables, last = key.split(".")
    for name in tables:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"{where}: unknown key {key}; {name} is no table")
    values[last] = value


def _checked(values: dict[str, Any], where: str) -> Config:
    """The config; ValueError begins with `where`."""
    try:
        return config_from_dict(values, where)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None


def _refuse_repeats(runs: list[SweepRun], path: Path) -> None:
    """ValueError if two runs would do the same, or share a folder."""
    seen: dict[str, str] = {}
    for run in runs:
        values = config_to_dict(run.config)
        del values["train"]["run_dir"]
        for key in (json.dumps(values, sort_keys=True), run.name):
            if key in seen:
                twins = f"{seen[key]} and {run.name}" if seen[key] != run.name else f"two called {run.name}"
                raise ValueError(f"{path}: runs {twins} are the same; leave one of them out")
            seen[key] = run.name
