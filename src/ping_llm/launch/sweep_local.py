"""The runs of a sweep in; trained on this machine, one or several at a time, those that failed out.

Each run is a process, `ping-llm train`, that goes on from its last checkpoint if there is one. A run that fails does not end
the others. If the sweep is stopped, or killed, its runs save and stop too; the same command goes on.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ping_llm.launch.job import DONE, environment, saved
from ping_llm.launch.sweep import SweepRun, check_sweep, read_sweep, standing
from ping_llm.system.files import try_folder, write_lock
from ping_llm.system.progress import cores
from ping_llm.system.signals import on_signals
from ping_llm.training import schedule
from ping_llm.training.metrics import METRICS_NAME, parse_line

POLL_S = 0.1
LINE_EVERY_S = 1.0
LOCK_WAIT_S = 120.0  # for the runs of a sweep that was killed, which finish their step and save
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Failure:
    """A run that ended before its end."""

    run: SweepRun
    why: str

    def __str__(self) -> str:
        return f"{self.run.name} ({self.why}; see {self.run.log})"


@dataclass
class _Going:
    """A run that is being trained."""

    run: SweepRun
    process: subprocess.Popen
    log: IO[str]
    place: int  # among the jobs
    begun: float = field(default_factory=time.monotonic)


def sweep(file: Path, out: Path | None = None, jobs: int = 1, dry_run: bool = False) -> None:
    """Checks the runs of a sweep file and trains those that are left, or lists all of them if `dry_run`.

    ValueError: a mistake in the file, or runs that failed, each with its log.
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} must be at least 1")
    runs = read_sweep(file, out)
    left, folder = check_sweep(runs), runs[0].folder.parent
    if dry_run:
        return print("\n".join(f"{run.folder}  {standing(run)}" for run in runs))
    try_folder(folder)
    print(f"{len(runs)} runs in {folder}, {len(left)} of them to do", flush=True)
    if failed := run_sweep(runs, left, jobs):
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(map(str, failed))}")
    print(f"all {len(runs)} runs are done; ping-llm compare {folder}")


def run_sweep(runs: Sequence[SweepRun], left: Sequence[SweepRun], jobs: int = 1) -> list[Failure]:
    """Trains the runs that are `left`, `jobs` at a time, each with its share of the cores; those that failed.

    ValueError: another process trains one of them. KeyboardInterrupt once all have saved after SIGINT or SIGTERM.
    """
    if not left:
        return []
    stops: list[int] = []
    out = left[0].folder.parent
    with write_lock(out, out / ".lock"), on_signals((signal.SIGINT, signal.SIGTERM), stops.append):
        _wait_for_earlier(left, stops)
        return _Sweep(runs, list(left), jobs, stops).run()


