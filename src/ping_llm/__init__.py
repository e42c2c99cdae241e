"""A foundation model of Internet latency: Atlas dumps in, distributions of RTT out.

from ping_llm import PingModel
PingModel.load("runs/tiny").rtt("192.0.2.1", "198.51.100.7").median
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ping_llm.inference.distribution import RTTDistribution
    from ping_llm.inference.model import PingModel
    from ping_llm.inference.query import Query

logging.getLogger("absl").setLevel(logging.ERROR)  # grain would warn in each process that there is no jax

__all__ = ["PingModel", "Query", "RTTDistribution"]
_MODULES = {"PingModel": "model", "Query": "query", "RTTDistribution": "distribution"}


def __getattr__(name: str) -> Any:  # torch takes a second to import: `--help` does not wait for it
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("ping-llm")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ping_llm.inference.{_MODULES[name]}"), name)
