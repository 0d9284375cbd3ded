"""The Plan: a validated config and what the registry knows of its models in, everything that should run out.

Pure: the same config, versions and code digest give the same Plan, byte for byte.
"""

from collections.abc import Mapping, Sequence

from cluster.config.models import AUTO_SPECULATIVE_TOKENS, Engine, MantaEngine, ModelConfig
from cluster.config.nodes import TRAIN_SLOT, NodeGroup, UriCode
from cluster.config.schema import ClusterConfig
from cluster.errors import PlanError
from cluster.plan.adapters import adapter_args, adapter_plans, known_adapters, with_adapters
from cluster.plan.capacity import (
    can_surge,
    check_capacity,
    check_one_replica,
    job_fits,
    maximum_fits,
    one_replica_fits,
    show_all,
)
from cluster.plan.memory import VLLM_BYTES, StepShape, activation_bytes, kv_bytes, weight_bytes
from cluster.plan.partition import Range, cut_layers, explicit
from cluster.plan.routing import gateway_settings, routing_table
from cluster.plan.types import (
    GatewayAppArgs,
    Kernels,
    KnownVersion,
    ModelApp,
    ModelFacts,
    ModelPlan,
    NodePlan,
    Plan,
    ReplicaRange,
    ReplicaSettings,
    StagePlan,
    VllmArgs,
)
from cluster.units import format_bytes


def build_plan(config: ClusterConfig, versions: Mapping[str, KnownVersion], code_digest: str) -> Plan:
    """The plan of ``config``. ``versions`` maps model names to imported versions; the others are planned later.

    Raises PlanError when the config asks for what a model or the nodes cannot give.
    """
    nodes = tuple(_node_plan(group) for group in config.cluster.nodes)
    gateway = GatewayAppArgs(
        http_host=config.gateway.http.host,
        http_port=config.gateway.http.port,
        num_replicas=config.gateway.replicas,
        cpus=config.gateway.cpus,
        drain_timeout_s=config.gateway.drain_timeout,
        code_digest=code_digest,
        cluster=config.name,
    )
    models = tuple(_model_plan(model, versions, config, nodes, code_digest) for model in config.models)
    apps = [model.args for model in models if model.args is not None]
    check_capacity(apps, gateway, nodes)
    surge = can_surge(apps, gateway, nodes)
    return Plan(
        name=config.name,
        storage=config.storage_root,
        provider=config.cluster.provider.kind,
        runtime_env={"working_dir": config.cluster.code.uri} if isinstance(config.cluster.code, UriCode) else {},
        nodes=nodes,
        models=models,
        gateway=gateway,
        routing=routing_table(gateway_settings(config.gateway.limits), models),
        surge=surge,
        notes=(*_notes(apps, gateway, nodes, surge), *_job_notes(config, apps, gateway, nodes)),
    )


def _node_plan(group: NodeGroup) -> NodePlan:
    resources = {"CPU": group.resources.CPU, "GPU": group.resources.GPU, **group.resources.custom}
    if group.resources.memory is not None:
        resources["memory"] = float(group.resources.memory)
    present = {name: amount for name, amount in resources.items() if amount or name == "CPU"}
    return NodePlan(name=group.name, resources=present, min=group.min, max=group.max)


def _model_plan(
    model: ModelConfig,
    versions: Mapping[str, KnownVersion],
    config: ClusterConfig,
    nodes: Sequence[NodePlan],
    code_digest: str,
) -> ModelPlan:
    version, args = versions.get(model.name), None
    adapters: tuple[KnownVersion, ...] = ()
    if version is not None:
        adapters = known_adapters(model, version, versions)
        counted = version.model_copy(update={"facts": with_adapters(model, version.facts, adapters)})
        args = _app_args(model, counted, config.storage_root, nodes, code_digest)
        args = args.model_copy(update={"adapters": adapter_args(model, adapters)})
    return ModelPlan(
        name=model.name,
        source=str(model.source),
        task=model.task,
        created=None if version is None else version.created,
        chats=model.task == "generate" and (version is None or version.chat_template),
        args=args,
        adapters=adapter_plans(model, adapters) if args is not None else (),
    )


