"""Options in, a watch that runs until its feed ends or a signal comes out."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from ping_llm.data.ingest.download import Manners
from ping_llm.system.files import try_file
from ping_llm.system.progress import say
from ping_llm.system.signals import on_signals
from ping_llm.watch.atlas import Live, follow
from ping_llm.watch.feeds import Batch, Inbox, read_pipe, replay, start
from ping_llm.watch.history import Scorer
from ping_llm.watch.hysteresis import Rule
from ping_llm.watch.state import Bounds, State
from ping_llm.watch.watcher import Watcher

REPORT_EVERY_S = 60.0


@dataclass(frozen=True)
class Feed:
    """Where results come from: one of the three."""

    input: Path | None = None  # a pipe or a file; - is standard input
    replay: tuple[Path, ...] = ()
    speed: float = 0.0
    live: Live = field(default_factory=Live)

    def check(self) -> None:
        """ValueError unless there is one."""
        named = [bool(self.live.msm or self.live.probe), self.input is not None, bool(self.replay)]
        if sum(named) != 1:
            raise ValueError(
                "name what to watch, in one way: --msm ID … or --probe ID …, --input - (lines on standard input), or "
                "--replay DUMP …"
            )
        if not 0 <= self.speed < float("inf"):
            raise ValueError(f"--speed {self.speed} must be 0, as fast as possible, or above")
        for path in (*self.replay, *([self.input] if self.input not in (None, Path("-")) else [])):
            if not path.exists() or path.is_dir():
                raise ValueError(f"no file {path}")
        self.live.check()


def watch(
    feed: Feed,
    load: Callable[[], Scorer],
    out: Path,
    rule: Rule,
    bounds: Bounds,
    every: bool = False,
    metrics_port: int | None = None,
    key: str = "",
    manners: Manners | None = None,
) -> Counter[str]:
    """Watches until the feed ends, or SIGTERM or SIGINT comes; gives how many lines each counter took.

    `load` is called once all else is known to be well. ValueError says what was wrong; what was committed stays so.
    """
    feed.check()
    if not out.exists():
        try_file(out)
    inbox, stopped = Inbox(), _Stop()
    total: Counter[str] = Counter()
    with ExitStack() as stack:
        state = stack.enter_context(State(out.with_name(f"{out.name}.state"), out, bounds))
        metrics = None
        if metrics_port is not None:
            from ping_llm.watch.metrics import Metrics

            metrics = stack.enter_context(closing(Metrics(metrics_port, lambda: inbox.waiting)))
            say(f"metrics at http://127.0.0.1:{metrics.port}/metrics")
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ping-llm-")))
        watcher = Watcher(state, load(), rule, scratch, every)
        stack.enter_context(on_signals((signal.SIGTERM, signal.SIGINT), stopped.stop))
        stack.callback(inbox.stop)

        def count(what: str) -> None:
            if metrics:
                metrics.feed.labels(what).inc()

        batches = _batches(feed, inbox, state, stopped, stack, count, key, manners)
        shown, last = time.monotonic(), Counter[str]()
        for lines, marks in batches:
            if not lines and not marks:
                continue
            begin = time.monotonic()
            taken = watcher.take(lines, marks)
            total += taken.lines
            if metrics:
                metrics.took(taken, state.size(), time.monotonic() - begin)
            for event in taken.events:
                if event["event"] != "scored":
                    print(_text(event), flush=True)
            if time.monotonic() - shown > REPORT_EVERY_S:
                say(f"{total['scored']:,} results scored, {(total - last)['scored']:,} since the last line")
                shown, last = time.monotonic(), Counter(total)
    return total


class _Stop:
    """Whether a signal came."""

    def __init__(self) -> None:
        self.came = False

    def stop(self, number: int) -> None:
        self.came = True

    def __call__(self) -> bool:
        return self.came


def _batches(
    feed: Feed,
    inbox: Inbox,
    state: State,
    stopped: Callable[[], bool],
    stack: ExitStack,
    count: Callable[[str], None],
    key: str,
    manners: Manners | None,
) -> Iterator[Batch]:
    if feed.replay:
        return replay(feed.replay, feed.speed, stopped)
    if feed.input is not None:
        # Without a buffer, whose lock a thread that waits for a line would hold while the process ends.
        is_standard = feed.input == Path("-")
        file = FileIO(sys.stdin.fileno() if is_standard else str(feed.input), closefd=not is_standard)
        start("input", inbox, lambda: read_pipe(file, inbox), ends=True)
    else:
        client = follow(feed.live, inbox, state.number, manners, key, count=count)
        stack.callback(client.stop)
    return inbox.batches(stopped)


def _text(event: dict[str, Any]) -> str:
    """One line for people."""
    span = f"since {event['since']}"
    text = f"{event.get('time', event['until'])} {event['event']}: {event['src']} → {event['dst']}, {span}"
    if event["event"] == "opened":
        seen = ", ".join("no answer" if rtt is None else f"{rtt:g} ms" for rtt in event["rtt_ms"])
        wanted = event["expected"]
        low, high = wanted["q0.05"], wanted["q0.95"]
        text += (
            f": {seen}; expected {low}–{high} ms, no answer {wanted['p_fail']:.1%}; p {event['combined_p_value']:.2g}"
        )
    return text
