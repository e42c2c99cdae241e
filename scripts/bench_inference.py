"""Prints how fast exact RTT distributions are computed.

    python scripts/bench_inference.py [--model RUN] [--quick] [--json FILE]

Ratios of two things that are timed in turn, one call of each after the other, as often as --rounds says; printed are the
median ratio and the range of all. The threads of the process are fixed and wait without spinning: threads that spin
between the small steps of single queries take more time than the steps.

- a table of queries (`batch`) against a loop of single ones, which give whole distributions; without context, and with
  contexts of 10 measurements that 20 queries share
- a whole distribution against the statistics that `batch` gives of it
- a destination prefix that ends within a byte against one that does not
- one result drawn by plain generation, a token at a time and without a cache, against a distribution

The model is that of RUN, else that of `make demo`, else an untrained one of the size of tiny, of which no byte can be
skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ping_llm.cli import exit_code
from ping_llm.config import load_config
from ping_llm.data import tokenization as tk
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import QUANTILES
from ping_llm.inference.engine import Focus
from ping_llm.inference.model import PingModel
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.query import Query
from ping_llm.model.gpt import GPT
from ping_llm.system.files import try_file
from ping_llm.system.hardware import pick_device

ROOT = Path(__file__).parents[1]
CONTEXT_MEASUREMENTS = 10
QUERIES_OF_A_SOURCE = 20
THREADS = int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1)))
SINGLES = 10  # queries of the loop in one round
QUERIES, QUICK_QUERIES, QUICK_ROUNDS = 1_000, 200, 2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="run folder of a trained model")
    parser.add_argument("--quick", action="store_true", help="200 queries instead of 1,000, and 2 rounds")
    parser.add_argument("--rounds", type=int, default=7, help="how often each pair is timed")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the forward passes")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)
    torch.set_num_threads(THREADS)
    model, name = load(options.model, options.device, options.precision)
    count, rounds = (QUICK_QUERIES, QUICK_ROUNDS) if options.quick else (QUERIES, options.rounds)
    print(f"{name}, {model.device.type} in {model.precision}, {torch.get_num_threads()} threads, {rounds} rounds")

    print(f"{'':46}{'ms':>9}{'ms':>9}{'ratio':>8}{'range':>16}")
    numbers = {}
    for label, one, other, per in comparisons(model, count):
        one_ms, other_ms = (
            1e3 * seconds / size for seconds, size in zip(in_turn(one, other, rounds), per, strict=True)
        )
        ratio = one_ms / other_ms
        numbers[label] = {"ms": [float(np.median(one_ms)), float(np.median(other_ms))], "ratios": ratio.tolist()}
        medians = f"{np.median(one_ms):9.2f}{np.median(other_ms):9.2f}{np.median(ratio):8.2f}"
        print(f"{label:46}{medians}{f'{ratio.min():.2f}–{ratio.max():.2f}':>16}", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"model": name, "precision": model.precision, "threads": THREADS} | numbers, indent=1) + "\n"
        )


def in_turn(one: Callable[[], object], other: Callable[[], object], rounds: int) -> np.ndarray:
    """Seconds of each call, (2, rounds), one after the other, after a call of each that does not count."""
    one(), other()
    return np.array([[seconds(call) for call in (one, other)] for _ in range(rounds)]).T


def comparisons(
    model: PingModel, count: int
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object], tuple[int, int]]]:
    """What is compared: a name, the slower, the faster, and how many queries each answers."""
    context, queries = make_queries(np.random.default_rng(1), count, count // QUERIES_OF_A_SOURCE)
    table, of_source = pa.Table.from_pylist(queries), dict.fromkeys(query["src_addr"] for query in queries)
    by_source = {src: context.filter(pc.equal(context["src_addr"], src)) for src in of_source}
    some = [queries[i] for i in np.linspace(0, count - 1, SINGLES).astype(int)]

    def loop(with_context: bool) -> Callable[[], object]:
        given = [(*query.values(), by_source[query["src_addr"]] if with_context else None) for query in some]
        return lambda: [model.rtt(*each, src_known="all").to_dict() for each in given]

    yield "loop ÷ batch", loop(False), partial(model.rtt_many, table, "all"), (SINGLES, count)
    shared = partial(model.rtt_many, table, "all", context)
    yield "loop ÷ batch, contexts shared by 20", loop(True), shared, (SINGLES, count)
    parsed = [Query.parse(q["src_addr"], q["dst_addr"], q["event_time"]) for q in some]
    statistics_of = Focus(np.array(QUANTILES))
    for known in ("all", "auto"):
        whole, wanted = (partial(answer, model, parsed[:1], known, focus) for focus in (None, statistics_of))
        yield f"whole distribution ÷ its statistics, {known}", whole, wanted, (1, 1)
    address = parsed[0].dst
    assert address is not None
    network = ".".join(str(address).split(".")[:2]) + ".0.0"
    of_prefix = {
        bits: partial(answer, model, [Query.parse(some[0]["src_addr"], f"{network}/{bits}")], "auto", statistics_of)
        for bits in (16, 17, 20)
    }
    for bits in (17, 20):
        yield f"destination /{bits} ÷ /16, auto", of_prefix[bits], of_prefix[16], (1, 1)
    with_context = Query.parse(*some[0].values(), Context.parse(by_source[some[0]["src_addr"]]))
    drawn, exact = partial(draw_result, model, with_context), partial(answer, model, [with_context], "all", None)
    yield "a draw ÷ a distribution, context of 10", drawn, exact, (1, 1)


def answer(model: PingModel, queries: list[Query], known: str, focus: Focus | None) -> list[np.ndarray]:
    """The quantiles that `batch` gives."""
    return [found.quantile(np.array(QUANTILES)) for found in model.distributions(queries, known, focus)]


def load(run: Path | None, device: str, precision: str) -> tuple[PingModel, str]:
    """The model to measure, and what to call it."""
    demo = ROOT / "out" / "demo" / "run"
    if run or (demo / "checkpoints").exists():
        return PingModel.load(run or demo, device, precision), f"model of {run or demo.relative_to(ROOT)}"
    gpt = GPT(load_config(ROOT / "configs" / "tiny.toml").model, generator=torch.Generator().manual_seed(0))
    chosen = pick_device(device)
    return PingModel(gpt.to(chosen).eval(), chosen, precision=precision), "untrained model of the size of tiny"


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


def seconds(function: Callable[[], object]) -> float:
    """Time of a call: of the processor or, on a GPU, on the wall; answers come back to the CPU, so nothing is under way."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    function()
    return clock() - start


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # it is read when torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    sys.exit(exit_code(main))
