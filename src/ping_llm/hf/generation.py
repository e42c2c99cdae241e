"""Scores of the next token in, the same without those that the grammar does not allow out: for `generate` and pipelines."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from ping_llm.data import tokenization as tk
from ping_llm.data.times import LAST_TIME_S
from ping_llm.inference.grammar import Grammar, follow
from ping_llm.inference.prompt import DST_ROLES, SRC_ROLES

_PADDING = (tk.THROUGHPUT_START, tk.MEASUREMENT_START)  # of the tokenizer; of models whose end is their padding


class GrammarLogitsProcessor(LogitsProcessor):
    """Gives no chance to a token that is not legal after what a row of `generate` holds; see inference/grammar.py.

    A prefix at the end of a prompt is what is known of an address, and a field follows it; with `continue_prefix` its other
    bytes may. With `whole_addresses` all addresses have all their bytes, those of the prompt too. A prompt that breaks the
    grammar is a ValueError. One processor serves one call after another, with beams and any number of sequences.
    """

    def __init__(self, *, whole_addresses: bool = False, continue_prefix: bool = False) -> None:
        self.whole_addresses, self.continue_prefix = whole_addresses, continue_prefix
        self._place: dict[bytes, int] = {}  # of each row of the last call, by its tokens
        self._grammar = Grammar(0)  # after these rows
        self._legal = np.zeros((0, tk.VOCAB_SIZE), dtype=bool)
        self._ended = np.zeros(0, dtype=bool)  # rows that only padding follows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) of the token after each row (B, T), −inf where it is not legal."""
        rows = input_ids.cpu().numpy()
        places = [self._place.get(row[:-1].tobytes()) for row in rows]
        if rows.shape[1] > 1 and None not in places:
            self._advance(np.array(places), rows[:, -1])
        else:
            self._begin(rows)
        self._place = {row.tobytes(): place for place, row in enumerate(rows)}
        illegal = torch.ones_like(scores, dtype=torch.bool)
        illegal[:, : tk.VOCAB_SIZE] = torch.from_numpy(~self._legal).to(scores.device)
        return _without(scores, illegal)

    def _begin(self, rows: np.ndarray) -> None:
        """Reads prompts (B, T)."""
        distinct, place = np.unique(rows, axis=0, return_inverse=True)
        grammars = []
        for row in distinct:
            grammars.append(Grammar(1, whole_addresses=self.whole_addresses, last_time_s=LAST_TIME_S))
            try:
                follow(grammars[-1], _unpadded(row).tolist())
            except ValueError as error:
                raise ValueError(f"the prompt breaks the grammar at {error}") from None
        self._grammar = Grammar.joined(grammars).select(place.reshape(-1))
        self._ended = np.zeros(len(rows), dtype=bool)
        self._legal = self._grammar.legal()
        if not self.continue_prefix:
            of_address = np.isin(self._grammar.role, (*SRC_ROLES, *DST_ROLES))
            self._legal[of_address & self._legal[:, : tk.BYTE_0].any(axis=1), tk.BYTE_0 :] = False

    def _advance(self, places: np.ndarray, tokens: np.ndarray) -> None:
        """Reads a token (B,) after each of the rows at `places` (B,) of the last call."""
        grammar, legal, ended = self._grammar.select(places), self._legal[places], self._ended[places]
        is_legal = legal[np.arange(len(tokens)), tokens]
        begun = (grammar.role == tk.MEASUREMENT_START) & (grammar.bytes_read == 0)
        ended |= begun & ~is_legal & np.isin(tokens, _PADDING)
        if len(broken := np.flatnonzero(~is_legal & ~ended)):
            name = tk.token_name(int(tokens[broken[0]]))
            raise ValueError(f"row {broken[0]} went on with {name}, which the grammar does not allow there")
        # What ended goes on with anything legal: nothing depends on it.
        grammar.advance(np.where(ended, legal.argmax(axis=1), tokens))
        self._grammar, self._ended, self._legal = grammar, ended, grammar.legal()


def _without(scores: torch.FloatTensor, illegal: Tensor) -> torch.FloatTensor:
    return scores.masked_fill(illegal, -torch.inf)  # type: ignore[return-value]


def _unpadded(row: np.ndarray) -> np.ndarray:
    """A prompt (T,) without padding at its left: of MEASUREMENT_STARTs in a row, the last one is its own."""
    real = np.flatnonzero(~np.isin(row, _PADDING))
    first = real[0] if len(real) else len(row)
    starts = np.flatnonzero(row[:first] == tk.MEASUREMENT_START)
    return row[starts[-1] :] if len(starts) else row[first:]