@dataclass
class _Sweep:
    runs: Sequence[SweepRun]
    waiting: list[SweepRun]
    jobs: int
    stops: list[int]  # signals that came
    going: list[_Going] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    heeded: int = 0  # of the signals
    begun: float = field(default_factory=time.monotonic)
    begun_share: float | None = None  # of all runs, that was done then

    def __post_init__(self) -> None:
        self.done = len(self.runs) - len(self.waiting)

    def run(self) -> list[Failure]:
        live = _LiveLine()
        try:
            while self.going or (self.waiting and not self.stops):
                while self.waiting and len(self.going) < self.jobs and not self.stops:
                    self._start(self.waiting.pop(0))
                for one in [one for one in self.going if one.process.poll() is not None]:
                    self.going.remove(one)
                    live.clear()
                    self._end(one)
                self._heed_signals()
                live.show(self._line)
                time.sleep(POLL_S)
        finally:
            live.clear()
            self._end_all()
        if self.stops and self.done < len(self.runs):
            print(f"{self.done} of {len(self.runs)} runs are done; the same command goes on", flush=True)
            raise KeyboardInterrupt
        return self.failures

    def _start(self, run: SweepRun) -> None:
        taken = {one.place for one in self.going}
        place = next(place for place in range(self.jobs) if place not in taken)
        command = [sys.executable, "-m", "ping_llm", "train", str(run.write_config())]
        log = run.log.open("a", encoding="utf-8")
        settings = environment() | share_of_machine(place, self.jobs, run.config.train.device)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=settings,
            start_new_session=True,  # a signal of the terminal is passed on once, by this process
            preexec_fn=_end_with(os.getpid()),
        )
        self.going.append(_Going(run, process, log, place))

    def _end(self, one: _Going) -> None:
        """Marks a run that is done; writes down one that failed."""
        one.log.close()
        code, (step, done) = one.process.returncode, saved(one.run.config)
        if code == 0 and done:
            (one.run.folder / DONE).touch()
            self.done += 1
            print(f"{one.run.name}: done, {step:,} steps in {time.monotonic() - one.begun:,.0f} s", flush=True)
        elif not self.stops:
            self.failures.append(Failure(one.run, _why(one.run, code, step)))
            print(f"failed: {self.failures[-1]}", flush=True)

    def _heed_signals(self) -> None:
        """The first signal has the runs save and stop, the next one ends them at once."""
        if len(self.stops) > self.heeded:
            self.heeded = len(self.stops)
            for one in self.going:
                one.process.send_signal(signal.SIGTERM if self.heeded == 1 else signal.SIGKILL)

    def _end_all(self) -> None:
        """Nothing goes on training when the sweep ends by an error of its own."""
        for one in self.going:
            one.process.terminate()
        for one in self.going:
            one.process.wait()
            one.log.close()

    def _line(self) -> str:
        """How far it is, and how long it will take at the rate so far."""
        shares = {one.run.name: progress(one.run) for one in self.going}
        share = (self.done + sum(shares.values())) / len(self.runs)
        if self.begun_share is None:
            self.begun_share = share
        text = f"{self.done} of {len(self.runs)} runs done"
        text += f", {len(self.failures)} failed" if self.failures else ""
        if (gained := share - self.begun_share) > 0:
            text += f"  about {(time.monotonic() - self.begun) * (1 - share) / gained / 60:.1f} min left"
        return "  ".join([text, *(f"{name} {share:.0%}" for name, share in shares.items())])


def share_of_machine(place: int, jobs: int, device: str) -> dict[str, str]:
    """Environment of a run beside others: its share of the cores and, by turns, one of the GPUs that may be seen."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) else cores()
    share = {"OMP_NUM_THREADS": str(max(1, threads // jobs))}
    if jobs > 1 and device != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible is not None else _gpus()
        if gpus and gpus != [""]:
            share["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    return share


def progress(run: SweepRun) -> float:
    """The share of a run that is done, by the last line of its metrics; 0 if there is none."""
    try:
        with (run.folder / METRICS_NAME).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return 0.0
    last = next((row for row in map(parse_line, reversed(lines)) if row is not None), {})
    found = (last.get("step", 0), last.get("tokens") or 0, last.get("time_s") or 0.0)
    return min(1.0, schedule.progress(*found, run.config.train))


def _wait_for_earlier(runs: Sequence[SweepRun], stops: Sequence[int]) -> None:
    """Waits for the runs of a sweep that was killed to save; ValueError if one does not end."""
    deadline = time.monotonic() + LOCK_WAIT_S
    for run in runs:
        while run.folder.is_dir() and not stops:
            try:
                with write_lock(run.folder, run.folder / ".lock"):
                    break
            except ValueError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)


def _end_with(parent: int) -> Callable[[], None]:
    """Called in a new process, has the kernel send it SIGTERM when this one ends, however it ends: then it saves. Only on
    Linux; elsewhere it would go on training alone, with its folder locked."""
    with suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None).prctl

        def arrange() -> None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it has ended before that
                os._exit(1)

        return arrange
    return lambda: None


def _why(run: SweepRun, code: int, step: int) -> str:
    """Why a run ended, by the last error in its log, or by its exit code."""
    with suppress(OSError):
        lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
        if code > 0 and lines:
            return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    if code < 0:
        return f"killed by {signal.Signals(-code).name} after step {step:,}"
    return f"ended with code {code} after step {step:,}"


def _gpus() -> list[str]:
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


class _LiveLine:
    """A line on a terminal that changes in place; elsewhere there is none."""

    def __init__(self) -> None:
        self.live = sys.stderr is not None and sys.stderr.isatty()
        self.last = 0.0

    def show(self, text: Callable[[], str]) -> None:
        if self.live and time.monotonic() - self.last >= LINE_EVERY_S:
            self.last = time.monotonic()
            width = shutil.get_terminal_size().columns
            self._write(f"\r\x1b[2K{text()[: width - 1]}")

    def clear(self) -> None:
        if self.live:
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()
