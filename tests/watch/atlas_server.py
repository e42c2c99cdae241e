"""A server on loopback that speaks the results API and the stream of RIPE Atlas, and does so badly: it cuts answers off,
leaves results out of the stream, repeats them, and gives them in any order."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class AtlasServer(ThreadingHTTPServer):
    """Of the results that it has; `faults` is the share of answers cut off, of messages left out, and so on."""

    daemon_threads = True

    def __init__(self, results: list[dict], faults: float, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.results, self.faults, self.rng = results, faults, random.Random(seed)
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.api_faults = faults
        self.plan: list[str] = []  # what is wrong with the next answers of the results API: 503, cut, or nothing

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def queries(self, path: str) -> list[dict[str, str]]:
        return [query for own, query in self.requests if own == path]

    def bad(self, share: float | None = None) -> bool:
        with self.lock:
            return self.rng.random() < (self.faults if share is None else share)

    def shuffled(self, results: list[dict]) -> list[dict]:
        with self.lock:
            return self.rng.sample(results, len(results))


@contextmanager
def serving_atlas(results: list[dict], faults: float = 0.3, seed: int = 0) -> Iterator[AtlasServer]:
    """A server at work in a thread."""
    with AtlasServer(results, faults, seed) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: AtlasServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with self.server.lock:
            self.server.requests.append((parts.path, query))
        self.close_connection = True
        with suppress(BrokenPipeError, ConnectionResetError):
            self._stream() if parts.path == "/stream/" else self._results(query)

    def _begin(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Content-Type", "text/plain")
        self.send_header("Connection", "close")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _results(self, query: dict[str, str]) -> None:
        with self.server.lock:
            fault = self.server.plan.pop(0) if self.server.plan else None
        if fault == "503" or (fault is None and self.server.bad(self.server.api_faults)):
            return self._end(503)
        wanted = [one for one in self.server.results if int(query["start"]) <= one["timestamp"] <= int(query["stop"])]
        text = "\n".join(json.dumps(one) for one in self.server.shuffled(wanted)).encode()
        cut = fault == "cut" or (fault is None and self.server.bad(self.server.api_faults))
        self._begin(200)
        self._chunk(text[: len(text) // 2] if cut and text else text or b" ")
        if not cut:
            self.wfile.write(b"0\r\n\r\n")

    def _end(self, status: int) -> None:
        self._begin(status)
        self.wfile.write(b"0\r\n\r\n")

    def _stream(self) -> None:
        self._begin(200)
        self._chunk(b'["atlas_subscribed", {"streamType": "result"}]\n')
        for one in self.server.shuffled(self.server.results):
            if self.server.bad():
                continue
            message = json.dumps(["atlas_result", one]).encode() + b"\n"
            self._chunk(message * (2 if self.server.bad() else 1))
            if self.server.bad(self.server.faults / 20):
                return self._chunk(message[:20])  # and no end
            time.sleep(0.001)
        self.server.ended.wait()

    def log_message(self, *_: object) -> None:
        pass
