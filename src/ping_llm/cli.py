"""A command line in, a library call out. The fields of each class below are the options of a command, and the comments at
them are what `--help` shows.

Nothing heavy is imported before the options are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from ping_llm.data.cli import Fetch, Inspect, Prepare, Synth
from ping_llm.hf.cli import export
from ping_llm.hf.rows_cli import rows
from ping_llm.serve.cli import serve
from ping_llm.system.commands import dispatch
from ping_llm.system.exits import exit_code
from ping_llm.system.files import cache_folder, try_file

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass
class Plot:
    """Draw the curves of a training run: loss per field, validation, learning rate, gradient norm, throughput."""

    run_dir: Annotated[Positional[Path], tyro.conf.arg(name="run")]  # folder of the run.
    out: Path | None = None  # folder for the pictures; RUN/plots if absent.

    def run(self) -> None:
        from ping_llm.training.plots import plot_run

        for picture in plot_run(self.run_dir, self.out):
            print(picture)


@dataclass
class Plan:
    """Estimate what a training run takes before you pay for it: memory, hours, dollars."""

    config: Positional[Path | None] = None  # TOML file of the run; with --depth it may be left out.
    # blocks of the model: sets width, heads, tokens, batch, rates and weight decay, as for ping-llm train, and prints them.
    depth: int | None = None
    ratio: float | None = None  # with --depth: tokens for each weight of the matrices and the head; 12 if absent.
    target_flops: float | None = None  # with --depth, in place of --ratio: FLOPs of the whole run.
    gpu: str = "h100"  # kind of GPU, one of the price table.
    gpus: int = 1  # how many, over all machines.
    # share of its peak that a GPU reaches in training; 0.4 is assumed. A run's report.md says what it reached.
    mfu: float = 0.4
    # micro-batches a step, instead of those of the file; with --depth, as few as fit if absent.
    grad_accum: int = 0
    prices: Path | None = None  # price table; that of the package, prices.toml, if absent.

    def run(self) -> None:
        from ping_llm.launch.dial import plan_lines

        print("\n".join(plan_lines(**vars(self))))


@dataclass
class Sweep:
    """Train the runs of a sweep, each in a folder of its own. Run it again to go on where it stopped."""

    file: Annotated[Positional[Path], tyro.conf.arg(metavar="SWEEP.toml")]  # base config, overrides, grid, seeds.
    out: Path | None = None  # folder for the runs; the one that the file names, or runs/sweeps/NAME, if absent.
    jobs: int = 1  # runs that are trained at a time, each with its share of the cores.
    dry_run: Flag = False  # check the file, list the runs and how far each is, and start none.

    def run(self) -> None:
        from ping_llm.launch.sweep_local import sweep

        sweep(**vars(self))


@dataclass
class Compare:
    """Compare training runs by config: differences, intervals over seeds, noise; or the checkpoints of one run."""

    # run folders, or folders that hold runs, such as that of a sweep.
    runs: Positional[tuple[Path, ...]]
    out: Path | None = None  # folder for compare.md, compare.json and curves.png; nothing is written if absent.
    against: str = ""  # config that the others are compared with, as the table calls it; the first if absent.
    # folders of evaluations of these runs, besides those in RUN/eval.
    scores: tuple[Path, ...] = ()
    noise: tuple[Path, ...] = ()  # runs of a noise study, or folders that hold them: what seeds alone change.
    # instead, put the same pings to every checkpoint of one run; --out then holds checkpoints.md, .json and .png.
    checkpoints: Flag = False
    pairs: tuple[tuple[str, str], ...] = ()  # with --checkpoints: sources and destinations; if absent, pings of val.
    pings: int = 4  # with --checkpoints: how many of val.
    data: Path | None = None  # with --checkpoints: folder of rows; those that the run learned from, if absent.

    def run(self) -> None:
        if not self.runs:
            raise ValueError("name the runs, or folders that hold runs, such as that of a sweep")
        if self.checkpoints:
            return self._over_time()
        if self.pairs or self.data:
            raise ValueError("--pairs and --data go with --checkpoints")
        from ping_llm.eval.compare import compare, print_comparison

        print_comparison(compare(self.runs, self.out, self.against, self.scores, self.noise))
        if self.out:
            print(f"report: {self.out / 'compare.md'}")

    def _over_time(self) -> None:
        from ping_llm.eval.checkpoints import TEXT_NAME, compare_checkpoints, print_checkpoints

        if len(self.runs) > 1 or self.against or self.scores or self.noise:
            raise ValueError("--checkpoints looks at one run, without --against, --scores and --noise")
        print_checkpoints(compare_checkpoints(self.runs[0], self.out, self.pairs, self.data, self.pings))
        if self.out:
            print(f"report: {self.out / TEXT_NAME}")


@dataclass
class InspectModel:
    """Look into a trained model: its residual stream, its attention by field, its map of prefixes, as pictures."""

    run_dir: Annotated[Positional[Path], tyro.conf.arg(name="run")]  # run folder, or one of its checkpoints.
    out: Path | None = None  # folder for the pictures and inside.json; RUN/inside if absent.
    data: Path | None = None  # folder of rows; those that the run learned from, if absent.
    part: str = "val"  # of the rows, that windows are drawn from.
    windows: int = 64  # how many.
    src: str = ""  # source of a ping to look at instead of windows, or a prefix of whole bytes.
    dst: str = ""  # its destination, likewise.
    at: str = ""  # its time, ISO 8601.
    # earlier measurements of the source (.parquet, .csv, .json, .jsonl): src_addr, dst_addr, rtt, event_time.
    context: Path | None = None
    rtt: float | None = None  # its RTT in ms; the model's median if absent.
    ipv4_bits: Literal[8, 16, 24] = 24  # length of the IPv4 prefixes on the map.
    ipv6_bits: Literal[16, 32, 48] = 48  # length of the IPv6 prefixes.
    device: str = "auto"  # cpu, cuda or auto.

    def run(self) -> None:
        from ping_llm.inference.files import read_context
        from ping_llm.inference.query import Query
        from ping_llm.inside.inspect import inspect_model

        query = None
        if self.src or self.dst:
            query = Query.parse(self.src or None, self.dst or None, self.at or None, read_context(self.context))
        elif self.at or self.context or self.rtt is not None:
            raise ValueError("--at, --context and --rtt go with --src and --dst")
        look, paths = inspect_model(
            self.run_dir, self.out, self.data, self.part, self.windows, query, self.rtt, self.ipv4_bits, self.ipv6_bits,
            self.device,
        )  # fmt: skip
        print("\n".join([*look.lines(), *map(str, paths)]))


def eval(argv: list[str]) -> None:
    """Score a model on PingBench beside baselines that learn from the same rows: report.md, results.json, pictures."""
    from ping_llm.eval.options import EvalOptions

    options = tyro.cli(EvalOptions, args=argv, prog="ping-llm eval")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for training; LightGBM's threads spin as well
    options.check()
    try_file(options.json)
    if options.diagnose or options.live:
        from ping_llm.eval.diagnose import diagnose
        from ping_llm.eval.live import compare_live
        from ping_llm.eval.report import print_lines

        return print_lines(compare_live(options) if options.live else diagnose(options), options.json)
    from ping_llm.eval.run import evaluate

    evaluate(options)
    print(f"report: {options.folder / 'report.md'}")


def _prepare_to_train() -> None:
    # Threads of OpenMP spin while they wait: with any other work on the machine, training would take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What torch.compile has compiled is kept from run to run; by default it lies in /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
    # Memory is taken in pieces that can grow: batches of several shapes leave no gaps.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def train(argv: list[str]) -> None:
    """Train a model: CONFIG.toml [--section.option value …], or --depth N."""
    _prepare_to_train()
    prog = "ping-llm train"
    if any(argument.partition("=")[0] in ("--depth", "--ratio", "--target-flops") for argument in argv):
        from ping_llm.launch.dial import parse_run  # it counts the weights of models, which takes torch

        config = parse_run(argv, prog, on_this_machine=True)
    else:
        from ping_llm.config import parse_config

        config = parse_config(argv, prog)
    from ping_llm.training.trainer import train

    train(config)


def finetune(argv: list[str]) -> None:
    """Train a run on with new rows, such as those of your own network: RUN ROWS --out RUN2 [--lora RANK]."""
    from ping_llm.training.options import FinetuneOptions

    options, overrides = FinetuneOptions.parse(argv, "ping-llm finetune")
    _prepare_to_train()
    from ping_llm.training.finetune import finetune

    finetune(options, overrides)


def inference(argv: list[str]) -> int | None:
    """Query a trained model: rtt, batch, dst, rank, sample, score."""
    from ping_llm.inference.cli import COMMANDS

    return dispatch(argv, COMMANDS, "ping-llm inference")


def launch(argv: list[str]) -> int | None:
    """Watch for free GPUs of a provider; rent them once and train there: watch."""
    from ping_llm.launch.watch import COMMANDS

    return dispatch(argv, COMMANDS, "ping-llm launch")


def watch(argv: list[str]) -> None:
    """Watch live pings: results as they come in, anomalies that open and close."""
    from ping_llm.watch.cli import watch

    tyro.cli(watch, args=argv, prog="ping-llm watch")


_MODELS = (
    train,
    finetune,
    Plot,
    Sweep,
    Compare,
    eval,
    Plan,
    InspectModel,
    launch,
    inference,
    serve,
    watch,
    export,
    rows,
)
_ALL = (Synth, Fetch, Prepare, Inspect, *_MODELS)
_COMMANDS = {"-".join(re.findall("^[a-z]+|[A-Z][a-z]+", c.__name__)).lower(): c for c in _ALL}
_PARSE_THEMSELVES = (train, finetune, eval, launch, inference, watch)
# What they print is no answer.
_WRITE_FILES = (Synth, Fetch, Prepare, train, finetune, Plot, Sweep, InspectModel, eval, export, rows)


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, the command's own, 1 after one line that says what was wrong, or 130
    if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    writes_files = _COMMANDS.get(argv[0] if argv else "") in _WRITE_FILES
    return exit_code(lambda: dispatch(argv, _COMMANDS, "ping-llm", _PARSE_THEMSELVES), needs_stdout=not writes_files)
