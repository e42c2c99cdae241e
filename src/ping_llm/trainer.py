"""A config in, a trained run folder out: the training loop, and what it does when something goes wrong.

The loop knows its place by one number, `RunState.step`: batches, schedules and logs follow from it, so a run that was
stopped and continued takes the same steps as one that was not.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ping_llm import schedule
from ping_llm.checkpoint import Checkpoint, load_config, load_latest, prune, save, save_config
from ping_llm.config import FIELDS, Config, TrainConfig, differing_fields
from ping_llm.data.rows import manifest_sha256
from ping_llm.data.tokenization import FIELD_OF_BYTES_AFTER, FIELD_OF_ROLE
from ping_llm.loss import RTT, count_results, field_losses, field_masks, field_weights, token_fields
from ping_llm.model import GPT, native_bf16, parameter_count, pick_device
from ping_llm.optim import Optimizer
from ping_llm.run_log import RunLog

MAX_SKIPPED_IN_A_ROW = 20
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

LoadBatches = Callable[[Config, int, torch.device], Iterator[Tensor]]
LoadWindows = Callable[[Config], Tensor]


@dataclass
class RunState:
    """What a run has done so far; with weights, optimiser and config it is all that the rest of the run depends on."""

    rows_sha256: str  # which rows it learns from
    step: int = 0
    samples_consumed: int = 0  # windows, over all processes
    tokens: int = 0  # trained on, padding not counted
    elapsed_s: float = 0.0  # spent in steps: not in evaluations, saves and pauses
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None  # of these very weights, None if they were not evaluated

    def count(self, windows: int, tokens: int, seconds: float) -> None:
        """Counts one step."""
        self.step += 1
        self.samples_consumed += windows
        self.tokens += tokens
        self.elapsed_s += seconds


class Objective:
    """The training loss: a weighted mean of the cross-entropy over the targets of a whole step.

    `forward` is the model, compiled or not.
    """

    def __init__(self, config: Config, forward: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.forward, self.device = forward, device
        self.micro_batch = config.train.batch_size // config.train.grad_accum  # windows
        self.role_fields = torch.as_tensor(FIELD_OF_ROLE).to(device)
        self.byte_fields = torch.as_tensor(FIELD_OF_BYTES_AFTER).to(device)
        self.weights = field_weights(config.loss).to(device)  # (5,)
        self.bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and native_bf16(device))

    def targets(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (B, T), −1 = ignored, and their fields (B, T) of windows (B, T+1)."""
        return tokens[:, 1:], token_fields(tokens, self.role_fields, self.byte_fields)[:, 1:]

    def sums(self, inputs: Tensor, targets: Tensor, fields: Tensor) -> Tensor:
        """Sum of the cross-entropy of each field in nats, (5,)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.forward(inputs)  # (B, T, V) fp32
        return field_losses(logits, targets, fields)[0]

    def backward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the gradients of the loss over a batch (B, T+1); returns sums (5,) in nats and counts (5,)."""
        targets, fields = self.targets(tokens)
        counts = field_masks(targets, fields).sum(dim=(1, 2))
        weighted_count = (self.weights * counts).sum()  # of all micro-batches, so that a token weighs the same in each
        sums = torch.zeros(len(FIELDS), device=self.device)
        parts = (tensor.split(self.micro_batch) for tensor in (tokens[:, :-1].clamp(min=0), targets, fields))
        for inputs, micro_targets, micro_fields in zip(*parts, strict=True):
            micro_sums = self.sums(inputs, micro_targets, micro_fields)
            ((self.weights * micro_sums).sum() / weighted_count).backward()
            sums += micro_sums.detach()
        return sums, counts

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> dict[str, float]:
        """Nats per target, overall and per field, and bits per result, over windows (n, T+1)."""
        sums = torch.zeros(len(FIELDS), dtype=torch.float64, device=self.device)
        counts, results = torch.zeros_like(sums), sums.new_zeros(())
        for part in windows.split(self.micro_batch):
            tokens = part.to(self.device)
            targets, fields = self.targets(tokens)
            sums += self.sums(tokens[:, :-1].clamp(min=0), targets, fields)
            counts += field_masks(targets, fields).sum(dim=(1, 2))
            results += count_results(targets, fields)
        bits = (sums[RTT] / results).item() / math.log(2)
        return {f"val_{name}": value for name, value in self.means(sums, counts).items()} | {"val_rtt_bits": bits}

    def means(self, sums: Tensor, counts: Tensor) -> dict[str, float]:
        """Loss and nats per target of each field from sums and counts; NaN for a field without targets."""
        loss = (self.weights * sums).sum() / (self.weights * counts).sum()
        values = torch.cat([loss[None], sums / counts]).tolist()
        return dict(zip(("loss", *(f"loss_{name}" for name in FIELDS)), values, strict=True))


