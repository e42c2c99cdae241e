"""The config of a run in, transformers' config of the same model out."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ping_llm.config import ModelConfig, config_from_dict
from ping_llm.data import tokenization as tk
from ping_llm.inference.sources import CONFIG_KEY


class PingGPTConfig(PreTrainedConfig):
    """The shape of a `PingGPTForCausalLM`: all of it follows from the config of the run, which is the entry CONFIG_KEY."""

    model_type = "ping_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  as transformers writes it

    ping_llm: dict[str, Any] | None = None
    vocab_size: int = tk.VOCAB_SIZE
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    max_position_embeddings: int = 0
    use_cache: bool = True
    bos_token_id: int | None = tk.MEASUREMENT_START
    eos_token_id: int | None = tk.MEASUREMENT_START
    pad_token_id: int | None = tk.THROUGHPUT_START  # no measurement holds it
    tie_word_embeddings: bool = False  # a tied head is one matrix in GPT, not two

    def __post_init__(self, **kwargs: Any) -> None:
        shape = self.graph
        self.hidden_size, self.num_hidden_layers = shape.n_embd, shape.n_layer
        self.num_attention_heads, self.num_key_value_heads = shape.n_head, shape.kv_heads
        self.max_position_embeddings = shape.seq_len
        super().__post_init__(**kwargs)

    @property
    def graph(self) -> ModelConfig:
        """The table [model] of the run's config; that of the defaults where none is given."""
        return config_from_dict((self.ping_llm or {}).get("config", {}), f"{CONFIG_KEY} of config.json").model

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Also writes the two files by which the AutoClasses find ours."""
        from ping_llm.hf.remote_code import AUTO_MAP, write_remote_code

        self.auto_map = dict(AUTO_MAP)
        write_remote_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this file beside the weights, where it is a class of its own."""
