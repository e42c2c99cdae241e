"""A command line in, a library call out. The fields of each class below are the options of a command, and the comments at
them are what `--help` shows.

Nothing heavy is imported before the options are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from ping_llm.data.ingest.choices import Packets, Split, Traceroute
from ping_llm.system.files import cache_folder, try_file, try_folder
from ping_llm.system.streams import lost_output, steady_streams

_EXTRAS = {"matplotlib": "plots", "lightgbm": "baselines", "scipy": "baselines", "transformers": "hf"}
_EXTRAS |= dict.fromkeys(("dask", "distributed", "dask_jobqueue"), "cluster")
_EXTRAS |= dict.fromkeys(("fastapi", "fastapi_swagger", "prometheus_client", "uvicorn"), "serve")
_WARNINGS_OF_A_KIND = 3
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass
class Synth:
    """Write a synthetic Internet as an Atlas-shaped dump (.bz2), and its exact RTT distributions (truth.json)."""

    out: Path  # folder for the dump and truth.json.
    probes: int = 100  # hosts that ping.
    targets: int = 50  # hosts that are pinged.
    days: float = 2.0  # time that the dump spans.
    seed: int = 0  # the same seed gives the same bytes.
    workers: int = 0  # processes that write files; 0 = one a core.

    def run(self) -> None:
        from ping_llm.data.synthetic.synthesize import synthesize

        try_folder(self.out, "truth.json")
        counts = synthesize(**vars(self))
        print(f"{counts['results']:,} results in {counts['files']} files, and truth.json, in {self.out}")


@dataclass
class Fetch:
    """Fetch Atlas dumps: measurements by id and time, or all results of a day. Run it again to go on where it stopped."""

    out: Path  # folder for the dumps, fetch.json and ATTRIBUTION.txt.
    # ids of measurements, with --start and --stop. The key for those that are not public is taken from the environment
    # variable RIPE_ATLAS_API_KEY.
    msm: tuple[int, ...] = ()
    start: str = ""  # first second of the results, ISO 8601 (UTC if it names no zone).
    stop: str = ""  # end of the results, likewise.
    probes: tuple[int, ...] = ()  # ids of probes; all if absent.
    format: Literal["txt", "json"] = "txt"  # one result a line (txt) or one JSON array.
    # span of one file, and of what is repeated if its transfer breaks off; longer for few probes.
    chunk_hours: float = 1.0
    plain: Flag = False  # do not compress the results.
    dump: str = ""  # day of the hourly dumps (2026-11-01), or first and last day (2026-11-01/2026-11-03).
    type: Literal["ping", "traceroute"] = "ping"  # of the hourly dumps.
    hours: tuple[int, ...] = ()  # hours of each day, 0 to 23 UTC; all if absent.
    requests_per_s: float = 2.0  # requests a second, at most.
    parallel: int = 2  # files fetched at once, at most.
    tries: int = 8  # failures in a row, without a byte of progress, after which to give up.
    api: str = "https://atlas.ripe.net/api/v2"  # address of the Atlas API, or of a mirror.
    # address of the hourly dumps, or of a mirror.
    archive: str = "https://data-store.ripe.net/datasets/atlas-daily-dumps"

    def run(self) -> None:
        if bool(self.msm) == bool(self.dump) or (bool(self.msm), bool(self.msm)) != (bool(self.start), bool(self.stop)):
            raise ValueError("give either --msm ID --start TIME --stop TIME, or --dump DAY")
        if (self.dump and self.probes) or (self.msm and self.hours):
            raise ValueError("--probes goes with --msm, and --hours with --dump")
        from ping_llm.data.ingest.download import Manners
        from ping_llm.data.ingest.fetch import KEY_VARIABLE, fetch, hourly_dumps, results, summary

        if self.dump:
            wanted = hourly_dumps(self.archive, self.type, self.dump, self.hours)
        else:
            from ping_llm.data.times import parse_time

            span = parse_time(self.start), parse_time(self.stop)
            wanted = results(self.api, self.msm, *span, self.probes, self.format, self.chunk_hours, not self.plain)
        manners = Manners(self.requests_per_s, self.parallel, self.tries)
        try_folder(self.out, "fetch.json", "ATTRIBUTION.txt")
        print(summary(fetch(wanted, self.out, manners, os.environ.get(KEY_VARIABLE, "").strip()), self.out))


@dataclass
class Prepare:
    """Turn Atlas dumps into probe rows, ready for training."""

    # dumps, pipes, or folders of dumps: JSON by line or array, tables (CSV, JSON lines, Parquet), logs of ping -D; plain or
    # .bz2, .gz, .zst; - is standard input.
    inputs: Positional[tuple[str, ...]]
    out: Path  # folder for the row shards and manifest.json.
    workers: int = 0  # processes; 0 = one a core.
    packets: Packets = "one"  # keep one packet of each result, chosen by a hash, or all of them.
    split: Split = "pingbench"  # train, val and test parts by the rules of PingBench, or everything into train.
    # use what can be read of a file that is damaged, or most lines of which are no results, instead of stopping.
    keep_going: Flag = False
    shards: int = 0  # files of each part, at most, up to 256; 0 = by the size of the dumps.
    # local (processes), dask-local, dask-slurm, dask=tcp://HOST:PORT for a running Dask cluster, or array: what
    # slurm/prepare.sbatch calls.
    executor: str = "local"
    # leave traceroutes out, or learn from replies of their targets, or from those of all hops.
    traceroute: Traceroute = "off"
    # when val and when test begin, ISO 8601 (UTC if it names no zone); if absent, after 75 % and 85 % of all measurements.
    time_cut: tuple[str, str] | None = None
    source: str | None = None  # public address of the source, for inputs that name none: logs and tables of ping.
    dry_run: Flag = False  # print the plan with the estimated sizes and time, and write nothing.

    def run(self) -> None:
        from ping_llm.data.ingest.prepare import check_source, check_time_cut, plan_rows, prepare, summary
        from ping_llm.data.ingest.splits import TimeCut
        from ping_llm.data.rows import INDEX_NAME, MANIFEST_NAME
        from ping_llm.data.times import parse_time

        options = vars(self)
        if self.time_cut:
            options["time_cut"] = TimeCut(*map(parse_time, self.time_cut))
            check_time_cut(options["time_cut"], self.split)
        if self.source:
            check_source(self.source)
        if options.pop("dry_run"):
            print(plan_rows(self.inputs, self.workers, self.packets, self.shards, self.executor).describe())
        else:
            if not (self.out / MANIFEST_NAME).is_file():  # else there is nothing to write
                try_folder(self.out, MANIFEST_NAME, INDEX_NAME)
            print(summary(prepare(**options)))


@dataclass
class Inspect:
    """Show what a dump or a folder of probe rows holds."""

    # folder of rows; or a dump, or a folder of dumps, which is prepared in a scratch folder (of TMPDIR) first.
    path: Positional[Path]
    plots: Path | None = None  # folder for pictures of RTTs, of the IPv4 world, and of measurements over time.
    top: int = 5  # how many of the busiest sources and destinations are named.
    networks: Literal[8, 16] = 8  # length of the IPv4 prefixes in the picture of the world.
    json: Flag = False  # print one JSON object instead of tables.
    # end with code 0 though a dump is damaged or most of its lines are no results.
    keep_going: Flag = False

    def run(self) -> None:
        import json

        from ping_llm.data.inspect.summary import summarize
        from ping_llm.data.rows import MANIFEST_NAME

        if self.plots and self.path.exists():
            import matplotlib  # noqa: F401  what is missing is said before anything is done

            try_folder(self.plots)
        summary = summarize(self.path)
        if self.json:
            print(json.dumps(summary.to_json(self.top)))
        else:
            from ping_llm.data.inspect.tables import print_summary

            print_summary(summary, self.top)
        if self.plots:
            from ping_llm.data.inspect.plots import plot_summary

            for picture in plot_summary(summary, self.plots, self.networks):
                print(picture, file=sys.stderr)
        accepted = self.keep_going or (self.path / MANIFEST_NAME).is_file()  # of rows, when they were prepared
        if summary.problems and not accepted:
            raise ValueError(
                f"{summary.problems[0]}. What is shown is of what could be read; --keep-going accepts that"
            )


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

    config: Positional[Path]  # TOML file of the run.
    gpu: str = "h100"  # kind of GPU, one of the price table.
    gpus: int = 1  # how many, over all machines.
    # share of its peak that a GPU reaches in training; 0.4 is assumed. A run's report.md says what it reached.
    mfu: float = 0.4
    grad_accum: int = 0  # micro-batches a step, instead of those of the file.
    prices: Path | None = None  # price table; that of the package, prices.toml, if absent.

    def run(self) -> None:
        from ping_llm.config import load_config
        from ping_llm.launch.plan import GPU, PRICES, plan_cost

        run = load_config(self.config)
        train = dataclasses.replace(run.train, grad_accum=self.grad_accum or run.train.grad_accum)
        gpu = GPU.named(self.gpu, self.prices or PRICES)
        print("\n".join(plan_cost(dataclasses.replace(run, train=train), gpu, self.gpus, self.mfu).lines))


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
    """Compare training runs: one table by config, differences with their intervals over seeds, and whether they exceed the
    noise."""

    # run folders, or folders that hold runs, such as that of a sweep.
    runs: Positional[tuple[Path, ...]]
    out: Path | None = None  # folder for compare.md, compare.json and curves.png; nothing is written if absent.
    against: str = ""  # config that the others are compared with, as the table calls it; the first if absent.
    # folders of evaluations of these runs, besides those in RUN/eval.
    scores: tuple[Path, ...] = ()
    noise: tuple[Path, ...] = ()  # runs of a noise study, or folders that hold them: what seeds alone change.

    def run(self) -> None:
        from ping_llm.eval.compare import compare, print_comparison

        if not self.runs:
            raise ValueError("name the runs, or folders that hold runs, such as that of a sweep")
        print_comparison(compare(self.runs, self.out, self.against, self.scores, self.noise))
        if self.out:
            print(f"report: {self.out / 'compare.md'}")


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


def train(argv: list[str]) -> None:
    """Train a model: CONFIG.toml [--section.option value …]."""
    from ping_llm.config import parse_config

    config = parse_config(argv, "ping-llm train")
    # Threads of OpenMP spin while they wait: with any other work on the machine, training would take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What torch.compile has compiled is kept from run to run; by default it lies in /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
    # Memory is taken in pieces that can grow: batches of several shapes leave no gaps.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from ping_llm.training.trainer import train

    train(config)


def inference(argv: list[str]) -> int | None:
    """Query a trained model: rtt, batch, dst, rank, sample, score."""
    from ping_llm.inference.cli import COMMANDS

    return _dispatch(argv, COMMANDS, "ping-llm inference")


def serve(argv: list[str]) -> None:
    """Answer queries over HTTP: an API, its description, metrics, and a page."""
    from ping_llm.serve.cli import serve

    tyro.cli(serve, args=argv, prog="ping-llm serve")


_TRAINED = (train, Plot, Sweep, Compare, eval, Plan, inference, serve)
_COMMANDS = {c.__name__.lower(): c for c in (Synth, Fetch, Prepare, Inspect, *_TRAINED)}
_PARSE_THEMSELVES = (train, eval, inference, serve)
_WRITE_FILES = (Synth, Fetch, Prepare, train, Plot, Sweep, eval)  # what they print is no answer


def _dispatch(argv: list[str], commands: Mapping[str, Any], prog: str) -> int | None:
    """Calls the command that argv names; its options are the fields of its class or the parameters of its function."""
    if argv and argv[0] in commands:
        command = commands[argv[0]]
        if command in _PARSE_THEMSELVES:
            return command(argv[1:])
        result = tyro.cli(command, args=argv[1:], prog=f"{prog} {argv[0]}")
        return result.run() if hasattr(result, "run") else result
    lines = [f"  {name:10} {(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()]
    usage = "\n".join([f"usage: {prog} COMMAND [OPTIONS]   (COMMAND --help says more)", "", *lines])
    if argv and argv[0] in ("-h", "--help"):
        return print(usage)
    if argv:
        raise ValueError(f"no command {argv[0]!r}; there are {', '.join(commands)}")
    print(usage, file=sys.stderr)
    raise SystemExit(2)


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, the command's own, 1 after one line that says what was wrong, or 130
    if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    writes_files = _COMMANDS.get(argv[0] if argv else "") in _WRITE_FILES
    return exit_code(lambda: _dispatch(argv, _COMMANDS, "ping-llm"), needs_stdout=not writes_files)


def exit_code(command: Callable[[], int | None], needs_stdout: bool = True) -> int:
    """Calls what a program does, and returns the program's exit code; errors are one line each, and printing ends nothing.

    Output that could not be printed is an error of a program that `needs_stdout`, for its answer is lost. Of one whose files
    are the result it is a warning.
    """
    with steady_streams():
        try:
            code = _one_line_errors(command)
        except SystemExit as stopped:  # of a parser that has printed help, or what is wrong
            if stopped.code or not lost_output():
                raise
            code, needs_stdout = 0, True
        if lost := lost_output():
            kind = "error" if needs_stdout else "warning"
            print(f"{kind}: standard output did not take what was printed ({lost})", file=sys.stderr)
            return code or int(needs_stdout)
        return code


def _one_line_errors(command: Callable[[], int | None]) -> int:
    """What `command` returns; 1 after one line that says what was wrong, 130 if interrupted."""
    log, warnings = logging.getLogger("ping_llm"), _WarningLines()
    log.addHandler(warnings)
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        text = f"{error.name} is not installed; pip install 'ping-llm[{_EXTRAS[error.name]}]'"
    except (ValueError, OSError) as error:
        if os.environ.get("PING_LLM_TRACEBACK"):
            raise
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    finally:
        log.removeHandler(warnings)
        warnings.close()
    print(f"error: {' '.join(line.strip() for line in text.splitlines())}", file=sys.stderr)
    return 1


class _WarningLines(logging.Handler):
    """Warnings of the package as lines on standard error; of one kind the first few, and how many more there were."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()  # by the text before its arguments are filled in

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[record.msg] += 1
        if self.counts[record.msg] <= _WARNINGS_OF_A_KIND:
            print(f"warning: {' '.join(record.getMessage().split())}", file=sys.stderr)

    def close(self) -> None:
        if more := sum(max(count - _WARNINGS_OF_A_KIND, 0) for count in self.counts.values()):
            print(f"warning: {more:,} more of the kinds above", file=sys.stderr)
        super().close()
