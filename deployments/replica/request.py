"""One request in the engine: samples enter, the messages its client sees leave, choice by choice."""

import asyncio
from collections.abc import Iterator

from deployments.messages import (
    ChosenLogprob,
    Delta,
    Finished,
    FinishReason,
    Generate,
    Refused,
    Sample,
    SamplingParams,
    Started,
)
from deployments.replica.sequence import Sequence
from deployments.replica.text import StopChecker, TextTokenizer

RequestEvent = Started | Delta | Finished | Refused


class Choice:
    """One choice of a request: decides when it ends and turns its tokens into text.

    A sample is taken in two halves, because the next step should be sent before text is made: :meth:`accept`
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
        self._sample: Sample | None = None
        self._text: str | None = None

    def accept(self, sample: Sample) -> bool:
        """Take the token just appended to the sequence; False when the choice has ended with it."""
        self._sample = sample
        self._check_token(sample.token_id)
        if self.sequence.sampling.stop:
            self._text = self._make_text(sample.token_id)
        return self.finish_reason is None

    def _check_token(self, token_id: int) -> None:
        sequence, sampling = self.sequence, self.sequence.sampling
        num_emitted = sequence.num_emitted
        if num_emitted > sampling.min_tokens:
            if token_id in sampling.stop_token_ids:
                self._stop_reason = token_id
            if self._stop_reason is not None or token_id in sequence.eos_token_ids:
                self.finish_reason = "stop"
                self._hide_token = not sampling.include_stop_str_in_output
                return
        if num_emitted >= sampling.max_tokens:
            self.finish_reason = "length"

    def _make_text(self, token_id: int) -> str:
        sequence = self.sequence
        piece = "" if self._hide_token else self._stream.push(token_id)
        armed = sequence.num_emitted > sequence.sampling.min_tokens
        text, stop = self._stops.feed(piece, armed=armed)
        if stop is not None:
            self.finish_reason = "stop"
            self._stop_reason = stop
        elif self.finish_reason is not None:
            text += self._stops.flush()
        return text

    def take_delta(self) -> Delta:
        """The message for the sample accepted last."""
        sample = self._sample
        assert sample is not None, "a delta needs a sample; this is a bug"
        text = self._make_text(sample.token_id) if self._text is None else self._text
        self._sample = self._text = None
        logprobs: tuple[ChosenLogprob, ...] = ()
        if self.sequence.sampling.logprobs is not None:
            logprobs = (self._tokenizer.logprobs(sample),)
        return Delta(
            request_id=self.request.request_id,
            index=self.sequence.choice,
            text=text,
            token_ids=(sample.token_id,),
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )


class Request:
    """A request and its choices. ``events`` is bounded by what the request may generate."""

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
        """``arrived_s`` and the deadline derived from it are in the engine's clock."""
        assert sampling.seed is not None, "admission decides the seed; this is a bug"
        self.request_id = request.request_id
        self.seed = sampling.seed
        self.arrived_s = arrived_s
        self.deadline_s = arrived_s + request.deadline_s
        self.num_prompt_tokens = len(prompt_ids)
        self.num_completion_tokens = 0
        self.num_failed_steps = 0
        self.first_token_s: float | None = None
        self.started = False
        self.ended = False
        self.events: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self.choices: list[Choice] = []
        self.num_open = sampling.n
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
                leader=self.choices[0].sequence if self.choices else None,
            )
            self.choices.append(Choice(self, sequence, tokenizer))

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache had when the first choice began."""
        return self.choices[0].sequence.num_cached or 0

    def start(self) -> None:
        """Tell the client that the request runs."""
        self.started = True
        self.events.put_nowait(
            Started(
                request_id=self.request_id,
                num_prompt_tokens=self.num_prompt_tokens,
                num_cached_tokens=self.num_cached_tokens,
                seed=self.seed,
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
