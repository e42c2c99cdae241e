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

from ping_llm.config import Config, config_to_dict, parse_config
from ping_llm.launch.job import checkpoints, environment
from ping_llm.launch.plan import ASSUMED_MFU, GPU, CostPlan, plan_cost
from ping_llm.launch.sweep import read_sweep
from ping_llm.model.counts import mean_flops_per_token
from ping_llm.system.hardware import gpu_kind
from ping_llm.system.signals import on_signals
from ping_llm.training.metrics import read_machines, read_metrics
from ping_llm.training.report import to_toml

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
        own, argv = _machine_parser(prog, local_disk).parse_known_args(list(arguments))
        machine = parse_gpu(own.gpu)
        config = parse_config(argv, prog)
        options = [*argv[1:], *_places(config, place)]
        toml = Path(argv[0]).read_text()
        return cls(config, toml, options, *machine, own.tokens_per_s, own.wandb_secret, own.local_disk)

    @classmethod
    def of_sweep(
        cls, arguments: Sequence[str], prog: str, local_disk: str, place: Callable[[str, Path], str]
    ) -> list[Order]:
        """`[OPTION as of parse …] SWEEP.toml [--out runs/NAME]`: one for each run of the sweep. ValueError as there."""
        parser = _machine_parser(prog, local_disk)
        parser.add_argument("file", type=Path)
        parser.add_argument("--out", type=Path)
        own = parser.parse_args(list(arguments))
        machine, orders = parse_gpu(own.gpu), []
        for run in read_sweep(own.file, own.out):
            toml, options = to_toml(config_to_dict(run.config)), _places(run.config, place)
            orders.append(cls(run.config, toml, options, *machine, own.tokens_per_s, own.wandb_secret, own.local_disk))
        return orders

    def price(self) -> tuple[float, float]:
        """Hours and dollars, by the measured or assumed speed or, if that is less, by `train.max_minutes`."""
        hours = self.config.train.max_minutes / 60
        limits = [(hours, hours * self.gpus * GPU.named(self.gpu).dollars_per_hour)] if hours else []
        if self.config.train.total_steps or self.config.train.target_tokens:
            plan = self._plan(self.tokens_per_s)
            limits.append((plan.hours, plan.dollars))
        return min(limits)

    def cost(self, measured: dict | None = None) -> list[str]:
        """Lines that say what the run will take; ValueError if its batch cannot be dealt to the GPUs.

        measured: by `measured` below; used if the GPUs are the same.
        """
        gpu, rate, train = GPU.named(self.gpu), self.tokens_per_s, self.config.train
        if not rate and measured and (gpu_kind(measured["device"]), measured["processes"]) == (gpu.kind, self.gpus):
            rate = measured["tokens_per_s"]
        hours = train.max_minutes / 60
        dollars = hours * self.gpus * gpu.dollars_per_hour
        lines = [f"at most {hours:,.1f} hours, {dollars:,.2f} dollars"] if hours else []
        if not (train.total_steps or train.target_tokens):
            return lines
        lines += self._plan(rate).lines
        speed = f"{rate:,.0f} tokens/s were measured" if rate else "no speed was measured; pass one with --tokens-per-s"
        return [*lines, f"{speed}; CPUs and memory come on top"]

    def _plan(self, rate: float) -> CostPlan:
        """At so many tokens/s; 0 = by the assumed MFU."""
        gpu = GPU.named(self.gpu)
        mfu = rate * mean_flops_per_token(self.config) / (self.gpus * gpu.peak_flops) if rate else ASSUMED_MFU
        return plan_cost(self.config, gpu, self.gpus, mfu)


def _machine_parser(prog: str, local_disk: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, allow_abbrev=False)
    parser.add_argument("--gpu", default="A100")
    parser.add_argument("--tokens-per-s", type=float, default=0.0)
    parser.add_argument("--wandb-secret", default="wandb")
    parser.add_argument("--local-disk", default=local_disk)
    return parser


def _places(config: Config, place: Callable[[str, Path], str]) -> list[str]:
    """Options that name the folders of a run as they are on the rented machine."""
    rows, run_dir = place("data.rows", config.data.rows), place("train.run_dir", config.train.run_dir)
    return ["--data.rows", rows, "--train.run-dir", run_dir]


def parse_gpu(text: str) -> tuple[str, int]:
    """`H100:8` as a name of the price table and how many; ValueError if there are no such."""
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
