"""A config in, a trained run folder out: the training loop, and what it does when something goes wrong.

Batches, schedules and logs are functions of `RunState.step`, so a run that was stopped and continued takes the same steps
as one that was not, whatever the number of processes. Only the main process writes to the run folder.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ping_llm.config import FIELDS, Config, DataConfig, TrainConfig
from ping_llm.data.loader import training_batches, validation_windows
from ping_llm.inference.calibration import CALIBRATION_NAME, Calibration
from ping_llm.model.checkpoint import MODEL_NAME, load_model
from ping_llm.model.gpt import GPT, parameter_count
from ping_llm.model.loss import PARTS
from ping_llm.system.hardware import deterministic
from ping_llm.system.signals import on_signals
from ping_llm.training import schedule
from ping_llm.training.averaging import WeightAverage
from ping_llm.training.base import wanted_base
from ping_llm.training.calibration import calibrate
from ping_llm.training.codewords import learn_codewords
from ping_llm.training.distributed import Ranks, processes
from ping_llm.training.log import RunLog, SilentLog
from ping_llm.training.objective import Objective, resolve_compile_optimizer, resolve_precision
from ping_llm.training.optimizer import Optimizer
from ping_llm.training.report import write_report
from ping_llm.training.run_state import RowsLearned, RunState, open_run, restore
from ping_llm.training.saver import Saver
from ping_llm.training.speed import Speed
from ping_llm.training.validation import ValQueries, describe

MAX_SKIPPED_IN_A_ROW = 20
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Feed:
    """What a run learns from, and what it is measured on.

    `batches(config, start, device, rank, world)` yields each process its share (batch_size / world, line) of whole batches
    from number `start` on, see `windows_of`; `windows(config)` are those of val, (n, seq_len + 1); −1 = padding.
    `queries(config)` may be None.
    """

    batches: Callable[[Config, int, torch.device, int, int], Iterator[Tensor]]
    windows: Callable[[Config], Tensor]
    queries: Callable[[Config], ValQueries | None]

    @classmethod
    def of_rows(cls) -> Feed:
        """The probe rows of `config.data.rows`."""
        return cls(training_batches, validation_windows, ValQueries.load)


def train(config: Config, feed: Feed | None = None) -> RunState:
    """Trains until the run is over or a signal stops it, saves, and returns where it stands.

    The run folder is continued if it holds a checkpoint. Under torchrun all processes train one model together.
    ValueError: the folder is of another config, the batch cannot be divided, memory ran out, or the gradients stayed
    non-finite. ConnectionError: another process ended.
    """
    feed = feed or Feed.of_rows()
    with (
        deterministic(config.train.deterministic),
        _stop_flag() as stop,  # outside: until the last line is said, no signal may end the process
        processes(config.train.device) as ranks,
        _memory_advice(config.train, config.data, ranks),
        _compile_advice(),
    ):
        with ExitStack() as lock:
            training = Training.begin(config, feed, ranks, lock)
            training.run(stop)
        state, calibrates = training.state, training.queries is not None
        del training  # frees its memory before a second model is loaded
    if ranks.is_main:
        run_dir, done = config.train.run_dir, state.progress(config.train) >= 1
        if calibrates and done:
            _calibrate(config, ranks.device)
        print(f"report: {write_report(run_dir)}")
    return state


def _calibrate(config: Config, device: torch.device) -> None:
    """Fits a calibration for the checkpoint that inference uses, unless the run folder has it."""
    run_dir = config.train.run_dir
    model, _, state = load_model(run_dir, device)
    model_sha256 = state["sha256"][MODEL_NAME]
    if not (run_dir / CALIBRATION_NAME).exists() or Calibration.load(run_dir).model_sha256 != model_sha256:
        print("calibrating on val", flush=True)
        dataclasses.replace(calibrate(model, config, device), model_sha256=model_sha256).save(run_dir)


@dataclass
class Training:
    """A run in one of its processes."""

    config: Config
    feed: Feed
    ranks: Ranks
    state: RunState
    model: GPT
    optimizer: Optimizer
    objective: Objective
    windows: Tensor  # (n, seq_len + 1), of val
    queries: ValQueries | None
    average: WeightAverage | None = None  # None if the run keeps none

    @classmethod
    def begin(cls, config: Config, feed: Feed, ranks: Ranks, lock: ExitStack) -> Training:
        """Reads all that a run needs, so that what is wrong is reported before anything is done; locks the run folder before
        anything in it is written."""
        ranks.on_main(lambda: config.train.check_processes(ranks.world))
        ranks.on_main(lambda: resolve_precision(config.train.precision, ranks.device))
        read = ranks.on_main(lambda: (RowsLearned.of(config), feed.windows(config), feed.queries(config)))
        rows, windows, queries = ranks.share(read)
        if RowsLearned.of(config) != rows:
            folders = " or ".join(filter(None, (str(config.data.rows), config.data.replay)))
            where = f"process {ranks.rank} finds other rows in {folders}"
            raise ValueError(f"{where} than the main one; copy them")
        base, weights = ranks.share(ranks.on_main(lambda: wanted_base(config)))
        checkpoint = ranks.on_main(lambda: open_run(config, rows, ranks, lock))
        torch.manual_seed(config.seed)  # nothing draws from it; if anything ever does, a resumed run repeats it
        model = GPT(config.model, generator=torch.Generator().manual_seed(config.weights_seed)).to(ranks.device)
        if base is not None:
            model.load_state_dict(weights)
            ranks.on_main(lambda: base.save(config.train.run_dir))
        compiled = resolve_compile_optimizer(config.train.compile, ranks.device)
        optimizer = Optimizer(model, config.optim, ranks, compiled)
        average = WeightAverage.wanted(model, config.train)
        checkpoint = ranks.share(checkpoint)
        state = restore(checkpoint, model, optimizer, average) if checkpoint else None
        if state is None and base is None:
            alone = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
            learn_codewords(model, config.data, lambda: feed.batches(alone, 0, torch.device("cpu"), 0, 1), ranks)
        objective = Objective(config, model, ranks, state.precision if state else None)
        state = state or RunState.new(rows.sha256, objective.precision, rows.replay_sha256)
        return cls(config, feed, ranks, state, model, optimizer, objective, windows, queries, average)

    def run(self, stop: threading.Event) -> bool:
        """Trains to the end, or until `stop` is set in any process; whether any step was taken."""
        config, ranks, begun = self.config, self.ranks, self.state.step
        log = RunLog(config, begun or None) if ranks.is_main else SilentLog()
        first = schedule.windows_before(begun, config.train) // config.train.batch_size
        batches = self.feed.batches(config, first, ranks.device, ranks.rank, ranks.world)
        with (
            log,
            Saver(config.train.run_dir, config.train.keep_checkpoints, log.note) as saver,
            closing(cast(Generator[Tensor, None, None], batches)),
            _frozen_garbage(),
        ):
            start = f"continues after step {begun:,}" if begun else "starts"
            where = f"{ranks.device.type} in {self.objective.precision}"
            where += f", {ranks.world} processes" if ranks.world > 1 else ""
            log.note(f"{config.train.run_dir} {start}: {parameter_count(config.model):,} parameters, {where}")
            if self.objective.compiled:
                log.note("compiling the model: the first step takes a minute or more, the next time less")
            self._loop(_as_long_as_steps(batches, begun, config.train, ranks.world), log, saver, stop)
        return self.state.step > begun

    def _loop(self, batches: Iterator[Tensor], log: RunLog | SilentLog, saver: Saver, stop: threading.Event) -> None:
        """Fetch, forward and backward, step; then what is due."""
        train, state, speed = self.config.train, self.state, Speed(self.config, self.ranks, self.objective.compiled)
        if state.step == 0:
            log.write(0, time_s=0.0, tokens=0, **self._evaluate())
        progress, stopped, clock = state.progress(train), False, state.elapsed_s
        while progress < 1 and not stopped:
            started = time.perf_counter()
            tokens = next(batches)
            wait_s = time.perf_counter() - started
            lr_scale = schedule.lr_scale(progress, self.config.optim)
            votes = (stop.is_set(), clock if self.ranks.is_main else 0.0)  # all processes stop after the same step
            sums, totals = self.objective.backward(tokens, *votes, loss_scale=state.loss_scale, step=state.step)
            grad_norm = self.gradient_norm()  # waits for the device; the update then runs beside the next step's launch
            (*counts, stopped, elapsed_s) = totals.tolist()
            trained = int(sum(counts[: len(FIELDS)]))  # targets; the other counts are of some of these
            self.apply_gradients(grad_norm, lr_scale, progress)
            state.count(self.config, trained, elapsed_s, skipped=not math.isfinite(grad_norm))
            self._give_up_if_hopeless()
            progress = state.progress(train)
            if self.average is not None:
                self.average.update(state.step, progress)
            step_s = time.perf_counter() - started
            if speed.compiling:  # which is no training: the rates rise over minutes of steps
                log.note(f"compiled: the first step took {step_s:.0f} s")
            else:
                clock += step_s
            speed.add(step_s, wait_s, trained, schedule.batch_size(state.step - 1, train))
            log.show_progress(state.step, progress)

            over, line = progress >= 1, {}
            if stopped and not over:
                self._save(saver, clock)  # first of all: a machine that is taken away may not wait for long
            if over or state.step % train.log_every == 0:
                means = self.objective.means(self.ranks.sum(sums.double()), totals[: len(PARTS)])
                rate = self.optimizer.initial_lrs["matrices"] * lr_scale
                line = {"time_s": clock, "tokens": state.tokens, **means, "lr": rate}
                line |= {"grad_norm": grad_norm, "skipped_steps": state.skipped_steps, **speed.rates()}
            if over or state.step % train.eval_every == 0:
                line |= self._evaluate()
            state.val_loss = line.get("val_loss")
            if line:
                log.write(state.step, **line)
            if self.ranks.is_main and train.sample_every and (over or state.step % train.sample_every == 0):
                # Samples need sums that are not deterministic on GPUs; nothing depends on them.
                with self.used_weights(), deterministic(False):
                    log.show_samples(state.step, describe(self.model, self.queries, seed=state.step))
            if over or (not stopped and state.step % train.checkpoint_every == 0):
                speed.held_s += self._save(saver, clock)
        if stopped and progress < 1:
            log.note(f"stopped after step {state.step:,}; run the same command again to continue")

    def gradient_norm(self) -> float:
        """Takes the loss scale out of the gradients and clips them; returns their norm before that."""
        if self.state.loss_scale != 1:
            torch._foreach_div_([p.grad for p in self.model.parameters() if p.grad is not None], self.state.loss_scale)
        most = self.config.optim.grad_clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), most).item()

    def apply_gradients(self, grad_norm: float, lr_scale: float, progress: float) -> None:
        """Takes the optimiser's step, unless the gradients are not finite, and clears them."""
        config = self.config.optim
        if math.isfinite(grad_norm):
            self.optimizer.set_lrs(lr_scale)
            momentum, weight_decay = schedule.momentum(self.state.step, config), schedule.weight_decay(progress, config)
            self.optimizer.step(momentum, weight_decay)
        self.model.zero_grad()

    def _give_up_if_hopeless(self) -> None:
        """Ends a run whose gradients stay non-finite; adapts the loss scale of fp16."""
        if self.objective.precision == "fp16":
            self.state.adapt_loss_scale()
        if self.state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        if not self.ranks.is_main:
            raise SystemExit(1)  # all processes have the same gradients: one reports it
        raise ValueError(
            f"the gradients of {MAX_SKIPPED_IN_A_ROW} steps in a row were not finite, up to step {self.state.step}; "
            "the last checkpoint is from before: lower the rates of [optim], or set train.precision to fp32"
        )

    def used_weights(self) -> AbstractContextManager[None]:
        """Within it the model has the weights that its checkpoint will be used with: their average, if there is one."""
        return self.average.in_use() if self.average is not None else nullcontext()

    def _evaluate(self) -> dict[str, float]:
        """The metrics of val; of an average, also the loss of the weights that training goes on from."""
        gc.collect()  # what evaluations leave; the loop leaves nothing
        with self.used_weights():
            values = self.objective.evaluate(self.windows)
            if self.queries is not None:
                values["val_median_rel_error"] = self.queries.median_rel_error(self.objective, self.ranks)
        if self.average is not None:
            values["val_trained_loss"] = self.objective.evaluate(self.windows)["val_loss"]
        return values

    def _save(self, saver: Saver, elapsed_s: float) -> float:
        """Saves everything that the next step depends on; the seconds that training was held up."""
        if not self.ranks.is_main:
            return 0.0
        started = time.perf_counter()
        weights = self.model.state_dict()
        tensors = self.optimizer.state_dict() | {"rng.cpu": torch.get_rng_state()}
        if self.average is not None:
            weights, tensors = weights | self.average.weights, tensors | self.average.state_dict()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        state = dataclasses.replace(self.state, elapsed_s=elapsed_s)
        saver.save(state.step, weights, tensors, dataclasses.asdict(state))
        return time.perf_counter() - started


