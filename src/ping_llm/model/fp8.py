"""A linear layer whose products can be taken in FP8 while it learns; everywhere else it is an ordinary one.

Each factor of a product is multiplied by one number for all of it, so that its largest value becomes the largest of an 8-bit
format, and rounded. Activations and weights are rounded to e4m3, which has 3 bits of mantissa, gradients to e5m2, which
has 2 and reaches further (Micikevicius et al., FP8 Formats for Deep Learning, 2022). The scales follow from the values at
hand, so nothing of them is kept from step to step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_LEAST = 1e-12  # that a largest value counts as: a factor of zeros has none, and division by it must stay finite


class Linear(nn.Linear):
    """A linear layer without bias. With `fp8`, its products are taken in FP8 wherever gradients are kept.

    The weight is fp32 and is rounded anew in each pass. Evaluations and queries keep no gradients: there the same weight is
    multiplied in the precision of autocast.
    """

    fp8 = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) to (…, outputs) of the same dtype; in FP8 the other axes hold a multiple of 16 vectors."""
        if not (self.fp8 and torch.is_grad_enabled()):
            return super().forward(x)
        y = cast(Tensor, _Product.apply(x.reshape(-1, self.in_features), self.weight))
        return y.view(*x.shape[:-1], self.out_features)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in an 8-bit format, contiguous, and what its values are multiplied by to get x back, () fp32.

    Where anything in x is not finite, nothing in a product with it is, so that it shows.
    """
    most = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=_LEAST) / most
    return (x.float() / scale).clamp(-most, most).to(dtype).contiguous(), scale


class _Product(torch.autograd.Function):
    """x (N, A) times the transpose of a weight (B, A)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = quantize(x, FORWARD)
        weight8, weight_scale = quantize(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        return _product(x8, weight8, x_scale, weight_scale, x.dtype, fast=True)  # (N, B)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        gradient8, scale = quantize(gradient, BACKWARD)  # (N, B)
        of_x = _product(gradient8, weight8.t().contiguous(), scale, weight_scale, gradient.dtype)  # (N, A)
        turned = gradient8.t().contiguous(), x8.t().contiguous()
        return of_x, _product(*turned, scale, x_scale, torch.float32)  # (B, A)


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a (N, K) times the transpose of b (M, K), both contiguous: the only layout that a Hopper multiplies in FP8.

    `fast` lets it sum with fewer bits than those of fp32; gradients do without.
    """
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)
