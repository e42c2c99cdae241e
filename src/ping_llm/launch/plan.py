"""A config and a kind of GPU in; memory, hours and dollars of the run out, before anything is paid for."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from ping_llm.config import Config, ModelConfig
from ping_llm.model.counts import matrices as matrices_of
from ping_llm.model.counts import matrix_parameters, mean_flops_per_token, parameter_count
from ping_llm.model.gpt import VOCAB_SIZE
from ping_llm.system.hardware import WITHOUT_FP8, gpu_kind, named_peak_flops
from ping_llm.training import schedule

PRICES = Path(__file__).with_name("prices.toml")
ASSUMED_MFU = 0.40
"""Share of the peak that training is taken to reach; one H100 reached 0.41 to 0.45 of its own."""
EAGER_ACTIVATION_BYTES, COMPILED_ACTIVATION_BYTES = 48, 38
"""Of each token, block and channel, kept for the backward pass in bf16 with fused attention. Counted in the tensors that a
forward pass keeps, by a test on a CPU; so are the next ones."""
DROPOUT_BYTES, EAGER_SWIGLU_BYTES = 2, 6  # more of the same, of eager steps alone
EAGER_LOOKUP_BYTES, COMPILED_LOOKUP_BYTES = 35, 41  # of each token, table and channel
SPARE_SHARE = 0.08  # of a GPU's memory: its driver, fragments, buffers of the exchange of gradients


@dataclass(frozen=True)
class GPU:
    """A kind of GPU."""

    name: str
    memory_gb: float
    dollars_per_hour: float
    peak_flops: float  # dense bf16, a second

    @property
    def kind(self) -> str:
        """As that of a device, see `gpu_kind`."""
        return gpu_kind(self.name)

    @classmethod
    def named(cls, name: str, prices: Path = PRICES) -> GPU:
        """One of the price table; ValueError names those that are there."""
        table = tomllib.loads(prices.read_text())["gpu"]
        if name.lower() not in table:
            raise ValueError(f"{prices} has no price of {name!r}, only of {', '.join(table)}; add it there")
        peak = named_peak_flops(name)
        if peak is None:
            where = "PEAK_BF16_FLOPS in ping_llm/system/hardware.py"
            raise ValueError(f"the peak of {name!r} is not known; add it to {where}")
        return cls(name.lower(), peak_flops=peak, **table[name.lower()])


@dataclass(frozen=True)
class CostPlan:
    """What a run takes on some GPUs of a kind."""

    steps: float
    tokens: float  # places of windows, padding included: that is what is computed
    tokens_per_s: float
    hours: float  # of training; evaluations, saves and waiting for a machine come on top
    dollars: float  # of all GPUs over these hours
    micro_batch: int  # windows, a GPU
    largest_micro_batch: int  # that fits
    lines: list[str]  # what `ping-llm plan` prints

    @property
    def fits(self) -> bool:
        """Whether a micro-batch fits in a GPU."""
        return self.micro_batch <= self.largest_micro_batch


def plan_cost(config: Config, gpu: GPU, gpus: int, mfu: float = ASSUMED_MFU) -> CostPlan:
    """What the run of `config` takes; ValueError if its batch cannot be dealt, or its length is a time.

    FLOPs are those of `mean_flops_per_token`, spent at `mfu` of the peak in bf16. A run in fp8 is counted as one in bf16,
    which takes no less memory: how much faster it is has not been measured. ValueError for fp8 on a GPU without it.
    """
    if config.train.precision == "fp8" and gpu.kind in WITHOUT_FP8:
        raise ValueError(f"train.precision=fp8 needs a GPU that multiplies it, which {gpu.name} does not; take bf16")
    if gpus < 1:
        raise ValueError(f"gpus={gpus} must be at least 1")
    config.train.check_processes(gpus)
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} must be a share of the peak, above 0 and at most 1")
    steps, tokens = _length(config)
    tokens_per_s = gpus * gpu.peak_flops * mfu / mean_flops_per_token(config)
    hours = tokens / tokens_per_s / 3600
    dollars = hours * gpus * gpu.dollars_per_hour
    windows = config.train.batch_size // gpus  # of a step, for each GPU
    micro_batch = windows // config.train.grad_accum
    compiled = config.train.compile is not False
    fixed_gb = fixed_bytes(config.model, config.train.averages, config.optim.matrices == "adamw") / 1e9
    window_gb = _place_bytes(config, compiled) / 1e9
    largest = largest_micro_batch(config, gpu.memory_gb)
    advice = _advice(config.train.grad_accum, windows, largest)
    what = f"{gpus} × {gpu.name.upper()} at {mfu:.0%} of {gpu.peak_flops / 1e12:,.0f} TFLOP/s"
    activations_gb = micro_batch * window_gb
    lines = [
        f"{parameter_count(config.model) / 1e6:,.1f}M parameters on {what} (assumed unless you measured it)",
        f"tokens          {tokens:>16,.0f}   in {steps:,.0f} steps",
        f"tokens/s        {tokens_per_s:>16,.0f}",
        f"hours           {hours:>16,.1f}",
        f"dollars         {dollars:>16,.0f}   at {gpu.dollars_per_hour:.2f} a GPU and hour",
        f"GB a GPU        {fixed_gb + activations_gb:>16.1f}   of {gpu.memory_gb:g}: "
        f"{fixed_gb:.1f} weights and optimiser, {activations_gb:.1f} a micro-batch of {micro_batch}, "
        f"{'compiled' if compiled else 'eager'}",
        f"largest batch   {largest:>16,}   windows a GPU and micro-batch; {advice}",
    ]
    if config.train.precision == "fp8":
        lines.append(
            "fp8             counted as bf16: its gain has not been measured; give --mfu what bench_train.py shows"
        )
    return CostPlan(steps, tokens, tokens_per_s, hours, dollars, micro_batch, largest, lines)


def _length(config: Config) -> tuple[float, float]:
    """Steps and places of windows of a run, by the nearer of its two limits; ValueError if it has only that of time."""
    train = config.train
    growth = schedule.growth_steps(train)
    saved = growth - schedule.windows_before(growth, train) / train.batch_size  # steps that small batches add
    by_tokens = train.target_tokens / (train.batch_size * config.place_tokens)
    limits = [train.total_steps or None, by_tokens + saved if by_tokens else None]
    if not any(limits):
        raise ValueError("the run ends by train.max_minutes alone; give train.total_steps or train.target_tokens")
    steps = min(limit for limit in limits if limit)
    if steps == train.total_steps:
        return steps, schedule.windows_before(train.total_steps, train) * config.place_tokens
    return steps, train.target_tokens


def _advice(pieces: int, windows: int, largest: int) -> str:
    """On the micro-batches of a step of so many windows a GPU, of which `largest` fit."""
    if not largest:
        return "take GPUs with more memory, or a smaller model"
    fewest = fewest_pieces(windows, largest)
    if windows // pieces > largest:
        return f"the batch does not fit: pass --train.grad-accum {fewest}"
    return "the batch fits" + (f", and so it would with --train.grad-accum {fewest}" if fewest < pieces else "")


def largest_micro_batch(config: Config, memory_gb: float, on_cpu: bool = False) -> int:
    """Windows whose activations fit beside all else in a GPU of so much memory; or in half of a machine's, in fp32."""
    fixed = fixed_bytes(config.model, config.train.averages, config.optim.matrices == "adamw")
    compiled = config.train.compile is True or (config.train.compile == "auto" and not on_cpu)
    window = _place_bytes(config, compiled) * (2 if on_cpu else 1)
    share = 0.5 if on_cpu else 1 - SPARE_SHARE
    return max(0, int((memory_gb * 1e9 * share - fixed) / window))


