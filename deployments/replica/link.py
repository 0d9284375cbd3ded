"""The stages as the engines see them: steps go in, results come out in the order sent."""

from typing import Protocol

from deployments.channel import ChannelError
from deployments.messages import EmbedInput, EmbedOutput, StageFailed, StepInput, StepOutput
from deployments.replica.scheduler import StepMismatch
from deployments.stage.link import StageLostError

LINK_ERRORS = (StageLostError, ChannelError, OSError, StepMismatch)
"""What a broken link raises: the stages are unusable, the engine is not at fault."""


class StageLink(Protocol):
    """A generating pipeline. Both calls raise one of LINK_ERRORS when it is broken."""

    @property
    def num_stages(self) -> int:
        """Length of the pipeline."""
        ...

    async def send(self, step: StepInput) -> None:
        """Hand a step to every stage, after all steps sent before."""
        ...

    async def receive(self) -> StepOutput | StageFailed:
        """The next step's result. Called only while a step is in flight; the link has a deadline of its own."""
        ...


class EmbedLink(Protocol):
    """An embedding pipeline; the same rules."""

    @property
    def num_stages(self) -> int:
        """Length of the pipeline."""
        ...

    async def send(self, step: EmbedInput) -> None:
        """Hand a batch to the stages."""
        ...

    async def receive_vectors(self) -> tuple[EmbedOutput | StageFailed, list[bytes]]:
        """The next batch's vectors: one float32 buffer, shape [num_vectors, dimensions]."""
        ...
