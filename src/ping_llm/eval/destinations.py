"""A model, sources and results of pings in, how well it tells which destination answered out; beside popularity × RTT.

Bits per destination are exact: log p(src, rtt, dst) − log p(src, rtt). Hits of the model count prefixes among the likeliest
addresses that it finds, so they are a lower bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.data.measurement import is_ipv4, pack_addresses
from ping_llm.eval.baselines.destinations import DestinationBayes, prefix_ranks
from ping_llm.eval.baselines.pairs import find
from ping_llm.eval.columns import Queries, prefix_ids

if TYPE_CHECKING:
    from ping_llm.inference.model import PingModel

PREFIXES = {8: 24, 16: 32, 24: 48, 32: 128}
"""Of IPv4, in bits, each with the IPv6 prefix that is counted with it."""

TOPS = (1, 10, 100)
EXPANSIONS = 512  # of prefixes in a search for destinations
_UNSEEN_BITS = {True: 32.0, False: 64.0}  # that a destination never seen costs within its family (whole, or to the /64)


def destination_scores(model: PingModel, bayes: DestinationBayes, queries: Queries) -> dict[str, Any]:
    """Bits per destination given source and RTT, and hit rates, by the model and by the fitted baseline."""
    from ping_llm.eval.extras import records

    if not len(queries):
        return {"queries": 0}
    asked = records(queries)
    log_p = model.log_prob(asked, ("src", "rtt", "dst")) - model.log_prob(asked, ("src", "rtt"))
    scores = {
        "queries": len(queries),
        "model": {"bits": float(-log_p.mean() / np.log(2)), "hit_rate": model_hit_rates(model, asked)},
        "destination_bayes": bayes_scores(bayes, queries),
    }
    return scores


def bayes_scores(bayes: DestinationBayes, queries: Queries) -> dict[str, Any]:
    """Bits and hit rates of popularity × RTT histogram; a destination that train does not hold is one of its family."""
    table = queries.measurements
    dst_id = table.dst_id[queries.rows]
    log_p = bayes.log_probability(queries.probe, queries.rtt_ms)
    at = find(bayes.destinations, dst_id)
    nats = -log_p[np.arange(len(at)), at]  # −1 is the last column: all others together
    family_bits = np.where(is_ipv4(table.addresses[dst_id]), _UNSEEN_BITS[True], _UNSEEN_BITS[False])
    bits = nats / np.log(2) + np.where(at < 0, family_bits, 0.0)
    rates = {}
    for ipv4_bits, ipv6_bits in PREFIXES.items():
        prefix = table.prefix_ids(ipv4_bits, ipv6_bits)
        rank = prefix_ranks(log_p, prefix[bayes.destinations], prefix[dst_id])
        rates[ipv4_bits] = {top: float((rank < top).mean()) for top in TOPS}
    return {"bits": float(bits.mean()), "hit_rate": rates}


def model_hit_rates(model: PingModel, asked: list[dict]) -> dict[int, dict[int, float]]:
    """The share of measurements whose destination's prefix is among the likeliest of those found."""
    hits = {bits: dict.fromkeys(TOPS, 0) for bits in PREFIXES}
    for ping in asked:
        found = model.destinations(
            ping["src_addr"], rtt=ping["rtt"], at=ping["event_time"], top=max(TOPS), expansions=EXPANSIONS
        )
        for bits, rank in prefix_ranks_of(found.table.to_pylist(), ping["dst_addr"]).items():
            for top in TOPS:
                hits[bits][top] += rank < top
    return {bits: {top: count / len(asked) for top, count in of.items()} for bits, of in hits.items()}


def prefix_ranks_of(rows: list[dict], dst_addr: str) -> dict[int, int]:
    """How many prefixes of each length are likelier than that of `dst_addr`, among addresses found with a probability."""
    texts = [row["dst_addr"].partition("/")[0] for row in rows]
    mass = np.array([row["probability"] for row in rows])
    packed, _ = pack_addresses([*texts, dst_addr])
    ranks = {}
    for ipv4_bits, ipv6_bits in PREFIXES.items():
        *prefix, right = prefix_ids(packed, ipv4_bits, ipv6_bits)
        of_prefix = np.bincount(np.array(prefix, dtype=np.int64), mass, right + 1) if rows else np.zeros(right + 1)
        known = right in prefix
        ranks[ipv4_bits] = int((of_prefix >= of_prefix[right]).sum() - 1) if known else max(TOPS)
    return ranks
