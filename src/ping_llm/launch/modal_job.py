"""A training command for rented machines in; what it will cost told, its ranks run, every checkpoint handed over out.

Such a machine may be taken away at any time: it says so by a signal, and what was not handed over is lost with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ping_llm
from ping_llm.config import Config, parse_config

POLL_S = 0.2
MAX_GPUS = 8
"""Of one machine."""
SIGNAL, TIME_IS_UP, CANCELLED = "a signal said so", "its time is up", "the call was cancelled"


@dataclass(frozen=True)
class Order:
    """A run, as its user asks for it."""

    config: Config
    toml: str
    options: list[str]  # of training, on the rented machine
    gpu: str  # of the price table
    gpus: int
    tokens_per_s: float  # measured; 0 = not
    wandb_secret: str
    local_disk: str

    @classmethod
    def parse(cls, arguments: Sequence[str], prog: str, local_disk: str, place: Callable[[str, Path], str]) -> Order:
        """`[--gpu KIND[:COUNT]] [--tokens-per-s N] [--wandb-secret NAME] [--local-disk DIR|none] CONFIG.toml [--…]`.

        `place(field, path)` names a folder as it is there, or raises ValueError; ValueError says what else is wrong.
        """
        parser = argparse.ArgumentParser(prog, allow_abbrev=False)
        parser.add_argument("--gpu", default="A100")
        parser.add_argument("--tokens-per-s", type=float, default=0.0)
        parser.add_argument("--wandb-secret", default="wandb")
        parser.add_argument("--local-disk", default=local_disk)
        own, argv = parser.parse_known_args(list(arguments))
        gpu, gpus = parse_gpu(own.gpu)
        config = parse_config(argv, prog)
        rows = place("data.rows", config.data.rows)
        run_dir = place("train.run_dir", config.train.run_dir)
        options = [*argv[1:], "--data.rows", rows, "--train.run-dir", run_dir]
        toml = Path(argv[0]).read_text()
        return cls(config, toml, options, gpu, gpus, own.tokens_per_s, own.wandb_secret, own.local_disk)

    def cost(self, measured: dict | None = None) -> list[str]:
        """Lines that say what the run will take; ValueError if its batch cannot be dealt to the GPUs.

        measured: what `measured` below gives; it counts if the GPUs are the same.
        """
        from ping_llm.launch.plan import ASSUMED_MFU, GPU, plan_cost
        from ping_llm.model.gpt import flops_per_token

        gpu, rate, train = GPU.named(self.gpu), self.tokens_per_s, self.config.train
        if not rate and measured and measured["processes"] == self.gpus and gpu.name.upper() in measured["device"]:
            rate = measured["tokens_per_s"]
        hours = train.max_minutes / 60
        lines = (
            [f"at most {hours:,.1f} hours, {hours * self.gpus * gpu.dollars_per_hour:,.2f} dollars"] if hours else []
        )
        if not (train.total_steps or train.target_tokens):
            return lines
        mfu = rate * flops_per_token(self.config.model) / (self.gpus * gpu.peak_flops) if rate else ASSUMED_MFU
        lines += plan_cost(self.config, gpu, self.gpus, mfu).lines()
        speed = f"{rate:,.0f} tokens/s were measured" if rate else "no speed was measured, --tokens-per-s tells one"
        return [*lines, f"{speed}; CPUs and memory come on top"]


def parse_gpu(text: str) -> tuple[str, int]:
    """`H100:8` as a name of the price table and how many; ValueError if there are no such."""
    from ping_llm.launch.plan import GPU

    kind, _, count = text.partition(":")
    gpus = int(count) if count.isdecimal() else 0 if ":" in text else 1
    if not 1 <= gpus <= MAX_GPUS:
        raise ValueError(f"--gpu {text} must be a kind and a number from 1 to {MAX_GPUS}, for example H100:8")
    return GPU.named(kind).name, gpus


def measured(run_dir: Path) -> dict | None:
    """The last `tokens_per_s` that a run has logged, the `device` and the `processes`; None before there are any."""
    try:
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        rates = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")]
        machine = json.loads((run_dir / "machine.json").read_text())
        return {"tokens_per_s": rates[-1], "device": machine["device"], "processes": machine["processes"]}
    except (OSError, ValueError, LookupError):
        return None


def run_ranks(
    ranks: int, argv: Sequence[str], local_disk: str, run_dir: Path, keep: Callable[[], None], stop_at_s: float
) -> tuple[int, str]:
    """Trains in `ranks` processes; the exit code of torchrun, and why they were told to stop, "" if they were not.

    local_disk: "none", or the disk that `copy_rows` has copied to. keep: is called after each checkpoint, and at the end.
    stop_at_s: of time.monotonic(). SIGINT and SIGTERM, too, have the ranks finish their step and save.
    """
    told: list[str] = []
    launched: list[subprocess.Popen] = []

    def stop(reason: str) -> None:
        if not told:
            told.append(reason)
            for process in launched:
                process.terminate()

    settings = {"RANKS_PER_NODE": str(ranks), "LOCAL_DISK": local_disk, "MASTER": f"127.0.0.1:{_free_port()}"}
    with _on_signals(lambda: stop(SIGNAL)):
        command = [sys.executable, "-m", "ping_llm.launch.slurm_job", "ranks", *argv]
        job = subprocess.Popen(command, env=environment() | settings, start_new_session=True)
        launched.append(job)
        try:
            if told:
                job.terminate()
            kept = _checkpoints(run_dir)
            while job.poll() is None:
                time.sleep(POLL_S)
                if time.monotonic() > stop_at_s:
                    stop(TIME_IS_UP)
                if (now := _checkpoints(run_dir)) != kept:
                    keep()
                    kept = now
        finally:
            if job.poll() is None:
                stop(CANCELLED)
                job.wait()
            keep()
    return job.returncode, told[0] if told else ""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment() -> dict[str, str]:
    """That of this process, in which this very package is found from every folder."""
    paths = [str(Path(ping_llm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _checkpoints(run_dir: Path) -> set[str]:
    """The names of the whole checkpoints."""
    return {folder.name for folder in run_dir.glob("checkpoints/step-????????")}


@contextlib.contextmanager
def _on_signals(act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` on SIGINT and SIGTERM; handlers are put back."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    previous = {number: signal.signal(number, lambda *_: act()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