def _as_long_as_steps(batches: Iterator[Tensor], step: int, config: TrainConfig, world: int) -> Iterator[Tensor]:
    """One process's share of the windows of each step from `step` on: whole batches, cut in pieces while the batch grows.

    Process r has windows r, r + world, … of a batch. So a piece of its share holds its windows of a stretch of the batch:
    the order of the windows depends neither on the number of processes nor on where a run was stopped.
    """
    while True:
        whole, done = next(batches), schedule.windows_before(step, config) % config.batch_size
        while done < config.batch_size:
            size = schedule.batch_size(step, config)
            yield whole[done // world : (done + size) // world]
            done, step = done + size, step + 1


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Keeps the garbage collector out of the steps: it would look through all objects of torch, in each process anew."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGUSR1 set; a second SIGINT interrupts at once."""
    stop = threading.Event()

    def request(number: int) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    with on_signals(STOP_SIGNALS, request):
        yield stop


@contextmanager
def _compile_advice() -> Iterator[None]:
    """Turns a model that cannot be compiled, mostly for want of a compiler, into one line with advice."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # heavy where nothing is compiled

        if not isinstance(error, TorchDynamoException):
            raise
        cause = getattr(error, "inner_exception", error)
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        advice = "install a C++ compiler (or set CXX to it), or pass --train.compile False"
        raise ValueError(f"the model cannot be compiled ({reason}); {advice}") from None


@contextmanager
def _memory_advice(config: TrainConfig, data: DataConfig, ranks: Ranks) -> Iterator[None]:
    """Turns exhausted memory into one line with advice."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        windows = config.batch_size // ranks.world  # of a step, for each process
        larger = [n for n in range(config.grad_accum + 1, windows + 1) if windows % n == 0]
        fewer = ", or fewer data.short_windows" if data.short_windows else ""
        advice = f"take a smaller model or a shorter model.seq_len{fewer}"
        if larger:
            advice = f"pass --train.grad-accum {larger[0]}, for micro-batches of {windows // larger[0]}"
        given = f"train.batch_size={config.batch_size}, train.grad_accum={config.grad_accum}"
        what = f"out of memory with micro-batches of {windows // config.grad_accum} windows ({given})"
        raise ValueError(f"{what}; {advice}") from None
