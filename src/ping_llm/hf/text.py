"""Tokens in, readable text out; and the other way, without loss.

    src=192.0.2.1 dst=198.51.100.7 time=2026-01-04T12:00:00Z rtt=12.5ms
    src=192.0.2.0/24 dst=2001:db8::/32 fail time=+300s

A line is a measurement, and a line break stands for its MEASUREMENT_START; before a text that begins with the name of a
field, that token is meant. A text that begins with a space, a value or an escape continues what came before. So the texts of
two parts of a window, one after the other, say the whole, if the second begins with a field, or the first ends with `rtt=`
or `time=`, which may be left open there. A later time is written as seconds after the one before; read, it may be either.

What no field can be made of, as in lists that do not follow the grammar, is written token by token: `<RTT_START>`, `<0x1f>`.
Bytes that follow a field without a space belong to it.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import IPV4_MAPPED_PREFIX
from ping_llm.data.times import LAST_TIME_S, parse_time
from ping_llm.inference.prompt import DST_ROLES, SRC_ROLES, address_tokens, byte_tokens, time_tokens
from ping_llm.inference.query import Endpoint

NAMES = (*(f"<{name}>" for name in tk.ROLE_NAMES), *(f"<0x{byte:02x}>" for byte in range(256)))
"""The escape of each token, which is also its name in the vocabulary."""
TOKEN_OF = {name: token for token, name in enumerate(NAMES)}
LONGEST_RTT_MS = float(tk.rtt_code_edges_ms()[-1])

_PIECE = re.compile(r"(?P<space>[ \t\r]+)|(?P<line>\n)|(?P<escape><[^<>\s]*>)|(?P<word>[^<>\s]+)")
_RTT = re.compile(r"(\d+(?:\.\d+)?)ms", re.ASCII)
_LATER = re.compile(r"\+(\d{1,4000})s", re.ASCII)
_KEYS = "src=, dst=, time=, rtt= and fail"
_OPEN = {tk.RTT_START: "rtt=", tk.TIMESTAMP_ABS: "time="}
_WIDTH = {tk.SRC_IPV4: 4, tk.SRC_IPV6: 16, tk.DST_IPV4: 4, tk.DST_IPV6: 16}


class TextError(ValueError):
    """Text that is no tokens: `position` is the character where it breaks, and `reason` says why."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"position {position}: {reason}")
        self.position, self.reason = position, reason


def from_text(text: str) -> list[int]:
    """The tokens that a text stands for; TextError says where and why it stands for none."""
    reader, position = _Reader(), 0
    while position < len(text):
        piece = _PIECE.match(text, position)
        if piece is None:
            raise TextError(position, f"{text[position]!r} is no part of a measurement")
        try:
            reader.read(str(piece.lastgroup), piece[0])
        except ValueError as error:
            raise TextError(position, str(error)) from None
        position = piece.end()
    return reader.tokens


