"""What holds of all tables of a config: the bounds of their values."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Annotated

RESUMABLE = {"resumable": True}  # a field that may differ when a run is continued: it does not change what is learned


@dataclass(frozen=True)
class Bounds:
    """The values that a field may have, both ends included."""

    least: float
    most: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.most == math.inf else f"between {self.least:g} and {self.most}"


Count = Annotated[int, Bounds(1)]
Whole = Annotated[int, Bounds(0)]
Amount = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]


class Section:
    """A table of the config; ValueError names the field that is out of its bounds."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            value, place = getattr(self, name), f"{section}.{name}".removeprefix(".")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{place}={value} must be a finite number")
            for bounds in getattr(kind, "__metadata__", ()):
                if isinstance(bounds, Bounds) and not bounds.least <= value <= bounds.most:
                    raise ValueError(f"{place}={value} must be {bounds}")
