"""A URL in, a whole file out: requested politely, retried with patience, resumed where it broke off, its size checked."""

from __future__ import annotations

import gzip
import json
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from ping_llm.system.files import write_atomically
from ping_llm.system.progress import say

LONGEST_BACKOFF_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0  # if a server demands a longer wait, the command says so and ends
_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}
_DETAIL_BYTES = 4096
_BZ2_MAGIC = b"BZh"
_VALIDATORS = ("etag", "last_modified")
T = TypeVar("T")


class Transient(Exception):
    """A failure that another try may not meet."""

    wait_s = 0.0  # demanded by the server
    kept = 0  # bytes that the next try need not fetch again


class Refused(ValueError):
    """An answer that another try would meet again."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """The download was given up because another one failed."""


@dataclass(frozen=True)
class Manners:
    """The rate, the parallelism and the patience of requests to a server."""

    requests_per_s: float = 2.0
    parallel: int = 2
    tries: int = 8  # without a byte of progress
    backoff_s: float = 1.0  # before the second try; doubles up to LONGEST_BACKOFF_S, and half of it is random
    timeout_s: float = 30.0  # without a byte
    seed: int | None = None  # of what is random; None = another one each time

    def __post_init__(self) -> None:
        if not 0 < self.requests_per_s < float("inf"):
            raise ValueError(f"requests_per_s={self.requests_per_s} must be above 0")
        for name in ("parallel", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Clock:
    """How downloads see time pass; a test brings its own."""

    now: Callable[[], float] = time.monotonic
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait  # for so many seconds, or until the event


class Client:
    """Requests of several threads, all within the same manners."""

    def __init__(self, manners: Manners, key: str = "", clock: Clock | None = None) -> None:
        if not re.fullmatch(r"[!-~]*", key):
            raise ValueError("the API key holds spaces or characters that no key has; set it again")
        self.manners, self._clock = manners, clock or Clock()
        self._authorization = {"Authorization": f"Key {key}"} if key else {}
        self._http = httpx.Client(
            headers={"User-Agent": "ping-llm", "Accept-Encoding": "identity"},
            follow_redirects=True,  # without the key, where they lead to another server
            timeout=manners.timeout_s,
            verify=ssl.create_default_context(),
        )
        self._lock = threading.Lock()
        self._next_turn = self._clock.now()
        self._reached = False
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends all downloads at their next block or wait."""
        self._stopped.set()

    def persist(self, name: str, attempt: Callable[[], T]) -> T:
        """Repeats what raises Transient until it succeeds; ValueError after `tries` failures without progress."""
        rng = random.Random(None if self.manners.seed is None else f"{self.manners.seed} {name}")
        backoff = wait_exponential(self.manners.backoff_s, LONGEST_BACKOFF_S)
        best = 0

        def wait_s(state: Any) -> float:
            nonlocal best
            error = state.outcome.exception()
            if error.kept > best:  # progress: the failures are counted anew
                best, state.attempt_number = error.kept, 1
            return max(error.wait_s, backoff(state) * rng.uniform(0.5, 1.0))

        def announce(state: Any) -> None:
            error, seconds = state.outcome.exception(), state.next_action.sleep
            say(f"{name}: {error}; again in {seconds:.1f} s")
            if error.wait_s:
                with self._lock:  # all threads wait
                    self._next_turn = max(self._next_turn, self._clock.now() + seconds)

        stop, retry = stop_after_attempt(self.manners.tries), retry_if_exception_type(Transient)
        retrying = Retrying(stop=stop, retry=retry, wait=wait_s, before_sleep=announce, sleep=self._sleep, reraise=True)
        try:
            return retrying(attempt)
        except Transient as error:
            failures = f"{error}, {self.manners.tries} times in a row"
            raise ValueError(f"{name}: {failures}; run the command again later: it continues") from None

    @contextmanager
    def get(self, url: str, headers: dict[str, str], with_key: bool = False) -> Iterator[httpx.Response]:
        """A good answer, its body unread; Transient, Refused, or ValueError if no server was ever reached."""
        with self._lock:
            now = self._clock.now()
            begin = max(now, self._next_turn)
            self._next_turn = begin + 1 / self.manners.requests_per_s
        self._sleep(begin - now)
        try:
            with self._http.stream("GET", url, headers=headers | (self._authorization if with_key else {})) as response:
                self._reached = True
                if not response.is_success:
                    raise _refusal(url, response)
                if response.headers.get("Content-Type", "").startswith("text/html"):
                    raise Transient("a web page came instead of data")
                if not {"content-length", "transfer-encoding"} & response.headers.keys():
                    raise ValueError(
                        f"{url}: the server does not say how long its answer is, so nobody could tell if it is whole"
                    )
                yield response
        except (httpx.RequestError, httpx.InvalidURL) as error:
            reason = f"no whole answer from {urlsplit(url).netloc} ({str(error) or type(error).__name__})"
            if self._reached:
                raise Transient(reason) from None
            raise ValueError(f"{reason}; is this machine offline, or the address wrong?") from None

    def blocks(self, response: httpx.Response) -> Iterator[bytes]:
        """The body of an answer as it comes in."""
        for block in response.iter_raw():
            if self._stopped.is_set():
                raise Stopped
            yield block

    def _sleep(self, seconds: float) -> None:
        if self._clock.wait(self._stopped, max(seconds, 0.0)):
            raise Stopped


