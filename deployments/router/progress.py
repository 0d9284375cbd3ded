"""What one client has been sent: replicas' events in, the client's events out, and how another replica goes on."""

import time

import msgspec

from deployments.messages import ChatPrompt, Delta, EmittedChoice, Finished, Generate, Started


class StreamProgress:
    """One Generate on its way through one replica or several, one after the other.

    The unit of hand-over is what the client has: tokens per choice, and which choices have ended. Text held back by
    the lost replica, stop strings begun, penalties: all of it follows from the tokens.
    """

    def __init__(self, request: Generate) -> None:
        self._request = _at_one_time(request)
        self._started: Started | None = None
        self._token_ids: list[list[int]] = [[] for _ in range(request.sampling.n)]
        self._ended = [False] * request.sampling.n
        self._has_place = False

    @property
    def is_started(self) -> bool:
        """Whether the client was told of its prompt; from then on the request belongs to one model version."""
        return self._started is not None

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended, so that only Finished may be missing."""
        return all(self._ended)

    @property
    def num_tokens(self) -> int:
        """Tokens that the client has, of all choices."""
        return sum(len(token_ids) for token_ids in self._token_ids)

    def note_place(self) -> None:
        """A replica may have had the request in its queue: the next one is not to refuse it for want of room."""
        self._has_place = True

    def note(self, event: Started | Delta | Finished) -> Started | Delta | Finished | None:
        """Take an event; returns what the client is sent for it, None when it knows already."""
        match event:
            case Delta():
                self._token_ids[event.index].extend(event.token_ids)
                if event.finish_reason is not None:
                    self._ended[event.index] = True
            case Started():
                if self._started is not None:
                    return None
                self._started = event
            case Finished():
                return self.finish()
        return event

    def finish(self) -> Finished:
        """The end as an undisturbed replica would have told it: the first replica's prompt, everybody's tokens."""
        assert self._started is not None, "a replica finishes what it has started; this is a bug"
        return Finished(
            request_id=self._request.request_id,
            num_prompt_tokens=self._started.num_prompt_tokens,
            num_cached_tokens=self._started.num_cached_tokens,
            num_completion_tokens=self.num_tokens,
        )

    def request(self, deadline_s: float) -> Generate:
        """The request as the next replica must have it, with ``deadline_s`` left."""
        if self._started is None and not self._has_place:
            return msgspec.structs.replace(self._request, deadline_s=deadline_s)
        sampling = self._request.sampling
        if self._started is not None:
            sampling = msgspec.structs.replace(sampling, seed=self._started.seed)
        emitted = [
            EmittedChoice(tuple(token_ids), ended)
            for token_ids, ended in zip(self._token_ids, self._ended, strict=True)
        ]
        return msgspec.structs.replace(
            self._request, deadline_s=deadline_s, sampling=sampling, emitted=tuple(emitted)
        )


def _at_one_time(request: Generate) -> Generate:
    """The request with its moment, which is part of the prompt where a chat template tells the date."""
    if not isinstance(request.prompt, ChatPrompt) or request.prompt.asked_at is not None:
        return request
    return msgspec.structs.replace(request, prompt=msgspec.structs.replace(request.prompt, asked_at=time.time()))


class Losses:
    """Counts the replicas that were lost under one request: one that kills them must not go on for ever.

    Without a token in between, the request itself is the likely cause; with tokens, only a crowd of losses is.
    """

    MAX_IN_A_ROW = 3
    MAX = 12

    def __init__(self) -> None:
        self._num = 0
        self._num_in_a_row = 0
        self._num_tokens = 0

    def count(self, num_tokens: int) -> str | None:
        """One more replica was lost when the client had ``num_tokens``; returns why to give up, None to go on."""
        self._num += 1
        self._num_in_a_row = self._num_in_a_row + 1 if num_tokens == self._num_tokens else 1
        self._num_tokens = num_tokens
        if self._num_in_a_row >= self.MAX_IN_A_ROW:
            return f"{self._num_in_a_row} replicas in a row were lost over this request, without a token in between"
        if self._num >= self.MAX:
            return f"{self._num} replicas were lost over this request"
        return None
