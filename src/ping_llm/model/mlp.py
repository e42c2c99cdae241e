"""A normalised residual stream in, what one layer adds to each token by itself out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ping_llm.config import ModelConfig
from ping_llm.model.fp8 import Linear


class MLP(nn.Module):
    """Two matrices with a squared ReLU or a GELU between them, or SwiGLU (Shazeer, GLU variants improve transformer, 2020):
    three, the product of two goes into the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, width = config.mlp, config.mlp_width
        self.up = Linear(config.n_embd, width)
        self.gate = Linear(config.n_embd, width) if self.kind == "swiglu" else None
        self.down = Linear(width, config.n_embd)

    @torch.no_grad()
    def init_weights(self, bound: float, generator: torch.Generator | None = None) -> None:
        """See `GPT.init_weights`."""
        nn.init.uniform_(self.up.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.down.weight)
        if self.gate is not None:
            nn.init.uniform_(self.gate.weight, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D)."""
        h = self.up(x)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * h)
        if self.kind == "gelu":
            return self.down(F.gelu(h))
        if not torch.is_grad_enabled():
            return self.down(h.relu_().mul_(h))  # in place: new memory costs as much as the arithmetic
        h = F.relu(h)
        return self.down(h * h)  # under autocast `square` would be a power, in fp32
