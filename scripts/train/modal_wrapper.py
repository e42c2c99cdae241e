"""A command to prepare, train or infer in; containers of Modal that run it out.

    modal volume put ping-llm-data dumps /dumps
    modal run --detach scripts/train/modal_wrapper.py::prepare data/dumps --out data/rows
    modal run --detach scripts/train/modal_wrapper.py::train --gpu H100:8 configs/full.toml --train.run-dir runs/full
    modal run --detach scripts/train/modal_wrapper.py::sweep --gpu L4 SWEEP.toml --out runs/NAME
    modal run scripts/train/modal_wrapper.py::infer rtt --model runs/full --src ADDRESS --dst ADDRESS --json
    modal volume get ping-llm-runs /full runs/full

In a container the Volumes are the folders data and runs of where it works, so files have the same names there and here.
--detach lets the work go on when this machine is switched off. Whatever was interrupted goes on where it stopped: by
itself if Modal took the machine away, else when the command is repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import modal

if TYPE_CHECKING:
    from ping_llm.config import Config
    from ping_llm.launch.modal_job import Order

REPOSITORY = Path(
    *Path(__file__).resolve().parts[:-3]
)  # in a container, where this file lies elsewhere, no one reads it
WORK = Path("/")
"""The folder a container works in; data and runs are below."""
DATA, RUNS = "data", "runs"
LOCAL_DISK = "/tmp"
CONTAINERS = 50
HOURS_24_S = 86_400
STOP_AFTER_S = HOURS_24_S - 900
"""Training saves and hands over to its next try before Modal's longest time for a call is up."""
CORES_A_GPU, MEMORY_MB_A_GPU = 4.0, 16_384
INFERENCE_GPU = "L4"
MODAL_NAMES = {"a100": "A100-80GB"}  # a bare A100 has 40 GB there
KEY = "WANDB_API_KEY"
PINS = "/constraints.txt"

data_volume = modal.Volume.from_name("ping-llm-data", create_if_missing=True)
runs_volume = modal.Volume.from_name("ping-llm-runs", create_if_missing=True)
MOUNTS = {f"/{DATA}": data_volume, f"/{RUNS}": runs_volume}
image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install("g++")  # torch.compile calls it
    .add_local_file(REPOSITORY / "constraints.txt", PINS, copy=True)
    .pip_install_from_pyproject(
        str(REPOSITORY / "pyproject.toml"), ["plots", "baselines"], extra_options=f"--constraint {PINS}"
    )
    .add_local_python_source("ping_llm")
)
app = modal.App("ping-llm", image=image)
again = modal.Retries(max_retries=10, initial_delay=10.0, backoff_coefficient=2.0)


@app.function(volumes=MOUNTS, cpu=1, memory=2048, timeout=HOURS_24_S, retries=3, max_containers=CONTAINERS)
def run_task(function: Callable[..., dict], *arguments: object) -> dict:
    """One task of `prepare`; what it wrote is in the Volume before its report is given."""
    data_volume.reload()
    report = function(*arguments)
    data_volume.commit()
    return report


class ModalExecutor(Executor):
    """Each task is a call of `run_task`; before it and after it the Volume is brought up to date here."""

    def __init__(self) -> None:
        self._threads, self._volume_lock = ThreadPoolExecutor(CONTAINERS), Lock()

    def submit(self, function: Callable[..., dict], /, *arguments: object) -> Future:
        return self._threads.submit(self._call, function, *arguments)

    def _call(self, function: Callable[..., dict], *arguments: object) -> dict:
        with self._volume_lock:
            data_volume.commit()
        report = run_task.remote(function, *arguments)
        with self._volume_lock:
            data_volume.reload()
        return report


@app.function(volumes=MOUNTS, cpu=1, memory=4096, timeout=HOURS_24_S, retries=again)
def prepare_rows(inputs: list[str], out: str, options: dict[str, str]) -> dict:
    """`prepare`, each dump and each bucket in a container of its own: what the manifest counts, or an `error`."""
    from ping_llm.data.ingest.prepare import prepare

    try:
        manifest = prepare(inputs, out, CONTAINERS, executor=ModalExecutor(), **options)
    except ValueError as error:
        return {"error": str(error)}
    data_volume.commit()
    return {name: manifest[name] for name in ("lines", "measurements", "parts")}


