"""Results, each with its context, in; how unlikely each was and what was expected out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ping_llm.data.measurement import is_ipv4
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Reader
from ping_llm.inference.mixture import distributions
from ping_llm.inference.packed import Windows, foresee
from ping_llm.inference.query import Endpoint, Query, SrcKnown
from ping_llm.watch.arrivals import Result

ROW = np.dtype([("dst", "u1", 16), ("time_s", "<i8"), ("rtt_ms", "<f4")])
"""A measurement of a known source."""
_TIME_TOKENS, _RESULT_TOKENS, _ROLES = 5, 3, 3
_ABSOLUTE_TIME_TOKENS = 9


@dataclass(frozen=True, eq=False)
class Asked:
    """A result, and earlier measurements of its source."""

    result: Result
    of_pair: np.ndarray  # (p,) ROW, in time order
    of_source: np.ndarray  # (s,) ROW, in time order, of any destination

    def context(self, seq_len: int) -> np.ndarray:
        """(n,) ROW in time order, all before the second of the result: of what fits, half at least of the pair."""
        pair, other = (rows[rows["time_s"] < self.result.time_s] for rows in (self.of_pair, self.of_source))
        other = other[(other["dst"] != np.frombuffer(self.result.dst, "u1")).any(axis=1)]
        src, dst = (np.frombuffer(end, "u1") for end in (self.result.src, self.result.dst))
        src_bytes, dst_bytes = (4 if is_ipv4(end) else 16 for end in (src, dst))
        own = _ROLES + src_bytes + _TIME_TOKENS + _RESULT_TOKENS
        room = seq_len - 2 * _ABSOLUTE_TIME_TOKENS - 2 * (own + dst_bytes)
        of_pair = min(len(pair), max(room // 2 // (own + dst_bytes), 1))
        lengths = own + np.where(is_ipv4(other["dst"]), 4, 16)[::-1]
        fits = int(np.searchsorted(np.cumsum(lengths), room - of_pair * (own + dst_bytes), "right"))
        rows = np.concatenate([pair[len(pair) - of_pair :], other[len(other) - fits :]])
        return rows[np.argsort(rows["time_s"], kind="stable")]


class Scorer(Protocol):
    """What a watch needs of a model."""

    def p_values(self, asked: Sequence[Asked]) -> list[float]:
        """Of each result; no two are of one source."""

    def expected(self, asked: Asked) -> dict[str, Any]:
        """What a result was expected to be, as it is written."""


class ModelScorer:
    """The p-values of `PingModel.score`, of results of several packets."""

    def __init__(self, reader: Reader, src_known: SrcKnown = "auto") -> None:
        self.reader, self.src_known = reader, src_known

    def p_values(self, asked: Sequence[Asked]) -> list[float]:
        """Of each result that of its middle packet, of an even number the larger one of the two in the middle.

        The packets of a result share its second, so that none is context of another. Their p-values are those of one
        packet each; where all say the same, so does the middle one, and if they are independent it is small less often than
        it says: one stray packet is no anomaly.
        """
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
        src = np.concatenate([_sources(one.result.src, len(part)) for one, part in zip(asked, parts, strict=True)])
        measured, known = _context(src, np.concatenate(parts)), np.concatenate(wanted)
        windows = Windows(measured, max(map(len, parts)), self.reader.seq_len, known)
        rows, foreseen = foresee(self.reader, windows, self.src_known)
        found = np.empty(len(measured))
        found[rows] = self.reader.calibration.surprise.calibrated(foreseen.p_value)
        of_results = np.split(found[known], np.cumsum(counts)[:-1])
        return [float(np.sort(own)[len(own) // 2]) for own in of_results]

    def expected(self, asked: Asked) -> dict[str, Any]:
        """P(no answer), and the median and the 90 % band of an answer in ms."""
        rows, result = asked.context(self.reader.seq_len), asked.result
        context = _context(_sources(result.src, len(rows)), rows)
        query = Query(Endpoint.whole(result.src), Endpoint.whole(result.dst), result.time_s, context)
        found: RTTDistribution = next(distributions(self.reader, [query], self.src_known))[0]
        ms = [None] * 3 if found.p_fail >= 1 else [round(float(found.quantile(q)), 3) for q in (0.05, 0.5, 0.95)]
        return {"p_fail": round(float(found.p_fail), 4), **dict(zip(("q0.05", "q0.5", "q0.95"), ms, strict=True))}


def _sources(src: bytes, count: int) -> np.ndarray:
    return np.tile(np.frombuffer(src, np.uint8), (count, 1))


def _context(src: np.ndarray, rows: np.ndarray) -> Context:
    columns = np.ascontiguousarray(rows["dst"]), rows["rtt_ms"].astype(np.float64), rows["time_s"].astype(np.int64)
    return Context(src, *columns)
