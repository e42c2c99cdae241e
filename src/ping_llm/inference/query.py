"""Addresses, times and a context as a user gives them in, one checked query out."""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ping_llm.data.as_text import text_of
from ping_llm.data.measurement import IPV4_MAPPED_PREFIX, format_address, is_ipv4, pack_address
from ping_llm.data.times import parse_time
from ping_llm.inference.context import Context, Records

Time = dt.datetime | str | float | None
SrcKnown = str | int
"""How much of the source is known: "all", "none", a prefix length in bits, or "auto" for a mixture of several."""
NO_CONTEXT = Context.parse(None)
_BITS = re.compile(r"\d{1,3}", re.ASCII)
_AUTO_BYTES = {4: (0, 1, 2, 3, 4), 16: (0, 4, 6, 8, 16)}  # of the prefixes that auto mixes, by the width of the address

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """An address or a prefix: what is known of the source or the destination of a ping.

    The model reads whole bytes. A prefix that does not end on a byte has `extra_bits` (1 to 7) of the byte after
    `known_bytes`: it is a mixture of the prefixes one byte longer that begin so (see mixture.py).
    """

    packed: bytes
    known_bytes: int
    extra_bits: int = 0
    cut_from: Endpoint | None = field(default=None, compare=False, repr=False)

    @classmethod
    def whole(cls, packed: bytes) -> Endpoint:
        """A host, all of whose 4 or 16 bytes are known."""
        return cls(packed, cls(packed, 0).width)

    @property
    def width(self) -> int:
        """Bytes of a whole address of its family: 4 or 16."""
        return 4 if self.packed[:12] == IPV4_MAPPED_PREFIX else 16

    @property
    def family(self) -> str:
        """ipv4 or ipv6."""
        return "ipv4" if self.width == 4 else "ipv6"

    @property
    def is_prefix(self) -> bool:
        """Whether some bytes are unknown."""
        return self.known_bytes < self.width

    @property
    def known_bits(self) -> int:
        """Length of the prefix in bits."""
        return 8 * self.known_bytes + self.extra_bits

    @property
    def known(self) -> bytes:
        """The whole bytes that are known."""
        return self.packed[16 - self.width :][: self.known_bytes]

    @property
    def next_bytes(self) -> range:
        """Values that the byte after the whole ones may have."""
        if not self.extra_bits:
            return range(256)
        span = 256 >> self.extra_bits
        low = self.packed[16 - self.width + self.known_bytes] // span * span
        return range(low, low + span)

    def cut(self, known_bytes: int) -> Endpoint:
        """The same with at most so many bytes known."""
        return self if known_bytes > self.known_bytes else Endpoint(self.packed, known_bytes, 0, self.given)

    @property
    def given(self) -> Endpoint:
        """As it was before it was cut."""
        return self.cut_from or self

    def covers(self, packed: np.ndarray) -> np.ndarray:
        """Which of (n, 16) addresses are this one, or lie in this prefix, (n,) bool."""
        same_family = is_ipv4(packed) == (self.width == 4)
        known, bytes_ = np.frombuffer(self.known, np.uint8), packed[:, 16 - self.width :]
        inside = same_family & (bytes_[:, : self.known_bytes] == known).all(axis=1)
        if self.extra_bits:
            inside &= np.isin(bytes_[:, self.known_bytes], self.next_bytes)
        return inside

    def __str__(self) -> str:
        if not self.is_prefix:
            return format_address(self.packed)
        kept = self.packed[: 16 - self.width + self.known_bytes]
        kept += bytes([self.next_bytes[0]]) if self.extra_bits else b""
        return f"{format_address(kept.ljust(16, bytes(1)))}/{self.known_bits}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Reads `192.0.2.1`, `192.0.2.0/24`, `2001:db8::/47`; ValueError says what is wrong."""
        if not text:
            raise ValueError("an address is empty; give one, or a prefix, or None for any")
        address, slash, length = text.partition("/")
        packed = pack_address(address)
        whole = cls.whole(packed)
        width = 8 * whole.width
        if not slash:
            if packed in (bytes(16), IPV4_MAPPED_PREFIX + bytes(4)):
                raise ValueError(f"{text!r} is the unspecified address, which no host has; give a host or a prefix")
            return whole
        if not _BITS.fullmatch(length) or int(length) > width:
            raise ValueError(f"{text!r}: the prefix length must be a number from 0 to {width}")
        return cls(packed, *divmod(int(length), 8))


