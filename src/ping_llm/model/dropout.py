"""Keys of windows in, what is left out of a step that learns out.

Everything here is a function of the key of a window and of a place in the model, so a window loses the same values whatever
the process and the micro-batch that it is dealt to, and a resumed run repeats a step to the bit. No generator is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ping_llm.model.fields import ODD, mix

_DRAW = (1 << 24) - 1  # draws are whole numbers up to here
_ODD_INVERSE = pow(ODD, -1, 1 << 64) - (1 << 64)  # modulo 2^64


def window_keys(seed: int, step: int, windows: int, rank: int, world: int, device: torch.device) -> Tensor:
    """A number for each window that a process has of a step's, every world-th of them: (windows / world,) int64."""
    start = mix(mix(torch.full((), seed, device=device)) + step)
    return mix(start + torch.arange(rank, windows, world, device=device) * ODD)


def keys_beside(keys: Tensor, each: int) -> Tensor:
    """Those of the windows that share their places with the windows of `keys` (B,): (B · each,), place by place."""
    return mix(keys[:, None] + torch.arange(1, each + 1, device=keys.device) * ODD).flatten()


def dropped(x: Tensor, share: float, keys: Tensor, site: int) -> Tensor:
    """x (B, ...) without a share of its values, each at random, the others made larger so that the mean stays.

    `keys` is (B,), one a window; `site` is the place in the model, a number of its own for each use. The draws are those of
    SplitMix64 (Steele, Lea and Flood 2014) from a start that is of the window and the site.
    """
    places = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])
    start = mix(keys + site).view(-1, *(1 for _ in x.shape[1:]))
    # start + places · ODD, the start taken in first: compiled for a GPU, places alone are 32 bits wide, and so are the
    # numbers that they may be multiplied with.
    kept = (mix((start * _ODD_INVERSE + places) * ODD) & _DRAW) >= share * (_DRAW + 1)
    return torch.where(kept, x * (1 / (1 - share)), 0.0).to(x.dtype)
