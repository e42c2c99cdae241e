"""Queries in, the distributions of their results out: mixtures over how much of the source is known, and of partial bytes.

Under "auto" a query is answered with several prefixes of its source known, weighted by their share on val times how likely
each makes the context. 192.0.0.0/20 is 16 prefixes of /24, and the distribution of pings to it is the mixture of theirs,
each weighted by the probability that the model gives its third byte, after the first two and what else is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from ping_llm.data import tokenization as tk
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import (
    Focus,
    ReadContexts,
    Reader,
    line_log_prob,
    next_byte_log_p,
    read_beginnings,
    read_contexts,
    result_distributions,
)
from ping_llm.inference.prompt import (
    DST_ROLES,
    SRC_ROLES,
    Prompt,
    address_tokens,
    build_prompt,
    fitting_places,
    opening,
)
from ping_llm.inference.query import Endpoint, Query, SrcKnown, known_lengths, known_name

CHUNK = 64  # queries answered together at most: their distributions take 17 MB
TOKENS_AT_ONCE = 12_000  # of contexts and prompts, whose keys and values are in memory together: 61 MB of a tiny model
LEAST_WEIGHT = 1e-4  # known lengths of the source of less weight are left out
CONTEXT_TOKENS = 20  # about, of a measurement
PARTS_LEFT_OUT = 1e4  # the least likely prefixes one byte longer, of so many times `least_mass` together


def distributions(
    reader: Reader, queries: Sequence[Query], src_known: SrcKnown = "auto", focus: Focus | None = None
) -> Iterator[RTTDistribution]:
    """The distributions of the queries' results, in order, in batches of at most CHUNK; a shared context is read once.

    `focus` says what is wanted of them, if not all.
    """
    for (found,) in distributions_under(reader, queries, [src_known], focus):
        yield found


def distributions_under(
    reader: Reader, queries: Sequence[Query], every: Sequence[SrcKnown], focus: Focus | None = None
) -> Iterator[list[RTTDistribution]]:
    """`distributions` under each of several `src_known`, from one set of passes."""
    for first in range(0, len(queries), CHUNK):
        some = queries[first : first + CHUNK]
        wanted = None if focus is None else focus.take(np.arange(first, first + len(some)))
        yield _answers(reader, some, every, wanted)


def _answers(
    reader: Reader, queries: Sequence[Query], every: Sequence[SrcKnown], focus: Focus | None
) -> list[RTTDistribution]:
    """The distributions of some queries, in order, under each of `every`."""
    groups = list(_groups(reader, queries, every))
    parts: list[list[RTTDistribution]] = []
    for rows in groups:
        some, wanted = [queries[i] for i in rows], None if focus is None else focus.take(rows)
        if some[0].has_partial_byte:
            parts.append([_of_partial_bytes(reader, some, known, wanted) for known in every])
        else:
            parts.append(_of_whole_bytes(reader, some, every, wanted))
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate(groups))
    return [RTTDistribution.concatenate(own)[order] for own in zip(*parts, strict=True)]


def _groups(reader: Reader, queries: Sequence[Query], every: Sequence[SrcKnown]) -> Iterator[np.ndarray]:
    """Which queries are answered in the same passes: those of one context, and those of prompts of about equal length.

    One whose prefix does not end on a byte is many, and has a group of its own.
    """
    contexts: dict[int, int] = {}
    shared = np.array([contexts.setdefault(id(query.context), len(contexts)) for query in queries])
    ends = np.array([sum(end.known_bytes for end in (query.src, query.dst) if end) for query in queries])
    partial = np.array([query.has_partial_byte for query in queries])
    group: list[int] = []
    taken = 0
    for i in np.lexsort((ends, shared, partial)):
        query = queries[i]
        variants = 1 if query.src is None else len(_lengths(every, query.src))
        tokens = variants * min(ends[i] + len(query.context) * CONTEXT_TOKENS, reader.seq_len)
        if group and (partial[i] or taken + tokens > TOKENS_AT_ONCE):
            yield np.array(group)
            group, taken = [], 0
        group.append(int(i))
        taken += tokens
    yield np.sort(group)


def weighted_variants(reader: Reader, query: Query, src_known: SrcKnown) -> tuple[list[Query], np.ndarray]:
    """The query with as much of the source known as `src_known` says, and the weights of these variants, which sum to 1."""
    variants = _variants(reader, query, [src_known])
    evidence = np.zeros(len(variants))
    if len(variants) > 1 and len(query.context):
        contexts = [build_prompt(variant, reader.seq_len).context for variant in variants]
        evidence = read_contexts(reader, contexts).log_likelihood
    owner = np.zeros(len(variants), dtype=np.int64)
    prior, _ = _log_priors(reader, variants, owner)
    weights = _weights(prior + evidence, owner)
    used = np.flatnonzero(weights >= LEAST_WEIGHT)
    return [variants[i] for i in used], weights[used] / weights[used].sum()


def whole_byte_queries(
    reader: Reader, query: Query, src_known: SrcKnown
) -> tuple[list[Query], np.ndarray, dict[str, float]]:
    """The queries of whole bytes whose answers mix to that of `query`, and their weights, which sum to 1, (n,).

    Also the weight of each known length of the source, by name.
    """
    variants, weights = weighted_variants(reader, query, src_known)
    parts = [_parts(reader, variant) for variant in variants]
    shares = np.concatenate([weight * share for weight, (_, share) in zip(weights, parts, strict=True)])
    names = {known_name(variant.src): float(weight) for variant, weight in zip(variants, weights, strict=True)}
    return [part for some, _ in parts for part in some], shares, names


def source_log_prob(reader: Reader, sources: Sequence[Endpoint]) -> np.ndarray:
    """Log-probability in nats of whole source addresses at the beginning of a window, (n,): how familiar they are."""
    distinct = sorted({src.packed for src in sources})
    lines = [np.append(tk.MEASUREMENT_START, address_tokens(SRC_ROLES, Endpoint.whole(packed))) for packed in distinct]
    log_p = dict(zip(distinct, line_log_prob(reader, lines, np.zeros(0, dtype=np.int64)), strict=True))
    return np.array([log_p[src.packed] for src in sources])


def _lengths(every: Sequence[SrcKnown], src: Endpoint) -> list[int]:
    """Bytes of a source that are known under any of them, ascending."""
    return sorted({length for known in every for length in known_lengths(known, src)})


def _of_whole_bytes(
    reader: Reader, queries: Sequence[Query], every: Sequence[SrcKnown], focus: Focus | None
) -> list[RTTDistribution]:
    variants = [_variants(reader, query, every) for query in queries]
    owner = np.repeat(np.arange(len(queries)), [len(own) for own in variants])  # (B,) query of each prompt
    flat = [variant for own in variants for variant in own]
    mixed = len(flat) > len(queries)
    prompts, read, context_of = _read(reader, flat, likelihoods=mixed)
    if not mixed:
        return [result_distributions(reader, prompts, read, context_of, focus=focus)] * len(every)
    evidence = np.zeros(len(prompts)) if read is None else read.log_likelihood[context_of]
    weights, prior_passes = np.zeros((len(every), len(prompts))), 0
    several = np.zeros((len(every), len(queries)), dtype=bool)
    for own, mixes, known in zip(weights, several, every, strict=True):
        of_query = [set(known_lengths(known, query.src)) if query.src else set() for query in queries]
        among = [v.src is None or v.src.known_bytes in of_query[i] for i, v in zip(owner, flat, strict=True)]
        member = np.flatnonzero(among)  # (m,)
        prior, passes = _log_priors(reader, [flat[i] for i in member], owner[member])
        own[member] = _weights(prior + evidence[member], owner[member])
        mixes[:] = np.bincount(owner[member]) > 1
        prior_passes = max(passes, prior_passes)
    used = np.flatnonzero((weights >= LEAST_WEIGHT).any(axis=0))
    owner, weights = owner[used], weights[:, used] * (weights[:, used] >= LEAST_WEIGHT)
    weights = np.stack([own / np.bincount(owner, own)[owner] for own in weights])
    found = result_distributions(reader, [prompts[i] for i in used], read, context_of[used], owner, weights, focus)
    answers = []
    for number, (own, mixes) in enumerate(zip(weights, several, strict=True)):
        names: np.ndarray = np.array([{} for _ in queries], dtype=object)
        for i, query, weight in zip(used, owner, own.tolist(), strict=True):
            if weight and mixes[query]:
                names[query][known_name(flat[i].src)] = weight
        answer = found[number * len(queries) : (number + 1) * len(queries)] if len(every) > 1 else found
        passes = answer.forward_passes + prior_passes
        answers.append(dataclasses.replace(answer, forward_passes=passes, src_weights=names))
    return answers


def _read(
    reader: Reader, queries: Sequence[Query], likelihoods: bool = False
) -> tuple[list[Prompt], ReadContexts | None, np.ndarray]:
    """The prompts of B queries, and the place of each one's context, (B,), among the contexts that were read.

    They are read if some queries share one, or if their `likelihoods` are wanted.
    """
    prompts = [build_prompt(query, reader.seq_len) for query in queries]
    places: dict[bytes, int] = {}
    context_of = np.array([places.setdefault(prompt.context.tobytes(), len(places)) for prompt in prompts])
    contexts = [np.frombuffer(context, dtype=np.int64) for context in places]
    wanted = (likelihoods or len(contexts) < len(prompts)) and any(map(len, contexts))
    return prompts, read_contexts(reader, contexts) if wanted else None, context_of


def _variants(reader: Reader, query: Query, every: Sequence[SrcKnown]) -> list[Query]:
    """The query under each known length, the shortest first, all after the context that fits where most is known.

    So their likelihoods are of the same measurements: the length under which fewest fit would win by that alone.
    """
    if query.src is None:
        return [query]
    variants = [dataclasses.replace(query, src=query.src.cut(length)) for length in _lengths(every, query.src)]
    if len(variants) == 1 or not len(query.context):
        return variants
    context = query.context.take(fitting_places(variants[-1], reader.seq_len))
    return [dataclasses.replace(variant, context=context) for variant in variants]


def _log_priors(reader: Reader, variants: Sequence[Query], owner: np.ndarray) -> tuple[np.ndarray, int]:
    """Logarithm of the weight of each variant of the query `owner` (B,) before its context is read, (B,); passes it took.

    That is its share on val, if the source is as familiar to the model as those of val are. One alone has weight 1.
    """
    calibration, priors = reader.calibration, np.zeros(len(variants))
    of_query = [rows for rows in np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1) if len(rows) > 1]
    known = [[src for i in rows if (src := variants[i].src) is not None] for rows in of_query]
    whole = [sources[-1] for sources in known if not sources[-1].is_prefix]
    passes = int(bool(calibration.familiar) and bool(whole))
    log_p = dict(zip(whole, source_log_prob(reader, whole), strict=True)) if passes else {}
    for rows, sources in zip(of_query, known, strict=True):
        novelty = calibration.novelty(sources[-1], log_p[sources[-1]]) if sources[-1] in log_p else 0.0
        priors[rows] = calibration.log_weights(sources, novelty)
    return priors, passes


def _weights(log_weight: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The weight of each variant among those of its query, (B,)."""
    log_weight = log_weight - np.maximum.reduceat(log_weight, np.flatnonzero(np.diff(owner, prepend=-1)))[owner]
    weight = np.exp(log_weight)
    return weight / np.bincount(owner, weight)[owner]