class _Reader:
    """What has been read of a text, and what may follow."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.clock: int | None = None  # s, the last time that was written in full, and what was added to it
        self.apart = True  # whether a field may begin: at the beginning, after a space or a line break
        self.begun = False  # whether anything was read, be it a space
        self.open = ""  # name of a field that has no value so far

    def read(self, kind: str, piece: str) -> None:
        """Reads the next piece of a kind of _PIECE; ValueError says why it cannot stand here."""
        if kind == "escape":
            if piece not in TOKEN_OF:
                raise ValueError(f"{piece} is no token; there are {NAMES[0]} … {NAMES[tk.BYTE_0 - 1]}, <0x00> … <0xff>")
            self.tokens.append(TOKEN_OF[piece])
            self.open = ""
        elif kind != "space":
            if self.open:
                raise ValueError(f"{self.open} has no value; only at the end of a text may it be left out")
            self.tokens += [tk.MEASUREMENT_START] if kind == "line" else self._word(piece)
        self.apart, self.begun = kind in ("space", "line"), True

    def _word(self, word: str) -> list[int]:
        if not self.apart:
            raise ValueError(f"before {word!r} a space is missing")
        start = [] if self.begun else [tk.MEASUREMENT_START]
        if word == "fail":
            return [*start, tk.FAILED]
        key, equals, value = word.partition("=")
        if not equals:
            return self._bare(word)
        if key == "rtt":
            self.open = "" if value else word
            return [*start, tk.RTT_START, *(_rtt_bytes(value) if value else [])]
        if key == "time":
            self.open = "" if value else word
            return start + (self._time(value) if value else [tk.TIMESTAMP_ABS])
        if key not in ("src", "dst"):
            raise ValueError(f"there is no {word!r}; fields are {_KEYS}")
        return start + _address(SRC_ROLES if key == "src" else DST_ROLES, word, value)

    def _bare(self, word: str) -> list[int]:
        """The bytes of a value whose role came before this text."""
        if not self.begun and _RTT.fullmatch(word):
            return _rtt_bytes(word)
        if not self.begun and word[0].isdigit():
            self.clock = parse_time(word)
            return time_tokens(self.clock)[1:]
        raise ValueError(f"there is no {word!r}; fields are {_KEYS}")

    def _time(self, value: str) -> list[int]:
        later = _LATER.fullmatch(value)
        if later is None:
            time_s = parse_time(value)
            before, self.clock = self.clock, time_s
            return time_tokens(time_s) if before is None else _delta(time_s - before)
        seconds = int(later[1])
        self.clock = None if self.clock is None else self.clock + seconds
        return _delta(seconds)


def to_text(tokens: Sequence[int]) -> str:
    """The text of any list of tokens, from which `from_text` makes the same list; ValueError if one is no token."""
    for place, token in enumerate(tokens):
        if not 0 <= token < tk.VOCAB_SIZE:
            raise ValueError(f"token {place}: {tk.token_name(token)}")
    roles = [place for place, token in enumerate(tokens) if token < tk.BYTE_0]
    leading = bytes(token - tk.BYTE_0 for token in tokens[: roles[0] if roles else None])
    text, clock = _value_text(leading)
    for place, end in pairwise([*roles, len(tokens)]):
        role, value = tokens[place], bytes(token - tk.BYTE_0 for token in tokens[place + 1 : end])
        after_open = text.endswith("=")
        if role == tk.MEASUREMENT_START and not after_open:
            text += "\n" + _escapes(value)
            continue
        field, clock = ("", clock) if after_open else _field_text(role, value, clock)
        if not field:
            text += NAMES[role] + _escapes(value)
        else:
            text += ("" if text.endswith("\n") else " ") + field
    return text[1:] if re.match(r"\n[a-z]", text) else text


def _value_text(value: bytes) -> tuple[str, int | None]:
    """The text of bytes whose role came before: a whole RTT, a whole time or escapes; and what the clock is then, in s."""
    if len(value) == 2:
        return rtt_text(int.from_bytes(value, "big")), None
    time_s = int.from_bytes(value, "big")
    if len(value) == 8 and time_s <= LAST_TIME_S:
        return _time_text(time_s), time_s
    return _escapes(value), None


def _field_text(role: int, value: bytes, clock: int | None) -> tuple[str, int | None]:
    """The text of a role that opens a field and of the bytes after it, empty if there is none; and the clock after it."""
    if role == tk.FAILED:
        return "fail" + _escapes(value), clock
    if role == tk.RTT_START:
        if len(value) < 2:
            return "rtt=" + _escapes(value), clock
        return f"rtt={rtt_text(int.from_bytes(value[:2], 'big'))}" + _escapes(value[2:]), clock
    if role == tk.TIMESTAMP_ABS:
        time_s = int.from_bytes(value[:8], "big")
        if clock is not None or len(value) < 8 or time_s > LAST_TIME_S:
            return "time=" + _escapes(value), clock
        return f"time={_time_text(time_s)}" + _escapes(value[8:]), time_s
    if role in (tk.TIMESTAMP_DELTA1, tk.TIMESTAMP_DELTA4):
        width = 1 if role == tk.TIMESTAMP_DELTA1 else 4
        seconds = int.from_bytes(value[:width], "big")
        if len(value) < width or (width == 4 and seconds <= tk.DELTA1_MAX_S):
            return "", clock
        return f"time=+{seconds}s" + _escapes(value[width:]), None if clock is None else clock + seconds
    return _address_text(role, value), clock


def _address_text(role: int, value: bytes) -> str:
    """src=ADDRESS or dst=ADDRESS, a prefix where bytes are missing; empty if the role opens no address, or IPv6 is IPv4."""
    width = _WIDTH.get(role)
    if width is None or (width == 16 and value.startswith(IPV4_MAPPED_PREFIX)):
        return ""
    known = value[:width]
    end = Endpoint((IPV4_MAPPED_PREFIX if width == 4 else b"") + known.ljust(width, b"\0"), len(known))
    bits = f"/{8 * width}" if known == bytes(width) else ""  # a whole address of zeros is no host by itself
    return f"{'src' if role in SRC_ROLES else 'dst'}={end}{bits}" + _escapes(value[width:])


@lru_cache(tk.RTT_CODES)
def rtt_text(code: int) -> str:
    """The decimal of fewest digits that reads back as this code, the nearest of several, as in 12.5ms."""
    value = float(tk.decode_rtt(np.array(code)))
    exact = Decimal(value)
    for digits in range(1, 18):
        step = Decimal(1).scaleb(exact.adjusted() + 1 - digits)
        around = [exact.quantize(step, rounding) if step < 1 else _whole(exact, step, rounding) for rounding in _ROUND]
        same = [near for near in around if near < LONGEST_RTT_MS and tk.encode_rtt(np.array(float(near))) == code]
        if same:
            return f"{min(same, key=lambda near: abs(near - exact)):f}ms"
    raise AssertionError(code)


_ROUND = (ROUND_FLOOR, ROUND_CEILING)


def _whole(exact: Decimal, step: Decimal, rounding: str) -> Decimal:
    """A multiple of a step of 1 or more, without an exponent."""
    return ((exact / step).to_integral_value(rounding) * step).quantize(Decimal(1))


def _rtt_bytes(value: str) -> list[int]:
    written = _RTT.fullmatch(value)
    if written is None:
        raise ValueError(f"{value!r} is no RTT; write it like 12.5ms, and fail where there was no answer")
    if not float(written[1]) < LONGEST_RTT_MS:
        raise ValueError(f"{value!r} is longer than 71.6 minutes, the longest RTT that the tokens hold")
    return byte_tokens(int(tk.encode_rtt(np.array(float(written[1])))).to_bytes(2, "big"))


def _address(roles: tuple[int, int], word: str, value: str) -> list[int]:
    if not value:
        raise ValueError(f"{word} needs an address or a prefix; 0.0.0.0/0 or ::/0 says the family alone")
    end = Endpoint.parse(value)
    if end.extra_bits:
        raise ValueError(f"{value!r} does not end on a byte; write a length of 8, 16, 24 …")
    return address_tokens(roles, end).tolist()


def _delta(seconds: int) -> list[int]:
    if not 0 <= seconds <= tk.DELTA4_MAX_S:
        raise ValueError("times must not decrease, nor leap more than 136 years; sort by time first")
    if seconds <= tk.DELTA1_MAX_S:
        return [tk.TIMESTAMP_DELTA1, *byte_tokens(seconds.to_bytes(1, "big"))]
    return [tk.TIMESTAMP_DELTA4, *byte_tokens(seconds.to_bytes(4, "big"))]


def _time_text(time_s: int) -> str:
    return f"{dt.datetime.fromtimestamp(time_s, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _escapes(value: bytes) -> str:
    return "".join(NAMES[tk.BYTE_0 + byte] for byte in value)
