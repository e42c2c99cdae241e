"""A model and queries in, what only a model can answer out: destinations, the order of fields, losses, densities.

Bits per destination are exact: log p(src, rtt, dst) − log p(src, rtt). Hits of the model count prefixes among the likeliest
addresses that it finds, so they are a lower bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ping_llm.data.measurement import is_ipv4, pack_addresses
from ping_llm.data.rows import read_manifest
from ping_llm.eval.baselines.base import Baseline
from ping_llm.eval.baselines.destinations import DestinationBayes, prefix_ranks
from ping_llm.eval.baselines.pairs import find
from ping_llm.eval.columns import Queries, prefix_ids
from ping_llm.eval.model import model_queries, open_queries, records
from ping_llm.eval.options import DIAGNOSE_QUERIES, EvalOptions
from ping_llm.eval.queries import FAMILIES, VAL_SPLITS, SplitQueries, draw_val, learned_from, mixed_queries
from ping_llm.eval.tokens import colored, part_windows, score_tokens
from ping_llm.inference.model import PingModel

WINDOWS, QUICK_WINDOWS = 256, 32
MEASUREMENTS, QUICK_MEASUREMENTS = 1_000, 100
DESTINATIONS, QUICK_DESTINATIONS = 300, 25
"""Of the report, for orders, and for destinations, over all splits."""

PREFIXES = {8: 24, 16: 32, 24: 48, 32: 128}  # of IPv4, in bits, each with the IPv6 prefix that is counted with it
TOPS = (1, 10, 100)
EXPANSIONS = 512  # of prefixes in a search for destinations
_UNSEEN_BITS = (32.0, 64.0)  # that a destination never seen costs: an IPv4 address whole, an IPv6 one to the /64

EXAMPLE_K = 5
EXAMPLES_PER_SPLIT = 2
_BINS = 120
_MARGIN = 0.15  # log-ms shown on either side of what is drawn


def diagnose(options: EvalOptions) -> list[dict[str, Any]]:
    """The lines of `--diagnose`; ValueError if the run or the part is missing."""
    assert options.diagnose is not None
    count = options.queries or DIAGNOSE_QUERIES[options.diagnose]
    if options.diagnose == "tokens":
        model = PingModel.load(options.trained, options.device)
        scores = score_tokens(model, part_windows(options, options.part, count))
        for window in range(min(options.show, count)):
            print(colored(scores, window) + "\n")
        return scores.table()
    model, split = open_queries(options, count)
    if options.diagnose == "order":
        found = order_consistency(model, split.recent)
        of = f"std over the orders, mean of {found['measurements']} pings"
        print(f"{of}: {found['std_nats']:.3f} nats (0.3 or less is good)")
        means = found["mean_log_prob"] | {"std": found["std_nats"]}
        return [{"order": order, "mean_log_prob_nats": mean} for order, mean in means.items()]
    table = split.recent.measurements
    bayes = DestinationBayes(learned_from(table), mixed_queries(draw_val(table, 2000, options.seed)))
    found, lines = destination_scores(model, bayes, split.recent.answered(count)), []
    for method in ("model", bayes.name):
        rates = found[method]["hit_rate"]
        hits = {f"top {top} at /{bits}": share for bits, of_top in rates.items() for top, share in of_top.items()}
        lines.append({"method": method, "bits": found[method]["bits"]} | hits)
    return lines


def model_extras(
    model: PingModel,
    options: EvalOptions,
    bayes: DestinationBayes,
    splits: list[SplitQueries],
    baseline: Baseline | None,
) -> dict[str, Any]:
    """loss_per_field by part, order_consistency, destinations by split, and densities of some queries."""
    queries = {split.split: split.other for split in splits if len(split) and split.family == FAMILIES[0]}
    wanted = (QUICK_MEASUREMENTS, QUICK_DESTINATIONS) if options.quick else (MEASUREMENTS, DESTINATIONS)
    measurements, destinations = (max(1, int(count / len(queries))) for count in wanted)
    windows, counts = QUICK_WINDOWS if options.quick else WINDOWS, read_manifest(options.rows)["parts"]
    parts = [part for part, held in counts.items() if held and part != "train"] or ["train"]
    parts = [part for part in parts if part in VAL_SPLITS] if options.val_only else parts
    losses = {part: score_tokens(model, part_windows(options, part, windows)).loss_per_field() for part in parts}
    orders, found, shown = {}, {}, []
    for split, of_split in queries.items():
        orders[split] = order_consistency(model, of_split.take(slice(measurements)))
        found[split] = destination_scores(model, bayes, of_split.answered(destinations))
        shown += examples(split, of_split, model, baseline)
    return {"loss_per_field": losses, "order_consistency": orders, "destinations": found, "examples": shown}


def order_consistency(model: PingModel, queries: Queries) -> dict[str, Any]:
    """How far log p(src, dst, rtt) depends on the order of the fields, over these measurements."""
    found = model.order_consistency(records(queries))
    return {"std_nats": found.std_nats, "mean_log_prob": found.mean_log_prob, "measurements": len(queries)}


def destination_scores(model: PingModel, bayes: DestinationBayes, queries: Queries) -> dict[str, Any]:
    """Bits per destination given source and RTT, and hit rates, by the model and by the fitted baseline.

    To the baseline, a destination that train does not hold is one of its family.
    """
    if not len(queries):
        return {"queries": 0}
    pings, addresses, dst_id = records(queries), queries.measurements.addresses, queries.dst_id
    log_p = model.log_prob(pings, ("src", "rtt", "dst")) - model.log_prob(pings, ("src", "rtt"))
    of_ping = [model_ranks(model, ping) for ping in pings]
    ranks = {bits: np.array([of_one[bits] for of_one in of_ping]) for bits in PREFIXES}

    bayes_log_p = bayes.log_probability(queries.src_id, queries.rtt_ms)
    at = find(bayes.destinations, dst_id)  # −1 is the last column: all others together
    unseen_bits = np.where(at < 0, np.where(is_ipv4(addresses[dst_id]), *_UNSEEN_BITS), 0.0)
    bayes_bits = -bayes_log_p[np.arange(len(at)), at] / np.log(2) + unseen_bits
    mass, bayes_ranks = np.exp(bayes_log_p[:, :-1]), {}
    for bits, ipv6_bits in PREFIXES.items():
        prefix = prefix_ids(addresses, bits, ipv6_bits)
        bayes_ranks[bits] = prefix_ranks(mass, prefix[bayes.destinations], prefix[dst_id])
    return {
        "queries": len(queries),
        "model": {"bits": float(-log_p.mean() / np.log(2)), "hit_rate": _hit_rates(ranks)},
        bayes.name: {"bits": float(bayes_bits.mean()), "hit_rate": _hit_rates(bayes_ranks)},
    }


def _hit_rates(ranks: dict[int, np.ndarray]) -> dict[int, dict[int, float]]:
    """By length of the prefix and by TOPS: the share of ranks (q,) among the first."""
    return {bits: {top: float((rank < top).mean()) for top in TOPS} for bits, rank in ranks.items()}


def model_ranks(model: PingModel, ping: dict[str, Any]) -> dict[int, int]:
    """By length: how many prefixes are likelier than that of a ping's destination, among those that are found."""
    given = {"rtt": ping["rtt"], "at": ping["event_time"], "top": max(TOPS), "expansions": EXPANSIONS}
    return prefix_ranks_of(model.destinations(ping["src_addr"], **given).table.to_pylist(), ping["dst_addr"])


