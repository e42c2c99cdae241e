"""A normalised residual stream in, what one layer adds to each token by itself out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ping_llm.config import ModelConfig
from ping_llm.model.fp8 import Linear


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)

    @torch.no_grad()
    def init_weights(self, bound: float, generator: torch.Generator | None = None) -> None:
        """See `GPT.init_weights`."""
        nn.init.uniform_(self.up.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if not torch.is_grad_enabled():
            return self.down(h.relu_().mul_(h))  # in place: new memory costs as much as the arithmetic
        h = F.relu(h)
        return self.down(h * h)  # under autocast `square` would be a power, in fp32
