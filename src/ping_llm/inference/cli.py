"""The command line of `ping-llm inference` in, calls of commands.py out. What `--help` shows stands here.

Nothing heavy is imported before the options are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from ping_llm.inference.predictor import PingModel

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Several = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]  # --dst A B --dst C


@dataclass(frozen=True)
class ModelOptions:
    """The model that is asked."""

    model: Path
    """Run folder of a trained model."""
    device: str = "auto"
    """cpu, cuda or auto."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster; probabilities differ by some percent of themselves."""

    def load(self) -> PingModel:
        """Reads the best checkpoint."""
        from ping_llm.inference.predictor import PingModel

        return PingModel.load(self.model, self.device, self.precision)


@dataclass(frozen=True)
class Situation:
    """What is known beside the two ends of a ping."""

    at: str = ""
    """Time of the ping, ISO 8601 (UTC if it names no zone). If absent, any time, and those of the context are not told."""
    context: Path | None = None
    """Earlier measurements of the source (.parquet, .csv, .json, .jsonl): src_addr, dst_addr, rtt, event_time."""
    src_known: str = "auto"
    """How much of the source is told: all, none, a prefix length, or auto: several, weighted by how well each
    explains the context."""


Model = tyro.conf.OmitArgPrefixes[ModelOptions]
Known = tyro.conf.OmitArgPrefixes[Situation]


def rtt(
    model: Model,
    known: Known,
    src: str = "",
    dst: Several = (),
    dst_prefix: Several = (),
    cross_check: Flag = False,
    json: Flag = False,
    plot: Path | None = None,
    truth: Path | None = None,
) -> None:
    """The law of the RTT between two hosts, exactly; between one and any other, if only one is told.

    Args:
        src: source address, or a prefix such as 192.0.2.0/24.
        dst: destination address or prefix; several are answered side by side.
        dst_prefix: destination prefix such as 198.51.0.0/16.
        cross_check: answer a prefix also by the average over its likeliest addresses.
        json: print one JSON object; a list of them for several destinations.
        plot: draw the densities to this image file.
        truth: truth.json of a synthetic dump: its law is drawn, or printed, beside the answer.
    """
    from ping_llm.inference import commands

    destinations = [address for group in dst + dst_prefix for address in group]
    if not src and not destinations:
        raise ValueError("give --src ADDRESS, --dst ADDRESS (or --dst-prefix PREFIX/LENGTH), or both")
    commands.rtt(model, known, src or None, destinations or [None], cross_check, json, plot, truth)


def batch(
    model: Model,
    input: Path,
    output: Path,
    context: Path | None = None,
    src_known: str = "auto",
) -> int:
    """Answer a table of queries, row for row. Exit code 3 if some rows could not be answered; these say why.

    Args:
        input: queries (.parquet, .csv, .json, .jsonl; - is CSV or JSON on standard input): src_addr and dst_addr, each an
            address, a prefix, or nothing for any; if wanted query_id, event_time, and rtt (ms, −1 = failed) to score by.
        output: answers, in the order of the queries (by the suffix; - is standard output).
        context: earlier measurements: src_addr, dst_addr, rtt, event_time, query_id. Without query_id, a row is context of
            every later query of its source.
        src_known: how much of the sources is told: all, none, a prefix length, or auto.
    """
    from ping_llm.inference import commands

    return commands.batch(model, input, output, context, src_known)


def dst(
    model: Model,
    known: Known,
    src: str,
    rtt: float | None = None,
    rtt_max: float | None = None,
    prefix: str = "",
    top: int = 10,
    output: Path | None = None,
    json: Flag = False,
) -> None:
    """Which destinations a source pings, given the RTT: the likeliest addresses, found by an exact search.

    Args:
        src: source address, or a prefix.
        rtt: ms that the ping took.
        rtt_max: ms that the ping took at most.
        prefix: only destinations in it.
        top: how many are shown.
        output: write the table to this file (.parquet, .csv, .json, .jsonl; - is standard output).
        json: print one JSON object.
    """
    from ping_llm.inference import commands

    commands.dst(model, known, src, rtt, rtt_max, prefix or None, top, output, json)


def rank(
    model: Model,
    known: Known,
    src: str,
    dst: Several,
    output: Path | None = None,
    json: Flag = False,
) -> None:
    """Which of several destinations is nearest: the probability of each to answer first.

    Args:
        src: source address, or a prefix.
        dst: the candidates.
        output: write the table to this file (.parquet, .csv, .json, .jsonl; - is standard output).
        json: print one JSON object.
    """
    from ping_llm.inference import commands

    commands.rank(model, known, src, [address for group in dst for address in group], output, json)


def sample(
    model: Model,
    src: str = "",
    dst: str = "",
    at: str = "",
    count: int = 10,
    measurements: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    output: Path | None = None,
    json: Flag = False,
) -> None:
    """Draw measurements that the model makes up: whole ones, or what is missing of one.

    Args:
        src: source of the first measurement; a prefix is completed. If absent, the model draws it.
        dst: its destination, likewise; of the two at most one may be a prefix.
        at: its time, ISO 8601.
        count: sequences to draw.
        measurements: of each sequence.
        seed: the same seed gives the same measurements.
        temperature: below 1 prefers what is likely; 0 takes the likeliest.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens that hold this probability.
        min_p: keep tokens that have this share of the probability of the likeliest.
        output: write the table to this file (.parquet, .csv, .json, .jsonl; - is standard output).
        json: print one JSON object.
    """
    from ping_llm.inference import commands

    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    commands.sample(model, (src, dst, at), output, json, count=count, measurements=measurements, **drawn)


def score(
    model: Model,
    input: Path,
    output: Path | None = None,
    history: int = 10,
    anomaly_at: float | None = None,
    src_known: str = "auto",
    top: int = 10,
    json: Flag = False,
) -> None:
    """How surprising measured pings are: nats, and a p-value, of each after the ones before it.

    Args:
        input: measurements: a table (.parquet, .csv, .json, .jsonl; - is standard input) of src_addr, dst_addr, rtt,
            event_time; or an Atlas dump, a folder of dumps, or of rows.
        output: write all of them, scored, to this file (.parquet, .csv, .json, .jsonl; - is standard output).
        history: earlier measurements of the same source that the model is told.
        anomaly_at: mark those whose p-value is at most this.
        src_known: how much of the sources is told: all, none, a prefix length, or auto.
        top: the most surprising ones are shown, so many.
        json: print one JSON object.
    """
    from ping_llm.inference import commands

    commands.score(model, input, output, history, anomaly_at, src_known, top, json)


COMMANDS = {"rtt": rtt, "batch": batch, "dst": dst, "rank": rank, "sample": sample, "score": score}
