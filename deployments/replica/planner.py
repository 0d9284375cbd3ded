"""What an engine asks of whoever decides its steps: sequences enter, steps leave, answers enter.

:class:`deployments.replica.scheduler.Scheduler` plans every position and block of Manta's own stages;
:class:`deployments.replica.feed.Feed` stands before an engine that does so itself.
"""

from collections.abc import Sequence as AnySequence
from typing import Protocol

from deployments.messages import Sample, StepInput, StepOutput
from deployments.replica.sequence import Sequence


class Planner(Protocol):
    """Decides without any I/O. The counts are totals since it was made."""

    num_steps: int
    num_preemptions: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def num_running(self) -> int:
        """Sequences that are being computed."""

    @property
    def num_in_flight(self) -> int:
        """Steps sent and not answered."""

    @property
    def waiting(self) -> AnySequence[Sequence]:
        """Sequences whose turn has not come, oldest first."""

    @property
    def running(self) -> AnySequence[Sequence]:
        """Sequences that are being computed."""

    @property
    def num_blocks_used(self) -> int:
        """Blocks that sequences hold; 0 when there is no sequence, or no blocks are kept here."""

    @property
    def kv_used_fraction(self) -> float:
        """How full the cache is, of 1."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its age."""

    def end(self, sequence: Sequence) -> None:
        """Finished or cancelled: free what it holds."""

    def plan(self) -> StepInput | None:
        """The step to send now, if any."""

    def complete(self, output: StepOutput) -> list[tuple[Sequence, AnySequence[Sample]]]:
        """Take the oldest step's samples, some of each sequence; raises StepMismatch for any other step's."""

    def reset(self, num_stages: int | None = None) -> None:
        """Whoever computes is new and knows nothing."""
