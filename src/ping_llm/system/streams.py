"""The standard streams of a process in, streams whose printing ends no run out.

A stream may be of an encoding that lacks a character, closed, a pipe whose reader has left, or a file on a full disk. What
it does not take is dropped, and `lost_output` says so.
"""

from __future__ import annotations

import codecs
import errno
import io
import locale
import os
import select
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PLAIN = {
    "→": "->",
    "←": "<-",
    "−": "-",
    "–": "-",
    "×": "x",
    "÷": "/",
    "·": "*",
    "≤": "<=",
    "≥": ">=",
    "µ": "u",
    "’": "'",
}
_PLAIN |= dict.fromkeys("─━═╌╍┄┅╴╶╸╺╼╾", "-") | dict.fromkeys("│┃║╎╏┆┇╵╷╹╻╽╿", "|")
_BOXES, _BLOCKS = range(0x2500, 0x2580), range(0x2580, 0x25A0)
_RAW_BYTES = range(0xDC80, 0xDD00)  # of a file name that is no text, as Python reads it
_UTF8_LOCALES = ("C.UTF-8", "C.utf8", "UTF-8", "en_US.UTF-8")
_ERRORS = "ping_llm.plain"


@contextmanager
def steady_streams() -> Iterator[None]:
    """Inside, nothing that is printed raises; standard input, and text files of no named encoding, are UTF-8 in any locale.

    Streams that somebody has put in the place of those of the process, as tests and notebooks do, are left as they are.
    """
    locale_before, utf8_before = locale.setlocale(locale.LC_CTYPE), os.environ.get("PYTHONUTF8")
    _take_utf8()
    was_closed = [_open_if_closed(descriptor) for descriptor in range(3)]
    before = sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, for the rest of the process
    elif sys.stdin is sys.__stdin__ and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            setattr(sys, name, _steady(getattr(sys, name), descriptor, was_closed[descriptor]))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
        locale.setlocale(locale.LC_CTYPE, locale_before)
        if utf8_before is None:
            os.environ.pop("PYTHONUTF8", None)
        else:
            os.environ["PYTHONUTF8"] = utf8_before


def lost_output() -> str:
    """Why standard output did not take what was printed so far; empty if it did, or if its reader left as `head` does."""
    sys.stdout.flush()
    descriptor = _descriptor()
    return "" if descriptor is None else descriptor.lost


def check_standard_output() -> None:
    """ValueError if standard output is closed."""
    descriptor = _descriptor()
    if descriptor is not None and descriptor.was_closed:
        raise ValueError("standard output is closed; name a file")


def print_data(text: str) -> None:
    """Prints what programs read: as UTF-8, whatever the locale."""
    sys.stdout.flush()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()
    else:
        sys.stdout.write(text)


class _Descriptor(io.RawIOBase):
    """A descriptor that takes all that is written to it; `lost` says why some of it was dropped."""

    def __init__(self, descriptor: int, was_closed: bool) -> None:
        self.descriptor, self.was_closed, self.lost = descriptor, was_closed, ""

    def write(self, data: ReadableBuffer) -> int:
        while not self.was_closed:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:  # somebody else has made the pipe so
                select.select([], [self.descriptor], [])
            except OSError as error:
                if error.errno != errno.EPIPE:  # else the reader has seen enough
                    self.lost = self.lost or str(error.strerror)
                break
        else:
            self.lost = "it is closed"
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)


def _take_utf8() -> None:
    """Makes UTF-8 the encoding of text files of this process and of the Python processes that it starts."""
    os.environ["PYTHONUTF8"] = "1"
    for name in () if "UTF-8" in locale.getencoding().upper() else _UTF8_LOCALES:
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            return


def _steady(stream: io.TextIOWrapper | None, descriptor: int, was_closed: bool) -> io.TextIOWrapper:
    """A stream like `stream`, None for one that was closed, that never raises."""
    buffer = io.BufferedWriter(_Descriptor(descriptor, was_closed))
    if stream is None:
        return io.TextIOWrapper(buffer, "utf-8", _ERRORS)
    stream.flush()
    by_line, at_once = stream.line_buffering, stream.write_through
    return io.TextIOWrapper(buffer, stream.encoding, _ERRORS, line_buffering=by_line, write_through=at_once)


def _descriptor() -> _Descriptor | None:
    """That of standard output; None if somebody has put another stream there."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Descriptor) else None


def _open_if_closed(descriptor: int) -> bool:
    """Opens one of the first three descriptors on nothing if it is closed, else the next file that is opened would be
    standard output to some; whether it was closed."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
        os.set_inheritable(opened, True)
        return True
    return False


def _in_plain_characters(error: UnicodeError) -> tuple[str | bytes, int]:
    """What is printed for a character that the encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    code, after = ord(character), error.start + 1
    if code in _RAW_BYTES:
        return bytes([code & 0xFF]), after
    plain = _PLAIN.get(character) or ("+" if code in _BOXES else "#" if code in _BLOCKS else "")
    return plain or unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?", after


codecs.register_error(_ERRORS, _in_plain_characters)
