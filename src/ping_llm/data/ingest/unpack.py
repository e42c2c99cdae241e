"""Dump files in, blocks of whole lines out: packed or plain (see decompress), one JSON result a line or an array of them.

The arrays of the Atlas API (`[…]`, and `{"<probe id>": […]}` of its latest results) are turned into lines, one an element;
so are objects of several lines one after another, and the results in reports (see json_reports). Text is UTF-8; what begins
with the byte order mark of UTF-16 or UTF-32 is turned into that.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ping_llm.data.ingest.decompress import BLOCK_BYTES, Source, plain_blocks
from ping_llm.data.ingest.json_reports import find_reports, results_of

MAX_LINE_BYTES = 1 << 20
"""A longer line is no Atlas result; it is passed on as one byte that is no JSON, so that it still counts as a line."""
CHUNK_LINES = 400_000
"""Of a chunk, about as many at most, three times those of a chunk of results: a line takes memory however short it is."""

_UNREADABLE_LINE = b"!\n"
_BEGIN_BYTES = 1 << 12  # that show the shape of a dump
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_WIDE = {  # the marks of UTF-32 first: that of UTF-16 begins one of them
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MARKS_OF_LINES = re.compile(rb"^(?:\xef\xbb\xbf)+", re.MULTILINE)
_ARRAY = re.compile(rb"\s*\[(?!\d{6,}(?:\.\d+)?\] )")  # no time stamp of a log
_LATEST = re.compile(rb'\s*\{(?=\s*"-?\d+"\s*:\s*\[)')
_EMPTY = re.compile(rb"\s*\{\s*\}\s*\Z")  # the latest results of no probe
_SPREAD = re.compile(rb'\s*\{(?:[^\n]*\n\s*"|\s*\n)')  # the second line begins with a member
_BETWEEN_ELEMENTS = re.compile(r'(?:[\s\ufeff,\[\]}]|"-?\d+"\s*:)*')
_NOT_SPACE = re.compile(r"\S")
_IN_STRING, _OUTSIDE = re.compile(r'\\.?|"', re.DOTALL), re.compile(r'["\[\]{}]')


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
                lines += int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n")))
                if file.tell() >= chunk_bytes or lines >= CHUNK_LINES:
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
    source = Source(plain_blocks(path, damage))
    begin = source.peek(_BEGIN_BYTES)
    if name := next((name for mark, name in _WIDE.items() if begin.startswith(mark)), ""):
        source = Source(_as_utf8(source.rest(), name))
        begin = source.peek(_BEGIN_BYTES)
    while begin.startswith(_BYTE_ORDER_MARK):
        source.take(len(_BYTE_ORDER_MARK))
        begin = source.peek(_BEGIN_BYTES)
    if begin.lstrip()[:1] in (b"[", b"{"):
        reports, blocks = find_reports(source.rest())
        if reports:
            return whole_lines(_elements(results_of(blocks, path.name, damage), path.name, damage, in_array=False))
        source = Source(blocks)
        begin = source.peek(_BEGIN_BYTES)
    if _EMPTY.match(begin):
        return iter(())
    if shape := _LATEST.match(begin) or _ARRAY.match(begin):
        source.take(shape.end())
        return whole_lines(_elements(source.rest(), path.name, damage))
    if _SPREAD.match(begin):
        return whole_lines(_elements(source.rest(), path.name, damage, in_array=False))
    return _without_marks(whole_lines(source.rest()))


def _as_utf8(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for block in blocks:
        yield decoder.decode(block).encode()


def _without_marks(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks of whole lines without the byte order marks of files that were put together."""
    for block in blocks:
        yield _MARKS_OF_LINES.sub(b"", block) if _BYTE_ORDER_MARK in block else block


def whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks cut anywhere, of at most MAX_LINE_BYTES, to blocks cut at line ends; each line ends in a newline.

    A line above MAX_LINE_BYTES becomes one that cannot be read, and memory holds no more of it than that.
    """
    rest, skipping = bytearray(), False
    for block in blocks:
        first = block.find(b"\n") + 1
        if first and (skipping or len(rest) + first - 1 > MAX_LINE_BYTES):
            yield _UNREADABLE_LINE
            block, rest, skipping = block[first:], bytearray(), False
        elif not first:
            skipping = skipping or len(rest) + len(block) > MAX_LINE_BYTES
            rest = bytearray() if skipping else rest + block
            continue
        end = block.rfind(b"\n") + 1
        if end:
            yield bytes(rest) + block[:end]
            rest = bytearray()
        rest += block[end:]
    if skipping or rest:
        yield _UNREADABLE_LINE if skipping else bytes(rest) + b"\n"


def _elements(blocks: Iterable[bytes], name: str, damage: list[str], in_array: bool = True) -> Iterator[bytes]:
    """The elements of a JSON array, its opening bracket already taken, or of a stream of JSON, as lines."""
    utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # bytes that are no UTF-8 go through as they are
    rest, skipped = "", _Skipped()
    for block in blocks:
        text = utf8.decode(block)
        if skipped.open:
            end = skipped.end(text)
            if skipped.open:
                continue
            yield _UNREADABLE_LINE
            text = text[end:]
        lines, rest = _take_elements(rest + text, final=False)
        yield _to_lines(lines)
        if len(rest) > MAX_LINE_BYTES:
            skipped = _Skipped()
            skipped.end(rest[_end_of_gap(rest, 0) :])
            if not skipped.open:  # it has an end, so it is no JSON
                break
            rest = ""
    if skipped.open:
        yield _UNREADABLE_LINE
    lines, rest = _take_elements(rest + utf8.decode(b"", final=True), final=True)
    yield _to_lines(lines)
    unread = rest[_end_of_gap(rest, 0) :]
    if unread:
        yield _to_lines([unread[: BLOCK_BYTES // 4]])
        damage.append(f"{name} is cut off or corrupt: JSON ends at {unread[:40]!r}; get it again")
    elif in_array and "]" not in rest:
        damage.append(f"{name} is cut off: its JSON array has no end; get it again")


class _Skipped:
    """An element that is too long to be kept: of its text, which comes in parts, only the end is sought."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    @property
    def open(self) -> bool:
        """Whether it began and did not end yet."""
        return self._depth > 0 or self._in_string

    def end(self, text: str) -> int:
        """How much of the next part is of the element."""
        at, self._escaped = int(self._escaped), False
        while match := (_IN_STRING if self._in_string else _OUTSIDE).search(text, at):
            at, token = match.end(), match[0]
            if token == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                self._escaped = len(token) == 1  # by the first character of the next part
            else:
                self._depth += 1 if token in "[{" else -1
            if not self.open:
                return at
        return len(text)


def _take_elements(text: str, final: bool) -> tuple[list[str], str]:
    """The whole elements that `text` begins with, and the rest; unless `final`, the last one counts only if more follows."""
    decode = json.JSONDecoder().raw_decode
    elements: list[str] = []
    taken = 0
    while True:
        begin = _end_of_gap(text, taken)
        if begin == len(text):
            return elements, "".join(text[taken:].split())  # white space of any length
        try:
            _, end = decode(text, begin)
        except (ValueError, RecursionError):
            break
        if not final and not _NOT_SPACE.search(text, end):
            return elements, text[begin : end + 1]
        elements.append(text[begin:end])
        taken = end
    return elements, text[taken:]


def _end_of_gap(text: str, begin: int) -> int:
    """Where the next element begins."""
    between = _BETWEEN_ELEMENTS.match(text, begin)
    return between.end() if between else begin


def _to_lines(elements: list[str]) -> bytes:
    """A newline inside JSON can only be white space between tokens, or an error."""
    lines = [element.replace("\n", " ") + "\n" for element in elements]
    lines = [line if len(line) <= MAX_LINE_BYTES else _UNREADABLE_LINE.decode() for line in lines]
    return "".join(lines).encode("utf-8", "surrogateescape")
