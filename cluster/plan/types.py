"""The plan: what should run where. Frozen, JSON both ways, and all that replicas and jobs ever see of the config."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from cluster.config.models import Dtype as Dtype
from cluster.config.models import Kernels as Kernels
from cluster.config.models import Quantization as Quantization
from cluster.config.models import StepsAhead as StepsAhead
from cluster.config.models import Task as Task
from cluster.config.models import ToolParser as ToolParser


class PlanModel(BaseModel):
    """Base of every plan type: frozen, unknown keys refused, docstrings under fields are their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelFacts(PlanModel):
    """What planning must know of a model version; read from its ``config.json`` and safetensors headers."""

    architecture: str
    """transformers class name, e.g. ``LlamaForCausalLM``."""
    model_type: str
    """transformers model type, e.g. ``llama``."""
    task: Task
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    """Positions the model was trained for."""
    num_kv_heads: int
    head_dim: int
    num_attention_heads: int
    intermediate_size: int
    embedding_params: int
    """Number of parameters of the input embedding."""
    layer_params: tuple[int, ...]
    """Number of parameters of each layer, in order."""
    head_params: int
    """Number of parameters of the output head; 0 when tied to the embedding."""
    tied_head: bool
    """The output head shares the embedding's tensor."""
    other_params: int
    """Everything else (final norm and the like)."""


class StagePlan(PlanModel):
    """One pipeline stage: a contiguous half-open range of layers and what it needs."""

    index: int
    layer_start: int
    layer_stop: int
    has_embedding: bool
    has_head: bool
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Weights, KV cache and activations together."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


class ReplicaRange(PlanModel):
    """Bounds of a deployment's replica count; changed in place."""

    min: int
    max: int
    upscale_delay_s: float
    downscale_delay_s: float


class ReplicaSettings(PlanModel):
    """``user_config`` of a model's replicas: replaced in place, no restart."""

    target_waiting_tokens: int
    """Waiting prompt tokens per replica above which a replica is added."""
    request_timeout_s: float
    """Longest life of a request in the replica."""
    step_timeout_s: float
    """A stage that has not answered a step after this long counts as dead."""
    drain_timeout_s: float
    """How long a stopping replica lets its requests finish."""


class VllmArgs(PlanModel):
    """How to run vLLM for a model."""

    python: str
    """Python of the environment that vLLM is in, on the node of the stage."""
    compile: bool


class AdapterArgs(PlanModel):
    """An adapter served beside its base."""

    name: str
    """Name that clients call it by."""
    model: str
    """Name in the registry."""
    version: str


