"""Prints how fast exact RTT distributions are computed.

    python scripts/bench_inference.py [--model RUN] [--quick] [--json FILE]

Two ratios, each of two things in the same run: one exact distribution against 200 results drawn by plain generation, a
token at a time and without a cache; and `batch` on many queries that share contexts against a loop of single queries.
The model is that of RUN, else that of `make demo`, else an untrained one of the size of tiny, of which no byte can be
skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ping_llm.cli import exit_code
from ping_llm.config import load_config
from ping_llm.data import tokenization as tk
from ping_llm.inference.context import Context
from ping_llm.inference.model import PingModel
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.query import Query
from ping_llm.model.gpt import GPT
from ping_llm.system.files import try_file
from ping_llm.system.hardware import pick_device

ROOT = Path(__file__).parents[1]
DRAWS = 200
CONTEXT_MEASUREMENTS = 10
SOURCES = 20
EFFORT = {"queries": 10_000, "singles": 100, "rounds": 10}
QUICK = {"queries": 2_000, "singles": 20, "rounds": 3}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="run folder of a trained model")
    parser.add_argument("--quick", action="store_true", help="2,000 queries instead of 10,000, and fewer repetitions")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the forward passes")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)
    model, name = load(options.model, options.device, options.precision)
    effort = QUICK if options.quick else EFFORT
    print(f"{name}, {model.device.type} in {model.precision}, {torch.get_num_threads()} threads")

    numbers = against_sampling(model, effort["rounds"])
    numbers |= batch_against_loop(model, effort["queries"], effort["singles"])
    for line in report(numbers):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(numbers | {"model": name, "precision": model.precision}, indent=1) + "\n")


def load(run: Path | None, device: str, precision: str) -> tuple[PingModel, str]:
    """The model to measure, and what to call it."""
    demo = ROOT / "out" / "demo" / "run"
    if run or (demo / "checkpoints").exists():
        return PingModel.load(run or demo, device, precision), f"model of {run or demo.relative_to(ROOT)}"
    gpt = GPT(load_config(ROOT / "configs" / "tiny.toml").model, generator=torch.Generator().manual_seed(0))
    chosen = pick_device(device)
    return PingModel(gpt.to(chosen).eval(), chosen, precision=precision), "untrained model of the size of tiny"


def against_sampling(model: PingModel, rounds: int) -> dict[str, float]:
    """One distribution with a context against DRAWS draws of its result; one draw is measured, for each costs the same."""
    context, queries = make_queries(np.random.default_rng(0), rounds, sources=1)
    queries = [Query.parse(q["src_addr"], q["dst_addr"], q["event_time"], Context.parse(context)) for q in queries]
    exact_s = median_s(lambda q: model.rtt_many([q], "all"), queries)
    draw_s = median_s(lambda q: draw_result(model, q), queries)
    return {"exact_law_ms": 1e3 * exact_s, "draw_ms": 1e3 * draw_s, "speedup_vs_sampling": DRAWS * draw_s / exact_s}


@torch.inference_mode()
def draw_result(model: PingModel, query: Query) -> list[int]:
    """One result drawn token by token; each reads the whole sequence anew."""
    tokens, drawn = build_prompt(query, model.gpt.config.seq_len).tokens.tolist(), []
    while len(drawn) < 3 and drawn[:1] != [tk.FAILED]:
        legal = [tk.RTT_START, tk.FAILED] if not drawn else range(tk.BYTE_0, tk.VOCAB_SIZE)
        with model.autocast():
            logits = model.gpt(torch.tensor([tokens + drawn], device=model.device))[0, -1, list(legal)]
        drawn.append(legal[int(torch.multinomial(logits.softmax(-1), 1))])
    return drawn


def batch_against_loop(model: PingModel, count: int, singles: int) -> dict[str, float]:
    """Queries of SOURCES sources, each with its context; and queries without context."""
    context, queries = make_queries(np.random.default_rng(1), count, SOURCES)
    table = pa.Table.from_pylist(queries)
    batch_s = seconds(lambda: model.rtt_many(table, src_known="all", context=context)) / count
    sources = set(table["src_addr"].to_pylist())
    by_source = {src: context.filter(pc.equal(context["src_addr"], src)) for src in sources}

    def single(query: dict) -> dict:
        earlier = by_source[query["src_addr"]]
        return model.rtt(query["src_addr"], query["dst_addr"], query["event_time"], earlier, src_known="all").to_dict()

    chosen = [queries[i] for i in np.linspace(0, count - 1, singles).astype(int)]
    single(chosen[0])
    single_s = seconds(lambda: [single(query) for query in chosen]) / singles
    alone_s = seconds(lambda: model.rtt_many(table, src_known="all")) / count
    return {
        "single_ms": 1e3 * single_s,
        "batch_ms": 1e3 * batch_s,
        "batch_speedup": single_s / batch_s,
        "queries_per_s": 1 / alone_s,
        "queries_per_s_with_context": 1 / batch_s,
    }


def make_queries(rng: np.random.Generator, count: int, sources: int) -> tuple[pa.Table, list[dict]]:
    """Earlier measurements of some sources, and later queries of them."""
    ends = rng.integers(1, 224, (500, 4))
    addresses = [".".join(map(str, end)) for end in ends]
    earlier = [
        {"src_addr": addresses[s], "dst_addr": addresses[100 + rng.integers(400)], "rtt": float(rng.lognormal(4, 0.7))}
        | {"event_time": 1_700_000_000 + 240 * i}
        for s in range(sources)
        for i in range(CONTEXT_MEASUREMENTS)
    ]
    later = [
        {"src_addr": addresses[rng.integers(sources)], "dst_addr": addresses[100 + rng.integers(400)]}
        | {"event_time": 1_700_010_000 + int(rng.integers(3600))}
        for _ in range(count)
    ]
    return pa.Table.from_pylist(earlier), later


def median_s(function: Callable, arguments: list) -> float:
    """Median seconds of a call, after one that is not counted."""
    function(arguments[0])
    return float(np.median([seconds(lambda a=a: function(a)) for a in arguments]))


def seconds(function: Callable[[], object]) -> float:
    """Wall time of a call; answers come back to the CPU, so nothing is still under way."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def report(numbers: dict[str, float]) -> list[str]:
    """What is printed."""
    return [
        f"one distribution, {CONTEXT_MEASUREMENTS} earlier pings         {numbers['exact_law_ms']:8.2f} ms",
        f"one draw of its result, token by token  {numbers['draw_ms']:8.2f} ms",
        f"distribution against {DRAWS} draws          {numbers['speedup_vs_sampling']:8.1f} ×",
        f"a query in a loop                       {numbers['single_ms']:8.2f} ms",
        f"a query in a batch, shared contexts     {numbers['batch_ms']:8.2f} ms",
        f"batch against the loop                  {numbers['batch_speedup']:8.1f} ×",
        f"queries a second without context        {numbers['queries_per_s']:8.0f}",
        f"queries a second with context           {numbers['queries_per_s_with_context']:8.0f}",
    ]


if __name__ == "__main__":
    sys.exit(exit_code(main))
