"""A query in, the tokens that the model reads before it answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import ADDRESS_BYTES, is_ipv4
from ping_llm.inference.context import Context
from ping_llm.inference.query import Endpoint, Query

DST_ROLES, SRC_ROLES = (tk.DST_IPV4, tk.DST_IPV6), (tk.SRC_IPV4, tk.SRC_IPV6)
SAME_DST_SHARE = 0.5  # of a context that is too long: at most so many measurements are kept for their destination alone
_LAST = 9.0  # sorts a field behind the result
LEAST_TOKENS = 8  # of a context measurement: start, a source of no bytes, a whole IPv4 destination, a failure
_LONGEST = 3 + 1 + ADDRESS_BYTES  # tokens that may follow an opening: a result and an address


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens up to where the result of the query comes next.

    The first `context_length` tokens are the context; the first `stem_length` are that and the first address of the query,
    which other queries may share; the first `parts_length` are all before the last byte that is known of the destination or,
    without one, of the source: queries that are parts of one share these. `also_legal` are the tokens other than a result
    that the grammar allows at the end: the query is not about them.
    """

    tokens: np.ndarray  # (T,) int64
    context_length: int
    stem_length: int
    parts_length: int
    also_legal: np.ndarray  # (n,) int64
    context_measurements: int

    @property
    def context(self) -> np.ndarray:
        """Tokens of the context."""
        return self.tokens[: self.context_length]


def build_prompt(query: Query, seq_len: int) -> Prompt:
    """Context and query as tokens; of a context that does not fit in seq_len tokens, see `fitting_places`."""
    return build_prompts([query], seq_len)[0]


def build_prompts(queries: Sequence[Query], seq_len: int) -> list[Prompt]:
    """`build_prompt` of each query, encoded together."""
    contexts = [
        query.context if len(query.context) <= seq_len // LEAST_TOKENS else _fitting(query, seq_len)
        for query in queries
    ]
    prompts = _prompts(queries, contexts)
    for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        if len(prompt.tokens) + _after_result(query) >= seq_len - 1 and len(query.context):
            prompts[i] = _prompts([query], [_fitting(query, seq_len)])[0]
    return prompts


def _prompts(queries: Sequence[Query], contexts: Sequence[Context]) -> list[Prompt]:
    """Of queries with as much of their contexts as fits."""
    tokens, starts = _encode(queries, contexts)
    tokens = tokens.astype(np.int64)
    counts = np.array([len(context) for context in contexts])
    own = np.cumsum(counts + 1) - 1  # the queries among the measurements
    prompts = []
    for query, count, first, begin, end in zip(
        queries,
        counts.tolist(),
        starts[own - counts].tolist(),
        starts[own].tolist(),
        starts[own + 1].tolist(),
        strict=True,
    ):
        line = tokens[first : end - 1 - _after_result(query)]  # FAILED stands where the result comes
        addresses = [end for end in (query.src, query.dst) if end is not None][:: -1 if _dst_first(query) else 1]
        after = [begin - first + 2 + addresses[0].known_bytes]
        after += [after[0] + 1 + one.known_bytes for one in addresses[1:]]
        parts = after[0 if _dst_first(query) else -1] - 1
        prompts.append(Prompt(line, begin - first, min(after[0], len(line) - 1), parts, _also_legal(query), count))
    return prompts


def _after_result(query: Query) -> int:
    """Tokens of the address that is not given."""
    return 1 if query.src is None else 2 if query.dst is None else 0


def _fitting(query: Query, seq_len: int) -> Context:
    """What fits of the context."""
    return query.context.take(fitting_places(query, seq_len))


def fitting_places(query: Query, seq_len: int) -> np.ndarray:
    """Places of what fits of a query's context in seq_len tokens, ascending, (n,): some measurements of the same
    destination, up to half, and the most recent."""
    ranked, fitting, too_many = _most_useful_first(query), 0, len(query.context) + 1
    count = len(query.context)  # most often all fit
    while too_many - fitting > 1:
        tokens, _ = _encode([query], [query.context.take(np.sort(ranked[:count]))])
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


