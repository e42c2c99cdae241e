"""A normalised residual stream and the codewords that end at each token in, what a large table knows of them out.

After Large Lookup Layers (arXiv 2601.21461): a token looks at rows of a table that are chosen by what stands there and not
by what the model makes of it, so a table may be of any size at the same cost. As there, a row is its own key and value, rows
are dealt by LZW, and what was found goes through W_mix[RMSNorm(W_up ·); ·], which begins at 0. Unlike there, a token does
not look at the rows of all codewords that end in it, but of those that do end at its place: with 267 tokens the former say
little of the place, and the latter are few.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ping_llm.config import ModelConfig
from ping_llm.model.fp8 import Linear
from ping_llm.model.norm import rms_norm


class Lookup(nn.Module):
    """A table with a row for each codeword, and the two matrices behind it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rows = nn.Embedding(config.lookup_rows, config.n_embd)
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.mix = Linear(5 * config.n_embd, config.n_embd)

    @torch.no_grad()
    def init_weights(self, bound: float, generator: torch.Generator | None = None) -> None:
        """See `GPT.init_weights`."""
        nn.init.normal_(self.rows.weight, std=1.0, generator=generator)
        nn.init.uniform_(self.up.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.mix.weight)

    def forward(self, x: Tensor, codewords: Tensor) -> Tensor:
        """(B, T, D) of x (B, T, D) and rows (B, T, n), −1 = none but in the first place."""
        found = cast(Tensor, _Look.apply(x, self.rows.weight, codewords))
        return self.mix(torch.cat([rms_norm(self.up(found)), x], dim=-1))


class _Look(torch.autograd.Function):
    """Σ softmax(row · x / √D) row over the rows of each token, length by length.

    Of the rows nothing is kept for the backward pass, which reads them again: kept, they would be n times as large as x.
    Gradients of rows are summed in the order of the rows, so they are the same each time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, codewords: Tensor) -> Tensor:
        scores = _products(x, table, codewords) * x.shape[-1] ** -0.5
        weights = scores.masked_fill(codewords < 0, -torch.inf).softmax(-1)  # (B, T, n)
        ctx.save_for_backward(x, table, codewords, weights)
        return _sum(weights, table, codewords).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, table, codewords, weights = ctx.saved_tensors
        gradient = gradient.to(table.dtype)
        of_weights = _products(gradient, table, codewords)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * x.shape[-1] ** -0.5
        of_x = _sum(of_scores, table, codewords).to(x.dtype)
        of_table = torch.zeros_like(table)
        for n, own in enumerate(codewords.clamp(min=0).unbind(-1)):  # what is at no codeword adds 0
            of_rows = weights[..., n, None] * gradient + of_scores[..., n, None] * x
            of_table += torch.ops.aten.embedding_dense_backward(of_rows, own, len(table), -1, False)
        return of_x, of_table, None


def _products(x: Tensor, table: Tensor, codewords: Tensor) -> Tensor:
    """(B, T, n): the products of x (B, T, D) with the row of the codeword of each length."""
    return torch.stack([(x * table[own]).sum(-1) for own in codewords.clamp(min=0).unbind(-1)], dim=-1)


def _sum(weights: Tensor, table: Tensor, codewords: Tensor) -> Tensor:
    """(B, T, D): the rows times weights (B, T, n)."""
    total = torch.zeros((), dtype=table.dtype, device=table.device)
    for n, own in enumerate(codewords.clamp(min=0).unbind(-1)):
        total = total + weights[..., n, None] * table[own]
    return total
