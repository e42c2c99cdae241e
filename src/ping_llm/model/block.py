"""The residual stream in, the residual stream one layer further out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ping_llm.config import ModelConfig
from ping_llm.model.attention import Attention, Pass
from ping_llm.model.dropout import dropped
from ping_llm.model.lookup import Lookup
from ping_llm.model.mlp import MLP
from ping_llm.model.norm import rms_norm


class Mixing(nn.Module):
    """What goes into each block: the residual stream, and earlier states of it times learned numbers, if switched on.

    The numbers for the embedding begin at 0, the others at 1, as in modded-nanogpt and nanochat.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = L = config.n_layer
        self.residual = nn.Parameter(torch.empty(L)) if config.residual_scalars else None
        self.x0 = nn.Parameter(torch.empty(L)) if config.x0_scalars else None
        self.kept = L // 2 if config.unet_skips else 0
        self.skips = nn.Parameter(torch.empty(self.kept)) if config.unet_skips else None

    @torch.no_grad()
    def init_weights(self) -> None:
        """See `GPT.init_weights`."""
        for numbers, first in ((self.residual, 1.0), (self.x0, 0.0), (self.skips, 1.0)):
            if numbers is not None:
                nn.init.constant_(numbers, first)

    def forward(self, layer: int, x: Tensor, x0: Tensor, earlier: list[Tensor]) -> Tensor:
        """Input of a block, (B, T, D), of what the block before it, the embedding and the first `kept` blocks gave."""
        if self.residual is not None:
            x = self.residual[layer] * x
        if self.x0 is not None:
            x = x + self.x0[layer] * x0
        mirror = self.layers - 1 - layer
        if self.skips is not None and mirror < layer:
            x = x + self.skips[mirror] * earlier[mirror]
        return x


class Block(nn.Module):
    """Attention, then the MLP, each on the normalised residual stream and added to it; in some a look at a table before.

    With stochastic depth (Huang et al., Deep networks with stochastic depth, 2016) windows pass block i of L by, i / L as
    many as pass the last one by, and what it adds to the others is made larger, so that the mean stays.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.passed_by = config.stochastic_depth * (layer + 1) / config.n_layer
        self.lookup = Lookup(config) if layer in config.lookup_layers else None
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """(B, T, D)."""
        x = self.informed(x, given)
        x = x + self._learning(self.attention(rms_norm(x), given), given.keys, 0)
        return x + self._learning(self.mlp(rms_norm(x)), given.keys, 1)

    def informed(self, x: Tensor, given: Pass) -> Tensor:
        """What the block begins with, (B, T, D): with what a large table says, if it has one."""
        if self.lookup is None or given.codewords is None:
            return x
        return x + self._learning(self.lookup(rms_norm(x), given.codewords), given.keys, 3)

    def _learning(self, added: Tensor, keys: Tensor | None, part: int) -> Tensor:
        """What is added while the model learns: all of it where there are no keys."""
        if keys is None:
            return added
        if self.dropout:
            added = dropped(added, self.dropout, keys, 4 * self.layer + part)
        if self.passed_by:
            added = added * dropped(added.new_ones(len(added), 1, 1), self.passed_by, keys, 4 * self.layer + 2)
        return added


class BlockAt(nn.Module):
    """A last block that answers at some places only: keys and values of all tokens, all other work for these alone."""

    def __init__(self, block: Block, places: Tensor) -> None:
        super().__init__()
        self.block, self.places = block, places  # (B, P) of the tokens given

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """(B, P, D)."""
        x = self.block.informed(x, given)
        at = self.places[..., None].expand(*self.places.shape, x.shape[-1])
        chosen = x.gather(1, at) + self.block.attention.at(self.places, rms_norm(x), given)
        return chosen + self.block.mlp(rms_norm(chosen))
