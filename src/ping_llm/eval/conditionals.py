"""A model and queries in, how good it is when less is given out: prefixes of the destination, or one address alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ping_llm.data.measurement import is_ipv4
from ping_llm.eval.columns import Queries
from ping_llm.eval.model import model_queries, open_queries, records, score_answers
from ping_llm.eval.options import PartOptions
from ping_llm.eval.report import print_lines
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Endpoint, Query
from ping_llm.system.files import try_file

PREFIX_BYTES = {4: (1, 2, 3, 4), 16: (4, 6, 8, 16)}
"""Given of a destination, by the width of its address: /8 … /32, and /32, /48, /64, /128."""


def print_look(options: PartOptions, look: Callable[[PingModel, Queries], list[dict[str, Any]]]) -> None:
    """Prints, and writes to `json`, the lines of a look at the model and queries of the part."""
    try_file(options.json)
    model, split = open_queries(options, 200)
    print_lines(look(model, split.recent), options.json)


def score_queries(model: PingModel, queries: list[Query], rtt_ms: np.ndarray, src_known: str) -> dict[str, float]:
    """Means over n queries and their answers (n,): NLL and CRPS in log-ms, median relative error, P(fail)."""
    (answers,) = score_answers(model, queries, rtt_ms, [src_known])
    scores = answers.columns()
    means = {name: float(np.nanmean(scores[name])) for name in ("nll_nats", "crps_log")}
    error = {"median_rel_error": float(np.nanmedian(scores["relative_error"]))}
    return {"questions": len(queries)} | means | error | {"p_fail": float(scores["p_fail"].mean())}


def by_prefix_length(model: PingModel, queries: Queries) -> list[dict[str, Any]]:
    """One line for each family and number of bits given of the destination."""
    ipv4 = is_ipv4(queries.measurements.addresses)[queries.dst_id]
    lines = []
    for width, lengths in PREFIX_BYTES.items():
        chosen = queries.take(np.flatnonzero(ipv4 == (width == 4)))
        whole = [(query, query.dst) for query in model_queries(chosen)]
        for given in lengths if len(chosen) else ():
            cut = [replace(query, dst=dst.cut(given)) for query, dst in whole if dst is not None]
            scores = score_queries(model, cut, chosen.rtt_ms, "auto")
            lines.append({"family": "ipv4" if width == 4 else "ipv6", "bits": 8 * given} | scores)
    return lines


def by_what_is_known(model: PingModel, queries: Queries) -> list[dict[str, Any]]:
    """One line for each of: both addresses and the time, no time, one address alone."""
    whole, rtt_ms = model_queries(queries.given(0)), queries.rtt_ms
    variants = {
        "src, dst, time": whole,
        "src, dst": [replace(query, time_s=None) for query in whole],
        "src, time": [replace(query, dst=None) for query in whole],
        "dst, time": [replace(query, src=None) for query in whole],
    }
    return [{"told": known} | score_queries(model, one, rtt_ms, "all") for known, one in variants.items()]


def completion_hits(model: PingModel, queries: Queries, top: int) -> list[dict[str, Any]]:
    """How often the whole destination is among the likeliest 1 and `top` completions of its prefix, given source and RTT."""
    hits = defaultdict(list)
    for ping in records(queries):
        dst, rtt = Endpoint.parse(ping["dst_addr"]), ping["rtt"] if ping["rtt"] >= 0 else None
        for given in PREFIX_BYTES[dst.width][:-1]:
            found = model.complete(str(dst.cut(given)), src=ping["src_addr"], rtt=rtt, at=ping["event_time"], top=top)
            texts = found.table.column("dst_addr").to_pylist()
            kind = "ipv4" if dst.width == 4 else "ipv6", 8 * given
            hits[kind].append((ping["dst_addr"] in texts[:1], ping["dst_addr"] in texts))
    lines = []
    for (family, bits), of_kind in sorted(hits.items()):
        shares = dict(zip(("top 1", f"top {top}"), np.mean(of_kind, axis=0).tolist(), strict=True))
        lines.append({"family": family, "bits": bits, "completions": len(of_kind)} | shares)
    return lines
