"""Scores of one method in, its line of a report out."""

from __future__ import annotations

from typing import Any

import numpy as np

from ping_llm.eval.metrics import Scores, long_table
from ping_llm.eval.results import aggregate, source_means


def line_of(scores: Scores, source: np.ndarray) -> dict[str, Any]:
    """The aggregates of scores whose queries have these sources (q,)."""
    return aggregate(scores, source, source_means(long_table({"one": scores}, source))["one"])
