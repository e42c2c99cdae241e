"""A seeded Internet in, a trained model and its report out: the whole line at the size of a coffee break.

Each stage is a command that a user could have typed; it is printed before it runs. out/demo holds what they leave behind:
dump, rows, run, plots and report.json.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import tyro

from ping_llm import cli
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import RowReader, read_manifest

CONTEXT_MEASUREMENTS = 10
QUERIES = 250
BATCH = 50
LEAST_RATIO = 3
PARTS = {"seen_pairs": "test-s1", "unseen_pairs": "test-s2", "unseen_sources": "test-s3"}
_TITLES = {"seen_pairs": "pair seen before", "unseen_pairs": "pair never seen", "unseen_sources": "source never seen"}
_WITH_CONTEXT = f"model, {CONTEXT_MEASUREMENTS} earlier pings"
INTERNET = ("--probes", "60", "--targets", "40", "--days", "3")
_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.toml"


@dataclass
class Stages:
    """Seconds that each stage took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str):
        """Times what runs inside."""
        print(f"\n── {name} ──", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)


@dataclass(frozen=True)
class History:
    """All measurements of all parts, by probe and time, and which part each is of."""

    table: pa.Table
    part: np.ndarray  # (n,) str

    @classmethod
    def load(cls, rows: Path) -> History:
        """Reads every part of a folder of rows."""
        parts = [part for part, count in read_manifest(rows)["parts"].items() if count]
        tables = {part: pa.concat_tables(row.to_measurements() for row in RowReader(rows, part)) for part in parts}
        table = pa.concat_tables(tables.values())
        table = table.append_column("part", pa.array(np.repeat(parts, [len(t) for t in tables.values()])))
        table = table.sort_by([("probe_id", "ascending"), ("time_s", "ascending")])
        return cls(table, table.column("part").to_numpy())

    def queries(self, part: str, count: int) -> np.ndarray:
        """Places (≤ count,) of answered measurements of a part, evenly spaced over probes and time."""
        answered = self.table.column("rtt_ms").to_numpy() > 0
        places = np.flatnonzero(answered & (self.part == part))
        return places[np.linspace(0, len(places) - 1, min(count, len(places)), dtype=int)] if len(places) else places

    def context(self, place: int) -> pa.Table:
        """The last measurements of the same probe before the one at `place`, whatever their destination."""
        probe, time_s = (self.table.column(name).to_numpy() for name in ("probe_id", "time_s"))
        first, end = np.searchsorted(probe, probe[place]), place
        while end > first and time_s[end - 1] >= time_s[place]:
            end -= 1
        return self.table.slice(max(first, end - CONTEXT_MEASUREMENTS), min(CONTEXT_MEASUREMENTS, end - first))


def demo(
    out: Path = Path("out/demo"),
    minutes: float = 3.3,
    steps: int = 1500,
    install_s: float = 0.0,
) -> None:
    """Synthesise an Internet, train a tiny model on its pings, and compare answers with the truth.

    Args:
        out: folder that is made anew.
        minutes: longest training time.
        steps: most training steps.
        install_s: seconds that the installation took, for the report.
    """
    shutil.rmtree(out, ignore_errors=True)
    stages = Stages({"install": install_s})
    dump, rows, run = (str(out / name) for name in ("dump", "rows", "run"))
    with stages.stage("synth"):
        _command("synth", "--out", dump, *INTERNET)
    with stages.stage("prepare"):
        _command("prepare", dump, "--out", rows)
    with stages.stage("train"):
        budget = ["--train.total-steps", str(steps), "--train.max-minutes", str(minutes)]
        budget += ["--train.eval-queries", "64"]  # a quarter, in evaluations and in the calibration at the end
        _command("train", str(_CONFIG), "--data.rows", rows, "--train.run-dir", run, *budget)
    with stages.stage("evaluate"):
        errors, valid, examples = evaluate(out)
    _print_report(stages.seconds, errors, examples)
    (out / "report.json").write_text(
        json.dumps({"stages_s": stages.seconds, "median_rel_error": errors, "total_probability": valid}, indent=2)
        + "\n"
    )
    print(f"\nreport: {out / 'report.json'}   pictures: {out / 'plots'}")
    print(
        "Median raw probability of valid results: "
        + ", ".join(f"{_TITLES[name]} {p:.2%}" for name, p in valid.items())
        + "."
    )
    ratio = errors["seen_pairs"]["global_median"] / errors["seen_pairs"]["model"]
    print(f"On later pings of pairs seen before, the model's median is {ratio:.0f} × closer than the global median.")
    if ratio < LEAST_RATIO:
        raise SystemExit(f"That is less than {LEAST_RATIO} ×: the model has learned too little.")


