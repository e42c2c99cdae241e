"""The weights of each step in, their average over the latest steps out: what evaluations and queries use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ping_llm.config import Config, TrainConfig
from ping_llm.model.checkpoint import OPTIMIZER_NAME, STATE_NAME, load_model
from ping_llm.model.gpt import GPT

TRAINED = "trained."  # prefix of the weights that training goes on from, beside the optimiser's tensors in a checkpoint
_COUNTED = "average.steps"  # of the tail so far, beside them


class WeightAverage:
    """An average of a model's weights that moves with the steps, beside the weights themselves.

    After each step it goes a part of the way to the weights. By a `share` that is 1 / (share · t) after step t, all of it as
    long as that is more than 1. So the weights of step i count in proportion to i^(1/share − 1): their mean age is
    share / (1 + share) of the steps taken, however many those are, and of a share of 1 it is their plain mean (Polyak and
    Juditsky, Acceleration of stochastic approximation by averaging, 1992; for other shares Shamir and Zhang, Stochastic
    gradient descent for non-smooth optimization, 2013). By an `ema` it is 1 − ema, or 1 / t while that is more: the initial
    weights never count. By a `tail` it is all of it until 1 − tail of the run are done, then 1, 1/2, 1/3 …

    It depends on nothing but how far the run is and itself, so a run can go on from it.
    """

    def __init__(self, model: nn.Module, share: float = 0.0, ema: float = 0.0, tail: float = 0.0) -> None:
        self.share, self.ema, self.tail = share, ema, tail
        self.counted = 0  # steps of the tail
        self.parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.weights = {name: parameter.clone() for name, parameter in self.parameters.items()}

    @classmethod
    def wanted(cls, model: nn.Module, config: TrainConfig) -> WeightAverage | None:
        """The average that a run is to keep, None if none."""
        kind = config.average, config.average_ema, config.average_tail
        return cls(model, *kind) if config.averages else None

    @torch.no_grad()
    def update(self, step: int, progress: float) -> None:
        """Takes in the weights after step 1, 2, …, when `progress` of the run are done."""
        if self.tail:
            self.counted += progress > 1 - self.tail
            way = 1 / max(1, self.counted)
        elif self.ema:
            way = max(1 - self.ema, 1 / step)
        else:
            way = min(1.0, 1 / (self.share * step))
        torch._foreach_lerp_(list(self.weights.values()), list(self.parameters.values()), way)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the model has the averaged weights; afterwards its own again, to the bit."""
        trained = {name: parameter.clone() for name, parameter in self.parameters.items()}
        self._put(self.weights)
        try:
            yield
        finally:
            self._put(trained)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that training goes on from, flat, under names of their own; and how many steps of a tail count."""
        trained = {TRAINED + name: parameter for name, parameter in self.parameters.items()}
        return trained | ({_COUNTED: torch.tensor(self.counted)} if self.tail else {})

    def load_state_dict(self, averaged: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
        """Takes up the averaged weights of a checkpoint, and gives the model those of `state_dict`; from any device."""
        for name, weight in self.weights.items():
            weight.copy_(averaged[name])
        self.counted = int(trained.get(_COUNTED, 0))
        self._put({name: trained[TRAINED + name] for name in self.parameters})

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        """In place: optimisers, compiled passes and the exchange of gradients hold the parameters' memory."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


def load_trained(path: Path | str, device: torch.device | str = "cpu") -> tuple[GPT, Config, dict[str, Any]]:
    """The model that `load_model` gives, with the weights that training goes on from in place of their average.

    ValueError if the run averages none, or they are damaged.
    """
    model, config, state = load_model(path, device)
    folder = Path(path) if (Path(path) / STATE_NAME).exists() else Path(path) / f"checkpoints/step-{state['step']:08d}"
    if not config.train.averages:
        raise ValueError(f"{path} averages no weights; load its model as it is")
    with (folder / OPTIMIZER_NAME).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != state["sha256"][OPTIMIZER_NAME]:
            raise ValueError(f"{folder / OPTIMIZER_NAME} is damaged; restore it or load the averaged weights")
    tensors = load_file(folder / OPTIMIZER_NAME)
    trained = {name: tensors[TRAINED + name] for name, _ in model.named_parameters()}
    model.load_state_dict(model.state_dict() | trained)  # what is no weight is the same
    return model, config, state
