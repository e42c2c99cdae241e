"""A command line in, a library call out. The signature of each function below is what `--help` shows.

Nothing heavy is imported before the options are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from ping_llm.data.ingest.choices import Packets, Split, Traceroute

_EXTRAS = {"matplotlib": "plots", "lightgbm": "baselines", "transformers": "hf"}
_EXTRAS |= dict.fromkeys(("dask", "distributed", "dask_jobqueue"), "cluster")
_WARNINGS_OF_A_KIND = 3


def synth(
    out: Path,
    probes: int = 100,
    targets: int = 50,
    days: float = 2.0,
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Write a synthetic Internet as an Atlas-shaped dump (.bz2), and its exact RTT distributions (truth.json).

    Args:
        out: folder for the dump and truth.json.
        probes: hosts that ping.
        targets: hosts that are pinged.
        days: time that the dump spans.
        seed: the same seed gives the same bytes.
        workers: processes that write files; 0 = one a core.
    """
    from ping_llm.data.synthetic.synthesize import synthesize

    counts = synthesize(out, probes=probes, targets=targets, days=days, seed=seed, workers=workers)
    print(f"{counts['results']:,} results in {counts['files']} files, and truth.json, in {out}")


def fetch(
    out: Path,
    msm: tuple[int, ...] = (),
    start: str = "",
    stop: str = "",
    probes: tuple[int, ...] = (),
    format: Literal["txt", "json"] = "txt",
    chunk_hours: float = 1.0,
    plain: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    dump: str = "",
    type: Literal["ping", "traceroute"] = "ping",
    hours: tuple[int, ...] = (),
    requests_per_s: float = 2.0,
    parallel: int = 2,
    tries: int = 8,
    api: str = "https://atlas.ripe.net/api/v2",
    archive: str = "https://data-store.ripe.net/datasets/atlas-daily-dumps",
) -> None:
    """Fetch Atlas dumps: measurements by id and time, or all results of a day. Run it again to go on where it stopped.

    Args:
        out: folder for the dumps, fetch.json and ATTRIBUTION.txt.
        msm: ids of measurements, with --start and --stop. The key for those that are not public is taken from the
            environment variable RIPE_ATLAS_API_KEY.
        start: first second of the results, ISO 8601 (UTC if it names no zone).
        stop: end of the results, likewise.
        probes: ids of probes; all if absent.
        format: one result a line (txt) or one JSON array.
        chunk_hours: span of one file, and of what is repeated if its transfer breaks off; longer for few probes.
        plain: do not compress the results.
        dump: day of the hourly dumps (2026-11-01), or first and last day (2026-11-01/2026-11-03).
        type: of the hourly dumps.
        hours: hours of each day, 0 to 23 UTC; all if absent.
        requests_per_s: requests a second, at most.
        parallel: files fetched at once, at most.
        tries: failures in a row, without a byte of progress, after which to give up.
        api: address of the Atlas API, or of a mirror.
        archive: address of the hourly dumps, or of a mirror.
    """
    if bool(msm) == bool(dump) or (bool(msm), bool(msm)) != (bool(start), bool(stop)):
        raise ValueError("give either --msm ID --start TIME --stop TIME, or --dump DAY")
    if (dump and probes) or (msm and hours):
        raise ValueError("--probes goes with --msm, and --hours with --dump")
    from ping_llm.data.ingest.download import Manners
    from ping_llm.data.ingest.fetch import KEY_VARIABLE, fetch, hourly_dumps, results, summary

    if dump:
        wanted = hourly_dumps(archive, type, dump, hours)
    else:
        from ping_llm.data.times import parse_time

        span = parse_time(start), parse_time(stop)
        wanted = results(api, msm, *span, probes, format, chunk_hours, packed=not plain)
    manners = Manners(requests_per_s, parallel, tries)
    print(summary(fetch(wanted, out, manners, os.environ.get(KEY_VARIABLE, "").strip()), out))


