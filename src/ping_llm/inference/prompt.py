"""A query in, the tokens that the model reads before it answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import ADDRESS_BYTES, is_ipv4
from ping_llm.inference.context import Context
from ping_llm.inference.query import Endpoint, Query

DST_ROLES, SRC_ROLES = (tk.DST_IPV4, tk.DST_IPV6), (tk.SRC_IPV4, tk.SRC_IPV6)
SAME_DST_SHARE = 0.5  # of a context that is too long: at most so many measurements are kept for their destination alone
_LAST = 9.0  # sorts a field behind the result
_LONGEST = 3 + 1 + ADDRESS_BYTES  # tokens that may follow an opening: a result and an address


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens up to where the result of the query comes next.

    The first `context_length` tokens are the context. `also_legal` are the tokens other than a result that the grammar
    allows at the end: the query is not about them.
    """

    tokens: np.ndarray  # (T,) int64
    context_length: int
    also_legal: np.ndarray  # (n,) int64
    context_measurements: int

    @property
    def context(self) -> np.ndarray:
        """Tokens of the context."""
        return self.tokens[: self.context_length]


def build_prompt(query: Query, seq_len: int) -> Prompt:
    """Context and query as tokens; of a context that does not fit in seq_len tokens, see `fitting_places`."""
    places = fitting_places(query, seq_len)
    tokens, starts = _encode(query, query.context.take(places))
    after_result = 1 if query.src is None else 2 if query.dst is None else 0  # tokens of the address that is not given
    tokens = tokens[: len(tokens) - 1 - after_result]  # FAILED stands where the result comes
    return Prompt(tokens.astype(np.int64), int(starts[-2]), _also_legal(query), len(places))


def fitting_places(query: Query, seq_len: int) -> np.ndarray:
    """Places of what fits of a query's context in seq_len tokens, ascending, (n,): some measurements of the same
    destination, up to half, and the most recent."""
    ranked, fitting, too_many = _most_useful_first(query), 0, len(query.context) + 1
    count = len(query.context)  # most often all fit
    while too_many - fitting > 1:
        tokens, _ = _encode(query, query.context.take(np.sort(ranked[:count])))
        fits = len(tokens) <= seq_len - 1  # FAILED gives way to RTT_START and byte 1
        fitting, too_many = (count, too_many) if fits else (fitting, count)
        count = (fitting + too_many) // 2
    return np.sort(ranked[:fitting])


def _most_useful_first(query: Query) -> np.ndarray:
    """Places of the context, (n,): of each pair one of the same destination and one of any, the most recent first; those of
    other hosts to other destinations come last."""
    newest_first = np.arange(len(query.context))[::-1]
    rank = newest_first.astype(np.float64)  # (n,) by place: the oldest comes last
    rank += len(rank) * ~_of_source(query, query.context.src)
    if query.dst is not None:
        same = newest_first[query.dst.covers(query.context.dst[newest_first])]
        rank[same] = np.minimum(rank[same], np.arange(len(same)) / SAME_DST_SHARE - 0.5)
    return np.argsort(rank, kind="stable")


def _encode(query: Query, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """The context, then the query as a failed ping: its FAILED token stands where the result comes."""
    source, destination = query.src, query.dst  # of one that is not given, only the family is encoded, and then cut off
    if source is None:
        assert destination is not None, query
        source = Endpoint(destination.packed, 0)
    elif destination is None:
        destination = Endpoint(source.packed, 1)
    ends = (np.frombuffer(end.packed, np.uint8)[None] for end in (source, destination))
    src, dst = (np.concatenate(both) for both in zip((context.src, context.dst), ends, strict=True))
    share = source.known_bytes / source.width  # a window cuts all addresses of its source alike
    known = np.where(_of_source(query, src), share, 1) * np.where(is_ipv4(src), 4, 16)
    dst_bytes = np.where(is_ipv4(dst), 4, 16)
    dst_bytes[-1] = destination.known_bytes
    earlier_s = np.zeros(len(context), dtype=np.int64) if context.time_s is None else context.time_s
    timed = np.full(len(src), query.time_s is not None and context.time_s is not None)
    timed[-1] = query.time_s is not None
    # A prefix comes first: after a whole address no more bytes of it can follow.
    dst_first = query.src is None or (query.dst is not None and query.dst.is_prefix and not query.src.is_prefix)
    own = (tk.RESULT_LAST_DST_FIRST if dst_first else tk.RESULT_LAST).copy()
    own[[query.src is None, query.dst is None, False, False]] = _LAST
    fields = tk.Fields(
        src=src,
        dst=dst,
        src_bytes=known.astype(np.int64),
        dst_bytes=dst_bytes,
        rtt_ms=np.append(context.rtt_ms, -1.0),
        time_s=np.append(earlier_s, query.time_s or 0),
        timed=timed,
        order=np.concatenate([np.tile(tk.RESULT_LAST, (len(context), 1)), [own]]),
        window=np.zeros(len(src), dtype=np.int64),
    )
    return tk.encode(fields)


def _of_source(query: Query, src: np.ndarray) -> np.ndarray:
    """(n,) which of (n, 16) addresses of a context are the source's: all, unless it may be of any."""
    if query.src is None or not query.context.any_source:
        return np.ones(len(src), dtype=bool)
    return query.src.given.covers(src)


def _also_legal(query: Query) -> np.ndarray:
    """A timestamp, the source or the destination, if not given; more bytes of the last address, if it is a prefix."""
    legal = []
    if query.src is None:
        legal += [tk.SRC_IPV4, tk.SRC_IPV6]
    if query.dst is None:
        legal += [tk.DST_IPV4, tk.DST_IPV6]
    if query.time_s is None:
        legal.append(tk.TIMESTAMP_ABS)
        ends = [end for end in (query.src, query.dst) if end is not None]
        if all(end.is_prefix for end in ends):
            legal += range(tk.BYTE_0, tk.VOCAB_SIZE)
    return np.array(legal, dtype=np.int64)


def opening(query: Query, seq_len: int, rtt_ms: float | None = None) -> np.ndarray:
    """Tokens up to where the missing source or destination comes next, (T,): context, what is given, then the RTT (ms)."""
    if query.src is None and query.dst is None:
        tokens = [tk.MEASUREMENT_START, *([] if query.time_s is None else time_tokens(query.time_s))]
    else:
        tokens = build_prompt(query, seq_len - _LONGEST).tokens.tolist()
    if rtt_ms is not None:
        code = int(tk.encode_rtt(np.array(rtt_ms)))
        tokens += [tk.RTT_START, *byte_tokens(code.to_bytes(2, "big"))]
    return np.array(tokens, dtype=np.int64)


def address_tokens(roles: Sequence[int], end: Endpoint) -> np.ndarray:
    """The role, of those for IPv4 and for IPv6, and the whole bytes that are known of an endpoint."""
    return np.array([roles[end.width == ADDRESS_BYTES], *byte_tokens(end.known)], dtype=np.int64)


def time_tokens(time_s: int) -> list[int]:
    """An absolute time: its role and eight bytes."""
    return [tk.TIMESTAMP_ABS, *byte_tokens(time_s.to_bytes(8, "big"))]


def byte_tokens(value: bytes) -> list[int]:
    """The token of each byte."""
    return [tk.BYTE_0 + byte for byte in value]
