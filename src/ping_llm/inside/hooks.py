"""A model and the tokens of a window in; what its blocks hand on and where its heads look out.

Nothing of the model is changed or repeated here: the residual stream is what its blocks take and give, and the weights of
attention are computed from the very queries and keys that it hands to `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ping_llm.inference.engine import Reader


@dataclass(eq=False)
class Inside:
    """What one forward pass over T tokens showed."""

    stream: list[Tensor] = field(default_factory=list)
    """L + 1 tensors (T, D) fp32 on the CPU: what the first block takes, then what each block gives."""
    attention: list[Tensor] = field(default_factory=list)
    """L tensors (H, T, T) fp32, or what `keep` made of them: of each token (the second axis) the shares of those that it
    looks at, whose sum is 1."""


class _AttentionMode(TorchFunctionMode):
    """Hands the weights of each scaled_dot_product_attention within it to `take`, (B, H, T, S)."""

    def __init__(self, take: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention:
            self.take(attention_weights(*args, **kwargs))
        return function(*args, **kwargs)


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights (B, H, T, S) fp32 by which `scaled_dot_product_attention` of the same arguments mixes the values.

    softmax(q·kᵀ / √K + mask) with K the width of a head; dropout is left out.
    """
    query, key = query.float(), key.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        says_what_is_seen = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if says_what_is_seen else scores + attn_mask
    return scores.softmax(-1)


@torch.no_grad()
def look_inside(reader: Reader, tokens: Any, keep: Callable[[Tensor], Tensor] = lambda weights: weights) -> Inside:
    """Reads the tokens (T,) of a window, without padding, in one pass; ValueError if they are more than the model reads.

    `keep` says what is kept of the attention (H, T, T) of each layer: all layers of a long window take much memory.
    """
    window = torch.as_tensor(tokens, device=reader.device)
    if len(window) > reader.seq_len:
        raise ValueError(f"the window has {len(window)} tokens, and the model reads {reader.seq_len}")
    found, blocks = Inside(), list(reader.gpt.blocks)

    def take_stream(stream: Tensor) -> None:
        found.stream.append(stream[0].float().cpu())

    def take_attention(weights: Tensor) -> None:
        found.attention.append(keep(weights[0]).cpu())

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        take_stream(args[0])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        take_stream(output)

    handles = [blocks[0].register_forward_pre_hook(before), *(block.register_forward_hook(after) for block in blocks)]
    try:
        with reader.autocast(), _AttentionMode(take_attention):
            reader.gpt.states(window[None])
    finally:
        for handle in handles:
            handle.remove()
    assert len(found.stream) == len(blocks) + 1, f"{len(found.stream)} states of {len(blocks)} blocks"
    assert len(found.attention) == len(blocks), f"{len(found.attention)} attentions of {len(blocks)}"
    return found
