"""A run in; how each of its checkpoints answers the same queries, as tables, numbers and a picture, out.

The answers are those of the model alone: both addresses whole, no context, no memory and no calibration, which is fitted
for one checkpoint only.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.config import Config
from ping_llm.eval.curves import COLORS
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Query
from ping_llm.model.checkpoint import checkpoints, load_config, load_model
from ping_llm.system.axes import label_log_ticks
from ping_llm.system.files import try_folder, write_atomically
from ping_llm.system.hardware import pick_device
from ping_llm.training.metrics import METRICS_NAME, read_metrics
from ping_llm.training.validation import ValQueries

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT_NAME, DATA_NAME, PICTURE_NAME = "checkpoints.md", "checkpoints.json", "checkpoints.png"
EMPTY, BEST = "–", "best"
LEVELS = (0.05, 0.5, 0.95)
HEAD = ("checkpoint", "val loss", "median, ms", "5 to 95 %, ms", "P(no answer)", "valid")
READING = (
    "Each table is one ping, put to every checkpoint of the run: both addresses are known, without context or calibration.",
    "5 to 95 % is the band that holds 90 % of the expected RTTs; valid is the probability that lies on results before",
    "answers are limited to them. The val loss, in nats a token, is of the same weights.",
)


@dataclass(frozen=True)
class Answer:
    """What one checkpoint says of one ping; RTTs in ms are NaN where no ping is answered."""

    median_ms: float
    low_ms: float  # 5 % of the RTTs are below
    high_ms: float  # 5 % are above
    p_fail: float
    total_probability: float  # on valid results, before answers are limited to such


@dataclass(frozen=True)
class Step:
    """One checkpoint and its answers, in the order of the pings."""

    step: int
    val_loss: float | None  # of these weights, nats a token
    best: bool  # it has the lowest val loss of those that are kept
    answers: list[Answer]


@dataclass(frozen=True)
class OverTime:
    """The checkpoints of a run, oldest first, beside one another."""

    run: Path
    pings: list[str]
    observed_ms: list[float | None]  # by ping, None where it is not known
    steps: list[Step]
    notes: list[str]

    def titles(self) -> list[str]:
        """A ping, and what was observed, if that is known."""
        known = ["" if rtt is None else f", observed {rtt:.4g} ms" for rtt in self.observed_ms]
        return [ping + rtt for ping, rtt in zip(self.pings, known, strict=True)]

    def rows(self, ping: int) -> list[list[str]]:
        """Lines of the table of one ping, under HEAD."""
        rows = []
        for one in self.steps:
            answer = one.answers[ping]
            band = EMPTY if math.isnan(answer.median_ms) else f"{answer.low_ms:.4g} to {answer.high_ms:.4g}"
            median = EMPTY if math.isnan(answer.median_ms) else f"{answer.median_ms:.4g}"
            loss = EMPTY if one.val_loss is None else f"{one.val_loss:.4f}"
            name = f"{one.step:,}, {BEST}" if one.best else f"{one.step:,}"
            rows.append([name, loss, median, band, f"{answer.p_fail:.2%}", f"{answer.total_probability:.3%}"])
        return rows

    def markdown(self, picture: str) -> str:
        """checkpoints.md."""
        parts = [f"# Checkpoints of {self.run.absolute().name}", "", *READING, ""]
        for ping, title in enumerate(self.titles()):
            parts += [f"## {title}", "", "| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
            parts += ["| " + " | ".join(row) + " |" for row in self.rows(ping)] + [""]
        parts += [f"![answers over the steps of training]({picture})", ""]
        return "\n".join([*parts, *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def to_json(self) -> dict[str, Any]:
        """All numbers; null for those that are not known."""
        steps = [asdict(one) for one in self.steps]
        for answer in (answer for one in steps for answer in one["answers"]):
            answer |= {name: None for name, value in answer.items() if math.isnan(value)}
        observed = self.observed_ms
        pings = [{"ping": ping, "observed_ms": rtt} for ping, rtt in zip(self.pings, observed, strict=True)]
        return {"run": str(self.run), "pings": pings, "checkpoints": steps, "notes": self.notes}


def compare_checkpoints(
    run: Path,
    out: Path | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    data: Path | None = None,
    pings: int = 4,
    device: str = "auto",
) -> OverTime:
    """Puts the same pings to every kept checkpoint; writes checkpoints.md, .json and .png into `out`, if there is one.

    The pings are the `pairs` of source and destination, each an address or a prefix, at any time; without pairs, `pings`
    of the part val of the rows `data`, those of the run if absent, whose RTT is known. ValueError: no run, no checkpoint,
    or no such rows.
    """
    if out is not None:
        import matplotlib  # noqa: F401  what is missing is said before anything is done

        try_folder(out, TEXT_NAME, DATA_NAME, PICTURE_NAME)
    config = load_config(run)
    if config is None or not checkpoints(run):
        raise ValueError(f"{run} is no run that has checkpoints; name a folder that ping-llm train wrote")
    if pings < 1:
        raise ValueError(f"--pings {pings} must be at least 1")
    if pairs:
        asked: list[tuple[Query, float | None]] = [(Query.parse(src, dst), None) for src, dst in pairs]
    else:
        asked = _pings_of_val(config, data, pings)
    found = _asked(Path(run), asked, device)
    if out is not None:
        plot_answers(found, out / PICTURE_NAME)
        write_atomically(out / DATA_NAME, json.dumps(found.to_json(), indent=1) + "\n")
        write_atomically(out / TEXT_NAME, found.markdown(PICTURE_NAME))
    return found


def print_checkpoints(found: OverTime) -> None:
    """Prints a table for each ping, how they are read, and notes."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    for ping, title in enumerate(found.titles()):
        numbers = [Column(name, justify="right", no_wrap=True) for name in HEAD[1:]]
        table = Table(Column(HEAD[0], no_wrap=True), *numbers)
        for row in found.rows(ping):
            table.add_row(*row)
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        console.print(table)
    for line in [*READING, *found.notes]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def plot_answers(found: OverTime, path: Path) -> None:
    """Draws a PNG: a panel for each ping with its median, 90 % band and what was observed over the steps of training; then
    val loss, P(no answer) and the probability on valid results."""
    from matplotlib.figure import Figure

    steps, count = np.array([one.step for one in found.steps]), len(found.pings)
    columns = min(3, count + 3)
    rows = -(-(count + 3) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = list(grid.flat)
    for ping, axes in enumerate(panels[:count]):
        _plot_ping(found, ping, steps, axes)
    losses = np.array([np.nan if one.val_loss is None else one.val_loss for one in found.steps])
    known = np.isfinite(losses)
    panels[count].plot(steps[known], losses[known], "o-", color=COLORS[7], linewidth=1.8, markersize=4)
    panels[count].set_ylabel("val loss (nats per token)")
    for axes, name, label in (
        (panels[count + 1], "p_fail", "P(no answer) (%)"),
        (panels[count + 2], "total_probability", "probability on valid results (%)"),
    ):
        for ping in range(count):
            values = [100 * getattr(one.answers[ping], name) for one in found.steps]
            color = COLORS[(ping + 2) % len(COLORS)]
            axes.plot(
                steps,
                values,
                "o-",
                color=color,
                linewidth=1.4,
                markersize=3,
                label=found.pings[ping].partition(" at ")[0],
            )
        axes.set_ylabel(label)
    for axes in panels[count + 3 :]:
        axes.set_axis_off()
    for axes in panels[: count + 3]:
        margin = 0.03 * (steps[-1] - steps[0]) + 0.5
        axes.set_xlim(steps[0] - margin, steps[-1] + margin)
        _finish(axes)
    handles: dict[str, Any] = {}
    for axes in panels[: count + 3]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, **place)
    figure.suptitle(
        f"{found.run.absolute().name}: the same pings, put to each checkpoint", fontsize=11, parse_math=False
    )
    figure.savefig(path, dpi=130)


