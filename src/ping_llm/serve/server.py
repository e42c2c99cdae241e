"""An address to listen at and an application in, a server that runs until a signal out."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from pathlib import Path

import uvicorn

from ping_llm.serve.app import make_app
from ping_llm.serve.connections import bounded
from ping_llm.serve.logs import json_logs
from ping_llm.serve.service import Service
from ping_llm.system.signals import on_signals

LEAST_TOKEN = 16  # characters
_HEADERS_BYTES = 32 << 10

log = logging.getLogger(__name__)


def read_token(path: Path | None) -> str | None:
    """The token in a file; ValueError if it is none, a warning if others can read it."""
    if path is None:
        return None
    try:
        token, mode = path.read_text().strip(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(
            f"--token-file {path} cannot be read ({reason}); make one: "
            f"python -c 'import secrets; print(secrets.token_urlsafe())' > {path}"
        ) from None
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"--token-file {path} must hold one word of at least {LEAST_TOKEN} characters of ASCII")
    if mode & 0o044:
        log.warning("%s can be read by other users of this machine; chmod 600 it", path)
    return token


def listen_at(host: str, port: int, has_token: bool) -> socket.socket:
    """A socket that is bound and does not listen yet; ValueError if that cannot be, or is open to others without a token."""
    if not 0 <= port < 1 << 16:  # the system would take the rest of a division
        raise ValueError(f"--port {port} must be from 0, for a free one, to 65535")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port} is no address to listen at ({error})") from None
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    is_local = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if not is_local and not has_token:
        raise ValueError(
            f"--host {host} is open to other machines; give --token-file FILE, or listen at 127.0.0.1 alone"
        )
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"cannot listen at {host} port {port} ({reason}); give another --port or --host") from None
    return bound


def url_of(listening: socket.socket) -> str:
    """As a client on this machine reaches it."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(service: Service, listening: socket.socket, token: str | None, log_addresses: bool) -> None:
    """Serves until SIGTERM or SIGINT; what was taken is answered, and then it returns."""
    limits = service.limits
    config = uvicorn.Config(
        make_app(service, token, log_addresses),
        loop="asyncio",
        http=bounded(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(limits.idle_s) or 1,
        timeout_graceful_shutdown=int(limits.answer_s + limits.stalled_s) + 1,
        h11_max_incomplete_event_size=_HEADERS_BYTES,
    )
    # uvicorn raises the signal again once it has ended, to which its caller is to say what that means: here, the end.
    with on_signals((signal.SIGTERM, signal.SIGINT), lambda number: None), json_logs(log_addresses):
        _Server(config, service, url_of(listening)).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Says when it listens, and takes nothing more from a signal on."""

    def __init__(self, config: uvicorn.Config, service: Service, url: str) -> None:
        super().__init__(config)
        self.service, self.url = service, url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"{self.service.name} answers at {self.url}; the API is described at {self.url}/docs", flush=True)

    def handle_exit(self, *signal_and_frame) -> None:  # type: ignore[no-untyped-def]
        self.service.worker.refuse()
        super().handle_exit(*signal_and_frame)
