"""Parsed options in, answers on the terminal or in files out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.data import tokenization as tk
from ping_llm.inference.batch import answer_table, check_columns
from ping_llm.inference.context import Context, parse_time, read_table
from ping_llm.inference.distribution import QUANTILES, RTTDistribution
from ping_llm.inference.output import STANDARD, check_output, print_table, read_input, records, show, write_table
from ping_llm.inference.query import Endpoint, Query
from ping_llm.inference.search import DST_ROLES, SRC_ROLES, address_tokens
from ping_llm.system.progress import show_progress

if TYPE_CHECKING:
    from ping_llm.inference.cli import ModelOptions, Situation

_BAD_ROWS = 3  # exit code


def rtt(
    options: ModelOptions,
    known: Situation,
    src: str | None,
    destinations: Sequence[str | None],
    cross_check: bool,
    as_json: bool,
    plot: Path | None,
    truth: Path | None,
) -> None:
    """Prints, and draws, the laws of pings; see `ping-llm inference rtt --help`."""
    if truth and (len(destinations) > 1 or not src or destinations[0] is None):
        raise ValueError("--truth is the law between two hosts; give one --src and one --dst")
    if len(set(destinations)) < len(destinations):
        raise ValueError("a destination is given twice; give each once")
    table = _read_context(known.context)
    context = Context.parse(table)
    queries = [Query.parse(src, dst, known.at or None, context) for dst in destinations]
    if cross_check and not all(query.dst is not None and query.dst.is_prefix for query in queries):
        raise ValueError("--cross-check averages over the addresses of a prefix; give prefixes as --dst-prefix only")
    true_law = _true_law(truth, src, destinations[0], known.at) if truth else None
    model = options.load()
    names = [dst or "anywhere" for dst in destinations]
    laws = model.rtt_many(queries, known.src_known)
    answers = [law.to_dict() | {"context_given": len(context)} for law in laws]
    shown = dict(zip(names if len(names) > 1 or cross_check else ["model"], laws, strict=True))
    for dst, answer in zip(destinations if cross_check else [], answers, strict=False):
        asked = {"at": known.at or None, "context": table, "src_known": known.src_known}
        law, covered, count = model.rtt_by_completion(src, dst, **asked)
        answer["by_completion"] = law.to_dict() | {"covered_probability": covered, "addresses": count}
        shown[f"{dst}: {count} addresses ({covered:.0%})"] = law
    if as_json:
        several = [{"dst": name} | answer for name, answer in zip(names, answers, strict=True)]
        print(json.dumps(several if len(answers) > 1 else answers[0]))
    else:
        _print_laws(shown, f"RTT {src or 'anywhere'} → {', '.join(names)}", true_law)
        _print_note(laws, len(context))
    if plot:
        from ping_llm.inference.plots import plot_rtt

        to = names[0] if len(names) == 1 else f"{len(names)} destinations"
        plot_rtt(shown, plot, f"{src or 'anywhere'} → {to}" + (f" at {known.at}" if known.at else ""), true_law)


def batch(options: ModelOptions, input: Path, output: Path, context: Path | None, src_known: str) -> int:
    """Answers a table of queries; the exit code. See `ping-llm inference batch --help`."""
    check_output(output)
    queries, suffix = read_input(input)
    earlier = _read_context(context)
    model = options.load()
    with show_progress("answer", queries.num_rows, "queries") as advance:
        answers = answer_table(model, queries, earlier, src_known, advance)
    write_table(answers, output, suffix)
    bad = answers.num_rows - answers.column("error").null_count if "error" in answers.column_names else 0
    if bad:
        print(f"warning: {bad:,} of {answers.num_rows:,} queries are bad; their column error says why", file=sys.stderr)
    return _BAD_ROWS if bad else 0


def dst(
    options: ModelOptions,
    known: Situation,
    src: str,
    rtt_ms: float | None,
    rtt_max: float | None,
    prefix: str | None,
    top: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Shows the likeliest destinations; see `ping-llm inference dst --help`."""
    _check_outputs(output)
    asked = {"rtt": rtt_ms, "rtt_max": rtt_max, "prefix": prefix, "top": top, **_situation(known)}
    found = options.load().destinations(src, **asked)
    proof = "none that is left is likelier" if found.proven else f"one that is left may have {found.bound:.2%}"
    note = f"together {found.covered:.2%}; {proof}"
    more = {"covered": found.covered, "bound": found.bound, "proven": found.proven}
    if found.p_within is not None:
        note += f"; P(RTT ≤ {rtt_max:g} ms) of all {found.p_within:.2%}"
        more["p_within"] = found.p_within
    show(found.table, f"destinations of {src}", output, as_json, note, **more)


def rank(
    options: ModelOptions, known: Situation, src: str, candidates: Sequence[str], output: Path | None, as_json: bool
) -> None:
    """Shows which candidate is nearest; see `ping-llm inference rank --help`."""
    _check_outputs(output)
    if not candidates:
        raise ValueError("no candidates to rank; give at least one with --dst ADDRESS …")
    ranking = options.load().rank(src, candidates, **_situation(known))
    note = f"P(none answers) {ranking.p_none:.4%}"
    show(ranking.table, f"nearest to {src}", output, as_json, note, p_none=ranking.p_none)


def sample(
    options: ModelOptions, told: tuple[str, str, str], output: Path | None, as_json: bool, **drawn: float
) -> None:
    """Shows measurements that the model makes up; see `ping-llm inference sample --help`."""
    from ping_llm.inference.generation import format_measurements, generate

    _check_outputs(output)
    prompt = _beginning(*told)
    model = options.load()
    with model.autocast():
        table = generate(model.gpt, model.device, prompt_tokens=prompt, **drawn)
    if output is None and not as_json:
        print(format_measurements(table))
    else:
        show(table, "", output, as_json)


