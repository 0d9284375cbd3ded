"""The engine of one replica: requests enter, steps go to the stages, samples come back, events leave.

Two tasks do the work. The pump sends steps while the pipeline has room; it wakes when a request arrives or leaves.
The receiver takes the stages' answers: it appends the samples, decides which sequences go on, sends the next step,
and only then turns tokens into text, so that the stages compute meanwhile. All decisions are the scheduler's.

When the stages fail, every request ends with an ``internal`` refusal at once (``on_stage_failure="refuse"``), or
waits for :meth:`Engine.recover` (``"hold"``). Recovery resets all sequences: their keys and values are recomputed
from prompt and emitted tokens, and because a token depends on nothing else, the streams go on as if nothing had been.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from cluster.plan.types import StepsAhead
from deployments.messages import (
    Delta,
    Finished,
    Generate,
    Load,
    RefusalCode,
    Refused,
    RequestRefused,
    StageFailed,
    Started,
    StepOutput,
    refuse,
)
from deployments.replica.blocks import BlockPool
from deployments.replica.constraints import GrammarChecker
from deployments.replica.intake import Intake
from deployments.replica.life import EngineLife, OnStageFailure
from deployments.replica.link import LINK_ERRORS, StageLink
from deployments.replica.observe import EngineStats, EngineTelemetry, MeanDuration, NoTelemetry
from deployments.replica.planner import Planner
from deployments.replica.request import Choice, Request
from deployments.replica.scheduler import Scheduler, SchedulerConfig
from deployments.replica.sequence import SequenceState
from deployments.replica.text import TextTokenizer
from deployments.stage.link import StageLostError

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of one engine, in tokens, blocks and sequences; ValueError where they contradict each other."""

    context_tokens: int
    num_blocks: int
    block_tokens: int
    prefix_caching: bool = True
    max_running: int
    max_step_tokens: int
    max_waiting: int
    """Sequences that may wait beyond those that can run at once; a request has one per choice."""
    min_decode_split: int = 2
    min_prefill_chunk: int = 64
    speculative_tokens: int = 0
    steps_ahead: StepsAhead = 0
    on_stage_failure: OnStageFailure = "refuse"

    def __post_init__(self) -> None:
        """A single sequence must fit, or it could wait for ever."""
        kv_tokens = self.num_blocks * self.block_tokens
        if kv_tokens < self.context_tokens:
            raise ValueError(
                f"{self.num_blocks} KV blocks of {self.block_tokens} tokens hold {kv_tokens} tokens, less than one "
                f"context of {self.context_tokens}; raise kv_cache.tokens or lower context_tokens"
            )
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting is {self.max_waiting}; it must be at least 0")


