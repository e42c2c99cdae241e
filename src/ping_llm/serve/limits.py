"""What the service takes, at most: a request beyond it is refused before it costs the model anything."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """What is taken, at most."""

    body_bytes: int = 2 << 20
    """Bytes of the body of a request."""
    queries: int = 256
    """Queries of a request; a prefix that ends within a byte counts as the prefixes of whole bytes in it."""
    measurements: int = 2_000
    """Measurements of a request: in its contexts together, or to be scored."""
    quantiles: int = 100
    """Quantiles of a query."""
    waiting: int = 256
    """Requests that wait for the model."""
    waiting_queries: int = 4_096
    """Their queries."""
    per_client: int = 128
    """Requests of one address that are under way; behind a proxy all are of its address."""
    connections: int = 1_000
    """Open connections."""
    answer_s: float = 30.0
    """Seconds from the begin of a request to its answer."""
    body_s: float = 10.0
    """Seconds until the body of a request has come."""
    idle_s: float = 30.0
    """Seconds that a connection is kept without a request."""
    stalled_s: float = 20.0
    """Seconds that a client may leave an answer unread."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if not (value := getattr(self, one.name)) > 0:
                raise ValueError(f"--{one.name.replace('_', '-')} {value} must be more than 0")
