"""Prints how soon a watch finds outages and route changes put into the synthetic Internet, and at which false-alarm rate.

    python scripts/bench_watch.py [--model RUN] [--dump DUMP] [--pairs 160] [--quick] [--json FILE]

The pings of some pairs, of targets that answer, go on where DUMP, the dump that the model of RUN learned from, ends: every
half hour for two days. In the second day something happens to most of the pairs, and lasts. They are watched as `ping-llm
watch` does, and by a simple baseline: a result is odd if its middle packet is lost or farther than k · MAD from the median
of the last 20 that were not odd, and an anomaly opens when m of the last six are odd. For each m from 1 to 3, k is the one
that gives at most as many false alarms as the watch has; of these the baseline that finds most, and then soonest, is shown.
A delay is a number of results: 1 is found by the first one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ping_llm.cli import exit_code
from ping_llm.config import load_config
from ping_llm.data.measurement import format_address
from ping_llm.data.synthetic.atlas_lines import Results
from ping_llm.data.synthetic.synthesize import Dump
from ping_llm.data.synthetic.truth import Truth
from ping_llm.data.synthetic.world import build_world
from ping_llm.data.times import parse_time
from ping_llm.inference.model import PingModel
from ping_llm.model.gpt import GPT
from ping_llm.system.files import try_file
from ping_llm.system.hardware import device_name
from ping_llm.system.progress import say
from ping_llm.watch.arrivals import Result, parse
from ping_llm.watch.hysteresis import Rule
from ping_llm.watch.scoring import ModelScorer
from ping_llm.watch.state import Bounds, State
from ping_llm.watch.watcher import Watcher

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "out" / "demo"
INTERVAL_S, RESULTS = 1800, 96  # of each pair: two days
ONSETS = 48, 72  # number of the result at which something happens: from, to
LATEST = 12  # a delay above that is not found
KINDS = ("nothing", "outage", "half of the packets lost", "RTT + 20 %", "RTT + 5 %")
WINDOW, LAST = 20, 6  # of the baseline
K = np.geomspace(2, 2000, 61)
LEAST_MAD = 1e-3  # of the median
QUICK_PAIRS = 10
BATCH = 256


@dataclass(frozen=True)
class Case:
    """A pair, what happens to it, and when: the time of its first odd result, or of the end of all."""

    kind: str
    onset_s: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="run folder of a trained model")
    parser.add_argument("--dump", type=Path, help="synthetic dump that it learned from")
    parser.add_argument("--pairs", type=int, default=160, help="pairs that are watched")
    parser.add_argument("--at", type=float, default=0.001, help="p-value at which an anomaly opens")
    parser.add_argument("--src-known", default="whole", help="how much of the sources is known, as for ping-llm watch")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the forward passes")
    parser.add_argument("--quick", action="store_true", help="10 pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and of what happens to them")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)
    torch.set_num_threads(options.threads)
    model, truth, name = load(options.model, options.dump, options.precision)
    lines, cases = happenings(truth, QUICK_PAIRS if options.quick else options.pairs, options.seed)
    device = f"{device_name(model.device)} in {model.precision}, {options.threads} threads"
    print(f"{name} on {device}; {len(cases)} pairs, {len(lines):,} lines")
    with tempfile.TemporaryDirectory(prefix="ping-llm-") as scratch:
        results = sorted(parse(lines, Path(scratch) / "lines")[0], key=lambda result: result.time_s)
        opened, seconds = watched(model, lines, Path(scratch), Rule(options.at), options.src_known)
    watch = judged(cases, results, opened)
    numbers = {"watch": watch, "baseline": best_baseline(cases, results, watch["false_alarms"])}
    for label, one in numbers.items():
        print(f"\n{label} {one.get('settings', '')}: {one['false_alarms']} false alarms in {one['clean']:,} results")
        for kind in KINDS[1:]:
            own = one["found"][kind]
            print(f"{kind:28}{own['found']:4} of {own['of']:<4} delay median {own['median']}, 90 % {own['q90']}")
    print(f"\n{1e3 * seconds / len(results):.1f} ms of the processor for each result")
    if options.json:
        about = {
            "model": name,
            "precision": model.precision,
            "pairs": len(cases),
            "results": len(results),
            "ms_a_result": 1e3 * seconds / len(results),
        }
        options.json.write_text(json.dumps(about | numbers, indent=1) + "\n")


def load(
    run: Path | None, dump: Path | None, precision: Literal["fp32", "bf16"] = "fp32"
) -> tuple[PingModel, Truth, str]:
    """The model, the Internet it learned from, and what to call it; without a demo, an untrained one of a small Internet."""
    if run or (DEMO / "run" / "checkpoints").exists():
        path = run or DEMO / "run"
        return PingModel.load(path, "cpu", precision), Truth.load(dump or DEMO / "dump"), f"model of {path}"
    gpt = GPT(load_config(ROOT / "configs" / "tiny.toml").model, generator=torch.Generator().manual_seed(0))
    world = build_world(0, 8, 6)
    world["schedule"] = {"start_s": 1_767_225_600, "end_s": 1_767_225_600, "interval_s": 3600, "measured_share": 1.0}
    return (
        PingModel(gpt.eval(), torch.device("cpu"), precision=precision),
        Truth(world),
        "untrained model of the size of tiny",
    )


def happenings(truth: Truth, pairs: int, seed: int) -> tuple[list[bytes], dict[tuple[str, str], Case]]:
    """Lines of the pings of some pairs in time order, and what happens to each pair, by source and destination."""
    schedule = truth.world["schedule"]
    end_s = schedule["end_s"] + RESULTS * INTERVAL_S
    later = schedule | {"start_s": schedule["end_s"], "end_s": end_s, "interval_s": INTERVAL_S}
    dump, rng = Dump(truth.world | {"schedule": later}, Path()), np.random.default_rng(seed)
    answering = np.flatnonzero(dump.paths.dark_loss == 0)
    chosen = rng.choice(answering, min(pairs, len(answering)), replace=False)
    kind_of = np.full(len(dump.pairs[0]), -1)
    kind_of[chosen] = np.arange(len(chosen)) % len(KINDS)
    onset = later["start_s"] + dump.phase_s + INTERVAL_S * rng.integers(*ONSETS, len(kind_of))
    number = np.full((dump.pairs[0].max() + 1, dump.pairs[1].max() + 1), -1)
    number[dump.pairs] = np.arange(len(kind_of))
    parts = []
    for i in range(dump.files):
        for results, new in dump.contents(i):
            pair = number[results.probe, results.measurement]
            rows = np.flatnonzero(new & (kind_of[pair] >= 0))
            parts.append(odd(results.take(rows), kind_of[pair[rows]], onset[pair[rows]], rng))
    everything = Results(
        *(np.concatenate(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True))
    )
    everything = everything.take(np.argsort(everything.time_s, kind="stable"))
    cases = {}
    for at in chosen:
        probe, target = truth.world["probes"][dump.pairs[0][at]], truth.world["measurements"][dump.pairs[1][at]]
        ends = probe["ipv6" if target["ip_version"] == 6 else "ipv4"], target["dst_addr"]
        kind = KINDS[kind_of[at]]
        cases[ends] = Case(kind, end_s if kind == "nothing" else int(onset[at]))
    return [line.encode() + b"\n" for line in dump.writer.lines(everything)], cases


def odd(results: Results, kind: np.ndarray, onset_s: np.ndarray, rng: np.random.Generator) -> Results:
    """The results with what happens from the onset of each on."""
    begun = (results.time_s >= onset_s)[:, None]
    rtt_ms = results.rtt_ms.copy()
    for number, name in enumerate(KINDS):
        here = begun & (kind == number)[:, None]
        if name == "outage":
            rtt_ms[np.broadcast_to(here, rtt_ms.shape)] = -1
        elif name.startswith("half"):
            rtt_ms[here & (rng.random(rtt_ms.shape) < 0.5)] = -1
        elif name.startswith("RTT"):
            rtt_ms = np.where(here & (rtt_ms > 0), np.round(rtt_ms * (1 + float(name.split()[2]) / 100), 6), rtt_ms)
    return replace(results, rtt_ms=rtt_ms, dup_ms=np.full_like(rtt_ms, -1))


def watched(
    model: PingModel, lines: Sequence[bytes], folder: Path, rule: Rule, src_known: str
) -> tuple[list[tuple[tuple[str, str], int]], float]:
    """Pair and time of every anomaly that opened, and how many seconds of the processor that took."""
    found: list[tuple[tuple[str, str], int]] = []
    begin = time.process_time()
    with State(folder / "state", folder / "out.jsonl", Bounds()) as state:
        watcher = Watcher(state, ModelScorer(model, src_known), rule, folder)
        for at in range(0, len(lines), BATCH):
            events = watcher.take(lines[at : at + BATCH]).events
            found += [((e["src"], e["dst"]), int(parse_time(e["time"]))) for e in events if e["event"] == "opened"]
            say(f"{min(at + BATCH, len(lines)):,} of {len(lines):,} lines, {time.process_time() - begin:.0f} s")
    return found, time.process_time() - begin


def judged(
    cases: dict[tuple[str, str], Case], results: Sequence[Result], opened: Sequence[tuple[tuple[str, str], int]]
) -> dict[str, Any]:
    """False alarms, and of each kind how many were found and after how many results, of anomalies that opened at a time."""
    times = defaultdict(list)
    for result in results:
        times[ends(result)].append(result.time_s)
    first: dict[tuple[str, str], list[int]] = defaultdict(list)
    for pair, time_s in opened:
        first[pair].append(time_s)
    false_alarms = sum(time_s < cases[pair].onset_s for pair, time_s in opened)
    clean = sum(time_s < cases[pair].onset_s for pair, own in times.items() for time_s in own)
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS[1:]:
        pairs = [pair for pair, case in cases.items() if case.kind == kind]
        delays = []
        for pair in pairs:
            since = np.sort([time_s for time_s in times[pair] if time_s >= cases[pair].onset_s])
            after = [time_s for time_s in first[pair] if time_s >= cases[pair].onset_s]
            if after and (delay := int(np.searchsorted(since, min(after), "right"))) <= LATEST:
                delays.append(delay)
        middle, late = (float(np.quantile(delays, q, method="higher")) if delays else None for q in (0.5, 0.9))
        found[kind] = {"of": len(pairs), "found": len(delays), "median": middle, "q90": late}
    return {"false_alarms": false_alarms, "clean": clean, "found": found}


def best_baseline(cases: dict[tuple[str, str], Case], results: Sequence[Result], false_alarms: int) -> dict[str, Any]:
    """The baseline with the best m, and for each m the least k that gives at most so many false alarms."""
    by_pair: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        by_pair[ends(result)].append(result)
    best: tuple[tuple[float, float], dict[str, Any]] | None = None
    for m in (1, 2, 3):
        for k in K:
            opened = [(pair, at) for pair, own in by_pair.items() for at in rolling(own, k, m)]
            one = judged(cases, results, opened)
            if one["false_alarms"] <= false_alarms:
                break
        found = one["found"].values()
        rank = (sum(kind["found"] for kind in found), -sum(kind["median"] or LATEST for kind in found))
        if one["false_alarms"] <= false_alarms and (best is None or rank > best[0]):
            best = rank, one | {"settings": f"m = {m}, k = {k:.3g}"}
    if best is None:  # losses alone give more, whatever k is: the settings with the fewest are shown
        return one | {"settings": f"m = {m}, k = {k:.3g}"}
    return best[1]


def rolling(results: Sequence[Result], k: float, m: int) -> list[int]:
    """The times at which an anomaly of a pair opens, by the rolling median ± k · MAD; it ends after six that are not odd."""
    past: list[float] = []
    odd_ones: list[bool] = []
    opened, times, normal = False, [], 0
    for result in results:
        rtt_ms = sorted(result.rtt_ms)[(len(result.rtt_ms) - 1) // 2]
        is_odd = rtt_ms < 0
        if len(past) >= LAST and not is_odd:
            middle = float(np.median(past))
            mad = max(float(np.median(np.abs(np.array(past) - middle))), LEAST_MAD * middle)
            is_odd = abs(rtt_ms - middle) > k * mad
        if not is_odd:
            past = [*past, rtt_ms][-WINDOW:]
        odd_ones, normal = [*odd_ones, is_odd][-LAST:], 0 if is_odd else normal + 1
        if not opened and sum(odd_ones) >= m:
            opened = True
            times.append(result.time_s)
        elif opened and normal >= LAST:
            opened, odd_ones = False, []
    return times


def ends(result: Result) -> tuple[str, str]:
    """Source and destination."""
    return format_address(result.src), format_address(result.dst)


if __name__ == "__main__":
    sys.exit(exit_code(main))
