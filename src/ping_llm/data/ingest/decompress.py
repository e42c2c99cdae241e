"""A file in, its plain bytes out in blocks, whatever it is packed with: .bz2, .gz, .zst, one after another, one in another.

What a file is packed with is recognised by its bytes, not by its name. It is unpacked in small steps, so memory stays
bounded however much comes of few bytes. Other formats are recognised only to be named.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20
READ_BYTES = 1 << 18
MOST_LAYERS = 4
MAX_WINDOW_BYTES = 1 << 27
"""What zstd itself unpacks by default, and takes in memory meanwhile."""

_HEAD_BYTES = 512  # enough to recognise every format below: the magic number of tar is at byte 257
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"\xfd7zXZ\x00": "packed by xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "packed by lz4",
    b"\xff\x06\x00\x00sNaPpY": "packed by Snappy",
    b"\x1f\x9d": "packed by compress",
    b"\x1e\xb5\x2f\xfd": "packed by a zstd before 1.0",
    b"Rar!\x1a\x07": "a RAR archive",
}


@dataclass(frozen=True)
class Codec:
    """One way to pack. What `step_bytes` become is bounded, to some 30 MB, or given in blocks."""

    suffix: str
    step_bytes: int
    in_blocks: bool
    new: Callable[[], Any]  # gives `decompress`, `eof`, `unused_data`


def _zstd_stream() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


_BZ2 = Codec(".bz2", 1 << 14, True, bz2.BZ2Decompressor)  # 40 bytes may become 45 MB
_GZIP = Codec(".gz", 1 << 14, False, lambda: zlib.decompressobj(wbits=31))  # a byte becomes at most 1,032
_ZSTD = Codec(".zst", 1 << 10, False, _zstd_stream)  # four bytes become at most 128 KiB


def codec_of(begin: bytes) -> Codec | None:
    """What a file that begins so is packed with; None if it is plain, or of a format that is not read."""
    if begin.startswith(b"BZh"):
        return _BZ2
    if begin.startswith(b"\x1f\x8b"):
        return _GZIP
    # A skippable frame, as pzstd writes before each other one, holds no data.
    is_skippable = begin[1:4] == b"\x2a\x4d\x18" and 0x50 <= begin[0] <= 0x5F
    return _ZSTD if is_skippable or begin.startswith(_ZSTD_MAGIC) else None


def plain_blocks(path: Path, damage: list[str]) -> Iterator[bytes]:
    """The plain bytes of a file in blocks of BLOCK_BYTES, the last one shorter, up to where it cannot be read or unpacked.

    What is wrong is appended to `damage`, the cause first. The first block holds all that a reader needs to recognise it.
    """
    blocks = _read(path, damage)
    for _ in range(MOST_LAYERS):
        source = Source(blocks)
        if codec_of(source.peek(_HEAD_BYTES)) is None:
            break
        blocks = _unpacked(source, path.name, damage)
    else:
        source = Source(blocks)
    begin = source.peek(_HEAD_BYTES)
    if codec_of(begin):
        damage.append(f"{path.name} is packed more than {MOST_LAYERS} times over; unpack it first")
    elif kind := _foreign(begin):
        damage.append(f"{path.name} is {kind}, which is not read; unpack it first")
    else:
        yield from _in_blocks(source.rest())


class Source:
    """Bytes that come in blocks, and how many of them were taken."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks, self._block, self._at = iter(blocks), b"", 0
        self.taken = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        while len(self._block) - self._at < size:
            more = next(self._blocks, None)
            if more is None:
                break
            self._block, self._at = self._block[self._at :] + more, 0
        return self._block[self._at : self._at + size]

    def take(self, size: int) -> None:
        """Passes over bytes that `peek` gave."""
        self._at += size
        self.taken += size

    def rest(self) -> Iterator[bytes]:
        """All that was not taken; the source is not to be used after."""
        return chain([self._block[self._at :]], self._blocks)


def _read(path: Path, damage: list[str]) -> Iterator[bytes]:
    """A file in blocks; an error of the disk ends it as damage does."""
    with path.open("rb") as file:
        while True:
            at = file.tell()
            try:
                block = file.read(READ_BYTES)
            except OSError as error:
                where = f"at byte {at:,} ({error.strerror})"
                return damage.append(f"{path.name} cannot be read {where}; check the file and the disk")
            if not block:
                return None
            yield block


def _unpacked(source: Source, name: str, damage: list[str]) -> Iterator[bytes]:
    """What the streams in a source, of any codec each, hold; zeros between and behind them are padding."""
    while True:
        while source.taken and (padding := source.peek(_HEAD_BYTES)).startswith(b"\0"):
            source.take(len(padding) - len(padding.lstrip(b"\0")))
        begin = source.peek(_HEAD_BYTES)
        if not begin:
            return
        codec = codec_of(begin)
        if codec is None:
            what = _foreign(begin) or f"no stream: {begin[:8]!r}"
            damage.append(f"{name} is corrupt from byte {source.taken:,} on: there lies {what}; get it again")
            return
        if codec is _ZSTD and (why := _refused_frame(begin)):
            damage.append(f"{name} {why}")
            return
        if not (yield from _stream(source, codec, name, damage)):
            return


def _stream(source: Source, codec: Codec, name: str, damage: list[str]) -> Generator[bytes, None, bool]:
    """What one stream holds, from where the source stands; gives whether it has an end, at which the source is left."""
    stream = codec.new()
    while not stream.eof:
        packed = source.peek(codec.step_bytes)
        if not packed:
            where = f"its compressed stream has no end at byte {source.taken:,}"
            damage.append(f"{name} is cut off: {where}; get it again")
            return False
        try:
            yield stream.decompress(packed, *([BLOCK_BYTES] if codec.in_blocks else []))
            while codec.in_blocks and not (stream.eof or stream.needs_input):
                yield stream.decompress(b"", BLOCK_BYTES)
        except Exception as error:  # each library has its own, and zstandard's derives from Exception alone
            between = f"between bytes {source.taken:,} and {source.taken + len(packed):,}"
            damage.append(f"{name} is corrupt {between} ({error}); get it again")
            return False
        source.take(len(packed) - len(stream.unused_data))
    return True


def _refused_frame(begin: bytes) -> str:
    """Why zstd would not unpack a frame that is as it should be; empty if it would, or if it is damaged."""
    import zstandard

    try:
        frame = zstandard.get_frame_parameters(begin)
    except zstandard.ZstdError:
        return ""
    if frame.window_size > MAX_WINDOW_BYTES:
        needs = f"a window of {frame.window_size / 2**20:,.0f} MiB, more than the {MAX_WINDOW_BYTES >> 20} MiB that are"
        return f"is packed with {needs} read; repack it without --long: zstd -d --long=31 -c FILE | zstd > NEW"
    if frame.dict_id and begin.startswith(_ZSTD_MAGIC):  # of a skippable frame it is another number
        return f"is packed with a dictionary (number {frame.dict_id}), which is not at hand; repack it without"
    return ""


def _foreign(begin: bytes) -> str:
    """What a file that begins so is, if it is packed in a way that is not read; else empty."""
    if begin[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        return "a tar archive"
    return next((kind for magic, kind in _FOREIGN.items() if begin.startswith(magic)), "")


def _in_blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of BLOCK_BYTES, the last one shorter."""
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= BLOCK_BYTES:
            whole, end = b"".join(parts), size - size % BLOCK_BYTES
            for at in range(0, end, BLOCK_BYTES):
                yield whole[at : at + BLOCK_BYTES]
            parts, size = [whole[end:]], size - end
    if size:
        yield b"".join(parts)
