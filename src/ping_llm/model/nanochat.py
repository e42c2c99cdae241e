"""Weights of a plain model in, the same ones by the names of transformers' architecture `nanochat` out; and the other way.

That architecture is this one without any of its switches but a tied head: squared ReLU, rotary positions before the norms of
queries and keys, norms without weights, one of them right after the embedding, a softcap. It turns heads the other way
round, which the same head with its halves swapped does not notice: so the halves of queries and keys are swapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ping_llm.config import ModelConfig
from ping_llm.model.fields import VOCAB_SIZE

_SHAPES = ("n_layer", "n_embd", "n_head", "n_kv_head", "seq_len", "rope_base", "softcap", "tied_head")
_ONLY_LEARNING = ("dropout", "stochastic_depth")  # change no answer
_OF_SWITCHES = ("prefix_rows", "lookup_length")  # mean nothing while what they are of is off
_BLOCK = {
    "attention.out": "self_attn.o_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_PARTS = ("q_proj", "k_proj", "v_proj")


def is_plain(config: ModelConfig) -> bool:
    """Whether a model of this config answers as `nanochat` does with the same weights."""
    free = {*_SHAPES, *_ONLY_LEARNING, *_OF_SWITCHES}
    plain = ModelConfig()
    return all(
        getattr(config, field.name) == getattr(plain, field.name) for field in fields(config) if field.name not in free
    )


def to_nanochat(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights as GPT names them, by the names of `NanoChatForCausalLM`; without the rows that pad the vocabulary."""
    kv_rows = config.kv_heads * config.head_width
    named = {"model.embed_tokens.weight": weights["embedding.weight"][:VOCAB_SIZE]}
    if not config.tied_head:
        named["lm_head.weight"] = weights["head.weight"][:VOCAB_SIZE]
    for layer in range(config.n_layer):
        own, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        q, k, v = weights[f"{own}.attention.qkv.weight"].split([config.n_embd, kv_rows, kv_rows])
        parts = _swapped(q, config), _swapped(k, config), v
        named |= {f"{theirs}.self_attn.{part}.weight": rows for part, rows in zip(_PARTS, parts, strict=True)}
        named |= {f"{theirs}.{new}.weight": weights[f"{own}.{old}.weight"] for old, new in _BLOCK.items()}
    return {name: weight.contiguous() for name, weight in named.items()}


def from_nanochat(named: Mapping[str, Tensor], config: ModelConfig, rows: int) -> dict[str, Tensor]:
    """The inverse of `to_nanochat`, with a vocabulary of so many `rows`; KeyError if a weight is not there."""
    weights = {"embedding.weight": _padded(named["model.embed_tokens.weight"], rows)}
    if not config.tied_head:
        weights["head.weight"] = _padded(named["lm_head.weight"], rows)
    for layer in range(config.n_layer):
        own, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        q, k, v = (named[f"{theirs}.self_attn.{part}.weight"] for part in _PARTS)
        weights[f"{own}.attention.qkv.weight"] = torch.cat([_swapped(q, config), _swapped(k, config), v])
        weights |= {f"{own}.{old}.weight": named[f"{theirs}.{new}.weight"] for old, new in _BLOCK.items()}
    return weights


def _swapped(rows: Tensor, config: ModelConfig) -> Tensor:
    """Rows of heads one after another, (heads · K, D), each head with its halves swapped."""
    return rows.unflatten(0, (-1, 2, config.head_width // 2)).flip(1).flatten(0, 2)


def _padded(table: Tensor, rows: int) -> Tensor:
    """With rows of zeros up to so many, as a model pads its vocabulary: nothing depends on them."""
    return F.pad(table, (0, 0, 0, rows - len(table)))
