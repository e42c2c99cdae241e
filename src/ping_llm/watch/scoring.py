"""Results, each with its context, in; how unlikely each packet was and what was expected out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Reader
from ping_llm.inference.mixture import distributions
from ping_llm.inference.packed import Windows, foresee
from ping_llm.inference.query import Endpoint, Query, SrcKnown
from ping_llm.watch.history import ROW, Asked, in_time_order


class ModelScorer:
    """The p-values of `PingModel.score`, each given the context of its result.

    With `src_known` "whole" they are those of "auto" without the shorter prefixes of the source: one pass in place of up to
    five, and the experts answer beside it. "all" has no experts.
    """

    def __init__(self, reader: Reader, src_known: SrcKnown = "whole") -> None:
        if src_known == "whole":
            whole = {family: {"all": 1.0} for family in ("ipv4", "ipv6")}
            calibration = replace(reader.calibration, src_weights=whole, new_src_weights=whole)
            reader, src_known = replace(reader, calibration=calibration), "auto"
        self.reader, self.src_known = reader, src_known

    def p_values(self, asked: Sequence[Asked]) -> list[list[float]]:
        """Of each packet of each result. Those of a result share its second, so that none is context of another."""
        if not asked:
            return []
        parts, counts, wanted = [], [], []
        for one in asked:
            rows, result = one.context(self.reader.seq_len), one.result
            packets = np.empty(len(result.rtt_ms), ROW)
            packets["dst"], packets["time_s"] = np.frombuffer(result.dst, "u1"), result.time_s
            packets["rtt_ms"] = result.rtt_ms
            parts.append(np.concatenate([rows, packets]))
            counts.append(len(packets))
            wanted.append(np.arange(len(parts[-1])) >= len(rows))
        ends = np.cumsum(counts)[:-1]
        src = np.concatenate([_sources(one.result.src, len(part)) for one, part in zip(asked, parts, strict=True)])
        measured, known = _context(src, np.concatenate(parts)), np.concatenate(wanted)
        windows = _Windows(measured, max(map(len, parts)), self.reader.seq_len, known)
        windows.contexts = {
            row: one
            for one, own in zip(asked, np.split(np.flatnonzero(known), ends), strict=True)
            for row in own.tolist()
        }
        rows, foreseen = foresee(self.reader, windows, self.src_known)
        found = np.empty(len(measured))
        found[rows] = self.reader.calibration.surprise.calibrated(foreseen.p_value)
        of_results = np.split(found[known], ends)
        return [own.tolist() for own in of_results]

    def expected(self, asked: Asked) -> dict[str, Any]:
        """P(no answer), and the median and the 90 % band of an answer in ms."""
        found: RTTDistribution = next(distributions(self.reader, [_query(asked)], self.src_known))[0]
        ms = [None] * 3 if found.p_fail >= 1 else [round(float(found.quantile(q)), 3) for q in (0.05, 0.5, 0.95)]
        return {"p_fail": round(float(found.p_fail), 4), **dict(zip(("q0.05", "q0.5", "q0.95"), ms, strict=True))}


class _Windows(Windows):
    """Windows in which the experts that answer beside the model look at all that is kept, and not at what fits alone."""

    contexts: dict[int, Asked]  # by row

    def queries(self, rows: Sequence[int] | np.ndarray) -> list[Query]:
        """The queries for the results of the measurements `rows`."""
        return [_query(self.contexts[int(row)]) for row in rows]


def _query(asked: Asked) -> Query:
    result, rows = asked.result, in_time_order(*asked.earlier)
    context = _context(_sources(result.src, len(rows)), rows)
    return Query(Endpoint.whole(result.src), Endpoint.whole(result.dst), result.time_s, context)


def _sources(src: bytes, count: int) -> np.ndarray:
    return np.tile(np.frombuffer(src, np.uint8), (count, 1))


def _context(src: np.ndarray, rows: np.ndarray) -> Context:
    columns = np.ascontiguousarray(rows["dst"]), rows["rtt_ms"].astype(np.float64), rows["time_s"].astype(np.int64)
    return Context(src, *columns)
