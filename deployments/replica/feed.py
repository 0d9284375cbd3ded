"""What takes the scheduler's place before an engine that schedules by itself: sequences enter, bare steps leave.

Such an engine (vLLM) batches, chunks prompts and keeps its cache as it sees fit. A step only tells it which sequences
begin and which have ended, and asks for whatever it samples next; two steps are in flight while anything runs, so
that the engine never waits for the replica.
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence as AnySequence

from deployments.messages import Sample, StepInput, StepOutput
from deployments.replica.scheduler import StepMismatch
from deployments.replica.sequence import Sequence, SequenceState

_MAX_IN_FLIGHT = 2


class Feed:
    """All sequences of one replica: who waits, and who is with the engine. See :class:`Planner` for the calls."""

    def __init__(self, max_running: int) -> None:
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._max_running = max_running
        self._waiting: list[Sequence] = []
        self._running: dict[int, Sequence] = {}
        self._ended: list[int] = []
        self._in_flight: deque[int] = deque()

    @property
    def num_running(self) -> int:
        """Sequences with the engine."""
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Steps sent and not answered."""
        return len(self._in_flight)

    @property
    def waiting(self) -> AnySequence[Sequence]:
        """Sequences that the engine does not know yet, oldest first."""
        return self._waiting

    @property
    def running(self) -> AnySequence[Sequence]:
        """Sequences with the engine."""
        return tuple(self._running.values())

    @property
    def num_blocks_used(self) -> int:
        """None here: the cache is the engine's."""
        return 0

    @property
    def kv_used_fraction(self) -> float:
        """How full the engine is, by the sequences it may have at once."""
        return len(self._running) / self._max_running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its age."""
        insort(self._waiting, sequence, key=_age)

    def end(self, sequence: Sequence) -> None:
        """Finished or cancelled: the engine is told with the next step."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            del self._running[sequence.sequence_id]
            self._ended.append(sequence.sequence_id)
        sequence.state = SequenceState.FINISHED

    def plan(self) -> StepInput | None:
        """The next step; None while two are in flight, or nothing runs and nothing has ended."""
        num_free = self._max_running - len(self._running)
        has_work = self._running or self._ended or (self._waiting and num_free)
        if len(self._in_flight) >= _MAX_IN_FLIGHT or not has_work:
            return None
        admitted, self._waiting = self._waiting[:num_free], self._waiting[num_free:]
        for sequence in admitted:
            sequence.state = SequenceState.RUNNING
            sequence.announced = True
            sequence.num_cached = 0
            sequence.num_computed = len(sequence.tokens)
            self._running[sequence.sequence_id] = sequence
        ended, self._ended = tuple(self._ended), []
        self.num_steps += 1
        self._in_flight.append(self.num_steps)
        started = tuple(sequence.start() for sequence in admitted)
        return StepInput(step=self.num_steps, sequences=(), started=started, ended=ended)

    def complete(self, output: StepOutput) -> list[tuple[Sequence, AnySequence[Sample]]]:
        """Take the oldest step's samples; returns those of sequences that go on, appended to them.

        Raises StepMismatch when the output is not the answer to the oldest step in flight.
        """
        if not self._in_flight or self._in_flight[0] != output.step:
            expected = self._in_flight[0] if self._in_flight else "none"
            raise StepMismatch(f"the engine answered step {output.step}; expected {expected}")
        self._in_flight.popleft()
        taken: list[tuple[Sequence, AnySequence[Sample]]] = []
        for sample in output.samples:
            sequence = self._running.get(sample.sequence_id)
            if sequence is not None:
                sequence.tokens.append(sample.token_id)
                sequence.num_computed = len(sequence.tokens)
                taken.append((sequence, (sample,)))
        return taken

    def reset(self, num_stages: int | None = None) -> None:  # noqa: ARG002 - it is always one
        """The engine is new and knows nothing: every running sequence waits again, with what it has emitted."""
        for sequence in self._running.values():
            sequence.reset_for_recompute()
            self.add(sequence)
        self._running.clear()
        self._ended.clear()
        self._in_flight.clear()


def _age(sequence: Sequence) -> int:
    return sequence.sequence_id
