"""Tokens in, logits of the next token out: a decoder-only transformer with a key-value cache.

Letters of shapes, here and in every module that holds tensors:

    B  windows or prompts in a batch      H  attention heads          V  vocabulary, 267 tokens
    T  tokens given to one forward pass   K  width of a head, D / H   L  blocks
    S  keys attended to: cached + T       D  width of the residual stream
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ping_llm.config import ModelConfig
from ping_llm.model.fields import PLACES, VALUE_FEATURES, FieldEmbedding, FieldFeatures, FieldState, read_fields
from ping_llm.model.fp8 import Linear
from ping_llm.model.legal import ILLEGAL, legal_states, legal_table, place_table

VOCAB_SIZE = 267
VOCAB_MULTIPLE = 64  # rows of embedding and head are padded to it: matrix units run slowly on odd sizes


class KVCache:
    """Keys and values of the tokens that were already read, and which of them are real.

    A forward pass appends its T tokens. `fork` gives a second cache over the same memory (nothing is copied):
    `model(tokens, cache.fork())` leaves `cache` as it was.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # L tensors of (B, H, S, K), rotated to their positions
        self.values: list[Tensor] = []  # L tensors of (B, H, S, K)
        self.valid: Tensor | None = None  # (B, S) bool, False where the token was padding
        self.field: FieldState | None = None  # the field that the last real token of each prompt is in

    @property
    def size(self) -> int:
        """Tokens held for each prompt, padding included."""
        return 0 if self.valid is None else self.valid.shape[1]

    def lengths(self) -> Tensor:
        """Real tokens of each prompt, (B,): the position of the next one."""
        assert self.valid is not None, "an empty cache has no prompts"
        return self.valid.sum(dim=1)

    def fork(self) -> KVCache:
        """A cache of the same tokens; what is appended to it is not seen by this one."""
        return self._map(lambda tensor: tensor)

    def select(self, rows: Tensor) -> KVCache:
        """A cache of the prompts `rows` (n,) int64, in that order; a prompt may appear several times."""
        return self._map(lambda tensor: tensor[rows])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of new tokens, (B, H, T, K), to one layer; returns all of the layer's, (B, H, S, K)."""
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
        mapped.field = None if self.field is None else self.field.map(function)
        return mapped


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)  # rows: all queries, all keys, all values
        self.out = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache | None, mask: Tensor | None) -> Tensor:
        B, T, D = x.shape
        H = self.n_head
        q, k, v = (part.view(B, T, H, D // H) for part in self.qkv(x).chunk(3, dim=-1))  # (B, T, H, K)
        q, k = _rms_norm(_rotate(q, rotation)), _rms_norm(_rotate(k, rotation))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T, K)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, K)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # (B, H, T, K)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if not torch.is_grad_enabled():
            return self.down(h.relu_().mul_(h))  # in place: new memory costs as much as the arithmetic
        h = F.relu(h)
        return self.down(h * h)  # under autocast `square` would be a power, in fp32