def _plot_ping(found: OverTime, ping: int, steps: np.ndarray, axes: Axes) -> None:
    """The panel of one ping: median, 90 % band and what was observed."""
    answers = [one.answers[ping] for one in found.steps]
    low, median, high = (
        np.array([getattr(one, name) for one in answers]) for name in ("low_ms", "median_ms", "high_ms")
    )
    axes.fill_between(steps, low, high, color=COLORS[0], alpha=0.15, linewidth=0, label="5 to 95 %")
    axes.plot(steps, median, "o-", color=COLORS[0], linewidth=1.8, markersize=4, label="median")
    observed = found.observed_ms[ping]
    if observed is not None:
        axes.axhline(observed, color=COLORS[1], linestyle="--", linewidth=1.4, label="observed")
    axes.set_yscale("log")
    label_log_ticks(axes.yaxis, *axes.get_ylim())
    # Two IPv6 addresses are wider than a panel.
    title = found.pings[ping].replace(" → ", " →\n").replace(" at ", "\n")
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_ylabel("RTT (ms)")


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("step")
    axes.grid(color="#eaeef2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _pings_of_val(config: Config, data: Path | None, pings: int) -> list[tuple[Query, float | None]]:
    """Answered pings of val, evenly spaced over probes and time, and their RTTs; always the same."""
    rows = config.data.rows if data is None else data
    given = dataclasses.replace(config.data, rows=rows), dataclasses.replace(config.train, eval_queries=pings)
    found = ValQueries.load(dataclasses.replace(config, data=given[0], train=given[1]))
    if found is None:
        raise ValueError(f"no ping of val in {rows} was answered; give --pairs SRC DST instead")
    return list(zip(found.queries, found.rtt_ms.tolist(), strict=True))


def _asked(run: Path, asked: Sequence[tuple[Query, float | None]], device: str) -> OverTime:
    queries = [query for query, _ in asked]
    chosen, notes, states = pick_device(device), list[str](), dict[int, dict[str, Any]]()
    logged = dict(_logged_losses(run))
    answers: dict[int, list[Answer]] = {}
    for folder in reversed(checkpoints(run)):
        try:
            gpt, _, state = load_model(folder, chosen)
        except ValueError as error:
            notes.append(f"left out: {error}")
            continue
        distributions = PingModel(gpt, chosen).rtt_many(queries, src_known="all")
        step = int(state["step"])
        states[step] = state
        answers[step] = [_answer(one) for one in distributions]
    if not answers:
        raise ValueError(f"every checkpoint in {run} is damaged; restore one or start a new run folder")
    losses = {step: _finite(state.get("val_loss", logged.get(step))) for step, state in states.items()}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    best = min(known, key=lambda step: known[step], default=None)
    if len(answers) == 1:
        notes.append("only one checkpoint is kept: train with --train.keep-checkpoints N to keep more")
    steps = [Step(step, losses[step], step == best, one) for step, one in answers.items()]
    names = [f"{query.src or 'anywhere'} → {query.dst or 'anywhere'}{_time(query)}" for query in queries]
    return OverTime(run, names, [rtt for _, rtt in asked], steps, notes)


def _answer(distribution: Any) -> Answer:
    if distribution.p_fail >= 1:
        return Answer(math.nan, math.nan, math.nan, 1.0, float(distribution.total_probability))
    low, median, high = (float(value) for value in distribution.quantile(np.array(LEVELS)))
    return Answer(median, low, high, float(distribution.p_fail), float(distribution.total_probability))


def _logged_losses(run: Path) -> Iterator[tuple[int, float]]:
    """The val loss by step, of runs whose checkpoints do not know it."""
    if (run / METRICS_NAME).is_file():
        steps, losses = read_metrics(run).known("val_loss")
        yield from zip(steps.tolist(), losses.tolist(), strict=True)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _time(query: Query) -> str:
    if query.time_s is None:
        return ""
    return f" at {dt.datetime.fromtimestamp(query.time_s, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"
