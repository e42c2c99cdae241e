"""Queries and a memory in, the queries out, their contexts filled up with what the memory holds of their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ping_llm.data.measurement import ADDRESS_BYTES, as_text, is_ipv4
from ping_llm.inference.context import Context
from ping_llm.inference.memory import ANY_TIME, Memory
from ping_llm.inference.past import first_of_each, source_distances
from ping_llm.inference.query import Query

SHARE = 0.75
"""Of the tokens of a sequence, those up to which a context is filled."""
PAIR, OWN, OTHERS, SHARED = 6, 5, 8, 8  # measurements of each kind that `evidence` holds
_REACH, _REACH_OTHERS = 64, 2048  # the latest of the source, and to the destination, among which they are looked for
_CANDIDATES, _PROFILE = 64, 32  # sources that are compared, and the source's destinations by which
_MOST_TOKENS, _FIRST_TIME = 11, 4  # of a measurement beside its addresses, and more where its time is the first
_NONE = np.zeros(0, dtype=np.int64)


def evidence(memory: Memory, query: Query, tokens: int) -> Context:
    """What a memory holds that says most of a query, in time order, in at most so many tokens.

    That is the latest PAIR of the pair and, where there are none, OWN of the source, each the latest to another
    destination. If the memory is one of `other_sources`, it is also the latest to the destination of each of its nearest
    OTHERS sources, and what says how far these are from the source: OWN of the source, first to destinations that they
    share, and SHARED of theirs to these. Nothing is of the query's second or later. ValueError if the source is not one
    host.
    """
    if query.src is None or query.src.is_prefix:
        raise ValueError("a memory is searched for the pings of one source; give its whole address")
    return _context(memory, _within(memory, _most_useful_first(memory, [query])[0], tokens))


def recalled(memory: Memory | None, queries: Sequence[Query], seq_len: int) -> list[Query]:
    """The queries, the contexts of those whose source is one host filled up to SHARE of `seq_len` tokens with evidence.

    A longer context stays as it is, and a measurement that it holds is not added again. A context of one host gets none of
    other sources. Without a memory all stay as they are.
    """
    if memory is None:
        return list(queries)
    room = [int(SHARE * seq_len) - int(_tokens(query.context.src, query.context.dst).sum()) for query in queries]
    short = [i for i, query in enumerate(queries) if room[i] > 0 and query.src is not None and not query.src.is_prefix]
    filled = list(queries)
    for i, places in zip(short, _most_useful_first(memory, [queries[i] for i in short]), strict=True):
        query, found = queries[i], _rows(memory, places)
        assert query.src is not None, query
        new = ~np.isin(_keys(found, query.context), _keys(query.context, query.context))
        if query.context.one_host:
            new &= query.src.covers(found.src)
        places = _within(memory, places[new], room[i])
        if len(places):
            filled[i] = replace(query, context=_joined(_context(memory, places), query))
    return filled


def _most_useful_first(memory: Memory, queries: Sequence[Query]) -> list[np.ndarray]:
    """Places of the evidence for each query whose source is one host; see `evidence`."""
    if not queries:
        return []
    src, dst = (np.zeros((len(queries), ADDRESS_BYTES), dtype=np.uint8) for _ in range(2))  # of no host
    for row, query in enumerate(queries):
        for packed, end in ((src, query.src), (dst, query.dst)):
            if end is not None and not end.is_prefix:
                packed[row] = np.frombuffer(end.packed, np.uint8)
    before_s = np.array([ANY_TIME if query.time_s is None else query.time_s for query in queries])
    pairs, latest, found = memory.pair(src, dst, before_s, PAIR), memory.of_source(src, before_s, _REACH), []
    for row, destination in enumerate(memory.ids(dst)):
        own = latest[row][latest[row] >= 0]
        own = first_of_each(own[memory.dst_id[own] != destination], memory.dst_id)
        pair, to_destination, shared = pairs[row][pairs[row] >= 0], _NONE, _NONE
        if memory.other_sources:
            to_destination, own, shared = _of_others(memory, src[row], dst[row], int(before_s[row]), own)
        elif len(pair):
            own = _NONE
        found.append(np.concatenate([pair, to_destination, own[:OWN], shared]))
    return found


def _of_others(
    memory: Memory, src: np.ndarray, dst: np.ndarray, before_s: int, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the latest to the destination of each of its nearest sources; `own`, places of the source's latest to each
    of its destinations, those first that these sources ping too; and of theirs to these destinations.

    The nearest are so by `source_distances`.
    """
    latest = memory.to_destination(dst[None], np.array([before_s]), _REACH_OTHERS)[0]
    latest = latest[(latest >= 0) & (memory.src_id[latest] != memory.ids(src[None])[0])]
    latest = first_of_each(latest, memory.src_id)[:_CANDIDATES]
    own_dst = memory.addresses[memory.dst_id[own[:_PROFILE]]]
    theirs = memory.latest(memory.src_id[latest], own_dst, before_s)  # (C, D)
    own_log_ms = memory.log_ms(own[:_PROFILE])
    distance = source_distances(memory, memory.src_id[latest], memory.log_ms(theirs), own_log_ms, src)
    nearest = np.argsort(distance, kind="stable")[:OTHERS]
    both = theirs[nearest] >= 0  # (c, D)
    known_most = np.argsort(-both.sum(axis=0), kind="stable")
    theirs, both = theirs[nearest][:, known_most[:OWN]], both[:, known_most[:OWN]]
    source, place = np.nonzero(both)
    in_turn = np.lexsort((source, np.cumsum(both, axis=1)[source, place]))  # one of each source, a second of each, …
    return latest[nearest], own[:_PROFILE][known_most], theirs[source, place][in_turn[:SHARED]]


