"""Readable measurements in, token ids out, the way transformers does it; and back, without loss. See text.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import AddedToken, PreTrainedTokenizer

from ping_llm.data import tokenization as tk
from ping_llm.hf.text import NAMES, TOKEN_OF, from_text, to_text
from ping_llm.system.files import write_atomically

REMOTE_MODULE = "tokenization_ping_llm"
_START, _PADDING = NAMES[tk.MEASUREMENT_START], NAMES[tk.THROUGHPUT_START]
_REMOTE = '''"""The tokenizer of this model is that of ping-llm: pip install 'ping-llm[hf]'."""

from ping_llm.hf.tokenization import PingTokenizer  # noqa: F401
'''


class PingTokenizer(PreTrainedTokenizer):
    """Of the 267 tokens each is its own entry of the vocabulary, so there is no file of it.

    MEASUREMENT_START begins a measurement and, as the next one, ends it: it is `bos_token` and `eos_token`. No measurement
    holds THROUGHPUT_START, so that is `pad_token`; padding is put at the left, where generation wants it.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  as transformers writes it
    _auto_map: ClassVar[dict[str, list[str | None]]] = {"AutoTokenizer": [f"{REMOTE_MODULE}.PingTokenizer", None]}

    def __init__(self, **kwargs: Any) -> None:
        special = (tk.MEASUREMENT_START, tk.THROUGHPUT_START)
        self._added_tokens_decoder = {
            role: AddedToken(NAMES[role], special=role in special, normalized=False) for role in range(tk.BYTE_0)
        }
        kwargs = {"padding_side": "left", "clean_up_tokenization_spaces": False} | kwargs
        kwargs |= {"bos_token": _START, "eos_token": _START, "pad_token": _PADDING}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """267."""
        return tk.VOCAB_SIZE

    def get_vocab(self) -> dict[str, int]:
        """The id of each name, such as <RTT_START> or <0x1f>."""
        return dict(TOKEN_OF)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The names of the tokens of a text; ValueError says where and why it is none.

        Escapes are part of what is read, so a text is not cut at them, as it is elsewhere.
        """
        return [NAMES[token] for token in from_text(text)]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens by their names."""
        return to_text([self._convert_token_to_id(token) for token in tokens])

    def save_vocabulary(self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None) -> tuple[str]:
        """There is none; what is saved in its place is the file by which AutoTokenizer finds this class."""
        path = Path(save_directory) / f"{REMOTE_MODULE}.py"
        write_atomically(path, _REMOTE)
        return (str(path),)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Nothing: transformers would copy this file beside the weights, where its class would be another."""

    def _encode_plus(self, text: Any, *args: Any, is_split_into_words: bool = False, **kwargs: Any) -> Any:
        if is_split_into_words:
            raise ValueError("a measurement is one text: words by themselves would each begin another")
        return super()._encode_plus(text, *args, **kwargs)

    def _convert_token_to_id(self, token: str) -> int:
        if token not in TOKEN_OF:
            raise ValueError(f"{token!r} is no token; there are {NAMES[0]} … {NAMES[tk.BYTE_0 - 1]}, <0x00> … <0xff>")
        return TOKEN_OF[token]

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < tk.VOCAB_SIZE:
            raise ValueError(tk.token_name(index))
        return NAMES[index]

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, *_: Any, **__: Any) -> str:
        """The text of ids. To skip special tokens is to leave out padding and the MEASUREMENT_STARTs at the end."""
        tokens = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        if skip_special_tokens:
            tokens = [token for token in tokens if token != self.pad_token_id]
            while tokens and tokens[-1] == self.eos_token_id:
                tokens.pop()
        return to_text(tokens)
