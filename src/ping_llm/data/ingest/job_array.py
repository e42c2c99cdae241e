"""The tasks of `prepare` in, a file of tasks out; such a file and a number in, those tasks done. For job arrays.

`ping-llm prepare INPUT… --out DIR --executor array` runs no task: it writes those that are left into
DIR/.partial/tasks.json and ends with code 75. `python -m ping_llm.data.ingest.job_array FILE` prints how many, and with
FIRST STRIDE it runs every STRIDE-th of them, on any machine that sees the folders. Then repeat the command: it goes on,
and the third time it publishes the rows. slurm/prepare.sbatch does so. A task that was in the file and is still not done
has failed, so this comes to an end. Tasks run side by side, but no other `prepare` may write into DIR meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import cattrs

from ping_llm.data.ingest.tasks import LOCK_NAME, REPORT_NAME, MapTask, ReduceTask, map_dump, reduce_bucket
from ping_llm.system.exits import exit_code
from ping_llm.system.files import write_atomically, write_lock

Report = dict[str, Any]  # of a finished task, as JSON
TASKS_NAME = "tasks.json"
TASKS_LEFT = os.EX_TEMPFAIL
_KINDS: dict[str, tuple[Callable[[Any], Report], type[MapTask] | type[ReduceTask]]] = {
    "map_dump": (map_dump, MapTask),
    "reduce_bucket": (reduce_bucket, ReduceTask),
}
_CONVERTER = cattrs.Converter()
_CONVERTER.register_structure_hook(Path, lambda text, _: Path(text))


class TaskFile(Executor):
    """An executor that runs no task of a list, and only looks which of them are done."""

    def run(
        self, function: Callable[[Any], Report], tasks: Sequence[Any], done: Callable[[int, Report], None]
    ) -> list[Report]:
        """The reports of all tasks, in order, as `run_tasks` gives them.

        SystemExit with code TASKS_LEFT when those that are left are written down, ValueError if some of them already were.
        """
        path = tasks[0].folder.parent / TASKS_NAME
        left = [task for task in tasks if not task.folder.exists()]
        tried = read_tasks(path)[1] if path.exists() else []
        if failed := [task for task in left if task in tried]:
            path.unlink()  # the next try starts afresh
            name = getattr(failed[0], "name", failed[0].folder.name)
            raise ValueError(
                f"{len(failed)} of {len(tried)} tasks ended before they were done, the first is {name}; their own output "
                "says why. Repeat the command: it continues"
            )
        if left:
            values = {"function": function.__name__, "tasks": [dataclasses.asdict(task) for task in left]}
            write_atomically(path, json.dumps(values, indent=1, default=str) + "\n")
            print(f"{len(left)} of {len(tasks)} tasks are left, written to {path}", flush=True)
            raise SystemExit(TASKS_LEFT)
        reports = [json.loads((task.folder / REPORT_NAME).read_text()) for task in tasks]
        for i, task in enumerate(tasks):
            try:
                done(i, reports[i])
            except ValueError:  # the task is to be run again
                shutil.rmtree(task.folder)
                path.unlink(missing_ok=True)
                raise
        return reports


def read_tasks(path: Path) -> tuple[Callable[[Any], Report], list[MapTask | ReduceTask]]:
    """What `TaskFile` wrote; ValueError if there is no such file or it is something else."""
    try:
        values = json.loads(path.read_text())
        function, kind = _KINDS[values["function"]]
        return function, [_CONVERTER.structure(task, kind) for task in values["tasks"]]
    except FileNotFoundError:
        raise ValueError(f"no tasks in {path}; ping-llm prepare --executor array writes them") from None
    except (ValueError, KeyError, TypeError, cattrs.BaseValidationError) as error:
        raise ValueError(f"{path} holds no tasks ({error!r}); run ping-llm prepare --executor array again") from None


def run_strided(path: Path, first: int, stride: int) -> None:
    """Runs every `stride`th task of a file, from number `first` on, and says what each did."""
    if not 0 <= first < stride:
        raise ValueError(f"{first=} must be at least 0 and below {stride=}")
    if not path.exists():
        read_tasks(path)  # says so
    with write_lock(path.parent.parent, path.parent / LOCK_NAME, shared=True):
        function, tasks = read_tasks(path)
        for task in tasks[first::stride]:
            report = function(task)
            said = ", ".join(f"{name} {value}" for name, value in report.items() if isinstance(value, (int, str)))
            print(f"{task.folder.name}: {said}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 if all the tasks are done, 1 after one line that says what was wrong."""
    return exit_code(lambda: _count_or_run(argv), needs_stdout=len(argv) == 1)


def _count_or_run(argv: Sequence[str]) -> None:
    if len(argv) not in (1, 3) or not all(number.isdigit() for number in argv[1:]):
        raise ValueError("usage: python -m ping_llm.data.ingest.job_array FILE [FIRST STRIDE]")
    if len(argv) == 1:
        print(len(read_tasks(Path(argv[0]))[1]))
    else:
        run_strided(Path(argv[0]), int(argv[1]), int(argv[2]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
