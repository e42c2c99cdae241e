"""Tokens in, logits of the next token out: a decoder-only transformer with a key-value cache.

Letters of shapes, here and in every module that holds tensors:

    B  windows or prompts in a batch      H  attention heads          V  vocabulary, 267 tokens
    T  tokens given to one forward pass   K  width of a head, D / H   L  blocks
    S  keys attended to: cached + T       D  width of the residual stream
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ping_llm.config import ModelConfig
from ping_llm.model.attention import Pass, rotation_of, rotation_table
from ping_llm.model.block import Block, BlockAt, Mixing
from ping_llm.model.cache import KVCache
from ping_llm.model.codewords import Codewords
from ping_llm.model.counts import flops_per_token, parameter_count
from ping_llm.model.fields import VOCAB_SIZE, WHOLE, FieldEmbedding, FieldFeatures, coarse, read_fields
from ping_llm.model.fp8 import Linear
from ping_llm.model.legal import ILLEGAL, legal_states, legal_table, place_table
from ping_llm.model.norm import rms_norm

__all__ = ["GPT", "VOCAB_SIZE", "KVCache", "answering_at", "flops_per_token", "parameter_count", "unfilled"]

VOCAB_MULTIPLE = 64  # rows of embedding and head are padded to it: matrix units run slowly on odd sizes
_TABLES = ("positions.weight", "bigrams.weight", "lookup.rows.weight")


_FILLS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)


class _Unfilled(TorchFunctionMode):
    """Within it no random numbers are drawn into weights: on the meta device that would load all of torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def unfilled(config: ModelConfig) -> GPT:
    """A model without weights, all of which are then replaced: it takes no memory and no time."""
    with torch.device("meta"), _Unfilled():
        return GPT(config)


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
        self.src_bytes = (config.src_bits_ipv4 // 8, config.src_bits_ipv6 // 8)  # of sources, that are read
        rows = -(-VOCAB_SIZE // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embedding = nn.Embedding(rows, config.n_embd)
        self.fields = FieldEmbedding(config) if config.field_aware else None
        self.positions = nn.Embedding(config.seq_len, config.n_embd) if config.positions == "learned" else None
        self.bigrams = nn.Embedding(VOCAB_SIZE**2, config.n_embd) if config.bigrams else None
        self.codewords = Codewords(config) if config.lookup_rows else None
        # Tokens before each that its input depends on.
        self.looks_back = config.lookup_length - 1 if config.lookup_rows else int(config.bigrams)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.mixing = Mixing(config)
        self.head = nn.Linear(config.n_embd, rows, bias=False) if not config.tied_head else None
        self.rotation: Tensor | None  # (seq_len, K), of rotary positions
        self.legal_table: Tensor | None  # of models that hold to the grammar, as the next
        self.place_table: Tensor
        with torch.device("cpu"):  # no weights, so they are not saved, and they are made even where weights are not
            rotation = rotation_table(config) if config.positions == "rotary" else None
            self.register_buffer("rotation", rotation, persistent=False)
            self.register_buffer("legal_table", legal_table(VOCAB_SIZE) if config.grammar else None, persistent=False)
            self.register_buffer("place_table", place_table() if config.grammar else None, persistent=False)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fills every weight, from torch's global generator by default.

        | weight                  | distribution            | why                                                   |
        |-------------------------|-------------------------|-------------------------------------------------------|
        | embedding               | normal, deviation 1     | normalised right after, so only its direction counts  |
        | positions, learned      | normal, deviation 1     | as much as the token says                             |
        | rows of lookup tables   | normal, deviation 1     | keys for a normalised stream; values are normalised   |
        | lookup up               | uniform, deviation D^−½ | keeps the scale                                       |
        | attention qkv           | uniform, deviation D^−½ | keeps the scale; bounded, so no outliers under bf16   |
        | MLP up, gate            | uniform, deviation D^−½ | the same                                              |
        | value embeddings        | uniform, deviation D^−½ | as much as the values themselves                      |
        | attention out, MLP down | 0                       | a block begins as the identity                        |
        | lookup mix              | 0                       | the same                                              |
        | biases, bigrams, x0     | 0                       | they begin as if there were none                      |
        | gate of value embedding | 0                       | it begins at 3/2 everywhere                           |
        | other scalars           | 1                       | the stream as it is, and as much of its mirror image  |
        | head, tied or not       | normal, deviation 0.001 | as nanochat: loss ≈ ln V, yet gradients flow at once  |
        """
        bound = (3 / self.config.n_embd) ** 0.5  # of a uniform distribution with deviation D^−½
        nn.init.normal_(self.embedding.weight, std=0.001 if self.head is None else 1.0, generator=generator)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.001, generator=generator)
        if self.fields is not None:
            self.fields.init_weights(generator)
        for block in cast(Iterable[Block], self.blocks):
            block.attention.init_weights(bound, generator)
            block.mlp.init_weights(bound, generator)
            if block.lookup is not None:
                block.lookup.init_weights(bound, generator)
        self.mixing.init_weights()
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=1.0, generator=generator)
        if self.bigrams is not None:
            nn.init.zeros_(self.bigrams.weight)

    def tables(self) -> dict[str, nn.Parameter]:
        """Tables beside those of tokens and fields: of positions, pairs of tokens and codewords."""
        return {name: weight for name, weight in self.named_parameters() if name.endswith(_TABLES)}

    def vectors(self) -> dict[str, nn.Parameter]:
        """The weights that are neither matrices nor tables: biases, and the numbers that states are mixed by."""
        named = self.named_parameters()
        return {name: weight for name, weight in named if name.endswith(".bias") or name.startswith("mixing.")}

    @property
    def reads_fields(self) -> bool:
        """Whether anything depends on what tokens mean within their fields."""
        return self.fields is not None or self.legal_table is not None or self.src_bytes != WHOLE

    @property
    def leaves_out(self) -> bool:
        """Whether values are left out while the model learns: then `forward` wants keys."""
        return self.config.dropout > 0 or self.config.stochastic_depth > 0

    def as_read(self, windows: Tensor) -> Tensor:
        """Windows (B, T) as the model reads them: what it can be expected to foretell. Bytes of sources it does not read
        are 0; negative tokens stay as they are."""
        return coarse(windows, self.src_bytes)

    def learn_in_fp8(self, wanted: bool) -> None:
        """Whether the matrices of the blocks are multiplied in FP8 while they learn; embedding and head never are."""
        for layer in self.blocks.modules():
            if isinstance(layer, Linear):
                layer.fp8 = wanted

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, branches: int | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Logits of the token after each given one, (B, T, V) fp32; see `states`. Of a model that holds to the grammar,
        illegal tokens have none. `keys`, (B,) of the windows, are given by steps that learn: values are left out by them."""
        features = self._read_fields(tokens, cache, branches)
        logits = self.logits(self._states(tokens, features, cache, branches, keys))
        if self.legal_table is None or features is None:
            return logits
        rows = legal_states(features, self.place_table).view(tokens.shape)
        if isinstance(last := self.blocks[-1], BlockAt):
            rows = rows.gather(1, last.places)
        return torch.where(self.legal_table[rows], logits, ILLEGAL)

    def logits(self, states: Tensor) -> Tensor:
        """Logits of the token after each state, (…, D) to (…, V) fp32, of illegal tokens too."""
        states = rms_norm(states)
        logits = F.linear(states, self.embedding.weight) if self.head is None else self.head(states)
        logits = logits[..., :VOCAB_SIZE].float()
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
        self,
        tokens: Tensor,
        features: FieldFeatures | None,
        cache: KVCache | None,
        branches: int | None,
        keys: Tensor | None = None,
    ) -> Tensor:
        T = tokens.shape[1]
        read = _side_by_side(tokens, branches) if features is None else features.tokens
        line = self._line(read, cache, branches)
        positions, mask = self._places(tokens, cache, branches or 1)
        x = self._embed(read, features, positions, line).view(*tokens.shape, -1)
        rotation = None
        if self.rotation is not None:  # (B or none, T, K)
            angles = self.rotation[:T] if positions is None else self.rotation[positions]
            rotation = rotation_of(angles.to(x.dtype))
        codewords = None
        if self.codewords is not None and line is not None:
            codewords = self.codewords(line)[:, self.looks_back :].reshape(*tokens.shape, -1)
        given = Pass(rotation, cache, codewords, x, mask, keys)
        x0 = x
        earlier: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            x = block(self.mixing(layer, x, x0, earlier), given)
            if layer < self.mixing.kept:
                earlier.append(x)
        return x

    def _places(self, tokens: Tensor, cache: KVCache | None, branches: int) -> tuple[Tensor | None, Tensor | None]:
        """Positions of the tokens, (B, T), and what they see, (B or 1, 1, T, S) bool; None: 0 to T − 1, all before."""
        T, cached = tokens.shape[1], 0 if cache is None else cache.size
        positions = None
        if cached or branches > 1:
            positions = torch.arange(T // branches, device=tokens.device).repeat(branches).expand_as(tokens)
            if cache is not None and cached:
                positions = (positions + cache.lengths()[:, None]).clamp(max=self.config.seq_len - 1)
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
        if not self.reads_fields:
            return None
        state = None if cache is None else cache.field
        if state is not None and branches is not None:
            state = state.map(lambda tensor: tensor.repeat_interleave(branches, dim=0))
        features, after = read_fields(_side_by_side(tokens, branches), state, self.src_bytes)
        if cache is not None:
            cache.field = after if branches is None else None
        return features

    def _line(self, tokens: Tensor, cache: KVCache | None, branches: int | None) -> Tensor | None:
        """Tokens as they are read, (B, T), after the `looks_back` before them, −1 where there is none; None: not wanted."""
        held = None if cache is None else cache.tokens
        before = tokens.new_full((len(tokens), self.looks_back), -1)
        if self.looks_back and cache is not None and held is not None:
            before = cache.latest(self.looks_back).repeat_interleave(branches or 1, dim=0)
        if cache is not None and (self.looks_back or self.reads_fields):
            new = tokens.reshape(len(tokens) // (branches or 1), -1)
            cache.tokens = new if held is None else torch.cat([held, new], dim=1)
        return torch.cat([before, tokens], dim=1) if self.looks_back else None

    def _embed(
        self, tokens: Tensor, features: FieldFeatures | None, positions: Tensor | None, line: Tensor | None
    ) -> Tensor:
        """Input of the first block, (…, D) in the dtype of the residual stream: that in which linear layers answer."""
        weight, added = self.embedding.weight, []
        dtype = weight.dtype
        if torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
        if self.fields is not None and features is not None:
            added.append(self.fields(features))
        if self.positions is not None:
            at = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
            added.append(self.positions(at.reshape(-1, tokens.shape[1])))
        if self.bigrams is not None and line is not None:
            first = line[:, -tokens.shape[1] - 1 : -1]  # (B, T), the token before
            pair = self.bigrams(first.clamp(min=0) * VOCAB_SIZE + tokens.clamp(min=0))
            added.append(torch.where((first >= 0)[..., None], pair, 0.0))
        if not added:
            # The table is normalised rather than each token; its gradients are summed up before they are cast.
            return F.embedding(tokens.clamp(min=0), rms_norm(weight)).to(dtype)
        table = weight if self.head is not None else rms_norm(weight)  # that of a tied head grows from near 0
        x = F.embedding(tokens.clamp(min=0), table)
        for part in added:
            x = x + part
        return rms_norm(x).to(dtype)


def _side_by_side(tokens: Tensor, branches: int | None) -> Tensor:
    """Tokens (B, T), or their continuations as prompts: (B · branches, T / branches)."""
    return tokens if branches is None else tokens.reshape(len(tokens) * branches, -1)
