"""The command line of `ping-llm inference` in, answers on the terminal or in files out.

The signature of each command is what `--help` shows. Nothing heavy is imported before the options are parsed, so that
`--help` answers at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from ping_llm.inference.model import PingModel

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Several = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]  # --dst A B --dst C
_BAD_ROWS = 3  # exit code
OF_PRETRAINED = (
    "answered by the small model that comes with the package (see its model card): far from its data answers are wide on "
    "purpose, and those with --context are better"
)


@dataclass(frozen=True)
class ModelOptions:
    """The model that answers."""

    model: str | None = None
    """Run folder of a trained model, a folder that ping-llm export wrote, or OWNER/NAME of the Hugging Face hub; if absent,
    the model that comes with the package."""
    device: str = "auto"
    """cpu, cuda or auto."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster; probabilities differ by some percent of themselves."""

    def load(self, memory: Path | None = None) -> PingModel:
        """Reads it, a run's best checkpoint; says on the standard error stream what answers where none is named."""
        from ping_llm.inference.model import PingModel

        model = PingModel.load(self.model, self.device, self.precision, memory)
        if self.model is None:
            print(OF_PRETRAINED, file=sys.stderr)
        return model


@dataclass(frozen=True)
class Situation:
    """What is known beside source and destination of a ping."""

    at: str = ""
    """Time of the ping, ISO 8601 (UTC if it names no zone). If absent, any time, and those of the context are left out."""
    context: Path | None = None
    """Earlier measurements of the source (.parquet, .csv, .json, .jsonl): src_addr, dst_addr, rtt, event_time. Earlier
    is from a second before --at."""
    one_host: Flag = False
    """The context may hold other sources than --src: all are addresses of one host."""
    any_source: Flag = False
    """The context may hold pings of other hosts, as evidence of the destination."""
    src_known: str = "auto"
    """How much of the source is known: all, none, a prefix length, or auto: several, weighted by how well each
    explains the context."""

    def read(self) -> dict[str, Any]:
        """The same, as the methods of PingModel take it."""
        from ping_llm.inference.files import read_context

        given = {"at": self.at or None, "context": read_context(self.context), "src_known": self.src_known}
        return given | {"one_host": self.one_host, "any_source": self.any_source}


Model = tyro.conf.OmitArgPrefixes[ModelOptions]
Known = tyro.conf.OmitArgPrefixes[Situation]


def rtt(
    model: Model,
    known: Known,
    src: str = "",
    dst: Several = (),
    dst_prefix: Several = (),
    json: Flag = False,
    plot: Path | None = None,
    truth: Path | None = None,
    memory: Path | None = None,
) -> None:
    """The distribution of the RTT between two hosts, exactly; of one with any other, if only one is given.

    Args:
        src: source address, or a prefix such as 192.0.2.0/24.
        dst: destination address or prefix; several are answered side by side.
        dst_prefix: destination prefix such as 198.51.0.0/16.
        json: print one JSON object; a list of them for several destinations.
        plot: draw the densities to this image file.
        truth: truth.json of a synthetic dump: the true distribution is drawn, or printed, beside the answer.
        memory: folder of rows; what its train part holds of the source and the pair before --at joins a short context.
    """
    destinations: list[str | None] = [address for group in dst + dst_prefix for address in group]
    if not src and not destinations:
        raise ValueError("give --src ADDRESS, --dst ADDRESS (or --dst-prefix PREFIX/LENGTH), or both")
    if truth and (len(destinations) != 1 or not src):
        raise ValueError("--truth is the distribution between two hosts; give one --src and one --dst")
    if len(set(destinations)) < len(destinations):
        raise ValueError("a destination is given twice; give each once")
    from ping_llm.data.synthetic.truth import Truth
    from ping_llm.data.times import parse_time
    from ping_llm.inference.answers import rtt_answer
    from ping_llm.inference.context import Context
    from ping_llm.inference.files import print_distributions, print_json
    from ping_llm.inference.query import Query

    if plot:
        from ping_llm.inference.plots import check_picture

        check_picture(plot, len(destinations) or 1)
    given = known.read()
    context = Context.parse(given["context"], known.one_host, known.any_source)
    queries = [Query.parse(src or None, to, given["at"], context) for to in destinations or [None]]
    time_s = parse_time(known.at) if known.at else None
    true = Truth.load(truth).rtt_distribution(src, destinations[0], time_s) if truth and destinations[0] else None
    found = model.load(memory).rtt_many(queries, known.src_known)
    names = [to or "anywhere" for to in destinations or [None]]
    shown = dict(zip(names if len(names) > 1 else ["model"], found, strict=True))
    if json:
        answers = [rtt_answer(one, len(context)) for one in found]
        several = [{"dst": name} | answer for name, answer in zip(names, answers, strict=True)]
        print_json(several if len(answers) > 1 else answers[0])
    else:
        print_distributions(shown, f"RTT {src or 'anywhere'} → {', '.join(names)}", true, len(context))
    if plot:
        from ping_llm.inference.plots import plot_rtt

        to = names[0] if len(names) == 1 else f"{len(names)} destinations"
        plot_rtt(shown, plot, f"{src or 'anywhere'} → {to}" + (f" at {known.at}" if known.at else ""), true)