def fewest_pieces(windows: int, largest: int) -> int:
    """Into how many equal micro-batches of at most `largest` windows so many are cut, at least."""
    return next(n for n in range(1, windows + 1) if windows % n == 0 and windows // n <= largest)


def fixed_bytes(model: ModelConfig, averaged: bool = False, adamw: bool = False) -> int:
    """Bytes that a GPU holds whatever the batch: fp32 weights and gradients, their bf16 copies, the optimiser's state, the
    largest stack of matrices that Muon works on (in fp32 and twice in bf16), and the fp32 average of `averaged` weights.
    With `adamw` alone the matrices have two moments, and there is no stack."""
    matrices = matrix_parameters(model)  # Muon keeps one moment of these
    stack = max(rows * columns * count for (rows, columns), count in matrices_of(model).items())
    others = parameter_count(model) - matrices  # AdamW keeps two of the vocabulary's and the fields' tables
    everywhere = 14 if averaged else 10
    of_matrices = 8 * matrices if adamw else 4 * matrices + 8 * stack
    return everywhere * (matrices + others) + of_matrices + 8 * others


def _place_bytes(config: Config, compiled: bool) -> float:
    """Bytes that a place of a micro-batch takes until its backward pass: its window, or the short ones beside it, which
    have a pass of their own."""
    short = config.data.short_windows * config.data.short_len / config.model.seq_len
    return activation_bytes(config.model, compiled) * max(1.0, short)


def activation_bytes(model: ModelConfig, compiled: bool = True) -> int:
    """Bytes that one window of a micro-batch takes until its backward pass."""
    each = COMPILED_ACTIVATION_BYTES if compiled else EAGER_ACTIVATION_BYTES
    each += DROPOUT_BYTES * (model.dropout > 0) + EAGER_SWIGLU_BYTES * (model.mlp == "swiglu" and not compiled)
    of_table = COMPILED_LOOKUP_BYTES if compiled else EAGER_LOOKUP_BYTES
    channels = (each * model.n_layer + of_table * len(model.lookup_layers)) * model.n_embd
    return model.seq_len * (channels + 10 * VOCAB_SIZE)  # logits in bf16 and fp32, and their gradient
