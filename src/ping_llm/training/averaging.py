"""The weights of each step in, their average over the latest steps out: what evaluations and queries use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TRAINED = "trained."  # prefix of the weights that training goes on from, beside the optimiser's tensors in a checkpoint


class WeightAverage:
    """An average of a model's weights that moves with the steps, beside the weights themselves.

    After step t it goes 1 / (share · t) of the way to the weights, all of it as long as that is more than 1. So the weights
    of step i count in proportion to i^(1/share − 1): their mean age is share / (1 + share) of the steps taken, however many
    those are, and of a share of 1 it is their plain mean (Polyak and Juditsky, Acceleration of stochastic approximation by
    averaging, 1992; for other shares Shamir and Zhang, Stochastic gradient descent for non-smooth optimization, 2013). It
    depends on nothing but the number of the step and itself, so a run can go on from it.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self.parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.weights = {name: parameter.clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step 1, 2, …"""
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
        """The weights that training goes on from, flat, under names of their own."""
        return {TRAINED + name: parameter for name, parameter in self.parameters.items()}

    def load_state_dict(self, averaged: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
        """Takes up the averaged weights of a checkpoint, and gives the model those of `state_dict`; from any device."""
        for name, weight in self.weights.items():
            weight.copy_(averaged[name])
        self._put({name: trained[TRAINED + name] for name in self.parameters})

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        """In place: optimisers, compiled passes and the exchange of gradients hold the parameters' memory."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
