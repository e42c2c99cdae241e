"""Made-up networks of pings whose answers are known, and queries of them."""

from functools import cache

import numpy as np

from ping_llm.data.measurement import pack_address
from ping_llm.eval.baselines import TreeSettings
from ping_llm.eval.columns import (
    Measurements,
    Queries,
    QueryView,
    earlier_measurements,
    first_true,
    log_rtt,
)

SOURCES, DESTINATIONS, NEW_SOURCES, NOISE = 60, 40, 10, 0.02
PARTS = ("train", "val", "new_pair", "new_source", "future")
SMALL_TREES = TreeSettings(trees=40, leaves=15, rate=0.15, least_leaf=20, practice_queries=3_000, threads=1)


def low_rank(rng) -> np.ndarray:
    """RTTs in ms that are the product of non-negative factors of rank 3."""
    return 20 * rng.gamma(2, 1, (SOURCES, 3)) @ rng.gamma(2, 1, (3, DESTINATIONS)) / 3


def euclidean(rng) -> np.ndarray:
    """RTTs in ms that are distances in a plane of 200 ms a side, plus heights."""
    here, there = rng.uniform(0, 200, (SOURCES, 1, 2)), rng.uniform(0, 200, (1, DESTINATIONS, 2))
    heights = rng.uniform(1, 15, (SOURCES, 1)) + rng.uniform(1, 15, (1, DESTINATIONS))
    return np.sqrt(((here - there) ** 2).sum(axis=-1)) + heights


def log_low_rank(rng) -> np.ndarray:
    """RTTs in ms whose logarithm is biases plus a product of rank 3."""
    biases = rng.normal(0, 0.4, (SOURCES, 1)) + rng.normal(0, 0.4, (1, DESTINATIONS))
    return 50 * np.exp(biases + rng.normal(0, 0.4, (SOURCES, 3)) @ rng.normal(0, 0.6, (3, DESTINATIONS)))


def addresses() -> np.ndarray:
    """20.s.0.1 of sources, then 30.d.0.1 of destinations."""
    packed = np.zeros((SOURCES + DESTINATIONS, 16), dtype=np.uint8)
    packed[:, 10:12], packed[:, 15] = 255, 1
    packed[:SOURCES, 12], packed[SOURCES:, 12] = 20, 30
    packed[:SOURCES, 13], packed[SOURCES:, 13] = np.arange(SOURCES), np.arange(DESTINATIONS)
    return packed


@cache
def network(kind, repeats: int = 6, seed: int = 0) -> Measurements:
    """Every pair `repeats` times at random times of a day, 2 % noise, 5 % failed. Some of val is new pairs and sources."""
    rng = np.random.default_rng(seed)
    rtt_ms = kind(rng)
    source, destination = (axis.ravel() for axis in np.indices((SOURCES, DESTINATIONS)))
    source, destination = np.tile(source, repeats), np.tile(destination, repeats)
    time_s = 1_700_000_000 + rng.permutation(len(source)) * 6
    hidden = rng.random((SOURCES, DESTINATIONS))[source, destination]
    age, new = (time_s - time_s.min()) / np.ptp(time_s), source - (SOURCES - NEW_SOURCES)
    of_val = ((new >= 0) & (new < NEW_SOURCES // 2)) | ((new < 0) & (hidden < 0.05))
    part = np.select([of_val, new >= 0, hidden < 0.15, age > 0.85, age > 0.7], [1, 3, 2, 4, 1], 0)
    observed = rtt_ms[source, destination] * rng.lognormal(0, NOISE, len(source))
    observed[rng.random(len(source)) < 0.05] = -1
    return Measurements(
        *(source.astype(np.int32), (SOURCES + destination).astype(np.int32), source.astype(np.int64), time_s),
        *(observed.astype(np.float32), np.zeros(len(source), dtype=np.uint8), part.astype(np.int8), addresses(), PARTS),
    )


def queries_of(table: Measurements, part: str, count: int = 400, k: int = 30, other: bool = True) -> Queries:
    """The latest of a part, so that most of each context is there, but any of val; none is given another's answer."""
    rows = table.rows_of_part(part)
    rows = (
        rows[np.argsort(table.time_s[rows])][-count:]
        if part != "val"
        else np.random.default_rng(0).permutation(rows)[:count]
    )
    context = earlier_measurements(table, rows, 8 * k, other_destinations=other)
    return Queries(table, rows, first_true((context >= 0) & ~np.isin(context, rows), context, k))


def relative_errors(learned, queries: Queries) -> np.ndarray:
    answered = queries.take(np.flatnonzero(queries.rtt_ms >= 0))
    return np.abs(np.exp(learned(answered.view()) - log_rtt(answered.rtt_ms)) - 1)


def ping_table(*lines: tuple[str, str, int, float]) -> Measurements:
    """Of (source, destination, second, ms); probes are numbered by source."""
    texts = sorted({text for line in lines for text in line[:2]})
    ids = np.array([[texts.index(line[0]), texts.index(line[1])] for line in lines], dtype=np.int32).T
    packed = np.array([list(pack_address(text)) for text in texts], dtype=np.uint8)
    time_s, rtt_ms = np.array([line[2] for line in lines]), np.array([line[3] for line in lines], dtype=np.float32)
    zero = np.zeros(len(lines), dtype=np.int8)
    return Measurements(*ids, ids[0].astype(np.int64), time_s, rtt_ms, zero.astype(np.uint8), zero, packed, ("train",))


def last_query(*lines: tuple[str, str, int, float], context: tuple[int, ...] = ()) -> tuple[Measurements, QueryView]:
    """The table of all lines but the last, and the last as a query; `context` are lines."""
    table = ping_table(*lines)
    query = Queries(table, np.array([len(lines) - 1]), np.array(context, dtype=np.int64).reshape(1, -1))
    return table.take(slice(-1)), query.view()
