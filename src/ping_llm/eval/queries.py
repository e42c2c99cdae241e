"""Measurements in, the queries of PingBench out: what is queried, and which earlier measurements of its source are given.

A query is a measurement of a test part. Given are the last k measurements of its source from before its second, whatever
part they are in: what a user would have at hand. The `other` draw leaves out those of the query's own destination. Contexts
are nested: of one draw, the smaller is the beginning of the larger. Nothing here looks at an RTT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from zlib import crc32

import numpy as np

from ping_llm.eval.columns import Measurements, Queries, earlier_measurements, place_in_group

COUNTS = (0, 1, 2, 5, 10, 30)  # how many measurements are given with a query
CHOICE_CONTEXTS = (0, 5, 30)  # of these, those that settings are chosen on
DRAWS = ("recent", "other")
NO_DRAW = "none"  # the draw of queries without context: it is the same in both
SPLITS = ("test-s1", "test-s2", "test-s3", "test-s4", "test-s5")
EXTERNAL = "external"  # the split of all measurements of rows that the model was not trained beside
QUERIES_PER_SOURCE = 50


@dataclass(frozen=True, eq=False)
class Cell:
    """Queries of one split with k given measurements of one draw."""

    split: str
    draw: str
    k: int
    queries: Queries


@dataclass(frozen=True, eq=False)
class SplitQueries:
    """The queries of one split, with the longest context of both draws."""

    split: str
    recent: Queries
    other: Queries
    available: int  # measurements of the split
    wanted: int  # queries

    @classmethod
    def draw(cls, table: Measurements, split: str, count: int, seed: int) -> SplitQueries:
        """At most `count` queries of a part of the table."""
        available = table.rows_of_part(split)
        rows = choose_rows(table.probe, available, count, np.random.default_rng([seed, crc32(split.encode())]))
        recent, other = (earlier_measurements(table, rows, max(COUNTS), draw == "other") for draw in DRAWS)
        return cls(split, Queries(table, rows, recent), Queries(table, rows, other), len(available), count)

    def __len__(self) -> int:
        return len(self.recent)

    def cells(self) -> Iterator[Cell]:
        """Without context, then every draw with every k."""
        yield Cell(self.split, NO_DRAW, 0, self.recent.given(0))
        for draw, k in product(DRAWS, COUNTS[1:]):
            yield Cell(self.split, draw, k, getattr(self, draw).given(k))

    def mixed(self) -> Queries:
        """The queries, by turns with the context of one draw and of the other: to choose settings on."""
        odd = np.arange(len(self)) % 2 == 1
        context = np.where(odd[:, None], self.other.context, self.recent.context)
        return Queries(self.recent.measurements, self.recent.rows, context)

    def describe(self) -> dict[str, Any]:
        """What the report says of the split."""
        given = {draw: (getattr(self, draw).context >= 0).sum(axis=1) for draw in DRAWS}
        return {
            "measurements": self.available,
            "queries": len(self),
            "wanted": self.wanted,
            "sources": len(np.unique(self.recent.probe)),
            "full_context_share": {
                draw: {str(k): round(float((count >= k).mean()), 4) for k in COUNTS[1:]}
                for draw, count in given.items()
            },
        }


def choose_rows(probe: np.ndarray, rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of the `rows`, at most QUERIES_PER_SOURCE a source, dealt to the sources in turn; at random.

    The first n of the rows are what a smaller `count` of n would give.
    """
    shuffled = rng.permutation(rows)
    turn = place_in_group(probe[shuffled])
    dealt = np.argsort(turn, kind="stable")  # of one turn, in shuffled order
    return shuffled[dealt[turn[dealt] < QUERIES_PER_SOURCE][:count]]


def draw_val(table: Measurements, count: int, seed: int) -> Queries:
    """Queries of val to choose settings on, given measurements of train and val alone: test parts lie between them in time,
    and their answers must be no part of what a method is fitted on."""
    known = np.concatenate([table.rows_of_part(part) for part in ("train", "val")])
    return SplitQueries.draw(table.take(np.sort(known)), "val", count, seed).mixed()


def draw_splits(table: Measurements, splits: Sequence[str], count: int, seed: int) -> list[SplitQueries]:
    """The queries of each split; ValueError if there is none at all."""
    drawn = [SplitQueries.draw(table, split, count, seed) for split in splits]
    if not any(len(split) for split in drawn):
        raise ValueError(f"there is not one query in {', '.join(splits)}; prepare more measurements")
    return drawn
