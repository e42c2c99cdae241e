"""The command lines of what comes before training in, dumps and rows out: synth, fetch, prepare, inspect.

The fields of each class are the options of a command, and the comments at them are what `--help` shows. Nothing heavy is
imported before the options are parsed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from ping_llm.data.ingest.choices import Packets, Split, Traceroute
from ping_llm.system.files import try_folder

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
