"""A model and queries in, how good it is when less is told out: prefixes of the destination, or both ends by turns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ping_llm.data.measurement import is_ipv4
from ping_llm.eval.columns import Measurements, Queries
from ping_llm.eval.extras import records
from ping_llm.eval.model import LARGEST_NLL, model_queries
from ping_llm.eval.queries import SplitQueries
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Endpoint, Query

PREFIX_BYTES = {4: (1, 2, 3, 4), 16: (4, 6, 8, 16)}
"""Told of a destination, by the width of its address: /8 … /32, and /32, /48, /64, /128."""


def open_questions(
    run: Path, data: Path, part: str, count: int, seed: int, device: str
) -> tuple[PingModel, SplitQueries]:
    """A model, and queries of one part of a folder of rows; ValueError if either is missing."""
    model = PingModel.load(run, device)
    parts = tuple(dict.fromkeys(("train", "val", part)))
    return model, SplitQueries.draw(Measurements.from_rows(data, parts), part, count, seed)


def score_questions(
    model: PingModel, asked: list[Query], rtt_ms: np.ndarray, src_known: str = "auto"
) -> dict[str, float]:
    """Means over n questions and their answers (n,): NLL and CRPS in log-ms, median relative error, P(fail)."""
    nll, crps, error, p_fail = (np.empty(len(asked)) for _ in range(4))
    done = 0
    for laws in model.distributions(asked, src_known):
        here = slice(done, done + len(laws))
        nll[here] = np.minimum(-laws.log_density(rtt_ms[here]), LARGEST_NLL)
        crps[here], p_fail[here] = laws.crps(rtt_ms[here]), laws.p_fail
        error[here] = np.where(rtt_ms[here] > 0, np.abs(laws.median / np.maximum(rtt_ms[here], 1e-3) - 1), np.nan)
        done += len(laws)
    return {
        "questions": len(asked),
        "nll_nats": float(nll.mean()),
        "crps_log": float(np.nanmean(crps)),
        "median_rel_error": float(np.nanmedian(error)),
        "p_fail": float(p_fail.mean()),
    }


def by_prefix_length(model: PingModel, queries: Queries, src_known: str = "auto") -> list[dict]:
    """One line for each family and number of bits told of the destination."""
    ipv4 = is_ipv4(queries.measurements.addresses)[queries.measurements.dst_id[queries.rows]]
    lines = []
    for width, lengths in PREFIX_BYTES.items():
        chosen = queries.take(np.flatnonzero(ipv4 == (width == 4)))
        for told in lengths if len(chosen) else ():
            asked = [replace(query, dst=query.dst.cut(told)) for query in model_queries(chosen)]
            scores = score_questions(model, asked, chosen.rtt_ms.astype(np.float64), src_known)
            lines.append({"family": "ipv4" if width == 4 else "ipv6", "bits": 8 * told} | scores)
    return lines


def by_what_is_told(model: PingModel, queries: Queries) -> list[dict]:
    """One line for each of: both ends and the time, no time, one end alone."""
    asked, rtt_ms = model_queries(queries.told(0)), queries.rtt_ms.astype(np.float64)
    variants = {
        "src, dst, time": asked,
        "src, dst": [replace(query, time_s=None) for query in asked],
        "src, time": [replace(query, dst=None) for query in asked],
        "dst, time": [replace(query, src=None) for query in asked],
    }
    return [{"told": told} | score_questions(model, one, rtt_ms, "all") for told, one in variants.items()]


def completion_hits(model: PingModel, queries: Queries, top: int) -> list[dict]:
    """How often the whole destination is among the likeliest 1 and `top` completions of its prefix, source and RTT told."""
    lines = []
    for ping in records(queries):
        dst = Endpoint.parse(ping["dst_addr"])
        rtt = ping["rtt"] if ping["rtt"] >= 0 else None
        for told in PREFIX_BYTES[dst.width][:-1]:
            found = model.complete(str(dst.cut(told)), src=ping["src_addr"], rtt=rtt, at=ping["event_time"], top=top)
            texts = found.table.column("dst_addr").to_pylist()
            hit = (ping["dst_addr"] in texts[:1], ping["dst_addr"] in texts)
            lines.append({"family": "ipv4" if dst.width == 4 else "ipv6", "bits": 8 * told, "hit": hit})
    kinds = dict.fromkeys((line["family"], line["bits"]) for line in lines)
    summary = []
    for family, bits in sorted(kinds):
        hits = np.array([line["hit"] for line in lines if (line["family"], line["bits"]) == (family, bits)])
        first, any_ = hits.mean(axis=0).tolist()
        summary.append({"family": family, "bits": bits, "completions": len(hits), "top 1": first, f"top {top}": any_})
    return summary