class Engine(EngineLife):
    """Serves Generate requests over one pipeline. Start, submit, drain, stop - in that order, in one event loop."""

    _lost_code = "internal"

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: TextTokenizer,
        link: StageLink,
        *,
        planner: Planner | None = None,
        grammars: GrammarChecker | None = None,
        telemetry: EngineTelemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
        adapters: Mapping[str, TextTokenizer] | None = None,
    ) -> None:
        """``grammars`` judges those of requests, and is the caller's to stop; without it they are refused.

        ``adapters`` are the tokenizers of the adapters that the stages have, by name. ``planner`` decides the steps
        where the stages do more by themselves than Manta's own.
        """
        super().__init__(config.on_stage_failure)
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_tokens, prefix_caching=config.prefix_caching)
        self.scheduler: Planner = planner or Scheduler(_scheduler_config(config, link), self.pool)
        self._intake = Intake(tokenizer, adapters or {}, config.context_tokens, grammars)
        self._link = link
        self._telemetry = telemetry or NoTelemetry()
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._choices: dict[int, Choice] = {}
        self._progressed: list[Choice] = []
        self._sent_steps: dict[int, tuple[int, ...]] = {}
        self._durations = MeanDuration()
        self._num_results = 0
        self._recovered_s: float | None = None
        self._num_done = self._num_refused = self._num_cancelled = 0
        self._send_lock = asyncio.Lock()

    # --- life ---

    async def stop(self) -> None:
        """End every request and all work; the link stays the caller's to close."""
        await super().stop()
        self._intake.stop()

    async def recover(self, link: StageLink) -> None:
        """Go on over new stages that know nothing: recompute every unfinished sequence, repeat and lose no token."""
        await self._cancel_tasks()
        self._emit_progress()
        self.scheduler.reset(link.num_stages)
        self._link = link
        self._recovered_s = self._clock()
        self._sent_steps.clear()
        await self._resume()

    # --- requests ---

    async def submit(self, request: Generate) -> AsyncGenerator[Started | Delta | Finished]:
        """Events of one request; raises RequestRefused before the first or in the middle.

        Closing the generator cancels the request: its blocks are free before the next step is planned.
        """
        admitted = await self._admit(request)
        try:
            while True:
                event = await admitted.events.get()
                if isinstance(event, Refused):
                    raise RequestRefused(event)
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._cancel(admitted)

    async def _admit(self, generate: Generate) -> Request:
        arrived_s = self._clock()
        request_id = generate.request_id
        try:
            self._check_open(request_id)
            if generate.emitted is None:  # else it has a place already, on the replica that it comes from
                self._check_room(request_id)
            request = await self._intake.prepare(generate, arrived_s)
            self._check_usable(request_id)  # preparing it may have taken a while
        except RequestRefused:
            self._num_refused += 1
            raise
        self._enter(request)
        return request

    def _check_open(self, request_id: str) -> None:
        """Raise unless a request of this id may come in."""
        self._check_usable(request_id)
        if request_id in self._requests or request_id in self._intake:
            raise refuse(request_id, "invalid_request", f"request id {request_id!r} is already in use")

    def _check_room(self, request_id: str) -> None:
        """Raise unless there is a place; the last one is enough for a request of several choices."""
        num_waiting = self._intake.num_sequences + len(self.scheduler.waiting)
        num_places = self.config.max_waiting + max(0, self.config.max_running - self.scheduler.num_running)
        if num_waiting >= num_places:
            retry_after_s = self._durations.retry_after_s(num_waiting, self.config.max_running)
            message = f"{num_waiting} sequences are waiting, and no more than {num_places} may; try again later"
            raise refuse(request_id, "overloaded", message, retry_after_s=retry_after_s)

    def _enter(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._idle.clear()
        for choice in request.choices:
            self._choices[choice.sequence.sequence_id] = choice
            if choice.sequence.state is SequenceState.WAITING:
                self.scheduler.add(choice.sequence)
        self._wake.set()

    def _cancel(self, request: Request) -> None:
        if not request.ended:
            self._num_cancelled += 1
            self._leave(request)

    def _leave(self, request: Request) -> None:
        """Free all that a request holds; nothing is sent to its client any more."""
        request.ended = True
        del self._requests[request.request_id]
        for choice in request.choices:
            del self._choices[choice.sequence.sequence_id]
            if choice.sequence.state is not SequenceState.FINISHED:
                self.scheduler.end(choice.sequence)
        if not self._requests:
            self._idle.set()
            if self.scheduler.num_blocks_used:
                self._fail(
                    f"{self.scheduler.num_blocks_used} blocks are held by nobody; this is a bug", recoverable=False
                )
        self._wake.set()

    def _refuse(self, request: Request, code: RefusalCode, message: str, *, param: str | None = None) -> None:
        self._num_refused += 1
        self._leave(request)
        refused = Refused(request_id=request.request_id, code=code, message=message, param=param)
        request.events.put_nowait(refused)

    def _refuse_all(self, code: RefusalCode, message: str) -> None:
        for request in tuple(self._requests.values()):
            self._refuse(request, code, message)

    def check_deadlines(self) -> None:
        """End every request whose time is up. The pump calls this; a test with a clock of its own may too."""
        now = self._clock()
        for request in tuple(self._requests.values()):
            if now >= request.deadline_s:
                num_seconds = request.deadline_s - request.arrived_s
                self._refuse(request, "deadline_exceeded", f"the request was not done within {num_seconds:g} s")

    # --- work ---

    async def _pump(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._time_left_s()):
                    await self._wake.wait()
            self._wake.clear()
            self.check_deadlines()
            await self._fill()

    def _time_left_s(self) -> float | None:
        """Until the first deadline; None without a request."""
        first_s = min((request.deadline_s for request in self._requests.values()), default=None)
        return None if first_s is None else first_s - self._clock()

    async def _fill(self) -> None:
        """Send steps until the pipeline is full or nothing more can run."""
        async with self._send_lock:
            while self.failed is None and (step := self.scheduler.plan()) is not None:
                for start in step.started:
                    request = self._choices[start.sequence_id].request
                    if not request.started:
                        request.start()
                self._sent.set()
                self._sent_steps[step.step] = tuple(part.sequence_id for part in step.sequences)
                try:
                    await self._link.send(step)
                except LINK_ERRORS as error:
                    self.report_loss(str(error))

    async def _receive_outputs(self) -> None:
        while True:
            while self.scheduler.num_in_flight == 0:
                await self._sent.wait()
                self._sent.clear()
            output = await self._link.receive()
            if isinstance(output, StageFailed):
                if not output.misheard:
                    self._blame(output)
                raise StageLostError(None, f"step {output.step} failed: {output.message}")
            self._take(output)
            await self._fill()
            self._emit_progress()

    def _blame(self, failed: StageFailed) -> None:
        """A request that takes part in failed step after failed step is ended, or it would break every repair."""
        choices = (self._choices.get(sequence_id) for sequence_id in self._sent_steps.get(failed.step, ()))
        for request in {choice.request for choice in choices if choice is not None}:
            request.num_failed_steps += 1
            if request.num_failed_steps >= _MAX_FAILED_STEPS:
                message = f"{_MAX_FAILED_STEPS} steps with this request failed, the last one so: {failed.message}"
                self._refuse(request, "internal", message)

    def _take(self, output: StepOutput) -> None:
        """Append the samples and decide who goes on; the rest of the work waits until the next step is sent."""
        self._sent_steps.pop(output.step, None)
        for sequence, samples in self.scheduler.complete(output):
            choice = self._choices.get(sequence.sequence_id)
            if choice is None:
                continue  # another choice of its request has just ended it
            if samples[-1].problem is not None:
                self._refuse_grammar(choice.request, samples[-1].problem)
                continue
            self._num_results += len(samples)
            if not choice.accept(samples):
                self.scheduler.end(sequence)
            self._progressed.append(choice)
        self._telemetry.step_done(output.timing)

    def _refuse_grammar(self, request: Request, problem: str) -> None:
        grammar = request.choices[0].sequence.sampling.grammar
        param = grammar.param if grammar is not None else None
        self._refuse(request, "invalid_request", f"{param} cannot be followed any further: {problem}", param=param)

    def _emit_progress(self) -> None:
        """Send what the samples taken last mean to the clients."""
        progressed, self._progressed = self._progressed, []
        now = self._clock()
        if progressed and self._recovered_s is not None:
            self._telemetry.recomputed(now - self._recovered_s)
            logger.info("the first token came %.2f s after the stages were back", now - self._recovered_s)
            self._recovered_s = None
        for choice in progressed:
            request = choice.request
            if request.ended:
                continue
            if request.first_token_s is None:
                request.first_token_s = now
                if not request.num_resumed_tokens:
                    self._telemetry.first_token(now - request.arrived_s)
            delta = choice.take_delta()
            request.num_completion_tokens += len(delta.token_ids)
            request.events.put_nowait(delta)
            if choice.finish_reason is not None:
                request.num_open -= 1
                if request.num_open == 0:
                    self._finish(request, now)

    def _finish(self, request: Request, now: float) -> None:
        self._num_done += 1
        self._durations.add(now - request.arrived_s)
        num_later = request.num_completion_tokens - request.num_resumed_tokens - len(request.choices)
        seconds_per_token = None
        if num_later > 0 and request.first_token_s is not None:
            seconds_per_token = (now - request.first_token_s) * len(request.choices) / num_later
        self._telemetry.request_done(seconds_per_token, request.num_completion_tokens)
        self._leave(request)
        request.finish()

    # --- what others may see ---

    def load(self) -> Load:
        """How busy this replica is; sequences, and prompt tokens that no step has been asked for yet."""
        sequences = (*self.scheduler.waiting, *self.scheduler.running)
        return Load(
            num_running=self.scheduler.num_running,
            num_waiting=len(self.scheduler.waiting),
            num_waiting_tokens=sum(s.num_uncomputed for s in sequences if s.num_uncomputed > 1),
            kv_used_fraction=self.scheduler.kv_used_fraction,
            draining=self._draining,
        )

    def stats(self) -> EngineStats:
        """Totals so far, and what is held now."""
        return EngineStats(
            num_steps=self.scheduler.num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_prefix_queries=self.scheduler.num_prefix_queries,
            num_prefix_hits=self.scheduler.num_prefix_hits,
            num_draft_tokens=self.scheduler.num_draft_tokens,
            num_accepted_tokens=self.scheduler.num_accepted_tokens,
            num_recoveries=self._num_recoveries,
            num_results=self._num_results,
            num_requests_done=self._num_done,
            num_requests_refused=self._num_refused,
            num_requests_cancelled=self._num_cancelled,
            num_running=self.scheduler.num_running,
            num_waiting=len(self.scheduler.waiting),
            num_blocks_used=self.scheduler.num_blocks_used,
            kv_used_fraction=self.scheduler.kv_used_fraction,
        )


def _scheduler_config(config: EngineConfig, link: StageLink) -> SchedulerConfig:
    return SchedulerConfig(
        num_stages=link.num_stages,
        max_running=config.max_running,
        max_step_tokens=config.max_step_tokens,
        min_decode_split=config.min_decode_split,
        min_prefill_chunk=config.min_prefill_chunk,
        speculative_tokens=config.speculative_tokens,
        steps_ahead=config.steps_ahead,
    )
