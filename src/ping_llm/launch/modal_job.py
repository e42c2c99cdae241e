"""A training command for a rented machine in; its cost, its ranks run and every checkpoint handed over out.

Such a machine may be taken away at any time: a signal announces it, and what was not handed over is lost with it.
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ping_llm.config import Config, parse_config
from ping_llm.launch.job import checkpoints, environment
from ping_llm.system.hardware import gpu_kind
from ping_llm.system.signals import on_signals
from ping_llm.training.metrics import read_machines, read_metrics

POLL_S = 0.2
MAX_GPUS = 8  # of one machine
SIGNAL, TIME_IS_UP = "a signal said so", "its time is up"


@dataclass(frozen=True)
class Order:
    """A run with the machine that it is to train on."""

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

        `place(field, path)` names a folder as it is there, or raises ValueError; so does any other mistake.
        """
        parser = argparse.ArgumentParser(prog, allow_abbrev=False)
        parser.add_argument("--gpu", default="A100")
        parser.add_argument("--tokens-per-s", type=float, default=0.0)
        parser.add_argument("--wandb-secret", default="wandb")
        parser.add_argument("--local-disk", default=local_disk)
        own, argv = parser.parse_known_args(list(arguments))
        machine = parse_gpu(own.gpu)
        config = parse_config(argv, prog)
        options = [*argv[1:], "--data.rows", place("data.rows", config.data.rows)]
        options += ["--train.run-dir", place("train.run_dir", config.train.run_dir)]
        toml = Path(argv[0]).read_text()
        return cls(config, toml, options, *machine, own.tokens_per_s, own.wandb_secret, own.local_disk)

    def cost(self, measured: dict | None = None) -> list[str]:
        """Lines that say what the run will take; ValueError if its batch cannot be dealt to the GPUs.

        measured: by `measured` below; used if the GPUs are the same.
        """
        from ping_llm.launch.plan import ASSUMED_MFU, GPU, plan_cost
        from ping_llm.model.gpt import flops_per_token

        gpu, rate, train = GPU.named(self.gpu), self.tokens_per_s, self.config.train
        if not rate and measured and (gpu_kind(measured["device"]), measured["processes"]) == (gpu.kind, self.gpus):
            rate = measured["tokens_per_s"]
        hours = train.max_minutes / 60
        dollars = hours * self.gpus * gpu.dollars_per_hour
        lines = [f"at most {hours:,.1f} hours, {dollars:,.2f} dollars"] if hours else []
        if not (train.total_steps or train.target_tokens):
            return lines
        mfu = rate * flops_per_token(self.config.model) / (self.gpus * gpu.peak_flops) if rate else ASSUMED_MFU
        lines += plan_cost(self.config, gpu, self.gpus, mfu).lines
        speed = f"{rate:,.0f} tokens/s were measured" if rate else "no speed was measured; pass one with --tokens-per-s"
        return [*lines, f"{speed}; CPUs and memory come on top"]


def parse_gpu(text: str) -> tuple[str, int]:
    """`H100:8` as a name of the price table and how many; ValueError if there are no such."""
    from ping_llm.launch.plan import GPU

    kind, _, count = text.partition(":")
    gpus = int(count) if count.isdecimal() else 0 if ":" in text else 1
    if not 1 <= gpus <= MAX_GPUS:
        raise ValueError(f"--gpu {text} must be a kind and a number from 1 to {MAX_GPUS}, for example H100:8")
    return GPU.named(kind).name, gpus


def measured(run_dir: Path) -> dict[str, Any] | None:
    """The last `tokens_per_s` that a run has logged, the `device` and the `processes`; None before there are any."""
    try:
        steps, rates = read_metrics(run_dir).known("tokens_per_s")
        *_, machine = (machine for machine in read_machines(run_dir) if machine.get("from_step", 0) < steps[-1])
        return {"tokens_per_s": float(rates[-1]), "device": machine["device"], "processes": machine["processes"]}
    except (OSError, ValueError, LookupError):
        return None


def run_ranks(
    ranks: int, argv: Sequence[str], local_disk: str, run_dir: Path, keep: Callable[[], None], stop_at_s: float
) -> tuple[int, str]:
    """Trains in `ranks` processes; the exit code of torchrun, and why they were stopped, "" if they were not.

    local_disk: "none", or the disk that `copy_rows` has copied to. keep: is called after each checkpoint, and at the end.
    stop_at_s: of time.monotonic(). On SIGINT and SIGTERM, too, the ranks finish their step and save.
    """
    reasons: list[str] = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"RANKS_PER_NODE": str(ranks), "LOCAL_DISK": local_disk, "MASTER": f"127.0.0.1:{port}"}
    with on_signals((signal.SIGINT, signal.SIGTERM), lambda _: reasons.append(SIGNAL)):
        command = [sys.executable, "-m", "ping_llm.launch.slurm_job", "ranks", *argv]
        job = subprocess.Popen(command, env=environment() | settings, start_new_session=True)
        stopped = False
        try:
            kept = checkpoints(run_dir)
            while job.poll() is None:
                time.sleep(POLL_S)
                if time.monotonic() > stop_at_s:
                    reasons.append(TIME_IS_UP)
                if reasons and not stopped:
                    job.terminate()
                    stopped = True
                if (now := checkpoints(run_dir)) != kept:
                    keep()
                    kept = now
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait()
            keep()
    return job.returncode, reasons[0] if reasons else ""
