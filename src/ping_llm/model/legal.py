"""What a measurement holds so far in, which tokens may come next out: the grammar as a mask over the logits.

That no byte follows a whole address, or that a result comes once, need not be learned: with `model.grammar` such tokens
have no probability, however strange the addresses. The mask knows which fields there are and how long; that sources of a
window are cut alike, or that times have bounds, it leaves to the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ping_llm.model.fields import (
    DST_ROLES,
    FAILED,
    PLACES,
    ROLES,
    RTT_START,
    SEEN_STATES,
    SRC_ROLES,
    START,
    TIME_ROLES,
    WIDTH,
    FieldFeatures,
)

ILLEGAL = -1e4  # a logit: its exponential is 0 in fp32 and fp64, and nothing becomes NaN
LEAST_BYTES = (0, 0, 0, 1, 1, 8, 1, 4, 2, 0, 0)  # after each role
MOST_BYTES = (0, 4, 16, 4, 16, 8, 1, 4, 2, 0, 0)
_BYTES_OR_ROLES = 4  # bit 0: bytes may come, bit 1: roles may


def legal_table(vocabulary: int) -> Tensor:
    """Which tokens are legal in each state, (_BYTES_OR_ROLES · SEEN_STATES, V) bool; see `legal_states`."""
    table = torch.zeros(_BYTES_OR_ROLES, SEEN_STATES, vocabulary, dtype=torch.bool)
    seen = torch.arange(SEEN_STATES)
    src, dst, result, time, timed = (seen >> bit & 1 == 1 for bit in range(5))
    roles = torch.zeros(SEEN_STATES, ROLES, dtype=torch.bool)
    roles[:, START] = src & dst & result
    roles[:, SRC_ROLES], roles[:, DST_ROLES] = ~src[:, None], ~dst[:, None]
    roles[:, [RTT_START, FAILED]] = ~result[:, None]
    roles[:, TIME_ROLES] = (~time & timed)[:, None]
    roles[:, TIME_ROLES[0]] = ~time & ~timed
    table[[1, 3], :, ROLES:] = True
    table[[2, 3], :, :ROLES] = roles
    return table.flatten(0, 1)


def place_table() -> Tensor:
    """Whether bytes (bit 0) and roles (bit 1) may come after each place of a field, (PLACES,) int64."""
    index = torch.arange(WIDTH)
    least, most = torch.tensor(LEAST_BYTES)[:, None], torch.tensor(MOST_BYTES)[:, None]
    return ((index < most) * 1 + (index >= least) * 2).reshape(PLACES)


def legal_states(features: FieldFeatures, places: Tensor) -> Tensor:
    """The row of `legal_table` after each token, (B, T) int64; `places` is `place_table`."""
    return places[features.place] * SEEN_STATES + features.seen