def _within(memory: Memory, places: np.ndarray, tokens: int) -> np.ndarray:
    """The first of the places whose measurements take at most so many tokens together."""
    src, dst = (memory.addresses[ids[places]] for ids in (memory.src_id, memory.dst_id))
    return places[: np.searchsorted(np.cumsum(_tokens(src, dst)), tokens, "right")]


def _tokens(src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """(n,) tokens that measurements between addresses (n, 16) take at most."""
    addresses = np.where(is_ipv4(src), 4, 16) + np.where(is_ipv4(dst), 4, 16)
    return _MOST_TOKENS + addresses + _FIRST_TIME * (np.arange(len(src)) == 0)


def _context(memory: Memory, places: np.ndarray) -> Context:
    """The measurements at places, in time order."""
    return _rows(memory, places[np.argsort(memory.time_s[places], kind="stable")])


def _rows(memory: Memory, places: np.ndarray) -> Context:
    """The measurements at places, in their order."""
    src, dst = (memory.addresses[ids[places]] for ids in (memory.src_id, memory.dst_id))
    rtt_ms = memory.rtt_ms[places].astype(np.float64)
    return Context(src, dst, rtt_ms, memory.time_s[places], any_source=memory.other_sources)


def _keys(context: Context, beside: Context) -> np.ndarray:
    """(n,) equal where measurements are: their addresses, RTT and, if those `beside` have times, time."""
    time_s = np.zeros(len(context), dtype=np.int64)
    if context.time_s is not None and beside.time_s is not None:
        time_s = np.ascontiguousarray(context.time_s, dtype=np.int64)
    numbers = context.rtt_ms.astype(np.float32)[:, None].view(np.uint8), time_s[:, None].view(np.uint8)
    return as_text(np.concatenate([context.src, context.dst, *numbers], axis=1))


def _joined(found: Context, query: Query) -> Context:
    """What was found and the context that was given: in time order or, where that has no times, one after the other."""
    given = query.context
    columns = zip((found.src, found.dst, found.rtt_ms), (given.src, given.dst, given.rtt_ms), strict=True)
    src, dst, rtt_ms = (np.concatenate(both) for both in columns)
    time_s = found.time_s if not len(given) else None
    if found.time_s is not None and given.time_s is not None:
        time_s = np.concatenate([found.time_s, given.time_s])
    joined = Context(
        src, dst, rtt_ms, time_s, given.one_host, given.any_source or (found.any_source and not given.one_host)
    )
    return joined.take(joined.time_order())
