"""What a watch does in, counters and gauges for Prometheus out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, start_http_server

from ping_llm.watch.watcher import Taken


class Metrics:
    """Those of one watch, served on the loopback interface alone."""

    def __init__(self, port: int, waiting: Callable[[], int]) -> None:
        """ValueError if the port cannot be listened at; port 0 takes a free one."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.lines = Counter(
            "ping_llm_watch_lines", "Lines taken, by what became of them.", ["what"], registry=registry
        )
        self.events = Counter("ping_llm_watch_events", "Lines written, by kind.", ["event"], registry=registry)
        self.busy = Counter("ping_llm_watch_seconds", "Time at work on batches.", registry=registry)
        self.feed = Counter("ping_llm_watch_feed", "What the feed went through.", ["what"], registry=registry)
        self.kept = Gauge(
            "ping_llm_watch_kept", "Sources, pairs and open anomalies in the state.", ["what"], registry=registry
        )
        self.newest = Gauge("ping_llm_watch_newest_seconds", "Unix time of the newest result.", registry=registry)
        Gauge("ping_llm_watch_waiting", "Lines that wait.", registry=registry).set_function(waiting)
        try:
            server, _ = start_http_server(port, "127.0.0.1", registry)
        except (OSError, OverflowError) as error:
            raise ValueError(f"--metrics-port {port} cannot be listened at ({error}); name another one") from None
        self.server = server
        self.port = server.server_address[1]

    def took(self, taken: Taken, size: Mapping[str, int], seconds: float) -> None:
        """One batch."""
        for name, count in taken.lines.items():
            self.lines.labels(name).inc(count)
        for event in taken.events:
            self.events.labels(event["event"]).inc()
        for name, count in size.items():
            self.kept.labels(name).set(count)
        self.newest.set(taken.newest_s)
        self.busy.inc(seconds)

    def close(self) -> None:
        """Stops serving."""
        self.server.shutdown()
        self.server.server_close()