def train(config: Config, load_batches: LoadBatches | None = None, load_windows: LoadWindows | None = None) -> RunState:
    """Trains until the run is over or a signal asks to stop, saves, and returns where it stands.

    The run folder is continued if it holds a checkpoint. `load_batches(config, start_step, device)` yields batches
    (batch_size, seq_len + 1) on the device, `load_windows(config)` gives those of val, (n, seq_len + 1); −1 = padding.
    ValueError: the folder is of another config, memory ran out, or the gradients stayed non-finite.
    """
    if load_batches is None or load_windows is None:
        from ping_llm.data.loader import training_batches, validation_windows

        load_batches, load_windows = load_batches or training_batches, load_windows or validation_windows
    device = pick_device(config.train.device)
    windows = load_windows(config)
    rows_sha256 = manifest_sha256(config.data.rows)
    resumed = _open_run(config, rows_sha256)
    torch.manual_seed(config.seed)  # nothing below draws from it today; whatever comes to must repeat on resume
    model = GPT(config.model, generator=torch.Generator().manual_seed(config.seed)).to(device)
    optimizer = Optimizer(model, config.optim)
    state = RunState(rows_sha256) if resumed is None else _restore(resumed, model, optimizer)
    objective = Objective(config, torch.compile(model) if config.train.compile else model, device)
    with (
        RunLog(config, None if resumed is None else state.step) as log,
        closing(load_batches(config, state.step, device)) as batches,
        _stop_flag() as stop,
        _memory_advice(config.train),
    ):
        _announce(log, config, objective, state)
        _loop(config, state, model, optimizer, objective, batches, windows, log, stop)
    return state


def _loop(
    config: Config,
    state: RunState,
    model: GPT,
    optimizer: Optimizer,
    objective: Objective,
    batches: Iterator[Tensor],
    windows: Tensor,
    log: RunLog,
    stop: threading.Event,
) -> None:
    """Fetch, forward and backward, step; then what is due."""
    speed = _Speed()
    if state.step == 0:
        log.write(0, time_s=0.0, **objective.evaluate(windows))
    progress = schedule.progress(state.step, state.elapsed_s, config.train)
    while progress < 1 and not stop.is_set():
        started = time.perf_counter()
        tokens = next(batches)
        fetched = time.perf_counter()
        lr_scale = schedule.lr_scale(progress, config.optim)
        sums, counts = objective.backward(tokens)
        grad_norm = _step(config, state, model, optimizer, lr_scale, progress)
        trained = int(counts.sum())
        state.count(len(tokens), trained, time.perf_counter() - started)
        speed.add(time.perf_counter() - started, fetched - started, trained, tokens.shape[0] * (tokens.shape[1] - 1))
        progress = schedule.progress(state.step, state.elapsed_s, config.train)
        log.show_progress(state.step, progress)

        over, line = progress >= 1, {}
        if over or state.step % config.train.log_every == 0:
            line = {"time_s": state.elapsed_s, **objective.means(sums, counts), "lr": config.optim.muon_lr * lr_scale}
            line |= {"grad_norm": grad_norm, "skipped_steps": state.skipped_steps, **speed.rates()}
            speed = _Speed()
        if over or state.step % config.train.eval_every == 0:
            line |= objective.evaluate(windows)
        state.val_loss = line.get("val_loss")
        if line:
            log.write(state.step, **line)
        if over or stop.is_set() or state.step % config.train.checkpoint_every == 0:
            _save(config, state, model, optimizer)
    if stop.is_set() and progress < 1:
        log.note(f"stopped after step {state.step:,}; run the same command again to continue")


