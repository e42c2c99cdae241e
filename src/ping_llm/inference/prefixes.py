"""Questions about prefixes that do not end on a byte in, weighted questions about prefixes that do out.

192.0.0.0/20 is 16 prefixes of /24, and the law of pings to it is the mixture of theirs, each weighted by the probability
that the model gives its third byte, after the first two and whatever else is told. No value is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.query import Endpoint, Query, SrcKnown, told_name
from ping_llm.inference.search import (
    DST_ROLES,
    SRC_ROLES,
    address_tokens,
    next_byte_log_p,
    opening,
    read_beginnings,
)

if TYPE_CHECKING:
    from ping_llm.inference.predictor import PingModel

_MIXED_AT_ONCE = 64  # laws


def has_partial_byte(query: Query) -> bool:
    """Whether an end of the ping is a prefix that does not end on a byte."""
    return any(end is not None and end.extra_bits for end in (query.src, query.dst))


def whole_byte_queries(model: PingModel, query: Query, src_known: SrcKnown) -> tuple[list[Query], np.ndarray]:
    """The questions of whole bytes whose answers mix to that of `query`, and their weights, which sum to 1.

    They are the variants under `src_known`, and of each that has a partial byte, its values.
    """
    variants, weights = model.weighted_variants(query, src_known)
    parts = [_parts(model, variant) for variant in variants]
    shares = np.concatenate([weight * share for weight, (_, share) in zip(weights, parts, strict=True)])
    return [part for some, _ in parts for part in some], shares


def prefix_law(model: PingModel, query: Query, src_known: SrcKnown) -> RTTDistribution:
    """The law of the result of a query that has a partial byte."""
    queries, weights = whole_byte_queries(model, query, src_known)
    law = mixed_law(model, queries, weights)
    told: dict[str, float] = {}
    for variant, weight in zip(*model.weighted_variants(query, src_known), strict=True):
        told[told_name(variant.src) if variant.src else "all"] = float(weight)
    return dataclasses.replace(law, src_weights=told if len(told) > 1 else {})


def mixed_law(model: PingModel, queries: Sequence[Query], weights: np.ndarray) -> RTTDistribution:
    """The mixture of the laws of `queries`, some at a time; their weights are made to sum to 1."""
    mixed, masses, passes = [], [], 0
    for first in range(0, len(queries), _MIXED_AT_ONCE):
        some = slice(first, first + _MIXED_AT_ONCE)
        laws = model.rtt_many(queries[some], "all")
        mass = weights[some].sum()
        if mass > 0:
            mixed.append(RTTDistribution.mixture(laws, weights[some] / mass))
            masses.append(mass)
        passes += max(law.forward_passes for law in laws)
    law = RTTDistribution.mixture(mixed, np.array(masses) / np.sum(masses))
    return dataclasses.replace(law, forward_passes=passes)


def _parts(model: PingModel, query: Query) -> tuple[list[Query], np.ndarray]:
    """A question's own: its whole-byte questions, one or more, and their shares (n,), by the chain rule src, dst."""
    if not has_partial_byte(query):
        return [query], np.ones(1)
    parts, log_p = [query], np.zeros(1)
    if query.src is not None and query.src.extra_bits:
        nothing = dataclasses.replace(query, src=None, dst=None)
        ((ends, log_p),) = _partial_bytes(model, [nothing], query.src, SRC_ROLES)
        parts = [dataclasses.replace(query, src=end) for end in ends]
    if query.dst is not None:
        openings = [dataclasses.replace(part, dst=None) for part in parts]
        of_dst = list(_partial_bytes(model, openings, query.dst, DST_ROLES))
        log_p = np.concatenate([own + log_q for own, (_, log_q) in zip(log_p, of_dst, strict=True)])
        parts = [
            dataclasses.replace(part, dst=end) for part, (ends, _) in zip(parts, of_dst, strict=True) for end in ends
        ]
    return parts, np.exp(log_p - np.logaddexp.reduce(log_p))


def _partial_bytes(
    model: PingModel, openings: Sequence[Query], end: Endpoint, roles: Sequence[int]
) -> Iterator[tuple[list[Endpoint], np.ndarray]]:
    """After each opening: what `end` stands for in whole bytes, and the log-probability of each, its told bytes counted."""
    told = address_tokens(roles, end)
    lines = [opening(query, model.gpt.config.seq_len) for query in openings]
    with model.autocast():
        read = read_beginnings(model.gpt, [np.append(line, told) for line in lines], [len(line) for line in lines])
    if not end.extra_bits:
        yield from (([end], np.array([evidence])) for evidence in read.log_evidence)
        return
    values = end.next_bytes
    ends = [end.extended(end.told + bytes([value])) for value in values]
    log_p = next_byte_log_p(read.logits[:, None], [tuple(told.tolist())])[:, 0, values]  # (openings, values)
    yield from ((ends, evidence + own) for evidence, own in zip(read.log_evidence, log_p, strict=True))
