"""Prints how fast `ping-llm serve` answers on the loopback interface, beside the library itself.

    python scripts/bench_serve.py [--model RUN] [--clients 1 8 64] [--quick] [--json FILE]
    python scripts/bench_serve.py [--model RUN] --soak 10

For each number of clients, each of which sends its next query once it has the answer to the last: median and 99th
percentile of the latency, and queries/s beside those of the library for the same queries in one call, in this process,
with as many threads. The two are measured in turn, as often as --rounds says; printed are the median ratio and the range
of all, and the processor's time of each for a query, which other work on the machine changes less.
Whole distributions (`rtt_many` of a list, and its statistics) and statistics (`batch`, of the service `quick`) are told
apart.

--soak keeps 8 clients at it for so many minutes, of which some leave before their answer, send what is no query, or stop
within a body, and prints memory and open files of the service over time.

The model is that of RUN, else that of `make demo`, else an untrained one of the size of tiny.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ping_llm.cli import exit_code
from ping_llm.config import Config, load_config
from ping_llm.inference.answers import rtt_answer
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Query
from ping_llm.model.checkpoint import save, save_config
from ping_llm.model.gpt import GPT
from ping_llm.system.files import try_file

ROOT = Path(__file__).parents[1]
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
LEAST_QUERIES, QUICK_QUERIES = 64, 16  # of a round; with many clients, two for each
PATIENCE_S = 600
KINDS = {"whole": False, "statistics": True}
"""Whether they are the quick ones, by name."""
SOAK_CLIENTS = 8
SOAK_EVERY_S = 15.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="run folder of a trained model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="how many ask at a time")
    parser.add_argument("--answers", nargs="+", choices=KINDS, default=[*KINDS], help="which of the two kinds")
    parser.add_argument("--rounds", type=int, default=3, help="how often service and library are timed in turn")
    parser.add_argument("--quick", action="store_true", help="few queries, one round")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes of load, after which nothing else is measured")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(argv)
    try_file(options.json)
    torch.set_num_threads(THREADS)
    with (
        tempfile.TemporaryDirectory(prefix="ping-llm-") as scratch,
        serving(run_of(options.model, Path(scratch))) as service,
    ):
        run, port, pid = service
        if options.soak:
            numbers = soak(port, pid, 60 * options.soak)
        else:
            rounds = 1 if options.quick else options.rounds
            numbers = load(
                PingModel.load(run, "cpu"), port, pid, options.answers, options.clients, rounds, options.quick
            )
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


def run_of(run: Path | None, scratch: Path) -> Path:
    """The run folder whose model is measured."""
    demo = ROOT / "out" / "demo" / "run"
    if run or (demo / "checkpoints").exists():
        return run or demo
    config = load_config(ROOT / "configs" / "tiny.toml").model
    gpt = GPT(config, generator=torch.Generator().manual_seed(0))
    save_config(scratch, Config(model=config))
    save(scratch, 1, {name: weight.contiguous() for name, weight in gpt.state_dict().items()}, {}, {})
    return scratch


@contextmanager
def serving(run: Path) -> Iterator[tuple[Path, int, int]]:
    """The service as a process of its own: its run folder, port and process id. It has to end well."""
    command = [sys.executable, "-m", "ping_llm", "serve", "--model", str(run), "--device", "cpu", "--port", "0"]
    command += ["--answer-s", str(PATIENCE_S)]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
    assert process.stdout
    try:
        found = re.search(r"http://[^:]+:(\d+)", process.stdout.readline())
        if not found:
            raise ValueError(f"the service did not start: {' '.join(command)}")
        print(f"{run}, cpu, {THREADS} thread{'s' * (THREADS > 1)}")
        yield run, int(found[1]), process.pid
        process.terminate()
        if code := process.wait(timeout=120):
            raise ValueError(f"the service ended with code {code}")
    finally:
        process.kill()
        process.wait()


def load(
    model: PingModel, port: int, pid: int, kinds: Sequence[str], clients: Sequence[int], rounds: int, quick: bool
) -> dict:
    """Latency and queries/s for each number of clients, beside the library."""
    print(
        f"{'':12}{'clients':>8}{'p50 ms':>9}{'p99 ms':>9}{'queries/s':>11}{'library':>9}{'ratio':>7}{'range':>13}",
        end="",
    )
    print(f"{'cpu ms':>8}{'library':>9}")
    numbers: dict[str, dict] = {}
    for name in kinds:
        is_quick = KINDS[name]
        for count in clients:
            queries = make_queries(max(QUICK_QUERIES if quick else LEAST_QUERIES, (1 if quick else 2) * count), count)
            bodies = [json.dumps(query | {"quick": True} if is_quick else query).encode() for query in queries]
            asyncio.run(ask_all(port, bodies[:count], count)), answer_all(model, queries[:count], is_quick)
            latencies: list[float] = []
            taken = []  # of each round: seconds of the service and of the library, and those of the processor
            for _ in range(rounds):
                cpu = cpu_s(pid)
                seconds, each = asyncio.run(ask_all(port, bodies, count))
                latencies += each
                service = (seconds, cpu_s(pid) - cpu)
                begin, cpu = time.perf_counter(), time.process_time()
                answer_all(model, queries, is_quick)
                taken.append((*service, time.perf_counter() - begin, time.process_time() - cpu))
            service_s, service_cpu, own_s, own_cpu = np.median(taken, axis=0) / len(queries)
            ratios = [own / served for served, _, own, _ in taken]
            p50, p99 = (1e3 * float(np.quantile(latencies, q)) for q in (0.5, 0.99))
            one = {"p50_ms": p50, "p99_ms": p99, "queries_per_s": 1 / service_s, "library_queries_per_s": 1 / own_s}
            one |= {"ratios": ratios, "cpu_ms": 1e3 * service_cpu, "library_cpu_ms": 1e3 * own_cpu}
            numbers[f"{name}, {count} clients"] = one
            spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
            print(f"{name:12}{count:8}{p50:9.1f}{p99:9.1f}{1 / service_s:11.1f}{1 / own_s:9.1f}", end="")
            print(f"{np.median(ratios):7.2f}{spread:>13}{1e3 * service_cpu:8.1f}{1e3 * own_cpu:9.1f}", flush=True)
    return numbers


def cpu_s(pid: int) -> float:
    """Processor time that a process has had so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_queries(count: int, seed: int) -> list[dict]:
    """Queries between random hosts."""
    ends = np.random.default_rng(seed).integers(1, 224, (count, 2, 4))
    return [{"src": ".".join(map(str, src)), "dst": ".".join(map(str, dst))} for src, dst in ends]


