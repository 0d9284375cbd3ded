"""The nouns that cross a process border, and nothing else.

Two conversations use them, both over :mod:`deployments.channel`:

    gateway -> replica   Generate | Embed | Classify | Tokenize | Detokenize | Cancel
    replica -> gateway   Replies(Started, Delta*, Finished | Refused) | Embedded | Classified | Tokenized
                         | Detokenized | Refused; Load, unasked
    replica -> stage     CompactStep | EmbedInput
    stage   -> stage     Hidden (one tensor); from the last to the first: Chosen
    stage   -> replica   StepOutput | EmbedOutput | StageFailed

Every message is frozen, encodes to msgpack, and is checked field by field when decoded.
Token counts are in tokens, positions count from 0, ``request_id`` is unique in the cluster.
"""

from typing import Any, Literal

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that crosses a process border; the class name is the tag on the wire."""


# --- gateway and replica ---------------------------------------------------------------------------------------


class Grammar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the generated text must look like.

    ``text`` is a JSON schema, a regular expression that the whole text matches, or a grammar in llguidance's dialect
    of Lark. A ``lenient`` schema is enforced as far as it can be; otherwise a keyword that cannot be is refused.
    ``param`` is the field of the request that asked for it. ``end_token_ids`` end a text of this model; the replica
    fills them in on arrival.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    lenient: bool = False
    param: str = "response_format"
    end_token_ids: tuple[int, ...] = ()


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is chosen and when to stop. Validated by the gateway; neutral values are the defaults.

    ``top_k``, ``seed`` and ``logprobs`` are None when not asked for. ``logprobs`` is the number of alternatives
    wanted beside the chosen token (0: the chosen one alone). ``temperature`` 0 is greedy.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    grammar: Grammar | None = None


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """A prompt as text; the tokenizer's own special tokens are added when ``add_special_tokens``."""

    text: str
    add_special_tokens: bool = True


class TokenPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """A prompt as token ids, taken as it is."""

    token_ids: tuple[int, ...]


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """A conversation, rendered by the model's own chat template; OpenAI's message shape, content as text.

    ``tools`` are those that the template is to show, each as JSON text in OpenAI's shape. A template which tells the
    date sees the Unix time ``asked_at``, so that every replica renders the same; None is now.
    """

    messages: tuple[dict[str, Any], ...]
    add_generation_prompt: bool = True
    tools: tuple[str, ...] = ()
    asked_at: float | None = None


Prompt = TextPrompt | TokenPrompt | ChatPrompt

ToolFormat = Literal["hermes", "llama3_json", "mistral"]
"""How a model writes calls of tools: ``<tool_call>{...}</tool_call>``, bare ``{"name", "parameters"}``, or after
``[TOOL_CALLS]``."""


class ToolUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tools of a chat prompt may be called.

    With ``required`` the answer is a call, of ``name`` where that is given; ``parallel`` allows several. Arguments
    of the tools in ``strict`` always fit their schema.
    """

    required: bool = False
    name: str | None = None
    parallel: bool = True
    strict: tuple[str, ...] = ()


class EmittedChoice(msgspec.Struct, frozen=True, array_like=True):
    """What one choice has come to on another replica: its tokens so far, and whether it has ended with them."""

    token_ids: tuple[int, ...] = ()
    ended: bool = False


class Generate(Message, frozen=True, kw_only=True):
    """Continue one prompt, ``sampling.n`` times.

    ``max_tokens`` is None when the client named no limit: the replica then fills the context. It replaces
    ``sampling.max_tokens`` on arrival, because only the replica knows the prompt's length in tokens.
    ``deadline_s`` is the time left to the request when it was sent.

    ``emitted`` has one entry per choice when the request was begun on another replica, whose client has these tokens
    already; ``sampling.seed`` is then the seed that the other replica told in Started. The streams go on after them.
    Such a request had its place already, perhaps in a queue: it is not refused for want of room.

    ``tools`` says how those of a chat prompt may be called; None where they may not be. A ``sampling.grammar`` holds
    for answers that call none. ``adapter`` is the name of the one of the model's adapters that is asked, None for the
    model itself.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int | None
    deadline_s: float
    emitted: tuple[EmittedChoice, ...] | None = None
    tools: ToolUse | None = None
    adapter: str | None = None


class Embed(Message, frozen=True, kw_only=True):
    """One vector per input; an input is text or token ids."""

    request_id: str
    inputs: tuple[str | tuple[int, ...], ...]
    deadline_s: float


class Classify(Message, frozen=True, kw_only=True):
    """The probability of every label for each input; an input is text or token ids."""

    request_id: str
    inputs: tuple[str | tuple[int, ...], ...]
    deadline_s: float


class Tokenize(Message, frozen=True, kw_only=True):
    """Token ids of a prompt, without generating; ``adapter`` as in Generate."""

    request_id: str
    prompt: Prompt
    adapter: str | None = None


