"""Rows in, the train and test measurements of the protocol by which the earlier implementation was scored out.

Only addresses that are both a source and a destination, with the time cut at the midpoint. A node's neighbours are up to
100 nodes that it pinged, drawn with chances in proportion to 1 / median RTT. Learned from are the first half's pings to
neighbours; asked are the second half's answered pings between pairs that are no neighbours in either direction. Every query
has the same form: both addresses and the time told, and the last pings to neighbours as context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ping_llm.eval.baselines.base import PointBaseline
from ping_llm.eval.baselines.coordinates import VIVALDI_2D, VIVALDI_8D
from ping_llm.eval.baselines.factors import DMFSGD_METHOD, LOG_FACTORS
from ping_llm.eval.baselines.pairs import group_medians
from ping_llm.eval.baselines.simple import ADDITIVE, GLOBAL_MEDIAN
from ping_llm.eval.columns import Measurements, Queries
from ping_llm.eval.metrics import QUANTILE_LEVELS

NEIGHBOURS = 100
CONTEXT = 10
LEAST_NODES = 10
METHODS = (GLOBAL_MEDIAN, ADDITIVE, VIVALDI_2D, VIVALDI_8D, DMFSGD_METHOD, LOG_FACTORS)
VAL_SHARE = 0.1  # of the first half's pings to neighbours, on which settings are chosen


@dataclass(frozen=True, eq=False)
class EarlierProtocol:
    """Measurements of nodes only; `train` and `test` are places among them."""

    measurements: Measurements
    train: np.ndarray  # (n,) first half, neighbours
    test: np.ndarray  # (m,) second half, answered, no neighbours
    nodes: int
    middle_s: int

    @classmethod
    def of(cls, table: Measurements, seed: int = 0, neighbours: int = NEIGHBOURS) -> EarlierProtocol:
        """ValueError if hardly any address is both a source and a destination, or no pair is left to ask."""
        both = np.intersect1d(table.src_id, table.dst_id)
        if len(both) < LEAST_NODES:
            raise ValueError(
                f"{len(both)} addresses are both a source and a destination, but the earlier protocol needs {LEAST_NODES}; "
                "use rows of measurements between anchors"
            )
        table = table.take(np.isin(table.src_id, both) & np.isin(table.dst_id, both) & (table.src_id != table.dst_id))
        middle_s = int((table.time_s.min() + table.time_s.max()) // 2)
        first = table.time_s <= middle_s
        chosen = choose_neighbours(table.take(first & (table.rtt_ms >= 0)), neighbours, np.random.default_rng(seed))
        key, reverse = _pair_key(table.src_id, table.dst_id), _pair_key(table.dst_id, table.src_id)
        train = np.flatnonzero(first & np.isin(key, chosen))
        near = np.isin(key, chosen) | np.isin(reverse, chosen)
        test = np.flatnonzero(~first & ~near & (table.rtt_ms >= 0))
        if not len(train) or not len(test):
            raise ValueError(f"the earlier protocol leaves {len(train)} pings to learn from and {len(test)} to ask")
        return cls(table, train, test, len(both), middle_s)

    def queries(self, count: int, seed: int = 0) -> Queries:
        """At most `count` of the test pings, told the last CONTEXT pings of their source address to its neighbours."""
        table, rows = self.measurements, np.sort(np.random.default_rng(seed).permutation(self.test)[:count])
        order = self.train[np.lexsort((table.time_s[self.train], table.src_id[self.train]))]
        known, asked = table.src_id[order], table.src_id[rows]
        back = np.searchsorted(known, asked, "right")[:, None] - 1 - np.arange(CONTEXT)  # (q, CONTEXT)
        usable = back >= np.searchsorted(known, asked)[:, None]
        return Queries(table, rows, np.where(usable, order[np.maximum(back, 0)], -1))


def compare(protocol: EarlierProtocol, queries: Queries, models: Sequence = (), seed: int = 0) -> list[dict]:
    """Median and p90 relative error and mean absolute error in ms of simple methods, and of models (`ModelMethod`).

    A model stands here like for like only if it learned from the protocol's train measurements alone.
    """
    table, rng = protocol.measurements, np.random.default_rng([seed, 1])
    kept = rng.random(len(protocol.train)) >= VAL_SHARE
    val = protocol.train[~kept]
    train, val = table.take(protocol.train[kept]), Queries(table, val, np.zeros((len(val), 0), dtype=np.int32))
    actual, view, predicted = queries.rtt_ms.astype(np.float64), queries.view(), {}
    for method in METHODS:
        baseline = PointBaseline(method)
        baseline.fit(train, val)
        predicted[method.name] = np.exp(baseline.predict(view).point_log_ms)
    for model in models:
        scores = model.scores(queries, np.random.default_rng(seed))
        predicted[model.name] = scores.quantiles_ms[:, QUANTILE_LEVELS.index(0.5)]
    lines = []
    for name, median_ms in predicted.items():
        error = np.abs(median_ms - actual) / np.maximum(actual, 1e-3)
        quantiles = dict(
            zip(("median_rel_error", "p90_rel_error"), np.quantile(error, (0.5, 0.9)).tolist(), strict=True)
        )
        lines.append({"method": name} | quantiles | {"mae_ms": float(np.abs(median_ms - actual).mean())})
    return lines


def choose_neighbours(answered: Measurements, most: int, rng: np.random.Generator) -> np.ndarray:
    """Keys of the pairs of each source and its neighbours, ascending."""
    key = _pair_key(answered.src_id, answered.dst_id)
    pairs, group = np.unique(key, return_inverse=True)
    weight = 1 / np.maximum(np.exp(group_medians(answered.log_ms, group, len(pairs))), 1e-3)
    # The smallest of exponential times with rates `weight` are a weighted draw without replacement.
    arrival = rng.exponential(1, len(pairs)) / weight
    source = pairs >> 32
    order = np.lexsort((arrival, source))
    place = np.arange(len(order)) - np.searchsorted(source[order], source[order])
    return np.sort(pairs[order[place < most]])


def _pair_key(src_id: np.ndarray, dst_id: np.ndarray) -> np.ndarray:
    return (src_id.astype(np.int64) << 32) | dst_id
