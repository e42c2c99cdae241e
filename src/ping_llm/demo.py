"""A seeded Internet in, a trained model and its report out, in a few minutes.

Each stage is a command that a user could have typed; it is printed before it runs. out/demo holds their results: dump,
rows, run, plots and report.json.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
import tyro

from ping_llm import cli
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import RowReader, read_manifest
from ping_llm.system.hardware import device_name
from ping_llm.system.progress import cores
from ping_llm.system.streams import steady_streams

if TYPE_CHECKING:
    from ping_llm import PingModel

CONTEXT_MEASUREMENTS = 10
QUERIES = 250
BATCH = 50
LEAST_RATIO = 3
STEPS = 640  # about three minutes on two cores, calibration included
PARTS = {"seen_pairs": "test-s1", "unseen_pairs": "test-s2", "unseen_sources": "test-s3"}
_TITLES = {"seen_pairs": "pair seen before", "unseen_pairs": "pair never seen", "unseen_sources": "source never seen"}
INTERNET = ("--probes", "60", "--targets", "40", "--days", "3")
_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.toml"


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
        first = np.searchsorted(probe, probe[place])
        end = first + np.searchsorted(time_s[first:place], time_s[place])
        return self.table.slice(max(first, end - CONTEXT_MEASUREMENTS), min(CONTEXT_MEASUREMENTS, end - first))

    def endpoints(self, place: int) -> tuple[str, str, int]:
        """Source, destination and time of the measurement at `place`."""
        row = self.table.slice(place, 1).to_pylist()[0]
        return format_address(row["src"]), format_address(row["dst"]), row["time_s"]


def demo(out: Path = Path("out/demo"), steps: int = STEPS, install_s: float = 0.0) -> None:
    """Synthesise an Internet, train a tiny model on its pings, and compare answers with the truth.

    Training is bound by its steps and not by the clock, so a slower machine takes longer and comes to the same table.

    Args:
        out: folder that is made anew.
        steps: training steps.
        install_s: seconds that the installation took, for the report.
    """
    shutil.rmtree(out, ignore_errors=True)
    seconds = {"install": install_s}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        print(f"\n── {name} ──", flush=True)
        start = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - start, 1)

    dump, rows, run = (str(out / name) for name in ("dump", "rows", "run"))
    budget = ["--train.total-steps", str(steps)]
    budget += ["--train.eval-queries", "64"]  # a quarter, in evaluations and in the calibration at the end
    for name, *options in (
        ("synth", "--out", dump, *INTERNET),
        ("prepare", dump, "--out", rows),
        ("train", str(_CONFIG), "--data.rows", rows, "--train.run-dir", run, *budget),
    ):
        with stage(name):
            print("$ ping-llm", name, *options, flush=True)
            if code := cli.main([name, *options]):
                raise SystemExit(code)
    with stage("evaluate"):
        errors, valid, examples = evaluate(out)
    _print_report(seconds, errors, examples)
    machine = f"{device_name(torch.device('cpu'))}, {cores()} cores"
    print(f"\n{steps} steps of training in {seconds['train']:.0f} s, calibration included, on {machine}")
    report = {
        "machine": machine,
        "steps": steps,
        "stages_s": seconds,
        "median_rel_error": errors,
        "total_probability": valid,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nreport: {out / 'report.json'}   pictures: {out / 'plots'}")
    shares = ", ".join(f"{_TITLES[name]} {p:.2%}" for name, p in valid.items())
    print(f"Median raw probability of valid results: {shares}.")
    ratio = errors["seen_pairs"]["global_median"] / errors["seen_pairs"]["model"]
    print(f"On later pings of pairs seen before, the model's median is {ratio:.0f} × closer than the global median.")
    if ratio < LEAST_RATIO:
        raise SystemExit(f"That is less than {LEAST_RATIO} ×: the model has learned too little.")


def evaluate(out: Path) -> tuple[dict[str, dict], dict[str, float], list[dict]]:
    """For each part: median relative errors of the predicted median; the median of the raw mass on valid results; and one
    example, drawn beside the true distribution."""
    from ping_llm import PingModel
    from ping_llm.data.synthetic.truth import Truth
    from ping_llm.inference.plots import plot_rtt

    history, truth, model = History.load(out / "rows"), Truth.load(out / "dump"), PingModel.load(out / "run")
    rtt_ms, train = history.table.column("rtt_ms").to_numpy(), history.part == "train"
    global_median = np.median(rtt_ms[train & (rtt_ms > 0)])
    errors, valid, examples = {}, {}, []
    for name, part in PARTS.items():
        places = history.queries(part, QUERIES)
        if not len(places):
            continue
        alone, after = (predict(model, history, places, with_context) for with_context in (False, True))
        true = [truth.rtt_distribution(*history.endpoints(place)) for place in places]
        methods = {"model": alone, f"model_{CONTEXT_MEASUREMENTS}_context": after, "true_law": true}
        medians = {method: [d.median for d in distributions] for method, distributions in methods.items()}
        errors[name] = {
            method: round(float(np.median(np.abs(np.asarray(median) - rtt_ms[places]) / rtt_ms[places])), 4)
            for method, median in (medians | {"global_median": global_median}).items()
        } | {"queries": len(places)}
        valid[name] = round(float(np.median([d.total_probability for d in alone + after])), 4)
        middle = len(places) // 2
        src, dst, time_s = history.endpoints(places[middle])
        title = f"{_TITLES[name]}: {src} → {dst}"
        predicted = {"model": alone[middle], f"model, {CONTEXT_MEASUREMENTS} earlier pings": after[middle]}
        at = f"{dt.datetime.fromtimestamp(time_s, dt.UTC):%Y-%m-%d %H:%M} UTC"
        plot_rtt(predicted, out / "plots" / f"{name}.png", f"{title}, {at}", true[middle])
        examples.append({"title": title, "distributions": predicted | {"true distribution": true[middle]}})
    return errors, valid, examples


def predict(model: PingModel, history: History, places: np.ndarray, with_context: bool) -> list:
    """The model's RTT distribution of each measurement at `places`, given all of both addresses and the time."""
    from ping_llm.inference.context import Context
    from ping_llm.inference.query import Query

    queries = []
    for place in places:
        context = history.context(place) if with_context else None
        queries.append(Query.parse(*history.endpoints(place), Context.of_measurements(context, one_host=True)))
    batches = [queries[i : i + BATCH] for i in range(0, len(queries), BATCH)]
    return [distribution for batch in batches for distribution in model.rtt_many(batch, src_known="all")]


