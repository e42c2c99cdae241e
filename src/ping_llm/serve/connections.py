"""Bytes of a client in, requests out: HTTP of uvicorn, with an end to connections that only hold a place.

uvicorn ends a connection that is idle between two requests; neither one on which no whole request ever comes, nor one whose
client does not read.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ping_llm.serve.limits import Limits

_CHECK_S = 1.0


class Connection(H11Protocol):
    """One connection; `limits` are those of the class that `bounded` makes."""

    limits = Limits()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idle_since = self._moved = self.loop.time()
        self._unsent = 0
        self._check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._check = self.loop.call_later(_CHECK_S, self._end_if_overdue)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._check:
            self._check.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def _end_if_overdue(self) -> None:
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if unsent != self._unsent or not unsent:
            self._unsent, self._moved = unsent, now
        answering = self.cycle is not None and not self.cycle.response_complete
        # Between requests uvicorn counts the time, until the first byte of the next.
        allowed_s = self.limits.idle_s * (1 if self.cycle is None else 2)
        idle = not answering and not unsent and now - self._idle_since > allowed_s
        if idle or now - self._moved > self.limits.stalled_s:
            self.transport.abort()
        else:
            self._check = self.loop.call_later(_CHECK_S, self._end_if_overdue)


def bounded(limits: Limits) -> type[Connection]:
    """The protocol with these limits."""
    return type("BoundedConnection", (Connection,), {"limits": limits})
