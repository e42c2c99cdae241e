"""Lines of results in batches in; each result scored once, contexts, and events of anomalies out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.measurement import format_address
from ping_llm.watch.arrivals import Result, parse
from ping_llm.watch.history import ROW, Asked, Scorer, in_time_order
from ping_llm.watch.hysteresis import Rule
from ping_llm.watch.state import Changes, Known, State

AHEAD_S = 3600
"""A result of a later time than an hour from now is of a wrong clock."""
OWN_COUNTERS = {
    "scored": "scored and judged",
    "repeated": "seen before",
    "too_late": "older than the newest by more than the state remembers",
    "in_future": "of a time more than an hour from now",
}
"""Counters of lines that hold a result; those of the others are `results.DROPPED_LINES`."""


@dataclass(frozen=True)
class Taken:
    """What became of a batch of lines; the counts add up to them."""

    lines: Counter[str]  # by counter
    events: list[dict[str, Any]]
    newest_s: int  # of all results so far


class Watcher:
    """Scores what comes and judges it; all that it knows is in the state."""

    def __init__(
        self,
        state: State,
        scorer: Scorer,
        rule: Rule,
        scratch: Path,
        every: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`scratch` is a folder for a file that is written over. With `every`, the file has a line for each result."""
        self.state, self.scorer, self.rule, self.every, self.now = state, scorer, rule, every, now
        self.scratch = scratch / "lines.ndjson"
        self._reading = state.reading()

    def take(self, lines: Sequence[bytes], marks: Mapping[str, int] | None = None) -> Taken:
        """Scores the results among the lines that are new, and commits that, with the marks, as one."""
        results, counters = parse(lines, self.scratch) if lines else ([], Counter())
        fresh, newest_s = self._fresh(results, counters)
        changes = Changes(counts=Counter(scored=len(fresh)), marks={**(marks or {})})
        changes.seen = {result.id: result.time_s for result in fresh}
        if newest_s > self.state.number("newest_s"):
            changes.marks["newest_s"] = newest_s
        changes.sources = self.state.sources(result.src for result in fresh)
        changes.pairs = self.state.pairs(result.src + result.dst for result in fresh)
        changes.reading = self._reading if fresh else None
        for turn in _turns(fresh):
            self._score(turn, changes)
        counters += Counter(scored=len(fresh))
        self.state.commit(changes)
        self._reading = changes.reading or self._reading
        return Taken(counters, changes.events + self._forget(), newest_s)

    def _fresh(self, results: Sequence[Result], counters: Counter[str]) -> tuple[list[Result], int]:
        """Those that are to be scored, and the time of the newest so far; the others are counted."""
        latest_s, newest_s = self.now() + AHEAD_S, self.state.number("newest_s")
        unseen, fresh = self.state.unseen(result.id for result in results), []
        for result in results:  # one after another: of a slow feed a batch may span days
            if result.time_s > latest_s:
                counters["in_future"] += 1
            elif result.time_s < self.state.oldest_s(newest_s):
                counters["too_late"] += 1
            elif result.id not in unseen:
                counters["repeated"] += 1
            else:
                unseen.remove(result.id)
                fresh.append(result)
                newest_s = max(newest_s, result.time_s)
        return fresh, newest_s

    def _score(self, results: Sequence[Result], changes: Changes) -> None:
        """Results of different sources."""
        asked = [Asked(one, changes.pairs[one.src + one.dst].rows, changes.sources[one.src]) for one in results]
        reading = changes.reading
        assert reading is not None
        for one, packets in zip(asked, self.scorer.p_values(asked), strict=True):
            result, ends = one.result, one.result.src + one.result.dst
            known = changes.pairs[ends]
            p_values = reading.p_values(result.rtt_ms, packets, known.habit)
            verdict = self.rule.judge(known.pair, (result.time_s, result.of_context), p_values)
            if verdict.change or self.every:
                event = _event(verdict.change or "scored", result, p_values.of_result, verdict.combined)
                opened = verdict.pair if verdict.change == "opened" else known.pair
                if verdict.change:
                    event |= _span(opened, result.time_s) | {"expected": self.scorer.expected(one)}
                changes.events.append(event)
            rows = np.array([(np.frombuffer(result.dst, "u1"), *row) for row in verdict.joins], ROW)
            rows_of_pair = _joined(known.rows, rows, self.state.bounds.rows)
            is_open = verdict.pair.since_s is not None
            if not is_open:
                reading = reading.after(result.rtt_ms, packets, known.habit)
            habit = known.habit.after(result.rtt_ms, packets, is_open, verdict.change == "accepted")
            changes.pairs[ends] = Known(verdict.pair, rows_of_pair, habit)
            changes.sources[result.src] = _joined(one.of_source, rows, self.state.bounds.rows)
        changes.reading = reading

    def _forget(self) -> list[dict[str, Any]]:
        """Forgets what is more than the state may hold; an anomaly that is open then is closed."""
        sources, pairs = self.state.excess()
        if not sources and not pairs:
            return []
        changes = Changes(forget_sources=sources, forget_pairs=list(pairs))
        changes.counts["forgotten"] = len(sources) + len(pairs)
        for ends, known in pairs.items():
            if known.pair.since_s is not None:
                end = {"event": "forgotten", "src": format_address(ends[:16]), "dst": format_address(ends[16:])}
                changes.events.append(end | _span(known.pair, known.pair.until_s))
        self.state.commit(changes)
        return changes.events


def _turns(results: Sequence[Result]) -> list[list[Result]]:
    """The results in turns, each with at most one of a source: a later one may need the earlier one as context."""
    turns: list[list[Result]] = []
    count: Counter[bytes] = Counter()
    for result in results:
        if count[result.src] == len(turns):
            turns.append([])
        turns[count[result.src]].append(result)
        count[result.src] += 1
    return turns


def _joined(rows: np.ndarray, more: np.ndarray, most: int) -> np.ndarray:
    """The last of both in time order."""
    return in_time_order(rows, more)[-most:] if len(more) else rows


def _event(kind: str, result: Result, p_value: float, combined: float) -> dict[str, Any]:
    return {
        "event": kind,
        "time": iso(result.time_s),
        "src": format_address(result.src),
        "dst": format_address(result.dst),
        "msm_id": result.msm_id,
        "prb_id": result.probe_id,
        "rtt_ms": [None if rtt < 0 else round(rtt, 3) for rtt in result.rtt_ms],
        "p_value": float(f"{p_value:.4g}"),
        "combined_p_value": float(f"{combined:.4g}"),
    }


def _span(pair: Any, time_s: int) -> dict[str, Any]:
    """Since when an anomaly lasts, and when it was seen for the last time."""
    return {"since": iso(pair.since_s), "until": iso(pair.until_s or time_s)}


def iso(time_s: float) -> str:
    """2026-11-01T12:00:00Z."""
    return datetime.fromtimestamp(int(time_s), UTC).isoformat().replace("+00:00", "Z")