@app.function(volumes=MOUNTS, cpu=1, memory=2048, timeout=600)
def look(toml: str, options: list[str], gpus: int) -> dict:
    """Where a run stands, or an `error`, from a machine that costs little: its `step`, whether it is `done`, and the speed
    `measured`."""
    from ping_llm.launch.job import saved
    from ping_llm.launch.modal_job import measured

    data_volume.reload()
    runs_volume.reload()
    with _config_file(toml) as file:
        try:
            config = _check([file, *options], gpus)
        except ValueError as error:
            return {"error": str(error)}
    step, done = saved(config)
    return {"step": step, "done": done, "measured": measured(config.train.run_dir)}


@app.function(volumes=MOUNTS, timeout=HOURS_24_S, retries=again, single_use_containers=True)
def train_run(toml: str, options: list[str], gpus: int, local_disk: str = LOCAL_DISK) -> dict:
    """Trains, or goes on with it: the last `step`, or an `error` that another try would only repeat.

    KeyboardInterrupt once it has saved because Modal takes the machine away: then Modal starts it again. RuntimeError
    when its time is up, or after a crash that left a new checkpoint: one of its tries.
    """
    from ping_llm.launch.job import copy_rows, saved
    from ping_llm.launch.modal_job import SIGNAL, run_ranks

    stop_at_s = time.monotonic() + STOP_AFTER_S
    with _config_file(toml) as file:
        try:
            config = _check([file, *options], gpus)
            if local_disk != "none":
                copy_rows(config.data.rows, Path(local_disk))
        except ValueError as error:
            return {"error": str(error)}
        before, _ = saved(config)
        code, reason = run_ranks(
            gpus, [file, *options], local_disk, config.train.run_dir, runs_volume.commit, stop_at_s
        )
    step, done = saved(config)
    if done:
        return {"step": step}
    if reason == SIGNAL:
        raise KeyboardInterrupt
    if reason or step > before:
        raise RuntimeError(
            f"{reason or f'training ended with code {code}'} after step {step:,}; it goes on in a new try"
        )
    return {"error": f"training ended with code {code} before it saved a step after {step:,}; the lines above say why"}


@app.function(volumes=MOUNTS, gpu=INFERENCE_GPU, cpu=2.0, memory=8192, timeout=3600)
def run_inference(arguments: list[str]) -> dict:
    """`ping-llm inference` with these arguments: its exit `code`, `output` and `errors`."""
    from ping_llm.launch.modal_job import environment

    data_volume.reload()
    runs_volume.reload()
    command = [sys.executable, "-m", "ping_llm", "inference", *arguments]
    done = subprocess.run(command, cwd=WORK, env=environment(), capture_output=True, text=True)
    data_volume.commit()  # what --output or --plot wrote
    runs_volume.commit()
    return {"code": done.returncode, "output": done.stdout, "errors": done.stderr}


