"""Requests that can never be served are refused here, before they cost anything; the rest leave with exact limits."""

import secrets

import msgspec

from deployments.messages import ChatPrompt, Generate, SamplingParams, refuse
from deployments.replica.text import TextTokenizer, prompt_param
from deployments.replica.tools import tool_grammar

_SEED_BITS = 63


def admit_sampling(
    request: Generate, num_prompt_tokens: int, *, context_tokens: int, vocab_size: int, num_token_ids: int
) -> SamplingParams:
    """The request's sampling parameters with ``max_tokens`` and ``seed`` decided; raises RequestRefused.

    A client may name ids below ``vocab_size``; the model may have emitted any below ``num_token_ids``.
    ``max_tokens`` None fills the context. A request without a seed gets one drawn here, so that it can be replayed.
    """
    _check_token_ids(request, vocab_size)
    max_tokens = _max_tokens(request, num_prompt_tokens, context_tokens)
    sampling = request.sampling
    if sampling.min_tokens > max_tokens:
        message = f"min_tokens is {sampling.min_tokens}, above max_tokens, which is {max_tokens}; lower it"
        raise refuse(request.request_id, "invalid_request", message, param="min_tokens")
    if sampling.n < 1:
        message = f"n is {sampling.n}; ask for at least 1 choice"
        raise refuse(request.request_id, "invalid_request", message, param="n")
    _check_emitted(request, max_tokens, num_token_ids)
    seed = secrets.randbits(_SEED_BITS) if sampling.seed is None else sampling.seed
    return msgspec.structs.replace(sampling, max_tokens=max_tokens, seed=seed)


def admit_tools(request: Generate, tokenizer: TextTokenizer) -> Generate:
    """The request with the grammar of its calls, and their markers left in its text; raises RequestRefused."""
    if request.tools is None:
        return request
    syntax = tokenizer.template.call_syntax
    if syntax is None or not isinstance(request.prompt, ChatPrompt):
        message = (
            "it cannot be told from this model's chat template how it writes calls; "
            "name the way under 'tool_parser' in the model's configuration, or leave out 'tools'"
        )
        raise refuse(request.request_id, "unsupported", message, param="tools")
    sampling = request.sampling
    hides_markers = any(tokenizer.is_special(marker) for marker in syntax.markers())
    sampling = msgspec.structs.replace(
        sampling,
        grammar=tool_grammar(syntax, request.prompt, request.tools, sampling.grammar),
        skip_special_tokens=sampling.skip_special_tokens and not hides_markers,
    )
    return msgspec.structs.replace(request, sampling=sampling)


def _max_tokens(request: Generate, num_prompt_tokens: int, context_tokens: int) -> int:
    if num_prompt_tokens >= context_tokens:
        message = (
            f"this model's context is {context_tokens} tokens, but the prompt alone has {num_prompt_tokens} "
            f"and at least one must be generated; shorten the prompt to {context_tokens - 1} tokens"
        )
        raise refuse(request.request_id, "context_length_exceeded", message, param=prompt_param(request.prompt))
    if request.max_tokens is None:
        return context_tokens - num_prompt_tokens
    if request.max_tokens < 1:
        message = f"max_tokens is {request.max_tokens}; it must be at least 1"
        raise refuse(request.request_id, "invalid_request", message, param="max_tokens")
    total = num_prompt_tokens + request.max_tokens
    if total > context_tokens:
        message = (
            f"this model's context is {context_tokens} tokens, but {total} were requested: {num_prompt_tokens} in "
            f"the prompt and {request.max_tokens} to generate; shorten the prompt or lower max_tokens to "
            f"{context_tokens - num_prompt_tokens}"
        )
        raise refuse(request.request_id, "context_length_exceeded", message, param=prompt_param(request.prompt))
    return request.max_tokens


def _check_emitted(request: Generate, max_tokens: int, num_token_ids: int) -> None:
    """What was emitted elsewhere must fit the request; a gateway that sends else has a bug."""
    if request.emitted is None:
        return
    problem = None
    if len(request.emitted) != request.sampling.n:
        problem = f"has {len(request.emitted)} choices, but n is {request.sampling.n}"
    elif request.sampling.seed is None and any(choice.token_ids for choice in request.emitted):
        problem = "comes without the seed in force"
    elif all(choice.ended for choice in request.emitted):
        problem = "leaves no choice to go on with"
    elif any(len(choice.token_ids) >= max_tokens for choice in request.emitted if not choice.ended):
        problem = f"has a choice of max_tokens = {max_tokens} tokens that has not ended"
    elif not all(0 <= token_id < num_token_ids for choice in request.emitted for token_id in choice.token_ids):
        problem = f"has a token id outside 0 to {num_token_ids - 1}"
    if problem is not None:
        raise refuse(request.request_id, "invalid_request", f"what was emitted elsewhere {problem}")


def _check_token_ids(request: Generate, vocab_size: int) -> None:
    sampling = request.sampling
    for param, token_ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                message = f"{param} names token id {token_id}; this model's ids are 0 to {vocab_size - 1}"
                raise refuse(request.request_id, "invalid_request", message, param=param)
