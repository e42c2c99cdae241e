"""A depth in, the config of a whole run out: shape, length, batch, rates and weight decay follow from the number of blocks.

The rules are those of nanochat (https://github.com/karpathy/nanochat, scripts/base_train.py, 2026), which were tuned on text
in a single epoch: the batch grows as the 0.383th power of the tokens (Bergsma et al., Power Lines, 2025, arXiv:2505.13738),
the rates as the root of the batch, and the decay is such that weights are forgotten over the same share of the run (Wang and
Aitchison, 2024, arXiv:2405.13698). What a user gives explicitly stays, and the rest follows from that.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ping_llm.config import Config, ModelConfig, load_config, parse_config
from ping_llm.launch.plan import GPU, PRICES, fewest_pieces, largest_micro_batch, plan_cost
from ping_llm.model.counts import matrix_parameters, mean_flops_per_token
from ping_llm.model.fields import VOCAB_SIZE
from ping_llm.system.hardware import memory_gb, pick_device

ASPECT, HEAD = 64, 128  # channels for each block, rounded up to whole heads of so many
RATIO = 12.0  # tokens for each weight of the matrices and the head
REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19  # tokens in a batch
REFERENCE_DECAY = 0.28
MOST_DECAY_A_STEP = (
    0.5  # of a weight; the rule asks for more in runs of 20 steps, and would turn weights round in those of 5
)
BATCH_EXPONENT = 0.383
RATES = ("muon_lr", "adamw_lr", "embedding_lr", "head_lr")
WHOLE_WINDOWS = 64  # of which a larger batch is a multiple, so that it can be dealt to processes
LENGTHS = {"train.target_tokens": "--train.target-tokens", "train.total_steps": "--train.total-steps"}


@dataclass(frozen=True)
class Dial:
    """How deep a model is to be, and how long it is to learn; ValueError in the user's words."""

    depth: int  # blocks
    ratio: float | None = None  # tokens for each weight of the matrices and the head; RATIO if no length is given
    target_flops: float | None = None  # of the whole run

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"--depth {self.depth} must be at least 1")
        for option, value in (("--ratio", self.ratio), ("--target-flops", self.target_flops)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{option} {value} must be above 0 and finite")
        if self.ratio is not None and self.target_flops is not None:
            raise ValueError("--ratio and --target-flops both say how long the run is; give one of them")


def set_shape(
    model: ModelConfig, depth: int, width: int = 0, heads: int = 0, kv_heads: int | None = None
) -> ModelConfig:
    """So many blocks, 64 channels for each, rounded up to whole heads of 128; a `width` or `heads` above 0 stays, and so do
    the model's own `kv_heads` unless others are given."""
    width = width or -(-ASPECT * depth // HEAD) * HEAD
    fitting = (heads for heads in range(max(1, round(width / HEAD)), 0, -1) if width % (2 * heads) == 0)
    shape: dict[str, Any] = {"n_layer": depth, "n_embd": width, "n_head": heads or next(fitting, 1)}
    return dataclasses.replace(model, **shape, n_kv_head=model.n_kv_head if kv_heads is None else kv_heads)


def scaling_parameters(model: ModelConfig) -> int:
    """Weights of the blocks' matrices and of the head, without its padded rows: what lengths of runs are counted by."""
    return matrix_parameters(model) + VOCAB_SIZE * model.n_embd


def set_scale(config: Config, dial: Dial, given: Collection[str] = (), base: Config | None = None) -> Config:
    """Length, batch, rates and decay of a config whose shape is set; fields whose dotted names are `given` stay as they are.

    Rates are scaled from those of `base`, by default of the config itself. ValueError if the length is given twice.
    """
    optim, train = config.optim, config.train
    lengths = [name for name in LENGTHS if name in given and getattr(train, name.removeprefix("train."))]
    own = [f"--{name.replace('_', '-')}" for name in ("ratio", "target_flops") if getattr(dial, name) is not None]
    if len(said := own + [LENGTHS[name] for name in lengths]) > 1:
        raise ValueError(f"{' and '.join(said)} both say how long the run is; give one of them")
    weights, place_tokens = scaling_parameters(config.model), config.place_tokens
    tokens = (dial.ratio or RATIO) * weights
    if dial.target_flops is not None:
        tokens = dial.target_flops / mean_flops_per_token(config)
    elif "train.target_tokens" in lengths:
        tokens = train.target_tokens
    reference = RATIO * scaling_parameters(set_shape(ModelConfig(), REFERENCE_DEPTH))
    windows = train.batch_size
    if "train.batch_size" not in given:
        best = 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference) ** BATCH_EXPONENT))  # tokens
        windows = _whole_windows(best / place_tokens)
    by_steps = "train.total_steps" in lengths
    if by_steps:
        tokens = train.total_steps * windows * place_tokens
    growth = (windows * place_tokens / REFERENCE_BATCH) ** 0.5
    rates: dict[str, Any] = {
        name: getattr((base or config).optim, name) * growth for name in RATES if f"optim.{name}" not in given
    }
    if "optim.weight_decay" not in given:
        rate = rates.get("muon_lr", optim.muon_lr)
        most = MOST_DECAY_A_STEP / rate if rate else math.inf
        rates["weight_decay"] = min(REFERENCE_DECAY * growth * reference / tokens, most)
    length: dict[str, Any] = {
        "total_steps": train.total_steps if by_steps else 0,
        "target_tokens": 0 if by_steps else max(1, round(tokens)),
    }
    length |= {} if "train.max_minutes" in given else {"max_minutes": 0.0}
    pieces = train.grad_accum if "train.grad_accum" in given else 1
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(optim, **rates),
        train=dataclasses.replace(train, batch_size=windows, grad_accum=pieces, **length),
    )