@contextlib.contextmanager
def _config_file(toml: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(toml)
        yield str(path)


def _check(argv: list[str], gpus: int) -> Config:
    """The config of a run; ValueError if it cannot be trained in this container."""
    from ping_llm.config import parse_config
    from ping_llm.launch.job import check_run

    config = parse_config(argv, "train")
    if not (config.data.rows / "manifest.json").is_file():
        raise ValueError(
            f"the Volume ping-llm-data holds no rows at {config.data.rows.relative_to(WORK)}; make them with ::prepare, or "
            "put yours there with modal volume put"
        )
    if config.train.wandb == "online" and not os.environ.get(KEY):
        raise ValueError(f"{KEY} is not set; pass --wandb-secret NAME, a Modal secret that has it")
    check_run(config, gpus)
    return config


def _place(field: str, path: Path) -> str:
    """The name of a path in a container; ValueError unless it lies in the Volume that its field belongs to."""
    folder = RUNS if field == "train.run_dir" else DATA
    parts = Path("/", path).parts[1:]
    if len(parts) < 2 or parts[0] != folder or ".." in parts:
        raise ValueError(
            f"{field} {path} must lie below {folder}/, the Volume ping-llm-{folder}: no other files are there"
        )
    return str(WORK.joinpath(*parts))


def _secrets(config: Config, name: str) -> list[modal.Secret]:
    """Those that the run needs; ValueError if there is none of this name."""
    if config.train.wandb != "online":
        return []
    secret = modal.Secret.from_name(name, required_keys=[KEY])
    try:
        secret.hydrate()
    except modal.exception.NotFoundError:
        raise ValueError(
            f"there is no Modal secret {name!r} with {KEY}; make it with modal secret create {name} {KEY}=…, or pass "
            "--train.wandb offline"
        ) from None
    return [secret]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, modal.exception.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _answer(answer: dict) -> dict:
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


@app.local_entrypoint()
def prepare(*arguments: str) -> None:
    """INPUT… --out data/rows [--packets one|all] [--split pingbench|none] [--traceroute off|target|hops]"""
    parser = argparse.ArgumentParser("modal run …::prepare", allow_abbrev=False)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--out", required=True)
    for name, default in (("packets", "one"), ("split", "pingbench"), ("traceroute", "off")):
        parser.add_argument(f"--{name}", default=default)
    options = vars(parser.parse_args(list(arguments)))
    with _one_line_errors():
        inputs = [_place("INPUT", Path(name)) for name in options.pop("inputs")]
        out = _place("--out", Path(options.pop("out")))
        print(json.dumps(_answer(prepare_rows.remote(inputs, out, options)), indent=1))


@app.local_entrypoint()
def train(*arguments: str) -> None:
    """[--gpu KIND[:COUNT]] [--tokens-per-s N] [--wandb-secret NAME] [--local-disk DIR|none] CONFIG.toml [--section.option value …]"""  # noqa: E501
    from ping_llm.launch.modal_job import Order

    with _one_line_errors():
        order = Order.parse(arguments, "modal run …::train", LOCAL_DISK, _place)
        print("\n".join(order.cost()), flush=True)
        secrets, run = _secrets(order.config, order.wandb_secret), (order.toml, order.options, order.gpus)
        standing = _answer(look.with_options(secrets=secrets).remote(*run))
        if standing["measured"] and not order.tokens_per_s:
            print("\n".join(order.cost(standing["measured"])))
        print(f"{order.config.train.run_dir}: {standing['step']:,} steps are done", flush=True)
        train_there = train_run.with_options(**_machine(order), secrets=secrets)
        step = _answer(train_there.remote(*run, order.local_disk))["step"]
        print(f"{order.config.train.run_dir}: all {step:,} steps are done")


@app.local_entrypoint()
def sweep(*arguments: str) -> None:
    """[--gpu KIND[:COUNT]] [--tokens-per-s N] [--wandb-secret NAME] [--local-disk DIR|none] SWEEP.toml [--out runs/NAME]"""
    from ping_llm.launch.modal_job import Order

    with _one_line_errors():
        orders = Order.of_sweep(arguments, "modal run …::sweep", LOCAL_DISK, _place)
        prices = [order.price() for order in orders]
        for order, (hours, dollars) in zip(orders, prices, strict=True):
            print(f"{order.config.train.run_dir}: {hours:,.2f} hours, {dollars:,.2f} dollars")
        print(f"{len(orders)} runs, {sum(dollars for _, dollars in prices):,.2f} dollars in all", flush=True)
        secrets = [secret for order in orders for secret in _secrets(order.config, order.wandb_secret)][:1]
        looks = look.with_options(secrets=secrets).starmap([(o.toml, o.options, o.gpus) for o in orders])
        left = [order for order, there in zip(orders, map(_answer, looks), strict=True) if not there["done"]]
        print(f"{len(orders) - len(left)} of {len(orders)} runs are done", flush=True)
        train_there = train_run.with_options(**_machine(orders[0]), secrets=secrets)
        calls = [(order.toml, order.options, order.gpus, order.local_disk) for order in left]
        failed = []
        for order, answer in zip(
            left, train_there.starmap(calls, return_exceptions=True) if calls else (), strict=True
        ):
            error = answer if isinstance(answer, BaseException) else answer.get("error")
            failed += [str(order.config.train.run_dir)] if error else []
            standing = error or f"all {answer['step']:,} steps are done"
            print(f"{order.config.train.run_dir}: {standing}", flush=True)
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(orders)} runs failed: {', '.join(failed)}; the lines above say why"
            )


def _machine(order: Order) -> dict:
    """What Modal is asked for."""
    gpu = f"{MODAL_NAMES.get(order.gpu, order.gpu.upper())}:{order.gpus}"
    return {"gpu": gpu, "cpu": CORES_A_GPU * order.gpus, "memory": MEMORY_MB_A_GPU * order.gpus}


@app.local_entrypoint()
def infer(*arguments: str) -> None:
    """rtt|batch|… as `ping-llm inference` takes them; files are below data and runs"""
    with _one_line_errors():
        answer = run_inference.remote(list(arguments))
    print(answer["output"], end="")
    print(answer["errors"], end="", file=sys.stderr)
    if answer["code"]:
        raise SystemExit(answer["code"])