def evaluate(out: Path) -> tuple[dict[str, dict], dict[str, float], list[dict]]:
    """For each part: median relative errors of the predicted median; the median of the raw mass on valid results; and one
    example, drawn beside the truth."""
    from ping_llm.data.synthetic.truth import Truth
    from ping_llm.inference.predictor import PingModel

    history, truth, model = History.load(out / "rows"), Truth.load(out / "dump"), PingModel.load(out / "run")
    rtt_ms, train = history.table.column("rtt_ms").to_numpy(), history.part == "train"
    global_median = np.median(rtt_ms[train & (rtt_ms > 0)])
    errors, valid, examples = {}, {}, []
    for name, part in PARTS.items():
        places = history.queries(part, QUERIES)
        if not len(places):
            continue
        ends = [_ends(history, place) for place in places]
        laws, laws_after = (ask(model, history, places, with_context) for with_context in (False, True))
        true_laws = [truth.rtt_distribution(*end) for end in ends]
        answers = {"model": laws, f"model_{CONTEXT_MEASUREMENTS}_context": laws_after, "true_law": true_laws}
        errors[name] = {
            **{who: _median_rel_error([law.median for law in said], rtt_ms[places]) for who, said in answers.items()},
            "global_median": _median_rel_error(global_median, rtt_ms[places]),
            "queries": len(places),
        }
        valid[name] = round(float(np.median([law.total_probability for law in laws + laws_after])), 4)
        middle = len(places) // 2
        shown = {"model": laws[middle], _WITH_CONTEXT: laws_after[middle]}
        examples.append(_example(name, *ends[middle], shown, true_laws[middle], out / "plots"))
    return errors, valid, examples


def _example(name: str, src: str, dst: str, time_s: int, laws: dict, true_law, folder: Path) -> dict:
    """Draws the model's laws of one ping beside the true one; what the report says of them."""
    from ping_llm.inference.plots import plot_rtt

    title = f"{_TITLES[name]}: {src} → {dst}"
    when = dt.datetime.fromtimestamp(time_s, dt.UTC)
    plot_rtt(laws, folder / f"{name}.png", f"{title}, {when:%Y-%m-%d %H:%M} UTC", true_law)
    return {"title": title, "laws": laws | {"true law": true_law}}


def ask(model, history: History, places: np.ndarray, with_context: bool) -> list:
    """The model's law of each measurement at `places`: all of both addresses and the time told."""
    from ping_llm.inference.context import Context
    from ping_llm.inference.query import Query

    queries = []
    for place in places:
        src, dst, time_s = _ends(history, place)
        context = history.context(place) if with_context else None
        queries.append(Query.parse(src, dst, time_s, Context.of_measurements(context)))
    batches = [queries[i : i + BATCH] for i in range(0, len(queries), BATCH)]
    return [law for batch in batches for law in model.rtt_many(batch, src_known="all")]


def _ends(history: History, place: int) -> tuple[str, str, int]:
    row = history.table.slice(place, 1).to_pylist()[0]
    return format_address(row["src"]), format_address(row["dst"]), row["time_s"]


def _median_rel_error(predicted: np.ndarray | list[float], actual: np.ndarray) -> float:
    return round(float(np.median(np.abs(np.asarray(predicted) - actual) / actual)), 4)


def _command(*argv: str) -> None:
    print("$ ping-llm", *argv, flush=True)
    if code := cli.main(list(argv)):
        raise SystemExit(code)


def _print_report(seconds: dict[str, float], errors: dict, examples: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Three pings", title_justify="left")
    for column in ("", "median", "5–95 %", "no answer"):
        table.add_column(column, justify="right" if column else "left")
    for example in examples:
        table.add_section()
        table.add_row(example["title"])
        for name, law in example["laws"].items():
            low, high = law.quantile(0.05), law.quantile(0.95)
            table.add_row(f"  {name}", f"{law.median:.4g} ms", f"{low:.4g}–{high:.4g} ms", f"{law.p_fail:.1%}")
    console.print()
    console.print(table)
    table = Table(title="Median relative error of the predicted median", title_justify="left")
    for column in ("", "model", f"+ {CONTEXT_MEASUREMENTS} pings", "true law", "global median", "queries"):
        table.add_column(column, justify="right" if column else "left")
    for name, error in errors.items():
        *shares, queries = error.values()
        table.add_row(_TITLES[name], *(f"{share:.1%}" for share in shares), str(queries))
    console.print(table)
    console.print(
        "seconds: "
        + ", ".join(f"{name} {s:g}" for name, s in seconds.items())
        + f"; {sum(seconds.values()):.0f} in all"
    )


if __name__ == "__main__":
    tyro.cli(demo, prog="python -m ping_llm.demo")