def _whole_windows(windows: float) -> int:
    """The nearest multiple of 64, or of the largest power of two below the number."""
    unit = min(WHOLE_WINDOWS, 2 ** max(0, math.floor(math.log2(windows))))
    return max(1, round(windows / unit)) * unit


def describe(config: Config) -> list[str]:
    """What the dial has set, with units."""
    model, data, optim, train = config.model, config.data, config.optim, config.train
    weights, batch = scaling_parameters(model), train.batch_size * config.place_tokens
    beside = f", and {data.short_windows} of {data.short_len} beside each" if data.short_windows else ""
    tokens = train.target_tokens or train.total_steps * batch
    length = f"tokens, {tokens / weights:.1f} for each of {weights:,} weights of matrices and head"
    return [
        f"{model.n_layer} blocks, {model.n_embd} wide, {model.n_head} heads of {model.n_embd // model.n_head}",
        f"length          {tokens:>16,}   {length}; {tokens * mean_flops_per_token(config):.2e} FLOPs",
        f"batch           {train.batch_size:>16,}   windows of {model.seq_len} tokens{beside}: {batch:,} tokens",
        f"Muon's rate     {optim.muon_lr:>16.4g}   embedding {optim.embedding_lr:.4g}, head {optim.head_lr:.4g}",
        f"weight decay    {optim.weight_decay:>16.4g}   of the matrices, at first",
    ]


def plan_lines(
    config: Path | None,
    depth: int | None,
    ratio: float | None,
    target_flops: float | None,
    gpu: str,
    gpus: int,
    mfu: float,
    grad_accum: int,
    prices: Path | None,
) -> list[str]:
    """What `ping-llm plan` prints of a file, a depth or both; ValueError as of `parse_run` and `plan_cost`."""
    if grad_accum < 0:
        raise ValueError(f"--grad-accum {grad_accum} must be at least 1")
    own = {"depth": depth, "ratio": ratio, "target-flops": target_flops}
    argv = [str(config)] if config else []
    argv += [word for name, value in own.items() if value is not None for word in (f"--{name}", str(value))]
    run, kind, lines = parse_run(argv, "ping-llm plan"), GPU.named(gpu, prices or PRICES), []
    if depth is not None:
        lines = describe(run)
        if not grad_accum and gpus > 0 and run.train.batch_size % gpus == 0:
            largest = largest_micro_batch(run, kind.memory_gb)
            grad_accum = fewest_pieces(run.train.batch_size // gpus, max(1, largest))
    train = dataclasses.replace(run.train, grad_accum=grad_accum or run.train.grad_accum)
    return [*lines, *plan_cost(dataclasses.replace(run, train=train), kind, gpus, mfu).lines]


def parse_run(argv: Sequence[str], prog: str, on_this_machine: bool = False) -> Config:
    """`[CONFIG.toml] [--depth N [--ratio R | --target-flops F]] [--section.option value …]` in, the resolved config out.

    Without --depth that is `parse_config`. What the dial sets stands above the file and below the other options; without a
    file the run folder is runs/dN. `on_this_machine` cuts the batch into as few micro-batches as its memory asks for, unless
    --train.grad-accum is given.
    """
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--target-flops", type=float)
    try:
        own, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name} {error.message}") from None
    if own.depth is None:
        for option, value in (("--ratio", own.ratio), ("--target-flops", own.target_flops)):
            if value is not None:
                raise ValueError(f"{option} goes with --depth")
        return parse_config(rest, prog)
    dial = Dial(own.depth, own.ratio, own.target_flops)
    base, options = Config(), rest
    if rest and not rest[0].startswith("-"):
        base, options = load_config(rest[0]), rest[1:]
    else:
        base = dataclasses.replace(base, train=dataclasses.replace(base.train, run_dir=Path(f"runs/d{dial.depth}")))
    given = _given(options)
    whole = {name: int(text) for name, text in given.items() if text.isdecimal()}
    depth, width, heads = (whole.get(f"model.{name}", 0) for name in ("n_layer", "n_embd", "n_head"))
    shape = set_shape(base.model, depth or dial.depth, width, heads, whole.get("model.n_kv_head"))
    start = dataclasses.replace(base, model=shape)
    config = set_scale(parse_config(options, prog, set_scale(start, dial)), dial, given, base)
    return fit_memory(config) if on_this_machine and "train.grad_accum" not in given else config


def _given(options: Sequence[str]) -> dict[str, str]:
    """Dotted names of the options on a command line, and the words after them."""
    found: dict[str, str] = {}
    for option, following in zip(options, [*options, ""][1:], strict=True):
        if option.startswith("--"):
            name, equals, value = option.removeprefix("--").partition("=")
            found[name.replace("-", "_")] = value if equals else following
    return found


def fit_memory(config: Config) -> Config:
    """The config with as few micro-batches as the memory of this process's device asks for."""
    device, train = pick_device(config.train.device), config.train
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    train.check_processes(processes)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    largest = largest_micro_batch(config, memory_gb(device) / sharing, on_cpu=device.type == "cpu")
    pieces = fewest_pieces(train.batch_size // processes, max(1, largest))
    return dataclasses.replace(config, train=dataclasses.replace(train, grad_accum=pieces))