def _of_partial_bytes(
    reader: Reader, queries: Sequence[Query], src_known: SrcKnown, focus: Focus | None
) -> RTTDistribution:
    """Of one query. The least likely of its parts are left out, and count as unresolved."""
    (query,) = queries
    parts, weights, names = whole_byte_queries(reader, query, src_known)
    ascending = np.argsort(weights)
    left_out = ascending[: int((np.cumsum(weights[ascending]) < PARTS_LEFT_OUT * reader.least_mass).sum())]
    kept = np.setdiff1d(np.arange(len(parts)), left_out)
    found, masses = [], []
    for rows in np.split(kept, range(CHUNK, len(kept), CHUNK)):
        mass = weights[rows].sum()
        if mass > 0:
            mixing = np.zeros(len(rows), dtype=np.int64)
            found.append(_together(reader, [parts[i] for i in rows], mixing, weights[rows] / mass, focus))
            masses.append(mass)
    total = sum(masses)
    mixture = RTTDistribution.concatenate(found).mixture(np.array(masses) / total, np.zeros(len(found), dtype=np.int64))
    passes = sum(int(some.forward_passes[0]) for some in found)
    unresolved = 1 - (1 - mixture.unresolved) * total
    named = np.array([names if len(names) > 1 else {}], dtype=object)
    return dataclasses.replace(mixture, forward_passes=passes, unresolved=unresolved, src_weights=named)


