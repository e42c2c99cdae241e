"""The environment that torchrun sets in, what the processes of a run do together out.

All of this also works in a single process; then nothing is sent.
"""

from __future__ import annotations

import atexit
import datetime as dt
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ping_llm.system.hardware import pick_device
from ping_llm.system.signals import ignore_from_now_on

TIMEOUT = dt.timedelta(minutes=10)  # of one exchange; a process may be compiling, or looking at samples, meanwhile
_UNFREED: list[BaseException] = []
"""Of an exchange that broke off: by its traceback an error holds all that took part, so that it is never freed.

Where it is freed, this thread holds Python's lock and waits for gloo's thread, which waits for that lock.
"""
_BROKEN_OFF = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""How gloo and NCCL report that an exchange broke off."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The equally shaped tensors of all processes, in the order of ranks along the first axis."""
        if self.world == 1:
            return values
        gathered = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(gathered, values.contiguous())
        return torch.cat(gathered)

    def share(self, value: Any) -> Any:
        """A value of the main process, in every process; what the others pass is ignored."""
        if self.world == 1:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Runs a function in the main process only: its result there, None elsewhere; an error ends all processes, but
        only the main one reports it."""
        result = None
        if self.is_main:
            try:
                result = function()
            except (ValueError, OSError):
                self.share(True)
                raise
        if self.share(False):
            raise SystemExit(1)
        return result


@contextmanager
def processes(device_name: str) -> Iterator[Ranks]:
    """Joins the processes that torchrun has started; ValueError if this machine cannot.

    Each process of a machine has a GPU of its own, or all of them work on the CPU. If another process ends before this one,
    ConnectionError is raised out of the block.
    """
    device, world = pick_device(device_name), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks(device)
        return
    if device.type == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            found = f"torchrun started process {local_rank + 1} on a machine with {gpus} GPUs"
            raise ValueError(f"{found}; pass --nproc-per-node {gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    atexit.register(_leave_the_unfreed)  # before whatever else is to be done at the end, so it is done last
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the processes of this run did not find each other ({reason}); start all of them with torchrun, with one "
            "--rdzv-endpoint that every machine can reach"
        ) from None
    try:
        yield Ranks(device, dist.get_rank(), world)
        dist.barrier()  # none takes the connections down while another still needs them
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _BROKEN_OFF):
            raise
        _UNFREED.append(error)
        ignore_from_now_on(signal.SIGTERM)  # torchrun sends it to all others as soon as one has ended
        raise ConnectionError(
            f"process {dist.get_rank()} of {world} stops, because another one of this run ended; its own last line says "
            "why. Run the same command again to continue from the last checkpoint"
        ) from error
    finally:
        if dist.is_initialized() and not _UNFREED:
            dist.destroy_process_group()


def _leave_the_unfreed() -> None:
    """Ends a process whose exchange broke off, before Python would free it."""
    if _UNFREED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
