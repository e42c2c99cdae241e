"""Windows of tokens in, a dictionary of their frequent n-grams out; and for tokens the codewords that end at each of them.

The dictionary is that of LZW (Welch, A technique for high-performance data compression, 1984): every token is a codeword,
and whenever the longest known codeword in a window is followed by a token that no codeword goes on with, the two together
become a new one. So beginnings of codewords are codewords, and an n-gram is found in n steps of a tree. Rows of tables are
dealt to codewords in the order of their last tokens: those that can end at a token lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ping_llm.config import ModelConfig
from ping_llm.model.fields import VOCAB_SIZE

_NO_EDGE = torch.iinfo(torch.int64).max


class Codewords(nn.Module):
    """A dictionary of at most `lookup_rows` codewords of at most `lookup_length` tokens.

    It is no weight, but saved with the weights: whoever has these needs no windows. Its tensors have the same shapes
    whatever it holds; before `fill` it holds the single tokens.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.length, self.rows = config.lookup_length, config.lookup_rows
        edges = self.rows - VOCAB_SIZE
        self.singles: Tensor  # (V,) the rows of single tokens
        self.edges: Tensor  # (rows − V,) ascending: the row of a codeword times V plus the token that it goes on with
        self.longer: Tensor  # (rows − V,) the row of the codeword that this makes
        self.register_buffer("singles", torch.arange(VOCAB_SIZE))
        self.register_buffer("edges", torch.full((edges,), _NO_EDGE))
        self.register_buffer("longer", torch.zeros(edges, dtype=torch.int64))

    @torch.no_grad()
    def fill(self, parents: np.ndarray, tokens: np.ndarray) -> None:
        """Takes up the codewords of `lzw`."""
        row = np.empty(len(tokens), dtype=np.int64)
        row[np.argsort(tokens, kind="stable")] = np.arange(len(tokens))
        edges = row[parents[VOCAB_SIZE:]] * VOCAB_SIZE + tokens[VOCAB_SIZE:]
        order = np.argsort(edges)
        self.singles.copy_(torch.from_numpy(row[:VOCAB_SIZE]))
        self.edges[: len(edges)] = torch.from_numpy(edges[order]).to(self.edges.device)
        self.longer[: len(edges)] = torch.from_numpy(row[VOCAB_SIZE:][order]).to(self.longer.device)

    def forward(self, line: Tensor) -> Tensor:
        """Rows of the codewords of 1 to `length` tokens that end at each token, (B, T, length), −1 where there is none.

        `line` is (B, T) with −1 where no token is: no codeword reaches across. The first row is there always.
        """
        ending = torch.where(line >= 0, self.singles[line.clamp(min=0)], -1)
        rows = [self.singles[line.clamp(min=0)]]
        for _ in range(1, self.length):
            shorter = F.pad(ending[:, :-1], (1, 0), value=-1)  # those that end at the token before
            edge = shorter * VOCAB_SIZE + line
            place = torch.searchsorted(self.edges, edge).clamp(max=len(self.edges) - 1)
            found = (shorter >= 0) & (line >= 0) & (self.edges[place] == edge)
            ending = torch.where(found, self.longer[place], -1)
            rows.append(ending)
        return torch.stack(rows, dim=-1)


def lzw(windows: Iterable[np.ndarray], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `rows` codewords of at most `length` tokens from windows (T,) in their order; negative tokens end a window.

    Of each codeword the number of that without its last token, −1 for single tokens, and the last token, (n,) both.
    """
    parents, tokens = [-1] * VOCAB_SIZE, list(range(VOCAB_SIZE))
    longer: dict[int, int] = {}
    for window in windows:
        word, size = -1, 0
        for token in window.tolist():
            if token < 0:
                break
            edge = word * VOCAB_SIZE + token
            if size == 0 or size == length:
                word, size = token, 1
            elif edge in longer:
                word, size = longer[edge], size + 1
            elif len(tokens) == rows:
                return np.array(parents), np.array(tokens)
            else:
                longer[edge] = len(tokens)
                parents.append(word)
                tokens.append(token)
                word, size = token, 1
    return np.array(parents), np.array(tokens)
