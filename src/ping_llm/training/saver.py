"""The state of a run in, its checkpoints written beside the training out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ping_llm.model import checkpoint


class Saver:
    """Writes the checkpoints of a run in a thread of its own, one at a time, and prunes; a context manager.

    A checkpoint that could not be written is reported to `note`: the ones before it stay and training goes on, because the
    next save may succeed. If the last save of the run failed, the block raises its error, an OSError for a disk.
    """

    def __init__(self, run_dir: Path, keep: int, note: Callable[[str], None]) -> None:
        self.run_dir, self.keep, self.note = run_dir, keep, note
        self.buffers: dict[str, Tensor] = {}  # of all tensors, allocated once; pinned if the tensors are on a GPU
        self.thread: threading.Thread | None = None
        self.failed: Exception | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.wait()
        if self.failed is not None and kind is None:
            raise self.failed

    def save(
        self, step: int, model_state: dict[str, Tensor], optimizer_state: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Waits for the save before, copies the tensors, and returns while a thread writes them (`checkpoint.save`)."""
        self.wait()
        model, optimizer = self._copy("model.", model_state), self._copy("optimizer.", optimizer_state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are under way until then
        self.thread = threading.Thread(target=self._write, args=(step, model, optimizer, state), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Returns when no save is under way."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _copy(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            if prefix + name not in self.buffers:
                self.buffers[prefix + name] = torch.empty_like(
                    tensor, device="cpu", memory_format=torch.contiguous_format, pin_memory=tensor.is_cuda
                )
            copies[name] = self.buffers[prefix + name].copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            checkpoint.save(self.run_dir, step, model, optimizer, state)
            self.failed = None
        except Exception as error:  # an error that ends a thread would otherwise go unnoticed
            last = next((folder.name for folder in checkpoint.checkpoints(self.run_dir)), "none")
            reason = getattr(error, "strerror", None) or repr(error)
            text = f"the checkpoint of step {step} could not be written ({reason}); the last good one is {last}"
            if isinstance(error, OSError):
                error = OSError(f"{text}; make room in {self.run_dir} and run the same command again")
            self.failed = error
            self.note(f"warning: {text}, and training goes on")
            return
        try:
            checkpoint.prune(self.run_dir, self.keep)
        except (OSError, ValueError) as error:
            self.note(f"warning: older checkpoints in {self.run_dir} stay ({error})")
