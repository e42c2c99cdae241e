"""Small training runs for several test files: their config, made-up batches, and real processes to run them in."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from waiting import HANG_S

from ping_llm.config import Config, ModelConfig, TrainConfig
from ping_llm.model.checkpoint import load_latest
from ping_llm.training.run_state import RunState
from ping_llm.training.trainer import Feed, train

MODEL = ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=64)
TIMING = {"time_s", "tokens_per_s", "data_wait_share", "save_share", "peak_memory_gb"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# Processes forked from one that has imported everything and started no thread: each begins at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ping_llm.training.trainer", "ping_llm.data.loader", "ping_llm.cli", "grain"])


def make_config(run_dir: Path, **train_fields) -> Config:
    defaults = {"total_steps": 12, "batch_size": 8, "checkpoint_every": 6, "eval_every": 6, "eval_windows": 8}
    fields = defaults | {"log_every": 1, "device": "cpu", "precision": "fp32"} | train_fields
    return Config(model=MODEL, train=TrainConfig(run_dir=run_dir, **fields))


def make_windows(count: int, seed: int) -> torch.Tensor:
    """Windows (count, 65) whose RTT follows from the source: five measurements each, the rest is padding."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(11, 267, (count, 5), generator=generator)
    failed = torch.rand(count, 5, generator=generator) < 0.2
    measurement = torch.full((count, 5, 12), 0)
    measurement[..., 1], measurement[..., 2:6] = 1, 200
    measurement[..., 5] = source
    measurement[..., 6], measurement[..., 7] = 3, 99
    measurement[..., 8] = 8
    measurement[..., 9], measurement[..., 10] = 60, source
    measurement[..., 11] = torch.where(failed, 10, 6)
    return F.pad(measurement.flatten(1), (0, 5), value=-1)


def make_batches(
    config: Config, start_step: int, device: torch.device, rank: int, world: int
) -> Iterator[torch.Tensor]:
    """Batch i is a function of i alone."""
    step = start_step
    while True:
        yield make_windows(config.train.batch_size, seed=step)[rank::world].to(device)
        step += 1


def val_windows(config: Config) -> torch.Tensor:
    return make_windows(config.train.eval_windows, seed=10**6)


def run(config: Config, load_batches=make_batches) -> RunState:
    return train(config, Feed(load_batches, val_windows, lambda config: None))


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in TIMING} for line in metrics(run_dir)]


def assert_same_weights(one: Path, other: Path) -> None:
    """Model, optimiser and random state of the newest checkpoints of two run folders are the same to the bit."""
    first, second = load_latest(one), load_latest(other)
    assert first.step == second.step
    for a, b in ((first.model, second.model), (first.optimizer, second.optimizer)):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_config(path: Path, rows: Path, **train_fields) -> Path:
    """A TOML file of a small run on rows; gentle rates, so that rounding is not amplified from step to step."""
    defaults = {"total_steps": 12, "batch_size": 8, "checkpoint_every": 6, "eval_every": 6, "eval_windows": 8}
    defaults |= {"eval_queries": 6, "sample_every": 0, "log_every": 1, "device": "cpu", "precision": "fp32"}
    fields = {"run_dir": str(path.parent / "run")} | defaults | train_fields
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    sections = [
        "[model]\nn_layer = 2\nn_embd = 32\nn_head = 2\nseq_len = 64",
        f"[data]\nrows = '{rows}'\nwindows_per_read = 3",
        "[optim]\nembedding_lr = 0.01\nhead_lr = 0.001",
        "\n".join(["[train]", *lines]),
    ]
    path.write_text("\n".join(sections) + "\n")
    return path


def start(config: Path, *options, world: int = 1, **popen) -> subprocess.Popen:
    """`ping-llm train` as a user starts it; by torchrun for several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    argv = [sys.executable, *launcher, "-m", "ping_llm.train", str(config), *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, env=ENVIRONMENT, **pipes, **popen)


def finish(process: subprocess.Popen, timeout_s: float = HANG_S) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    try:
        out, errors = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, errors


def wait_until(condition: Callable[[], bool], process, timeout_s: float = HANG_S, every_s: float = 0.01) -> None:
    """Polls until `condition()`; an AssertionError if `process` ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        ended = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        assert ended is None, f"ended with {ended}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every_s)


def last_step(run_dir: Path) -> int:
    """Of metrics.jsonl; −1 if it has no line."""
    lines = metrics(run_dir)
    return lines[-1]["step"] if lines else -1


def error_lines(errors: str) -> list[str]:
    """What our program says, amid what torchrun says."""
    return re.findall(r"^(?:\[\w+\]:)?(error: .*)$", errors, re.MULTILINE)


class Clock:
    """Stands in for the module `time` of the trainer: each look at it takes a second."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


def alone(function: Callable, *args):
    """What `function(*args)` returns in a process of its own, which uses one thread."""
    with ProcessPoolExecutor(1, mp_context=FORKS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *args).result(timeout=HANG_S)


def gang(world: int, function: Callable, *args) -> list:
    """What `function(*args)` returns in each of `world` processes that torchrun could have started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(world, mp_context=FORKS) as pool:
        answers = [pool.submit(_join_gang, rank, world, port, function, args) for rank in range(world)]
        return [answer.result(timeout=HANG_S) for answer in answers]


def _join_gang(rank: int, world: int, port: int, function: Callable, args: tuple):
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    return function(*args)
