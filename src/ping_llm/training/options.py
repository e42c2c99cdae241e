"""The options of fine-tuning, which the command line parses before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

AUTO, NONE, SAMPLES = "auto", "none", "samples"  # values of --replay that are no folder


@dataclass(frozen=True)
class FinetuneOptions:
    """Train a run on with new rows, such as those of your own network, without it forgetting the old ones.

    Options of ping-llm train may follow, such as --train.total-steps 500. Prints losses of val before and after. Run it
    again to go on where it stopped.
    """

    # run folder, one of its checkpoints, a folder of ping-llm export, or OWNER/NAME of the Hugging Face hub.
    base: Annotated[Positional[str], tyro.conf.arg(name="run", metavar="RUN")]
    rows: Annotated[Positional[Path], tyro.conf.arg(metavar="ROWS")]  # folder of the new rows, with a part val.
    out: Path  # folder of the new run.
    # instead of all weights, learn changes of this rank to the matrices, and the table of prefixes; 0 = all weights.
    lora: int = 0
    # what is mixed in so that the base is not forgotten: a folder of the rows that it learned from, samples that it makes
    # up, none, or auto: its rows where they still are, else samples.
    replay: str = AUTO

    @classmethod
    def parse(cls, argv: Sequence[str], prog: str) -> tuple[FinetuneOptions, list[str]]:
        """The options, and those of training that follow; ValueError for a rank that is none."""
        options, overrides = tyro.cli(cls, args=list(argv), prog=prog, return_unknown_args=True)
        if options.lora < 0:
            raise ValueError(f"--lora {options.lora} must be a rank of at least 1, or 0 to learn all weights")
        return options, overrides
