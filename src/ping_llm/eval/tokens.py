"""A model and windows of tokens in, how well it predicts each kind of token out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ping_llm.config import FIELDS
from ping_llm.data.loader import fixed_windows
from ping_llm.data.tokenization import FIELD_OF_BYTES_AFTER, FIELD_OF_ROLE, ROLE_NAMES
from ping_llm.eval.options import EvalOptions
from ping_llm.inference.model import PingModel
from ping_llm.model.checkpoint import load_model
from ping_llm.model.loss import token_fields

KINDS = tuple(f"{name} byte {byte}" if byte else name for name in ROLE_NAMES for byte in range(17))
"""A role, or which byte after which role."""

_BATCH = 16
_COLORS = ((0.1, 34), (0.7, 106), (2.0, 220), (4.0, 208), (np.inf, 196))  # nats at most: color of a 256-color terminal


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Every target of some windows, padding left out."""

    tokens: np.ndarray  # (n,) int64
    kinds: np.ndarray  # (n,) into KINDS
    nats: np.ndarray  # (n,) −log of the token's probability
    right: np.ndarray  # (n,) bool: it was the likeliest
    windows: np.ndarray  # (n,) which window it is of
    field: np.ndarray  # (n,) into FIELDS

    def table(self) -> list[dict[str, Any]]:
        """For each kind of token: how many, the mean of nats, the share that was the likeliest."""
        columns = {"nats": self.nats, "accuracy": self.right}
        kinds, counts = np.unique(self.kinds, return_counts=True)
        return [
            {"token": KINDS[kind], "count": int(count)}
            | {name: float(column[self.kinds == kind].mean()) for name, column in columns.items()}
            for kind, count in zip(kinds, counts, strict=True)
        ]

    def loss_per_field(self) -> dict[str, float]:
        """Mean nats a token of each field that occurs."""
        return {FIELDS[field]: float(self.nats[self.field == field].mean()) for field in np.unique(self.field)}


def part_windows(options: EvalOptions, part: str, count: int) -> torch.Tensor:
    """Fixed windows of a part, (count, seq_len + 1) int64, padding −1; ValueError if the part is empty."""
    return fixed_windows(load_model(options.trained)[1], options.rows, part, count)


@torch.inference_mode()
def score_tokens(model: PingModel, windows: torch.Tensor) -> TokenScores:
    """How well the model predicts each token of windows (n, T+1) from those before it."""
    windows = model.gpt.as_read(windows)
    field = token_fields(windows, torch.as_tensor(FIELD_OF_ROLE), torch.as_tensor(FIELD_OF_BYTES_AFTER))[:, 1:]
    nats, right = [], []
    for part in windows.split(_BATCH):
        with model.autocast():
            logits = model.gpt(part[:, :-1].clamp(min=0).to(model.device)).float().cpu()  # (b, T, V)
        targets = part[:, 1:]
        nats.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"))
        right.append((logits.argmax(-1) == targets).flatten())
    tokens = windows.numpy()  # (n, T+1)
    places = np.arange(tokens.shape[1])
    last = np.maximum.accumulate(np.where((tokens >= 0) & (tokens < len(ROLE_NAMES)), places, 0), axis=1)
    role = np.take_along_axis(tokens, last, 1).clip(0, len(ROLE_NAMES) - 1)
    kinds = role * 17 + (places - last).clip(0, 16)  # 0 after a role = the role itself
    window = np.broadcast_to(np.arange(len(tokens))[:, None], kinds[:, 1:].shape)
    columns = (tokens[:, 1:], kinds[:, 1:], torch.cat(nats).numpy(), torch.cat(right).numpy(), window, field.numpy())
    kept = tokens[:, 1:].ravel() >= 0
    return TokenScores(*(column.ravel()[kept] for column in columns))


def colored(scores: TokenScores, window: int) -> str:
    """One window for a terminal: each token from green (well predicted) to red; bytes by their value, roles by name."""
    words = []
    for at in np.flatnonzero(scores.windows == window):
        token, nats = int(scores.tokens[at]), scores.nats[at]
        text = f"{token - len(ROLE_NAMES)}" if token >= len(ROLE_NAMES) else f"\n{ROLE_NAMES[token]}"
        color = next(code for most, code in _COLORS if nats <= most)
        words.append(f"\x1b[38;5;{color}m{text}\x1b[0m")
    return " ".join(words).strip()
