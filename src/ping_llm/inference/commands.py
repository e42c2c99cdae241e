"""Parsed options in, answers on the terminal out."""

from __future__ import annotations

import json
from pathlib import Path

from ping_llm.inference.distribution import QUANTILES, RTTDistribution
from ping_llm.inference.predictor import PingModel
from ping_llm.inference.query import parse_time, read_table


def rtt(
    model: Path,
    src: str,
    dst: str,
    at: str | None,
    context: Path | None,
    as_json: bool,
    plot: Path | None,
    truth: Path | None,
    device: str,
) -> None:
    """Prints, and draws, the law of one ping; see `ping-llm inference rtt --help`."""
    table = read_table(context) if context else None
    if table is not None and not table.num_rows:
        raise ValueError(f"{context} holds no measurements; leave out --context, or name a file that holds some")
    law = _true_law(truth, src, dst, at) if truth else None
    answer = PingModel.load(model, device).rtt(src, dst, at, table)
    if as_json:
        print(json.dumps(answer.to_dict()))
    else:
        _print_answer(answer, src, dst, law)
    if plot:
        answer.plot(plot, f"{src} → {dst}" + (f" at {at}" if at else ""), law)


def _true_law(path: Path, src: str, dst: str, at: str | None):
    from ping_llm.data.truth import Truth

    return Truth.load(path).rtt_distribution(src, dst, parse_time(at) if at else None)


def _print_answer(answer: RTTDistribution, src: str, dst: str, law) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"RTT {src} → {dst}", title_justify="left")
    table.add_column("")
    table.add_column("model", justify="right")
    if law is not None:
        table.add_column("true law", justify="right")
    rows = [("P(no answer)", f"{answer.p_fail:.2%}", "" if law is None else f"{law.p_fail:.2%}")]
    for q in QUANTILES if answer.p_fail < 1 else ():
        name = "median" if q == 0.5 else f"{q:.0%} quantile"
        rows.append((name, f"{answer.quantile(q):.4g} ms", "" if law is None else f"{law.quantile(q):.4g} ms"))
    for row in rows:
        table.add_row(*row[: len(table.columns)])
    console = Console()
    console.print(table)
    console.print(
        f"{answer.forward_passes} forward passes over {answer.context_measurements} earlier measurements; "
        f"{answer.total_probability:.4%} of the raw probability lay on valid results"
    )
