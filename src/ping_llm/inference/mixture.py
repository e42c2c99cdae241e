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
from ping_llm.inference.blend import Blend
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import (
    PASS_TOKENS,
    Focus,
    ReadContexts,
    Reader,
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
    build_prompts,
    fitting_places,
    opening,
)
from ping_llm.inference.query import Endpoint, Query, SrcKnown, known_lengths, known_name

CHUNK = 64  # queries answered together at most: their distributions take 17 MB
TOKENS_AT_ONCE = 12_000  # of contexts and prompts, whose keys and values are in memory together: 61 MB of a tiny model
LEAST_WEIGHT = 1e-4  # known lengths of the source of less weight are left out
CONTEXT_TOKENS, PART_TOKENS = 20, 12  # about, of a measurement, and of a part without context
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
        variants = 1 if query.src is None else len(_lengths(reader.calibration, every, query.src))
        tokens = variants * min(ends[i] + len(query.context) * CONTEXT_TOKENS, reader.seq_len)
        if group and (partial[i] or taken + tokens > TOKENS_AT_ONCE):
            yield np.array(group)
            group, taken = [], 0
        group.append(int(i))
        taken += tokens
    yield np.sort(group)


def weighted_variants(reader: Reader, query: Query, src_known: SrcKnown) -> tuple[list[Query], np.ndarray]:
    """The query with as much of the source known as `src_known` says, and the weights of these variants, which sum to 1."""
    variants = source_variants(reader, query, [src_known])
    evidence = np.zeros(len(variants))
    if len(variants) > 1 and len(query.context):
        contexts = [build_prompt(variant, reader.seq_len).context for variant in variants]
        evidence = read_contexts(reader, contexts).log_likelihood
    owner = np.zeros(len(variants), dtype=np.int64)
    weights = _weights(_log_priors(reader, variants, owner) + evidence, owner)
    used = np.flatnonzero(weights >= LEAST_WEIGHT)
    return [variants[i] for i in used], weights[used] / weights[used].sum()


def whole_byte_queries(
    reader: Reader, query: Query, src_known: SrcKnown
) -> tuple[list[Query], np.ndarray, dict[str, float]]:
    """The queries of whole bytes whose answers mix to that of `query`, and their weights, which sum to 1, (n,).

    Also the weight of each known length of the source, by name.
    """
    variants, weights = weighted_variants(reader, query, src_known)
    parts = _parts(reader, variants)
    shares = np.concatenate([weight * share for weight, (_, share) in zip(weights, parts, strict=True)])
    names = {known_name(variant.src): float(weight) for variant, weight in zip(variants, weights, strict=True)}
    return [part for some, _ in parts for part in some], shares, names


def _lengths(calibration: Calibration, every: Sequence[SrcKnown], src: Endpoint) -> list[int]:
    """Bytes of a source that are known under any of them, ascending; under auto those that have a weight."""
    return sorted({length for known in every for length in weighted_lengths(calibration, known, src)})


def weighted_lengths(calibration: Calibration, src_known: SrcKnown, src: Endpoint) -> list[int]:
    """Bytes of a source that are known under `src_known`, ascending; under auto those that have a weight."""
    lengths = known_lengths(src_known, src)
    if len(lengths) == 1:
        return lengths
    weights = calibration.log_weights([src.cut(length) for length in lengths])
    return [length for length, weight in zip(lengths, weights, strict=True) if weight > -np.inf]