def prepare(
    inputs: Positional[tuple[str, ...]],
    out: Path,
    workers: int = 0,
    packets: Packets = "one",
    split: Split = "pingbench",
    keep_going: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    shards: int = 0,
    executor: str = "local",
    traceroute: Traceroute = "off",
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Turn Atlas dumps into probe rows, ready for training.

    Args:
        inputs: dumps, or folders of them: JSON by line or array, plain or .bz2, .gz, .zst, or Parquet; - is standard input.
        out: folder for the row shards and manifest.json.
        workers: processes; 0 = one a core.
        packets: keep one packet of each result, chosen by a hash, or all of them.
        split: train, val and test parts by the rules of PingBench, or everything into train.
        keep_going: use what can be read of a damaged file instead of stopping.
        shards: files of each part, at most; 0 = by the size of the dumps.
        executor: local (processes), dask-local, dask-slurm, dask=tcp://HOST:PORT for a running Dask cluster, or array: what
            slurm/prepare.sbatch calls.
        traceroute: leave traceroutes out, or learn from replies of their targets, or from those of all hops.
        dry_run: print the plan with the estimated sizes and time, and write nothing.
    """
    from ping_llm.data.ingest.prepare import plan_rows, prepare, summary

    if dry_run:
        return print(plan_rows(inputs, workers, packets, shards, executor).describe())
    manifest = prepare(
        inputs, out, workers, packets, split, shards, keep_going, executor=executor, traceroute=traceroute
    )
    print(summary(manifest))


def inspect(
    path: Positional[Path],
    plots: Path | None = None,
    top: int = 5,
    networks: Literal[8, 16] = 8,
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Show what a dump or a folder of probe rows holds.

    Args:
        path: folder of rows; or a dump, or a folder of dumps, which is prepared in a scratch folder (of TMPDIR) first.
        plots: folder for pictures of RTTs, of the IPv4 world, and of measurements over time.
        top: how many of the busiest sources and destinations are named.
        networks: length of the IPv4 prefixes in the picture of the world.
        json: print one JSON object instead of tables.
    """
    from json import dumps

    from ping_llm.data.inspect.summary import summarize

    summary = summarize(path)
    if json:
        print(dumps(summary.to_json(top)))
    else:
        from ping_llm.data.inspect.tables import print_summary

        print_summary(summary, top)
    if plots:
        from ping_llm.data.inspect.plots import plot_summary

        for picture in plot_summary(summary, plots, networks):
            print(picture, file=sys.stderr)


def plot(run: Positional[Path], out: Path | None = None) -> None:
    """Draw the curves of a training run: loss per field, validation, learning rate, gradient norm, throughput.

    Args:
        run: folder of the run.
        out: folder for the pictures; RUN/plots if absent.
    """
    from ping_llm.training.plots import plot_run

    for picture in plot_run(run, out):
        print(picture)


def plan(
    config: Positional[Path],
    gpu: str = "h100",
    gpus: int = 1,
    mfu: float = 0.4,
    grad_accum: int = 0,
    prices: Path | None = None,
) -> None:
    """Estimate what a training run takes before you pay for it: memory, hours, dollars.

    Args:
        config: TOML file of the run.
        gpu: kind of GPU, one of the price table.
        gpus: how many, over all machines.
        mfu: share of its peak that a GPU reaches in training; 0.4 is assumed. A run's report.md says what it reached.
        grad_accum: micro-batches a step, instead of those of the file.
        prices: price table; that of the package, prices.toml, if absent.
    """
    import dataclasses

    from ping_llm.config import load_config
    from ping_llm.launch.plan import GPU, PRICES, plan_cost

    run = load_config(config)
    train = dataclasses.replace(run.train, grad_accum=grad_accum or run.train.grad_accum)
    planned = plan_cost(dataclasses.replace(run, train=train), GPU.named(gpu, prices or PRICES), gpus, mfu)
    print("\n".join(planned.lines()))


def eval(argv: list[str]) -> None:
    """Score a model on PingBench beside baselines that learn from the same rows: report.md, results.json, pictures."""
    from ping_llm.eval.options import EvalOptions

    options = tyro.cli(EvalOptions, args=argv, prog="ping-llm eval")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for training; LightGBM's threads spin as well
    if options.diagnose or options.live:
        from ping_llm.eval.diagnose import diagnose
        from ping_llm.eval.live import compare_live
        from ping_llm.eval.report import print_lines

        options.check()
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
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ping-llm" / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    from ping_llm.training.trainer import train

    train(config)


def inference(argv: list[str]) -> int | None:
    """Query a trained model: rtt, batch, dst, rank, sample, score."""
    from ping_llm.inference.cli import COMMANDS

    return _dispatch(argv, COMMANDS, "ping-llm inference")


_COMMANDS = {f.__name__: f for f in (synth, fetch, prepare, inspect, train, plot, eval, plan, inference)}
_PARSE_THEMSELVES = (train, eval, inference)


def _dispatch(argv: list[str], commands: Mapping[str, Any], prog: str) -> int | None:
    """Calls the command that argv names; its options are the parameters of its function."""
    if argv and argv[0] in commands:
        command = commands[argv[0]]
        if command in _PARSE_THEMSELVES:
            return command(argv[1:])
        return tyro.cli(command, args=argv[1:], prog=f"{prog} {argv[0]}")
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
    log, warnings = logging.getLogger("ping_llm"), _WarningLines()
    log.addHandler(warnings)
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv, _COMMANDS, "ping-llm") or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        print(f"error: {error.name} is not installed; pip install 'ping-llm[{_EXTRAS[error.name]}]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("PING_LLM_TRACEBACK"):
            raise
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {text}", file=sys.stderr)
        return 1
    finally:
        log.removeHandler(warnings)
        warnings.close()


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
