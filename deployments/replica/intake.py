"""Where a request becomes work: a Generate enters, a Request with its sequences leaves, or a refusal.

Tokenizing a prompt and judging a grammar may take a while; a request that is here counts as waiting.
"""

from collections.abc import Mapping
from itertools import count

from msgspec.structs import replace

from deployments.messages import Detokenize, Generate, Tokenize, refuse
from deployments.replica.admission import admit_sampling, admit_tools
from deployments.replica.constraints import GrammarChecker
from deployments.replica.encode import PromptEncoder
from deployments.replica.request import Request
from deployments.replica.text import TextTokenizer


class Intake:
    """Prepares requests, several at a time."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        adapters: Mapping[str, TextTokenizer],
        context_tokens: int,
        grammars: GrammarChecker | None,
    ) -> None:
        """``adapters`` are their tokenizers. ``grammars`` judges those of requests; without it they are refused."""
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._context_tokens = context_tokens
        self._grammars = grammars
        tokenizers = {id(one): one for one in (tokenizer, *adapters.values())}
        self._encoders = {key: PromptEncoder(one, context_tokens) for key, one in tokenizers.items()}
        self._sequence_ids = count(1)
        self._num_sequences: dict[str, int] = {}

    @property
    def num_sequences(self) -> int:
        """Sequences of the requests that are being prepared."""
        return sum(self._num_sequences.values())

    def __contains__(self, request_id: str) -> bool:
        """Whether a request of this id is being prepared."""
        return request_id in self._num_sequences

    async def prepare(self, generate: Generate, arrived_s: float) -> Request:
        """The request, ready to be scheduled; raises RequestRefused."""
        request_id = generate.request_id
        tokenizer = tokenizer_of(generate, self._tokenizer, self._adapters)
        self._num_sequences[request_id] = max(1, generate.sampling.n)
        try:
            prompt_ids = await self._encoders[id(tokenizer)].encode(generate.prompt, request_id)
            generate = await self._check_grammar(admit_tools(generate, tokenizer), tokenizer)
        finally:
            del self._num_sequences[request_id]
        sampling = admit_sampling(
            generate,
            len(prompt_ids),
            context_tokens=self._context_tokens,
            vocab_size=tokenizer.vocab_size,
            num_token_ids=tokenizer.num_token_ids,
        )
        return Request(
            generate,
            prompt_ids,
            sampling,
            tokenizer=tokenizer,
            sequence_ids=self._sequence_ids,
            arrived_s=arrived_s,
        )

    async def _check_grammar(self, generate: Generate, tokenizer: TextTokenizer) -> Generate:
        """The request with its grammar ready for the stages; raises RequestRefused."""
        grammar = generate.sampling.grammar
        if grammar is None:
            return generate
        if self._grammars is None:
            message = "this server cannot constrain what is generated"
            raise refuse(generate.request_id, "unsupported", message, param=grammar.param)
        grammar = replace(grammar, end_token_ids=tokenizer.eos_token_ids)
        await self._grammars.check(grammar, generate.request_id)
        return replace(generate, sampling=replace(generate.sampling, grammar=grammar))

    def stop(self) -> None:
        """Drop what is queued."""
        for encoder in self._encoders.values():
            encoder.stop()


def tokenizer_of(
    request: Generate | Tokenize | Detokenize, own: TextTokenizer, adapters: Mapping[str, TextTokenizer]
) -> TextTokenizer:
    """The one for the request's adapter; RequestRefused where this replica does not serve it, or not any more."""
    if request.adapter is None:
        return own
    tokenizer = adapters.get(request.adapter)
    if tokenizer is None:
        message = f"The adapter {request.adapter!r} is not served by this replica; ask again in a moment."
        raise refuse(request.request_id, "model_not_found", message, param="model")
    return tokenizer
