"""Jobs of many requests in, their answers out: one thread has the model, and answers together what waits together.

A job waits in a bounded queue. The thread takes the oldest one, waits some ms for others that go with it, drops those whose
client is gone or whose time is over, and makes one call for the rest.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

GATHER_S = 0.003  # that the jobs of a call wait for one more, as long as
MOST_GATHERS = 8  # of these times are not over
MOST_TOGETHER = 64  # queries of a call: so many the library answers at a time


class Busy(Exception):
    """The queue is full, or takes no more; its text says which."""


@dataclass(eq=False)
class Job:
    """What one request wants of the model.

    Jobs of the same `kind` go together into one call of `Kind.answer`; its result for this job goes through `finish`, and
    what comes out is the result of the future. `cost` is in queries.
    """

    kind: Kind
    payload: Any
    finish: Callable[[Any], Any]
    deadline: float  # of time.monotonic
    cost: int = 1
    future: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True)
class Kind:
    """How jobs are answered: `answer` of the payloads of some, in order; alone where `key` is None, else with those of an
    equal key."""

    answer: Callable[[Sequence[Any]], Sequence[Any]] = field(compare=False)
    key: Hashable = None


@dataclass
class Watch:
    """What is told of the work, from the thread of the model."""

    called: Callable[[int, int, float], None] = lambda jobs, queries, seconds: None
    dropped: Callable[[str], None] = lambda why: None  # gone or late


class Worker:
    """The thread that has the model, and its queue of at most `most_jobs` jobs and `most_queries` queries."""

    def __init__(
        self, most_jobs: int, most_queries: int, watch: Watch | None = None, gather_s: float = GATHER_S
    ) -> None:
        self.most_jobs, self.most_queries, self.gather_s = most_jobs, most_queries, gather_s
        self.watch = watch or Watch()
        self._waiting: deque[Job] = deque()
        self._queries = 0
        self._taking = True
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Lets a job wait for its answer, in `job.future`; Busy if there is no room, which there is for any job alone."""
        with self._changed:
            if not self._taking:
                raise Busy("the service is stopping")
            if self._is_full(job.cost):  # of clients that are gone?
                self._keep([waiting for waiting in self._waiting if not waiting.future.cancelled()])
            if self._is_full(job.cost):
                raise Busy("too many requests are waiting")
            self._waiting.append(job)
            self._queries += job.cost
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def is_taking(self) -> bool:
        """Whether jobs are taken, and the thread is there to answer them."""
        return self._taking and self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    def refuse(self) -> None:
        """Takes no more jobs; may be called by the handler of a signal."""
        self._taking = False

    def stop(self) -> None:
        """Takes no more jobs, and returns once those that wait are answered."""
        with self._changed:
            self._taking, self._ending = False, True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while jobs := self._take():
            running = [job for job in jobs if self._is_wanted(job)]
            if running:
                self._answer(running)

    def _take(self) -> list[Job]:
        """The jobs of the next call; none when all is done."""
        with self._changed:
            while not self._waiting:
                if self._ending:
                    return []
                self._changed.wait()
            kind = self._waiting[0].kind
            end = time.monotonic() + MOST_GATHERS * self.gather_s
            while kind.key is not None and self._cost_of(kind) < MOST_TOGETHER and not self._ending:
                left = min(self.gather_s, end - time.monotonic())
                if not (left > 0 and self._changed.wait(left)):  # nobody came
                    break
            taken: list[Job] = []
            cost = 0
            for job in list(self._waiting):
                together = not taken or (job.kind == kind and kind.key is not None)
                if together and (not taken or cost + job.cost <= MOST_TOGETHER):
                    taken.append(job)
                    cost += job.cost
            chosen = set(map(id, taken))
            self._keep([job for job in self._waiting if id(job) not in chosen])
            return taken

    def _keep(self, jobs: Sequence[Job]) -> None:
        self._waiting = deque(jobs)
        self._queries = sum(job.cost for job in jobs)

    def _is_full(self, cost: int) -> bool:
        """Whether jobs of that cost find no room; with nobody before it, any does."""
        few = len(self._waiting) < self.most_jobs and self._queries + cost <= self.most_queries
        return bool(self._waiting) and not few

    def _cost_of(self, kind: Kind) -> int:
        return sum(job.cost for job in self._waiting if job.kind == kind)

    def _is_wanted(self, job: Job) -> bool:
        """Whether somebody still waits for the answer; from then on the job cannot be cancelled."""
        if not job.future.set_running_or_notify_cancel():
            self.watch.dropped("gone")
        elif time.monotonic() > job.deadline:
            job.future.set_exception(TimeoutError())
            self.watch.dropped("late")
        else:
            return True
        return False

    def _answer(self, jobs: Sequence[Job]) -> None:
        """The answers of jobs that go together; of one that spoils the call the others know nothing."""
        begin = time.monotonic()
        try:
            answers = jobs[0].kind.answer([job.payload for job in jobs])
            finished = [job.finish(answer) for job, answer in zip(jobs, answers, strict=True)]
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
                return
            jobs[0].future.set_exception(error)
            return
        self.watch.called(len(jobs), sum(job.cost for job in jobs), time.monotonic() - begin)
        for job, answer in zip(jobs, finished, strict=True):
            job.future.set_result(answer)