class Block(nn.Module):
    """Attention, then the MLP, each on the normalised residual stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache | None, mask: Tensor | None) -> Tensor:
        x = x + self.attention(_rms_norm(x), rotation, cache, mask)
        return x + self.mlp(_rms_norm(x))


class BlockAt(nn.Module):
    """A last block that answers at some places only: keys and values of all tokens, all other work for these alone."""

    def __init__(self, block: Block, places: Tensor) -> None:
        super().__init__()
        self.block, self.places = block, places  # (B, P) of the tokens given

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache | None, mask: Tensor | None) -> Tensor:
        """(B, P, D)."""
        attention, (B, T, D) = self.block.attention, x.shape
        H, P = attention.n_head, self.places.shape[1]
        at = self.places[..., None]  # (B, P, 1)
        chosen = x.gather(1, at.expand(B, P, D))
        weight, normed = attention.qkv.weight, _rms_norm(x)
        k, v = (part.view(B, T, H, D // H) for part in F.linear(normed, weight[D:]).chunk(2, dim=-1))
        q = F.linear(_rms_norm(chosen), weight[:D]).view(B, P, H, D // H)
        of_places = [part.expand(B, T, 1, D // H).gather(1, at[..., None].expand(B, P, 1, D // H)) for part in rotation]
        q, k = _rms_norm(_rotate(q, (of_places[0], of_places[1]))), _rms_norm(_rotate(k, rotation))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if cache is not None:
            k, v = cache.append(attention.layer, k, v)
        if mask is None:
            seen = torch.arange(T, device=x.device) <= at  # (B, P, T)
        else:
            S = mask.shape[-1]
            seen = mask[:, 0].expand(B, T, S).gather(1, at.expand(B, P, S))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])  # (B, H, P, K)
        chosen = chosen + attention.out(y.transpose(1, 2).reshape(B, P, D))
        return chosen + self.block.mlp(_rms_norm(chosen))


def answering_at(model: GPT, places: Tensor) -> GPT:
    """The same model, with the same weights, that gives logits at `places`, (B, P) of the tokens given, only: (B, P, V)."""
    view = copy.copy(model)
    view._modules = dict(model._modules)
    *earlier, last = cast(Iterable[Block], model.blocks)
    view.blocks = nn.ModuleList([*earlier, BlockAt(last, places)])
    return view


class GPT(nn.Module):
    """The model; its weights come from `init_weights`, and nothing else here is random."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        rows = -(-VOCAB_SIZE // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embedding = nn.Embedding(rows, config.n_embd)
        self.fields = FieldEmbedding(config) if config.field_aware else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, rows, bias=False)
        self.rotation: Tensor  # (seq_len, K); no weight, so it is not saved, and it is made even where weights are not
        self.register_buffer(
            "rotation", _rotation(torch.arange(config.seq_len, device="cpu"), config), persistent=False
        )
        self.legal_table: Tensor | None  # what the grammar says is no weight either
        self.place_table: Tensor
        self.register_buffer("legal_table", legal_table(VOCAB_SIZE) if config.grammar else None, persistent=False)
        self.register_buffer("place_table", place_table() if config.grammar else None, persistent=False)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fills every weight, from torch's global generator by default.

        | weight                  | distribution            | why                                                   |
        |-------------------------|-------------------------|-------------------------------------------------------|
        | embedding               | normal, deviation 1     | normalised right after, so only its direction counts  |
        | attention qkv           | uniform, deviation D^−½ | keeps the scale; bounded, so no outliers under bf16   |
        | MLP up                  | uniform, deviation D^−½ | the same                                              |
        | attention out, MLP down | 0                       | a block begins as the identity                        |
        | head                    | normal, deviation 0.001 | as nanochat: loss ≈ ln V, yet gradients flow at once  |
        """
        bound = (3 / self.config.n_embd) ** 0.5  # of a uniform distribution with deviation D^−½
        nn.init.normal_(self.embedding.weight, std=1.0, generator=generator)
        nn.init.normal_(self.head.weight, std=0.001, generator=generator)
        if self.fields is not None:
            self.fields.init_weights(generator)
        for block in cast(Iterable[Block], self.blocks):
            for linear in (block.attention.qkv, block.mlp.up):
                nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            for linear in (block.attention.out, block.mlp.down):
                nn.init.zeros_(linear.weight)

    def learn_in_fp8(self, wanted: bool) -> None:
        """Whether the matrices of the blocks are multiplied in FP8 while they learn; embedding and head never are."""
        for layer in self.blocks.modules():
            if isinstance(layer, Linear):
                layer.fp8 = wanted

    def forward(self, tokens: Tensor, cache: KVCache | None = None, branches: int | None = None) -> Tensor:
        """Logits of the token after each given one, (B, T, V) fp32; see `states`. Of a model that holds to the grammar,
        illegal tokens have none."""
        features = self._read_fields(tokens, cache, branches)
        logits = self.logits(self._states(tokens, features, cache, branches))
        if self.legal_table is None or features is None:
            return logits
        legal = self.legal_table[legal_states(features, self.place_table)].view(logits.shape)
        return torch.where(legal, logits, ILLEGAL)

    def logits(self, states: Tensor) -> Tensor:
        """Logits of the token after each state, (…, D) to (…, V) fp32, of illegal tokens too."""
        logits = self.head(_rms_norm(states))[..., :VOCAB_SIZE].float()
        return self.config.softcap * torch.tanh(logits / self.config.softcap)

    def states(self, tokens: Tensor, cache: KVCache | None = None, branches: int | None = None) -> Tensor:
        """The residual stream after the last block, (B, T, D).

        `tokens` is (B, T) int, −1 = padding, which stands at the right of a prompt and is never seen by a later pass. With
        `cache` the tokens continue the cached ones and are appended to them. With `branches` the T tokens of a prompt are
        that many continuations of T / branches tokens side by side: each sees what is cached and itself, never another;
        the cache that took them can not be continued.
        """
        return self._states(tokens, self._read_fields(tokens, cache, branches), cache, branches)

    def _states(
        self, tokens: Tensor, features: FieldFeatures | None, cache: KVCache | None, branches: int | None
    ) -> Tensor:
        B, T = tokens.shape
        positions, mask = self._places(tokens, cache, branches or 1)
        x = self._embed(_side_by_side(tokens, branches), features).view(B, T, -1)
        last = self.config.seq_len - 1
        # (B or none, T, K)
        angles = self.rotation[:T] if positions is None else self.rotation[positions.clamp(max=last)]
        cos, sin = angles.to(x.dtype)[..., None, :].chunk(2, dim=-1)
        rotation = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # of a head, and of its swapped halves
        for block in self.blocks:
            x = block(x, rotation, cache, mask)
        return x

    def _places(self, tokens: Tensor, cache: KVCache | None, branches: int) -> tuple[Tensor | None, Tensor | None]:
        """Positions of the tokens, (B, T), and what they see, (B or 1, 1, T, S) bool; None: 0 to T − 1, all before."""
        T, cached = tokens.shape[1], 0 if cache is None else cache.size
        positions = None
        if cached or branches > 1:
            positions = torch.arange(T // branches, device=tokens.device).repeat(branches).expand_as(tokens)
            if cache is not None and cached:
                positions = positions + cache.lengths()[:, None]
        if cache is not None:
            cache.valid = tokens >= 0 if cache.valid is None else torch.cat([cache.valid, tokens >= 0], dim=1)
        if positions is None:
            return None, None
        place = torch.arange(T, device=tokens.device)
        branch = place // (T // branches)
        seen = (place <= place[:, None]) & (branch == branch[:, None])  # (T, T)
        mask = torch.cat([seen.new_ones(T, cached), seen], dim=1)[None, None]
        if cache is not None and cache.valid is not None:
            mask = mask & cache.valid[:, None, None, :]
        itself = torch.eye(T, dtype=torch.bool, device=tokens.device)
        # A row that sees nothing would be NaN, and spread.
        return positions, mask | torch.cat([itself.new_zeros(T, cached), itself], dim=1)

    def _read_fields(self, tokens: Tensor, cache: KVCache | None, branches: int | None) -> FieldFeatures | None:
        """What the tokens mean within their fields, each of the continuations as a prompt of its own; None: not wanted."""
        if self.fields is None and self.legal_table is None:
            return None
        state = None if cache is None else cache.field
        if state is not None and branches is not None:
            state = state.map(lambda tensor: tensor.repeat_interleave(branches, dim=0))
        features, after = read_fields(_side_by_side(tokens, branches), state)
        if cache is not None:
            cache.field = after if branches is None else None
        return features

    def _embed(self, tokens: Tensor, features: FieldFeatures | None) -> Tensor:
        """Input of the first block, (B, T, D) in the dtype of the residual stream: that in which linear layers answer."""
        dtype = self.embedding.weight.dtype
        if torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
        if self.fields is None or features is None:
            # The table is normalised rather than each token; its gradients are summed up before they are cast.
            return F.embedding(tokens.clamp(min=0), _rms_norm(self.embedding.weight)).to(dtype)
        return _rms_norm(F.embedding(tokens.clamp(min=0), self.embedding.weight) + self.fields(features)).to(dtype)


def _side_by_side(tokens: Tensor, branches: int | None) -> Tensor:
    """Tokens (B, T), or their continuations as prompts: (B · branches, T / branches)."""
    return tokens if branches is None else tokens.reshape(len(tokens) * branches, -1)


def parameter_count(config: ModelConfig) -> int:
    """Weights of the model without the padded vocabulary rows: 12·D²·L + 2·V·D, and those of the field's embedding."""
    of_fields = 0
    if config.field_aware:
        of_fields = (PLACES + config.prefix_rows + VALUE_FEATURES) * config.n_embd
    return 12 * config.n_embd**2 * config.n_layer + 2 * VOCAB_SIZE * config.n_embd + of_fields


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations to train on one token of a full window: 6·(12·D²·L + V·D) + 12·L·D·T.

    Six for each weight that is multiplied (tables are looked up; the value's matrix is multiplied), and attention by the
    usual convention, which also counts the pairs of tokens that the causal mask hides.
    """
    multiplied = (12 * config.n_embd * config.n_layer + VOCAB_SIZE) * config.n_embd
    if config.field_aware:
        multiplied += VALUE_FEATURES * config.n_embd
    return 6 * multiplied + 12 * config.n_layer * config.n_embd * config.seq_len


def _rms_norm(x: Tensor) -> Tensor:
    """Scales the last axis to a root mean square of 1; no weights. Accumulates in fp32 whatever the dtype of x."""
    return F.rms_norm(x, x.shape[-1:]).to(x.dtype)  # autocast of some devices would answer in fp32


def _rotation(positions: Tensor, config: ModelConfig) -> Tensor:
    """Cosines, then sines of positions (T,): (T, K) fp32, for bf16 cannot count to T."""
    K = config.n_embd // config.n_head
    exponents = torch.arange(0, K, 2, dtype=torch.float32, device=positions.device) / K
    angles = positions[:, None].float() * config.rope_base**-exponents  # (T, K/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + K/2) of each head, (B, T, H, K), by the angle of its position."""
    own, swapped = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * own, torch.cat([second, first], dim=-1), swapped)
