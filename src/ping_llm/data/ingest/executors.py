"""The name of an executor in, a `concurrent.futures.Executor` out: processes of this machine, or workers of Dask.

Tasks are pure functions over files, so any executor whose workers see the same folders gives the same bytes.

    local               processes of this machine
    dask-local          a Dask cluster of processes on this machine
    dask-slurm          Dask workers as SLURM jobs, one core and one worker each unless Dask's jobqueue.yaml says otherwise
    dask=tcp://…:8786   a running Dask cluster, by the address of its scheduler
    array               none: the tasks that are left are listed for a job array, see job_array.py
    dask                the cluster that DASK_SCHEDULER_ADDRESS names, else dask-local
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from threading import Lock
from typing import Any

from ping_llm.data.ingest.job_array import Report, TaskFile
from ping_llm.system.processes import end_with_parent

LOCAL, ARRAY, DASK, DASK_LOCAL, DASK_SLURM, DASK_AT = "local", "array", "dask", "dask-local", "dask-slurm", "dask="
JOB_MEMORY = "2GB"  # requested of SLURM for a worker; one takes below 1 GB
CONNECT_TIMEOUT_S = 30
_WORKER_DIED = (
    "a worker was killed, most likely for want of memory; repeat the command with fewer --workers: it continues"
)

_task_lock = Lock()


@contextmanager
def open_executor(name: str, workers: int) -> Iterator[Executor]:
    """An executor of `workers` processes or jobs, closed at the end; ValueError for a name or a cluster that is not there.

    A cluster that runs already has the workers that it has. One local worker is this process: no other is started.
    """
    check_executor(name)
    try:
        if name == LOCAL:
            if workers == 1:
                yield Inline()
            else:  # spawned: a fork would copy the threads' locks of DuckDB and Arrow
                with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent, (os.getpid(),)) as pool:
                    yield pool
        elif name == ARRAY:
            yield TaskFile()
        else:
            from distributed import Client

            with _dask_cluster(name, workers) as cluster:
                try:
                    client = Client(cluster, timeout=CONNECT_TIMEOUT_S)
                except (OSError, ValueError) as error:
                    message = f"no Dask scheduler answers at {cluster} ({error}); start it, or check the address"
                    raise ValueError(message) from None
                with client:
                    yield client.get_executor(pure=False)
    except Exception as error:
        if type(error).__name__ in ("BrokenProcessPool", "KilledWorker"):  # the latter is Dask's
            raise ValueError(_WORKER_DIED) from None
        raise


def check_executor(name: str) -> None:
    """ValueError if `name` is not one of those above."""
    if name not in (LOCAL, ARRAY, DASK, DASK_LOCAL, DASK_SLURM) and not (name.startswith(DASK_AT) and "://" in name):
        raise ValueError(
            f"no executor {name!r}; there are local, dask, dask-local, dask-slurm and dask=tcp://HOST:PORT, and "
            "array for job arrays"
        )


def run_tasks(
    pool: Executor, function: Callable[[Any], Report], tasks: Sequence[Any], done: Callable[[int, Report], None]
) -> list[Report]:
    """The reports of all tasks, in order; `done(i, report)` is called as each comes in, and may raise to stop the rest."""
    if isinstance(pool, TaskFile):
        return pool.run(function, tasks, done)
    reports: list[Report] = [{}] * len(tasks)
    futures = {} if isinstance(pool, Inline) else {pool.submit(_run_alone, function, t): i for i, t in enumerate(tasks)}
    arrived = ((futures[future], future.result()) for future in as_completed(futures))
    try:
        for i, report in arrived if futures else enumerate(map(function, tasks)):
            reports[i] = report
            done(i, report)
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return reports


class Inline(Executor):
    """Stands for this process: `run_tasks` runs each task at once."""


def _run_alone(function: Callable[[Any], Report], task: Any) -> Report:
    """No worker runs two tasks at once, however many threads it has: they would share a connection to DuckDB."""
    with _task_lock:
        return function(task)


@contextmanager
def _dask_cluster(name: str, workers: int) -> Iterator[object]:
    """What a Dask client connects to: a cluster that is started for the time being, or an address."""
    import dask
    from distributed import LocalCluster

    address = dask.config.get("scheduler-address", None) if name == DASK else name.partition("=")[2]
    if address:
        yield address
    elif name in (DASK, DASK_LOCAL):
        with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster:
            yield cluster
    else:
        from dask_jobqueue import SLURMCluster

        wanted: dict[str, Any] = {"cores": 1, "processes": 1, "memory": JOB_MEMORY}
        if any(dask.config.get(f"jobqueue.slurm.{key}", None) for key in ("cores", "memory")):
            wanted = {}
        with SLURMCluster(**wanted) as cluster:
            cluster.scale(jobs=workers)
            yield cluster
