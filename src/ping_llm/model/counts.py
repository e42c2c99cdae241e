"""The shape of a model in, what it weighs and what it takes to train it out; no model is made."""

from __future__ import annotations

from collections import Counter

from ping_llm.config import Config, ModelConfig
from ping_llm.model.attention import GATE_CHANNELS
from ping_llm.model.fields import PLACES, VALUE_FEATURES, VOCAB_SIZE


def matrices(config: ModelConfig) -> Counter[tuple[int, int]]:
    """How many matrices the blocks have of each shape (outputs, inputs); queries, keys and values count as three."""
    D, L = config.n_embd, config.n_layer
    inner = config.mlp_width
    shapes = Counter({(D, D): 2 * L})  # of queries and out
    shapes[inner, D] += 2 * L if config.mlp == "swiglu" else L
    shapes[D, inner] += L
    embeds = (L + 1) // 2 if config.value_embeddings else 0
    shapes[config.kv_heads * config.head_width, D] += 2 * L + embeds
    if embeds:
        shapes[config.kv_heads, min(GATE_CHANNELS, D)] += embeds
    if lookups := len(config.lookup_layers):
        shapes[4 * D, D] += lookups
        shapes[D, 5 * D] += lookups
    return shapes


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of all matrices of the blocks: 12·D²·L of the plain model."""
    return sum(rows * columns * count for (rows, columns), count in matrices(config).items())


def parameter_count(config: ModelConfig) -> int:
    """Weights of the model without the padded vocabulary rows: 12·D²·L + 2·V·D of the plain model."""
    rows = (1 if config.tied_head else 2) * VOCAB_SIZE  # of embedding and head
    if config.field_aware:
        rows += PLACES + config.prefix_rows + VALUE_FEATURES
    rows += VOCAB_SIZE**2 * config.bigrams + config.lookup_rows * len(config.lookup_layers)
    rows += config.seq_len * (config.positions == "learned")
    vectors = (config.n_embd + 2 * config.kv_heads * config.head_width) * config.qkv_bias  # of a layer
    vectors += config.residual_scalars + config.x0_scalars
    skips = config.n_layer // 2 * config.unet_skips
    return matrix_parameters(config) + rows * config.n_embd + vectors * config.n_layer + skips


def flops_per_token(config: ModelConfig, length: int | None = None) -> int:
    """Floating-point operations to train on one token of a window of T tokens, by default a full one: 6·(12·D²·L + V·D)
    + 12·L·D·T.

    Six for each weight that is multiplied (tables are looked up; the value's matrix is multiplied), and attention by the
    usual convention, which also counts the pairs of tokens that the causal mask hides.
    """
    multiplied = matrix_parameters(config) + VOCAB_SIZE * config.n_embd
    if config.field_aware:
        multiplied += VALUE_FEATURES * config.n_embd
    return 6 * multiplied + 12 * config.n_layer * config.n_embd * (length or config.seq_len)


def mean_flops_per_token(config: Config) -> float:
    """`flops_per_token` of the tokens of a run's batches on average: those of short windows attend to short ones."""
    model, data = config.model, config.data
    of_long = model.seq_len * flops_per_token(model)
    of_short = data.short_windows * data.short_len * flops_per_token(model, data.short_len)
    return (of_long + of_short) / config.place_tokens
