"""Batches in, gradients and losses per field out, summed over all processes of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from ping_llm.config import Config
from ping_llm.data.loader import windows_of
from ping_llm.data.tokenization import FIELD_OF_BYTES_AFTER, FIELD_OF_ROLE, MUTED, PADDING
from ping_llm.model.dropout import keys_beside, window_keys
from ping_llm.model.gpt import GPT
from ping_llm.model.loss import (
    PARTS,
    RTT,
    count_results,
    field_losses,
    field_weights,
    part_masks,
    smoothing_cost,
    token_fields,
)
from ping_llm.system.hardware import FP8_CAPABILITY, device_name, native_bf16, native_fp8
from ping_llm.training.distributed import Ranks

HOPPER_ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
DETERMINISTIC_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
COMPILED_SHAPES = 64  # of training and evaluations: more than batches that double up to any size have
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def resolve_precision(name: str, device: torch.device) -> str:
    """fp32, bf16, fp16 or fp8; `auto` is bf16 where the device multiplies it natively. ValueError without FP8 there."""
    if name == "fp8" and not native_fp8(device):
        least = ".".join(map(str, FP8_CAPABILITY))
        needs = f"an NVIDIA GPU of capability {least} or more (Ada, Hopper, Blackwell)"
        raise ValueError(
            f"train.precision=fp8 needs {needs}, not {device_name(device)}; a run that begins in bf16 does not"
        )
    return name if name != "auto" else "bf16" if native_bf16(device) else "fp32"


def resolve_compile(choice: str | bool, device: torch.device) -> bool:
    """Whether the model is compiled; `auto` is on a GPU: on a CPU it takes a minute and gains nothing."""
    return device.type == "cuda" if isinstance(choice, str) else choice


def resolve_compile_optimizer(choice: str | bool, device: torch.device) -> bool:
    """Whether the optimiser's step is compiled: on a GPU where the model is, never on a CPU."""
    return device.type == "cuda" and resolve_compile(choice, device)


def attention_order(device: torch.device) -> AbstractContextManager[object]:
    """The implementations of attention in the order in which they are tried, as a context: on a Hopper cuDNN's is the
    fastest, but it is not what torch takes by itself. Deterministic runs do without it, for its backward pass is not."""
    if device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return sdpa_kernel(list(DETERMINISTIC_ATTENTION), set_priority=True)
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return nullcontext()
    return sdpa_kernel(list(HOPPER_ATTENTION), set_priority=True)


