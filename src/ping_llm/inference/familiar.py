"""Rows that a model was trained on in, which prefixes it has met as source and as destination out."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from ping_llm.data.hashing import hash_keys
from ping_llm.data.measurement import ADDRESS_BYTES, is_ipv4
from ping_llm.data.rows import ProbeRow

LENGTHS = {4: (1, 2, 3, 4), 16: (4, 6, 8, 16)}
"""Bytes of the prefixes that are looked at, by the width of an address."""
Role = Literal["src", "dst"]


@dataclass(frozen=True, eq=False)
class Familiar:
    """Hashes of the prefixes of LENGTHS that were met as source and as destination, ascending, (m,) uint64."""

    src: np.ndarray
    dst: np.ndarray
    src_bytes: tuple[int, int] = (4, 16)  # of IPv4 and IPv6 sources that the model reads: the others are taken as 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Familiar):
            return NotImplemented
        same = np.array_equal(self.src, other.src) and np.array_equal(self.dst, other.dst)
        return same and self.src_bytes == other.src_bytes

    def __hash__(self) -> int:
        return hash((self.src.tobytes(), self.dst.tobytes()))

    @classmethod
    def of_rows(cls, rows: Iterable[ProbeRow], src_bytes: tuple[int, int] = (4, 16)) -> Familiar:
        """Of the measurements of rows; of sources, of what a model that reads so many bytes of them sees."""
        met: tuple[set[int], set[int]] = (set(), set())
        for row in rows:
            as_read = (_as_read(row.src_addresses, src_bytes), row.dst_addresses)
            for own, addresses in zip(met, as_read, strict=True):
                own.update(np.unique(_prefix_hashes(addresses)).tolist())
        src, dst = (np.array(sorted(own), dtype=np.uint64) for own in met)
        return cls(src, dst, src_bytes)

    def known_bytes(self, role: Role, packed: np.ndarray) -> np.ndarray:
        """(n,) int64: of the longest of LENGTHS that was met of each of (n, 16) addresses in this role, else 0."""
        hashes = _prefix_hashes(_as_read(packed, self.src_bytes) if role == "src" else packed)  # (n, 4)
        met = self.src if role == "src" else self.dst
        place = np.minimum(np.searchsorted(met, hashes), max(len(met) - 1, 0))
        found = met[place] == hashes if len(met) else np.zeros(hashes.shape, dtype=bool)
        lengths = np.where(is_ipv4(packed)[:, None], LENGTHS[4], LENGTHS[16])
        return np.where(found, lengths, 0).max(axis=1)

    @cached_property
    def known_bytes_of(self) -> Callable[[Role, bytes], int]:
        """`known_bytes` of one packed address; those of the latest are kept, for a query asks several times."""
        return lru_cache(1 << 16)(
            lambda role, packed: int(self.known_bytes(role, np.frombuffer(packed, np.uint8)[None])[0])
        )

    def to_json(self) -> dict[str, Any]:
        """Both columns, of 8 bytes each, the lowest first, in base64; and the bytes of sources that are read."""
        roles = ("src", "dst")
        columns = {role: base64.b64encode(getattr(self, role).astype("<u8").tobytes()).decode() for role in roles}
        return columns | {"src_bytes": list(self.src_bytes)}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Familiar:
        """What `to_json` made of one; KeyError, TypeError or ValueError if it is damaged."""
        columns = (base64.b64decode(values[role], validate=True) for role in ("src", "dst"))
        src, dst = (np.frombuffer(column, dtype="<u8").astype(np.uint64) for column in columns)
        ipv4, ipv6 = map(int, values.get("src_bytes", (4, 16)))  # older ones knew all of a source
        return cls(src, dst, (ipv4, ipv6))


def _as_read(packed: np.ndarray, src_bytes: tuple[int, int]) -> np.ndarray:
    """Sources (n, 16) with 0 for the bytes that a model does not read."""
    read = np.where(is_ipv4(packed), ADDRESS_BYTES - 4 + src_bytes[0], src_bytes[1])
    return np.where(np.arange(ADDRESS_BYTES) < read[:, None], packed, 0).astype(np.uint8)


def _prefix_hashes(packed: np.ndarray) -> np.ndarray:
    """(n, 4) uint64, of the prefixes of LENGTHS of (n, 16) addresses, the shortest first."""
    lengths = np.array([LENGTHS[4], LENGTHS[16]]) + np.array([[ADDRESS_BYTES - 4], [0]])  # bytes of the packed address
    kept = np.where(is_ipv4(packed)[:, None], *lengths)[..., None]  # (n, 4, 1)
    cut = np.where(np.arange(ADDRESS_BYTES) < kept, packed[:, None], 0)
    keys = np.concatenate([cut, kept], axis=2).astype(np.uint8).reshape(-1, ADDRESS_BYTES + 1)
    high, low = (hash_keys(keys, salt).astype(np.uint64) for salt in (b"familiar/high", b"familiar/low"))
    return (high << np.uint64(32) | low).reshape(len(packed), len(LENGTHS[4]))
