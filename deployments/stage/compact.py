"""Steps as they travel: a StepInput enters at the replica's end, only what is new crosses the wire, it leaves whole.

A block table grows by a block every few steps, so each end remembers it: the replica how long it was, the stage all
of it, and the sequence's adapter. Both forget a sequence with its ``ended`` and begin anew with its ``started``, so
they agree as long as every step arrives, in order, which the Channel sees to.
"""

from deployments.messages import CompactPart, CompactStep, SequenceStep, StepInput


class StepCompactor:
    """The replica's end; one for all stages, as all are sent the same."""

    def __init__(self) -> None:
        self._num_blocks: dict[int, int] = {}

    def compact(self, step: StepInput, *, follows: bool) -> CompactStep:
        """What the stages do not know yet of ``step``."""
        for sequence_id in step.ended:
            self._num_blocks.pop(sequence_id, None)
        for start in step.started:
            self._num_blocks[start.sequence_id] = 0
        return CompactStep(
            step=step.step,
            parts=tuple(self._compact_part(part) for part in step.sequences),
            started=step.started,
            ended=step.ended,
            follows=follows,
        )

    def _compact_part(self, part: SequenceStep) -> CompactPart:
        num_known = self._num_blocks[part.sequence_id]
        self._num_blocks[part.sequence_id] = len(part.block_ids)
        new_block_ids = part.block_ids[num_known:] if len(part.block_ids) > num_known else ()
        return CompactPart(
            part.sequence_id,
            part.token_ids,
            part.position,
            new_block_ids,
            part.sample,
            part.chosen_in,
            part.num_drafts,
        )


class StepExpander:
    """A stage's end."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[int, ...]] = {}
        self._adapters: dict[int, str | None] = {}

    def expand(self, step: CompactStep) -> StepInput:
        """The whole step; ValueError for a sequence that was never started."""
        for sequence_id in step.ended:
            self._tables.pop(sequence_id, None)
            self._adapters.pop(sequence_id, None)
        for start in step.started:
            self._tables[start.sequence_id] = ()
            self._adapters[start.sequence_id] = start.adapter
        return StepInput(
            step=step.step,
            sequences=tuple([self._expand_part(part) for part in step.parts]),
            started=step.started,
            ended=step.ended,
        )

    def _expand_part(self, part: CompactPart) -> SequenceStep:
        table = self._tables.get(part.sequence_id)
        if table is None:
            raise ValueError(f"a step names sequence {part.sequence_id}, which was never started")
        if part.new_block_ids:
            table = self._tables[part.sequence_id] = table + part.new_block_ids
        adapter = self._adapters[part.sequence_id]
        return SequenceStep(
            part.sequence_id,
            part.token_ids,
            part.position,
            table,
            part.sample,
            part.chosen_in,
            adapter,
            part.num_drafts,
        )
