"""The transformer as its papers say it, one step after the other and in fp32 or fp64: what model/gpt.py must equal."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ping_llm.config import ModelConfig
from ping_llm.data.tokenization import BYTE_0, DST_IPV4, DST_IPV6, RTT_START, SRC_IPV4, SRC_IPV6
from ping_llm.model.attention import Attention
from ping_llm.model.codewords import Codewords
from ping_llm.model.gpt import GPT, VOCAB_SIZE
from ping_llm.model.lookup import Lookup
from ping_llm.model.mlp import MLP

FACTOR = 0x9E3779B97F4A7C15


def plain_logits(model: GPT, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of whole sequences (B, T): each switch as it is described, attention by softmax."""
    config = model.config
    table = model.embedding.weight
    x = F.embedding(tokens, normalized(table) if config.tied_head else table)
    if model.fields is not None:
        x = x + plain_field_parts(model, tokens)
    if model.positions is not None:
        x = x + model.positions.weight[: tokens.shape[1]]
    if model.bigrams is not None:
        pairs = [[267 * first + second for first, second in pairwise(line)] for line in tokens.tolist()]
        x = x + F.pad(model.bigrams.weight[torch.tensor(pairs)], (0, 0, 1, 0))
    x = x0 = normalized(x)
    given, L = [], config.n_layer
    words = None if model.codewords is None else plain_codewords(model.codewords)
    for layer, block in enumerate(model.blocks):
        if config.residual_scalars:
            x = x * model.mixing.residual[layer]
        if config.x0_scalars:
            x = x + x0 * model.mixing.x0[layer]
        if config.unet_skips and layer >= L - L // 2:
            x = x + given[L - 1 - layer] * model.mixing.skips[L - 1 - layer]
        if block.lookup is not None:
            x = x + plain_lookup(block.lookup, normalized(x), words, tokens)
        x = x + plain_attention(block.attention, normalized(x), x0, config)
        x = x + plain_mlp(block.mlp, normalized(x), config)
        given.append(x)
    logits = (normalized(x) @ (table if config.tied_head else model.head.weight).T)[..., :VOCAB_SIZE]
    return config.softcap * torch.tanh(logits / config.softcap)


def plain_codewords(codewords: Codewords) -> dict[tuple[int, ...], int]:
    """The row of each n-gram."""
    words = {(token,): row for token, row in enumerate(codewords.singles.tolist())}
    edges = [
        (*divmod(edge, 267), row) for edge, row in zip(codewords.edges.tolist(), codewords.longer.tolist(), strict=True)
    ]
    while len(words) < 267 + sum(parent < codewords.rows for parent, _, _ in edges):
        of_row = {row: word for word, row in words.items()}
        words |= {(*of_row[parent], token): row for parent, token, row in edges if parent in of_row}
    return words


def plain_lookup(lookup: Lookup, x: Tensor, words: dict[tuple[int, ...], int], tokens: Tensor) -> Tensor:
    """What a large table adds to a normalised residual stream (B, T, D), token by token."""
    longest, found = max(map(len, words)), []
    for line, stream in zip(tokens.tolist(), x, strict=True):
        for end, own in enumerate(stream, 1):
            ngrams = [tuple(line[begin:end]) for begin in range(max(0, end - longest), end)]
            rows = lookup.rows.weight[[words[ngram] for ngram in ngrams if ngram in words]]
            found.append((rows @ own / own.shape[0] ** 0.5).softmax(-1) @ rows)
    up = lookup.up(torch.stack(found).view(x.shape))
    return lookup.mix(torch.cat([normalized(up), x], dim=-1))


def plain_attention(attention: Attention, x: Tensor, x0: Tensor, config: ModelConfig) -> Tensor:
    """What attention adds to a normalised residual stream (B, T, D), head by head."""
    T, K, queries = x.shape[1], config.n_embd // config.n_head, config.n_embd
    rows = attention.qkv.weight.split(K)  # heads of queries, then of keys, then of values
    of_kv = config.n_kv_head or config.n_head
    heads = [F.linear(x, head) for head in rows]
    if attention.bias is not None:
        heads = [head + bias for head, bias in zip(heads, attention.bias.split(K), strict=True)]
    if attention.value is not None:
        gates = [3 * torch.sigmoid(x[..., :12] @ gate)[..., None] for gate in attention.value.gate.weight]
        projections = [F.linear(x0, head) for head in attention.value.project.weight.split(K)]
    hidden, results = torch.ones(T, T, dtype=torch.bool).triu(1), []
    for number, q in enumerate(heads[: queries // K]):
        shared = number * of_kv // config.n_head
        k, v = heads[config.n_head + shared], heads[config.n_head + of_kv + shared]
        if attention.value is not None:
            v = v + gates[shared] * projections[shared]
        if config.positions == "rotary":
            q, k = rotated(q, config.rope_base), rotated(k, config.rope_base)
        q, k = normalized(q), normalized(k)
        results.append((q @ k.mT / math.sqrt(K)).masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return attention.out(torch.cat(results, dim=-1))


def plain_mlp(mlp: MLP, x: Tensor, config: ModelConfig) -> Tensor:
    """What the MLP adds to a normalised residual stream (B, T, D)."""
    up = x @ mlp.up.weight.T
    if config.mlp == "swiglu":
        gate = x @ mlp.gate.weight.T
        return mlp.down(gate * torch.sigmoid(gate) * up)
    if config.mlp == "gelu":
        return mlp.down(up * (1 + torch.erf(up / 2**0.5)) / 2)
    return mlp.down(up.clamp(min=0) ** 2)


def plain_field_parts(model: GPT, tokens: Tensor) -> Tensor:
    """What place, address prefix and RTT so far add to the embeddings, (B, T, D), token by token."""
    fields, table = model.fields, model.fields.prefixes.num_embeddings
    lines = []
    for line in tokens.tolist():
        role, values, parts = 0, [0], []  # before the first token; the bytes from index 1 on
        for token in line:
            role, values = (token, [0]) if token < BYTE_0 else (role, [*values, token - BYTE_0])
            index = min(len(values) - 1, 17)
            part = fields.places.weight[role * 18 + index]
            if index and role in (SRC_IPV4, SRC_IPV6, DST_IPV4, DST_IPV6):
                total = sum((value + 1) * FACTOR ** min(i, 17) for i, value in enumerate(values) if i)
                part = part + fields.prefixes.weight[max(splitmix(total + role * FACTOR) % 2**63, 1) % table]
            if role == RTT_START and index in (1, 2):
                code = values[1] * 256 + (values[2] if index == 2 else 127.5)
                angles = torch.tensor(
                    [math.pi * code / 65536 * 2.0**octave for octave in range(14)], dtype=torch.double
                )
                part = part + fields.values.weight @ torch.cat([angles.sin(), angles.cos()]).to(part.dtype)
            parts.append(part)
        lines.append(torch.stack(parts))
    return torch.stack(lines)


def splitmix(value: int) -> int:
    """The finaliser of SplitMix64, in whole numbers."""
    value %= 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def normalized(x: Tensor) -> Tensor:
    """x over the root mean square of its last axis."""
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def rotated(x: Tensor, base: float) -> Tensor:
    """(…, T, K): pair i of (x_i, x_{i + K/2}), as a complex number, times exp(j · position · base^(−2i/K))."""
    T, K = x.shape[-2:]
    angles = torch.arange(T)[:, None] * base ** -(torch.arange(0, K, 2) / K)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