class Objective:
    """The training loss: a weighted mean of the cross-entropy over the targets of a whole step, of all processes.

    `loss.smoothing` changes the gradients alone: all that is reported is plain cross-entropy.
    A step's batch, B lines of `windows_of` in each process, is worked through in `grad_accum` micro-batches; so are, before
    them, the short windows of its places, if there are any. Gradients are averaged over the processes while those of the
    last micro-batch are still being computed. `precision` is what the run began with; without it, that of the config.
    """

    def __init__(self, config: Config, model: GPT, ranks: Ranks, precision: str | None = None) -> None:
        self.model, self.ranks, self.device = model, ranks, ranks.device
        config.train.check_processes(ranks.world)
        self.micro_batch = config.train.batch_size // (ranks.world * config.train.grad_accum)  # windows
        self.role_fields = torch.as_tensor(FIELD_OF_ROLE).to(self.device)
        self.byte_fields = torch.as_tensor(FIELD_OF_BYTES_AFTER).to(self.device)
        self.loss, self.data, self.seed = config.loss, config.data, config.seed
        self.weights = field_weights(config.loss).to(self.device)  # (7,)
        self.precision = precision or resolve_precision(config.train.precision, self.device)
        model.learn_in_fp8(self.precision == "fp8")
        self.parallel: DistributedDataParallel | None = None
        if ranks.world > 1:
            device_ids = [ranks.device] if ranks.device.type == "cuda" else None
            # The gradients are views of the buffers that are sent: they are not copied. The model's buffers never change.
            self.parallel = DistributedDataParallel(
                model, device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        self.forward: Callable[..., Tensor] = self.parallel or model
        self.forward_alone: Callable[..., Tensor] = model  # without an exchange: processes may have unequal work
        self.compiled = resolve_compile(config.train.compile, self.device)
        if self.compiled:
            # One shape, but for short windows and batches that grow; beyond its limit torch would go on uncompiled.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, COMPILED_SHAPES)
            self.forward = torch.compile(self.forward, dynamic=False)
            self.forward_alone = torch.compile(model, dynamic=False) if self.parallel else self.forward

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass, as a context; in fp8, that of everything but the matrices that learn."""
        dtype = _AUTOCAST[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def targets(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (B, T), targets (B, T), −1 = ignored, and their fields (B, T) of windows (B, T+1).

        Padding is put in as token 0; it stands at the right, so no target depends on it. Muted tokens are put in, too.
        """
        tokens = self.model.as_read(tokens)
        read = torch.where(tokens <= MUTED, MUTED - tokens, tokens)
        fields = token_fields(read, self.role_fields, self.byte_fields)
        return read[:, :-1].clamp(min=0), tokens[:, 1:].clamp(min=PADDING), fields[:, 1:]

    def logits(self, forward: Callable[..., Tensor], inputs: Tensor, **options: Tensor) -> Tensor:
        """(B, T, V) fp32; the options are those of the model's forward pass."""
        with self.autocast(), attention_order(self.device):
            return forward(inputs, **options)

    def backward(self, tokens: Tensor, *votes: float, loss_scale: float = 1.0, step: int = 0) -> tuple[Tensor, Tensor]:
        """Adds `loss_scale` times the gradients of the loss over a step's batch, B lines of `windows_of` in this process.

        What is left out of the model is a function of the seed, the `step` and the number of a window in the whole batch.

        Returns the sums of the cross-entropy (7,) fp32 of this process, and float64 of all: the counts of targets (7,),
        then the sums of the `votes` that each of them cast. Nothing here waits for the device.
        """
        kinds = [self.targets(windows) for windows in windows_of(tokens, self.data)]
        counts = torch.stack([part_masks(targets, fields).sum(dim=(1, 2)) for _, targets, fields in kinds]).sum(dim=0)
        ballot = torch.tensor(votes, dtype=torch.float64).to(self.device, non_blocking=True)
        totals = self.ranks.sum(torch.cat([counts.double(), ballot]))
        # Of all micro-batches and processes, so that a token weighs the same in each; DDP divides by their number.
        scale = self.ranks.world * loss_scale / (self.weights * totals[: len(PARTS)]).sum()
        sums = torch.zeros(len(PARTS), device=self.device)
        keys = self._keys(len(tokens), step)
        micro_batches = [
            micro_batch
            for windows, own in zip(reversed(kinds), reversed(keys), strict=True)
            for micro_batch in self._micro_batches(*windows, own, len(tokens))
        ]
        for number, (micro_inputs, micro_targets, micro_fields, options) in enumerate(micro_batches, 1):
            # Gradients are exchanged once, with those of the last micro-batch.
            with self.parallel.no_sync() if self.parallel and number < len(micro_batches) else nullcontext():
                logits = self.logits(self.forward, micro_inputs, **options)
                micro_sums = field_losses(logits, micro_targets, micro_fields)[0]
                cost = (self.weights * micro_sums).sum()
                if smoothing := self.loss.smoothing:
                    cost = cost + self.loss.rtt * smoothing_cost(logits, micro_targets, micro_fields, smoothing)
                (cost * scale).float().backward()
            sums += micro_sums.detach()
        return sums, totals

    def _keys(self, places: int, step: int) -> list[Tensor | None]:
        """Of the windows at the places of this process's batch, (B,), and of the short ones beside them, if there are any;
        None where nothing is left out."""
        short = self.data.short_windows
        if not self.model.leaves_out:
            return [None] * (2 if short else 1)
        ranks = self.ranks
        keys = window_keys(self.seed, step, places * ranks.world, ranks.rank, ranks.world, self.device)
        return [keys, keys_beside(keys, short)] if short else [keys]

    def _micro_batches(
        self, inputs: Tensor, targets: Tensor, fields: Tensor, keys: Tensor | None, places: int
    ) -> list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
        """All windows of one kind at so many places of the batch, cut in micro-batches: what `targets` gives of them, and
        what the model is given beside."""
        size = len(inputs) // places * self.micro_batch
        parts = [tensor.split(size) for tensor in (inputs, targets, fields)]
        given = [{}] * len(parts[0]) if keys is None else [{"keys": own} for own in keys.split(size)]
        return list(zip(*parts, given, strict=True))

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> dict[str, float]:
        """Nats per target, overall and per part, and bits per result, over windows (n, T+1), shared by the processes."""
        totals = torch.zeros(2 * len(PARTS) + 1, dtype=torch.float64, device=self.device)
        for part in windows[self.ranks.rank :: self.ranks.world].split(self.micro_batch):
            if not len(part):
                continue  # fewer windows than processes
            # of another shape it would be compiled again
            missing = self.micro_batch - len(part) if self.compiled else 0
            tokens = F.pad(part, (0, 0, 0, missing), value=-1).to(self.device)
            inputs, targets, fields = self.targets(tokens)
            sums, counts = field_losses(self.logits(self.forward_alone, inputs), targets, fields)
            totals += torch.cat([sums, counts, count_results(targets, fields)[None]])
        sums, counts, results = self.ranks.sum(totals).split([len(PARTS), len(PARTS), 1])
        bits = (sums[RTT] / results).item() / math.log(2)
        return {f"val_{name}": value for name, value in self.means(sums, counts).items()} | {"val_rtt_bits": bits}

    def means(self, sums: Tensor, counts: Tensor) -> dict[str, float]:
        """Loss and nats per target of each part from sums and counts of all processes; NaN for a part without targets."""
        loss = (self.weights * sums).sum() / (self.weights * counts).sum()
        values = torch.cat([loss[None], sums / counts]).tolist()
        return dict(zip(("loss", *(f"loss_{name}" for name in PARTS)), values, strict=True))