def _encode(queries: Sequence[Query], contexts: Sequence[Context]) -> tuple[np.ndarray, np.ndarray]:
    """Each context, then its query as a failed ping, whose FAILED token stands where the result comes."""
    counts = np.array([len(context) + 1 for context in contexts])
    last = np.cumsum(counts) - 1  # the queries among the measurements
    earlier = np.delete(np.arange(counts.sum()), last)
    ends = [_both_ends(query) for query in queries]
    src, dst = np.empty((2, counts.sum(), ADDRESS_BYTES), dtype=np.uint8)
    packed = np.frombuffer(b"".join(end.packed for both in ends for end in both), np.uint8)
    src[last], dst[last] = packed.reshape(-1, 2, ADDRESS_BYTES).swapaxes(0, 1)
    share = np.repeat([source.known_bytes / source.width for source, _ in ends], counts)
    rtt_ms, time_s = np.full(len(src), -1.0), np.zeros(len(src), dtype=np.int64)
    time_s[last] = [query.time_s or 0 for query in queries]
    both_timed = [query.time_s is not None and c.time_s is not None for query, c in zip(queries, contexts, strict=True)]
    timed = np.repeat(both_timed, counts)
    timed[last] = [query.time_s is not None for query in queries]
    if len(earlier):
        src[earlier], dst[earlier] = (np.concatenate([getattr(c, name) for c in contexts]) for name in ("src", "dst"))
        rtt_ms[earlier] = np.concatenate([context.rtt_ms for context in contexts])
        time_s[earlier] = np.concatenate(
            [np.zeros(len(c), np.int64) if c.time_s is None else c.time_s for c in contexts]
        )
    # A window cuts all addresses of its source alike; those of others are whole.
    for query, context, end in zip(queries, contexts, last, strict=True):
        if context.any_source and query.src is not None:
            of_context = slice(end - len(context), end)
            share[of_context] = np.where(_of_source(query, context.src), share[of_context], 1)
    dst_bytes = np.where(is_ipv4(dst), 4, ADDRESS_BYTES)
    dst_bytes[last] = [destination.known_bytes for _, destination in ends]
    order = np.tile(tk.RESULT_LAST, (len(src), 1))
    order[last] = [_order(query) for query in queries]
    fields = tk.Fields(
        src=src,
        dst=dst,
        src_bytes=(share * np.where(is_ipv4(src), 4, ADDRESS_BYTES)).astype(np.int64),
        dst_bytes=dst_bytes,
        rtt_ms=rtt_ms,
        time_s=time_s,
        timed=timed,
        order=order,
        window=np.repeat(np.arange(len(queries)), counts),
    )
    return tk.encode(fields)


def _both_ends(query: Query) -> tuple[Endpoint, Endpoint]:
    """Source and destination; of one that is not given, only the family is encoded, and then cut off."""
    source, destination = query.src, query.dst
    if source is None:
        assert destination is not None, query
        return Endpoint(destination.packed, 0), destination
    return source, Endpoint(source.packed, 1) if destination is None else destination


def _dst_first(query: Query) -> bool:
    """A prefix comes first: after a whole address no more bytes of it can follow."""
    return query.src is None or (query.dst is not None and query.dst.is_prefix and not query.src.is_prefix)


def _order(query: Query) -> np.ndarray:
    """Sort keys of the query's fields, (4,); those that are not given stand behind the result."""
    own = (tk.RESULT_LAST_DST_FIRST if _dst_first(query) else tk.RESULT_LAST).copy()
    own[[query.src is None, query.dst is None, False, False]] = _LAST
    return own


def _of_source(query: Query, src: np.ndarray) -> np.ndarray:
    """(n,) which of (n, 16) addresses of a context are the source's: all, unless it may be of any."""
    if query.src is None or not query.context.any_source:
        return np.ones(len(src), dtype=bool)
    return query.src.given.covers(src)


def _also_legal(query: Query) -> np.ndarray:
    """A timestamp, the source or the destination, if not given; more bytes of the last address, if it is a prefix."""
    ends = [end for end in (query.src, query.dst) if end is not None]
    prefixes = all(end.is_prefix for end in ends)
    return _legal_beside_results(query.src is None, query.dst is None, query.time_s is None, prefixes)


@cache
def _legal_beside_results(no_src: bool, no_dst: bool, no_time: bool, prefixes: bool) -> np.ndarray:
    legal = []
    if no_src:
        legal += [tk.SRC_IPV4, tk.SRC_IPV6]
    if no_dst:
        legal += [tk.DST_IPV4, tk.DST_IPV6]
    if no_time:
        legal.append(tk.TIMESTAMP_ABS)
        if prefixes:
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
