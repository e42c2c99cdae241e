"""A vector in, the same direction with a root mean square of 1 out: the only norm of this model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor) -> Tensor:
    """Scales the last axis to a root mean square of 1; no weights. Accumulates in fp32 whatever the dtype of x."""
    return F.rms_norm(x, x.shape[-1:]).to(x.dtype)  # autocast of some devices would answer in fp32
