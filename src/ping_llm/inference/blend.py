"""Queries and the model's answers in, the answers mixed with what experts say beside it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Reader
from ping_llm.inference.experts import CUTS, SITUATION, Experts, Past
from ping_llm.inference.familiar import Familiar, Role
from ping_llm.inference.past import pasts
from ping_llm.inference.query import Query


@dataclass(frozen=True, eq=False)
class Blend:
    """What answers some queries beside the model, and how much each part counts; see `Experts`."""

    experts: Experts
    queries: Sequence[Query]
    cuts: np.ndarray  # (q, CUTS) bytes of the destination that are given under each, 0 where it is not cut
    weights: np.ndarray  # (1 + CUTS + kinds, q)
    pasts: Mapping[str, Past]

    @classmethod
    def of(cls, reader: Reader, queries: Sequence[Query], cut: bool = True) -> Blend | None:
        """None where the reader has no experts; without `cut` the model is given every destination as it is."""
        experts = reader.calibration.experts
        if experts is None:
            return None
        situation, cuts = situations(reader.calibration.familiar, queries)
        found = pasts(queries, reader.memory)
        return cls(experts, queries, cuts, experts.weights(found, situation, (cuts > 0) & cut), found)

    @property
    def of_model(self) -> np.ndarray:
        """(q,) weight of the model, whatever it is given."""
        return self.weights[: 1 + len(CUTS)].sum(axis=0)

    @property
    def of_experts(self) -> np.ndarray:
        """(kinds, q) weight of each expert."""
        return self.weights[1 + len(CUTS) :]

    def cut(self, i: int, variants: Sequence[Query]) -> list[Query]:
        """The variants of a query with less of the destination, for each of CUTS that counts."""
        dst = self.queries[i].dst
        kept = [length for length, weight in zip(self.cuts[i], self.weights[1:, i], strict=False) if weight]
        return [replace(v, dst=dst.cut(int(length))) for length in kept if dst for v in variants]

    def shares(self, i: int) -> np.ndarray:
        """Of the model's part of a query, those of the whole destination and of each of CUTS that counts; they sum to 1."""
        own = self.weights[: 1 + len(CUTS), i]
        own = own[(own > 0) | (np.arange(len(own)) == 0)]
        return own / own.sum()

    def apply(self, found: RTTDistribution) -> RTTDistribution:
        """The model's answers, mixed with those of the experts."""
        of_model, codes = self.of_model, found.code_probability
        if (of_model < 1).any():
            codes = codes * of_model[:, None].astype(codes.dtype)
            for weight, (kind, expert) in zip(self.of_experts, self.experts.experts.items(), strict=True):
                rows = np.flatnonzero(weight)
                if len(rows):
                    scale = (weight * found.p_answer)[rows, None]
                    codes[rows] += (scale * expert.code_probability(self.pasts[kind].take(rows))).astype(codes.dtype)
        return replace(found, code_probability=codes, unresolved=found.unresolved * of_model)


def situations(familiar: Familiar | None, queries: Sequence[Query]) -> tuple[np.ndarray, np.ndarray]:
    """The SITUATION of q queries (q, 3), and bytes of the destination that are given under each of CUTS (q, CUTS), 0 where
    it is not cut: a destination that training has met, or that is no host."""
    situation, cuts = np.zeros((len(queries), len(SITUATION))), np.zeros((len(queries), len(CUTS)), dtype=np.int64)
    situation[:, 2] = np.log1p([len(query.context) for query in queries])
    roles: tuple[Role, ...] = ("src", "dst")
    for column, role in enumerate(roles):
        ends = [getattr(query, role) for query in queries]
        hosts = [i for i, end in enumerate(ends) if end is not None and not end.is_prefix]
        if familiar is None or not hosts:
            continue
        packed = np.frombuffer(b"".join(ends[i].packed for i in hosts), np.uint8).reshape(-1, 16)
        met = familiar.known_bytes(role, packed)
        new = met < [ends[i].width for i in hosts]
        situation[hosts, column] = new
        if role == "dst":
            shown = np.maximum(met, 1)
            cuts[hosts] = np.where(new[:, None], np.stack([shown, np.where(shown > 1, 1, 0)], axis=1), 0)
    return situation, cuts
