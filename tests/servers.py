"""A real HTTP server on the loopback interface that misbehaves as a test demands, and what tests request of it."""

import bz2
import re
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from waiting import HANG_S

from ping_llm.data.ingest.download import Manners
from ping_llm.data.ingest.fetch import hourly_dumps, results

QUICK = Manners(requests_per_s=1000, tries=3, backoff_s=0.01, timeout_s=HANG_S, seed=0)
RECENT_DAY = (datetime.now(UTC) - timedelta(days=2)).date()
NOON_S = 1_700_000_000 // 3600 * 3600


@contextmanager
def serving():
    """A server at work in a thread."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.release.set()
        server.shutdown()


def noise(seed, size=300_000):
    return bz2.compress(np.random.default_rng(seed).bytes(size))


class Server(ThreadingHTTPServer):
    """Answers each path by its list of replies, one a request, the last one ever after."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests, self.times = {}, [], []
        self.lock, self.release = threading.Lock(), threading.Event()
        self.at_once = self.most_at_once = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self):
        return [path for path, _ in self.requests]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        with server.lock:
            server.requests.append((self.path, dict(self.headers)))
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            replies = server.replies.get(self.path, [status(404)])
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        try:
            reply(self)
        finally:
            with server.lock:
                server.at_once -= 1
            self.close_connection = True

    def begin(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")  # else the next request may go into a connection that is being closed
        self.end_headers()

    def log_message(self, *_):
        pass


def status(code, body=b"", **headers):
    def reply(handler):
        handler.begin(code, Content_Length=len(body), **headers)
        handler.wfile.write(body)

    return reply


def file(body, etag='"v1"', upto=None, then=None, **headers):
    """Serves a file or the requested range of it; closes the connection after `upto` bytes, once `then` has returned."""

    def reply(handler):
        begin = 0
        if (wanted := handler.headers["Range"]) and handler.headers["If-Range"] in (etag, headers.get("Last_Modified")):
            begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        if begin > len(body):
            return handler.begin(416, Content_Length=0)
        span = f"bytes {begin}-{len(body) - 1}/{len(body)}" if begin else None
        length = len(body) - begin
        handler.begin(206 if begin else 200, Content_Length=length, ETag=etag, Content_Range=span, **headers)
        handler.wfile.write(body[begin:upto])
        handler.wfile.flush()
        if then:
            then()

    return reply


def stream(body, whole=True):
    """Serves as the Atlas API does: in pieces, without a length; not `whole`: without the piece that ends it."""

    def reply(handler):
        handler.begin(200, Transfer_Encoding="chunked", Content_Type="text/plain")
        for at in range(0, len(body), 1000):
            piece = body[at : at + 1000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if whole:
            handler.wfile.write(b"0\r\n\r\n")

    return reply


def dumps(server, *replies):
    """Hours of a recent day, each with the replies of the server to it."""
    wanted = hourly_dumps(server.url, "ping", str(RECENT_DAY), range(len(replies)))
    server.replies |= {f"/{one.request}": list(r) for one, r in zip(wanted, replies, strict=True)}
    return wanted


def chunks(server, *replies, **options):
    """Hours of measurement 1001, each with the replies of the server to it."""
    wanted = results(server.url, [1001], NOON_S, NOON_S + 3600 * len(replies), **options)
    server.replies |= {f"/{one.request}": list(r) for one, r in zip(wanted, replies, strict=True)}
    return wanted


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(("ping-", "msm-"))}


def wait_for(condition, seconds=HANG_S):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.01)