class Detokenize(Message, frozen=True, kw_only=True):
    """Text of token ids; ``adapter`` as in Generate."""

    request_id: str
    token_ids: tuple[int, ...]
    adapter: str | None = None


class Cancel(Message, frozen=True, kw_only=True):
    """The client is gone: free what the request holds. Unknown ids are ignored (it may just have finished)."""

    request_id: str


class Started(Message, frozen=True, kw_only=True):
    """The request was admitted; ``seed`` is the one in force, so that the request can be replayed elsewhere.

    ``tool_format`` is how this model writes calls, where the request allows them.
    """

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    seed: int
    tool_format: ToolFormat | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One candidate token: its text (as far as it is valid UTF-8), raw bytes, and natural log-probability."""

    token_id: int
    text: str
    raw: bytes
    logprob: float


class ChosenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A chosen token and its most likely alternatives, best first (the chosen one is among them if it ranks)."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


FinishReason = Literal["stop", "length"]


class Delta(Message, frozen=True, kw_only=True, omit_defaults=True):
    """More of choice ``index``: new tokens, and the text that is now certain (whole characters, no stop string).

    ``finish_reason`` is set in the last delta of a choice; ``stop_reason`` is the stop string or token id that hit.
    ``logprobs`` has one entry per token in ``token_ids`` when asked for, else it is empty.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[ChosenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class Finished(Message, frozen=True, kw_only=True):
    """Every choice has ended. Exactly one of Finished and Refused ends a Generate."""

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


class Embedded(Message, frozen=True, kw_only=True):
    """Vectors follow as one float32 buffer, shape [num_vectors, dimensions], in input order."""

    request_id: str
    num_vectors: int
    dimensions: int
    num_prompt_tokens: int


class Classified(Message, frozen=True, kw_only=True):
    """Probabilities follow as one float32 buffer, shape [num_inputs, len(labels)], in input order."""

    request_id: str
    labels: tuple[str, ...]
    num_inputs: int
    num_prompt_tokens: int


class Tokenized(Message, frozen=True, kw_only=True):
    """Token ids of a Tokenize, the text of each, and the model's context length."""

    request_id: str
    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    context_tokens: int


class Detokenized(Message, frozen=True, kw_only=True):
    """Text of a Detokenize."""

    request_id: str
    text: str


RefusalCode = Literal[
    "invalid_request",  # the client can mend it: 400
    "context_length_exceeded",  # prompt and limit do not fit the context: 400
    "model_not_found",  # nothing serves it any more: 404
    "unsupported",  # this model or version cannot do it: 400
    "overloaded",  # queue full: 429 and retry_after_s
    "deadline_exceeded",  # 408
    "draining",  # this replica is leaving: try another
    "internal",  # 500
]


class Refused(Message, frozen=True, kw_only=True):
    """The request will not be done, and why. ``param`` is the OpenAI field at fault, where there is one."""

    request_id: str
    code: RefusalCode
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class RequestRefused(Exception):
    """A request will not be done, or not be finished; ``refused`` says why. Crosses layers, never the wire."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused)
        self.refused = refused

    def __str__(self) -> str:
        """Code and message, for logs."""
        return f"{self.refused.code}: {self.refused.message}"


class Replies(Message, frozen=True, kw_only=True):
    """What the open requests of one connection have to say at one moment, often one delta each: one frame a step.

    The replies to one request are in their order, also over several messages.
    """

    replies: tuple[Started | Delta | Finished | Refused, ...]


def refuse(
    request_id: str, code: RefusalCode, message: str, *, param: str | None = None, retry_after_s: float | None = None
) -> RequestRefused:
    """The exception that refuses a request."""
    return RequestRefused(
        Refused(request_id=request_id, code=code, message=message, param=param, retry_after_s=retry_after_s)
    )


class Load(Message, frozen=True, kw_only=True):
    """Pushed by a replica to every connected gateway about once a second."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    kv_used_fraction: float
    draining: bool


class Opened(Message, frozen=True, kw_only=True):
    """First message on every connection: who is speaking, and in which role it wants to be heard."""

    role: Literal["gateway", "replica", "previous_stage"]


GatewayToReplica = Opened | Generate | Embed | Classify | Tokenize | Detokenize | Cancel
ReplicaToGateway = Replies | Embedded | Classified | Tokenized | Detokenized | Refused | Load


# --- replica and stages ----------------------------------------------------------------------------------------


class SequenceStart(msgspec.Struct, frozen=True, array_like=True):
    """What the sampling stage must know of a sequence before its first sample.

    ``token_ids`` are prompt and already emitted tokens; the first ``num_prompt_tokens`` are the prompt.
    Sent again when a sequence resumes after preemption or the loss of a stage. ``request_id`` is for the logs. Every
    stage must know the ``adapter`` that computes it, None for the model itself.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    choice: int
    eos_token_ids: tuple[int, ...]
    request_id: str = ""
    adapter: str | None = None


class SequenceStep(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step.

    Computes ``token_ids`` at positions ``position .. position + num_tokens``; keys and values of earlier
    positions are already in the cache. ``block_ids`` is the block table over all of them. ``sample`` asks for
    the token after the last one.

    ``chosen_in``: the one token to compute is what this pipeline chooses for the sequence in that earlier step, which
    the replica does not know yet; ``token_ids`` is then empty. Runners see it resolved. ``adapter`` is that of the
    sequence's start.

    The last ``num_drafts`` of ``token_ids`` are guesses: after the token before them, and after each of them that is
    what was chosen, a sample is wanted, up to the first that is not.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    position: int
    block_ids: tuple[int, ...]
    sample: bool
    chosen_in: int | None = None
    adapter: str | None = None
    num_drafts: int = 0

    @property
    def drafts(self) -> tuple[int, ...]:
        """The guesses."""
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def num_logits(self) -> int:
        """Positions after which a token may be chosen: the last ones."""
        return self.num_drafts + 1 if self.sample else 0

    @property
    def num_tokens(self) -> int:
        """Positions that this step computes."""
        return len(self.token_ids) if self.chosen_in is None else 1


class StepInput(msgspec.Struct, frozen=True, kw_only=True):
    """One micro-batch, for every stage in the same order. ``ended`` sequences are forgotten first.

    Travels as :class:`CompactStep`; see :mod:`deployments.stage.compact`.
    """

    step: int
    sequences: tuple[SequenceStep, ...]
    started: tuple[SequenceStart, ...] = ()
    ended: tuple[int, ...] = ()


class CompactPart(msgspec.Struct, frozen=True, array_like=True):
    """A SequenceStep as it travels: ``new_block_ids`` follow those that the stage has of the sequence already."""

    sequence_id: int
    token_ids: tuple[int, ...]
    position: int
    new_block_ids: tuple[int, ...]
    sample: bool
    chosen_in: int | None = None
    num_drafts: int = 0


class CompactStep(Message, frozen=True, kw_only=True):
    """A StepInput as it travels. ``follows``: it was planned while an earlier step was under way."""

    step: int
    parts: tuple[CompactPart, ...]
    started: tuple[SequenceStart, ...] = ()
    ended: tuple[int, ...] = ()
    follows: bool


class Chosen(Message, frozen=True, kw_only=True):
    """From the last stage to the first: what a step chose, as (sequence id, token id), for the steps behind it."""

    step: int
    tokens: tuple[tuple[int, int], ...]


class Hidden(Message, frozen=True, kw_only=True):
    """Activations of one step, one buffer in the model's dtype, shape [num_tokens, hidden_size]."""

    step: int
    num_tokens: int
    hidden_size: int
    dtype: str


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token of one sequence; logprob fields are empty unless asked for.

    ``ended``: the grammar is complete with this token. ``problem``: why the grammar cannot go on; the token is void.
    """

    sequence_id: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    ended: bool = False
    problem: str | None = None


class StageTiming(msgspec.Struct, frozen=True, array_like=True):
    """Where one stage's time went in one step, in seconds.

    ``wait_s`` is the time before the step in which the stage did not compute; ``bubble_s`` the part of it in which
    the pipeline had work under way. ``transfer_s``, the time until the result was handed to the socket, runs beside
    the next step's computing.
    """

    stage: int
    wait_s: float
    compute_s: float
    transfer_s: float
    bubble_s: float = 0.0


class StepOutput(Message, frozen=True, kw_only=True):
    """What the last stage made of a step, in the order of the sequences that asked for a sample.

    Of one with drafts there are several samples, one after the other: as many as drafts were right, and one more.
    """

    step: int
    samples: tuple[Sample, ...]
    timing: StageTiming


class EmbedInput(Message, frozen=True, kw_only=True):
    """One batch of a model of vectors (an embedding, or probabilities); an item is a tokenized input, whole."""

    step: int
    inputs: tuple[tuple[int, ...], ...]


class EmbedOutput(Message, frozen=True, kw_only=True):
    """Vectors follow as one float32 buffer, shape [num_vectors, dimensions]."""

    step: int
    num_vectors: int
    dimensions: int


class StageFailed(Message, frozen=True, kw_only=True):
    """A stage could not do a step: the error as it saw it. The stage is unusable afterwards.

    ``misheard``: what came from the stage before was damaged on its way, so the step is not to blame.
    """

    step: int
    message: str
    misheard: bool = False


class Alive(Message, frozen=True, kw_only=True):
    """A stage lives, whatever it computes; told about twice a second from another thread than the computing one."""


ReplicaToStage = Opened | CompactStep | EmbedInput
StageToStage = Opened | Hidden | Chosen
StageToReplica = StepOutput | EmbedOutput | StageFailed | Alive
AnyMessage = GatewayToReplica | ReplicaToGateway | ReplicaToStage | StageToStage | StageToReplica