def answer_all(model: PingModel, queries: Sequence[dict], is_quick: bool) -> object:
    """What the library makes of them in one call: statistics as in the answers of the service."""
    if is_quick:
        columns = {"src_addr": [query["src"] for query in queries], "dst_addr": [query["dst"] for query in queries]}
        return model.rtt_many(pa.table(columns))
    parsed = [Query.parse(query["src"], query["dst"]) for query in queries]
    return [rtt_answer(found, 0) for found in model.rtt_many(parsed)]


async def ask_all(port: int, bodies: Sequence[bytes], clients: int) -> tuple[float, list[float]]:
    """Seconds that all queries take together, and each, asked by so many clients on a connection of their own."""
    waiting, latencies = iter(bodies), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in waiting:
            begin = time.perf_counter()
            status, answer = await ask(reader, writer, body)
            if status != 200:
                raise ValueError(f"the service answered {status}: {answer[:200]!r}")
            latencies.append(time.perf_counter() - begin)
        writer.close()

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - begin, latencies


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to a query; a client that costs less than the service."""
    writer.write(request_of(body))
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length, head
    return int(head.split()[1]), await reader.readexactly(int(length[1]))


def request_of(body: bytes) -> bytes:
    head = f"POST /v1/rtt HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def soak(port: int, pid: int, seconds: float) -> dict:
    """Memory and open files of the service over time, under load of good and bad clients."""
    print(
        f"{'s':>6}{'RSS MB':>9}{'open files':>12}{'threads':>9}{'answers':>10}{'bad':>8}{'left':>8}{'cut':>8}",
        flush=True,
    )
    counts = {"answers": 0, "bad": 0, "left": 0, "cut": 0}
    looks: list[dict] = []

    async def all_of_it() -> None:
        end = time.monotonic() + seconds
        tasks = [asyncio.create_task(soaking(port, end, seed, counts)) for seed in range(SOAK_CLIENTS)]
        begin = time.monotonic()
        while (now := time.monotonic()) < end:
            await asyncio.sleep(min(SOAK_EVERY_S, seconds / 4, end - now))
            looks.append({"s": round(time.monotonic() - begin), **look(pid), **counts})
            print(
                "{s:6}{rss_mb:9.1f}{files:12}{threads:9}{answers:10}{bad:8}{left:8}{cut:8}".format(**looks[-1]),
                flush=True,
            )
        await asyncio.gather(*tasks)

    asyncio.run(all_of_it())
    return {"looks": looks}


async def soaking(port: int, end: float, seed: int, counts: dict[str, int]) -> None:
    """One client after another: most wait for answers, some do not."""
    rng, number = random.Random(seed), 0
    while time.monotonic() < end:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        number += 1
        for query in make_queries(rng.randrange(1, 9), 1000 * seed + number):
            kind = rng.random()
            body = json.dumps(query | {"quick": True}).encode()
            if kind < 0.05:
                writer.write(request_of(body))
                counts["left"] += 1
                break
            if kind < 0.10:
                writer.write(request_of(body)[: -rng.randrange(1, len(body))])
                counts["cut"] += 1
                break
            good = kind > 0.20
            status, _ = await ask(
                reader, writer, body if good else rng.choice([b"{", b"\xff\0", b"[]", b'{"src": "x"}'])
            )
            if status != (200 if good else 400):
                raise ValueError(f"the service answered {status}")
            counts["answers" if good else "bad"] += 1
        writer.close()


def look(pid: int) -> dict[str, float]:
    """Memory, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss_kb, threads = (int(re.search(rf"^{name}:\s*(\d+)", status, re.MULTILINE)[1]) for name in ("VmRSS", "Threads"))  # type: ignore[index]
    return {"rss_mb": rss_kb / 1024, "files": len(os.listdir(f"/proc/{pid}/fd")), "threads": threads}


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # it is read when torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    sys.exit(exit_code(main))
