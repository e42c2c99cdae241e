"""Measurements and probes of RIPE Atlas in, the lines of their results as they are published out.

Two ways lead to the same results, and both are used: the stream (https://atlas.ripe.net/docs/apis/streaming-api: one GET, a
JSON array [type, payload] a line) brings them at once and loses what is sent while no connection stands; the results API
(measurements/ID/results/?start=…&stop=…) is queried from time to time, from an overlap before where the last query
ended, so what the stream lost, or what a probe uploaded late, still comes. What comes twice is known by its identity.
Neither was ever tried on RIPE's servers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlencode

from ping_llm.data.ingest.download import Client, Clock, Manners, Transient
from ping_llm.watch.feeds import Inbox, lines_of, start

STREAM = "https://atlas-stream.ripe.net"
API = "https://atlas.ripe.net/api/v2"
SPAN_S = 3600
"""Of one query, at most."""
MOST_STREAMS = 32
_FOREVER = 1 << 62


@dataclass(frozen=True)
class Live:
    """What is watched, and how."""

    msm: tuple[int, ...] = ()
    """Ids of measurements."""
    probe: tuple[int, ...] = ()
    """Ids of probes. With --msm only their results; without, all pings of each, which the stream alone brings: what it sends
    while there is no connection is lost."""
    every_s: float = 60.0
    """Seconds between two queries of the results API for each measurement."""
    overlap_s: int = 900
    """Seconds before the end of the last query from which the next one begins: results that are uploaded later than that are
    found by the stream alone."""
    stream: bool = True
    """Listen to the stream too; --no-stream leaves the results API alone."""
    api: str = API
    """Address of the results API, or of a mirror."""
    stream_api: str = STREAM
    """Address of the stream."""

    def check(self) -> None:
        """ValueError if options are out of range or exclude each other."""
        if min((*self.msm, *self.probe), default=1) < 1:
            raise ValueError("ids of measurements and probes must be above 0")
        if not 1 <= self.every_s < 86_400 or self.overlap_s < 0:
            raise ValueError(f"every_s={self.every_s} must be at least 1, overlap_s={self.overlap_s} at least 0")
        if not self.msm and not self.stream:
            raise ValueError("the results API is by measurement: --no-stream needs --msm ID")
        if len(self.subscriptions()) > MOST_STREAMS:
            raise ValueError(
                f"that would be {len(self.subscriptions())} streams, more than {MOST_STREAMS}; name fewer, or --no-stream"
            )

    def subscriptions(self) -> list[dict[str, str | int]]:
        """The parameters of each stream."""
        if not self.stream:
            return []
        if not self.probe:
            return [{"msm": msm} for msm in self.msm]
        if not self.msm:
            return [{"type": "ping", "prb": probe} for probe in self.probe]
        return [{"msm": msm, "prb": probe} for msm in self.msm for probe in self.probe]


def follow(
    live: Live,
    inbox: Inbox,
    polled_s: Callable[[str], int],
    manners: Manners | None = None,
    key: str = "",
    clock: Clock | None = None,
    count: Callable[[str], None] = lambda what: None,
) -> Client:
    """Starts threads that bring the results into `inbox`, until the client that is returned is stopped.

    `polled_s` gives the mark `polled ID` of a measurement, the time up to which it was queried, 0 if never. `count` hears of
    each break of a stream and of each query.
    """
    quiet = Manners(requests_per_s=2.0, tries=_FOREVER, timeout_s=300.0)
    client = Client(manners or quiet, key, clock)
    for parameters in live.subscriptions():
        start("stream", inbox, partial(_listen, live, client, parameters, inbox, count))
    for msm in live.msm:
        start("poll", inbox, partial(_poll, live, client, msm, polled_s(f"polled {msm}"), inbox, count))
    return client


def _listen(
    live: Live, client: Client, parameters: dict[str, str | int], inbox: Inbox, count: Callable[[str], None]
) -> None:
    """Reads one stream for ever; ValueError if the server refuses."""
    name = "stream of " + ", ".join(f"{name} {value}" for name, value in parameters.items())
    query = urlencode({"streamType": "result", "client": "ping-llm", **parameters})
    came = 0

    def attempt() -> None:
        nonlocal came
        try:
            with client.get(f"{live.stream_api.rstrip('/')}/stream/?{query}", {}) as response:
                for line in lines_of(client.blocks(response)):
                    if (result := _result_of(line)) is not None:
                        came += 1
                        inbox.put(result)
            raise Transient("the stream ended")
        except Transient as error:
            count("stream_breaks")
            error.kept = came  # what came is progress: the back-off begins anew
            raise

    client.persist(name, attempt)


def _result_of(message: bytes) -> bytes | None:
    """The result that a message of the stream holds, as a line; None if it holds none. ValueError if it refuses."""
    if not message.strip():
        return None
    try:
        kind, payload = json.loads(message)
    except (ValueError, TypeError):
        return message  # it is counted among the lines that cannot be read
    if kind == "atlas_error":
        raise ValueError(f"the stream refuses: {' '.join(str(payload).split())[:200]}")
    return json.dumps(payload).encode() + b"\n" if kind == "atlas_result" else None


def _poll(live: Live, client: Client, msm: int, polled_s: int, inbox: Inbox, count: Callable[[str], None]) -> None:
    """Queries the results of one measurement until the inbox is stopped."""
    while True:
        now_s = int(time.time())
        begin = (polled_s or now_s) - live.overlap_s
        end = min(begin + live.overlap_s + SPAN_S, now_s)
        query: dict[str, object] = {"start": begin, "stop": end, "format": "txt"}
        if live.probe:
            query["probe_ids"] = ",".join(map(str, sorted(live.probe)))
        url = f"{live.api.rstrip('/')}/measurements/{msm}/results/?{urlencode(query, safe=',')}"
        client.persist(f"measurement {msm}", partial(_query, client, url, inbox))
        count("polls")
        polled_s = end
        inbox.put({f"polled {msm}": polled_s})
        if end == now_s and inbox.pause(live.every_s):
            return


def _query(client: Client, url: str, inbox: Inbox) -> None:
    """Brings the results that one query gives; Transient if they break off."""
    with client.get(url, {}, with_key=True) as response:
        for number, line in enumerate(lines_of(client.blocks(response))):
            if not number and line.strip() and (line[:1] != b"{" or line.startswith(b'{"error"')):
                raise Transient(f"no results came, but {line[:60]!r}")
            if line.strip():
                inbox.put(line)