class ModelAppArgs(PlanModel):
    """Arguments of ``deployments.app:build_model``: what a replica must know as it starts; a change restarts it."""

    app: str
    """Serve application name: ``<model>-<version>``."""
    model: str
    version: str
    storage: str
    """Root of storage; the registry lives under ``<storage>/registry``."""
    task: Task
    dtype: Dtype
    quantization: Quantization | None
    """Format of the matrices of the layers; None is ``dtype``, like everything else."""
    kernels: Kernels
    device: Literal["cpu", "cuda"]
    context_tokens: int
    tool_parser: ToolParser
    """How the model writes calls of tools."""
    block_tokens: int
    """Tokens in one KV block."""
    num_blocks: int
    """KV blocks per stage."""
    prefix_caching: bool
    max_running: int
    """Sequences that may be computed at the same time."""
    max_step_tokens: int
    """Token budget of one step (decode tokens and prefill chunks together)."""
    max_waiting: int
    """Requests that may wait; one more is refused with 429."""
    speculative_tokens: int
    """Guesses that may be computed along with a sequence's next token."""
    steps_ahead: StepsAhead
    """Steps in flight beyond one per stage."""
    threads_per_stage: int
    replica_cpus: float
    stage_cpus: float
    stage_gpus: float
    stage_memory: bool
    """Whether stages also reserve their ``memory_bytes`` as Ray's logical ``memory``."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
    stages: tuple[StagePlan, ...]
    code_digest: str
    """Digest of the three packages that made the plan; a replica running other code refuses to start."""
    registry_name: str | None = None
    """Name of the model in the registry where it differs from ``model`` (a ``registry://`` source)."""
    vllm: VllmArgs | None = None
    """Run by vLLM instead of Manta's own engine; then in one stage."""
    adapters: tuple[AdapterArgs, ...] = ()
    """Adapters that the replicas serve beside the model."""


class ModelApp(ModelAppArgs):
    """One model version's Serve application: its arguments, and what changes in place."""

    replicas: ReplicaRange
    settings: ReplicaSettings

    @property
    def constructor_args(self) -> dict[str, object]:
        """The JSON of the :class:`ModelAppArgs` in it."""
        return self.model_dump(mode="json", include=set(ModelAppArgs.model_fields))


class RouteTarget(PlanModel):
    """One application that serves a model name, and its share of the traffic."""

    app: str
    version: str
    weight: float = 1.0


class Route(PlanModel):
    """One served model name."""

    model: str
    task: Task
    context_tokens: int
    created: int
    """Unix time the served version was published, seconds."""
    targets: tuple[RouteTarget, ...]
    parent: str | None = None
    """The model whose replicas serve this one, which is an adapter of it; None for a model of its own."""
    min_replicas: int = 1
    """0 where no replica is no fault: the next request starts one."""

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that replicas are to be asked for; None for the model itself."""
        return self.model if self.parent is not None else None


class GatewaySettings(PlanModel):
    """Limits of the gateway; changing one is an in-place update."""

    max_body_bytes: int
    max_streams: int
    """Requests in flight per gateway replica; one more is refused with 429."""
    request_timeout_s: float
    max_choices: int
    """Largest ``n``."""
    max_stop_strings: int
    max_logprobs: int
    """Largest number of alternatives in ``logprobs``/``top_logprobs``."""


class RoutingTable(PlanModel):
    """``user_config`` of the gateway: replaced in place, no restart."""

    settings: GatewaySettings
    routes: tuple[Route, ...]


class GatewayAppArgs(PlanModel):
    """Arguments of ``deployments.app:build_gateway``."""

    http_host: str
    http_port: int
    num_replicas: int
    cpus: float
    drain_timeout_s: float
    """How long a gateway process that is replaced or stopped lets its requests finish."""
    code_digest: str
    cluster: str = ""
    """Name of the cluster that the gateway, and so everything of Manta's beside it, belongs to."""


class AdapterFacts(PlanModel):
    """What planning must know of a version that is an adapter."""

    of: str
    """``model@version`` that it adapts."""
    kind: Literal["lora", "dora"]
    num_params: int


class KnownVersion(PlanModel):
    """A registry version the plan may use: what the registry knows of it."""

    name: str
    """Name in the registry."""
    version: str
    created: int
    """Unix time it was published, seconds."""
    facts: ModelFacts
    quantization: str | None = None
    """Method by which the stored weights are quantized; None for plain ones."""
    adapter: AdapterFacts | None = None
    """Where it is an adapter; ``facts`` are then those of its base."""
    chat_template: bool = True
    """Whether its files say how a conversation is written as text."""


class NodePlan(PlanModel):
    """A group of equal nodes: what each offers, and how many there may be."""

    name: str
    resources: dict[str, float]
    """Ray resource names (``CPU``, ``GPU``, ``memory`` in bytes, custom ones) to amounts, per node."""
    min: int
    max: int


class AdapterPlan(PlanModel):
    """One adapter of the YAML."""

    name: str
    source: str
    """Canonical source URI."""
    created: int
    """Unix time its version was published, seconds."""


class ModelPlan(PlanModel):
    """One model of the YAML. ``args`` is None while its source is not imported: its size is known after import."""

    name: str
    source: str
    """Canonical source URI."""
    task: Task
    created: int | None
    chats: bool
    """Takes conversations: writes text and has a chat template; taken for granted before the import."""
    args: ModelApp | None
    adapters: tuple[AdapterPlan, ...] = ()


class Plan(PlanModel):
    """All that ``manta up`` makes true."""

    name: str
    storage: str
    provider: Literal["local", "existing"]
    """Whether Manta starts and stops the Ray cluster itself."""
    runtime_env: dict[str, str]
    """Serve ``runtime_env`` of every application; empty when the code is installed on the nodes."""
    nodes: tuple[NodePlan, ...]
    models: tuple[ModelPlan, ...]
    gateway: GatewayAppArgs
    routing: RoutingTable
    """The table once every model runs; models that are not imported yet are not in it."""
    surge: bool
    """A new version starts before the old one stops; without room for both, the old one stops first."""
    notes: tuple[str, ...]
    """What a person should know although nothing is wrong."""

    @property
    def missing(self) -> tuple[ModelPlan, ...]:
        """Models whose source must be imported before they can be planned."""
        return tuple(model for model in self.models if model.args is None)