def _app_args(
    model: ModelConfig, version: KnownVersion, storage: str, nodes: Sequence[NodePlan], code_digest: str
) -> ModelApp:
    _check_version(model, version)
    path = f"models.{model.name}.pipeline"
    if model.pipeline.split is not None:
        return _with_stages(
            model, version, storage, nodes, code_digest, explicit(model.pipeline.split, version.facts, path=path)
        )
    if model.pipeline.stages != "auto":
        ranges = cut_layers(version.facts, model.pipeline.stages, path=path)
        return _with_stages(model, version, storage, nodes, code_digest, ranges)
    most = version.facts.num_layers if _auto_can_split(model, nodes) else 1
    for num_stages in range(1, most + 1):
        ranges = cut_layers(version.facts, num_stages, path=path)
        args = _with_stages(model, version, storage, nodes, code_digest, ranges)
        if most == 1 or one_replica_fits(args, nodes):
            return args
    try:
        check_one_replica(args, nodes)
    except PlanError as error:
        raise PlanError(
            f"{path}.stages: auto tried 1 to {most} stages and none fits; with {most}, {error}"
        ) from error
    return args


def _auto_can_split(model: ModelConfig, nodes: Sequence[NodePlan]) -> bool:
    """More stages help only where memory is what is short, and that is known where nodes declare it."""
    can = model.task == "generate" and model.engine.kind == "manta"
    return can and _reserves_memory(model, nodes)


def _reserves_memory(model: ModelConfig, nodes: Sequence[NodePlan]) -> bool:
    """Nodes declare the memory of the host; weights and KV cache of a stage on a GPU are not in it."""
    on_host = model.device == "cpu"
    return on_host and model.resources.reserve_memory and all("memory" in node.resources for node in nodes)


def _check_version(model: ModelConfig, version: KnownVersion) -> None:
    path, facts = f"models.{model.name}", version.facts
    if version.quantization is not None:
        raise PlanError(
            f"{path}.source: the weights of {version.name}@{version.version} are stored quantized "
            f"({version.quantization}, by its config.json), and only plain weights can be served; use the checkpoint "
            "it was made from, and set quantization: int8 or int4 to quantize it as it is loaded"
        )
    if version.adapter is not None and model.engine.kind == "vllm":
        raise PlanError(
            f"{path}.engine: vllm, but {version.name}@{version.version} is an adapter of {version.adapter.of}, which "
            "only Manta's own engine merges; set engine to {kind: manta}, or publish it merged"
        )
    if model.context_tokens > facts.max_context_tokens:
        raise PlanError(
            f"{path}.context_tokens: {model.context_tokens} tokens, but {facts.architecture} was trained for "
            f"{facts.max_context_tokens}; set context_tokens to {facts.max_context_tokens} or less"
        )
    if model.task != facts.task:
        raise PlanError(
            f"{path}.task: {model.task}, but the registry's version is for {facts.task}; set task: {facts.task}"
        )


def _with_stages(
    model: ModelConfig,
    version: KnownVersion,
    storage: str,
    nodes: Sequence[NodePlan],
    code_digest: str,
    ranges: tuple[Range, ...],
) -> ModelApp:
    num_blocks = model.num_kv_blocks if model.task == "generate" else 0
    threads = model.pipeline.threads
    return ModelApp(
        app=f"{model.name}-{version.version}",
        model=model.name,
        version=version.version,
        storage=storage,
        task=model.task,
        dtype=model.dtype,
        quantization=model.quantization,
        kernels=model.kernels,
        device=model.device,
        context_tokens=model.context_tokens,
        tool_parser=model.tool_parser,
        block_tokens=model.kv_cache.block_tokens,
        num_blocks=num_blocks,
        prefix_caching=model.kv_cache.prefix_caching,
        max_running=model.batching.max_running,
        max_step_tokens=model.batching.max_step_tokens,
        max_waiting=model.batching.max_waiting,
        speculative_tokens=_speculative_tokens(model),
        steps_ahead=model.batching.steps_ahead,
        threads_per_stage=_auto_threads(model, nodes, len(ranges)) if threads == "auto" else threads,
        replica_cpus=model.resources.replica_cpus,
        stage_cpus=model.resources.stage_cpus,
        stage_gpus=model.resources.stage_gpus,
        stage_memory=_reserves_memory(model, nodes),
        placement_strategy=model.pipeline.placement,
        stages=tuple(_stage(index, layers, version.facts, model) for index, layers in enumerate(ranges)),
        replicas=ReplicaRange(
            min=model.replicas.min,
            max=model.replicas.max,
            upscale_delay_s=model.replicas.upscale_delay,
            downscale_delay_s=model.replicas.downscale_delay,
        ),
        settings=ReplicaSettings(
            target_waiting_tokens=model.replicas.target_waiting_tokens,
            request_timeout_s=model.timeouts.request,
            step_timeout_s=model.timeouts.step,
            drain_timeout_s=model.timeouts.drain or model.timeouts.request,
        ),
        code_digest=code_digest,
        registry_name=None if version.name == model.name else version.name,
        vllm=_vllm_args(model.engine),
    )


