"""vLLM as the one stage of a pipeline: steps that start and end sequences come in, what it sampled goes out.

Runs in an environment of vLLM's own, see :mod:`deployments.stage.vllm_process`; nothing else imports it. vLLM decides
by itself what a step computes: it batches, chunks prompts, keeps and shares its cache. A step of the replica is one
step of its engine.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from vllm import EngineArgs
from vllm import SamplingParams as VllmSampling
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from deployments.messages import Sample, SequenceStart, StepInput

# The replica knows of a sequence's end with its last sample, two steps later at the latest, and says so.
_MAX_IDLE_STEPS = 8


class VllmSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM is told; its defaults hold for everything else."""

    directory: str
    dtype: str
    context_tokens: int
    kv_bytes: int
    prefix_caching: bool
    max_running: int
    max_step_tokens: int
    compile: bool


class VllmRunner:
    """A :class:`deployments.stage.worker.StepRunner`. Not thread-safe."""

    hidden_size = 0
    dtype = torch.float32

    def __init__(self, settings: VllmSettings) -> None:
        """Load the model, compile it if asked to, and reserve the cache."""
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings.directory,
                skip_tokenizer_init=True,
                dtype=settings.dtype,
                max_model_len=settings.context_tokens,
                max_num_seqs=settings.max_running,
                max_num_batched_tokens=settings.max_step_tokens,
                enable_prefix_caching=settings.prefix_caching,
                kv_cache_memory_bytes=settings.kv_bytes,
                enforce_eager=not settings.compile,
                generation_config="vllm",
                disable_log_stats=True,
            )
        )
        self._running: dict[int, _Running] = {}
        self._sampled: deque[list[Sample]] = deque()

    def forget(self) -> None:
        """End every sequence."""
        self._end(tuple(self._running))
        self._sampled.clear()

    def run(self, step: StepInput, hidden: torch.Tensor | None) -> list[Sample]:  # noqa: ARG002 - the only stage
        """Let vLLM do one step; returns at most one sample of each sequence, and none of those that had ended.

        Raises RuntimeError when vLLM has ended a sequence that the replica goes on asking for.
        """
        self._end(step.ended)
        for start in step.started:
            self._start(start)
        if not self._sampled and self._running:
            self._sampled.extend(rounds(self._note_finished(self._engine.step()), self._num_top))
        samples = self._sampled.popleft() if self._sampled else []
        return [sample for sample in samples if sample.sequence_id in self._running]

    def _start(self, start: SequenceStart) -> None:
        prompt: Any = {"prompt_token_ids": list(start.token_ids)}
        name = self._engine.add_request(str(start.sequence_id), prompt, vllm_sampling(start))
        self._running[start.sequence_id] = _Running(name, start.sampling.logprobs or 0)

    def _end(self, sequence_ids: Iterable[int]) -> None:
        names = [self._running.pop(each).name for each in sequence_ids if each in self._running]
        if names:
            self._engine.abort_request(names, internal=True)

    def _num_top(self, sequence_id: int) -> int:
        running = self._running.get(sequence_id)
        return running.num_top if running is not None else 0

    def _note_finished(self, outputs: list[Any]) -> list[Any]:
        """Count the steps since vLLM ended a sequence; the replica, which knows its last token, ends it too."""
        for sequence_id, running in self._running.items():
            if running.num_idle_steps is not None:
                running.num_idle_steps += 1
                if running.num_idle_steps > _MAX_IDLE_STEPS:
                    raise RuntimeError(f"vLLM ended sequence {sequence_id}, but the replica waits for more of it")
        for output in outputs:
            if output.finished and int(output.request_id) in self._running:
                self._running[int(output.request_id)].num_idle_steps = 0
        return outputs


@dataclass(slots=True)
class _Running:
    name: str
    """vLLM's own name of the request."""
    num_top: int
    num_idle_steps: int | None = None
    """Steps since vLLM ended it; None while it goes on."""


def vllm_sampling(start: SequenceStart) -> VllmSampling:
    """What is left to generate of a sequence, in vLLM's words.

    A sequence that goes on after a loss is a new prompt to vLLM: penalties on what was generated begin anew, and so
    does a seeded draw, with a seed derived from the position so that it does not repeat itself.
    """
    sampling = start.sampling
    num_emitted = len(start.token_ids) - start.num_prompt_tokens
    return VllmSampling(
        max_tokens=sampling.max_tokens - num_emitted,
        min_tokens=max(0, sampling.min_tokens - num_emitted),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p,
        seed=None if sampling.temperature == 0 else _seed(start.seed, start.choice, num_emitted),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        stop_token_ids=[*start.eos_token_ids, *sampling.stop_token_ids],
        ignore_eos=True,  # the end tokens are among stop_token_ids, unless they are to be ignored
        logprobs=sampling.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _seed(seed: int, choice: int, num_emitted: int) -> int:
    digest = hashlib.blake2b(f"{seed} {choice} {num_emitted}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rounds(outputs: Iterable[Any], num_top: Callable[[int], int]) -> list[list[Sample]]:
    """Outputs of one of vLLM's steps, in the order to hand on: a sequence with several tokens is in several lists.

    ``num_top`` says how many alternatives a sequence asked for.
    """
    ordered: list[list[Sample]] = []
    for output in outputs:
        completion, sequence_id = output.outputs[0], int(output.request_id)
        for index, token_id in enumerate(completion.token_ids):
            if index == len(ordered):
                ordered.append([])
            logprobs = completion.logprobs[index] if completion.logprobs else None
            ordered[index].append(_sample(sequence_id, token_id, logprobs, num_top(sequence_id)))
    return ordered


def _sample(sequence_id: int, token_id: int, logprobs: Any, num_top: int) -> Sample:
    """``logprobs`` maps token ids to vLLM's Logprob: the best ``num_top``, and the chosen one wherever it ranks."""
    if logprobs is None:
        return Sample(sequence_id, token_id)
    ranked = sorted(logprobs.items(), key=lambda item: item[1].rank)
    top = tuple((each, found.logprob) for each, found in ranked if found.rank <= num_top)
    return Sample(sequence_id, token_id, logprobs[token_id].logprob, top)
