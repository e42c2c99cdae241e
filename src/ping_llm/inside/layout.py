"""The tokens of a window in; of each its field, its measurement and its name out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ping_llm.data import tokenization as tk
from ping_llm.model.loss import token_fields

_SHORT = {
    tk.MEASUREMENT_START: "start",
    tk.SRC_IPV4: "src",
    tk.SRC_IPV6: "src",
    tk.DST_IPV4: "dst",
    tk.DST_IPV6: "dst",
    tk.TIMESTAMP_ABS: "time",
    tk.TIMESTAMP_DELTA1: "time",
    tk.TIMESTAMP_DELTA4: "time",
    tk.RTT_START: "RTT",
    tk.FAILED: "failed",
}
_HEXADECIMAL = (tk.SRC_IPV6, tk.DST_IPV6)


@dataclass(frozen=True, eq=False)
class Layout:
    """The T tokens of a window, without padding, and what each is part of."""

    tokens: np.ndarray  # (T,) int64
    field: np.ndarray  # (T,) into config.FIELDS, as the losses count them: a role is structure, FAILED a result
    measurement: np.ndarray  # (T,) from 0
    role: np.ndarray  # (T,) the role token whose bytes it is among; its own, if it is one

    @classmethod
    def of(cls, window: np.ndarray | torch.Tensor) -> Layout:
        """Takes a window (T,) that begins with MEASUREMENT_START and may end within a measurement, padding at the right."""
        tokens = np.asarray(window, dtype=np.int64)
        tokens = tokens[tokens >= 0]
        if not len(tokens) or tokens[0] != tk.MEASUREMENT_START:
            raise ValueError("a window begins with MEASUREMENT_START")
        roles = (torch.as_tensor(table) for table in (tk.FIELD_OF_ROLE, tk.FIELD_OF_BYTES_AFTER))
        field = token_fields(torch.from_numpy(tokens)[None], *roles)[0].numpy().astype(np.int64)
        last_role = np.maximum.accumulate(np.where(tokens < tk.BYTE_0, np.arange(len(tokens)), 0))
        measurement = np.cumsum(tokens == tk.MEASUREMENT_START) - 1
        return cls(tokens, field, measurement, tokens[last_role])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def measurements(self) -> int:
        """How many begin in the window."""
        return int(self.measurement[-1]) + 1

    def place_of_rtt(self, measurement: int) -> int | None:
        """Where RTT_START of a measurement stands, if both bytes of its RTT follow; None if there is none."""
        (places,) = np.nonzero((self.measurement == measurement) & (self.tokens == tk.RTT_START))
        return int(places[0]) if len(places) and places[0] + 2 < len(self) else None

    def destination(self, measurement: int) -> tuple[int, ...]:
        """The role and the known bytes of the destination; () where the window ends before it."""
        is_dst = np.isin(self.role, (tk.DST_IPV4, tk.DST_IPV6))
        return tuple(self.tokens[(self.measurement == measurement) & is_dst].tolist())

    def name(self, place: int) -> str:
        """A token in few letters: a role by its field, a byte by its value, of IPv6 in hexadecimal."""
        token = int(self.tokens[place])
        if token < tk.BYTE_0:
            return _SHORT.get(token, tk.token_name(token))
        byte = token - tk.BYTE_0
        return f"{byte:02x}" if self.role[place] in _HEXADECIMAL else str(byte)