def download_file(client: Client, url: str, part: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """One try to bring a .bz2 file to `part`, from where the last try ended if the server still has the same file.

    What the server says of the file is kept beside it, so that a later process can resume too. `progress` gets the share
    that is there, below 1. Gives {"etag", "last_modified"}.
    """
    note = part.with_name(f"{part.name}.json")
    have, version = _resume_point(part, note, url)
    if have == 0 or have != version["bytes"]:
        headers = {"Range": f"bytes={have}-", "If-Range": version["etag"] or version["last_modified"]} if have else {}
        try:
            with client.get(url, headers) as response:
                now = _version(response, url)
                if response.status_code != httpx.codes.PARTIAL_CONTENT:
                    have, version = 0, now
                    part.write_bytes(b"")  # before the note: an empty part never resumes
                    write_atomically(note, json.dumps(version))
                elif not have or not _continues(response, now, have, version):
                    raise Refused("another part of a file than was requested", response.status_code)
                with part.open("ab") as file:
                    for block in client.blocks(response):
                        file.write(block)
                        file.flush()  # so that a killed process has lost nothing that came
                        have += len(block)
                        progress(min(have / version["bytes"], 0.99) if version["bytes"] else 0.0)
        except Transient as error:
            error.kept = have
            raise
        except Refused as error:
            if error.status not in (httpx.codes.PARTIAL_CONTENT, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE):
                raise
            note.unlink(missing_ok=True)
            raise Transient("the file changed on the server; from its beginning") from None
    with part.open("rb") as file:
        begin = file.read(len(_BZ2_MAGIC))
    if begin != _BZ2_MAGIC:
        note.unlink()
        raise Transient(f"no .bz2 file came, but one that begins with {begin!r}")
    return {name: version[name] for name in _VALIDATORS}


def download_results(
    client: Client, url: str, part: Path, format: Literal["txt", "json"], packed: bool
) -> dict[str, Any]:
    """One try to bring results of the Atlas API to `part`, as gzip if `packed`: a broken try leaves nothing to resume.

    Gives {"empty", "results": lines (txt only), "etag", "last_modified"}.
    """
    head, tail, newlines = b"", b"", 0
    with client.get(url, {}, with_key=True) as response, part.open("wb") as raw:
        # Without name and time in its head, the same results are the same bytes.
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) if packed else nullcontext(raw) as file:
            for block in client.blocks(response):
                file.write(block)
                head, tail = (head + block)[:_DETAIL_BYTES], (tail + block)[-_DETAIL_BYTES:]
                newlines += block.count(b"\n")
        version = _version(response, url)
    if newlines <= 1 and re.match(rb'\s*\{\s*"error"\s*:', head):
        raise Transient(f"the server answered with an error ({_detail(head)})")
    begin, end, nothing = {"txt": (b"{", b"}", b""), "json": (b"[", b"]", b"[]")}[format]
    empty = b"".join(head.split()) == nothing
    if not empty and not head.lstrip().startswith(begin):
        raise Transient(f"no results came, but what begins with {head[:40]!r}")
    if not empty and not tail.rstrip().endswith(end):
        raise Transient(f"the results break off; they end with {tail[-40:]!r}")
    lines = {"results": 0 if empty else newlines + (not tail.endswith(b"\n"))} if format == "txt" else {}
    return {"empty": empty, **lines, **{name: version[name] for name in _VALIDATORS}}


def _resume_point(part: Path, note: Path, url: str) -> tuple[int, dict[str, Any]]:
    """How many bytes of a file are there, and its version; 0 if another version of it could not be distinguished."""
    try:
        have, version = part.stat().st_size, json.loads(note.read_text())
    except (FileNotFoundError, ValueError):
        return 0, {}
    known = version["url"] == url and version["bytes"] is not None and any(version[name] for name in _VALIDATORS)
    return (have, version) if known and have <= version["bytes"] else (0, {})


def _version(response: httpx.Response, url: str) -> dict[str, Any]:
    """What distinguishes this version of a file from another; a weak ETag does not."""
    headers = response.headers
    size, etag = headers.get("Content-Length", ""), headers.get("ETag", "")
    etag = None if not etag or etag.startswith("W/") else etag
    size = int(size) if size.isdigit() else None
    return {"url": url, "bytes": size, "etag": etag, "last_modified": headers.get("Last-Modified")}


def _continues(response: httpx.Response, now: dict[str, Any], have: int, version: dict[str, Any]) -> bool:
    """Whether a partial answer, of the version `now`, is the rest of the version that was begun."""
    same = all(now[name] in (None, version[name]) for name in _VALIDATORS)
    return same and response.headers.get("Content-Range") == f"bytes {have}-{version['bytes'] - 1}/{version['bytes']}"


def _refusal(url: str, response: httpx.Response) -> Exception:
    """Transient or Refused, by the status of an answer."""
    status = f"{response.status_code} {response.reason_phrase}"
    if response.status_code in _MAY_PASS:
        wait_s = retry_after_s(response.headers.get("Retry-After"))
        if wait_s > LONGEST_RETRY_AFTER_S:
            text = f"{urlsplit(url).netloc} asks to wait {wait_s:,.0f} s ({status})"
            return ValueError(f"{text}; run the command again after that: it continues")
        error = Transient(status)
        error.wait_s = wait_s
        return error
    detail = _detail(next(response.iter_raw(_DETAIL_BYTES), b""))
    return Refused(f"{url}: {status}{detail and f' ({detail})'}", response.status_code)


def retry_after_s(text: str | None) -> float:
    """Seconds that a Retry-After header demands, as a number or a date; 0 if there is none or it cannot be read."""
    text = (text or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
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
