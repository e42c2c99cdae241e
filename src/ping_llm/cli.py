"""A command line in, a library call out. The signature of each function below is what `--help` shows.

Nothing heavy is imported before the options are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ping_llm.data.ingest.choices import Packets, Split, Traceroute

_EXTRAS = {"matplotlib": "plots", "lightgbm": "baselines", "transformers": "hf"}
_EXTRAS |= dict.fromkeys(("dask", "distributed", "dask_jobqueue"), "cluster")
_WARNINGS_OF_A_KIND = 3
Positional = tyro.conf.Positional


def synth(
    out: Path,
    probes: int = 100,
    targets: int = 50,
    days: float = 2.0,
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Write a synthetic Internet as an Atlas-shaped dump (.bz2), and its exact latency law (truth.json).

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
        requests_per_s: asked for at most.
        parallel: files under way at once, at most.
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
        from ping_llm.inference.context import parse_time

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
    time_cut: tuple[str, str] | None = None,
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
        time_cut: when val and when test begin, ISO 8601 (UTC if it names no zone); if absent, after 75 % and 85 % of all
            measurements.
        dry_run: print the plan with the estimated sizes and time, and write nothing.
    """
    from ping_llm.data.ingest.prepare import check_time_cut, plan_rows, prepare, summary
    from ping_llm.data.ingest.splits import TimeCut
    from ping_llm.inference.context import parse_time

    cut = TimeCut(*map(parse_time, time_cut)) if time_cut else None
    if cut:
        check_time_cut(cut, split)
    if dry_run:
        return print(plan_rows(inputs, workers, packets, shards, executor).describe())
    manifest = prepare(
        *(inputs, out, workers, packets, split, shards, keep_going),
        executor=executor,
        traceroute=traceroute,
        time_cut=cut,
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
    """Tell what a training run will take, before it is paid for: memory, hours, dollars.

    Args:
        config: TOML file of the run.
        gpu: kind of GPU, one of the price table.
        gpus: how many, over all machines.
        mfu: share of its peak that a GPU reaches in training; 0.4 is assumed. A run's report.md tells what it reached.
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


def eval(
    run: Positional[Path | None] = None,
    data: Path | None = None,
    out: Path | None = None,
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    baselines_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    queries: int = 0,
    model_queries: int = 0,
    seed: int = 0,
    src_known: tuple[str, ...] = ("auto", "all", "none"),
    truth: Path | None = None,
    train_rows: Path | None = None,
    allow_leak: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Score a model on PingBench beside baselines that learn from the same rows: report.md, results.json, pictures.

    Args:
        run: run folder of a trained model.
        data: folder of rows whose test parts are asked; those that the run learned from, if absent. Of another folder all is
            asked, as one split.
        out: folder for the results; RUN/eval if absent.
        quick: fewer queries and smaller trees.
        baselines_only: score the baselines alone; needs no run.
        queries: of a split, at most; 0 = 20,000, or 2,000 with --quick.
        model_queries: of each cell, the first so many are put to the model, at most; 0 = all, or 75 with --quick. The
            report is over the queries that all methods answered.
        seed: the same seed asks the same.
        src_known: how much of the source the model is told, a method each: auto, all, none, or a prefix length.
        truth: truth.json of a synthetic dump: its law is one more method.
        train_rows: what the baselines learn from where --data is another folder; the run's own rows if absent.
        allow_leak: go on although the run may have learned what it is asked; the report says so.
        device: cpu, cuda or auto.
        precision: of the model's answers.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for training; LightGBM's threads spin as well
    from ping_llm.eval.run import EvalOptions, evaluate, resolve_folders

    data, out = resolve_folders(run, data, out, baselines_only)
    run = None if baselines_only else run
    told = (queries, model_queries, seed, src_known, allow_leak, train_rows, truth, device, precision)
    evaluate(EvalOptions(data, out, run, quick, *told))
    print(f"report: {out / 'report.md'}")


def _train(argv: list[str]) -> None:
    from ping_llm.config import parse_config

    config = parse_config(argv, "ping-llm train")
    # Threads of OpenMP spin while they wait: with any other work on the machine, training would take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What torch.compile has compiled is kept from run to run; by default it lies in /tmp.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ping-llm" / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    from ping_llm.training.trainer import train

    train(config)


def _inference(argv: list[str]) -> int | None:
    from ping_llm.inference.cli import COMMANDS

    commands = {name: _options(function, "inference ") for name, function in COMMANDS.items()}
    help_texts = {name: function.__doc__ for name, function in COMMANDS.items()}
    return _dispatch(argv, commands, help_texts, "ping-llm inference")


def _options(function: Callable[..., int | None], prefix: str = "") -> Callable[[list[str]], int | None]:
    """A command whose options are the parameters of a function."""
    return lambda argv: tyro.cli(function, args=argv, prog=f"ping-llm {prefix}{function.__name__}")


_COMMANDS = {
    "synth": _options(synth),
    "fetch": _options(fetch),
    "prepare": _options(prepare),
    "inspect": _options(inspect),
    "train": _train,
    "plot": _options(plot),
    "eval": _options(eval),
    "plan": _options(plan),
    "inference": _inference,
}
_HELP = {
    "synth": synth.__doc__,
    "fetch": fetch.__doc__,
    "prepare": prepare.__doc__,
    "inspect": inspect.__doc__,
    "train": "Train a model: CONFIG.toml [--section.option value …].",
    "plot": plot.__doc__,
    "eval": eval.__doc__,
    "plan": plan.__doc__,
    "inference": "Ask a trained model: rtt, batch, dst, rank, sample, score.",
}


def _dispatch(argv: list[str], commands: dict[str, Callable], help_texts: dict[str, str], prog: str) -> int | None:
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    lines = [f"  {name:10} {help_texts[name].splitlines()[0]}" for name in commands]
    usage = "\n".join([f"usage: {prog} COMMAND [OPTIONS]   (COMMAND --help says more)", "", *lines])
    if argv and argv[0] in ("-h", "--help"):
        return print(usage)
    if argv:
        raise ValueError(f"no command {argv[0]!r}; there are {', '.join(commands)}")
    print(usage, file=sys.stderr)
    raise SystemExit(2)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, what the command says, 1 after one line that says what was wrong, or 130
    if interrupted."""
    log, warnings = logging.getLogger("ping_llm"), _WarningLines()
    log.addHandler(warnings)
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv, _COMMANDS, _HELP, "ping-llm") or 0
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
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {told}", file=sys.stderr)
        return 1
    finally:
        log.removeHandler(warnings)
        warnings.close()


class _WarningLines(logging.Handler):
    """Warnings of the package as lines on standard error; of one kind the first few, and how many more there were."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: dict[str, int] = {}  # by the text before its arguments are filled in

    def emit(self, record: logging.LogRecord) -> None:
        self.told[record.msg] = self.told.get(record.msg, 0) + 1
        if self.told[record.msg] <= _WARNINGS_OF_A_KIND:
            print(f"warning: {' '.join(record.getMessage().split())}", file=sys.stderr)

    def close(self) -> None:
        more = sum(max(count - _WARNINGS_OF_A_KIND, 0) for count in self.told.values())
        if more:
            print(f"warning: {more:,} more of the kinds above", file=sys.stderr)
        super().close()
