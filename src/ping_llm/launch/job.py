"""A run on a rented or queued machine in; whether it can be trained, how far it is and a local copy of its rows out."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import ping_llm
from ping_llm.config import Config
from ping_llm.data.rows import RowReader, manifest_sha256, shard_paths
from ping_llm.training import schedule

DONE, PREEMPTED = "DONE", "PREEMPTED"  # files in a run folder that say how the last turn of a job ended
SPARE_SHARE = 0.05  # of a local disk, left free


def check_run(config: Config, processes: int) -> None:
    """ValueError if so many processes cannot train the run, on whatever machines; removes the marks of earlier turns."""
    config.train.check_processes(processes)
    _shards(config.data.rows)
    for name in (DONE, PREEMPTED):
        (config.train.run_dir / name).unlink(missing_ok=True)


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders of the whole checkpoints, oldest first."""
    return sorted(run_dir.glob("checkpoints/step-????????"))


def saved(config: Config) -> tuple[int, bool]:
    """The step of the newest checkpoint, 0 if there is none, and whether it is the last of the run."""
    for folder in reversed(checkpoints(config.train.run_dir)):
        try:
            state = json.loads((folder / "state.json").read_text())
            done = schedule.progress(state["step"], state["tokens"], state["elapsed_s"], config.train) >= 1
        except (OSError, ValueError, KeyError):
            continue  # damaged: the trainer, too, continues from the one before
        return state["step"], done
    return 0, False


def local_rows(rows: Path, disk: Path) -> Path:
    """Where the copy of rows is on a local disk; other rows, by their manifest, have another place."""
    return disk / f"ping-llm-rows-{manifest_sha256(rows)[:16]}"


def copy_rows(rows: Path, disk: Path) -> Path:
    """Copies what training reads of rows to a local disk, unless it is there; one process a disk copies, others wait.

    ValueError if there is no such disk or no space on it.
    """
    if not disk.is_dir():
        raise ValueError(f"there is no folder {disk} for a copy of the rows; set LOCAL_DISK to another one, or to none")
    copy = local_rows(rows, disk)
    aside = copy.with_name(f"{copy.name}.partial")
    with copy.with_name(f"{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # is released if this process dies
        if copy.exists():
            return copy
        shutil.rmtree(aside, ignore_errors=True)
        files = [*_shards(rows), *(path for path in rows.iterdir() if path.is_file() and path.suffix != ".arrayrecord")]
        needed, space = sum(path.stat().st_size for path in files), shutil.disk_usage(disk)
        if needed > space.free - SPARE_SHARE * space.total:
            raise ValueError(
                f"the rows take {needed / 1e6:,.1f} MB, {disk} has {space.free / 1e6:,.1f} MB free; free some, or set "
                "LOCAL_DISK to another folder, or to none"
            )
        aside.mkdir()
        for path in files:
            shutil.copyfile(path, aside / path.name)
        aside.rename(copy)
    return copy


def environment() -> dict[str, str]:
    """The environment of this process, with this package importable from every folder."""
    paths = [str(Path(ping_llm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _shards(rows: Path) -> list[Path]:
    """The files that training reads measurements from; ValueError if one is missing."""
    shards = []
    for part in ("train", "val"):
        reader = RowReader(rows, part)
        for name in reader.parts:
            held = shard_paths(rows, name)
            if not held[0].stem.endswith(f"-of-{len(held):05d}"):
                raise ValueError(f"{rows} has lost shards of {name}, {len(held)} are left; run ping-llm prepare again")
        shards += reader.paths
    return shards
