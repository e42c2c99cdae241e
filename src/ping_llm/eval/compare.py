"""Runs in; one table of what their configs reached, which differences exceed the noise, curves, compare.md and compare.json
out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.eval.curves import plot_curves
from ping_llm.eval.outcomes import (
    CRPS,
    SHARE,
    Group,
    Outcome,
    Quantity,
    begun_only,
    group_runs,
    quantities,
    read_runs,
)
from ping_llm.eval.paired import Difference, Noise, difference
from ping_llm.system.files import try_folder, write_atomically

TEXT_NAME, DATA_NAME, CURVES_NAME = "compare.md", "compare.json", "curves.png"
EMPTY, EXCEEDS = "–", "*"
_WEIGHTED = ("end_val_loss", "best_val_loss")  # means over the fields by the weights of each config
_OVERVIEW = ("end_val_loss", "end_val_rtt_bits", f"{SHARE}_val", f"{CRPS}_val")  # what few columns are of
MANY = 4  # configs from which on a line each is read more easily than a column each
READING = (
    "Each number is the mean over the runs of a config, ± their deviation over seeds. Δ is the mean of the differences of",
    "runs with the same seeds, with its 95 % interval (Student's t) and the number n of pairs. The noise is the deviation",
    "over seeds of runs of one config, pooled. * marks a difference that exceeds it: one that is larger than 95 % of those",
    "between as many runs of one config. Among twenty differences that are noise, expect one with a *.",
)
UNKNOWN = (
    "With one run of each config nothing says how much seeds alone change: no difference can be told from noise. Train more "
    "seeds, or name the runs of a noise study with --noise."
)


@dataclass(frozen=True)
class Comparison:
    """Configs beside the one they are compared with, which is the first."""

    groups: list[Group]
    quantities: list[Quantity]
    noise: dict[str, Noise]  # by quantity
    differences: dict[str, dict[str, Difference]]  # by quantity and group
    notes: list[str]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], against: str = "", noise_runs: Sequence[Outcome] = ()) -> Comparison:
        """ValueError if there is no config called `against`."""
        groups, notes = group_runs(outcomes)
        names = [group.name for group in groups]
        if against and against not in names:
            raise ValueError(f"no config is called {against!r}; there are {', '.join(names)}")
        first = groups[names.index(against)] if against else groups[0]
        groups = [first, *(group for group in groups if group is not first)]
        studied, _ = group_runs([*outcomes, *noise_runs])
        shown, noise, differences = _shown(groups), dict[str, Noise](), dict[str, dict[str, Difference]]()
        if len({one.loss_weights for group in studied for one in group.outcomes}) > 1:
            shown = [replace(one, judged=one.judged and one.name not in _WEIGHTED) for one in shown]
            notes.append(
                "the runs weight the fields otherwise ([loss]): val loss is a mean of its own for each, and is not judged"
            )
        for quantity in shown:
            name = quantity.name
            pooled = Noise.pooled([[*group.by_seed(name).values()] for group in studied])
            if pooled:
                noise[name] = pooled
            if quantity.judged:
                found = {
                    group.name: difference(group.by_seed(name), first.by_seed(name), pooled) for group in groups[1:]
                }
                differences[name] = {group: one for group, one in found.items() if one}
        return cls(groups, shown, noise, differences, notes + _notes(groups, studied) + _by_kind_of_seed(studied))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows: a column for each config and, beside all but the first, one for its differences."""
        head = ["", *self._heads(self.groups[0])]
        for group in self.groups[1:]:
            head += [*self._heads(group), f"Δ to {self.groups[0].name}"]
        rows = []
        for quantity in self.quantities:
            row = [quantity.label, self._mean(quantity, self.groups[0])]
            for group in self.groups[1:]:
                found = self.differences.get(quantity.name, {}).get(group.name)
                row += [self._mean(quantity, group), _difference(found, quantity)]
            noise = self.noise.get(quantity.name) if quantity.judged else None
            rows.append([*row, quantity.form(noise.deviation) if noise else EMPTY])
        return [*head, "noise"], rows

    def overview(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of a line for each config, the fewest bits per RTT first: what matters most, and the difference to
        the config that all are compared with."""
        first = self.groups[0]
        shown = [quantity for quantity in self.quantities if quantity.name in _OVERVIEW]
        head = ["config", "runs"]
        for quantity in shown:
            head += [quantity.label, f"Δ to {first.name}"]

        def rank(group: Group) -> float:
            values = [*group.by_seed("end_val_rtt_bits").values()]
            return float(np.mean(values)) if values else np.inf

        rows = []
        for group in sorted(self.groups, key=rank):
            row = [group.name, str(len(group.outcomes))]
            for quantity in shown:
                found = self.differences.get(quantity.name, {}).get(group.name)
                row += [self._mean(quantity, group), _difference(found, quantity)]
            rows.append(row)
        return head, rows

    def verdicts(self) -> list[str]:
        """For each config, its fields and what is beyond the noise, in words."""
        first, lines = self.groups[0], []
        for group in self.groups[1:]:
            fields = ", ".join(group.differs_from(first)) or "the same fields"
            found = [
                (quantity, self.differences.get(quantity.name, {}).get(group.name)) for quantity in self.quantities
            ]
            told = {one.exceeds_noise for _, one in found if one}
            sides = {
                side: [
                    q.label for q, one in found if one and one.exceeds_noise and (one.value < 0) == (side == "lower")
                ]
                for side in ("lower", "higher")
            }
            parts = [f"{side}: {'; '.join(labels)}" for side, labels in sides.items() if labels]
            otherwise = "no difference exceeds the noise" if told - {None} else "cannot be told from noise"
            lines.append(f"{group.name} ({fields}): {'. '.join(parts) if parts else otherwise}.")
        return lines

    def markdown(self, picture: str = "") -> str:
        """compare.md."""
        table = [*_as_markdown(*self.overview()), ""] if len(self.groups) >= MANY else []
        table += _as_markdown(*self.table())
        verdicts = [f"- {line}" for line in self.verdicts()]
        parts = ["# Comparison", *table_note(self), "", *verdicts, "", *table, ""]
        parts += [f"![loss against tokens and FLOPs]({picture})", ""] if picture else []
        return "\n".join([*parts, *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def to_json(self) -> dict[str, Any]:
        """All numbers, run by run."""
        return {
            "against": self.groups[0].name,
            "labels": {quantity.name: quantity.label for quantity in self.quantities},
            "groups": [
                {
                    "name": group.name,
                    "differs": group.differs_from(self.groups[0]),
                    "runs": [
                        {"folder": str(one.folder), "seeds": one.seeds, "progress": one.progress, "values": one.values}
                        for one in group.outcomes
                    ],
                }
                for group in self.groups
            ],
            "noise": {name: asdict(one) for name, one in self.noise.items()},
            "differences": {
                name: {group: asdict(one) for group, one in found.items()} for name, found in self.differences.items()
            },
            "notes": self.notes,
        }

    def _heads(self, group: Group) -> list[str]:
        return [f"{group.name}, {len(group.outcomes)} runs" if len(group.outcomes) > 1 else group.name]

    def _mean(self, quantity: Quantity, group: Group) -> str:
        values = [*group.by_seed(quantity.name).values()]
        if not values:
            return EMPTY
        text = quantity.form(float(np.mean(values)))
        varies = len(values) > 1 and np.ptp(values) > 0
        return f"{text} ± {quantity.form(float(np.std(values, ddof=1)))}" if varies else text


def compare(
    runs: Sequence[Path],
    out: Path | None = None,
    against: str = "",
    scores: Sequence[Path] = (),
    noise: Sequence[Path] = (),
) -> Comparison:
    """Compares the runs in folders; writes compare.md, compare.json and curves.png into `out`, if there is one.

    ValueError: no runs, a damaged one, or no config called `against`. ModuleNotFoundError without SciPy or, for curves,
    matplotlib.
    """
    if out is not None:
        import matplotlib  # noqa: F401  what is missing is said before anything is done

        try_folder(out, TEXT_NAME, DATA_NAME, CURVES_NAME)
    comparison = Comparison.of(read_runs(runs, scores), against, read_runs(noise) if noise else ())
    empty = [f"{folder} has logged nothing and is left out" for folder in begun_only([*runs, *noise])]
    comparison = replace(comparison, notes=[*empty, *comparison.notes])
    if out is not None:
        drawn = plot_curves(comparison.groups, out / CURVES_NAME)
        text = json.dumps(comparison.to_json(), indent=1)
        write_atomically(out / DATA_NAME, text + "\n")
        write_atomically(out / TEXT_NAME, comparison.markdown(CURVES_NAME if drawn else ""))
    return comparison


def print_comparison(comparison: Comparison) -> None:
    """Prints the table, what exceeds the noise, and notes; a wide table in parts, each with the first config."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    if len(comparison.groups) >= MANY:
        head, rows = comparison.overview()
        table = Table(head[0], *(Column(name, justify="right") for name in head[1:]))
        for row in rows:
            table.add_row(*row)
        console.print(table)
    head, rows = comparison.table()
    others = list(range(2, len(head) - 1, 2))
    fits = max(1, (console.width - 60) // 44)
    for start in range(0, max(len(others), 1), fits):
        places = [0, 1, *(place + i for place in others[start : start + fits] for i in (0, 1)), len(head) - 1]
        columns = [Column(head[place], justify="right" if place else "left") for place in places]
        table = Table(*columns)
        for row in rows:
            table.add_row(*(row[place] for place in places))
        console.print(table)
    for line in [*table_note(comparison), "", *comparison.verdicts(), *comparison.notes]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def table_note(comparison: Comparison) -> list[str]:
    """How the table is read."""
    return ["", *READING] if comparison.noise else ["", UNKNOWN]


def _difference(found: Difference | None, quantity: Quantity) -> str:
    if found is None:
        return EMPTY

    def signed(value: float) -> str:
        return f"{'−' if value < 0 else '+'}{quantity.form(abs(value))}"

    text = signed(found.value)
    if found.interval:
        text += f" ({signed(found.interval[0])} to {signed(found.interval[1])}, n = {found.pairs})"
    return text + (f" {EXCEEDS}" if found.exceeds_noise else "")


def _shown(groups: Sequence[Group]) -> list[Quantity]:
    """The numbers that some run has; of PingBench in one of the two units."""

    def runs_with(name: str) -> set[Path]:
        return {one.folder for group in groups for one in group.outcomes if name in one.values}

    unit = CRPS if runs_with(f"{CRPS}_val") - runs_with(f"{SHARE}_val") else SHARE
    dropped = ({SHARE, CRPS} - {unit}).pop()
    return [one for one in quantities() if runs_with(one.name) and not one.name.startswith(f"{dropped}_")]


def _notes(groups: Sequence[Group], studied: Sequence[Group]) -> list[str]:
    """What speaks against comparing these runs; `studied` are those that the noise is of, too."""
    outcomes = [one for group in groups for one in group.outcomes]
    notes = []
    for one in (one for group in studied for one in group.outcomes):
        if one.progress < 1:
            step = one.metrics.steps[-1]
            notes.append(f"{one.folder} is not finished: {one.progress:.0%}, step {step:,}")
    facts: Mapping[str, set[Any]] = {
        "rows": {one.rows for one in outcomes},
        "model.seq_len": {one.config.model.seq_len for one in outcomes},
        "train.eval_windows": {one.config.train.eval_windows for one in outcomes},
    }
    if differ := [name for name, found in facts.items() if len(found) > 1]:
        notes.append(f"the runs differ in {', '.join(differ)}: their losses on val are of other windows")
    benched = [one for one in outcomes if one.bench_queries is not None]
    notes += [
        f"PingBench of {one.folder} has no part of val with both contexts, k = 0 and other 10; nothing of it is shown"
        for one in benched
        if not one.bench_parts
    ]
    if len({tuple(one.bench_parts) for one in benched if one.bench_parts}) > 1:
        notes.append(
            "PingBench was put to these models over other parts of val: what is called val is of other queries"
        )
    queries = {one.bench_queries for one in benched if one.bench_queries is not None}
    if len(queries) > 1:
        counts = ", ".join(f"{count:,}" for count in sorted(queries))
        notes.append(f"PingBench put {counts} queries a cell to these models: its numbers are of other queries")
    return notes


def _by_kind_of_seed(groups: Sequence[Group]) -> list[str]:
    """The noise of the final loss apart: over training seeds with the same initial weights, and the other way round."""
    lines = []
    kinds = ("training seeds, the same initial weights", "initial weights, the same training seed")
    for kept, kind in ((1, kinds[0]), (0, kinds[1])):
        apart: dict[tuple[int, int], list[float]] = {}
        for number, group in enumerate(groups):
            for seeds, value in group.by_seed("end_val_loss").items():
                apart.setdefault((number, seeds[kept]), []).append(value)
        noise = Noise.pooled([*apart.values()])
        if noise:
            freedom = f"{noise.freedom} degrees of freedom"
            lines.append(f"val loss at the end deviates by {noise.deviation:.4f} over {kind} ({freedom})")
    return lines
