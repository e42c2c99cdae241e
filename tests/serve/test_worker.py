"""What waits together is answered together, what nobody waits for is not, and the queue has an end."""

import threading
import time
from concurrent.futures import CancelledError

import pytest
from waiting import HANG_S

from ping_llm.serve.worker import MOST_TOGETHER, Busy, Job, Kind, Watch, Worker


class Calls:
    """Answers each number by ten times it, and remembers what came together; zero cannot be answered."""

    def __init__(self):
        self.together = []

    def __call__(self, numbers):
        self.together.append(list(numbers))
        if 0 in numbers:
            raise ValueError("zero")
        return [10 * number for number in numbers]

    def job(self, number, key="a", cost=1, deadline=float("inf")):
        return Job(Kind(self, key), number, lambda answer: answer + 1, deadline, cost)


@pytest.fixture
def calls():
    return Calls()


def worker(jobs=100, queries=1000, gather_s=0.0, **watch):
    return Worker(jobs, queries, Watch(**watch), gather_s)


def run(jobs, **options):
    """Has all jobs wait before the thread begins, and returns once they are answered."""
    working = worker(**options)
    for job in jobs:
        working.submit(job)
    working.start()
    working.stop()


def test_jobs_of_one_kind_go_into_one_call_and_others_keep_their_order(calls):
    jobs = [calls.job(1), calls.job(2, "b"), calls.job(3), calls.job(4, None), calls.job(5, None), calls.job(6, "b")]
    run(jobs)
    assert calls.together == [[1, 3], [2, 6], [4], [5]]
    assert [job.future.result() for job in jobs] == [11, 21, 31, 41, 51, 61]


def test_a_call_has_at_most_so_many_queries_but_one_job_may_have_more(calls):
    half = MOST_TOGETHER // 2
    jobs = [calls.job(1, cost=half), calls.job(2, cost=half + 1), calls.job(3, cost=half), calls.job(4, cost=999)]
    run(jobs, queries=2000)
    assert calls.together == [[1, 3], [2], [4]]


def test_the_first_waits_for_others_until_a_call_is_full(calls):
    working = worker(gather_s=HANG_S)
    working.start()
    jobs = [calls.job(number, cost=MOST_TOGETHER // 4) for number in (1, 2, 3, 4)]
    for job in jobs:
        working.submit(job)
    assert jobs[0].future.result(HANG_S) == 11
    assert calls.together == [[1, 2, 3, 4]]
    working.stop()


def test_a_job_alone_does_not_wait_for_ever(calls):
    working = worker(gather_s=0.001)
    working.start()
    working.submit(job := calls.job(1))
    assert job.future.result(HANG_S) == 11
    working.stop()


def test_who_has_left_or_is_too_late_costs_no_call(calls):
    why = []
    gone, late, there = calls.job(1), calls.job(2, deadline=time.monotonic() - 1), calls.job(3)
    gone.future.cancel()
    run([gone, late, there], dropped=why.append)
    assert calls.together == [[3]] and sorted(why) == ["gone", "late"]
    with pytest.raises(CancelledError):
        gone.future.result()
    with pytest.raises(TimeoutError):
        late.future.result()


def test_what_is_wrong_with_one_job_is_not_the_error_of_the_others(calls):
    counted = []
    jobs = [calls.job(number) for number in (1, 0, 2)]
    run(jobs, called=lambda jobs, queries, seconds: counted.append((jobs, queries)))
    assert [job.future.exception() for job in (jobs[0], jobs[2])] == [None, None]
    assert str(jobs[1].future.exception()) == "zero"
    assert counted == [(1, 1), (1, 1)]


def test_the_queue_is_bounded_in_jobs_and_in_queries(calls):
    few = worker(jobs=2)
    for number in (1, 2):
        few.submit(calls.job(number))
    with pytest.raises(Busy, match="too many requests are waiting"):
        few.submit(calls.job(3))
    light = worker(queries=10)
    light.submit(calls.job(1, cost=8))
    with pytest.raises(Busy):
        light.submit(calls.job(2, cost=3))
    light.submit(calls.job(3, cost=2))
    worker(queries=10).submit(calls.job(1, cost=99))  # an empty queue has room for any


def test_who_has_left_makes_room(calls):
    full = worker(jobs=1)
    full.submit(gone := calls.job(1))
    gone.future.cancel()
    full.submit(calls.job(2))
    with pytest.raises(Busy):
        full.submit(calls.job(3))


def test_one_that_stops_answers_what_it_has_and_takes_no_more(calls):
    begun, released = threading.Event(), threading.Event()

    def slow(numbers):
        begun.set()
        assert released.wait(HANG_S)
        return calls(numbers)

    working = worker()
    working.start()
    working.submit(running := Job(Kind(slow), 1, str, float("inf")))
    assert begun.wait(HANG_S) and working.is_taking
    working.submit(waiting := calls.job(2))
    working.refuse()
    assert working.is_alive and not working.is_taking
    with pytest.raises(Busy, match="stopping"):
        working.submit(calls.job(3))
    released.set()
    working.stop()
    assert (running.future.result(), waiting.future.result()) == ("10", 21) and not working.is_alive


def test_one_that_never_started_can_stop(calls):
    idle = worker()
    idle.stop()
    assert not idle.is_alive and not idle.is_taking
