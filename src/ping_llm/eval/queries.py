"""Measurements in, the queries of PingBench out: what is queried, and which earlier measurements of its source are given.

A query is a measurement of a held-out part that is what the part's name says, by address: s1 holds later pings of pairs of
train; s2 pairs that train does not hold, of two endpoints that it does; s3 sources that it does not hold; s4 destinations;
s5 neither. Given are the latest k measurements of the source address, of the same family, before the query's second: what a
user would have at hand. The `other` draw leaves out those of the query's own destination. Contexts are nested: of one draw,
the smaller is the beginning of the larger. Nothing here looks at an RTT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from zlib import crc32

import numpy as np

from ping_llm.data.measurement import KINDS
from ping_llm.eval.columns import Measurements, Queries, earlier_measurements, pair_keys, place_in_group
from ping_llm.eval.options import COUNTS

FAMILIES = ("ping", "target")
"""Pings, and replies of the targets of traceroutes: two families of queries, which are reported apart."""

CHOICE_CONTEXTS = (0, 5, 30)  # of these, those that settings are chosen on
DRAWS = ("recent", "other")
NO_DRAW = "none"  # the draw of queries without context: it is the same in both
VAL_SPLITS, SPLITS = (tuple(f"{band}-s{number}" for number in range(1, 6)) for band in ("val", "test"))
EXTERNAL = "external"  # the split of all measurements of rows that the model was not trained beside
QUERIES_PER_SOURCE = 50


@dataclass(frozen=True, eq=False)
class Cell:
    """Queries of one family and split with k given measurements of one draw."""

    family: str
    split: str
    draw: str
    k: int
    queries: Queries


class Seen:
    """Which addresses (a,) train holds as source and as destination, and which pairs; hops do not count."""

    def __init__(self, train: Measurements) -> None:
        size = len(train.addresses)
        self.source, self.destination = (np.bincount(ids, minlength=size) > 0 for ids in (train.src_id, train.dst_id))
        self._pairs = np.unique(pair_keys(train.src_id, train.dst_id))
        self.last_s = int(train.time_s.max(initial=np.iinfo(np.int64).min))

    def pair(self, src_id: np.ndarray, dst_id: np.ndarray) -> np.ndarray:
        """(n,) bool."""
        return np.isin(pair_keys(src_id, dst_id), self._pairs)

    def eligible(self, part: Measurements, split: str) -> np.ndarray:
        """(n,) bool: the measurements of a part that are what its name says; ValueError where rows break their rule."""
        source, destination = self.source[part.src_id], self.destination[part.dst_id]
        pair, number, anywhere = self.pair(part.src_id, part.dst_id), number_of(split), self.source | self.destination
        broken = {  # as either endpoint, and in either direction
            "s1": part.time_s <= self.last_s,
            "s2": pair | self.pair(part.dst_id, part.src_id),
            "s3": anywhere[part.src_id],
            "s4": anywhere[part.dst_id],
            "s5": anywhere[part.src_id] | anywhere[part.dst_id],
        }
        if broken.get(number, np.zeros(1)).any():
            raise ValueError(f"train holds endpoints or times of {split}: these rows are damaged; prepare them again")
        wanted = {"s1": pair, "s2": source & destination, "s3": destination, "s4": source}
        return wanted.get(number, np.ones(len(part), dtype=bool))


@dataclass(frozen=True, eq=False)
class SplitQueries:
    """The queries of one family of one split, with the longest context of both draws."""

    family: str
    split: str
    recent: Queries
    other: Queries
    facts: dict[str, Any]  # counts for the report, see `describe`

    @property
    def is_val(self) -> bool:
        """Whether methods may be fitted on, and chosen by, these queries."""
        return self.split in VAL_SPLITS

    @classmethod
    def draw(cls, table: Measurements, seen: Seen, family: str, split: str, count: int, seed: int) -> SplitQueries:
        """At most `count` queries of a part of the table."""
        rows = table.rows_of_part(split)
        rows = rows[table.kind[rows] == KINDS.index(family)]
        part = table.take(rows)
        eligible = rows[seen.eligible(part, split)]
        rng = np.random.default_rng([seed, crc32(f"{family}/{split}".encode())])
        chosen = choose_rows(table.src_id, eligible, count, rng)
        recent, other = (
            Queries(table, chosen, earlier_measurements(table, chosen, max(COUNTS), draw == "other")) for draw in DRAWS
        )
        new = float((~seen.source[part.src_id]).mean()) if len(part) else None
        facts = {"measurements": len(rows), "eligible": len(eligible), "new_source_share": new, "wanted": count}
        return cls(family, split, recent, other, facts)

    def __len__(self) -> int:
        return len(self.recent)

    def cells(self) -> Iterator[Cell]:
        """Without context, then every draw with every k."""
        yield Cell(self.family, self.split, NO_DRAW, 0, self.recent.given(0))
        for draw, k in product(DRAWS, COUNTS[1:]):
            yield Cell(self.family, self.split, draw, k, getattr(self, draw).given(k))

    def mixed(self) -> Queries:
        """The queries, by turns with the context of one draw and of the other: to choose settings on."""
        odd = np.arange(len(self)) % 2 == 1
        context = np.where(odd[:, None], self.other.context, self.recent.context)
        return Queries(self.recent.measurements, self.recent.rows, context)

    def describe(self) -> dict[str, Any]:
        """What the report says of the split: measurements, those eligible, the share whose source address is not in train;
        queries, and their sources, destination prefixes and pairs; and how often there are k measurements to be given."""
        queries, given = self.recent, {draw: (getattr(self, draw).context >= 0).sum(axis=1) for draw in DRAWS}
        return self.facts | {
            "queries": len(self),
            "sources": len(np.unique(queries.src_id)),
            "prefixes": len(np.unique(queries.prefix)),
            "pairs": len(np.unique(pair_keys(queries.src_id, queries.dst_id))),
            "full_context_share": {
                draw: {str(k): round(float((count >= k).mean()), 4) if len(self) else None for k in COUNTS[1:]}
                for draw, count in given.items()
            },
        }


def choose_rows(source: np.ndarray, rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of the `rows`, at most QUERIES_PER_SOURCE a source, dealt to the sources in turn; at random.

    The first n of the rows are what a smaller `count` of n would give.
    """
    shuffled = rng.permutation(rows)
    turn = place_in_group(source[shuffled])
    dealt = np.argsort(turn, kind="stable")  # of one turn, in shuffled order
    return shuffled[dealt[turn[dealt] < QUERIES_PER_SOURCE][:count]]


