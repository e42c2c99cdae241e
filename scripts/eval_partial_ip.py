"""Prints how good a model is given only a prefix of the destination, and how it completes the prefix.

python scripts/eval_partial_ip.py RUN --data ROWS [--part val-s1] [--queries 200] [--top 10] [--json FILE]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import tyro

from ping_llm.cli import exit_code
from ping_llm.eval.columns import Queries
from ping_llm.eval.conditionals import by_prefix_length, completion_hits, print_look
from ping_llm.eval.options import PartOptions
from ping_llm.inference.model import PingModel


@dataclass(frozen=True)
class PrefixOptions(PartOptions):
    """As for the other looks at a part, and for completions."""

    top: int = 10
    """Completions of a prefix that are looked at."""
    completions: int = 30
    """Queries that are completed."""

    def look(self, model: PingModel, queries: Queries) -> list[dict[str, Any]]:
        hits = completion_hits(model, queries.take(slice(0, self.completions)), self.top)
        return [*by_prefix_length(model, queries.given(0)), *hits]


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(PrefixOptions, args=argv, description=__doc__)
    print_look(options, options.look)


if __name__ == "__main__":
    sys.exit(exit_code(main))
