"""The Serve class around one complete copy of a model version: start, serve, report health, drain, stop."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

import ray
from numpy import float32
from numpy.typing import NDArray
from ray import serve

from cluster.control.code import check_code_digest
from cluster.plan.types import ModelAppArgs
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from deployments.channel import Channel, Listener
from deployments.messages import (
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Finished,
    Generate,
    Load,
    Refused,
    RequestRefused,
    SamplingParams,
    Started,
    TextPrompt,
    Tokenize,
    Tokenized,
)
from deployments.replica.embed import EmbedConfig, EmbedEngine
from deployments.replica.engine import Engine, EngineConfig
from deployments.replica.session import GatewaySession
from deployments.replica.telemetry import ReplicaTelemetry
from deployments.replica.text import TextTokenizer
from deployments.router.connection import ReplicaEndpoint
from deployments.stage.actor import StageDescription
from deployments.stage.group import StageGroup

logger = logging.getLogger("ray.serve")

_WARM_UP_TIMEOUT_S = 300.0


class Replica:
    """One replica. Serve creates it inside the placement group that the plan asked for; it holds no weights."""

    async def __init__(self, args: ModelAppArgs) -> None:
        begin = time.monotonic()
        check_code_digest(args.code_digest)
        self._args = args
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        registry = Registry(args.storage)
        directory = await asyncio.to_thread(materialize, registry, registry.get(args.model, args.version))
        self._tokenizer = await asyncio.to_thread(TextTokenizer.load, directory)
        group = ray.util.get_current_placement_group()
        if group is None:
            raise RuntimeError(f"{args.app}: a replica needs a placement group for its stages, but Serve made none")
        self._stages = await StageGroup.create(args, group, self._replica_id)
        self._engine = await self._start_engine()
        self._watching = asyncio.create_task(self._watch())
        await self._warm_up()
        self._listener = Listener(self._converse)
        await self._listener.start(ray.util.get_node_ip_address())
        logger.info("%s: replica %s is ready after %.1f s", args.app, self._replica_id, time.monotonic() - begin)

    async def _start_engine(self) -> Engine | EmbedEngine:
        args, link = self._args, await self._stages.connect()
        self._telemetry = ReplicaTelemetry(model=args.model, version=args.version)
        engine: Engine | EmbedEngine
        if args.task == "embed":
            embed_config = EmbedConfig(
                context_tokens=args.context_tokens,
                max_batch_tokens=args.max_step_tokens,
                max_batch_items=args.max_running,
                max_waiting=args.max_waiting,
            )
            engine = EmbedEngine(embed_config, self._tokenizer, link)
        else:
            config = EngineConfig(
                context_tokens=args.context_tokens,
                num_blocks=args.num_blocks,
                block_tokens=args.block_tokens,
                prefix_caching=args.prefix_caching,
                max_running=args.max_running,
                max_step_tokens=args.max_step_tokens,
                max_waiting=args.max_waiting,
            )
            engine = Engine(config, self._tokenizer, link, telemetry=self._telemetry)
        await engine.start()
        return engine

    async def _warm_up(self) -> None:
        """Ready means that a token, or a vector, has come out."""
        if isinstance(self._engine, EmbedEngine):
            await self._engine.embed(Embed(request_id="warm-up", inputs=("ready?",), deadline_s=_WARM_UP_TIMEOUT_S))
            return
        request = Generate(
            request_id="warm-up",
            prompt=TextPrompt(text="ready?"),
            sampling=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
            max_tokens=2,
            deadline_s=_WARM_UP_TIMEOUT_S,
        )
        async for _ in self._engine.submit(request):
            pass

    async def _converse(self, channel: Channel) -> None:
        await GatewaySession(channel, self).run()

    async def _watch(self) -> None:
        """Report what the engine does, once a second, for as long as it lives."""
        while True:
            self._telemetry.report(self._engine.load(), self._engine.stats())
            await asyncio.sleep(1.0)

    # --- what a gateway asks, through a session ---

    def generate(self, request: Generate) -> AsyncGenerator[Started | Delta | Finished]:
        """Events of one request."""
        if isinstance(self._engine, EmbedEngine):
            raise _wrong_task(request.request_id, self._args.model, "embeds; ask /v1/embeddings")
        return self._engine.submit(request)

    async def embed(self, request: Embed) -> tuple[Embedded, NDArray[float32]]:
        """One vector per input."""
        if isinstance(self._engine, Engine):
            raise _wrong_task(request.request_id, self._args.model, "generates; ask /v1/chat/completions")
        return await self._engine.embed(request)

    def tokenize(self, request: Tokenize) -> Tokenized:
        """Token ids of a prompt."""
        return self._tokenizer.tokenize(request, self._args.context_tokens)

    def detokenize(self, request: Detokenize) -> Detokenized:
        """Text of token ids."""
        return self._tokenizer.detokenize(request)

    def load(self) -> Load:
        """How busy the replica is."""
        return self._engine.load()

    # --- what Serve and Manta's control ask, through Ray ---

    async def endpoint(self) -> ReplicaEndpoint:
        """Where gateways connect."""
        return ReplicaEndpoint(
            replica_id=self._replica_id, address=self._listener.address, secret=self._listener.secret
        )

    async def describe(self) -> list[StageDescription]:
        """What the stages say of themselves."""
        return await self._stages.describe()

    async def check_health(self) -> None:
        """Raise when the engine can no longer produce tokens, so that Serve replaces this replica."""
        if self._engine.failed is not None:
            raise RuntimeError(self._engine.failed)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy sees of this replica."""
        load = self._engine.load()
        return {
            "waiting_tokens": float(load.num_waiting_tokens),
            "running": float(load.num_running),
            "kv_used_fraction": load.kv_used_fraction,
        }

    async def __del__(self) -> None:
        """Let the requests under way finish, then stop the stages. Serve calls this when the replica is to go."""
        if hasattr(self, "_engine"):
            await self._engine.drain(self._args.drain_timeout_s)
            self._watching.cancel()
            await self._engine.stop()
        if hasattr(self, "_listener"):
            await self._listener.stop()
        if hasattr(self, "_stages"):
            self._stages.kill()


def _wrong_task(request_id: str, model: str, what: str) -> RequestRefused:
    return RequestRefused(Refused(request_id=request_id, code="unsupported", message=f"model {model!r} {what}"))


def autoscaling(args: ModelAppArgs) -> dict[str, Any]:
    """Serve's autoscaling options: between the bounds, on waiting tokens."""
    return {
        "min_replicas": args.replicas.min,
        "max_replicas": args.replicas.max,
        "initial_replicas": max(1, args.replicas.min),
        "metrics_interval_s": 1.0,
        "look_back_period_s": 2.0,
        "upscale_delay_s": args.replicas.upscale_delay_s,
        "downscale_delay_s": args.replicas.downscale_delay_s,
        "policy": {
            "policy_function": "deployments.replica.autoscale:WaitingTokensPolicy",
            "policy_kwargs": {"target_waiting_tokens": args.replicas.target_waiting_tokens},
        },
    }
