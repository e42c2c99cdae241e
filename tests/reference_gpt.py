"""The transformer as its papers say it, one step after the other and in fp32 or fp64: what model/gpt.py must equal."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ping_llm.model.gpt import GPT, VOCAB_SIZE


def plain_logits(model: GPT, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of whole sequences (B, T): three matrices for queries, keys and values, attention by softmax."""
    config, T = model.config, tokens.shape[1]
    x = normalized(F.embedding(tokens, model.embedding.weight))
    for block in model.blocks:
        heads = [F.linear(normalized(x), matrix) for matrix in block.attention.qkv.weight.chunk(3)]
        q, k, v = (each.unflatten(-1, (config.n_head, -1)).transpose(1, 2) for each in heads)  # (B, H, T, K)
        q, k = (normalized(rotated(each, config.rope_base)) for each in (q, k))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = x + block.attention.out(y.transpose(1, 2).flatten(2))
        x = x + block.mlp.down(F.relu(block.mlp.up(normalized(x))).square())
    logits = model.head(normalized(x))[..., :VOCAB_SIZE]
    return config.softcap * torch.tanh(logits / config.softcap)


def normalized(x: Tensor) -> Tensor:
    """x over the root mean square of its last axis."""
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def rotated(x: Tensor, base: float) -> Tensor:
    """(B, H, T, K): pair i of (x_i, x_{i + K/2}), as a complex number, times exp(j · position · base^(−2i/K))."""
    T, K = x.shape[-2:]
    angles = torch.arange(T)[:, None] * base ** -(torch.arange(0, K, 2) / K)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
