"""A model and the queries of PingBench in, what only a model can be asked out: losses, orders, destinations, densities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.data.measurement import format_address
from ping_llm.data.rows import read_manifest
from ping_llm.eval.baselines.destinations import DestinationBayes
from ping_llm.eval.columns import Queries
from ping_llm.eval.destinations import destination_scores
from ping_llm.eval.model import model_queries
from ping_llm.eval.queries import SplitQueries

if TYPE_CHECKING:
    from ping_llm.eval.run import Bench, EvalOptions, Methods
    from ping_llm.inference.model import PingModel

WINDOWS, QUICK_WINDOWS = 256, 32
MEASUREMENTS, QUICK_MEASUREMENTS = 1_000, 100
DESTINATIONS, QUICK_DESTINATIONS = 300, 25
"""Asked for orders, and for destinations, over all splits."""

EXAMPLE_K = 5
EXAMPLES_PER_SPLIT = 2
_BINS = 120
_MARGIN = 0.15  # log-ms shown on either side of what is drawn


def model_extras(options: EvalOptions, methods: Methods, bench: Bench) -> dict[str, Any]:
    """loss_per_field by part, order_consistency, destinations by split, and densities of some queries."""
    model = methods.models[0].model
    parts = [split for split in bench.splits if len(split)]
    share = 1 / len(parts)
    measurements = max(1, int(share * (QUICK_MEASUREMENTS if options.quick else MEASUREMENTS)))
    bayes = DestinationBayes()
    bayes.fit(bench.train, bench.val)
    destinations = max(1, int(share * (QUICK_DESTINATIONS if options.quick else DESTINATIONS)))
    return {
        "loss_per_field": losses_per_field(options, model),
        "order_consistency": {
            split.split: order_consistency(model, split.other.take(slice(0, measurements))) for split in parts
        },
        "destinations": {
            split.split: destination_scores(model, bayes, answered(split.other, destinations)) for split in parts
        },
        "examples": [example for split in parts for example in examples(split, methods)],
    }


def losses_per_field(options: EvalOptions, model: PingModel) -> dict[str, dict[str, float]]:
    """Nats a token of each field, on fixed windows of every part but train."""
    from ping_llm.eval.tokens import part_windows, score_tokens
    from ping_llm.model.checkpoint import load_model

    _, config, _ = load_model(options.run)
    parts = [part for part, count in read_manifest(options.data)["parts"].items() if count]
    parts = [part for part in parts if part != "train"] or parts
    count = QUICK_WINDOWS if options.quick else WINDOWS
    return {
        part: score_tokens(model, part_windows(config, options.data, part, count)).loss_per_field() for part in parts
    }


def order_consistency(model: PingModel, queries: Queries) -> dict[str, Any]:
    """How far log p(src, dst, rtt) depends on the order of the fields, over these measurements."""
    found = model.order_consistency(records(queries))
    return {"std_nats": found.std_nats, "mean_log_prob": found.mean_log_prob, "measurements": len(queries)}


def records(queries: Queries) -> list[dict]:
    """The measurements asked for, as `PingModel` takes them."""
    table = queries.measurements
    return [
        {
            "src_addr": format_address(table.addresses[table.src_id[row]].tobytes()),
            "dst_addr": format_address(table.addresses[table.dst_id[row]].tobytes()),
            "event_time": int(table.time_s[row]),
            "rtt": float(table.rtt_ms[row]),
        }
        for row in queries.rows
    ]


def answered(queries: Queries, count: int) -> Queries:
    """The first queries that were answered."""
    return queries.take(np.flatnonzero(queries.rtt_ms >= 0)[:count])


def examples(split: SplitQueries, methods: Methods) -> list[dict]:
    """The first answered queries of a split, told EXAMPLE_K measurements: densities by the model and the last baseline."""
    queries = answered(split.other.told(EXAMPLE_K), EXAMPLES_PER_SPLIT)
    if not len(queries):
        return []
    baseline = next((one for one in methods.predictors if one.name == "stack"), methods.predictors[0])
    simple = baseline.predict(queries.view()).laws
    laws = [law for batch in methods.models[0].model.distributions(model_queries(queries)) for law in batch]
    shown = []
    for i, (law, told) in enumerate(zip(laws, records(queries), strict=True)):
        inner = np.log([law.quantile(0.01), law.quantile(0.99), told["rtt"] + 1e-3])
        inner = np.r_[inner, simple.take(slice(i, i + 1)).quantile(np.array([0.05, 0.95]))[0]]
        edges = np.linspace(inner.min() - _MARGIN, inner.max() + _MARGIN, _BINS + 1)
        cdfs = {"model": law.cdf(np.exp(edges)), baseline.name: simple.take(slice(i, i + 1)).cdf(edges[None])[0]}
        shown.append(
            {
                "split": split.split,
                "title": f"{told['src_addr']} → {told['dst_addr']}",
                "rtt_ms": told["rtt"],
                "rtt_ms_at": np.exp((edges[1:] + edges[:-1]) / 2),
                "density": {name: np.diff(cdf) / np.diff(edges) for name, cdf in cdfs.items()},
            }
        )
    return shown
