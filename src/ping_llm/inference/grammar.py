"""The tokens of windows so far in, which tokens may come next out.

What is legal is what `tokenization.encode` can write of the windows that `windows.sample_window` draws: each measurement
has source, destination and result; the sources of a window are all cut alike; a delta that fits one byte does not take
four; IPv6 bytes are never those of an IPv4-mapped address. So every window of training is legal, and what is legal
decodes without loss: encoding it again gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import IPV4_MAPPED_PREFIX
from ping_llm.model.legal import LEAST_BYTES, MOST_BYTES

INT64_MAX = 2**63 - 1

_IPV4_ROLES, _IPV6_ROLES = (tk.SRC_IPV4, tk.DST_IPV4), (tk.SRC_IPV6, tk.DST_IPV6)
_TIME_ROLES = (tk.TIMESTAMP_ABS, tk.TIMESTAMP_DELTA1, tk.TIMESTAMP_DELTA4)
_LEAST_BYTES, _MOST_BYTES = np.array(LEAST_BYTES), np.array(MOST_BYTES)  # after each role
_FIELD_ROLES = np.array([*_IPV4_ROLES, *_IPV6_ROLES, *_TIME_ROLES, tk.RTT_START, tk.FAILED])
_FIELD = np.zeros(tk.BYTE_0, dtype=np.int64)  # SRC, DST, RESULT or TIME of each role that opens a field
_FIELD[_FIELD_ROLES] = [tk.SRC, tk.DST, tk.SRC, tk.DST, tk.TIME, tk.TIME, tk.TIME, tk.RESULT, tk.RESULT]
_MAPPED = np.frombuffer(IPV4_MAPPED_PREFIX, np.uint8).astype(np.int64)
_SHORTEST_DELTA4_S = tk.DELTA1_MAX_S + 1
_OF_WINDOWS = (
    "role",
    "bytes_read",
    "value",
    "mapped",
    "seen",
    "clock",
    "least",
    "most",
)  # what a Grammar holds of each


class Grammar:
    """Where B windows stand, each of which grows by one token at a time; at first only MEASUREMENT_START is legal.

    With `whole_addresses` every address has all its bytes; without, prefixes are legal too, and after each byte of one
    either another or the next field. No time is later than `last_time_s`.
    """

    def __init__(self, windows: int, *, whole_addresses: bool = True, last_time_s: int = INT64_MAX) -> None:
        self.last_time_s = last_time_s
        self.role = np.full(windows, tk.FAILED)  # (B,) role of the open field
        self.bytes_read = np.zeros(windows, dtype=np.int64)  # (B,) bytes after that role
        self.value = np.zeros(windows, dtype=np.int64)  # (B,) what the bytes of a time say so far
        self.mapped = np.zeros(windows, dtype=bool)  # (B,) whether IPv6 bytes could become an IPv4-mapped address
        self.seen = np.ones((windows, 4), dtype=bool)  # fields of this measurement: src, dst, result, time
        self.clock = np.full(windows, -1)  # (B,) s, the last time; −1 = none
        self.least = np.tile(_MOST_BYTES if whole_addresses else _LEAST_BYTES, (windows, 1))  # (B, 11) bytes of a role
        self.most = np.tile(_MOST_BYTES, (windows, 1))  # (B, 11)

    def __len__(self) -> int:
        return len(self.role)

    def select(self, rows: np.ndarray) -> Grammar:
        """The state of the windows `rows` (n,), in that order; a window may appear several times."""
        chosen = Grammar(0, last_time_s=self.last_time_s)
        for name in _OF_WINDOWS:
            setattr(chosen, name, getattr(self, name)[rows])
        return chosen

    @classmethod
    def joined(cls, grammars: Sequence[Grammar]) -> Grammar:
        """The state of the windows of several, one after the other; the last time is that of the first."""
        joined = cls(0, last_time_s=grammars[0].last_time_s)
        for name in _OF_WINDOWS:
            setattr(joined, name, np.concatenate([getattr(grammar, name) for grammar in grammars]))
        return joined

    def legal(self) -> np.ndarray:
        """Which tokens may come next: (B, 267) bool; at least one is always legal."""
        legal = np.zeros((len(self), tk.VOCAB_SIZE), dtype=bool)
        legal[:, tk.MEASUREMENT_START] = self.seen[:, [tk.SRC, tk.DST, tk.RESULT]].all(axis=1)
        legal[:, _FIELD_ROLES] = ~self.seen[:, _FIELD[_FIELD_ROLES]]
        legal[:, tk.TIMESTAMP_ABS] &= self.clock < 0
        legal[:, tk.TIMESTAMP_DELTA1] &= self.clock >= 0
        legal[:, tk.TIMESTAMP_DELTA4] &= (self.clock >= 0) & (self.clock <= self.last_time_s - _SHORTEST_DELTA4_S)
        legal[:, : tk.BYTE_0] &= (self.bytes_read >= self._of_role(self.least))[:, None]

        after = self._of_role(self.most) - self.bytes_read - 1  # (B,) bytes behind the next one
        left_s = (self.last_time_s - np.maximum(self.clock, 0)) >> 8 * np.clip(after, 0, 7)
        high = np.where(np.isin(self.role, _TIME_ROLES), np.minimum(left_s - (self.value << 8), 255), 255)
        high[self.mapped & (self.bytes_read == len(_MAPPED) - 1)] = _MAPPED[-1] - 1
        low = (self.role == tk.TIMESTAMP_DELTA4) & (after == 1) & (self.value == 0)
        byte = np.arange(256)
        legal[:, tk.BYTE_0 :] = (after[:, None] >= 0) & (byte >= low[:, None]) & (byte <= high[:, None])
        return legal

    def advance(self, tokens: np.ndarray) -> None:
        """Appends a legal token (B,) to each window."""
        tokens = np.asarray(tokens, dtype=np.int64)
        is_byte, byte = tokens >= tk.BYTE_0, tokens - tk.BYTE_0
        of_time = is_byte & np.isin(self.role, _TIME_ROLES)
        self.mapped &= byte == _MAPPED[np.minimum(self.bytes_read, 11)]
        self.value[of_time] = self.value[of_time] << 8 | byte[of_time]
        self.bytes_read += is_byte
        known = of_time & (self.bytes_read == self._of_role(self.most))
        self.clock[known] = np.maximum(self.clock[known], 0) + self.value[known]
        rows, roles = np.flatnonzero(~is_byte), tokens[~is_byte]  # their open field closes, that of `roles` opens
        for role in (tk.SRC_IPV4, tk.SRC_IPV6):
            self._cut_sources(rows[self.role[rows] == role], role)
        self.role[rows] = roles
        self.bytes_read[rows] = self.value[rows] = 0
        self.mapped[rows] = np.isin(roles, _IPV6_ROLES)
        start = roles == tk.MEASUREMENT_START
        self.seen[rows[start]] = False
        self.seen[rows[~start], _FIELD[roles[~start]]] = True

    def ended(self) -> np.ndarray:
        """Whether nothing can be added to the last measurement of each window: (B,) bool."""
        return self.seen.all(axis=1) & (self.bytes_read == self._of_role(self.most))

    def longest(self, measurements: int) -> np.ndarray:
        """Tokens that the rest of the open measurement and `measurements` − 1 more take at most: (B,)."""
        longest = 1 + np.stack(
            [self.most[:, _FIELD_ROLES[_FIELD[_FIELD_ROLES] == field]].max(axis=1) for field in range(3)], 1
        )
        rest = self._of_role(self.most) - self.bytes_read + (longest * ~self.seen[:, :3]).sum(axis=1)
        times = ~self.seen[:, tk.TIME] + measurements - 1
        absolute = (self.clock < 0) & ~self.seen[:, tk.TIME]
        more = (measurements - 1) * (1 + longest.sum(axis=1))
        return rest + more + (1 + _MOST_BYTES[tk.TIMESTAMP_DELTA4]) * times + 4 * absolute

    def _of_role(self, of_roles: np.ndarray) -> np.ndarray:
        """Of (B, 11), what belongs to the open role of each window: (B,)."""
        return of_roles[np.arange(len(self)), self.role]

    def _cut_sources(self, rows: np.ndarray, role: int) -> None:
        """Holds every later source of the windows `rows` to the share of its bytes that the one just closed has."""
        known = self.bytes_read[rows]
        ipv4 = known if role == tk.SRC_IPV4 else known // 4
        ipv6 = (4 * ipv4, np.where(ipv4 == 4, 16, 4 * ipv4 + 3)) if role == tk.SRC_IPV4 else (known, known)
        for cut, (least, most) in ((tk.SRC_IPV4, (ipv4, ipv4)), (tk.SRC_IPV6, ipv6)):
            self.least[rows, cut] = np.maximum(self.least[rows, cut], least)
            self.most[rows, cut] = np.minimum(self.most[rows, cut], most)


def follow(grammar: Grammar, tokens: Iterable[int]) -> None:
    """Appends all `tokens` to the one window of `grammar`; ValueError says which is not legal, and what would be."""
    for at, token in enumerate(tokens):
        legal = grammar.legal()[0]
        if not (0 <= token < tk.VOCAB_SIZE and legal[token]):
            expected = [tk.ROLE_NAMES[role] for role in np.flatnonzero(legal[: tk.BYTE_0])]
            values = np.flatnonzero(legal[tk.BYTE_0 :])
            if len(values):
                some = f" from 0x{values[0]:02x} to 0x{values[-1]:02x}" if len(values) < 256 else ""
                expected.append(f"a byte{some}")
            raise ValueError(f"token {at}: expected {' or '.join(expected)}, found {tk.token_name(int(token))}")
        grammar.advance(np.array([token]))
