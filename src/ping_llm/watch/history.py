"""A result and what is kept of its source in, the context by which it is judged out; what a watch needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ping_llm.data.measurement import is_ipv4
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

    @property
    def earlier(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the pair, and of the source to other destinations, from before the second of the result."""
        pair, other = (rows[rows["time_s"] < self.result.time_s] for rows in (self.of_pair, self.of_source))
        return pair, other[(other["dst"] != np.frombuffer(self.result.dst, "u1")).any(axis=1)]

    def context(self, seq_len: int) -> np.ndarray:
        """(n,) ROW in time order: the latest of what is earlier that fit into a window, half of it for the pair."""
        pair, other = self.earlier
        src, dst = (np.frombuffer(end, "u1") for end in (self.result.src, self.result.dst))
        src_bytes, dst_bytes = (4 if is_ipv4(end) else 16 for end in (src, dst))
        own = _ROLES + src_bytes + _TIME_TOKENS + _RESULT_TOKENS
        room = seq_len - 2 * _ABSOLUTE_TIME_TOKENS - 2 * (own + dst_bytes)
        of_pair = min(len(pair), max(room // 2 // (own + dst_bytes), 1))
        lengths = own + np.where(is_ipv4(other["dst"]), 4, 16)[::-1]
        fits = int(np.searchsorted(np.cumsum(lengths), room - of_pair * (own + dst_bytes), "right"))
        return in_time_order(pair[len(pair) - of_pair :], other[len(other) - fits :])


class Scorer(Protocol):
    """What a watch needs of a model."""

    def p_values(self, asked: Sequence[Asked]) -> Sequence[Sequence[float]]:
        """Of each packet of each result, no two of which are of one source."""

    def expected(self, asked: Asked) -> dict[str, Any]:
        """What a result was expected to be, as it is written."""


def in_time_order(*rows: np.ndarray) -> np.ndarray:
    """All of them as one; those of a second in the order given."""
    both = np.concatenate(rows)
    return both[np.argsort(both["time_s"], kind="stable")]
