"""A full disk in, one clear line out."""

from __future__ import annotations

import errno
import functools
import inspect
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the user's share of it, or the size that a file may have, is used up."""


def full_disk_is_one_line(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that writes into the folder `out`, one of its parameters, raise ValueError where that is full."""

    @functools.wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # RuntimeError: what ArrayRecord makes of it
            for code in _FULL:
                if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                    out = inspect.signature(function).bind(*args, **kwargs).arguments["out"]
                    raise ValueError(
                        f"no space left in {out} ({os.strerror(code)}); free some and repeat the command: it continues"
                    ) from None
            raise

    return explained
