"""The one schema of a measurement: its columns, their units, and the packing of addresses.

A measurement is one packet of one ping: its probe (`probe_id`), measurement id (`msm_id`), time (`time_s`), source (`src`),
destination (`dst`), the time until the reply (`rtt_ms`, −1 if none came), and what it is of (`kind`).

Addresses are 16 bytes, most significant first. IPv4 is stored IPv4-mapped (::ffff:a.b.c.d, RFC 4291 §2.5.5.2), so the
family can be read off the bytes and equal hosts have equal keys.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ping_llm.data.special_purpose import is_public as is_public

FAILED_RTT_MS = -1.0
ADDRESS_BYTES = 16
IPV4_MAPPED_PREFIX = bytes(10) + b"\xff\xff"

KINDS = ("ping", "target", "hop")
"""A packet of a ping; the reply of a traceroute's target; the reply of a router on the way."""

MEASUREMENT_SCHEMA = pa.schema(
    [
        ("probe_id", pa.int64()),  # RIPE Atlas prb_id; −1 if unknown: then the source address names the group
        ("msm_id", pa.int64()),
        ("time_s", pa.int64()),  # Unix seconds, UTC
        ("src", pa.binary(ADDRESS_BYTES)),
        ("dst", pa.binary(ADDRESS_BYTES)),
        ("ip_version", pa.uint8()),  # 4 or 6, of dst
        ("rtt_ms", pa.float32()),  # −1 = failed
        ("kind", pa.uint8()),  # into KINDS
    ]
)


def pack_address(text: str) -> bytes:
    """The 16 bytes of an address, IPv4 as IPv4-mapped; ValueError if `text` is no address."""
    try:
        return IPV4_MAPPED_PREFIX + socket.inet_pton(socket.AF_INET, text)
    except (OSError, ValueError):  # a character that no address has
        pass
    try:
        return socket.inet_pton(socket.AF_INET6, text)
    except (OSError, ValueError):
        raise ValueError(f"{text!r} is not an IPv4 or IPv6 address") from None


def format_address(packed: bytes) -> str:
    """The text of 16 packed bytes: dotted quad for IPv4, RFC 5952 for IPv6."""
    if packed[:12] == IPV4_MAPPED_PREFIX:
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return str(ipaddress.IPv6Address(packed))


def pack_addresses(texts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Packs n addresses: (n, 16) uint8, and (n,) bool that is False where the text is no address (bytes 0)."""
    packed = bytearray(ADDRESS_BYTES * len(texts))
    valid = np.zeros(len(texts), dtype=bool)
    for i, text in enumerate(texts):
        try:
            packed[i * ADDRESS_BYTES : (i + 1) * ADDRESS_BYTES] = pack_address(text or "")
        except (ValueError, TypeError):
            continue
        valid[i] = True
    return np.frombuffer(bytes(packed), dtype=np.uint8).reshape(-1, ADDRESS_BYTES), valid


def binary_column(matrix: np.ndarray) -> pa.FixedSizeBinaryArray:
    """(n, k) uint8 as a column of k bytes."""
    buffer = pa.py_buffer(np.ascontiguousarray(matrix))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(matrix.shape[1]), len(matrix), [None, buffer])


def byte_matrix(column: pa.ChunkedArray | pa.FixedSizeBinaryArray) -> np.ndarray:
    """The inverse of `binary_column`; a view, if the column is one array."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = array.type.byte_width
    raw = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)[: width * (array.offset + len(array))]
    return raw.reshape(-1, width)[array.offset :]


def is_ipv4(packed: np.ndarray) -> np.ndarray:
    """True where (…, 16) packed addresses are IPv4."""
    words, prefix = np.ascontiguousarray(packed).view(np.uint32), np.frombuffer(IPV4_MAPPED_PREFIX, dtype=np.uint32)
    return (words[..., 0] == prefix[0]) & (words[..., 1] == prefix[1]) & (words[..., 2] == prefix[2])


def as_text(rows: np.ndarray) -> np.ndarray:
    """(n, k) uint8 as (n,) of k-byte strings, which NumPy sorts and searches byte by byte."""
    return np.ascontiguousarray(rows).view(f"S{rows.shape[1]}").reshape(-1)


def distinct_addresses(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of (m, 16) addresses, ascending, and (m,) int32 where each stands among them."""
    distinct, place = np.unique(as_text(packed), return_inverse=True)
    return distinct.view(np.uint8).reshape(-1, ADDRESS_BYTES), place.astype(np.int32)


def network_of(packed: np.ndarray, ipv4_bits: int = 24, ipv6_bits: int = 48) -> np.ndarray:
    """(n, 16) addresses with 0 for every byte after a prefix of whole bytes of their family."""
    kept = np.where(is_ipv4(packed), 12 + ipv4_bits // 8, ipv6_bits // 8)
    return np.where(np.arange(ADDRESS_BYTES) < kept[:, None], packed, 0).astype(np.uint8)


def log_rtt(rtt_ms: np.ndarray) -> np.ndarray:
    """log of RTTs in ms, float64; NaN where there is none (−1, NaN). Clocks that gave 0 count as 1 µs."""
    with np.errstate(invalid="ignore"):
        return np.where(rtt_ms >= 0, np.log(np.maximum(rtt_ms, 1e-3, dtype=np.float64)), np.nan)
