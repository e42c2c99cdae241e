"""Byte keys in, portable 32-bit hashes out: the same on every machine, in every process and library version."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np


def crc32(keys: np.ndarray, salt: bytes = b"") -> np.ndarray:
    """zlib.crc32(salt + key) of each of (n, k) uint8 keys: (n,) uint32."""
    table = _crc_table()
    state = np.full(len(keys), zlib.crc32(salt) ^ 0xFFFFFFFF, dtype=np.uint32)
    for column in keys.T:
        state = table[(state ^ column) & 0xFF] ^ (state >> np.uint32(8))
    return state ^ np.uint32(0xFFFFFFFF)


def mix(hashes: np.ndarray) -> np.ndarray:
    """Scrambles (n,) uint32 hashes one to one (the finaliser of MurmurHash3).

    CRC is linear: neighbouring keys differ in a fixed pattern of bits, and the CRC of a pair is the XOR of two halves. Taken
    as they are, held-out pairs would form whole blocks of sources × destinations.
    """
    h = hashes.astype(np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def hash_keys(keys: np.ndarray, salt: bytes = b"") -> np.ndarray:
    """(n, k) uint8 keys to (n,) uint32 hashes: mix(crc32(salt + key))."""
    return mix(crc32(keys, salt))


def hash_below(hashes: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
    """(n,) uint32 hashes spread evenly over 0 … limit − 1: int64."""
    return ((hashes.astype(np.uint64) * np.asarray(limits, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)


def int64_bytes(*columns: np.ndarray) -> np.ndarray:
    """(n,) integer columns side by side as big-endian bytes: (n, 8 · columns) uint8."""
    stacked = np.stack(columns, axis=1).astype(">i8")
    return stacked.view(np.uint8).reshape(len(stacked), 8 * len(columns))


@cache
def _crc_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0xEDB88320), table >> 1).astype(np.uint32)
    return table
