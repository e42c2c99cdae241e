"""The table [model] of a config: the shape of the transformer, and its switches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ping_llm.config.bounds import Bounds, Count, Section, Whole

LEAST_ROWS = 267  # of a table of n-grams: the tokens


@dataclass(frozen=True)
class ModelConfig(Section):
    n_layer: Count = 4
    """Transformer blocks."""
    n_embd: Count = 160
    """Width of the residual stream."""
    n_head: Count = 5
    """Attention heads; n_embd must be a multiple."""
    n_kv_head: Whole = 0
    """Heads of keys and values, each shared by as many heads of queries; n_head must be a multiple. 0 = n_head."""
    qkv_bias: bool = False
    """Queries, keys and values have biases."""
    mlp: Literal["relu2", "gelu", "swiglu"] = "relu2"
    """Squared ReLU or GELU, four times as wide inside, or SwiGLU, whose third matrix makes it narrower: as many weights."""
    seq_len: Annotated[int, Bounds(64)] = 1024  # one IPv6 measurement takes up to 47 tokens
    """Tokens in a training window, and the longest context of a query."""
    positions: Literal["rotary", "learned", "none"] = "rotary"
    """How tokens know where they stand: queries and keys are turned by it, the embedding has a vector of it, or not at all,
    so that only the causal mask says what came first."""
    rope_base: Annotated[float, Bounds(1)] = 10_000.0
    """Base of the rotary position frequencies."""
    softcap: Annotated[float, Bounds(1)] = 15.0
    """Logits are softcap·tanh(logits / softcap)."""
    value_embeddings: bool = False
    """In every other block, the last among them, the embedding also speaks through the values: a gated projection of it."""
    dropout: Annotated[float, Bounds(0, 0.9)] = 0.0
    """Share of what attention and MLP add to the residual stream that is left out while the model learns."""
    stochastic_depth: Annotated[float, Bounds(0, 0.9)] = 0.0
    """Share of the windows that pass the last block by while the model learns; those before it are passed by more rarely, in
    proportion to their number."""
    residual_scalars: bool = False
    """Before each block the residual stream is multiplied by a learned number."""
    x0_scalars: bool = False
    """Before each block the embedding, times a learned number, is added to the residual stream."""
    unet_skips: bool = False
    """Before each block of the second half what its mirror image of the first half gave is added, times a learned number."""
    bigrams: bool = False
    """A token's embedding also has a row for it and the token before: one for each of the 71,289 pairs."""
    lookup_rows: Whole = 0
    """Rows of each of two large tables, at a third and two thirds of the depth, that tokens look at: one for each of so many
    n-grams, the first that LZW finds in training windows. 0 = no such tables."""
    lookup_length: Annotated[int, Bounds(2, 32)] = 8
    """Tokens of the longest of these n-grams."""
    tied_head: bool = False
    """The output head is the table of token embeddings, which then has the head's beginning and the head's rate."""
    field_aware: bool = False
    """A token's embedding also says its place in its field, the address prefix so far and the RTT so far."""
    prefix_rows: Annotated[int, Bounds(2)] = 1 << 15
    """Rows of the table of address prefixes, a power of two; of field-aware models."""
    grammar: bool = False
    """Tokens that the grammar does not allow next have no probability; else that is learned."""
    src_bits_ipv4: Annotated[int, Bounds(8, 32)] = 32
    """Bits of an IPv4 source that are read and learned, whole bytes; the others count as 0. 24 = hosts of a /24 are one."""
    src_bits_ipv6: Annotated[int, Bounds(8, 128)] = 128
    """The same of an IPv6 source. 48 = hosts of a /48 are one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ValueError(f"model.n_embd={self.n_embd} must be a multiple of model.n_head={self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"model.n_head={self.n_head} must be a multiple of model.n_kv_head={self.n_kv_head}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"model.n_embd / model.n_head = {self.head_width} must be even for rotary positions")
        if self.lookup_rows and self.lookup_rows <= LEAST_ROWS:
            needs = f"model.lookup_rows={self.lookup_rows} must be 0 or above {LEAST_ROWS}"
            raise ValueError(f"{needs}: each token has a row, and n-grams need some, too")
        if self.unet_skips and self.n_layer < 2:
            raise ValueError("model.unet_skips needs a model.n_layer of at least 2: one block has no other half")
        if self.prefix_rows & (self.prefix_rows - 1):
            raise ValueError(f"model.prefix_rows={self.prefix_rows} must be a power of two")
        for name in ("src_bits_ipv4", "src_bits_ipv6"):
            if getattr(self, name) % 8:
                raise ValueError(
                    f"model.{name}={getattr(self, name)} must be a multiple of 8: the model reads whole bytes"
                )

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.n_embd // self.n_head

    @property
    def lookup_layers(self) -> set[int]:
        """The blocks that begin with a look at a large table."""
        return {self.n_layer // 3, 2 * self.n_layer // 3} if self.lookup_rows else set()

    @property
    def mlp_width(self) -> int:
        """Channels inside an MLP: of SwiGLU 8/3 of n_embd, to the nearest multiple of 16."""
        return 4 * self.n_embd if self.mlp != "swiglu" else max(16, round(self.n_embd / 6) * 16)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head
