"""Gradients of matrices in, orthogonalised steps out: Muon, for all matrices of a shape at once.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a weight matrix by the nearest
semi-orthogonal matrix, found approximately by five Newton–Schulz iterations. Those are nearly all of its cost, so the
processes of a run share them; the momenta, which are cheap, are the same in each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ping_llm.system.hardware import native_bf16
from ping_llm.training.distributed import Ranks

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values end between about 0.7 and 1.2
NEWTON_SCHULZ_STEPS = 5


def nesterov_step(gradients: Tensor, momenta: Tensor, momentum: Tensor, share: slice, dtype: torch.dtype) -> Tensor:
    """Orthogonalised steps of the matrices `share` of (n, A, B) ones, in `dtype`; the momenta take in all gradients.

    A share that reaches beyond the last matrix is filled up with zeros: the shares of all processes are equal, for the
    exchange. `gradients` are overwritten.
    """
    average = momenta.lerp_(gradients, 1 - momentum)
    ahead = gradients.lerp_(average, momentum)  # Nesterov
    mine = ahead[share]
    return orthogonalize(F.pad(mine, (0, 0, 0, 0, 0, share.stop - share.start - len(mine))), dtype)


def scaled_step(orthogonal: Tensor, rate: Tensor) -> Tensor:
    """What is added to the weights: against the gradient, `rate` times √max(1, rows/columns); (n, A, B) fp32."""
    return orthogonal.float() * (-(max(1.0, orthogonal.shape[1] / orthogonal.shape[2]) ** 0.5) * rate)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The semi-orthogonal matrices nearest to (n, A, B) ones, roughly, computed in `dtype`; zeros stay zeros."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the Gram matrix is taken on the short side
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@dataclass(frozen=True)
class Matrix:
    """Rows of a parameter that are a matrix of their own: queries, keys and values lie in one parameter."""

    parameter: nn.Parameter
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> Tensor:
        """(A, B), a view."""
        return self.parameter.detach()[self.rows]

    @property
    def gradient(self) -> Tensor:
        """(A, B), a view."""
        return cast(Tensor, self.parameter.grad)[self.rows]


class Muon:
    """Muon over named matrices, batched by shape.

    A step is lr · √max(1, rows/columns) times the orthogonalised matrix, torch.optim.Muon's `adjust_lr_fn="original"`:
    then the change in a layer's output depends on neither width, and one rate fits all of them. (`match_rms_adamw`
    would copy AdamW's step size instead, which needs a new rate at each width.)

    Each of `ranks` holds the same gradients; it orthogonalises its share of the matrices of each shape and sends the
    result to the others. Compiled, a step is two graphs for each shape, with the exchange between them; rate, momentum and
    decay are numbers on the device, so a change of them compiles nothing anew.
    """

    def __init__(
        self, matrices: dict[str, Matrix], initial_lr: float, ranks: Ranks | None = None, compiled: bool = False
    ) -> None:
        self.lr = initial_lr
        self.names: dict[torch.Size, list[str]] = defaultdict(list)
        for name, matrix in matrices.items():
            assert matrix.weight.ndim == 2, f"{name} is of shape {tuple(matrix.weight.shape)}"
            self.names[matrix.weight.shape].append(name)
        self.matrices = matrices
        self.momenta = {  # shape → (n, A, B)
            shape: torch.stack([torch.zeros_like(matrices[name].weight) for name in names])
            for shape, names in self.names.items()
        }
        self.ranks = ranks or Ranks(next(iter(matrices.values())).weight.device)
        self.dtype = torch.bfloat16 if native_bf16(self.ranks.device) else torch.float32  # the iteration bears either
        self.rate, self.momentum, self.kept = (torch.zeros((), device=self.ranks.device) for _ in range(3))
        self.nesterov_step: Callable[..., Tensor] = nesterov_step
        self.scaled_step: Callable[..., Tensor] = scaled_step
        if compiled:
            self.nesterov_step = torch.compile(nesterov_step, dynamic=False, fullgraph=True)
            self.scaled_step = torch.compile(scaled_step, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self, momentum: float, weight_decay: float) -> None:
        """Applies the gradients of the matrices; `weight_decay` is decoupled, times the rate."""
        self.rate.fill_(self.lr)
        self.momentum.fill_(momentum)
        self.kept.fill_(1 - self.lr * weight_decay)
        for shape, names in self.names.items():
            weights = [self.matrices[name].weight for name in names]
            gradients = torch.stack([self.matrices[name].gradient for name in names])  # (n, A, B)
            each = -(-len(names) // self.ranks.world)
            share = slice(self.ranks.rank * each, (self.ranks.rank + 1) * each)
            mine = self.nesterov_step(gradients, self.momenta[shape], self.momentum, share, self.dtype)
            update = self.scaled_step(self.ranks.gather(mine)[: len(names)], self.rate)
            torch._foreach_mul_(weights, self.kept)
            torch._foreach_add_(weights, list(update.unbind()))

    def state_dict(self) -> dict[str, Tensor]:
        """The momentum of each matrix under its name; views."""
        return {
            name: momentum
            for shape, names in self.names.items()
            for name, momentum in zip(names, self.momenta[shape].unbind(), strict=True)
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name, momentum in self.state_dict().items():
            momentum.copy_(state[name])
