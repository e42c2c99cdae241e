"""What a forward pass keeps of its tokens, so that the next one can go on from there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ping_llm.model.fields import FieldState, read_fields


class KVCache:
    """Keys and values of the tokens that were already read, and which of them are real.

    A forward pass appends its T tokens. `fork` gives a second cache over the same memory (nothing is copied):
    `model(tokens, cache.fork())` leaves `cache` as it was.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # L tensors of (B, heads of keys, S, K), rotated to their positions
        self.values: list[Tensor] = []  # L tensors of the same shape
        self.valid: Tensor | None = None  # (B, S) bool, False where the token was padding
        self.tokens: Tensor | None = None  # (B, S) as they were read; of models whose answers need them
        self.field: FieldState | None = None  # the field that the last real token of each prompt is in

    @property
    def size(self) -> int:
        """Tokens held for each prompt, padding included."""
        return 0 if self.valid is None else self.valid.shape[1]

    def lengths(self) -> Tensor:
        """Real tokens of each prompt, (B,): the position of the next one."""
        assert self.valid is not None, "an empty cache has no prompts"
        return self.valid.sum(dim=1)

    def latest(self, count: int) -> Tensor:
        """The last real tokens of each prompt, (B, count), −1 before its first."""
        assert self.valid is not None and self.tokens is not None, "an empty cache has no prompts"
        number = self.valid.long().cumsum(dim=1)  # of each real token, from 1 on
        wanted = number[:, -1:] + torch.arange(1 - count, 1, device=number.device)  # (B, count)
        place = torch.searchsorted(number, wanted.clamp(min=1)).clamp(max=self.size - 1)
        return self.tokens.gather(1, place).masked_fill(wanted < 1, -1)

    def fork(self) -> KVCache:
        """A cache of the same tokens; what is appended to it is not seen by this one."""
        return self._map(lambda tensor: tensor)

    def select(self, rows: Tensor) -> KVCache:
        """A cache of the prompts `rows` (n,) int64, in that order; a prompt may appear several times."""
        return self._map(lambda tensor: tensor[rows])

    def cut(self, lengths: Tensor) -> KVCache:
        """A cache of the first `lengths` (B,) real tokens of each prompt, over the same memory."""
        beginning = self.fork()
        assert self.valid is not None, "an empty cache has no prompts"
        beginning.valid = valid = self.valid & (self.valid.long().cumsum(dim=1) <= lengths[:, None])
        if self.field is not None:
            assert self.tokens is not None
            to_left = torch.argsort(~valid, dim=1, stable=True)
            tokens = self.tokens.masked_fill(~valid, -1).gather(1, to_left)
            beginning.field = read_fields(tokens)[1]
        return beginning

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of new tokens, (B, heads, T, K), to one layer; returns all of the layer's, with S."""
        if layer == len(self.keys):
            self.keys.append(keys.contiguous())  # else all that the layer computed beside them would stay in memory
            self.values.append(values.contiguous())
        else:
            self.keys[layer] = torch.cat([self.keys[layer], keys], dim=2)
            self.values[layer] = torch.cat([self.values[layer], values], dim=2)
        return self.keys[layer], self.values[layer]

    def _map(self, function: Callable[[Tensor], Tensor]) -> KVCache:
        mapped = KVCache()
        mapped.keys, mapped.values = [function(k) for k in self.keys], [function(v) for v in self.values]
        mapped.valid = None if self.valid is None else function(self.valid)
        mapped.tokens = None if self.tokens is None else function(self.tokens)
        mapped.field = None if self.field is None else self.field.map(function)
        return mapped
