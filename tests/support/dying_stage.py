"""A stage that dies at an exact step: its connections close without a word, as those of a killed process do."""

from collections.abc import Sequence

import torch

from deployments.channel import ChannelClosed
from deployments.messages import Sample, StepInput
from deployments.runtime.runner import StageRunner


class DyingRunner:
    """Computes like ``runner``; the steps that come as number ``at_steps``, counted from 0, are its last words."""

    def __init__(self, runner: StageRunner, at_steps: Sequence[int]) -> None:
        self.hidden_size = runner.hidden_size
        self.dtype = runner.dtype
        self.num_steps = 0
        self.num_deaths = 0
        self._runner = runner
        self._at_steps = frozenset(at_steps)

    def run(self, step: StepInput, hidden: torch.Tensor | None) -> torch.Tensor | list[Sample]:
        """Compute one step, or die with it computed and nobody told."""
        result = self._runner.run(step, hidden)
        number, self.num_steps = self.num_steps, self.num_steps + 1
        if number in self._at_steps:
            self.num_deaths += 1
            raise ChannelClosed("killed")
        return result

    def forget(self) -> None:
        """A new process knows nothing."""
        self._runner.forget()
