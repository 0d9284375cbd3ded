"""One complete copy of a model version: stages and tokenizer are brought up, then requests are answered.

Start, serve, drain, stop - in that order. Torch and transformers stay out of this process: stages hold the weights.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator
from typing import Self, TypeVar

import msgspec
import ray
from numpy import float32
from numpy.typing import NDArray
from ray.util.placement_group import PlacementGroup

from cluster.plan.types import ModelAppArgs, ReplicaSettings, Task
from deployments.channel import Channel, Listener
from deployments.messages import (
    Classified,
    Classify,
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Finished,
    Generate,
    Load,
    RequestRefused,
    SamplingParams,
    Started,
    TextPrompt,
    Tokenize,
    Tokenized,
    refuse,
)
from deployments.replica.drain import DrainWatch
from deployments.replica.embed import EmbedConfig, EmbedEngine
from deployments.replica.engine import Engine, EngineConfig
from deployments.replica.feed import Feed
from deployments.replica.session import GatewaySession
from deployments.replica.supervise import Supervisor
from deployments.replica.telemetry import ReplicaTelemetry
from deployments.replica.texts import ReplicaTexts, load_texts
from deployments.router.connection import ReplicaEndpoint
from deployments.stage.group import StageGroup
from deployments.stage.link import StageLink
from deployments.stage.nodes import DrainingNodes

logger = logging.getLogger(__name__)

Asked = TypeVar("Asked", Generate, Embed, Classify)

_WARM_UP_TIMEOUT_S = 300.0
_REPORT_S = 1.0

_WHAT_TASKS_DO: dict[Task, str] = {
    "generate": "writes text; ask /v1/chat/completions or /v1/completions",
    "embed": "embeds; ask /v1/embeddings",
    "classify": "classifies; ask /v1/classify",
}

# Where and how much at once, but not what: keys of ModelAppArgs that no token depends on.
_HARMLESS = (
    "storage",
    "num_blocks",
    "block_tokens",
    "prefix_caching",
    "max_running",
    "max_step_tokens",
    "max_waiting",
    "speculative_tokens",
    "steps_ahead",
    "replica_cpus",
    "stage_cpus",
    "stage_memory",
    "placement_strategy",
    "stages",
)


class ReplicaService:
    """Answers gateways over the Channel; made by :meth:`start`. Holds no weights."""

    def __init__(
        self,
        args: ModelAppArgs,
        replica_id: str,
        texts: ReplicaTexts,
        stages: StageGroup,
    ) -> None:
        self._args = args
        self._settings: ReplicaSettings | None = None
        self._replica_id = replica_id
        self._texts = texts
        self._stages = stages
        self._telemetry = ReplicaTelemetry(model=args.model, version=args.version)
        self._listener = Listener(self._converse)
        self._engine: Engine | EmbedEngine
        self._supervisor: Supervisor | None = None
        self._sessions: set[GatewaySession] = set()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, args: ModelAppArgs, replica_id: str, group: PlacementGroup) -> Self:
        """Bring up the stages in ``group`` and the tokenizer at the same time; ready when a token has come out.

        Raises what the registry, the runtime or a stage says is wrong; nothing is left running then.
        """
        stages = StageGroup(args, group, replica_id)
        try:
            link, texts = await asyncio.gather(stages.start(), asyncio.to_thread(load_texts, args))
            service = cls(args, replica_id, texts, stages)
            await service._start_engine(link)
            await service._listener.start(ray.util.get_node_ip_address())
        except BaseException:
            stages.kill()
            raise
        return service

    async def _start_engine(self, link: StageLink) -> None:
        args = self._args
        if args.task != "generate":
            self._engine = EmbedEngine(_embed_config(args), self._texts.tokenizer, link)
        else:
            self._engine = Engine(
                engine_config(args),
                self._texts.tokenizer,
                link,
                adapters=self._texts.adapters,
                planner=None if args.vllm is None else Feed(args.max_running),
                grammars=self._texts.grammars if args.vllm is None else None,
                telemetry=self._telemetry,
            )
        await self._engine.start()
        await self._warm_up()
        self._supervisor = Supervisor(self._engine, self._stages, link, self._telemetry)
        drains = DrainWatch(self._engine, self._stages, DrainingNodes().list)
        work = (self._supervise(self._supervisor), self._report(), drains.run())
        self._tasks = [asyncio.create_task(part) for part in work]

    async def _supervise(self, supervisor: Supervisor) -> None:
        """Keep the stages alive; when that is given up, hang up: gateways resume the streams elsewhere, and count."""
        await supervisor.run()
        await self._listener.stop()
        await self._engine.stop()

    async def _warm_up(self) -> None:
        """Raise what the stages say when the first token, or vector, does not come out."""
        first = asyncio.create_task(self._produce())
        failed = asyncio.create_task(self._engine.wait_failed())
        await asyncio.wait((first, failed), return_when=asyncio.FIRST_COMPLETED)
        try:
            if failed.done():
                raise RuntimeError(f"{self._args.app}: no first result came out: {failed.result()}")
            await first
        finally:
            for task in (first, failed):
                task.cancel()
            await asyncio.gather(first, failed, return_exceptions=True)

    async def _produce(self) -> None:
        if isinstance(self._engine, EmbedEngine):
            await self._engine.embed(Embed(request_id="warm-up", inputs=("ready?",), deadline_s=_WARM_UP_TIMEOUT_S))
            return
        for adapter in (None, *self._texts.adapters):
            request = Generate(
                request_id="warm-up",
                prompt=TextPrompt(text="ready?"),
                sampling=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
                max_tokens=2,
                deadline_s=_WARM_UP_TIMEOUT_S,
                adapter=adapter,
            )
            async for _ in self._engine.submit(request):
                pass

    async def _converse(self, channel: Channel) -> None:
        session = GatewaySession(channel, self)
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    async def _report(self) -> None:
        while True:
            self._telemetry.report(self._engine.load(), self._engine.stats())
            await asyncio.sleep(_REPORT_S)

    def generate(self, request: Generate) -> AsyncGenerator[Started | Delta | Finished]:
        """Events of one request; raises RequestRefused."""
        if isinstance(self._engine, EmbedEngine):
            raise self._wrong_task(request.request_id)
        return self._engine.submit(within(request, self._settings))

    async def embed(self, request: Embed) -> tuple[Embedded, NDArray[float32]]:
        """One vector per input; raises RequestRefused."""
        if self._args.task != "embed" or isinstance(self._engine, Engine):
            raise self._wrong_task(request.request_id)
        return await self._engine.embed(within(request, self._settings))

    async def classify(self, request: Classify) -> tuple[Classified, NDArray[float32]]:
        """The probability of every label for each input; raises RequestRefused.

        To the engine, a classifier is an embedding model whose vectors are probabilities.
        """
        if self._args.task != "classify" or isinstance(self._engine, Engine):
            raise self._wrong_task(request.request_id)
        asked = within(request, self._settings)
        embedded, probabilities = await self._engine.embed(
            Embed(request_id=asked.request_id, inputs=asked.inputs, deadline_s=asked.deadline_s)
        )
        classified = Classified(
            request_id=asked.request_id,
            labels=self._texts.labels,
            num_inputs=embedded.num_vectors,
            num_prompt_tokens=embedded.num_prompt_tokens,
        )
        return classified, probabilities

    def _wrong_task(self, request_id: str) -> RequestRefused:
        does = _WHAT_TASKS_DO[self._args.task]
        return refuse(request_id, "unsupported", f"model {self._args.model!r} {does}", param="model")

    def configure(self, settings: ReplicaSettings) -> None:
        """Take over new settings; requests under way keep the time they were given."""
        self._settings = settings
        self._stages.set_step_timeout(settings.step_timeout_s)

    def tokenize(self, request: Tokenize) -> Tokenized:
        """Token ids of a prompt; raises RequestRefused."""
        return self._texts.tokenizer_of(request).tokenize(request, self._args.context_tokens)

    def detokenize(self, request: Detokenize) -> Detokenized:
        """Text of token ids; raises RequestRefused."""
        return self._texts.tokenizer_of(request).detokenize(request)

    def load(self) -> Load:
        """How busy the replica is."""
        return self._engine.load()

    @property
    def endpoint(self) -> ReplicaEndpoint:
        """Where gateways connect."""
        return ReplicaEndpoint(
            replica_id=self._replica_id,
            address=self._listener.address,
            secret=self._listener.secret,
            produces=product_digest(self._args),
        )

    @property
    def failed(self) -> str | None:
        """Why nothing can be produced any more; None while it can, or while lost stages are being replaced."""
        return self._supervisor.given_up if self._supervisor is not None else None

    async def stop(self) -> None:
        """Hand the requests under way over, or let them finish within the drain timeout; then end the stages.

        Gateways are told at once. They move each stream to another replica if there is one; what nobody takes over
        is finished here.
        """
        begin = time.monotonic()
        self._engine.stop_admitting()
        for session in self._sessions:
            session.report_load()
        await self._engine.drain(self._settings.drain_timeout_s if self._settings is not None else 0.0)
        await asyncio.gather(*(session.finish() for session in tuple(self._sessions)))
        for task in self._tasks:
            task.cancel()
        await self._engine.stop()
        await self._texts.grammars.stop()
        await self._listener.stop()
        self._stages.kill()
        logger.info("%s: replica %s drained in %.1f s", self._args.app, self._replica_id, time.monotonic() - begin)


def within(request: Asked, settings: ReplicaSettings | None) -> Asked:
    """The request with no more time than the model's own limit leaves it."""
    if settings is None or request.deadline_s <= settings.request_timeout_s:
        return request
    return msgspec.structs.replace(request, deadline_s=settings.request_timeout_s)


def product_digest(args: ModelAppArgs) -> str:
    """Digest of all that may decide a token, so that a stream is never continued by something else.

    What is new in ``args`` counts until it is named here as harmless.
    """
    decisive = args.model_dump(mode="json", exclude=set(_HARMLESS))
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def engine_config(args: ModelAppArgs) -> EngineConfig:
    """The limits of a replica that generates, as planned."""
    return EngineConfig(
        context_tokens=args.context_tokens,
        num_blocks=args.num_blocks,
        block_tokens=args.block_tokens,
        prefix_caching=args.prefix_caching,
        max_running=args.max_running,
        max_step_tokens=args.max_step_tokens,
        max_waiting=args.max_waiting,
        speculative_tokens=args.speculative_tokens,
        steps_ahead=args.steps_ahead,
        on_stage_failure="hold",
    )


def _embed_config(args: ModelAppArgs) -> EmbedConfig:
    return EmbedConfig(
        context_tokens=args.context_tokens,
        max_batch_tokens=args.max_step_tokens,
        max_batch_items=args.max_running,
        max_waiting=args.max_waiting,
        on_stage_failure="hold",
    )
