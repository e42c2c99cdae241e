"""A URL in, a whole file out: asked for politely, retried with patience, resumed where it broke off, its size checked."""

from __future__ import annotations

import gzip
import http.client
import json
import random
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from ping_llm.system.files import write_atomically

BLOCK_BYTES = 1 << 18
LONGEST_BACKOFF_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
"""A server that asks for a longer wait is left alone: the command says so and ends."""

_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}
_DETAIL_BYTES = 4096
_BZ2_MAGIC = b"BZh"
T = TypeVar("T")


class Transient(Exception):
    """A failure that another try may not meet, how long the server asks to wait, and the bytes kept for that try."""

    def __init__(self, reason: str, wait_s: float = 0.0, kept: int = 0) -> None:
        super().__init__(reason)
        self.wait_s, self.kept = wait_s, kept


class Refused(ValueError):
    """An answer that another try would meet again."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """The download was given up because another one failed."""


class _Changed(Exception):
    """The server now has another file than the one that was begun."""


@dataclass(frozen=True)
class Manners:
    """How often, how many at once and how patiently a server is asked."""

    requests_per_s: float = 2.0
    parallel: int = 2
    tries: int = 8  # without a byte of progress
    backoff_s: float = 1.0  # before the second try; doubles up to LONGEST_BACKOFF_S, and half of it is drawn
    timeout_s: float = 30.0  # without a byte
    seed: int | None = None  # of what is drawn; None = another one each time

    def __post_init__(self) -> None:
        if not 0 < self.requests_per_s < float("inf"):
            raise ValueError(f"requests_per_s={self.requests_per_s} must be above 0")
        for name in ("parallel", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class Client:
    """Asks servers for what several threads want, all within the same manners."""

    def __init__(self, manners: Manners, key: str = "") -> None:
        if not re.fullmatch(r"[!-~]*", key):
            raise ValueError("the API key holds spaces or characters that no key has; set it again")
        self.manners = manners
        self._key = key
        self._lock = threading.Lock()
        self._next_turn = time.monotonic()
        self._reached = False
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends all downloads at their next block or wait."""
        self._stopped.set()

    def persist(self, name: str, attempt: Callable[[], T]) -> T:
        """Repeats what raises Transient until it succeeds; ValueError after `tries` failures without progress."""
        rng = random.Random(None if self.manners.seed is None else f"{self.manners.seed} {name}")
        failures = best = 0
        while True:
            try:
                return attempt()
            except Transient as error:
                failures = 1 if error.kept > best else failures + 1
                best = max(best, error.kept)
                if failures >= self.manners.tries:
                    raise ValueError(
                        f"{name}: {error}, {failures} times in a row; run the command again later: it continues"
                    ) from None
                backoff_s = min(self.manners.backoff_s * 2 ** (failures - 1), LONGEST_BACKOFF_S)
                wait_s = max(error.wait_s, backoff_s * (0.5 + rng.random() / 2))
                print(f"{name}: {error}; again in {wait_s:.1f} s", file=sys.stderr, flush=True)
                if error.wait_s:
                    self._hold_all(wait_s)
            self._sleep(wait_s)

    @contextmanager
    def get(self, url: str, headers: dict[str, str], with_key: bool = False) -> Iterator[http.client.HTTPResponse]:
        """A good answer, its body unread; Transient, Refused, or ValueError if no server was ever reached."""
        self._take_turn()
        own = {"User-Agent": "ping-llm", "Accept-Encoding": "identity"}
        request = urllib.request.Request(url, headers=own | headers)
        if with_key and self._key:
            request.add_unredirected_header("Authorization", f"Key {self._key}")  # no other server gets to see it
        try:
            response = urllib.request.urlopen(request, timeout=self.manners.timeout_s)
        except urllib.error.HTTPError as error:
            self._reached = True
            with error:
                raise _refusal(url, error) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(url, error) from None
        self._reached = True
        with response:
            if response.headers.get_content_type() == "text/html":
                raise Transient("a web page came instead of data")
            if response.length is None and not response.chunked:
                raise ValueError(
                    f"{url}: the server does not say how long its answer is; nobody could tell if it is whole"
                )
            yield response

    def blocks(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The body of an answer as it comes in; Transient if it breaks off before its promised end."""
        promised, received = response.length, 0
        while received != promised:
            if self._stopped.is_set():
                raise Stopped
            try:
                block = response.read1(BLOCK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise Transient(f"the answer broke off after {received:,} bytes ({_reason(error)})") from None
            if not block:
                break
            received += len(block)
            yield block
        if promised is not None and received != promised:
            raise Transient(f"the answer broke off after {received:,} of {promised:,} bytes")

    def _unreachable(self, url: str, error: Exception) -> Exception:
        reason = getattr(error, "reason", error)
        host = urlsplit(url).netloc
        if isinstance(reason, ssl.SSLCertVerificationError):
            return ValueError(f"{host} shows a certificate that cannot be trusted ({reason.verify_message})")
        if self._reached:
            return Transient(f"{host} cannot be reached ({_reason(reason)})")
        return ValueError(
            f"{host} cannot be reached ({_reason(reason)}); is this machine offline, or the address wrong?"
        )

    def _take_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next_turn)
            self._next_turn = begin + 1 / self.manners.requests_per_s
        self._sleep(begin - now)

    def _hold_all(self, seconds: float) -> None:
        with self._lock:
            self._next_turn = max(self._next_turn, time.monotonic() + seconds)

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(max(seconds, 0.0)):
            raise Stopped


def download_file(client: Client, url: str, part: Path, progress: Callable[[float], None]) -> dict:
    """One try to bring a .bz2 file to `part`, from where the last try ended if the server still has the same file.

    What the server said of the file is kept beside it, so that a later process can resume too. `progress` is told the
    share that is there, short of all. Gives {"etag", "last_modified"}.
    """
    note = part.with_name(f"{part.name}.json")
    have, told = _resume_point(part, note, url)
    if have == 0 or have != told["bytes"]:
        headers = {"Range": f"bytes={have}-", "If-Range": told["etag"] or told["last_modified"]} if have else {}
        try:
            with client.get(url, headers) as response:
                if response.status == http.client.PARTIAL_CONTENT:
                    _check_range(response, have, told)
                else:
                    have, told = 0, _validators(response, url)
                    part.write_bytes(b"")  # before the note: an empty part never resumes
                    write_atomically(note, json.dumps(told))
                with part.open("ab") as file:
                    for block in client.blocks(response):
                        file.write(block)
                        file.flush()  # so that a killed process has lost nothing that came
                        have += len(block)
                        progress(min(have / told["bytes"], 0.99) if told["bytes"] else 0.0)
        except Transient as error:
            raise Transient(str(error), error.wait_s, have) from None
        except _Changed as error:
            note.unlink(missing_ok=True)
            raise Transient(str(error)) from None
        except Refused as error:
            if error.status != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            note.unlink(missing_ok=True)
            raise Transient("the server has no such range of the file any more") from None
    assert told["bytes"] in (None, part.stat().st_size), part
    with part.open("rb") as file:
        begin = file.read(len(_BZ2_MAGIC))
    if begin != _BZ2_MAGIC:
        note.unlink()
        raise Transient(f"no .bz2 file came, but one that begins with {begin!r}")
    return {name: told[name] for name in ("etag", "last_modified")}


def download_results(client: Client, url: str, part: Path, format: Literal["txt", "json"], packed: bool) -> dict:
    """One try to bring results of the Atlas API to `part`, as gzip if `packed`: a broken try leaves nothing to resume.

    Gives {"empty", "results": lines (txt only), "etag", "last_modified"}.
    """
    head, tail, newlines = b"", b"", 0
    with client.get(url, {}, with_key=True) as response, part.open("wb") as raw:
        # Without name and time in its head, the same results are the same bytes.
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) if packed else nullcontext(raw) as file:
            for block in client.blocks(response):
                file.write(block)
                head = (head + block)[:_DETAIL_BYTES]
                tail = (tail + block)[-_DETAIL_BYTES:]
                newlines += block.count(b"\n")
        told = _validators(response, url)
    if newlines <= 1 and re.match(rb'\s*\{\s*"error"\s*:', head):
        raise Transient(f"the server answered with an error ({_detail(head)})")
    begin, end, nothing = {"txt": (b"{", b"}", b""), "json": (b"[", b"]", b"[]")}[format]
    empty = re.sub(rb"\s", b"", head) == nothing
    if not empty and not head.lstrip().startswith(begin):
        raise Transient(f"no results came, but what begins with {head[:40]!r}")
    if not empty and not tail.rstrip().endswith(end):
        raise Transient(f"the results break off; they end with {tail[-40:]!r}")
    lines = {"results": 0 if empty else newlines + (not tail.endswith(b"\n"))} if format == "txt" else {}
    return {"empty": empty, **lines, "etag": told["etag"], "last_modified": told["last_modified"]}


def _resume_point(part: Path, note: Path, url: str) -> tuple[int, dict]:
    """The bytes that are there of a file, and what the server said of it; 0 if they cannot be told from another file's."""
    try:
        have, told = part.stat().st_size, json.loads(note.read_text())
    except (FileNotFoundError, ValueError):
        return 0, {}
    known = told["url"] == url and told["bytes"] is not None and (told["etag"] or told["last_modified"])
    return (have, told) if known and have <= told["bytes"] else (0, {})


def _validators(response: http.client.HTTPResponse, url: str) -> dict:
    """What tells this version of a file from another; a weak ETag does not."""
    etag = response.headers.get("ETag")
    return {
        "url": url,
        "bytes": response.length,
        "etag": None if etag and etag.startswith("W/") else etag,
        "last_modified": response.headers.get("Last-Modified"),
    }


def _check_range(response: http.client.HTTPResponse, have: int, told: dict) -> None:
    """Raises _Changed unless what comes is the rest of the file that was begun."""
    if not have:
        raise _Changed("the server sent a part of the file that nobody asked for")
    now = _validators(response, "")
    asked = f"bytes {have}-{told['bytes'] - 1}/{told['bytes']}"
    same = all(now[name] in (None, told[name]) for name in ("etag", "last_modified"))
    if response.headers.get("Content-Range") != asked or not same:
        raise _Changed("the file changed on the server; from its beginning")


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    """Transient or Refused, by the status of an answer."""
    if error.code in _MAY_PASS:
        wait_s = _retry_after_s(error.headers.get("Retry-After"))
        if wait_s > LONGEST_RETRY_AFTER_S:
            text = f"{urlsplit(url).netloc} asks to wait {wait_s:,.0f} s ({error.code} {error.reason})"
            return ValueError(f"{text}; run the command again after that: it continues")
        return Transient(f"{error.code} {error.reason}", wait_s)
    try:
        detail = _detail(error.read(_DETAIL_BYTES))
    except (OSError, http.client.HTTPException):
        detail = ""
    return Refused(f"{url}: {error.code} {error.reason}{detail and f' ({detail})'}", error.code)


def _retry_after_s(text: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 if it asks for nothing one can read."""
    if re.fullmatch(r"[0-9]{1,9}", (text or "").strip()):
        return float(text)
    try:
        until = parsedate_to_datetime(text or "")
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max((until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _detail(body: bytes) -> str:
    """What an error of the Atlas API says, in one line; empty if it says nothing."""
    try:
        error = json.loads(body)["error"]
        return " ".join(str(error.get("detail") or error.get("title") or error).split())[:200]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _reason(error: Exception | str) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
