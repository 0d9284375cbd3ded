"""An exponential moving average of the weights: after every step, averages move a little towards the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from train_jobs.trainer.gradients import local_part


class WeightAverage:
    """``decay`` of the average is kept per step; ``averages`` are cut over workers as the weights are."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._decay = decay
        self._weights = [local_part(parameter.detach()) for parameter in parameters.values()]
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._averages = [local_part(average) for average in self.averages.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Average in the weights as they are now."""
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the averages inside the block, and with its weights again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        kept = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        torch._foreach_copy_(self._averages, kept)
