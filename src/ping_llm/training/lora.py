"""Gradients of whole matrices in, matrices that differ from given ones by a product of two thin ones out.

LoRA (Hu et al., LoRA: low-rank adaptation of large language models, 2021): W = W₀ + s B A, where A is (rank, inputs) and
begins random, B is (outputs, rank) and begins at 0, and only A and B learn. The model holds W itself: evaluations,
checkpoints and queries know nothing of its parts. By the chain rule A's gradient is s Bᵀ G and B's s G Aᵀ for the gradient G
of W, so no pass through the model changes. In return G takes the memory that it takes where everything learns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SCALE = 2.0  # s: what peft calls alpha / rank


class LowRank:
    """The thin matrices of named ones; `factors` are what an optimiser moves, (rank, inputs) and (outputs, rank) each."""

    def __init__(self, matrices: dict[str, nn.Parameter], rank: int, seed: int = 0) -> None:
        self.matrices = matrices
        self.given = {name: matrix.detach().clone() for name, matrix in matrices.items()}
        self.factors: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, matrix in matrices.items():
            outputs, inputs = matrix.shape
            a = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            self.factors[f"{name}.a"] = nn.Parameter(a.to(matrix.device))
            self.factors[f"{name}.b"] = nn.Parameter(torch.zeros(outputs, rank, device=matrix.device))

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Turns the gradients of the matrices into those of the factors."""
        for name, matrix in self.matrices.items():
            a, b, gradient = self.factors[f"{name}.a"], self.factors[f"{name}.b"], matrix.grad
            if gradient is not None:
                a.grad, b.grad = SCALE * (b.T @ gradient), SCALE * (gradient @ a.T)

    @torch.no_grad()
    def put(self) -> None:
        """Gives the matrices what the factors make of them, in place."""
        for name, matrix in self.matrices.items():
            a, b = self.factors[f"{name}.a"], self.factors[f"{name}.b"]
            torch.addmm(self.given[name], b, a, alpha=SCALE, out=matrix)

    def state_dict(self) -> dict[str, Tensor]:
        """The given matrices and the factors, flat: with them a run goes on without the one that gave the matrices."""
        given = {f"{name}.given": matrix for name, matrix in self.given.items()}
        return given | {name: factor.detach() for name, factor in self.factors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`, from any device."""
        for name, matrix in self.given.items():
            matrix.copy_(state[f"{name}.given"])
        for name, factor in self.factors.items():
            factor.copy_(state[name])
