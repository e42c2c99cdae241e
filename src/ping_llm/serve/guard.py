"""Requests as they come in, only those that may pass on: bounds, token, headers, counts and log of everything that HTTP is.

Bodies are read here, bounded in bytes and time; whoever comes behind has a body at once.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ping_llm.serve.limits import Limits
from ping_llm.serve.logs import log
from ping_llm.serve.metrics import Metrics

QUERIES = ("/v1/rtt", "/v1/rank", "/v1/score", "/v1/destinations", "/v1/map", "/v1/anomalies", "/v1/table")
QUIET = ("/healthz", "/readyz", "/metrics")  # asked for all the time: not logged, unless something is wrong
ANSWERS = (*QUERIES, *QUIET, "/v1/model", "/v1/rows", "/v1/example")
ROUTES = (*ANSWERS, "/docs/", "/openapi.json", "/")
GONE = 499  # the client left before its answer; nobody sees the number but the log
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
RETRY_S = "1"
_READ_ON_BYTES = 16 << 20  # of a body that is too large, so that its client hears why
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'"
)
_CSP += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
DOCS_CSP = _CSP.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")  # Swagger UI sets styles


class Refusal(Exception):
    """What is answered instead of an answer."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class ClientGone(Exception):
    """The client left before its answer."""


def json_bytes(value: object) -> bytes:
    """JSON that holds no NaN, in ASCII: half of a pair of surrogates can be said, too."""
    return json.dumps(value, allow_nan=False).encode()


def unavailable(reason: str) -> Refusal:
    return Refusal(503, reason, retry_after=RETRY_S)


@dataclass(eq=False)
class Guard:
    """Lets through to `app` what is within the limits."""

    app: ASGIApp
    limits: Limits
    metrics: Metrics
    is_taking: Callable[[], bool]  # whether requests are taken
    token: str | None = None
    log_addresses: bool = False
    _under_way: Counter[str] = field(default_factory=Counter)  # requests by client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, client = time.monotonic(), str((scope.get("client") or ("",))[0])
        scope["state"] = {**scope.get("state", {}), "begin": begin}
        sent = {"status": GONE, "bytes": 0}

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                _complete(MutableHeaders(scope=message), scope["path"])
            sent["bytes"] += len(message.get("body", b""))
            await send(message)

        self._under_way[client] += 1
        self.metrics.under_way.inc()
        try:
            await self._pass(scope, receive, send_on, client)
        except Refusal as refusal:
            await say_no(send_on, refusal)
        except ClientGone:
            pass
        except Exception:
            log.exception("failed")
            if sent["status"] == GONE:
                await say_no(send_on, Refusal(500, "the service failed; its log says more"))
        finally:
            self._under_way[client] -= 1
            if not self._under_way[client]:
                del self._under_way[client]
            self.metrics.under_way.dec()
            self._note(scope, client, sent, time.monotonic() - begin)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, client: str) -> None:
        """Gives the request to the app, with its body; Refusal if it is not to pass."""
        path, headers = scope["path"], Headers(scope=scope)
        if self.token is not None and (path.startswith("/v1/") or path == "/metrics"):
            given = headers.get("authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                raise Refusal(401, "give the token: Authorization: Bearer TOKEN", www_authenticate="Bearer")
        if scope["method"] == "POST" and path in QUERIES:
            if not self.is_taking():
                raise unavailable("the service is stopping")
            if self._under_way[client] > self.limits.per_client:
                most = f"{self.limits.per_client:,} requests of one client are under way; wait for their answers"
                raise Refusal(429, most, retry_after=RETRY_S)
            receive = _after(await self._body(receive, headers), receive)
        await self.app(scope, receive, send)

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        """All of the body; Refusal if it is too large or too slow."""
        most, body, length = self.limits.body_bytes, bytearray(), 0
        given = headers.get("content-length", "0")
        too_large = f"the body has more than {most:,} bytes; send less at a time"
        if given.isdigit() and int(given) > _READ_ON_BYTES:
            raise Refusal(413, too_large, connection="close")
        try:
            async with asyncio.timeout(self.limits.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    length += len(message.get("body", b""))
                    if length > _READ_ON_BYTES:
                        raise Refusal(413, too_large, connection="close")
                    if length <= most:
                        body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            reason = f"the body did not come within {self.limits.body_s:g} s"
            raise Refusal(408, reason, connection="close") from None
        if length > most:
            raise Refusal(413, too_large)
        return bytes(body)

    def _note(self, scope: Scope, client: str, sent: dict[str, int], seconds: float) -> None:
        """Counts and logs a request."""
        route = scope["path"] if scope["path"] in ROUTES else "page"
        self.metrics.requests.labels(route, sent["status"]).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if route in QUIET and sent["status"] == 200:
            return
        method = scope["method"] if scope["method"] in METHODS else "other"
        facts: dict[str, Any] = {"method": method, "route": route, **sent, "ms": round(1e3 * seconds, 1)}
        facts |= {"client": client, "path": scope["path"]} if self.log_addresses else {}
        log.info("request", extra={"facts": facts})


def _after(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _complete(headers: MutableHeaders, path: str) -> None:
    """The headers that every answer has."""
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    if path.startswith("/docs"):
        headers["content-security-policy"] = DOCS_CSP
    headers.setdefault("cache-control", "no-store" if path in ANSWERS else "no-cache")


async def say_no(send: Send, refusal: Refusal) -> None:
    """Answers with the reason."""
    body = json_bytes({"error": refusal.reason})
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": given})
    await send({"type": "http.response.body", "body": body})
