"""A config and a kind of GPU in; memory, hours and dollars of the run out, before anything is paid for."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from ping_llm.config import Config, ModelConfig
from ping_llm.model.gpt import VOCAB_SIZE, flops_per_token, parameter_count
from ping_llm.system.hardware import named_peak_flops

PRICES = Path(__file__).with_name("prices.toml")
ASSUMED_MFU = 0.40
"""Share of the peak that training is taken to reach. Assumed: nothing of this project has been measured on a GPU."""
ACTIVATION_BYTES = 42
"""Of each token, block and channel, kept for the backward pass: 22 of attention and its norms, 20 of the MLP. Counted by
hand for bf16 with fused attention; not measured."""
SPARE_SHARE = 0.08  # of a GPU's memory: its driver, fragments, buffers of the exchange of gradients


@dataclass(frozen=True)
class GPU:
    """A kind of GPU."""

    name: str
    memory_gb: float
    dollars_per_hour: float
    peak_flops: float  # dense bf16, a second

    @classmethod
    def named(cls, name: str, prices: Path = PRICES) -> GPU:
        """One of the price table; ValueError names those that are there."""
        table = tomllib.loads(prices.read_text())["gpu"]
        if name.lower() not in table:
            raise ValueError(f"{prices} has no price of {name!r}, only of {', '.join(table)}; add it there")
        peak = named_peak_flops(name)
        if peak is None:
            raise ValueError(
                f"the peak of {name!r} is not known; add it to PEAK_BF16_FLOPS in ping_llm/system/hardware.py"
            )
        return cls(name.lower(), peak_flops=peak, **table[name.lower()])


@dataclass(frozen=True)
class CostPlan:
    """What a run takes on some GPUs of a kind."""

    gpu: GPU
    gpus: int
    mfu: float
    parameters: int
    tokens: float  # places of windows, padding included: that is what is computed
    steps: float
    tokens_per_s: float
    fixed_gb: float  # a GPU: weights, gradients, optimiser
    grad_accum: int  # micro-batches a step
    micro_batch: int  # windows, a GPU
    activations_gb: float  # a GPU, of such a micro-batch
    largest_micro_batch: int  # that fits

    @property
    def hours(self) -> float:
        """Hours of training; evaluations, saves and waiting for a machine come on top."""
        return self.tokens / self.tokens_per_s / 3600

    @property
    def dollars(self) -> float:
        """Price of all GPUs over these hours."""
        return self.hours * self.gpus * self.gpu.dollars_per_hour

    @property
    def fits(self) -> bool:
        """Whether a micro-batch fits in a GPU."""
        return self.micro_batch <= self.largest_micro_batch

    def lines(self) -> list[str]:
        """What `ping-llm plan` prints."""
        what = f"{self.gpus} × {self.gpu.name.upper()} at {self.mfu:.0%} of {self.gpu.peak_flops / 1e12:,.0f} TFLOP/s"
        if self.fits:
            advice = "the batch fits"
        elif self.largest_micro_batch:
            advice = f"the batch does not fit: pass --train.grad-accum {self._enough_pieces()}"
        else:
            advice = "take GPUs with more memory, or a smaller model"
        return [
            f"{self.parameters / 1e6:,.1f}M parameters on {what} (assumed unless you measured it)",
            f"tokens          {self.tokens:>16,.0f}   in {self.steps:,.0f} steps",
            f"tokens/s        {self.tokens_per_s:>16,.0f}",
            f"hours           {self.hours:>16,.1f}",
            f"dollars         {self.dollars:>16,.0f}   at {self.gpu.dollars_per_hour:.2f} a GPU and hour",
            f"GB a GPU        {self.fixed_gb + self.activations_gb:>16.1f}   of {self.gpu.memory_gb:g}: "
            f"{self.fixed_gb:.1f} weights and optimiser, {self.activations_gb:.1f} a micro-batch of {self.micro_batch}",
            f"largest batch   {self.largest_micro_batch:>16,}   windows a GPU and micro-batch; {advice}",
        ]

    def _enough_pieces(self) -> int:
        """The fewest micro-batches a step that fit."""
        windows = self.micro_batch * self.grad_accum  # of a step, for each GPU
        return next(n for n in range(1, windows + 1) if windows % n == 0 and windows // n <= self.largest_micro_batch)


def plan_cost(config: Config, gpu: GPU, gpus: int, mfu: float = ASSUMED_MFU) -> CostPlan:
    """What the run of `config` takes; ValueError if its batch cannot be dealt, or its length is a time.

    FLOPs are those of `flops_per_token`, spent at `mfu` of the peak.
    """
    if gpus < 1:
        raise ValueError(f"gpus={gpus} must be at least 1")
    config.train.check_processes(gpus)
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} must be a share of the peak, above 0 and at most 1")
    step_tokens = config.train.batch_size * config.model.seq_len
    limits = [config.train.total_steps or None, config.train.target_tokens / step_tokens or None]
    if not any(limits):
        raise ValueError("the run ends by train.max_minutes alone; give train.total_steps or train.target_tokens")
    steps = min(limit for limit in limits if limit)
    micro_batch = config.train.batch_size // (gpus * config.train.grad_accum)
    fixed_gb = fixed_bytes(config.model) / 1e9
    window_gb = activation_bytes(config.model) / 1e9
    room = gpu.memory_gb * (1 - SPARE_SHARE) - fixed_gb
    return CostPlan(
        gpu=gpu,
        gpus=gpus,
        mfu=mfu,
        parameters=parameter_count(config.model),
        tokens=steps * step_tokens,
        steps=steps,
        tokens_per_s=gpus * gpu.peak_flops * mfu / flops_per_token(config.model),
        fixed_gb=fixed_gb,
        grad_accum=config.train.grad_accum,
        micro_batch=micro_batch,
        activations_gb=micro_batch * window_gb,
        largest_micro_batch=max(0, int(room / window_gb)),
    )


def fixed_bytes(model: ModelConfig) -> int:
    """Bytes that a GPU holds whatever the batch: fp32 weights and gradients, their bf16 copies, the optimiser's state, and
    the largest stack of matrices that Muon works on (in fp32 and twice in bf16)."""
    vocabulary = 2 * VOCAB_SIZE * model.n_embd  # AdamW keeps two moments of these, Muon one of the rest
    matrices = parameter_count(model) - vocabulary
    stack = 4 * model.n_layer * model.n_embd**2
    return 10 * (matrices + vocabulary) + 4 * matrices + 8 * vocabulary + 8 * stack


def activation_bytes(model: ModelConfig) -> int:
    """Bytes that one window of a micro-batch takes until its backward pass."""
    blocks = ACTIVATION_BYTES * model.n_layer * model.n_embd
    return model.seq_len * (blocks + 10 * VOCAB_SIZE)  # logits in bf16 and fp32, and their gradient
