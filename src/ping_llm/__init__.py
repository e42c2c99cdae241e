"""A foundation model of Internet latency: Atlas dumps in, distributions of RTT out.

from ping_llm import PingModel
PingModel.load("runs/tiny").rtt("192.0.2.1", "198.51.100.7").median
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ping_llm.inference.distribution import RTTDistribution
    from ping_llm.inference.model import PingModel

logging.getLogger("absl").setLevel(logging.ERROR)  # each process that imports grain would be told that it has no jax

__all__ = ["PingModel", "RTTDistribution"]


def __getattr__(name: str):  # torch takes a second to import: `--help` does not wait for it
    if name == "PingModel":
        from ping_llm.inference.model import PingModel

        return PingModel
    if name == "RTTDistribution":
        from ping_llm.inference.distribution import RTTDistribution

        return RTTDistribution
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
