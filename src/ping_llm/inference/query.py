"""Addresses, times and a context as a user gives them in, one checked question out."""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ping_llm.data.measurement import IPV4_MAPPED_PREFIX, format_address, is_ipv4, pack_address
from ping_llm.inference.context import Context, parse_time

SrcKnown = str | int
"""How much of the source is told: "all", "none", a prefix length in bits, or "auto" for a mixture of several."""
_AUTO_BYTES = {4: (0, 1, 2, 3, 4), 16: (0, 4, 6, 8, 16)}  # of the prefixes that auto mixes, by the width of the address

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """An address, or a prefix of it: what is told of one end of a ping.

    The model reads whole bytes. Of a prefix that does not end on one, `extra_bits` (1 to 7) of the byte after `told_bytes`
    are told too: it stands for all prefixes one byte longer that begin so, each with its probability (see prefixes.py).
    """

    packed: bytes
    told_bytes: int
    extra_bits: int = 0

    @property
    def width(self) -> int:
        """Bytes of a whole address of its family: 4 or 16."""
        return 4 if self.packed[:12] == IPV4_MAPPED_PREFIX else 16

    @property
    def is_prefix(self) -> bool:
        """Whether not all bytes are told."""
        return self.told_bytes < self.width

    @property
    def told_bits(self) -> int:
        """Bits that are told."""
        return 8 * self.told_bytes + self.extra_bits

    @property
    def told(self) -> bytes:
        """The whole bytes that are told."""
        return self.packed[16 - self.width :][: self.told_bytes]

    @property
    def next_bytes(self) -> range:
        """Values that the byte after the whole ones may have."""
        if not self.extra_bits:
            return range(256)
        span = 256 >> self.extra_bits
        low = self.packed[16 - self.width + self.told_bytes] // span * span
        return range(low, low + span)

    def cut(self, told_bytes: int) -> Endpoint:
        """The same end with no more bytes told."""
        return self if told_bytes > self.told_bytes else Endpoint(self.packed, told_bytes)

    def extended(self, told: bytes) -> Endpoint:
        """The end of the same family of which the bytes `told`, one or more, are told."""
        return Endpoint((self.packed[: 16 - self.width] + told).ljust(16, b"\0"), len(told))

    def covers(self, packed: np.ndarray) -> np.ndarray:
        """Which of (n, 16) addresses are this one, or lie in this prefix, (n,) bool."""
        same_family = is_ipv4(packed) == (self.width == 4)
        told, bytes_ = np.frombuffer(self.told, np.uint8), packed[:, 16 - self.width :]
        inside = same_family & (bytes_[:, : self.told_bytes] == told).all(axis=1)
        if self.extra_bits:
            inside &= np.isin(bytes_[:, self.told_bytes], self.next_bytes)
        return inside

    def __str__(self) -> str:
        if not self.is_prefix:
            return format_address(self.packed)
        kept = self.packed[: 16 - self.width + self.told_bytes]
        kept += bytes([self.next_bytes[0]]) if self.extra_bits else b""
        return f"{format_address(kept.ljust(16, bytes(1)))}/{self.told_bits}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Reads `192.0.2.1`, `192.0.2.0/24`, `2001:db8::/47`; ValueError says what is wrong."""
        address, slash, length = text.partition("/")
        packed = pack_address(address)
        whole = cls(packed, 16)
        width = 8 * whole.width
        if not slash:
            if packed in (bytes(16), IPV4_MAPPED_PREFIX + bytes(4)):
                raise ValueError(f"{text!r} is the unspecified address, which no host has; give a host or a prefix")
            return cls(packed, width // 8)
        if not length.isdigit() or int(length) > width:
            raise ValueError(f"{text!r}: the prefix length must be a number from 0 to {width}")
        return cls(packed, *divmod(int(length), 8))


@dataclass(frozen=True, eq=False)
class Query:
    """One question: the law of the result of a ping from src to dst, at a time or at any, after a context.

    An end that is None is not told at all: the law is that of pings from, or to, anywhere.
    """

    src: Endpoint | None
    dst: Endpoint | None
    time_s: int | None
    context: Context

    @classmethod
    def parse(
        cls,
        src: str | None,
        dst: str | None,
        at: dt.datetime | str | float | None = None,
        context: Context | None = None,
    ) -> Query:
        """Checks what belongs together; ValueError says what does not."""
        context = Context.parse(None) if context is None else context
        ends = (Endpoint.parse(end) if end else None for end in (src, dst))
        query = cls(*ends, None if at is None else parse_time(at), context)
        query._check(dst)
        return query

    def _check(self, dst: str | None) -> None:
        if self.src is None and self.dst is None:
            raise ValueError("tell at least one end of the ping, the source or the destination")
        if self.dst is not None and not self.dst.told_bits:
            raise ValueError(
                f"{dst!r} tells nothing of the destination; give a longer prefix, or none for any destination"
            )
        if self.src is not None and self.dst is not None and self.src.width != self.dst.width:
            log.warning(
                "%s and %s are of two families, which do not ping each other; the model answers", self.src, self.dst
            )
        context = self.context
        if not len(context):
            return
        if self.src is None:
            raise ValueError("a context is of one source; tell which one it is")
        if self.src.extra_bits:
            raise ValueError(
                f"beside a context the source must be an address or a prefix of whole bytes, not {self.src}: "
                f"give one like /{8 * self.src.told_bytes} or /{8 * self.src.told_bytes + 8}"
            )
        same_family = is_ipv4(context.src) == (self.src.width == 4)  # a host may have an address of each family
        strange = same_family & ~self.src.covers(context.src)
        if strange.any():
            row = int(strange.argmax())
            raise ValueError(
                f"the context holds a ping of {format_address(context.src[row].tobytes())}, but the question is about "
                f"{self.src}; leave in the pings of that source only"
            )
        if self.time_s is not None and context.time_s is not None and (context.time_s > self.time_s).any():
            raise ValueError("the context holds measurements later than the time asked for; leave those out")

    def variants(self, src_known: SrcKnown) -> Iterator[Query]:
        """The question with as much of the source told as `src_known` says; several for "auto", least told first."""
        if self.src is None:
            yield self
            return
        for told_bytes in told_lengths(src_known, self.src):
            yield dataclasses.replace(self, src=self.src.cut(told_bytes))


def told_lengths(src_known: SrcKnown, src: Endpoint) -> list[int]:
    """Bytes of a source that are told under `src_known`, ascending, a partial one counted; ValueError if that is unknown."""
    most = src.told_bytes + bool(src.extra_bits)
    if src_known == "auto":
        return sorted({min(n, most) for n in (*_AUTO_BYTES[src.width], most)})
    if src_known in ("all", "none"):
        return [most if src_known == "all" else 0]
    bits = int(src_known) if str(src_known).isdigit() else -1
    if bits % 8 or not 0 <= bits <= 8 * src.width:
        raise ValueError(
            f"src_known={src_known!r} must be auto, all, none, or a prefix length of whole bytes up to {8 * src.width}"
        )
    return [min(bits // 8, most)]


def told_name(src: Endpoint) -> str:
    """How an answer names what is told of a source: none, /16, all."""
    return "all" if not src.is_prefix else "none" if not src.told_bits else f"/{src.told_bits}"
