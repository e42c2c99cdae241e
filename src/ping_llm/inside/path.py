"""A window in; the path of one of its measurements through the layers, in two dimensions, out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ping_llm.config import FIELDS
from ping_llm.inference.engine import Reader
from ping_llm.inside.hooks import look_inside
from ping_llm.inside.layout import Layout
from ping_llm.inside.projection import principal_components, scaled


@dataclass(frozen=True, eq=False)
class TokenPath:
    """The residual stream at the t tokens of a measurement, before the first block and after each, in two components."""

    places: np.ndarray  # (L + 1, t, 2)
    shares: np.ndarray  # (2,) of the variance, over all tokens and layers
    names: list[str]  # (t,)
    fields: list[str]  # (t,) of config.FIELDS
    earlier: int  # measurements before it, that the model has read

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "tokens": self.names,
            "fields": self.fields,
            "earlier_measurements": self.earlier,
            "variance_shares": self.shares,
            "places": self.places,
        }


def measurement_path(reader: Reader, window: np.ndarray, measurement: int) -> TokenPath:
    """Of a measurement of a window (T,), which is read as a whole.

    The stream is scaled to a root mean square of 1, as the blocks and the head read it: else the components would show
    little but that it grows from block to block.
    """
    layout = Layout.of(window)
    (chosen,) = np.nonzero(layout.measurement == measurement)
    if not len(chosen):
        raise ValueError(f"the window holds {layout.measurements} measurements, and none is number {measurement}")
    stream = np.stack(
        [layer.numpy()[chosen] for layer in look_inside(reader, layout.tokens, _nothing).stream]
    )  # (L + 1, t, D)
    found = principal_components(scaled(stream).reshape(-1, stream.shape[-1]))
    names, fields = [layout.name(place) for place in chosen.tolist()], [FIELDS[field] for field in layout.field[chosen]]
    return TokenPath(found.places.reshape(*stream.shape[:2], 2), found.shares, names, fields, measurement)


def _nothing(weights: Tensor) -> Tensor:
    return weights[:0]