def _print_report(seconds: dict[str, float], errors: dict, examples: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    def new_table(title: str, *columns: str) -> Table:
        return Table("", *(Column(name, justify="right") for name in columns), title=title, title_justify="left")

    console, table = Console(), new_table("Three pings", "median", "5–95 %", "no answer")
    for example in examples:
        table.add_section()
        table.add_row(example["title"])
        for name, d in example["distributions"].items():
            low, high = d.quantile(0.05), d.quantile(0.95)
            table.add_row(f"  {name}", f"{d.median:.4g} ms", f"{low:.4g}–{high:.4g} ms", f"{d.p_fail:.1%}")
    console.print()
    console.print(table)
    columns = ("model", f"+ {CONTEXT_MEASUREMENTS} pings", "truth", "global median", "queries")
    table = new_table("Median relative error of the predicted median", *columns)
    for name, error in errors.items():
        *shares, queries = error.values()
        table.add_row(_TITLES[name], *(f"{share:.1%}" for share in shares), str(queries))
    console.print(table)
    times = ", ".join(f"{name} {s:g}" for name, s in seconds.items())
    console.print(f"seconds: {times}; {sum(seconds.values()):.0f} in all", soft_wrap=True)


if __name__ == "__main__":
    with steady_streams():
        tyro.cli(demo, prog="python -m ping_llm.demo")
