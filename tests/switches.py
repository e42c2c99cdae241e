"""The switches of the architecture, one or a few fields of [model] each, for several test files."""

from __future__ import annotations

from ping_llm.config import ModelConfig

PLAIN = ModelConfig(n_layer=3, n_embd=48, n_head=4, seq_len=64, prefix_rows=64)
SWITCHES: dict[str, dict] = {
    "n_kv_head": {"n_kv_head": 2},
    "one_kv_head": {"n_kv_head": 1},
    "qkv_bias": {"qkv_bias": True},
    "learned": {"positions": "learned"},
    "no_positions": {"positions": "none"},
    "gelu": {"mlp": "gelu"},
    "swiglu": {"mlp": "swiglu"},
    "value_embeddings": {"value_embeddings": True},
    "residual_scalars": {"residual_scalars": True},
    "x0_scalars": {"x0_scalars": True},
    "unet_skips": {"unet_skips": True},
    "bigrams": {"bigrams": True},
    "lookups": {"lookup_rows": 400, "lookup_length": 4},
    "tied_head": {"tied_head": True},
}
LEFT_OUT = {"dropout": 0.2, "stochastic_depth": 0.3}
ALL = (
    LEFT_OUT
    | {"positions": "learned"}
    | {name: value for switch in SWITCHES.values() for name, value in switch.items() if value != "none"}
)
