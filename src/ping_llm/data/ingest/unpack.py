"""Dump files in, blocks of whole lines out: .bz2, .gz, .zst or plain; one JSON result a line, or an array of results.

The compression is recognised by the first bytes of a file, not by its name. The arrays of the Atlas API (`[…]`, and
`{"<probe id>": […]}` of its latest results) are turned into lines, one an element; so are objects of several
lines one after another, and the results in reports (see json_reports).
"""

from __future__ import annotations

import bz2
import codecs
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ping_llm.data.ingest.json_reports import find_reports, results_of

BLOCK_BYTES = 1 << 20
READ_BYTES = 1 << 18
MAX_LINE_BYTES = 1 << 20
"""A longer line is no Atlas result; it is passed on as one byte that is no JSON, so that it still counts as a line."""

_UNREADABLE_LINE = b"!\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARRAY = re.compile(rb"\s*\[")
_LATEST = re.compile(rb'\s*\{(?=\s*"-?\d+"\s*:\s*\[)')
_EMPTY = re.compile(rb"\s*\{\s*\}\s*\Z")  # the latest results of no probe
_SPREAD = re.compile(rb'\s*\{(?:[^\n]*\n\s*"|\s*\n)')  # the second line begins with a member
_BETWEEN_ELEMENTS = re.compile(r'(?:[\s,\[\]}]|"-?\d+"\s*:)*')
_NOT_SPACE = re.compile(r"\S")


class DamagedDump(ValueError):
    """A dump that cannot be read to its end; all that could be read was given out before."""


def read_chunks(path: Path, scratch: Path, chunk_bytes: int) -> Iterator[int]:
    """Cuts a dump into chunks of about `chunk_bytes`, all in the file `scratch`: each is overwritten by the next.

    Gives the number of lines of each, blank ones too.

    Raises DamagedDump, after the last chunk, if the dump cannot be read to its end.
    """
    damage: list[str] = []
    blocks, more = read_lines(path, damage), True
    with scratch.open("wb") as file:
        while more:
            file.seek(0)  # over the chunk before: its pages are at hand, new ones would have to be cleared
            lines, more = 0, False
            for block in blocks:
                file.write(block)
                lines += block.count(b"\n")
                if file.tell() >= chunk_bytes:
                    more = True
                    break
            file.truncate()
            file.flush()
            if lines:
                yield lines
    scratch.unlink()
    if damage:
        raise DamagedDump(damage[0])


def read_lines(path: Path, damage: list[str]) -> Iterator[bytes]:
    """Blocks of whole lines of a dump, one result a line; what is wrong with it is appended to `damage`, the cause first."""
    blocks = _unpack(path, damage)
    first = next(blocks, b"").removeprefix(_BYTE_ORDER_MARK)
    if first.lstrip()[:1] in (b"[", b"{"):
        reports, blocks = find_reports(chain([first], blocks))
        if reports:
            return whole_lines(_elements(results_of(blocks, path.name, damage), path.name, damage, in_array=False))
        first = next(blocks)
        if _EMPTY.match(first):
            return iter(())
        if _SPREAD.match(first) and not _LATEST.match(first):
            return whole_lines(_elements(chain([first], blocks), path.name, damage, in_array=False))
    if shape := _LATEST.match(first) or _ARRAY.match(first):
        return whole_lines(_elements(chain([first[shape.end() :]], blocks), path.name, damage))
    return whole_lines(chain([first], blocks))


def _unpack(path: Path, damage: list[str]) -> Iterator[bytes]:
    """The plain bytes of a dump in blocks of at most BLOCK_BYTES, up to where it cannot be read or unpacked."""
    with path.open("rb") as file:
        packed = _read_some(file, path.name, damage)
        new_stream = _decompressor_of(packed)
        stream, begin = new_stream and new_stream(), 0
        while packed:
            if stream is None:
                plain, rest = packed, b""
            else:
                try:
                    plain = stream.decompress(packed)
                except Exception as error:  # each library has its own, and zstandard's derives from Exception alone
                    between = f"between bytes {begin:,} and {begin + len(packed):,}"
                    return damage.append(f"{path.name} is corrupt {between} ({error}); get it again")
                rest = stream.unused_data
            for at in range(0, len(plain), BLOCK_BYTES):
                yield plain[at : at + BLOCK_BYTES]
            begin += len(packed) - len(rest)
            packed = rest or _read_some(file, path.name, damage)
            if new_stream and stream and stream.eof and packed:
                stream = new_stream()
        if stream is not None and not stream.eof:
            damage.append(f"{path.name} is cut off: its compressed stream has no end at byte {begin:,}; get it again")


def _read_some(file: BinaryIO, name: str, damage: list[str]) -> bytes:
    """The next bytes of a dump; an error of the disk ends it as damage does."""
    at = file.tell()
    try:
        return file.read(READ_BYTES)
    except OSError as error:
        damage.append(f"{name} cannot be read at byte {at:,} ({error.strerror}); check the file and the disk")
        return b""


def whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks cut anywhere to blocks cut at line ends; the last line gets its newline if it has none."""
    rest, skipping = b"", False
    for block in blocks:
        if skipping:
            _, newline, block = block.partition(b"\n")
            skipping = not newline
        end = block.rfind(b"\n") + 1
        if end:
            yield rest + block[:end]
            rest = block[end:]
        else:
            rest += block
        if len(rest) > MAX_LINE_BYTES:
            yield _UNREADABLE_LINE
            rest, skipping = b"", True
    if rest:
        yield rest + b"\n"


def _decompressor_of(begin: bytes) -> Callable[[], Any] | None:
    """What makes a decompressor (`decompress`, `eof`, `unused_data`) for a file that begins so; None if it is plain."""
    if begin.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if begin.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(wbits=31)
    if begin.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj
    return None


def _elements(blocks: Iterable[bytes], name: str, damage: list[str], in_array: bool = True) -> Iterator[bytes]:
    """The elements of a JSON array, its opening bracket already taken, or of a stream of JSON, as lines."""
    utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # bytes that are no UTF-8 go through as they are
    rest = ""
    for block in blocks:
        lines, rest = _take_elements(rest + utf8.decode(block), final=False)
        yield _to_lines(lines)
        if len(rest) > MAX_LINE_BYTES + BLOCK_BYTES:
            break
    lines, rest = _take_elements(rest + utf8.decode(b"", final=True), final=True)
    yield _to_lines(lines)
    unread = rest[_end_of_gap(rest, 0) :]
    if unread:
        yield _to_lines([unread[: BLOCK_BYTES // 4]])
        damage.append(f"{name} is cut off or corrupt: JSON ends at {unread[:40]!r}; get it again")
    elif in_array and "]" not in rest:
        damage.append(f"{name} is cut off: its JSON array has no end; get it again")


def _take_elements(text: str, final: bool) -> tuple[list[str], str]:
    """The whole elements that `text` begins with, and the rest; unless `final`, the last one counts only if more follows."""
    decode = json.JSONDecoder().raw_decode
    elements, taken = [], 0
    while True:
        begin = _end_of_gap(text, taken)
        if begin == len(text):
            break
        try:
            _, end = decode(text, begin)
        except (ValueError, RecursionError):
            break
        if not final and not _NOT_SPACE.search(text, end):
            break
        elements.append(text[begin:end])
        taken = end
    return elements, text[taken:]


def _end_of_gap(text: str, begin: int) -> int:
    """Where the next element begins."""
    between = _BETWEEN_ELEMENTS.match(text, begin)
    return between.end() if between else begin


def _to_lines(elements: list[str]) -> bytes:
    """A newline inside JSON can only be white space between tokens, or an error."""
    text = "".join(element.replace("\n", " ") + "\n" for element in elements)
    return text.encode("utf-8", "surrogateescape")