def batch(
    model: Model,
    input: Path,
    output: Path,
    context: Path | None = None,
    one_host: Flag = False,
    any_source: Flag = False,
    src_known: str = "auto",
    memory: Path | None = None,
) -> int:
    """Answer a table of queries, row for row. Exit code 3 if some rows could not be answered; these say why.

    Args:
        input: queries (.parquet, .csv, .json, .jsonl; - is standard input): src_addr and dst_addr, each an
            address, a prefix, or nothing for any; if wanted query_id, event_time, and rtt (ms, −1 = failed) to score by.
        output: answers, in the order of the queries (by the suffix; - is standard output).
        context: earlier measurements: src_addr, dst_addr, rtt, event_time, query_id. Without query_id, a row is context of
            every query of its source from a later second.
        one_host: all sources of the context are addresses of one host: without query_id, a row is context of every query
            from a later second that names a source.
        any_source: the context may hold pings of other hosts, as evidence of the destinations: without query_id, a row is
            context of every query from a later second that names a source.
        src_known: how much of the sources is known: all, none, a prefix length, or auto.
        memory: folder of rows; what its train part holds of a query's source and pair before it joins a short context.
    """
    from ping_llm.data.in_memory import count_rows
    from ping_llm.inference.batch import answer_table
    from ping_llm.inference.files import as_arrow, check_output, read_context, read_input, write_table
    from ping_llm.system.progress import show_progress

    check_output(output)
    queries, suffix = read_input(input)
    earlier, reader = read_context(context), model.load(memory)
    count = count_rows(queries)
    hosts = {"one_host": one_host, "any_source": any_source}
    with show_progress("answer", count, "queries") as advance:
        answers = answer_table(reader, queries, earlier, src_known, advance, **hosts)
    write_table(answers, output, suffix)
    answers = as_arrow(answers)
    bad = count - answers.column("error").null_count if "error" in answers.column_names else 0
    if bad:
        print(f"warning: {bad:,} of {count:,} queries are bad; their column error says why", file=sys.stderr)
    return _BAD_ROWS if bad else 0


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
    from ping_llm.inference.answers import search_totals
    from ping_llm.inference.files import check_output, show

    check_output(output)
    given = {"rtt": rtt, "rtt_max": rtt_max, "prefix": prefix or None, "top": top, **known.read()}
    found = model.load().destinations(src, **given)
    proof = "none that is left is likelier" if found.proven else f"one that is left may have {found.bound:.2%}"
    note = f"together {found.covered:.2%}; {proof}"
    if found.p_within is not None:
        note += f"; P(RTT ≤ {rtt_max:g} ms) of all {found.p_within:.2%}"
    show(found.table, f"destinations of {src}", output, json, note, **search_totals(found))


