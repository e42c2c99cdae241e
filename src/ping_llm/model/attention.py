"""A normalised residual stream in, what each token learns from those before it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ping_llm.config import ModelConfig
from ping_llm.model.cache import KVCache
from ping_llm.model.fp8 import Linear
from ping_llm.model.norm import rms_norm

Rotation = tuple[Tensor, Tensor]  # what a head is multiplied by, and what its swapped halves are


GATE_CHANNELS = 12  # of the block's input, which say how much a value embedding counts


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives to every block."""

    rotation: Rotation | None  # of rotary positions: (B or none, T, 1, K) each
    cache: KVCache | None
    codewords: Tensor | None  # (B, T, n) rows of the large tables that each token looks at
    x0: Tensor  # (B, T, D), the embedding
    mask: Tensor | None  # (B or 1, 1, T, S) bool, what each token sees; None: all before it
    keys: Tensor | None  # (B,) of the windows, where values are left out; None: nowhere


class ValueEmbedding(nn.Module):
    """What the embedding says of a token to those that look at it, however deep the block: a projection of it, each head
    times 3σ of a product with the first channels of the block's input. As in nanochat, but of the embedding where that has a
    table for each layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.channels = min(GATE_CHANNELS, config.n_embd)
        self.project = Linear(config.n_embd, config.kv_heads * config.head_width)
        self.gate = nn.Linear(self.channels, config.kv_heads, bias=False)  # too small for FP8

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """(B, T, heads of values, K)."""
        gate = 3 * torch.sigmoid(self.gate(x[..., : self.channels]))
        return gate[..., None] * self.project(x0).unflatten(-1, (gate.shape[-1], -1))


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys.

    Where there are fewer heads of keys and values than of queries, neighbouring heads of queries share them: grouped-query
    attention (Ainslie et al. 2023).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.width = layer, config.head_width
        self.grouped = config.kv_heads != config.n_head
        self.rows = config.n_embd, *2 * [config.kv_heads * config.head_width]  # of all queries, all keys, all values
        self.qkv = Linear(config.n_embd, sum(self.rows))
        self.bias = nn.Parameter(torch.empty(sum(self.rows))) if config.qkv_bias else None
        self.out = Linear(config.n_embd, config.n_embd)
        embeds = config.value_embeddings and (config.n_layer - 1 - layer) % 2 == 0
        self.value = ValueEmbedding(config) if embeds else None

    @torch.no_grad()
    def init_weights(self, bound: float, generator: torch.Generator | None = None) -> None:
        """See `GPT.init_weights`."""
        nn.init.uniform_(self.qkv.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.out.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.value is not None:
            nn.init.uniform_(self.value.project.weight, -bound, bound, generator=generator)
            nn.init.zeros_(self.value.gate.weight)

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """(B, T, D) for x (B, T, D)."""
        qkv = self.qkv(x) if self.bias is None else self.qkv(x) + self.bias.to(x.dtype)
        q, k, v = (part.unflatten(-1, (-1, self.width)) for part in qkv.split(self.rows, dim=-1))  # (B, T, H, K)
        if self.value is not None:
            v = v + self.value(x, given.x0)
        return self._attend(rotate(q, given.rotation), rotate(k, given.rotation), v, given, given.mask)

    def at(self, places: Tensor, x: Tensor, given: Pass) -> Tensor:
        """(B, P, D) of the tokens at `places`, (B, P) of the T given, only: keys and values are those of all of x."""
        (B, T, D), P, K = x.shape, places.shape[1], self.width
        at = places[..., None]  # (B, P, 1)
        q, kv = (
            self._product(part, rows)
            for part, rows in ((x.gather(1, at.expand(B, P, D)), slice(D)), (x, slice(D, None)))
        )
        q = q.unflatten(-1, (-1, K))
        k, v = (part.unflatten(-1, (-1, K)) for part in kv.chunk(2, dim=-1))
        if self.value is not None:
            v = v + self.value(x, given.x0)
        rotation = given.rotation
        if rotation is not None:
            own, swapped = (part.expand(B, T, 1, K).gather(1, at[..., None].expand(B, P, 1, K)) for part in rotation)
            rotation = own, swapped
        if given.mask is None:
            seen = torch.arange(T, device=x.device) <= at  # (B, P, T)
        else:
            S = given.mask.shape[-1]
            seen = given.mask[:, 0].expand(B, T, S).gather(1, at.expand(B, P, S))
        return self._attend(rotate(q, rotation), rotate(k, given.rotation), v, given, seen[:, None])

    def _product(self, x: Tensor, rows: slice) -> Tensor:
        """What some rows of the matrix say of x."""
        return F.linear(x, self.qkv.weight[rows], None if self.bias is None else self.bias[rows])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, given: Pass, mask: Tensor | None) -> Tensor:
        """(B, P, D) of queries (B, P, H, K) and keys and values (B, T, H, K); without `mask` each sees all before it."""
        q, k, v = (heads.transpose(1, 2) for heads in (rms_norm(q), rms_norm(k), v))  # (B, H, T, K)
        if given.cache is not None:
            k, v = given.cache.append(self.layer, k, v)  # (B, H, S, K)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(2))


def rotation_table(config: ModelConfig) -> Tensor:
    """Cosines, then sines of all positions: (seq_len, K) fp32, for bf16 cannot count to T."""
    K = config.head_width
    positions = torch.arange(config.seq_len, dtype=torch.float32)
    exponents = torch.arange(0, K, 2, dtype=torch.float32) / K
    angles = positions[:, None] * config.rope_base**-exponents  # (T, K/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotation_of(angles: Tensor) -> Rotation:
    """What `rotate` takes, of rows of the table (…, T, K): (…, T, 1, K) each."""
    cos, sin = angles[..., None, :].chunk(2, dim=-1)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Turns the pairs (i, i + K/2) of each head, (B, T, H, K), by the angle of its position, if positions are rotary."""
    if rotation is None:
        return x
    own, swapped = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * own, torch.cat([second, first], dim=-1), swapped)
