"""Prints how fast measurements are scored in windows, against a prompt and a whole distribution for each.

    python scripts/bench_score.py [--model RUN] [--rows ROWS] [--quick] [--precision bf16] [--json FILE]

Both score the same measurements in the same run, in turn, several times; times are of the processor, so that other work on
the machine counts little. The windows hold at least `history` earlier measurements of each, a prompt holds exactly 10. The
model is that of RUN, else that of `make demo`, else an untrained one of the size of tiny; the measurements are those of
test-s1 of ROWS, else of its rows, else made up.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from ping_llm.cli import exit_code
from ping_llm.config import load_config
from ping_llm.data.rows import RowReader
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.mixture import distributions
from ping_llm.inference.model import PingModel
from ping_llm.inference.packed import Foreseen, Windows, foresee
from ping_llm.inference.score import HISTORY
from ping_llm.inference.table import History
from ping_llm.model.gpt import GPT
from ping_llm.system.files import try_file
from ping_llm.system.hardware import device_name, pick_device

ROOT = Path(__file__).parents[1]
PROMPT_HISTORY = 10
DEMO = ROOT / "out" / "demo"
QUICK_COUNT = 60
FIRST, EVERY = 7, 15  # of the measurements, those that prompts answer for
LEAST_COUNT = FIRST + EVERY + 1  # of two of them NLLs can be correlated


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="run folder of a trained model")
    parser.add_argument("--rows", type=Path, help="rows whose test-s1 is scored")
    parser.add_argument("--quick", action="store_true", help="60 measurements in one round instead of 300 in three")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the forward passes")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)
    torch.set_num_threads(options.threads)
    model, name = load(options.model, options.device, options.precision)
    rows = options.rows or (DEMO / "rows" if (DEMO / "rows" / "manifest.json").exists() else None)
    count, rounds = (QUICK_COUNT, 1) if options.quick else (300, 3)
    measured = made_up(count) if rows is None else of_rows(rows, count)
    print(f"{name} on {device_name(model.device)} in {model.precision}, {options.threads} threads")
    print(f"{len(measured)} measurements of {'no rows, made up' if rows is None else rows}, median of {rounds} rounds")
    print(
        f"{'':38}{'prompts':>10}{'windows':>10}{'ratio':>8}{'spread':>14}{'r of NLL':>10}{'mean NLL':>16}", flush=True
    )
    found = []
    for src_known in ("all", "auto"):
        for line in compare(model, measured, src_known, (HISTORY, PROMPT_HISTORY), rounds):
            print(
                f"src-known {src_known:4}, history {line['history']:2}, {line['mean_history']:4.1f} on average "
                f"{line['prompts_ms']:9.2f}{line['windows_ms']:10.2f}{line['ratio']:7.1f}×"
                f"{line['least_ratio']:7.1f}–{line['most_ratio']:<6.1f}{line['nll_correlation']:10.4f}"
                f"{line['prompts_nll']:9.4f} {line['windows_nll']:.4f}",
                flush=True,
            )
            found.append(line)
    print("ms of processor time for each measurement")
    if options.json:
        options.json.write_text(
            json.dumps({"model": name, "precision": model.precision, "cases": found}, indent=1) + "\n"
        )


def load(run: Path | None, device: str, precision: str) -> tuple[PingModel, str]:
    """The model to measure, and what to call it."""
    if run or (DEMO / "run" / "checkpoints").exists():
        path = run or DEMO / "run"
        return PingModel.load(path, device, precision), f"model of {path}"
    gpt = GPT(load_config(ROOT / "configs" / "tiny.toml").model, generator=torch.Generator().manual_seed(0))
    chosen = pick_device(device)
    return PingModel(gpt.to(chosen).eval(), chosen, precision=precision), "untrained model of the size of tiny"


def of_rows(folder: Path, count: int) -> Context:
    """The first measurements of the IPv4 sources of test-s1, at most a quarter of them of one row; ValueError if they are
    too few to compare."""
    parts = []
    for row in RowReader(folder, "test-s1"):
        table = row.to_measurements()
        of_ipv4 = table.filter(pc.equal(table.column("ip_version"), 4)).slice(0, -(-count // 4))
        parts += [Context.of_measurements(of_ipv4)] if len(of_ipv4) else []
        if sum(map(len, parts)) >= count:
            break
    if sum(map(len, parts)) < LEAST_COUNT:
        found = f"{sum(map(len, parts))} measurements of IPv4 sources in test-s1"
        raise ValueError(f"{folder} holds only {found}, fewer than {LEAST_COUNT}; name other rows with --rows")
    names = ("src", "dst", "rtt_ms", "time_s")
    return Context(*(np.concatenate([getattr(part, name) for part in parts]) for name in names)).take(slice(count))


def made_up(count: int) -> Context:
    """Measurements of four sources, a minute apart."""
    rng = np.random.default_rng(0)
    rows = [
        {"src_addr": f"192.0.2.{1 + i % 4}", "dst_addr": f"198.51.100.{rng.integers(1, 200)}"}
        | {"rtt": float(rng.lognormal(3)), "event_time": 1_700_000_000 + 15 * i}
        for i in range(count)
    ]
    return Context.parse(rows)


def compare(
    model: PingModel, measured: Context, src_known: str, histories: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Times and answers of both ways on the same measurements, for each history of the windows; the prompts answer for one
    in 15."""
    some, times = np.arange(FIRST, len(measured), EVERY), []
    for _ in range(rounds):
        prompts_s, alone = seconds(lambda: with_prompts(model, measured, some, src_known))
        of_windows = [seconds(lambda h=history: scored(model, measured, h, src_known)) for history in histories]
        times.append([prompts_s / len(some), *(own_s / len(measured) for own_s, _ in of_windows)])
    by_prompt, *by_window = np.array(times).T  # (rounds,) each
    lines = []
    for history, own, (_, (rows, packed)) in zip(histories, by_window, of_windows, strict=True):
        nll = packed.nll_nats[np.argsort(rows)][some]
        queries = Windows(measured, history, model.seq_len).queries(range(len(measured)))
        line = {"src_known": src_known, "history": history}
        line |= {"mean_history": float(np.mean([len(query.context) for query in queries]))}
        line |= {"prompts_ms": 1e3 * float(np.median(by_prompt)), "windows_ms": 1e3 * float(np.median(own))}
        ratios = by_prompt / own
        line |= {"ratio": float(np.median(ratios)), "least_ratio": float(ratios.min())}
        line |= {"most_ratio": float(ratios.max())}
        line |= {"nll_correlation": float(np.corrcoef(nll, alone.nll_nats)[0, 1])}
        line |= {"prompts_nll": float(alone.nll_nats.mean()), "windows_nll": float(nll.mean())}
        lines.append(line)
    return lines


def scored(model: PingModel, measured: Context, history: int, src_known: str) -> tuple[np.ndarray, Foreseen]:
    """What `score` computes of all measurements."""
    rows, found = foresee(model, Windows(measured, history, model.seq_len), src_known)
    return rows, touch(found)


def with_prompts(model: PingModel, measured: Context, rows: np.ndarray, src_known: str) -> Foreseen:
    """The same of some of them, from a prompt and a whole distribution for each."""
    queries = History(measured, PROMPT_HISTORY).queries(rows)
    foreseen = RTTDistribution.concatenate(list(distributions(model, queries, src_known)))
    return touch(Foreseen.of_distributions(foreseen, measured.rtt_ms[rows]))


def touch(found: Foreseen) -> Foreseen:
    """With all that is read off it computed."""
    assert len(found.nll_nats) == len(found.pit) == len(found.p_value)
    return found


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of a call, and what it returned; on a GPU the time on the wall."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    value = function()
    return clock() - start, value


if __name__ == "__main__":
    sys.exit(exit_code(main))
