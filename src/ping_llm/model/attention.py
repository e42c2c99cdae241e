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


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives to every block."""

    rotation: tuple[Tensor, Tensor]  # of the heads, and of their swapped halves: (B or none, T, 1, K) each
    cache: KVCache | None
    mask: Tensor | None  # (B or 1, 1, T, S) bool, what each token sees; None: all before it


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)  # rows: all queries, all keys, all values
        self.out = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """(B, T, D) for x (B, T, D)."""
        B, T, D = x.shape
        H = self.n_head
        q, k, v = (part.view(B, T, H, D // H) for part in self.qkv(x).chunk(3, dim=-1))  # (B, T, H, K)
        q, k = rms_norm(rotate(q, given.rotation)), rms_norm(rotate(k, given.rotation))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T, K)
        if given.cache is not None:
            k, v = given.cache.append(self.layer, k, v)  # (B, H, S, K)
        mask = given.mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # (B, H, T, K)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def at(self, places: Tensor, x: Tensor, given: Pass) -> Tensor:
        """(B, P, D) of the tokens at `places`, (B, P) of the T given, only: keys and values are those of all of x."""
        (B, T, D), H, P = x.shape, self.n_head, places.shape[1]
        at = places[..., None]  # (B, P, 1)
        weight, chosen = self.qkv.weight, x.gather(1, at.expand(B, P, D))
        k, v = (part.view(B, T, H, D // H) for part in F.linear(x, weight[D:]).chunk(2, dim=-1))
        q = F.linear(chosen, weight[:D]).view(B, P, H, D // H)
        own, swapped = (part.expand(B, T, 1, D // H) for part in given.rotation)
        of_places = [part.gather(1, at[..., None].expand(B, P, 1, D // H)) for part in (own, swapped)]
        q, k = rms_norm(rotate(q, (of_places[0], of_places[1]))), rms_norm(rotate(k, given.rotation))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if given.cache is not None:
            k, v = given.cache.append(self.layer, k, v)
        if given.mask is None:
            seen = torch.arange(T, device=x.device) <= at  # (B, P, T)
        else:
            S = given.mask.shape[-1]
            seen = given.mask[:, 0].expand(B, T, S).gather(1, at.expand(B, P, S))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])  # (B, H, P, K)
        return self.out(y.transpose(1, 2).reshape(B, P, D))


def rotation_table(config: ModelConfig) -> Tensor:
    """Cosines, then sines of all positions: (seq_len, K) fp32, for bf16 cannot count to T."""
    K = config.n_embd // config.n_head
    positions = torch.arange(config.seq_len, device="cpu", dtype=torch.float32)
    exponents = torch.arange(0, K, 2, dtype=torch.float32, device="cpu") / K
    angles = positions[:, None] * config.rope_base**-exponents  # (T, K/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotation_of(angles: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, of rows of the table (…, T, K): (…, T, 1, K), of a head and of its swapped halves."""
    cos, sin = angles[..., None, :].chunk(2, dim=-1)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + K/2) of each head, (B, T, H, K), by the angle of its position."""
    own, swapped = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * own, torch.cat([second, first], dim=-1), swapped)
