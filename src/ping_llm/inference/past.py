"""Queries in, the past results that say something of each by themselves out: from its context and from a memory.

Of the pair: its own results, the newest first. Of others: of each of the sources most like the query's, its latest result to
the destination and the offset between the two sources, the most alike first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ping_llm.data.measurement import ADDRESS_BYTES, distinct_addresses, log_rtt
from ping_llm.inference.context import Context
from ping_llm.inference.experts import PAST, Past
from ping_llm.inference.memory import ANY_TIME, Memory
from ping_llm.inference.query import Query

OTHERS = 8
"""Sources that are asked, at most."""
UNKNOWN_AGE_H = 24.0
"""Hours since a result where no time is known."""
CANDIDATES, PROFILE = 256, 64
"""Sources that are compared, and destinations of the query's source that they are compared by, at most."""
_REACH = 2048  # the latest results to the destination, and of the source, among which both are looked for
_SHRINKAGE = 3.0  # destinations of the usual distance that are added to those that two sources share
_USUAL_DISTANCE = 1.0  # of two sources of which nothing is known, log-ms
_OFFSET_SHRINKAGE = 1.0  # destinations of no offset that are added to those that two sources share
_LEAST_MS = 0.3  # an offset leaves no RTT shorter
_BITS_CLOSER = 0.005  # log-ms that two sources are closer for each bit that their addresses share


def pasts(queries: Sequence[Query], memory: Memory | None) -> dict[str, Past]:
    """The past results of q queries, by kind; there are none where source or destination is not one host."""
    log_ms = np.full((2, len(queries), PAST), np.nan)
    first = np.zeros((2, len(queries)))
    hosts = [i for i, query in enumerate(queries) if _between_hosts(query)]
    found = _of_pairs([queries[i] for i in hosts], memory)
    others = _of_others([queries[i] for i in hosts], memory) if memory is not None else []
    for kind, answers in enumerate((found, others)):
        for i, (values, amount) in zip(hosts, answers, strict=False):
            log_ms[kind, i, : len(values)], first[kind, i] = values, amount
    return {"pair": Past(log_ms[0], first[0]), "others": Past(log_ms[1], first[1])}


def _between_hosts(query: Query) -> bool:
    return all(end is not None and not end.is_prefix for end in (query.src, query.dst))


