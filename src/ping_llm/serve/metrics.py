"""What the service does in, counters and gauges for Prometheus out."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Those of one service; several may live in one process."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("ping_llm_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "ping_llm_request_seconds", "From request to answer.", ["route"], buckets=_SECONDS, registry=registry
        )
        self.under_way = Gauge("ping_llm_requests_under_way", "Requests not yet answered.", registry=registry)
        self.queries = Counter("ping_llm_queries", "Queries that the model answered.", registry=registry)
        self.together = Histogram(
            "ping_llm_call_queries", "Queries answered in one call of the model.", buckets=_QUERIES, registry=registry
        )
        self.busy = Counter("ping_llm_model_seconds", "Time that the model was at work.", registry=registry)
        self.dropped = Counter(
            "ping_llm_dropped",
            "Requests dropped before the model saw them: client gone, or too late.",
            ["why"],
            registry=registry,
        )
        Gauge("ping_llm_waiting", "Requests that wait for the model.", registry=registry).set_function(waiting)

    def called(self, jobs: int, queries: int, seconds: float) -> None:
        """One call of the model."""
        self.queries.inc(queries)
        self.together.observe(queries)
        self.busy.inc(seconds)

    def drop(self, why: str) -> None:
        """A request that the model never saw."""
        self.dropped.labels(why).inc()

    def text(self) -> bytes:
        """As Prometheus reads them."""
        return generate_latest(self._registry)
