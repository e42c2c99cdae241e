"""Training measurements in, a global median, one per source, one per destination, and additive biases out."""

from __future__ import annotations

import numpy as np

from ping_llm.eval.baselines.base import Learned, PointMethod
from ping_llm.eval.baselines.pairs import Pairs, group_medians
from ping_llm.eval.columns import Measurements, QueryView, prefix_ids

SHRINK = 5.0
"""A bias from n pairs is taken n / (n + 5)."""


def learn_global(train: Measurements) -> Learned:
    """The median of all answered measurements."""
    median = float(np.nanmedian(train.log_ms))
    return lambda view: np.full(len(view), median)


def learn_source(train: Measurements) -> Learned:
    """The median of the source; of a source that is not in train that of the context; else the global one."""
    rows = np.flatnonzero(train.rtt_ms >= 0)
    pairs, overall = Pairs.of(train), float(np.nanmedian(train.log_ms))
    medians = group_medians(train.log_ms[rows], pairs.source_of(train.probe[rows]), len(pairs.probes))

    def predict(view: QueryView) -> np.ndarray:
        source = pairs.source_of(view.probe)
        return np.where(source >= 0, medians[source], row_medians(view.context_log_ms, overall))

    return predict


def learn_destination(train: Measurements) -> Learned:
    """The median over the measurements of the destination, else of its /24 or /48, else /16 or /32, else of all."""
    rows = np.flatnonzero(train.rtt_ms >= 0)
    overall, levels = float(np.nanmedian(train.log_ms)), []
    for bits in ((32, 128), (24, 48), (16, 32)):
        ids = prefix_ids(train.addresses, *bits)
        known, group = np.unique(ids[train.dst_id[rows]], return_inverse=True)
        median_of = np.full(ids.max() + 1, np.nan)
        median_of[known] = group_medians(train.log_ms[rows], group, len(known))
        levels.append(median_of[ids])  # (a,)

    def predict(view: QueryView) -> np.ndarray:
        predicted = np.full(len(view), np.nan)
        for median_of in levels:
            predicted = np.where(np.isnan(predicted), median_of[view.dst_id], predicted)
        return np.where(np.isnan(predicted), overall, predicted)

    return predict


class Additive:
    """log RTT = mean + bias of the source + bias of the destination, each shrunk; new sources are placed by context."""

    def __init__(self, train: Measurements, sweeps: int = 20) -> None:
        self.pairs = pairs = Pairs.of(train)
        self.mean = float(pairs.log_ms.mean())
        self.source_bias, self.destination_bias = np.zeros(len(pairs.probes)), np.zeros(len(pairs.dst_ids))
        for _ in range(sweeps):
            rest = pairs.log_ms - self.mean - self.source_bias[pairs.source]
            self.destination_bias = _shrunk_mean(pairs.destination, rest, len(pairs.dst_ids))
            rest = pairs.log_ms - self.mean - self.destination_bias[pairs.destination]
            self.source_bias = _shrunk_mean(pairs.source, rest, len(pairs.probes))

    def without_source(self, dst_id: np.ndarray) -> np.ndarray:
        """Mean plus the bias of the destination, 0 for a new one; any shape."""
        destination = self.pairs.destination_of(dst_id)
        return self.mean + np.where(destination >= 0, self.destination_bias[destination], 0.0)

    def __call__(self, view: QueryView) -> np.ndarray:
        source = self.pairs.source_of(view.probe)
        rest = view.context_log_ms - self.without_source(view.context_dst_id)
        told = ~np.isnan(rest)
        from_context = np.where(told, rest, 0.0).sum(axis=1) / (told.sum(axis=1) + SHRINK)
        return self.without_source(view.dst_id) + np.where(source >= 0, self.source_bias[source], from_context)


def learn_additive(train: Measurements) -> Learned:
    """See `Additive`."""
    return Additive(train)


def row_medians(values: np.ndarray, missing: float | np.ndarray) -> np.ndarray:
    """(q,) medians of the numbers of each row of (q, K), `missing` where there are none."""
    if not values.shape[1]:
        return np.broadcast_to(missing, len(values)).astype(float)
    ordered = np.sort(values, axis=1)  # NaN last
    count = (~np.isnan(ordered)).sum(axis=1)
    low = np.take_along_axis(ordered, np.maximum((count - 1) // 2, 0)[:, None], 1)[:, 0]
    high = np.take_along_axis(ordered, np.minimum(count // 2, values.shape[1] - 1)[:, None], 1)[:, 0]
    return np.where(count > 0, (low + high) / 2, missing)


def _shrunk_mean(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    return np.bincount(group, values, groups) / (np.bincount(group, minlength=groups) + SHRINK)


GLOBAL_MEDIAN = PointMethod("global_median", learn_global)
SOURCE_MEDIAN = PointMethod("source_median", learn_source)
DESTINATION_MEDIAN = PointMethod("destination_median", learn_destination)
ADDITIVE = PointMethod("additive", learn_additive)