def _ends(queries: Sequence[Query]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources and destinations (q, 16) and seconds (q,)."""
    packed = [b"".join(end.packed for end in (query.src, query.dst) if end) for query in queries]
    both = np.frombuffer(b"".join(packed), np.uint8).reshape(-1, 2, ADDRESS_BYTES)
    before_s = np.array([ANY_TIME if query.time_s is None else query.time_s for query in queries], dtype=np.int64)
    return both[:, 0], both[:, 1], before_s


def _of_pairs(queries: Sequence[Query], memory: Memory | None) -> list[tuple[np.ndarray, float]]:
    """Of each query the log-RTTs of its pair, the newest first, and the hours since then.

    Of the memory's results, those that stand in the context too are left out. Where the context has no times, these are all
    of the same RTT, and its own count as newer than the rest.
    """
    if not queries:
        return []
    src, dst, before_s = _ends(queries)
    places = None if memory is None else memory.pair(src, dst, before_s, 2 * PAST)
    found = []
    for i, query in enumerate(queries):
        context = query.context
        own = np.flatnonzero((context.dst == dst[i]).all(axis=1))[::-1]
        if not context.one_host:
            own = own[(context.src[own] == src[i]).all(axis=1)]
        rtt_ms, time_s = context.rtt_ms[own], None if context.time_s is None else context.time_s[own]
        if memory is not None and places is not None:
            held = places[i][places[i] >= 0]
            repeats = memory.rtt_ms[held, None] == rtt_ms.astype(np.float32)
            if time_s is not None:
                repeats &= memory.time_s[held, None] == time_s
            held = held[~repeats.any(axis=1)]
            rtt_ms = np.append(rtt_ms, memory.rtt_ms[held])
            if time_s is not None or not len(own):
                time_s = np.append(np.zeros(0, np.int64) if time_s is None else time_s, memory.time_s[held])
                newest = np.argsort(-time_s, kind="stable")
                rtt_ms, time_s = rtt_ms[newest], time_s[newest]
        answered = np.flatnonzero(rtt_ms >= 0)[:PAST]
        age_h = UNKNOWN_AGE_H
        if len(answered) and time_s is not None and query.time_s is not None:
            age_h = max(0.0, (query.time_s - float(time_s[answered[0]])) / 3600)
        found.append((log_rtt(rtt_ms[answered]), age_h))
    return found


def _of_others(queries: Sequence[Query], memory: Memory) -> list[tuple[np.ndarray, float]]:
    """Of each query what the latest results to its destination of the sources most like its own let expect, log-ms, and how
    unlike the first of these is."""
    if not queries:
        return []
    src, dst, before_s = _ends(queries)
    source_id = memory.ids(src)
    to_destination = memory.to_destination(dst, before_s, _REACH)
    of_source = memory.of_source(src, before_s, _REACH)
    found = []
    for i, query in enumerate(queries):
        places = to_destination[i][to_destination[i] >= 0]
        places = places[(memory.src_id[places] != source_id[i]) & (memory.rtt_ms[places] >= 0)]
        latest = first_of_each(places, memory.src_id)[:CANDIDATES]
        if not len(latest):
            found.append((np.zeros(0), 0.0))
            continue
        own_dst, own_log_ms = _profile(memory, of_source[i][of_source[i] >= 0], query.context, src[i], dst[i])
        sources = memory.src_id[latest]
        theirs = memory.log_ms(memory.latest(sources, own_dst, int(before_s[i])))
        offset_ms = offsets_ms(theirs, own_log_ms)
        distance = source_distances(memory, sources, _moved(theirs, offset_ms[:, None]), own_log_ms, src[i])
        nearest = np.argsort(distance, kind="stable")[:OTHERS]
        expected = _moved(memory.log_ms(latest[nearest]), offset_ms[nearest])
        found.append((expected, float(distance[nearest[0]])))
    return found


def _profile(
    memory: Memory, places: np.ndarray, context: Context, src: np.ndarray, dst: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Destinations (D, 16) of a source beside the one that is queried, and the log-RTT (D,) of its latest answer there."""
    own = np.arange(len(context))[::-1]
    if not context.one_host:
        own = own[(context.src[own] == src).all(axis=1)]
    ends = np.concatenate([context.dst[own], memory.addresses[memory.dst_id[places]]])
    rtt_ms = np.concatenate([context.rtt_ms[own], memory.rtt_ms[places]])
    usable = (rtt_ms >= 0) & (ends != dst).any(axis=1)
    ends, rtt_ms = ends[usable], rtt_ms[usable]
    if not len(ends):
        return ends, rtt_ms
    _, first = np.unique(distinct_addresses(ends)[1], return_index=True)
    first = np.sort(first)[:PROFILE]
    return ends[first], log_rtt(rtt_ms[first])


def source_distances(
    memory: Memory, sources: np.ndarray, theirs: np.ndarray, own_log_ms: np.ndarray, src: np.ndarray
) -> np.ndarray:
    """How unlike a source `src` (16,) each of C others is, by its id: (C,) log-ms.

    It is the mean of the absolute differences of their log-RTTs to the destinations that both have pinged (profile-kNN),
    drawn towards what is usual where they share few, and more for each bit by which its address begins less like `src` than
    the likest. To D destinations `own_log_ms` (D,) are those of the source, and `theirs` (C, D) the others', NaN for none.
    """
    apart = np.abs(theirs - own_log_ms)  # (C, D)
    shared = (~np.isnan(apart)).sum(axis=1)
    distance = (np.nansum(apart, axis=1) + _SHRINKAGE * _USUAL_DISTANCE) / (shared + _SHRINKAGE)
    same_bits = np.unpackbits(memory.addresses[sources] ^ src, axis=1).argmax(axis=1)
    return distance + _BITS_CLOSER * (same_bits.max(initial=0) - same_bits)


def offsets_ms(theirs: np.ndarray, own_log_ms: np.ndarray) -> np.ndarray:
    """How many ms longer the RTTs of a source are than those of each of C others, as behind a slower line: (C,).

    It is the median over the destinations that both have pinged, drawn towards 0 where these are few, and 0 where it brings
    the RTTs no nearer. The arguments are those of `source_distances`. What neighbours say is corrected by how they differ
    from the one that asks as in GroupLens (Resnick et al. 1994), in ms, for lines add up as Vivaldi's heights do.
    """
    apart_ms = np.exp(own_log_ms) - np.exp(theirs)  # (C, D)
    shared = (~np.isnan(apart_ms)).sum(axis=1)
    offset = np.zeros(len(theirs))
    some = shared > 0
    offset[some] = np.nanmedian(apart_ms[some], axis=1) * (shared / (shared + _OFFSET_SHRINKAGE))[some]
    before, after = (np.nansum(np.abs(_moved(theirs, by) - own_log_ms), axis=1) for by in (0.0, offset[:, None]))
    return np.where(after < before, offset, 0.0)


def _moved(log_ms: np.ndarray, by_ms: np.ndarray | float) -> np.ndarray:
    """Log-RTTs, NaN for none, of RTTs that are longer or shorter by so many ms."""
    return np.log(np.maximum(np.exp(log_ms) + by_ms, _LEAST_MS))


def first_of_each(places: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Of the places (m,) the first one with each of the ids, in their order."""
    return places[np.sort(np.unique(ids[places], return_index=True)[1])]
