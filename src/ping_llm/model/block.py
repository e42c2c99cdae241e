"""The residual stream in, the residual stream one layer further out."""

from __future__ import annotations

from torch import Tensor, nn

from ping_llm.config import ModelConfig
from ping_llm.model.attention import Attention, Pass
from ping_llm.model.mlp import MLP
from ping_llm.model.norm import rms_norm


class Block(nn.Module):
    """Attention, then the MLP, each on the normalised residual stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """(B, T, D)."""
        x = x + self.attention(rms_norm(x), given)
        return x + self.mlp(rms_norm(x))


class BlockAt(nn.Module):
    """A last block that answers at some places only: keys and values of all tokens, all other work for these alone."""

    def __init__(self, block: Block, places: Tensor) -> None:
        super().__init__()
        self.block, self.places = block, places  # (B, P) of the tokens given

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """(B, P, D)."""
        at = self.places[..., None].expand(*self.places.shape, x.shape[-1])
        chosen = x.gather(1, at) + self.block.attention.at(self.places, rms_norm(x), given)
        return chosen + self.block.mlp(rms_norm(chosen))
