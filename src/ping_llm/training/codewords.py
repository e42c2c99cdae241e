"""Training windows in, the dictionary of a new model's lookup tables out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ping_llm.config import DataConfig
from ping_llm.data.loader import windows_of
from ping_llm.data.tokenization import MUTED
from ping_llm.model.codewords import lzw
from ping_llm.model.gpt import GPT
from ping_llm.training.distributed import Ranks

MOST_TOKENS = 64  # read for each row: real windows fill a dictionary with a tenth of that, and some never do


def learn_codewords(model: GPT, data: DataConfig, batches: Callable[[], Iterator[Tensor]], ranks: Ranks) -> None:
    """Fills the dictionary, if the model has one, from the first windows of the run, which `batches` yields whole.

    The main process reads them, and all take up what it found.
    """
    if (codewords := model.codewords) is None:
        return
    config = model.config

    def found() -> tuple[np.ndarray, np.ndarray]:
        with closing(cast(Generator[Tensor, None, None], batches())) as read:
            return lzw(_windows(model, data, read), config.lookup_rows, config.lookup_length)

    codewords.fill(*ranks.share(ranks.on_main(found)))


def _windows(model: GPT, data: DataConfig, batches: Iterator[Tensor]) -> Iterator[np.ndarray]:
    """Windows (T,) as the model reads them, −1 = padding, as many as are worth reading."""
    left = MOST_TOKENS * model.config.lookup_rows
    while left > 0:
        for tokens in windows_of(next(batches).cpu(), data):
            read = model.as_read(torch.where(tokens <= MUTED, MUTED - tokens, tokens))
            left -= read.numel()
            yield from read.numpy()