def _of_whole_bytes(
    reader: Reader, queries: Sequence[Query], every: Sequence[SrcKnown], focus: Focus | None
) -> list[RTTDistribution]:
    blend = Blend.of(reader, queries) if "auto" in every else None
    whole = [source_variants(reader, query, every) for query in queries]
    variants = [own + blend.cut(i, own) for i, own in enumerate(whole)] if blend else whole
    owner = np.repeat(np.arange(len(queries)), [len(own) for own in variants])  # (B,) query of each prompt
    flat = [variant for own in variants for variant in own]
    mixed = len(flat) > len(queries)
    prompts, read, context_of = read_prompts(reader, flat, likelihoods=mixed)
    if not mixed:
        found = result_distributions(reader, prompts, read, context_of, focus=focus)
        return [blend.apply(found) if blend and known == "auto" else found for known in every]
    evidence = np.zeros(len(prompts)) if read is None else read.log_likelihood[context_of]
    first = np.cumsum([0] + [len(own) for own in variants[:-1]])  # of each query
    weights, several = np.zeros((len(every), len(prompts))), np.zeros((len(every), len(queries)), dtype=bool)
    for own, mixes, known in zip(weights, several, every, strict=True):
        of_query = [set(known_lengths(known, query.src)) if query.src else set() for query in queries]
        member = np.array(
            [
                place
                for i, some in enumerate(whole)
                for place, v in enumerate(some, int(first[i]))
                if v.src is None or v.src.known_bytes in of_query[i]
            ]
        )  # (m,) of the prompts
        prior = _log_priors(reader, [flat[i] for i in member], owner[member])
        own[member] = _weights(prior + evidence[member], owner[member])
        mixes[:] = np.bincount(owner[member]) > 1
        if blend and known == "auto":
            for i, some in enumerate(whole):
                own[first[i] : first[i] + len(variants[i])] = np.outer(
                    blend.shares(i), own[first[i] : first[i] + len(some)]
                ).ravel()
    used = np.flatnonzero((weights >= LEAST_WEIGHT).any(axis=0))
    owner, weights = owner[used], weights[:, used] * (weights[:, used] >= LEAST_WEIGHT)
    weights = np.stack([own / np.bincount(owner, own)[owner] for own in weights])
    found = result_distributions(reader, [prompts[i] for i in used], read, context_of[used], owner, weights, focus)
    answers = []
    for number, (own, mixes, known) in enumerate(zip(weights, several, every, strict=True)):
        names: np.ndarray = np.array([{} for _ in queries], dtype=object)
        for place, query, weight in zip(used, owner, own.tolist(), strict=True):
            if weight and mixes[query]:
                name = known_name(flat[place].src)
                names[query][name] = names[query].get(name, 0.0) + weight
        answer = found[number * len(queries) : (number + 1) * len(queries)] if len(every) > 1 else found
        answer = dataclasses.replace(answer, src_weights=names)
        answers.append(blend.apply(answer) if blend and known == "auto" else answer)
    return answers


def read_prompts(
    reader: Reader, queries: Sequence[Query], likelihoods: bool = False, of_parts: bool = False
) -> tuple[list[Prompt], ReadContexts | None, np.ndarray]:
    """The prompts of B queries, and the place of each one's beginning, (B,), among the different ones, which are read once.

    That is its stem or, of queries that are parts of one, what these share. They are read if enough queries share one, or
    if the `likelihoods` of their contexts are wanted.
    """
    prompts = (_prompts_of_parts if of_parts else build_prompts)(queries, reader.seq_len)
    begins = [prompt.tokens[: prompt.parts_length if of_parts else prompt.stem_length].tobytes() for prompt in prompts]
    places: dict[bytes, int] = {}
    place_of = np.array([places.setdefault(begin, len(places)) for begin in begins])
    saved = (sum(map(len, begins)) - sum(map(len, places))) // np.dtype(np.int64).itemsize
    if not (likelihoods and any(prompt.context_length for prompt in prompts)) and saved < PASS_TOKENS:
        return prompts, None, place_of
    return prompts, read_contexts(reader, [np.frombuffer(b, dtype=np.int64) for b in places], likelihoods), place_of


def _prompts_of_parts(queries: Sequence[Query], seq_len: int) -> list[Prompt]:
    """`build_prompts` of parts; those of one source, which differ in one byte of the destination, are encoded once."""
    first = [i for i, query in enumerate(queries) if not i or query.src is not queries[i - 1].src]
    prompts: list[Prompt] = []
    for prompt, begin, end in zip(
        build_prompts([queries[i] for i in first], seq_len), first, [*first[1:], len(queries)], strict=True
    ):
        if prompt.context_measurements < len(queries[begin].context):  # which of it fit depends on the destination
            prompts += build_prompts(queries[begin:end], seq_len)
            continue
        prompts.append(prompt)
        same = (
            prompt.context_length,
            prompt.stem_length,
            prompt.parts_length,
            prompt.also_legal,
            len(queries[begin].context),
        )
        for query in queries[begin + 1 : end]:
            assert query.dst is not None, query
            tokens = prompt.tokens.copy()
            tokens[prompt.parts_length] = tk.BYTE_0 + query.dst.known[-1]
            prompts.append(Prompt(tokens, *same))
    return prompts


