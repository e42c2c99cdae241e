"""Runs `ping-llm prepare` on Modal: each dump and each bucket in a container of its own, over one Volume.

    modal volume put ping-llm-data dump /dump
    modal run --detach scripts/prepare_modal.py --inputs /data/dump --out /data/rows
    modal volume get ping-llm-data /rows

Repeated after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from threading import Lock

import modal

DATA = "/data"
CONTAINERS = 50
HOURS_24_S = 86_400

image = (
    modal.Image.debian_slim(python_version="3.11")
    .pip_install_from_pyproject("pyproject.toml")
    .add_local_python_source("ping_llm")
)
volume = modal.Volume.from_name("ping-llm-data", create_if_missing=True)
app = modal.App("ping-llm-prepare", image=image)


@app.function(volumes={DATA: volume}, cpu=1, memory=2048, timeout=HOURS_24_S, retries=3, max_containers=CONTAINERS)
def run_task(function: Callable[[object], dict], task: object) -> dict:
    """One task; what it wrote is in the Volume before its report is given."""
    volume.reload()
    report = function(task)
    volume.commit()
    return report


class ModalExecutor(Executor):
    """Each task is a call of `run_task`; before it and after it the Volume is brought up to date here."""

    def __init__(self) -> None:
        self._threads, self._volume_lock = ThreadPoolExecutor(CONTAINERS), Lock()

    def submit(self, function: Callable[[object], dict], /, task: object) -> Future:
        return self._threads.submit(self._call, function, task)

    def _call(self, function: Callable[[object], dict], task: object) -> dict:
        with self._volume_lock:
            volume.commit()
        report = run_task.remote(function, task)
        with self._volume_lock:
            volume.reload()
        return report


@app.function(volumes={DATA: volume}, cpu=1, memory=4096, timeout=HOURS_24_S, retries=3)
def prepare_rows(inputs: list[str], out: str, packets: str, split: str, traceroute: str) -> dict:
    """`prepare` with its tasks in containers; gives the manifest."""
    from ping_llm.data.prepare import prepare

    manifest = prepare(
        inputs, out, CONTAINERS, packets=packets, split=split, traceroute=traceroute, executor=ModalExecutor()
    )
    volume.commit()
    return manifest


@app.local_entrypoint()
def main(inputs: str, out: str, packets: str = "one", split: str = "pingbench", traceroute: str = "off") -> None:
    manifest = prepare_rows.remote(inputs.split(","), out, packets, split, traceroute)
    print(json.dumps({name: manifest[name] for name in ("lines", "measurements", "parts")}, indent=1))
