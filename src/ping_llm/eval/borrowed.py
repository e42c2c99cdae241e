"""The folder of an earlier evaluation and a cell in, the scores that its methods had there out.

So baselines are fitted once for many models, and a model can answer on a machine of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ping_llm.eval.metrics import QUANTILE_LEVELS, Scores
from ping_llm.eval.queries import VAL_SPLITS, Cell

RESULTS_NAME, TABLE_NAME = "results.json", "queries.parquet"
_SCORES = ("p_fail", "nll_nats", "crps_log", "pit")
_QUANTILES = [f"q{level:g}" for level in QUANTILE_LEVELS]
_EXTRAS = ("loss_per_field", "order_consistency", "destinations", "examples")  # that results of a model hold


@dataclass(frozen=True)
class BorrowedScores:
    """What an evaluation found."""

    folder: Path
    results: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> BorrowedScores:
        """ValueError if the folder holds no whole evaluation."""
        try:
            results = json.loads((folder / RESULTS_NAME).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder} holds no evaluation ({error}); name a folder that ping-llm eval wrote"
            ) from None
        if not (folder / TABLE_NAME).is_file() or "methods" not in results:
            raise ValueError(f"{folder} holds no whole evaluation; name a folder that ping-llm eval wrote")
        return cls(folder, results)

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Kind and choices of each method."""
        return self.results["methods"]

    def extras(self, val_only: bool) -> dict[str, Any]:
        """What it says of a model besides its scores, maybe of val alone."""
        kept: dict[str, Any] = {}
        for name in _EXTRAS:
            if isinstance(held := self.results.get(name), list):
                kept[name] = [one for one in held if not val_only or one["split"] in VAL_SPLITS]
            elif held:
                kept[name] = {part: one for part, one in held.items() if not val_only or part in VAL_SPLITS}
        return {name: held for name, held in kept.items() if held}

    def check(self, cell: Cell) -> None:
        """ValueError unless the same contexts were given there; before anything is answered."""
        wanted = _place(cell)
        here = next((one for one in self.results["cells"] if all(one[name] == wanted[name] for name in wanted)), None)
        given = (cell.queries.context >= 0).sum(axis=1).mean()
        if here is None:
            raise ValueError(
                f"{self.folder} holds no {cell.split} {cell.draw} {cell.k}; name parts and --counts that it holds"
            )
        if abs(here["context_fitted"] - given) > 1e-9:
            raise ValueError(
                f"{self.folder} gave other contexts ({here['context_fitted']:.2f} measurements on average in {cell.split} "
                f"{cell.draw} {cell.k}, here {given:.2f}); evaluate both with the same --seq-len"
            )

    def scores(self, cell: Cell) -> dict[str, Scores]:
        """Of each method, over the first queries of the cell; ValueError unless the queries are the same."""
        filters = [(name, "=", value) for name, value in _place(cell).items()]
        table = pq.read_table(self.folder / TABLE_NAME, filters=filters)
        queries, of_method = cell.queries, {}
        for method in self.methods:
            lines = table.filter(pc.field("method") == method).sort_by("query")
            count = lines.num_rows
            time_s = lines.column("event_time").cast(pa.timestamp("s", "UTC")).cast("int64").to_numpy()
            rows = queries.rows[:count]
            same = len(rows) == count > 0 and (time_s == queries.measurements.time_s[rows]).all()
            columns = {
                name: lines.column(name).to_numpy().astype(np.float64) for name in ("rtt", *_SCORES, *_QUANTILES)
            }
            if not same or (columns["rtt"] != queries.rtt_ms[:count]).any():
                raise ValueError(
                    f"{self.folder} answered other queries than these; name rows, --queries and --seed of it"
                )
            p_fail, nll_nats, crps_log, pit = (columns[name] for name in _SCORES)
            quantiles = np.stack([columns[name] for name in _QUANTILES], axis=1)
            of_method[method] = Scores(queries.rtt_ms[:count], p_fail, nll_nats, crps_log, pit, quantiles)
        return of_method


def all_methods(folders: Sequence[BorrowedScores]) -> dict[str, dict[str, Any]]:
    """Kind and choices of the methods of all folders; ValueError if two hold the same one."""
    methods: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if twice := methods.keys() & folder.methods.keys():
            raise ValueError(f"{sorted(twice)[0]} stands in several folders of --scores; name each method once")
        methods |= folder.methods
    return methods


def _place(cell: Cell) -> dict[str, Any]:
    return {"family": cell.family, "split": cell.split, "draw": cell.draw, "k": cell.k}
