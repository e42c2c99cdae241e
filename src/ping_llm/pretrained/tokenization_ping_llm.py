"""The tokenizer of this model is that of ping-llm: pip install 'ping-llm[hf]'."""

from ping_llm.hf.tokenization import PingTokenizer  # noqa: F401