def _step(config: Config, state: RunState, model: GPT, optimizer: Optimizer, lr_scale: float, progress: float) -> float:
    """Applies the gradients, or skips the step if they are not finite; clears them; returns their norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or math.inf).item()
    if math.isfinite(norm):
        optimizer.set_lrs(lr_scale)
        optimizer.step(schedule.momentum(state.step, config.optim), schedule.weight_decay(progress, config.optim))
        state.skipped_in_a_row = 0
    else:
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
    model.zero_grad()
    if state.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise ValueError(
            f"the gradients of {MAX_SKIPPED_IN_A_ROW} steps in a row were not finite, up to step {state.step + 1}; "
            "the last checkpoint is from before: lower the rates of [optim], or set train.precision to fp32"
        )
    return norm


class _Speed:
    """Sums of time and tokens since the last line of the log."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, *values: float) -> None:
        """Seconds of a step, of them for data, targets trained on, and places that they might have filled."""
        self.sums += torch.tensor(values, dtype=torch.float64)

    def rates(self) -> dict[str, float]:
        """Targets a second, the share of padding among all places, the share of the time spent waiting for data."""
        seconds, wait_s, tokens, places = self.sums.tolist()
        return {"tokens_per_s": tokens / seconds, "padding": 1 - tokens / places, "data_wait_share": wait_s / seconds}


def _open_run(config: Config, rows_sha256: str) -> Checkpoint | None:
    """Writes the config into the run folder; the checkpoint to continue, ValueError if its config differs."""
    run_dir = config.train.run_dir
    resumed, old = load_latest(run_dir), load_config(run_dir)
    if resumed is not None:
        if old is None:
            raise ValueError(
                f"{run_dir} holds checkpoints but no config.json; restore it, or pass another --train.run-dir"
            )
        names = differing_fields(old, config)
        names += ["data.rows"] if resumed.state.get("rows_sha256") != rows_sha256 else []
        if names:
            raise ValueError(
                f"{run_dir} holds a run with another {', '.join(names)}; pass another --train.run-dir, or what it had"
            )
    save_config(run_dir, config)
    return resumed


def _restore(resumed: Checkpoint, model: GPT, optimizer: Optimizer) -> RunState:
    """Puts a checkpoint into the model, the optimiser and torch's random generators; returns its counters."""
    tensors = dict(resumed.optimizer)
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda_rng = tensors.pop("rng.cuda", None)
    if cuda_rng is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_rng)
    model.load_state_dict(resumed.model)
    optimizer.load_state_dict(tensors)
    missing = [f.name for f in dataclasses.fields(RunState) if f.name not in resumed.state]
    if missing:
        raise ValueError(
            f"the checkpoint of step {resumed.step} does not tell {', '.join(missing)}; start a new run folder"
        )
    return RunState(**{f.name: resumed.state[f.name] for f in dataclasses.fields(RunState)})


def _save(config: Config, state: RunState, model: GPT, optimizer: Optimizer) -> None:
    """Saves everything that the next step depends on, then removes checkpoints that are no longer kept."""
    tensors = optimizer.state_dict() | {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    save(config.train.run_dir, state.step, model.state_dict(), tensors, dataclasses.asdict(state))
    prune(config.train.run_dir, config.train.keep_checkpoints)


def _announce(log: RunLog, config: Config, objective: Objective, state: RunState) -> None:
    size, precision = f"{parameter_count(config.model):,} parameters", "bf16" if objective.bf16 else "fp32"
    start = f"continues after step {state.step:,}" if state.step else "starts"
    log.note(f"{config.train.run_dir} {start}: {size}, {objective.device} in {precision}")
    if config.train.compile:
        log.note("compiling the model: the first step takes a minute or more")


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGUSR1 set; a second SIGINT interrupts at once. Handlers are put back."""
    stop = threading.Event()

    def request(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return
    previous = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _memory_advice(config: TrainConfig) -> Iterator[None]:
    """Turns an exhausted accelerator into one line that says what to try."""
    try:
        yield
    except torch.OutOfMemoryError:
        larger = [n for n in range(config.grad_accum + 1, config.batch_size + 1) if config.batch_size % n == 0]
        advice = f"pass --train.grad-accum {larger[0]}" if larger else "take a smaller model or a shorter model.seq_len"
        tried = f"train.batch_size={config.batch_size} and train.grad_accum={config.grad_accum}"
        raise ValueError(f"out of memory with {tried}; {advice}") from None