def _vllm_args(engine: Engine) -> VllmArgs | None:
    if isinstance(engine, MantaEngine):
        return None
    return VllmArgs(python=engine.python, compile=engine.compile)


def _auto_threads(model: ModelConfig, nodes: Sequence[NodePlan], num_stages: int) -> int:
    """The cores of the smallest node that can hold a stage, shared by the stages on one node; at least one."""
    roomy = [node for node in nodes if node.resources["CPU"] >= max(1.0, model.resources.stage_cpus)] or nodes
    num_nodes = sum(node.max for node in roomy)
    apart = model.pipeline.placement in ("SPREAD", "STRICT_SPREAD")
    stages_on_a_node = -(-num_stages // num_nodes) if apart else num_stages
    cores = min(node.resources["CPU"] for node in roomy)
    return max(1, int(cores // stages_on_a_node))


def _stage(index: int, layers: Range, facts: ModelFacts, model: ModelConfig) -> StagePlan:
    shape = StepShape(
        dtype=model.dtype,
        quantization=model.quantization,
        kernels=_kernels_possible(model),
        max_step_tokens=model.batching.max_step_tokens,
        max_running=model.batching.max_running,
        speculative_tokens=_speculative_tokens(model),
        num_blocks=model.num_kv_blocks,
        block_tokens=model.kv_cache.block_tokens,
    )
    start, stop = layers
    last = stop == facts.num_layers
    engine_bytes = 0 if isinstance(model.engine, MantaEngine) else VLLM_BYTES
    return StagePlan(
        index=index,
        layer_start=start,
        layer_stop=stop,
        has_embedding=start == 0,
        has_head=last,
        weight_bytes=weight_bytes(
            facts,
            start=start,
            stop=stop,
            dtype=model.dtype,
            quantization=model.quantization,
            kernels=model.kernels,
        ),
        kv_bytes=kv_bytes(facts, shape, stop - start),
        activation_bytes=activation_bytes(facts, shape, last=last) + engine_bytes,
    )


def _speculative_tokens(model: ModelConfig) -> int:
    if model.task != "generate" or model.engine.kind != "manta":
        return 0
    wanted = model.batching.speculative_tokens
    return AUTO_SPECULATIVE_TOKENS if wanted == "auto" else wanted


def _kernels_possible(model: ModelConfig) -> Kernels:
    """``kernels``, or torch where the config leaves no other."""
    native = model.task == "generate" and model.device == "cpu" and model.dtype == "bfloat16"
    return model.kernels if native else "torch"


def _job_notes(
    config: ClusterConfig, apps: Sequence[ModelApp], gateway: GatewayAppArgs, nodes: Sequence[NodePlan]
) -> tuple[str, ...]:
    notes = []
    for job in config.jobs:
        if job.kind != "train":
            continue
        needs = {"CPU": job.resources.cpus, "GPU": float(job.resources.gpus), TRAIN_SLOT: 1.0}
        asked = {name: amount for name, amount in needs.items() if amount}
        if not job_fits(job.name, [asked] * job.workers.min, apps, gateway, nodes):
            notes.append(
                f"{job.name}: its workers, at least {job.workers.min} with {show_all(asked)} each, do not fit beside "
                "the served models; the job waits until there is room"
            )
    return tuple(notes)


def _notes(
    apps: Sequence[ModelApp], gateway: GatewayAppArgs, nodes: Sequence[NodePlan], surge: bool
) -> tuple[str, ...]:
    notes = []
    if not surge:
        notes.append(
            "no room for the old and the new version of a model at once: an update stops the old version before "
            "the new one starts, and requests wait meanwhile"
        )
    notes.extend(
        f"{args.model}: replicas.max {args.replicas.max} does not fit the nodes beside the other models; "
        "replicas above what fits stay pending"
        for args in apps
        if args.replicas.max > args.replicas.min and not maximum_fits(args, apps, gateway, nodes)
    )
    notes.extend(
        f"{args.model}: quantization {args.quantization} with kernels torch changes answers, but saves neither "
        "memory nor time; kernels auto does where the processor allows"
        for args in apps
        if args.quantization is not None and args.kernels == "torch"
    )
    notes.extend(
        f"{args.model}: GPU memory is not checked; its largest stage needs about "
        f"{format_bytes(max(stage.memory_bytes for stage in args.stages))} of it"
        for args in apps
        if args.device == "cuda"
    )
    return tuple(notes)
