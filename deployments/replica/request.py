"""One request in the engine: samples enter, the messages its client sees leave, choice by choice."""

import asyncio
from collections.abc import Iterable, Iterator

from deployments.messages import (
    ChosenLogprob,
    Delta,
    EmittedChoice,
    Finished,
    FinishReason,
    Generate,
    Refused,
    Sample,
    SamplingParams,
    Started,
    refuse,
)
from deployments.replica.sequence import Sequence, SequenceState
from deployments.replica.stops import StopChecker
from deployments.replica.text import TextTokenizer

RequestEvent = Started | Delta | Finished | Refused


class Choice:
    """One choice of a request: decides when it ends and turns its tokens into text.

    A step's samples are taken in two halves, because the next step should be sent before text is made: :meth:`accept`
    decides whether the choice goes on, :meth:`take_delta` makes the message. Only stop strings need the text
    for the first half.
    """

    def __init__(self, request: "Request", sequence: Sequence, tokenizer: TextTokenizer) -> None:
        sampling = sequence.sampling
        self.request = request
        self.sequence = sequence
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(
            sequence.tokens[: sequence.num_prompt_tokens], skip_special_tokens=sampling.skip_special_tokens
        )
        self._stops = StopChecker(sampling.stop, include_stop=sampling.include_stop_str_in_output)
        self._stop_reason: str | int | None = None
        self._hide_token = False
        self._num_tokens = 0
        self._samples: list[Sample] = []
        self._text = ""

    def resume(self, emitted: EmittedChoice) -> bool:
        """Take the tokens that the client has from another replica; False when a choice that goes on cannot.

        Text and stop strings depend on the tokens alone, so what they come to is known already and not said again.
        """
        for token_id in emitted.token_ids:
            self.sequence.tokens.append(token_id)
            if not emitted.ended:
                self._check_token(token_id)
                self._make_text(token_id, hide=self._hide_token)
        if emitted.ended:
            self.sequence.state = SequenceState.FINISHED
        return emitted.ended or self.finish_reason is None

    def accept(self, samples: Iterable[Sample]) -> bool:
        """Take the tokens just appended to the sequence, up to one that ends the choice; False when one did."""
        for sample in samples:
            self._samples.append(sample)
            self._check_token(sample.token_id, ends_grammar=sample.ended)
            if self.sequence.sampling.stop:
                self._text += self._make_text(sample.token_id, hide=self._hide_token)
            if self.finish_reason is not None:
                return False
        return True

    def _check_token(self, token_id: int, *, ends_grammar: bool = False) -> None:
        sequence, sampling = self.sequence, self.sequence.sampling
        self._num_tokens += 1
        if self._num_tokens > sampling.min_tokens:
            if token_id in sampling.stop_token_ids:
                self._stop_reason = token_id
            if self._stop_reason is not None or token_id in sequence.eos_token_ids:
                self.finish_reason = "stop"
                self._hide_token = not sampling.include_stop_str_in_output
                return
        if ends_grammar:  # whatever min_tokens and ignore_eos say: nothing may follow
            self.finish_reason = "stop"
            is_end_token = token_id in self._tokenizer.eos_token_ids
            self._hide_token = is_end_token and not sampling.include_stop_str_in_output
        elif self._num_tokens >= sampling.max_tokens:
            self.finish_reason = "length"

    def _make_text(self, token_id: int, *, hide: bool) -> str:
        piece = "" if hide else self._stream.push(token_id)
        armed = self._num_tokens > self.sequence.sampling.min_tokens
        text, stop = self._stops.feed(piece, armed=armed)
        if stop is not None:
            self.finish_reason = "stop"
            self._stop_reason = stop
        elif self.finish_reason is not None:
            text += self._stops.flush()
        return text

    def take_delta(self) -> Delta:
        """The message for the samples accepted since the one before."""
        samples, text = self._samples, self._text
        assert samples, "a delta needs a sample; this is a bug"
        self._samples, self._text = [], ""
        if not self.sequence.sampling.stop:
            for sample in samples[:-1]:
                text += self._make_text(sample.token_id, hide=False)
            text += self._make_text(samples[-1].token_id, hide=self._hide_token)
        logprobs: tuple[ChosenLogprob, ...] = ()
        if self.sequence.sampling.logprobs is not None:
            logprobs = tuple(self._tokenizer.logprobs(sample) for sample in samples)
        return Delta(
            request_id=self.request.request_id,
            index=self.sequence.choice,
            text=text,
            token_ids=tuple(sample.token_id for sample in samples),
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )


class Request:
    """A request and its choices. ``events`` is bounded by what the request may generate.

    A request that comes from another replica begins with the tokens emitted there, and its ended choices stay ended.
    """

    def __init__(
        self,
        request: Generate,
        prompt_ids: list[int],
        sampling: SamplingParams,
        *,
        tokenizer: TextTokenizer,
        sequence_ids: Iterator[int],
        arrived_s: float,
    ) -> None:
        """``arrived_s`` and the deadline derived from it are in the engine's clock; raises RequestRefused."""
        assert sampling.seed is not None, "admission decides the seed; this is a bug"
        self.request_id = request.request_id
        self.seed = sampling.seed
        self.arrived_s = arrived_s
        self.deadline_s = arrived_s + request.deadline_s
        self.num_prompt_tokens = len(prompt_ids)
        syntax = tokenizer.template.call_syntax if request.tools is not None else None
        self.tool_format = syntax.format if syntax is not None else None
        self.num_completion_tokens = self.num_resumed_tokens = sum(
            len(choice.token_ids) for choice in request.emitted or ()
        )
        self.num_failed_steps = 0
        self.first_token_s: float | None = None
        self.started = False
        self.ended = False
        self.events: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self.choices: list[Choice] = []
        emitted = request.emitted or (EmittedChoice(),) * sampling.n
        self.num_open = sum(not choice.ended for choice in emitted)
        leader: Sequence | None = None
        eos_token_ids = () if sampling.ignore_eos else tokenizer.eos_token_ids
        for index in range(sampling.n):
            sequence = Sequence(
                sequence_id=next(sequence_ids),
                tokens=list(prompt_ids),
                num_prompt_tokens=len(prompt_ids),
                sampling=sampling,
                seed=sampling.seed,
                choice=index,
                eos_token_ids=eos_token_ids,
                request_id=self.request_id,
                adapter=request.adapter,
                leader=leader,
            )
            choice = Choice(self, sequence, tokenizer)
            if not choice.resume(emitted[index]):
                message = f"choice {index} ends with the tokens it is to go on from; it cannot be continued here"
                raise refuse(self.request_id, "invalid_request", message)
            self.choices.append(choice)
            if leader is None and not emitted[index].ended:
                leader = sequence

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache had when the first choice began."""
        return min(self.num_prompt_tokens, self.choices[0].sequence.num_cached or 0)

    def start(self) -> None:
        """Tell the client that the request runs."""
        self.started = True
        self.events.put_nowait(
            Started(
                request_id=self.request_id,
                num_prompt_tokens=self.num_prompt_tokens,
                num_cached_tokens=self.num_cached_tokens,
                seed=self.seed,
                tool_format=self.tool_format,
            )
        )

    def finish(self) -> None:
        """Tell the client that every choice has ended. The prompt counts once, however many choices shared it."""
        self.ended = True
        self.events.put_nowait(
            Finished(
                request_id=self.request_id,
                num_prompt_tokens=self.num_prompt_tokens,
                num_cached_tokens=self.num_cached_tokens,
                num_completion_tokens=self.num_completion_tokens,
            )
        )