def prefix_ranks_of(rows: list[dict[str, Any]], dst_addr: str) -> dict[int, int]:
    """How many prefixes of each length are likelier than that of `dst_addr`, among addresses found with a probability."""
    packed, _ = pack_addresses([*(row["dst_addr"].partition("/")[0] for row in rows), dst_addr])
    mass, ranks = np.array([[row["probability"] for row in rows]]), {}
    for bits, ipv6_bits in PREFIXES.items():
        prefix = prefix_ids(packed, bits, ipv6_bits)
        known, right = prefix[:-1], prefix[-1:]
        ranks[bits] = int(prefix_ranks(mass, known, right)[0]) if right in known else max(TOPS)
    return ranks


def examples(split: str, queries: Queries, model: PingModel, baseline: Baseline | None) -> list[dict[str, Any]]:
    """The first answered queries of a split, given EXAMPLE_K measurements: densities by the model, and by a baseline."""
    queries, shown = queries.given(EXAMPLE_K).answered(EXAMPLES_PER_SPLIT), []
    if not len(queries):
        return []
    simple = baseline.predict(queries.view()).distributions if baseline else None
    for i, (one, ping) in enumerate(zip(model.rtt_many(model_queries(queries)), records(queries), strict=True)):
        inner = np.log([one.quantile(0.01), one.quantile(0.99), ping["rtt"] + 1e-3])
        other = simple.take(slice(i, i + 1)) if simple else None
        if other:
            inner = np.r_[inner, other.quantile(np.array([0.05, 0.95]))[0]]
        edges = np.linspace(inner.min() - _MARGIN, inner.max() + _MARGIN, _BINS + 1)
        cdfs = {"model": one.cdf(np.exp(edges))}
        if baseline and other:
            cdfs[baseline.name] = other.cdf(edges[None])[0]
        shown.append(
            {
                "split": split,
                "title": f"{ping['src_addr']} → {ping['dst_addr']}",
                "rtt_ms": ping["rtt"],
                "rtt_ms_at": np.exp((edges[1:] + edges[:-1]) / 2),
                "density": {name: np.diff(cdf) / np.diff(edges) for name, cdf in cdfs.items()},
            }
        )
    return shown
