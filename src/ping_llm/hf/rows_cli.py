"""The command line of `ping-llm rows` in, a folder of windows out; the signature is what `--help` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional


def rows(
    folder: Annotated[Positional[Path], tyro.conf.arg(name="rows")],
    to_dataset: Path,
    model: str | None = None,
    config: Path | None = None,
    windows: int = 0,
    seed: int = 0,
) -> None:
    """Write probe rows as token windows that the library datasets loads, for training with transformers.

    Args:
        folder: folder of rows, as ping-llm prepare writes it.
        to_dataset: new folder for the windows; datasets.load_dataset reads it.
        model: the model to train: a run, a folder of ping-llm export, or OWNER/NAME; the windows are as it learned others.
        config: TOML file of a run, instead; the windows are those that this run would learn. The defaults if absent.
        windows: windows of train; 0 = as many as the rows fill, at most 16 of each.
        seed: of the windows, instead of that of the config; 0 = that.
    """
    from dataclasses import replace

    from ping_llm.config import Config, load_config
    from ping_llm.hf.datasets import write_dataset
    from ping_llm.inference.sources import load

    if windows < 0:
        raise ValueError(f"--windows {windows} must be a number of windows, or 0 for as many as the rows fill")
    if model and config:
        raise ValueError("--model and --config both say how windows are drawn; leave one")
    chosen = load(model).config if model else load_config(config) if config else Config()
    counts = write_dataset(folder, to_dataset, replace(chosen, seed=seed or chosen.seed), windows)
    print(f"{' and '.join(f'{count:,} windows of {split}' for split, count in counts.items())} in {to_dataset}")