def draw_splits(table: Measurements, splits: Sequence[str], count: int, seed: int) -> list[SplitQueries]:
    """The queries of each family of each split; ValueError if there is none at all."""
    seen = Seen(learned_from(table))
    drawn = [SplitQueries.draw(table, seen, family, split, count, seed) for family in FAMILIES for split in splits]
    if not any(len(split) for split in drawn):
        raise ValueError(f"there is not one query in {', '.join(splits)}; prepare more measurements")
    return drawn


def number_of(split: str) -> str:
    """s1 … s5, or external."""
    return split.rpartition("-")[2]


def learned_from(table: Measurements) -> Measurements:
    """What baselines learn from: train without the replies of hops, which no query is of."""
    rows = table.rows_of_part("train")
    return table.take(rows[table.kind[rows] != KINDS.index("hop")])


def draw_val(table: Measurements, count: int, seed: int) -> list[SplitQueries]:
    """The queries of val, given measurements of train and val alone: test parts lie between them in time, and their answers
    must be no part of what a method is fitted on."""
    known = np.concatenate([table.rows_of_part(part) for part in ("train", "val")])
    table = table.take(np.sort(known))
    return draw_splits(table, [split for split in VAL_SPLITS if split in table.parts], count, seed)


def mixed_queries(splits: Sequence[SplitQueries]) -> Queries:
    """The queries of all splits, see `SplitQueries.mixed`; of one table."""
    return Queries.concatenate([split.mixed() for split in splits])
