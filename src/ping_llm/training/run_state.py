"""A run folder in, how far its run has come out; and what a process must know to go on from there."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ping_llm.config import Config, TrainConfig, differing_fields
from ping_llm.data.rows import MANIFEST_NAME, manifest_sha256
from ping_llm.model.checkpoint import CONFIG_NAME, Checkpoint, load_config, load_latest, save_config
from ping_llm.model.gpt import GPT, parameter_count
from ping_llm.system.files import try_folder, write_atomically, write_lock
from ping_llm.system.hardware import machine_facts
from ping_llm.training import schedule
from ping_llm.training.averaging import WeightAverage
from ping_llm.training.base import REPLAY_MANIFEST_NAME, ROWS_MANIFEST_NAME
from ping_llm.training.distributed import Ranks
from ping_llm.training.metrics import MACHINE_NAME, METRICS_NAME, add_machine, read_machines, write_machines
from ping_llm.training.objective import resolve_compile, resolve_precision
from ping_llm.training.optimizer import Optimizer

FIRST_LOSS_SCALE = 2.0**15
LOSS_SCALE_STEPS = 2000  # in a row without overflow, after which the loss scale of fp16 doubles


@dataclass(frozen=True)
class RowsLearned:
    """Hashes of the manifests of the rows that a run learns from; empty where there are none."""

    sha256: str = ""
    replay_sha256: str = ""

    @classmethod
    def of(cls, config: Config) -> RowsLearned:
        """As they are on this machine."""
        replay = config.data.replay
        return cls(manifest_sha256(config.data.rows), manifest_sha256(replay) if replay else "")


@dataclass
class RunState:
    """What a run has done so far; with weights, optimiser and config it is all that the rest of the run depends on."""

    rows_sha256: str  # which rows it learns from
    step: int = 0
    samples_consumed: int = 0  # windows, over all processes
    tokens: int = 0  # trained on, padding not counted
    elapsed_s: float = 0.0  # spent in steps by the main process: not in evaluations, saves and pauses
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_scale: float = 1.0  # of fp16
    unskipped_in_a_row: int = 0
    val_loss: float | None = None  # of these very weights, None if they were not evaluated
    precision: str = "fp32"  # of the forward pass: `auto` stays what it was on the machine where the run began
    replay_sha256: str = ""  # which rows are mixed in

    @classmethod
    def new(cls, rows_sha256: str, precision: str, replay_sha256: str = "") -> RunState:
        """Of a run that has not begun."""
        loss_scale = FIRST_LOSS_SCALE if precision == "fp16" else 1.0
        return cls(rows_sha256, loss_scale=loss_scale, precision=precision, replay_sha256=replay_sha256)

    def count(self, config: Config, tokens: int, elapsed_s: float, skipped: bool) -> None:
        """Counts one step."""
        self.step += 1
        self.val_loss = None  # that was of other weights
        self.samples_consumed = schedule.windows_before(self.step, config.train)
        self.tokens, self.elapsed_s = self.tokens + tokens, elapsed_s
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.unskipped_in_a_row = 0 if skipped else self.unskipped_in_a_row + 1

    def adapt_loss_scale(self) -> None:
        """Halves it after a step that was skipped, doubles it after LOSS_SCALE_STEPS that were not."""
        if self.skipped_in_a_row:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.unskipped_in_a_row % LOSS_SCALE_STEPS == 0:
            self.loss_scale *= 2

    def progress(self, config: TrainConfig) -> float:
        """Share of the run that is done."""
        return schedule.progress(self.step, self.tokens, self.elapsed_s, config)


def open_run(config: Config, rows: RowsLearned, ranks: Ranks, lock: ExitStack) -> Checkpoint | None:
    """Locks the run folder, for as long as `lock` is held, and writes config, machine and the manifest of the rows into it;
    the checkpoint to continue. ValueError if another process trains there, or the config of its run differs."""
    run_dir = config.train.run_dir
    try:
        lock.enter_context(write_lock(run_dir, run_dir / ".lock"))
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    try_folder(run_dir, CONFIG_NAME, MACHINE_NAME, ROWS_MANIFEST_NAME, METRICS_NAME, "samples.txt", "report.md")
    resumed, old = load_latest(run_dir), load_config(run_dir)
    if resumed is not None and old is None:
        raise ValueError(f"{run_dir} holds checkpoints but no config.json; restore it, or pass another --train.run-dir")
    names = differing_fields(old, config) if old is not None else []
    if resumed is not None and resumed.state.get("rows_sha256") != rows.sha256:
        names.append("data.rows")
    if resumed is not None and resumed.state.setdefault("replay_sha256", "") != rows.replay_sha256:
        names.append("data.replay")
    if names:
        differs = f"{run_dir} holds a run with another {', '.join(names)}"
        option = "--out" if config.train.init_from else "--train.run-dir"
        raise ValueError(f"{differs}; pass another {option}, or what it had")
    machines = read_machines(run_dir)
    precision = resolve_precision(config.train.precision, ranks.device)
    if resumed is not None:  # the first checkpoints did not hold it
        began = machines[0].get("precision") if machines else None
        precision = resumed.state.setdefault("precision", began or precision)
    facts = machine_facts(ranks.device) | {
        "processes": ranks.world,
        "precision": precision,
        "compiled": resolve_compile(config.train.compile, ranks.device),
        "deterministic": config.train.deterministic,
        "parameters": parameter_count(config.model),
    }
    machines = add_machine(machines, facts, resumed.step if resumed else 0)
    try:
        save_config(run_dir, config)
        write_machines(run_dir, machines)
        for name, folder in ((ROWS_MANIFEST_NAME, config.data.rows), (REPLAY_MANIFEST_NAME, config.data.replay)):
            if folder and (manifest := Path(folder) / MANIFEST_NAME).is_file():
                write_atomically(run_dir / name, manifest.read_text())
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    return resumed


def _unwritable(run_dir: Path, error: OSError) -> ValueError:
    reason = f"the run folder {run_dir} cannot be written ({error.strerror})"
    return ValueError(f"{reason}; pass another --train.run-dir")


def restore(checkpoint: Checkpoint, model: GPT, optimizer: Optimizer, average: WeightAverage | None = None) -> RunState:
    """Puts a checkpoint into model, optimiser, the average of weights and the random generators of this process."""
    names = [f.name for f in dataclasses.fields(RunState)]
    if missing := [name for name in names if name not in checkpoint.state]:
        lacks = f"the checkpoint of step {checkpoint.step} lacks {', '.join(missing)}"
        raise ValueError(f"{lacks}; start a new run folder")
    model.load_state_dict(checkpoint.model)
    tensors = dict(checkpoint.optimizer)
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda_rng = tensors.pop("rng.cuda", None)
    if cuda_rng is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_rng)
    if average is not None:
        average.load_state_dict(checkpoint.model, tensors)
    optimizer.load_state_dict(tensors)
    return RunState(**{name: checkpoint.state[name] for name in names})
