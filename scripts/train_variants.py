"""A config in, the time of a step in other forms over that of the step as it is out; for bench_train.py.

Each form undoes one choice of the model or of how it is run, or takes one that is not the default, on few layers of the
config's width, so that it compiles soon. All are compiled first and then take turns. A form that this device cannot take is
skipped and says why.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import profile_training
import torch
import torch.nn.functional as F
from profile_training import Effort, compare, new_training, synthetic_tokens, take_step, with_train
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention import SDPBackend, sdpa_kernel

from ping_llm.config import Config
from ping_llm.model import attention as attention_module
from ping_llm.model.attention import Attention, Pass, Rotation
from ping_llm.model.block import Block
from ping_llm.model.mlp import MLP
from ping_llm.model.norm import rms_norm
from ping_llm.training import objective
from ping_llm.training.trainer import Training

LAYERS = 2
_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Variant:
    """A form of the step: what is replaced while it is made, compiled and run, and the config that it takes."""

    replaced: Callable[[], AbstractContextManager[object]] = nullcontext
    config: Callable[[Config], Config] = lambda config: config
    lacking: str | None = None  # why this device cannot take it


def variants(config: Config, device: torch.device) -> dict[str, Variant]:
    """What is compared with the step as it is."""
    no_gpu = None if device.type == "cuda" else "needs a GPU"
    width = 64 if config.model.n_embd % 64 == 0 else 32
    forms = {
        "eager": Variant(config=lambda config: with_train(config, compile=False)),
        f"heads of {width}": Variant(config=lambda config: with_heads(config, width)),
        "squared ReLU as a power": Variant(lambda: patch.object(MLP, "forward", _power)),
        "residual stream in fp32": Variant(lambda: patch.object(Block, "forward", _fp32_stream)),
        "angles anew in each kernel": Variant(lambda: patch.object(attention_module, "rotate", _angles_anew)),
        "three matrices for q, k, v": Variant(lambda: patch.object(Attention, "forward", _three_matrices)),
        "without the compiled optimiser": Variant(
            lambda: patch.object(profile_training, "resolve_compile_optimizer", lambda *_: False), lacking=no_gpu
        ),
        "fp8": Variant(config=lambda config: with_train(config, precision="fp8"), lacking=without_fp8(config, device)),
    }
    for name, backend in (("torch's choice", None), ("flash", SDPBackend.FLASH_ATTENTION)):
        forms[f"attention: {name}"] = Variant(
            lambda backend=backend: patch.object(objective, "attention_order", lambda _: attention(backend)),
            lacking=no_gpu,
        )
    return forms


def without_fp8(config: Config, device: torch.device) -> str | None:
    """Why steps of the config cannot be taken in FP8; None if they can."""
    try:
        objective.resolve_precision("fp8", device)
        with_train(config, precision="fp8")
    except ValueError as error:
        return str(error)
    return None


def variant_ratios(config: Config, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Seconds of a step of each variant over those of the step as it is; None, and why, where it could not run."""
    torch._dynamo.config.recompile_limit = 64  # all of them are compiled from the same code
    model = dataclasses.replace(config.model, n_layer=min(LAYERS, config.model.n_layer))
    config = with_train(dataclasses.replace(config, model=model), compile=True)
    ready, skipped, started = {}, {}, time.perf_counter()
    forms = {"as it is": Variant()} | variants(config, device)
    for name, variant in forms.items():
        if variant.lacking:
            skipped[name] = variant.lacking
            continue
        with variant.replaced():
            training, tokens = new_training(variant.config(config), device), synthetic_tokens(config, device)

        def step(variant: Variant = variant, training: Training = training, tokens: Tensor = tokens) -> None:
            with variant.replaced():
                take_step(training, tokens)

        try:
            for _ in range(_WARM_UP_STEPS):
                step()
        except (TorchDynamoException, RuntimeError) as error:  # out of memory, too
            skipped[name] = str(error).strip().splitlines()[0]
            continue
        ready[name] = step
    prepared_s = time.perf_counter() - started
    seconds = compare(ready, device, effort.rounds, effort.steps)
    base = seconds.get("as it is")
    ratios = {name: seconds[name] / base if base and name in seconds else None for name in forms}
    found = {"layers": model.n_layer, "batch_size": config.train.batch_size, "compile_s": prepared_s}
    return found | {"ratios": ratios, "skipped": skipped}


def with_heads(config: Config, width: int) -> Config:
    """The config with heads of `width` channels."""
    model = dataclasses.replace(config.model, n_head=config.model.n_embd // width)
    return dataclasses.replace(config, model=model)


def attention(backend: SDPBackend | None) -> AbstractContextManager[object]:
    """One implementation of attention, or torch's own choice."""
    return nullcontext() if backend is None else sdpa_kernel(backend)


def _power(self: MLP, x: Tensor) -> Tensor:
    return self.down(torch.pow(F.relu(self.up(x)).float(), 2))  # as CUDA's autocast runs it


def _fp32_stream(self: Block, x: Tensor, given: Pass) -> Tensor:
    x = x.float() + self.attention(rms_norm(x.float()), given)
    return x + self.mlp(rms_norm(x))


def _angles_anew(x: Tensor, rotation: Rotation) -> Tensor:
    T, K = x.shape[1], x.shape[-1]
    exponents = torch.arange(0, K, 2, dtype=torch.float32, device=x.device) / K
    angles = torch.arange(T, device=x.device)[:, None, None].float() * 10_000.0**-exponents  # (T, 1, K/2)
    own = torch.cat([angles.cos(), angles.cos()], dim=-1).to(x.dtype)
    swapped = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(x.dtype)
    return torch.addcmul(x * own, x.roll(K // 2, dims=-1), swapped)


def _three_matrices(self: Attention, x: Tensor, given: Pass) -> Tensor:
    B, T, D = x.shape
    q, k, v = (F.linear(x, matrix).view(B, T, -1, self.width) for matrix in self.qkv.weight.chunk(3))
    q, k = (rms_norm(attention_module.rotate(part, given.rotation)) for part in (q, k))
    y = F.scaled_dot_product_attention(*(heads.transpose(1, 2) for heads in (q, k, v)), is_causal=True)
    return self.out(y.transpose(1, 2).reshape(B, T, D))
