"""A watch whose scorer needs no model, in this process or in one of its own, and what tests give it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pings import ndjson, ping

from ping_llm.data.ingest.download import Manners
from ping_llm.watch import feeds
from ping_llm.watch.atlas import Live
from ping_llm.watch.history import Asked
from ping_llm.watch.hysteresis import Rule
from ping_llm.watch.run import Feed, watch
from ping_llm.watch.state import Bounds, State
from ping_llm.watch.watcher import Watcher

START_S = 1_700_000_000
QUICK = Manners(requests_per_s=1000, tries=1 << 30, backoff_s=0.01, timeout_s=600, seed=0)


class ByMedian:
    """A p-value by how far the RTT is from the median of the pair's context: small where it doubled, or none came."""

    def p_values(self, asked: Sequence[Asked]) -> list[float]:
        assert len({one.result.src for one in asked}) == len(asked)
        return [[self.p_value(one)] * len(one.result.rtt_ms) for one in asked]

    def p_value(self, one: Asked) -> float:
        rtt_ms, rows = float(np.median(one.result.rtt_ms)), one.of_pair["rtt_ms"]
        if not len(rows):
            return 0.6
        return 1e-5 if rtt_ms < 0 or rtt_ms > 2 * np.median(rows) else 0.6

    def expected(self, asked: Asked) -> dict[str, Any]:
        low, mid, high = np.quantile(asked.of_pair["rtt_ms"], [0.05, 0.5, 0.95]).tolist()
        return {"p_fail": 0.02, "q0.05": low, "q0.5": mid, "q0.95": high}


def result(number: int, rtt_ms: float = 20.0, probe: int = 1, **changes: object) -> dict:
    """Of a probe, its number-th; −1 is lost."""
    replies = [{"x": "*"} if rtt_ms < 0 else {"rtt": rtt_ms}] * 3
    changes = {"prb_id": probe, "timestamp": START_S + 240 * number, "result": replies} | changes
    ends = {"from_": f"193.0.{probe // 256}.{probe % 256}", "src_addr": None, "dst_addr": "193.0.14.129"}
    return ping(**ends | changes)


def lines(*results: dict) -> list[bytes]:
    return ndjson(*results).splitlines(keepends=True)


def outage(probes: int = 3, results: int = 60) -> list[dict]:
    """Results of some probes, in time order; from the 20th to the 29th of each nothing comes back."""
    lost = range(20, 30)
    return [result(n, -1 if n in lost else 20.0, p) for n in range(results) for p in range(1, probes + 1)]


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def changes(out: Path) -> list[tuple]:
    """What opened and closed."""
    return [(e["event"], e["src"], e["since"]) for e in events(out) if e["event"] != "scored"]


def watcher(folder: Path, rule: Rule | None = None, bounds: Bounds | None = None, **options: object) -> Watcher:
    """In this process, of a state that is open until the test ends."""
    state = State(folder / "out.jsonl.state", folder / "out.jsonl", bounds or Bounds())
    return Watcher(state, ByMedian(), rule or Rule(), folder, **options)


def identities(out: Path) -> list[tuple[int, int, str]]:
    """Of every line that is written of a result that was scored."""
    found = events(out)
    return [(e["msm_id"], e["prb_id"], e["time"]) for e in found if "p_value" in e]


if __name__ == "__main__":  # OUT API STREAM: a watch of measurement 1001, or OUT: of standard input
    feeds.BATCH = 8  # so that a kill finds it at work
    out, *servers = sys.argv[1:]
    live = Live((1001,), every_s=1, api=servers[0], stream_api=servers[1]) if servers else Live()
    feed = Feed(live=live) if servers else Feed(Path("-"))
    total = watch(feed, ByMedian, Path(out), Rule(), Bounds(), every=True, manners=QUICK)
    print(json.dumps(total), flush=True)