def score(
    options: ModelOptions,
    input: Path,
    output: Path | None,
    history: int,
    anomaly_at: float | None,
    src_known: str,
    top: int,
    as_json: bool,
) -> None:
    """Scores measurements; see `ping-llm inference score --help`."""
    _check_outputs(output)
    if top < 1:
        raise ValueError(f"--top {top} must be at least 1")
    table = _measurements(input)
    scored = options.load().score(table, history=history, src_known=src_known, anomaly_at=anomaly_at)
    if output is not None:
        return write_table(scored, output)
    total = {"measurements": scored.num_rows, "mean_nll_nats": pc.mean(scored.column("nll_nats")).as_py()}
    if anomaly_at is not None:
        total["anomalies"] = pc.sum(scored.column("anomaly")).as_py() or 0
    likeliest_last = scored.take(pc.sort_indices(scored, [("p_value", "ascending"), ("nll_nats", "descending")]))
    if as_json:
        return print(json.dumps({"rows": records(likeliest_last.slice(0, top)), **total}))
    note = ", ".join(f"{name} {value:,.6g}" for name, value in total.items())
    print_table(likeliest_last.slice(0, top), "the most surprising measurements", note)


def _check_outputs(output: Path | None) -> None:
    if output is not None:
        check_output(output)


def _read_context(path: Path | None) -> pa.Table | None:
    if path is None:
        return None
    table = read_table(path)
    if not table.num_rows:
        raise ValueError(f"{path} holds no measurements; leave out --context, or name a file that holds some")
    check_columns(table, f"the context {path}", ("src_addr", "dst_addr", "rtt"))
    return table


def _situation(known: Situation) -> dict[str, object]:
    """What is known, as the methods of PingModel take it."""
    return {"at": known.at or None, "context": _read_context(known.context), "src_known": known.src_known}


def _measurements(path: Path) -> pa.Table:
    """The measurements of a table, a dump or a folder: src_addr, dst_addr, rtt, event_time."""
    if path == STANDARD or (path.suffix in (".parquet", ".csv", ".json", ".jsonl") and not _is_dump(path)):
        table, _ = read_input(path)
        if "pings" not in table.column_names:
            check_columns(table, str(path), ("src_addr", "dst_addr", "rtt"))
            return table
    from ping_llm.inference.scoring import dump_table

    if not path.exists():
        raise ValueError(f"no file or folder {path}")
    return dump_table(path)


def _is_dump(path: Path) -> bool:
    """Whether a JSON file holds Atlas results, each with its packets, and not a table of measurements."""
    if path.is_dir():
        return True
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"result"' in file.read(1 << 16)


def _beginning(src: str, dst: str, at: str) -> list[int]:
    """The tokens of what is told of a measurement, to be completed: a prefix comes last, for its other bytes follow."""
    ends = [(Endpoint.parse(text), roles) for text, roles in ((src, SRC_ROLES), (dst, DST_ROLES)) if text]
    for end, _ in ends:
        if end.extra_bits:
            whole = f"/{8 * end.told_bytes} or /{8 * end.told_bytes + 8}"
            raise ValueError(f"{end} does not end on a byte, and samples complete whole bytes; give one like {whole}")
    if sum(end.is_prefix for end, _ in ends) > 1:
        raise ValueError(
            f"{src} and {dst} are both prefixes, and only what comes last can be completed; give one whole"
        )
    fields = [(end.is_prefix, address_tokens(roles, end).tolist()) for end, roles in ends]
    if at:
        seconds = parse_time(at).to_bytes(8, "big")
        fields.append((False, [tk.TIMESTAMP_ABS, *(tk.BYTE_0 + byte for byte in seconds)]))
    ordered = sorted(fields, key=lambda field: field[0])
    return [tk.MEASUREMENT_START, *(token for _, tokens in ordered for token in tokens)]


def _true_law(path: Path, src: str, dst: str, at: str):
    from ping_llm.data.synthetic.truth import Truth

    return Truth.load(path).rtt_distribution(src, dst, parse_time(at) if at else None)


def _print_laws(laws: Mapping[str, RTTDistribution], title: str, true_law) -> None:
    """One table, a column for each law."""
    from rich.console import Console
    from rich.table import Table

    shown = dict(laws) | ({} if true_law is None else {"true law": true_law})
    table = Table()
    table.add_column("")
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row("P(no answer)", *(f"{law.p_fail:.2%}" for law in shown.values()))
    for q in QUANTILES:
        name = "median" if q == 0.5 else f"{q:.0%} quantile"
        table.add_row(name, *("" if law.p_fail >= 1 else f"{law.quantile(q):.4g} ms" for law in shown.values()))
    console = Console()
    console.print(title)
    console.print(table)


def _print_note(laws: Sequence[RTTDistribution], given: int) -> None:
    """How the answers came about."""
    from rich.console import Console

    told = sorted({law.context_measurements for law in laws})
    kept = f"{told[0]}" if len(told) == 1 else f"{told[0]} to {told[-1]}"
    of_all = f"{kept} of {given}" if told[0] < given else kept
    least = min(law.total_probability for law in laws)
    note = (
        f"{max(law.forward_passes for law in laws)} forward passes over {of_all} earlier measurements; "
        f"{least:.4%} of the raw probability lay on valid results"
    )
    if len(laws) == 1 and len(laws[0].src_weights) > 1:
        note += "\nof the source told: " + ", ".join(f"{name} {w:.1%}" for name, w in laws[0].src_weights.items())
    Console().print(note)