@dataclass(frozen=True, eq=False)
class Query:
    """A ping whose result is wanted: from src to dst, at a time or at any, given a context.

    Where src or dst is None, the query is about pings from, or to, any host.
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
        at: Time = None,
        context: Context | Records | None = None,
        *,
        one_host: bool = False,
        any_source: bool = False,
    ) -> Query:
        """Reads addresses or prefixes, None for any, a time, None for any, and a table of measurements as context.

        Checks what belongs together: ValueError says what does not. `one_host`, `any_source`: see Context.
        """
        source, destination = (None if end is None else Endpoint.parse(text_of(end) or "") for end in (src, dst))
        earlier = context if isinstance(context, Context) else Context.parse(context, one_host, any_source)
        return cls.of(source, destination, None if at is None else parse_time(at), earlier)

    @classmethod
    def of(
        cls, source: Endpoint | None, destination: Endpoint | None, time_s: int | None, context: Context | None = None
    ) -> Query:
        """Checks what belongs together; ValueError says what does not."""
        if source is None and destination is None:
            raise ValueError("give the source or the destination of the ping, or both")
        if destination is not None and not destination.known_bits:
            raise ValueError(
                f"{destination} covers every destination; give a longer prefix, or none for any destination"
            )
        if source is not None and destination is not None and source.width != destination.width:
            both = "%s and %s are of two families, which do not ping each other; the model answers"
            log.warning(both, source, destination)
        if context is None or not len(context):
            return cls(source, destination, time_s, NO_CONTEXT)
        if source is None:
            raise ValueError("a context says where the source is; give that source")
        if source.extra_bits:
            raise ValueError(
                f"beside a context the source must be an address or a prefix of whole bytes, not {source}: "
                f"give one like /{8 * source.known_bytes} or /{8 * source.known_bytes + 8}"
            )
        check_context(context, source, time_s)
        return cls(source, destination, time_s, context)

    @property
    def has_partial_byte(self) -> bool:
        """Whether source or destination is a prefix that does not end on a byte."""
        return any(end is not None and end.extra_bits for end in (self.src, self.dst))

    def variants(self, src_known: SrcKnown) -> Iterator[Query]:
        """The query with as much of the source known as `src_known` says; several for "auto", the shortest prefix first."""
        if self.src is None:
            yield self
            return
        for known_bytes in known_lengths(src_known, self.src):
            yield dataclasses.replace(self, src=self.src.cut(known_bytes))


def check_context(context: Context, source: Endpoint, time_s: int | None) -> None:
    """ValueError unless every row is a ping of the source, or the context of one host or of any source, and from a second
    before `time_s`.

    Where a time is not known, it is not checked.
    """
    foreign = np.zeros(len(context), bool) if context.one_host or context.any_source else ~source.covers(context.src)
    if foreign.any():
        raise ValueError(
            f"the context holds a ping of {format_address(context.src[foreign.argmax()].tobytes())}, but the query is "
            f"about {source}; leave that out, or pass one_host=True (--one-host) if both are addresses of one host, or "
            "any_source=True (--any-source) if pings of other hosts are meant as evidence"
        )
    if time_s is None or context.time_s is None or not len(context) or context.time_s.max() < time_s:
        return
    latest, queried = (
        dt.datetime.fromtimestamp(int(second), dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for second in (context.time_s.max(), time_s)
    )
    raise ValueError(
        f"the context holds a measurement of {latest}, which is not earlier than the query at {queried}; leave out "
        "measurements at or after the second of the query"
    )


def known_lengths(src_known: SrcKnown, src: Endpoint) -> list[int]:
    """Bytes of a source that are known under `src_known`, ascending, a partial one counted; ValueError if it is invalid."""
    most = src.known_bytes + bool(src.extra_bits)
    if src_known == "auto":
        return sorted({min(n, most) for n in (*_AUTO_BYTES[src.width], most)})
    if src_known in ("all", "none"):
        return [most if src_known == "all" else 0]
    bits = int(src_known) if _BITS.fullmatch(str(src_known)) else -1
    if bits % 8 or not 0 <= bits <= 8 * src.width:
        raise ValueError(
            f"src_known={src_known!r} must be auto, all, none, or a prefix length of whole bytes up to {8 * src.width}"
        )
    return [min(bits // 8, most)]


def known_name(src: Endpoint | None) -> str:
    """How an answer names the known part of a source, if any: none, /16, all."""
    return "all" if src is None or not src.is_prefix else "none" if not src.known_bits else f"/{src.known_bits}"