def source_variants(reader: Reader, query: Query, every: Sequence[SrcKnown]) -> list[Query]:
    """The query under each known length, the shortest first, all after the context that fits where most is known.

    So their likelihoods are of the same measurements: the length under which fewest fit would win by that alone.
    """
    if query.src is None:
        return [query]
    variants = [
        dataclasses.replace(query, src=query.src.cut(n)) for n in _lengths(reader.calibration, every, query.src)
    ]
    if len(variants) == 1 or not len(query.context):
        return variants
    context = query.context.take(fitting_places(variants[-1], reader.seq_len))
    return [dataclasses.replace(variant, context=context) for variant in variants]


def _log_priors(reader: Reader, variants: Sequence[Query], owner: np.ndarray) -> np.ndarray:
    """Logarithm of the weight of each variant of the query `owner` (B,) before its context is read, (B,): its share on val.

    One alone has weight 1.
    """
    priors = np.zeros(len(variants))
    for rows in np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1):
        if len(rows) > 1:
            priors[rows] = reader.calibration.log_weights([src for i in rows if (src := variants[i].src) is not None])
    return priors


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
    kept = kept[weights[kept] > 0]
    tokens = min(PART_TOKENS + len(query.context) * CONTEXT_TOKENS, reader.seq_len)
    found, masses = [], []
    for rows in np.array_split(kept, -(-len(kept) * tokens // TOKENS_AT_ONCE)):
        masses.append(weights[rows].sum())
        prompts, read, context_of = read_prompts(reader, [parts[i] for i in rows], of_parts=True)
        owner = np.zeros(len(rows), dtype=np.int64)
        found.append(result_distributions(reader, prompts, read, context_of, owner, weights[rows] / masses[-1], focus))
    total = sum(masses)
    mixture = RTTDistribution.concatenate(found).mixture(np.array(masses) / total, np.zeros(len(found), dtype=np.int64))
    passes = sum(int(some.forward_passes[0]) for some in found)
    unresolved = 1 - (1 - mixture.unresolved) * total
    named = np.array([names if len(names) > 1 else {}], dtype=object)
    return dataclasses.replace(mixture, forward_passes=passes, unresolved=unresolved, src_weights=named)


def _parts(reader: Reader, variants: Sequence[Query]) -> list[tuple[list[Query], np.ndarray]]:
    """The whole-byte queries of each variant of one query, and their shares (n,), by the chain rule src, dst."""
    if not any(variant.has_partial_byte for variant in variants):
        return [([variant], np.ones(1)) for variant in variants]
    parts: list[tuple[Query, float, int]] = []  # with its log-probability, and the number of its variant
    for number, variant in enumerate(variants):
        if variant.src is not None and variant.src.extra_bits:
            nothing = dataclasses.replace(variant, src=None, dst=None)
            ((ends, log_p),) = _partial_bytes(reader, [nothing], variant.src, SRC_ROLES)
            parts += [(dataclasses.replace(variant, src=end), p, number) for end, p in zip(ends, log_p, strict=True)]
        else:
            parts.append((variant, 0.0, number))
    dst = variants[0].dst
    if dst is not None:
        openings = [dataclasses.replace(part, dst=None) for part, _, _ in parts]
        parts = [
            (Query(part.src, end, part.time_s, part.context), own + log_q, number)
            for (part, own, number), (ends, log_p) in zip(
                parts, _partial_bytes(reader, openings, dst, DST_ROLES), strict=True
            )
            for end, log_q in zip(ends, log_p, strict=True)
        ]
    found = []
    for number in range(len(variants)):
        own = [(part, log_p) for part, log_p, of in parts if of == number]
        shares = np.array([log_p for _, log_p in own])
        found.append(([part for part, _ in own], np.exp(shares - np.logaddexp.reduce(shares))))
    return found


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
