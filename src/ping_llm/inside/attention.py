"""Windows in; how much the RTT of a measurement looks at each field of itself and of those before it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ping_llm.config import FIELDS
from ping_llm.inference.engine import Reader
from ping_llm.inside.hooks import look_inside
from ping_llm.inside.layout import Layout

AGES = ("own", "1", "2", "3", "4–6", "7–10", "11 +")
"""How many measurements before that of the RTT."""
_FIRST_OF_AGE = np.array([0, 1, 2, 3, 4, 7, 11])
DESTINATIONS = ("other destination", "same destination")
BYTES = ("byte 1", "byte 2")
ENOUGH_EARLIER = 10
"""Measurements that stand before one whose RTT counts, where the windows hold so many."""


@dataclass(frozen=True, eq=False)
class AttentionByField:
    """Means over `results` RTTs and over the heads of a layer; the last three axes are AGES, DESTINATIONS, FIELDS.

    The shares of a layer and a byte sum to 1. A measurement itself counts as one to the same destination.
    """

    shares: (
        np.ndarray
    )  # (L, 2 bytes, A, 2, F) of the attention of the token that is read before byte 1, and before byte 2
    tokens: np.ndarray  # (2, A, 2, F) the same shares of a head that looks at all tokens alike
    results: int
    met_before: int  # of the results: those with an earlier measurement to the same destination
    least_earlier: int  # measurements before each

    def to_json(self) -> dict[str, Any]:
        """The names of the axes, and all shares."""
        axes = ["layer", "byte", "age", "destination", "field"]
        names = {"byte": BYTES, "age": AGES, "destination": DESTINATIONS, "field": FIELDS}
        counts = {"results": self.results, "met_before": self.met_before, "least_earlier": self.least_earlier}
        return {"axes": axes, "names": names, **counts, "shares": self.shares, "if_all_alike": self.tokens}


def answered(layouts: Sequence[Layout]) -> tuple[list[list[int]], int]:
    """The measurements of each window whose RTT counts, and how many stand before each at least.

    At least ENOUGH_EARLIER, or else as many as before the latest one of all windows. ValueError if no window holds an RTT.
    """
    replied = [[m for m in range(one.measurements) if one.place_of_rtt(m) is not None] for one in layouts]
    if not any(replied):
        raise ValueError("no ping of these windows has an RTT, so there is nothing to look from")
    least = min(ENOUGH_EARLIER, max(m for one in replied for m in one))
    return [[m for m in one if m >= least] for one in replied], least


def attention_by_field(
    reader: Reader, windows: Sequence[np.ndarray], measurements: Sequence[Sequence[int]] | None = None
) -> AttentionByField:
    """Of windows (T,) of tokens, each read in one pass.

    `measurements` are those of each window whose RTT counts; by default those of `answered`.
    """
    layouts = [Layout.of(window) for window in windows]
    if measurements is None:
        measurements, least = answered(layouts)
    else:
        least = min(m for one in measurements for m in one)
    sums: np.ndarray | float = 0.0
    alike, results, met = np.zeros((2, len(AGES), 2, len(FIELDS))), 0, 0
    for layout, chosen in zip(layouts, measurements, strict=True):
        if not chosen:
            continue
        starts = [_start(layout, measurement) for measurement in chosen]
        places = torch.tensor([[start, start + 1] for start in starts])  # (n, 2)
        seen = look_inside(reader, layout.tokens, partial(_of_places, places=places)).attention
        weights = torch.stack(seen).numpy()  # (L, n, 2, T)
        for number, (measurement, start) in enumerate(zip(chosen, starts, strict=True)):
            cells = _cells(layout, measurement)
            sums = sums + np.array([[_sums(one, cells) for one in layer[number]] for layer in weights])
            alike += [_sums(_alike(len(layout), place), cells) for place in (start, start + 1)]
            same = [layout.destination(m) == layout.destination(measurement) for m in range(measurement)]
            results, met = results + 1, met + any(same)
    return AttentionByField(np.asarray(sums) / results, alike / results, results, met, least)


def _start(layout: Layout, measurement: int) -> int:
    place = layout.place_of_rtt(measurement)
    assert place is not None, f"measurement {measurement} has no RTT"
    return place


def _of_places(weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of (H, T, T) the rows at places (n, 2), as means over the heads: (n, 2, T)."""
    return weights.mean(dim=0)[places.to(weights.device)]


def _cells(layout: Layout, measurement: int) -> np.ndarray:
    """Of each token (T,) its cell of (AGES, DESTINATIONS, FIELDS), flat; of later measurements, which none sees, any."""
    back = np.maximum(measurement - layout.measurement, 0)
    age = np.searchsorted(_FIRST_OF_AGE, back, "right") - 1
    own = layout.destination(measurement)
    same = np.array([layout.destination(m) == own for m in range(layout.measurements)])[layout.measurement]
    return np.ravel_multi_index((age, same.astype(int), layout.field), (len(AGES), 2, len(FIELDS)))


def _sums(weights: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The weights (T,) of the tokens in each cell, (A, 2, F)."""
    return np.bincount(cells, weights, minlength=len(AGES) * 2 * len(FIELDS)).reshape(len(AGES), 2, len(FIELDS))


def _alike(tokens: int, place: int) -> np.ndarray:
    """The weights (T,) of a token that looks at itself and all before it alike."""
    return (np.arange(tokens) <= place) / (place + 1)
