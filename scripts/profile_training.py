"""A config in, where the time and the memory of its training steps go out; for bench_train.py.

What is compared is timed in turns in one process. Nothing that is timed compiles, makes its first buffers, or starts while
the device is still at work on something else.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from ping_llm.config import Config, DataConfig, ModelConfig
from ping_llm.data.pipeline import block_steps
from ping_llm.launch.plan import SPARE_SHARE, activation_bytes, fixed_bytes
from ping_llm.model.counts import mean_flops_per_token, parameter_count
from ping_llm.model.gpt import GPT, VOCAB_SIZE
from ping_llm.system.hardware import native_bf16, peak_flops, peak_memory_gb
from ping_llm.system.progress import cores
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective, resolve_compile, resolve_compile_optimizer
from ping_llm.training.optimizer import Optimizer
from ping_llm.training.run_state import RunState
from ping_llm.training.saver import Saver
from ping_llm.training.trainer import Feed, Training

STEPS_BETWEEN_SAVES = 200
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
SDPA_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_LR_SCALE = 0.01  # random tokens teach nothing: small steps keep the weights as they are
_MOMENTUM, _WEIGHT_DECAY = 0.95, 0.1
_WARM_UP_STEPS = 3
_PROFILED_STEPS = 3


@dataclass(frozen=True)
class Effort:
    """How often things are timed."""

    rounds: int = 5  # in which what is compared takes turns; the median counts
    steps: int = 5  # of each in a round
    blocks: int = 3  # of the loader, each of block_steps(data.windows_per_read) steps
    saves: int = 2


def profile_training(
    config: Config, device: torch.device, effort: Effort, matmul_flops: float
) -> tuple[Training, dict[str, Any]]:
    """A run and all that is measured of it on synthetic batches; torch.OutOfMemoryError if its batch does not fit.

    `matmul_flops` are the FLOP/s of one large product, the peak that can be reached. Tokens count padding too.
    """
    training, tokens = new_training(config, device), synthetic_tokens(config, device)
    eager, compiled, report = _objectives(training, tokens)
    timed = {name: run for name, run in (("eager", eager), ("compiled", compiled)) if run is not None}
    steps = {name: lambda run=run: take_step(run, tokens) for name, run in timed.items()}
    seconds = compare(steps, device, effort.rounds, effort.steps)
    wanted = resolve_compile(config.train.compile, device)
    chosen = "compiled" if "compiled" in timed and (wanted or "eager" not in timed) else "eager"
    training, step_s = timed[chosen], seconds[chosen]
    places = config.train.batch_size * config.place_tokens
    flops = places * mean_flops_per_token(config) / step_s
    report |= {
        "batch_size": config.train.batch_size,
        "seq_len": config.model.seq_len,
        "parameters": parameter_count(config.model),
        "precision": training.objective.precision,
        "steps": chosen,
        "step_ms": step_s * 1e3,
        "tokens_per_s": places / step_s,
        "mfu": flops / (peak_flops(device) or matmul_flops),
        "mfu_of_matmul": flops / matmul_flops,
        "compiled_to_eager": seconds["compiled"] / seconds["eager"] if len(seconds) == 2 else None,
        "peak_memory_gb": _peak_memory(training, tokens),
    }
    report |= optimizer_times(training, tokens, step_s, effort)
    report |= {"save": save_times(training, tokens, effort) if effort.saves else {}}
    report |= {"profile": top_kernels(lambda: take_step(training, tokens), device, step_s)}
    return training, report


def new_training(config: Config, device: torch.device) -> Training:
    """A run at its start that has no folder and no data of its own."""
    ranks = Ranks(device)
    with device:  # a large model takes long to be drawn on the CPU
        model = GPT(config.model, generator=torch.Generator(device).manual_seed(config.seed)).to(device)
    optimizer = Optimizer(model, config.optim, ranks, resolve_compile_optimizer(config.train.compile, device))
    objective = Objective(config, model, ranks)
    state, windows = RunState.new("bench", objective.precision), torch.empty(0, config.model.seq_len + 1)
    return Training(config, Feed.of_rows(), ranks, state, model, optimizer, objective, windows, None)


def synthetic_tokens(config: Config, device: torch.device) -> Tensor:
    """Random tokens without padding, B lines of `windows_of`, int64."""
    windows = 1 + config.data.short_windows  # in a line; each has a token more than the model reads
    shape = (config.train.batch_size, config.place_tokens + windows)
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(config.seed)).to(device)


def take_step(training: Training, tokens: Tensor) -> None:
    """One step as the training loop takes it; waits for the device where that does."""
    state = training.state
    _, totals = training.objective.backward(tokens, 0.0, 0.0, loss_scale=state.loss_scale)
    grad_norm = training.gradient_norm()
    totals.tolist()
    training.apply_gradients(grad_norm, _LR_SCALE, 0.0)
    assert math.isfinite(grad_norm), f"step {state.step} would be skipped: {grad_norm=}"
    state.count(training.config, len(tokens) * training.config.place_tokens, 0.0, skipped=False)


def compare(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int, calls: int = 1
) -> dict[str, float]:
    """Median seconds of a call of each; they take turns, so that whatever slows the machine slows all of them."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize(device)
            seconds[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    """Gives back what no tensor takes, and forgets compiled code: a second batch size would be compiled for any size."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def matmul_peak(device: torch.device, rounds: int = 5) -> dict[str, Any]:
    """FLOP/s of one large square matrix product, the best of several rounds: bf16 where it is native, else fp32."""
    size, dtype = MATMUL_SIZE[device.type], torch.bfloat16 if native_bf16(device) else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    compare({"warm-up": lambda: torch.mm(a, b, out=out)}, device, rounds=1, calls=3)
    tries = [compare({"mm": lambda: torch.mm(a, b, out=out)}, device, rounds=1, calls=10)["mm"] for _ in range(rounds)]
    return {"flops": 2 * size**3 / min(tries), "size": size, "dtype": str(dtype).removeprefix("torch.")}


def largest_batch(model: ModelConfig, device: torch.device) -> int:
    """Windows of a compiled step that should fit into the memory of a GPU: a power of two; at least 1."""
    memory = torch.cuda.get_device_properties(device).total_memory * (1 - SPARE_SHARE)
    fits = max(1, int((memory - fixed_bytes(model)) / activation_bytes(model)))
    return 1 << (fits.bit_length() - 1)


def with_train(config: Config, **values: Any) -> Config:
    """The config with other values in [train]."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))


def _objectives(training: Training, tokens: Tensor) -> tuple[Training | None, Training | None, dict[str, Any]]:
    """The run with eager and with compiled steps, both warm; None where the memory or a compiler is missing."""

    def variant(compile: bool) -> Training:
        config = with_train(training.config, compile=compile)
        return dataclasses.replace(training, objective=Objective(config, training.model, training.ranks))

    eager, compiled, report = variant(False), variant(True), {"compile_s": None, "not_compiled": None}
    try:
        _seconds(eager, tokens, _WARM_UP_STEPS)
    except torch.OutOfMemoryError:
        eager = None
    training.model.zero_grad()
    free_memory()
    try:
        first_s = _seconds(compiled, tokens, 1)
        report["compile_s"] = first_s - _seconds(compiled, tokens, _WARM_UP_STEPS) / _WARM_UP_STEPS
    except TorchDynamoException as error:
        compiled, report["not_compiled"] = None, str(error).strip().splitlines()[0]
        training.model.zero_grad()
        if eager is None:
            raise
    return eager, compiled, report


def _seconds(training: Training, tokens: Tensor, steps: int) -> float:
    return compare({"": lambda: take_step(training, tokens)}, training.ranks.device, 1, steps)[""] * steps


def _peak_memory(training: Training, tokens: Tensor) -> float:
    """GB at most during a step; on the CPU, of the process so far."""
    device = training.ranks.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _seconds(training, tokens, 2)
    return peak_memory_gb(device)


def optimizer_times(training: Training, tokens: Tensor, step_s: float, effort: Effort) -> dict[str, Any]:
    """The update's share of a step, the time of Muon over that of torch.optim.Muon, and what launching it costs.

    Overhead is the share of the update in which the GPU has nothing to do, because Python is not there yet.
    """
    device, optimizer = training.ranks.device, training.optimizer
    training.objective.backward(tokens, 0.0, 0.0)
    optimizer.set_lrs(_LR_SCALE)
    theirs = torch.optim.Muon(training.model.blocks.parameters(), optimizer.muon.lr, _WEIGHT_DECAY, _MOMENTUM)
    functions = {
        "update": lambda: optimizer.step(_MOMENTUM, _WEIGHT_DECAY),
        "muon": lambda: optimizer.muon.step(_MOMENTUM, _WEIGHT_DECAY),
        "torch_muon": theirs.step,
    }
    compare(functions, device, rounds=1, calls=2)  # warm-up
    seconds = compare(functions, device, 2 * effort.rounds)
    report = {f"{name}_ms": value * 1e3 for name, value in seconds.items()} | {"launch_ms": None, "device_ms": None}
    report["overhead_share"] = None
    if device.type == "cuda":
        launch_s, device_s = hidden_launch(functions["update"], device)
        report |= {"launch_ms": launch_s * 1e3, "device_ms": device_s * 1e3}
        report["overhead_share"] = 1 - device_s / seconds["update"]
    training.model.zero_grad()
    return {
        "optimizer_share": seconds["update"] / step_s,
        "muon_to_torch": seconds["muon"] / seconds["torch_muon"],
        "optimizer": report,
    }


def hidden_launch(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds in which Python launches `function`, and in which the GPU does it, launched while it does something else."""
    a = torch.randn(MATMUL_SIZE["cuda"], MATMUL_SIZE["cuda"], device=device, dtype=torch.bfloat16)
    out, products = torch.empty_like(a), 16
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        for _ in range(products):
            torch.mm(a, a, out=out)
        start.record()
        started = time.perf_counter()
        function()
        launch_s = time.perf_counter() - started
        hidden = not start.query()  # the GPU has not come to it yet
        end.record()
        torch.cuda.synchronize(device)
        if hidden or products >= 512:
            return launch_s, start.elapsed_time(end) / 1e3
        products *= 2


def save_times(training: Training, tokens: Tensor, effort: Effort) -> dict[str, float]:
    """What a save takes: of the loop while it copies, and of the steps beside which a thread writes.

    `share` is both over the time of the steps between two saves.
    """
    device, model, state, notes = training.ranks.device, training.model, training.state, []
    rounds = []
    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), 1, notes.append) as saver:

        def save() -> None:
            saver.save(state.step, model.state_dict(), training.optimizer.state_dict(), dataclasses.asdict(state))

        save()  # makes the buffers
        saver.wait()
        for _ in range(effort.saves):
            alone_s = _seconds(training, tokens, effort.steps) / effort.steps
            held_s = compare({"": save}, device, 1)[""]
            started, steps = time.perf_counter(), 0
            while saver.thread.is_alive() or not steps:
                take_step(training, tokens)
                steps += 1
            beside_s = (time.perf_counter() - started) / steps
            share = (held_s + steps * (beside_s - alone_s)) / (STEPS_BETWEEN_SAVES * alone_s)
            rounds.append((share, held_s * 1e3, steps, beside_s / alone_s))
    if notes:
        raise OSError(notes[0])
    medians = map(statistics.median, zip(*rounds, strict=True))
    return dict(zip(("share", "held_ms", "steps_beside", "step_beside_to_alone"), medians, strict=True))


def profile_loader(training: Training, rows: Path, effort: Effort) -> dict[str, Any]:
    """Steps on batches of the loader over steps on one synthetic batch, and the share of their time spent waiting.

    All that was made ahead is thrown away first, so that no step lives on it.
    """
    config, device = training.config, training.ranks.device
    tokens = synthetic_tokens(config, device)
    workers = min(config.data.workers, max(0, cores() - 1))
    data = dataclasses.replace(config.data, rows=rows, prefetch=1, workers=workers)
    config, steps = dataclasses.replace(config, data=data), effort.blocks * block_steps(data.windows_per_read)
    _seconds(training, tokens, _WARM_UP_STEPS)
    before_s = _seconds(training, tokens, effort.steps) / effort.steps
    with closing(training.feed.batches(config, 0, device, 0, 1)) as batches:
        for _ in range(_made_ahead(data)):
            next(batches)
        take_step(training, next(batches))
        synchronize(device)
        wait_s, started = 0.0, time.perf_counter()
        for _ in range(steps):
            waiting = time.perf_counter()
            batch = next(batches)
            wait_s += time.perf_counter() - waiting
            take_step(training, batch)
        synchronize(device)
        fed_s = time.perf_counter() - started
    after_s = _seconds(training, tokens, effort.steps) / effort.steps
    return {
        "fed_tokens_per_s": steps * len(tokens) * config.place_tokens / fed_s,
        "fed_to_synthetic": (before_s + after_s) / 2 / (fed_s / steps),
        "data_wait_share": wait_s / fed_s,
        "workers": data.workers,
        "fed_steps": steps,
    }


def _made_ahead(data: DataConfig) -> int:
    """Batches that the loader may hold: a block that is read, and two in each process."""
    return (1 + 2 * max(1, data.workers)) * block_steps(data.windows_per_read)


def attention_ratios(config: Config, device: torch.device, effort: Effort) -> dict[str, float | None]:
    """Seconds of attention, forward and backward, by each backend of SDPA over those of its own choice.

    None for a backend that cannot do it.
    """
    D, H = config.model.n_embd, config.model.n_head
    shape = (config.train.batch_size, config.model.seq_len, H, D // H)
    dtype = torch.bfloat16 if native_bf16(device) else torch.float32
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))  # (B, T, H, K)
    slope = torch.randn(shape, device=device, dtype=dtype).transpose(1, 2)  # (B, H, T, K)

    def attend(backend: str | None) -> None:
        with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
            y = F.scaled_dot_product_attention(*(heads.transpose(1, 2) for heads in (q, k, v)), is_causal=True)
            torch.autograd.grad(y, (q, k, v), slope)

    functions = {"default": lambda: attend(None)}
    for name in SDPA_BACKENDS:
        try:
            with warnings.catch_warnings(action="ignore"):  # that say why it cannot
                attend(name)
            functions[name] = lambda name=name: attend(name)
        except RuntimeError:
            continue
    compare(functions, device, rounds=1, calls=3)  # warm-up
    seconds = compare(functions, device, effort.rounds, calls=10)
    return {name: seconds[name] / seconds["default"] if name in seconds else None for name in SDPA_BACKENDS}


def top_kernels(step: Callable[[], object], device: torch.device, step_s: float, count: int = 10) -> dict[str, Any]:
    """What takes the most time by itself, as shares of all: kernels of the GPU, or operators of the CPU.

    `busy_share` is the time of all kernels over that of the steps, which were timed without the profiler.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(_PROFILED_STEPS):
            step()
        synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # Annotations span kernels that are listed themselves.
    events = [event for event in profiler.key_averages() if event.device_type == kind and not event.is_user_annotation]
    times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    total_us = sum(times.values())
    largest = sorted(times, key=times.get, reverse=True)[:count]
    counts = {event.key: event.count / _PROFILED_STEPS for event in events}
    return {
        "busy_share": total_us / 1e6 / _PROFILED_STEPS / step_s if on_gpu else None,
        "kernels_per_step": round(sum(counts.values())),
        "top": [{"name": name, "share": times[name] / total_us, "calls_per_step": counts[name]} for name in largest],
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table of GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
