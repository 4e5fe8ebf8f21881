"""An exponential moving average of the weights, which is better than the weights of any single step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lumiere.training.shards import like


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights` after each step (Polyak & Juditsky 1992).

    While training is young, the decay is (1 + step) / (10 + step) where that is less, so that the untrained weights do
    not linger in the average (as `tf.train.ExponentialMovingAverage` does it).

    Args:
        model: whose weights are averaged; the average starts as a copy of them.
        decay: share of the average that a step leaves, 0 to 1: about 1 / (1 - decay) steps are averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after the update number `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside of it, the model's weights are the average, and the average holds the weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """In place: whoever else knows the memory of the weights, such as FSDP, must find the average there."""
        for name, average in self._averages.items():
            parameter = self._parameters[name]
            weight = parameter.clone()
            parameter.copy_(average)
            average.copy_(weight)

    def tensors(self) -> dict[str, Tensor]:
        """The average of each parameter, by its name in the model."""
        return dict(self._averages)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        for name, average in self._averages.items():
            average.copy_(like(tensors[name], average))
