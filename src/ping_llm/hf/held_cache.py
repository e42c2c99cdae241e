"""A cache of transformers in, the one that GPT writes to out: both are the same memory."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ping_llm.model.cache import KVCache
from ping_llm.model.fields import read_fields


class HeldCache(KVCache):
    """Keys and values lie in a `DynamicCache`, and so do the tokens, as its last layer: whatever reorders, repeats or cuts
    the cache does it to them, too. Which are real, and the field that each prompt is in, follows from them."""

    def __init__(self, past: Cache, layers: int, reads_fields: bool) -> None:
        super().__init__()
        if not isinstance(past, DynamicCache):
            raise ValueError(f"past_key_values is a {type(past).__name__}; this model takes a DynamicCache")
        self.past, self.layers = past, layers
        while len(past.layers) <= layers:
            past.layers.append(DynamicLayer())
        held = cast(DynamicLayer, past.layers[layers])
        if held.get_seq_length() != past.get_seq_length():
            raise ValueError("past_key_values holds keys of another model; give a new DynamicCache")
        if not held.get_seq_length():
            return
        self.tokens = cast(Tensor, held.keys)[:, 0, :, 0]  # (B, S)
        self.valid = self.tokens >= 0
        if reads_fields:
            to_left = torch.argsort(~self.valid, dim=1, stable=True)
            self.field = read_fields(self.tokens.gather(1, to_left))[1]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See KVCache."""
        return self.past.update(keys, values, layer)

    def keep(self, tokens: Tensor) -> None:
        """Adds the tokens (B, T) of the pass that was made, as GPT has read them."""
        if self.tokens is not None and self.tokens.shape[1] == self.size:
            tokens = self.tokens[:, -tokens.shape[1] :]
        column = tokens[:, None, :, None]
        self.past.update(column, column, self.layers)