def _together(
    reader: Reader, queries: Sequence[Query], owner: np.ndarray, weights: np.ndarray, focus: Focus | None
) -> RTTDistribution:
    """Mixtures of the answers to queries of whole bytes, as of `result_distributions`; a shared context is read once."""
    prompts, read, context_of = _read(reader, queries)
    return result_distributions(reader, prompts, read, context_of, owner, weights, focus)


def _parts(reader: Reader, query: Query) -> tuple[list[Query], np.ndarray]:
    """The whole-byte queries of one query, one or more, and their shares (n,), by the chain rule src, dst."""
    if not query.has_partial_byte:
        return [query], np.ones(1)
    parts, log_p = [query], np.zeros(1)
    if query.src is not None and query.src.extra_bits:
        nothing = dataclasses.replace(query, src=None, dst=None)
        ((ends, log_p),) = _partial_bytes(reader, [nothing], query.src, SRC_ROLES)
        parts = [dataclasses.replace(query, src=end) for end in ends]
    if query.dst is not None:
        openings = [dataclasses.replace(part, dst=None) for part in parts]
        of_dst = list(_partial_bytes(reader, openings, query.dst, DST_ROLES))
        log_p = np.concatenate([own + log_q for own, (_, log_q) in zip(log_p, of_dst, strict=True)])
        parts = [
            dataclasses.replace(part, dst=end) for part, (ends, _) in zip(parts, of_dst, strict=True) for end in ends
        ]
    return parts, np.exp(log_p - np.logaddexp.reduce(log_p))


def _partial_bytes(
    reader: Reader, openings: Sequence[Query], end: Endpoint, roles: Sequence[int]
) -> Iterator[tuple[list[Endpoint], np.ndarray]]:
    """After each opening: what `end` stands for in whole bytes, and the log-probability of each, known bytes included."""
    known = address_tokens(roles, end)
    lines = [opening(query, reader.seq_len) for query in openings]
    read = read_beginnings(reader, [np.append(line, known) for line in lines], [len(line) for line in lines])
    if not end.extra_bits:
        yield from (([end], np.array([evidence])) for evidence in read.log_evidence)
        return
    values, first = end.next_bytes, end.packed[: 16 - end.width] + end.known
    ends = [Endpoint((first + bytes([value])).ljust(16, b"\0"), end.known_bytes + 1) for value in values]
    log_p = next_byte_log_p(read.logits[:, None], [tuple(known.tolist())])[:, 0, values]  # (openings, values)
    yield from ((ends, evidence + own) for evidence, own in zip(read.log_evidence, log_p, strict=True))