def rank(model: Model, known: Known, src: str, dst: Several, output: Path | None = None, json: Flag = False) -> None:
    """Which of several destinations is nearest: the probability of each to answer first.

    Args:
        src: source address, or a prefix.
        dst: the candidates.
        output: write the table to this file (.parquet, .csv, .json, .jsonl; - is standard output).
        json: print one JSON object.
    """
    from ping_llm.inference.answers import ranking_totals
    from ping_llm.inference.files import check_output, show

    check_output(output)
    candidates = [address for group in dst for address in group]
    if not candidates:
        raise ValueError("no candidates to rank; give at least one with --dst ADDRESS …")
    ranking = model.load().rank(src, candidates, **known.read())
    note = f"P(none answers) {ranking.p_none:.4%}"
    show(ranking.table, f"nearest to {src}", output, json, note, **ranking_totals(ranking))


def sample(
    model: Model,
    src: str = "",
    dst: str = "",
    at: str = "",
    count: int = 10,
    measurements: int = 1,
    seed: int | None = None,
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
        seed: the same seed gives the same measurements; without one, every call draws others.
        temperature: below 1 prefers what is likely; 0 takes the likeliest.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens that hold this probability.
        min_p: keep tokens that have this share of the probability of the likeliest.
        output: write the table to this file (.parquet, .csv, .json, .jsonl; - is standard output).
        json: print one JSON object.
    """
    from ping_llm.inference.files import check_output, show
    from ping_llm.inference.generate import format_measurements, prompt_of

    check_output(output)
    prompt = prompt_of(src, dst, at)
    drawn = partial(model.load().generate, count, prompt_tokens=prompt, measurements=measurements, seed=seed)
    table = drawn(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if output is None and not json:
        print(format_measurements(table))
    else:
        show(table, "", output, json)


def score(
    model: Model,
    input: Path,
    output: Path | None = None,
    history: int = 8,
    one_host: Flag = False,
    anomaly_at: float | None = None,
    src_known: str = "auto",
    top: int = 10,
    json: Flag = False,
    keep_going: Flag = False,
) -> None:
    """How surprising measured pings are: nats, and a p-value, of each after the ones before it.

    Args:
        input: measurements: a table (.parquet, .csv, .json, .jsonl; - is standard input) of src_addr, dst_addr, rtt,
            event_time; or an Atlas dump, a folder of dumps, or of rows.
        output: write all of them, scored, to this file (.parquet, .csv, .json, .jsonl; - is standard output).
        history: measurements of the same source, from earlier seconds, that are the context of each, at least; more are
            read where there is room; 0 reads none.
        one_host: all sources are addresses of one host, and count as one.
        anomaly_at: mark those whose p-value is at most this.
        src_known: how much of the sources is known: all, none, a prefix length, or auto.
        top: the most surprising ones are shown, so many, with what was expected.
        json: print one JSON object.
        keep_going: score what can be read of a damaged dump instead of stopping.
    """
    from ping_llm.inference.answers import most_surprising, score_totals
    from ping_llm.inference.files import as_arrow, check_output, read_measurements, show, write_table

    check_output(output)
    if top < 1:
        raise ValueError(f"--top {top} must be at least 1")
    table = read_measurements(input, keep_going)
    reader = model.load()
    scored = reader.score(table, history, src_known, anomaly_at, one_host=one_host)
    if output is not None:
        return write_table(scored, output)
    scored = as_arrow(scored)
    total = score_totals(scored)
    listed = most_surprising(reader, scored, top, history, src_known, one_host=one_host)
    note = ", ".join(f"{name} {value:,.6g}" for name, value in total.items() if value is not None)
    show(listed, "the most surprising measurements, and what was expected", None, json, note, **total)


COMMANDS = {"rtt": rtt, "batch": batch, "dst": dst, "rank": rank, "sample": sample, "score": score}
