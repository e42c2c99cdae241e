"""A model and rows in; destination prefixes with their vectors, their places on a map and their median RTTs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import IPV4_MAPPED_PREFIX, as_text, is_ipv4, network_of
from ping_llm.data.rows import RowReader
from ping_llm.data.special_purpose import is_public
from ping_llm.inference.context import Context
from ping_llm.inference.model import PingModel
from ping_llm.inference.prompt import DST_ROLES, address_tokens
from ping_llm.inference.query import Endpoint, Query
from ping_llm.inside.projection import explained_by_neighbours, principal_components, scaled
from ping_llm.model.fields import read_fields

MOST_PREFIXES = 400  # of a family on a map: those with the most replies
LEAST_PREFIXES = 4  # of a family; fewer are no map
_MEASUREMENTS = 1 << 21  # of the rows, that medians are of, at most about so many
_BATCH = 64  # queries or prefixes in one pass
Kind = Literal["embedding", "state", "answer"]
"""What a model makes of a prefix: see `vectors`."""


@dataclass(frozen=True, eq=False)
class Prefixes:
    """n destination prefixes of one family."""

    ends: list[Endpoint]
    median_ms: np.ndarray  # (n,) of the replies in the rows, or, where `replies` is 0, as the model says
    replies: np.ndarray  # (n,) int64, in the rows that were read


@dataclass(frozen=True, eq=False)
class PrefixMap:
    """Prefixes in the first two components of what the model makes of them."""

    prefixes: Prefixes
    of: Kind
    places: np.ndarray  # (n, 2)
    shares: np.ndarray  # (2,) of the variance
    explained: float  # R² of the log of the median by those of the nearest five others, in all dimensions

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "of": self.of,
            "prefixes": [str(end) for end in self.prefixes.ends],
            "median_ms": self.prefixes.median_ms,
            "replies": self.prefixes.replies,
            "variance_shares": self.shares,
            "explained_by_neighbours": self.explained,
            "places": self.places,
        }


def measured_prefixes(rows: RowReader, ipv4_bits: int, ipv6_bits: int) -> list[Prefixes]:
    """The prefixes with the most replies in rows, those of IPv4 and those of IPv6, and the median RTT of each.

    Of more than two million measurements some rows, evenly spaced, are read.
    """
    step = max(1, int(rows.measurements.sum()) // _MEASUREMENTS)
    networks, rtts = [], []
    for number in range(0, len(rows), step):
        row = rows[number]
        replied = row.rtt_ms >= 0
        networks.append(network_of(row.dst_addresses, ipv4_bits, ipv6_bits)[row.dst[replied]])
        rtts.append(row.rtt_ms[replied])
    network, rtt_ms = np.concatenate(networks), np.concatenate(rtts)
    found = []
    for ipv4, bits in ((True, ipv4_bits), (False, ipv6_bits)):
        chosen = is_ipv4(network) == ipv4
        distinct, first, place, counts = np.unique(
            as_text(network[chosen]), return_index=True, return_inverse=True, return_counts=True
        )
        kept = np.argsort(-counts, kind="stable")[:MOST_PREFIXES]
        order, ends = np.argsort(place, kind="stable"), np.cumsum(counts)
        of_prefix = np.split(rtt_ms[chosen][order], ends[:-1])
        if len(distinct) >= LEAST_PREFIXES:
            packed = network[chosen][first]
            endpoints = [Endpoint(packed[i].tobytes(), bits // 8) for i in kept]
            medians = np.array([float(np.median(of_prefix[i])) for i in kept])
            found.append(Prefixes(endpoints, medians, counts[kept]))
    return found


def imagined_prefixes(model: PingModel) -> list[Prefixes]:
    """The public /8s of IPv4, with the median RTT from any source that the model expects: where there are no rows."""
    packed = np.array([[*IPV4_MAPPED_PREFIX, byte, 0, 0, 0] for byte in range(1, 224)], dtype=np.uint8)
    ends = [Endpoint(address.tobytes(), 1) for address in packed[is_public(packed)]]
    queries = [Query.of(None, end, None, Context.parse(None)) for end in ends]
    medians = []
    for first in range(0, len(queries), _BATCH):
        medians += [one.median for one in model.rtt_many(queries[first : first + _BATCH])]
    return [Prefixes(ends, np.array(medians), np.zeros(len(ends), dtype=np.int64))]


def vectors(model: PingModel, ends: Sequence[Endpoint], of: Kind) -> np.ndarray:
    """What the model makes of prefixes of one length, (n, D) float64, where a measurement begins with this destination.

    "embedding": the row of the table of prefixes of a field-aware model, after the last byte. "state": the residual stream
    there after the last block, from which the next byte is predicted. "answer": the same a token later, where an RTT begins
    and its byte 1 is predicted. Streams are scaled to a root mean square of 1, as the head reads them. ValueError for the
    embedding of a model that has no such table.
    """
    after = [tk.RTT_START] if of == "answer" else []
    lines = np.stack([[tk.MEASUREMENT_START, *address_tokens(DST_ROLES, end), *after] for end in ends])
    tokens = torch.from_numpy(lines).to(model.device)
    with torch.inference_mode(), model.autocast():
        if of != "embedding":
            parts = [model.gpt.states(part)[:, -1] for part in tokens.split(_BATCH)]
            return scaled(torch.cat(parts).float().cpu().numpy())
        if model.gpt.fields is None:
            raise ValueError("the model has no table of prefixes: model.field_aware is off; use of='state'")
        table = model.gpt.fields.prefixes
        features, _ = read_fields(tokens)
        return table(features.prefix[:, -1] & (table.num_embeddings - 1)).double().cpu().numpy()


def prefix_maps(model: PingModel, prefixes: Prefixes) -> list[PrefixMap]:
    """Where prefixes lie in the first two components: of the embedding, or, where there is none, of the state; and of the
    answer."""
    maps, log_median = [], np.log(np.maximum(prefixes.median_ms, 1e-3))
    kinds: tuple[Kind, Kind] = ("state" if model.gpt.fields is None else "embedding", "answer")
    for of in kinds:
        points = vectors(model, prefixes.ends, of)
        found = principal_components(points)
        explained = explained_by_neighbours(points, log_median)
        maps.append(PrefixMap(prefixes, of, found.places, found.shares, explained))
    return maps
