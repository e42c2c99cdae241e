"""Gradients of matrices in, orthogonalised steps out: Muon, for all matrices of a shape at once.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a weight matrix by the nearest
semi-orthogonal matrix, found approximately by five iterations: each applies an odd polynomial a·x + b·x³ + c·x⁵ to the
singular values. Those are nearly all of its cost, so the processes of a run share them; the momenta, which are cheap, are
the same in each.
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

Polynomials = tuple[tuple[float, float, float], ...]  # (a, b, c) of each iteration

NEWTON_SCHULZ: Polynomials = ((3.4445, -4.7750, 2.0315),) * 5
"""Jordan's quintic, five times: singular values that are not tiny end between about 0.7 and 1.2."""
_SAFETY = 1.01  # rounding in bf16 may lift a singular value above the interval of its polynomial, where it would grow
POLAR_EXPRESS: Polynomials = tuple(
    (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)
"""Each the best for the interval that the ones before leave of [0.001, 1], all of which ends between 0.84 and 1.13 (Amsel,
Persson, Musco and Gower, The Polar Express, 2025, arXiv:2505.16932, algorithm 1)."""
POLYNOMIALS = {"newton-schulz": NEWTON_SCHULZ, "polar-express": POLAR_EXPRESS}


def nesterov_step(
    gradients: Tensor,
    momenta: Tensor,
    momentum: Tensor,
    share: slice,
    dtype: torch.dtype,
    polynomials: Polynomials = NEWTON_SCHULZ,
    equal_rows: bool = False,
) -> Tensor:
    """Orthogonalised steps of the matrices `share` of (n, A, B) ones, in `dtype`; the momenta take in all gradients.

    `equal_rows` scales the rows to one length first. A share that reaches beyond the last matrix is filled up with zeros:
    the shares of all processes are equal, for the exchange. `gradients` are overwritten.
    """
    average = momenta.lerp_(gradients, 1 - momentum)
    ahead = gradients.lerp_(average, momentum)  # Nesterov
    mine = ahead[share]
    if equal_rows:
        mine = F.normalize(mine, dim=2)
    return orthogonalize(F.pad(mine, (0, 0, 0, 0, 0, share.stop - share.start - len(mine))), dtype, polynomials)


def scaled_step(orthogonal: Tensor, rate: Tensor) -> Tensor:
    """What is added to the weights: against the gradient, `rate` times √max(1, rows/columns); (n, A, B) fp32."""
    return orthogonal.float() * (-(max(1.0, orthogonal.shape[1] / orthogonal.shape[2]) ** 0.5) * rate)


def orthogonalize(matrices: Tensor, dtype: torch.dtype, polynomials: Polynomials = NEWTON_SCHULZ) -> Tensor:
    """The semi-orthogonal matrices nearest to (n, A, B) ones, roughly, computed in `dtype`; zeros stay zeros."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the Gram matrix is taken on the short side
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for a, b, c in polynomials:
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

    `orthogonalization` names the polynomials. `equal_rows` scales the rows of the momentum to one length before it, so that
    outputs with small gradients move as much as the others (Chang et al., MuonEq, 2026, arXiv:2603.28254, its variant R).
    """

    def __init__(
        self,
        matrices: dict[str, Matrix],
        initial_lr: float,
        ranks: Ranks | None = None,
        compiled: bool = False,
        orthogonalization: str = "newton-schulz",
        equal_rows: bool = False,
    ) -> None:
        self.lr = initial_lr
        self.polynomials, self.equal_rows = POLYNOMIALS[orthogonalization], equal_rows
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
            how = share, self.dtype, self.polynomials, self.equal_rows
            mine = self.nesterov_step(gradients, self.momenta[shape], self.momentum, *how)
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
