"""A .bz2 file in, its plain bytes out, unpacked by several threads: for when there are fewer dumps than cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

BLOCK_BYTES = 1 << 20
CHECK_BYTES = 32 << 20
"""Plain bytes that are given out at a time, after a look at where their blocks begin."""
_STREAM_HEADER_BITS, _STREAM_END_BITS = 32, 80
HELD_BYTES = 3 << 19
"""Packed bytes that are not given out before those after them are read: `unpack` loses up to 256 kB before damage, and a
block of up to 900 kB is checked at its end."""


def unpack_parallel(path: Path, threads: int, unpack: Callable[[Path], Iterator[bytes]]) -> Iterator[bytes]:
    """The blocks that `unpack` gives for this file, cut elsewhere; other compressions are left to `unpack`.

    So is a damaged file, from where the threads stop: what is readable of it, and what is said of the damage, are the same.
    One kind passes unseen: a wrong checksum of the whole stream, where those of all its blocks are right.
    """
    given = 0
    for block in _unpack_bz2(path, threads):
        if block is None:
            return
        given += len(block)
        yield block
    for block in unpack(path):
        if given < len(block):
            yield block[given:]
        given = max(given - len(block), 0)


def _unpack_bz2(path: Path, threads: int) -> Iterator[bytes | None]:
    """Blocks of plain bytes; then None, if the file is whole and ends where its compressed stream does."""
    import rapidgzip

    with path.open("rb") as file:
        if file.read(3) != b"BZh":
            return
    held: deque[tuple[int, bytes]] = deque()
    unchecked = 0
    try:
        with rapidgzip.IndexedBzip2File(str(path), parallelization=threads) as file:
            while block := file.read(BLOCK_BYTES):
                held.append((file.tell_compressed() // 8, block))
                unchecked += len(block)
                if unchecked >= CHECK_BYTES:
                    if not _without_gaps(file.available_block_offsets()):
                        return
                    unchecked = 0
                    while held[0][0] + HELD_BYTES <= held[-1][0]:
                        yield held.popleft()[1]
            whole = file.tell() and -(-file.tell_compressed() // 8) == path.stat().st_size
            whole = whole and _without_gaps(file.block_offsets())
    except (RuntimeError, ValueError, OSError):
        whole = False
    if whole:
        yield from (block for _, block in held)
        yield None


def _without_gaps(plain_of_bit: dict[int, int]) -> bool:
    """Whether each stream's first block stands right after its header, by the plain byte at which each block begins.

    rapidgzip passes over a first block whose own header is damaged, in silence; further ones it misses. The end of a stream
    is a block of no plain bytes; the next stream begins at the next whole byte.
    """
    bits = sorted(plain_of_bit)
    if not bits or bits[0] != _STREAM_HEADER_BITS:
        return False
    for bit, following in pairwise(bits):
        stream_end = -(-(bit + _STREAM_END_BITS) // 8) * 8
        if plain_of_bit[bit] == plain_of_bit[following] and following not in (
            stream_end,
            stream_end + _STREAM_HEADER_BITS,
        ):
            return False
    return True
