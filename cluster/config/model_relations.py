"""Rules between the keys of one model, and between a model and the nodes: index of a model -> findings."""

from collections.abc import Callable, Iterator

from cluster.config.findings import Finding, Location
from cluster.config.schema import ClusterConfig

_TOLERANCE = 1e-6

ModelRule = Callable[[ClusterConfig, int], Iterator[Finding]]


def _at(index: int, *keys: str) -> Location:
    return ("models", index, *keys)


def _split_matches_stages(config: ClusterConfig, index: int) -> Iterator[Finding]:
    pipeline = config.models[index].pipeline
    if pipeline.split is None:
        return
    at, length = _at(index, "pipeline", "split"), len(pipeline.split)
    if pipeline.stages == "auto":
        message, limit = "needs a fixed number of stages", "stages: a number, when split is given"
        yield Finding(at=at, message=message, limit=limit, remedy=f"add `stages: {length}`, or remove split")
    elif length != pipeline.stages:
        yield Finding(
            at=at,
            message=f"has {length} {'entry' if length == 1 else 'entries'} for {pipeline.stages} stages",
            limit=f"one number of layers for each of the {pipeline.stages} stages",
            remedy=f"set stages to {length}, or write {pipeline.stages} numbers; or remove split to balance by cost",
        )


def _cache_holds_a_context(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    tokens = model.kv_cache.tokens
    if tokens != "auto" and tokens < model.context_tokens:
        yield Finding(
            at=_at(index, "kv_cache", "tokens"),
            message="cannot hold one full context",
            limit=f"at least context_tokens, which is {model.context_tokens}",
            remedy=f"set it to {model.context_tokens} or more, or to auto; or lower context_tokens to {tokens}",
        )


def _cache_is_whole_blocks(config: ClusterConfig, index: int) -> Iterator[Finding]:
    cache = config.models[index].kv_cache
    if cache.tokens != "auto" and cache.tokens % cache.block_tokens:
        above = -(-cache.tokens // cache.block_tokens) * cache.block_tokens
        yield Finding(
            at=_at(index, "kv_cache", "tokens"),
            message="is not a whole number of blocks",
            limit=f"a multiple of block_tokens, which is {cache.block_tokens}",
            remedy=f"write {above}",
        )


def _replica_range(config: ClusterConfig, index: int) -> Iterator[Finding]:
    replicas = config.models[index].replicas
    if replicas.min > replicas.max:
        yield Finding(
            at=_at(index, "replicas", "min"),
            message="is more than max",
            value=str(replicas.min),
            limit=f"at most max, which is {replicas.max}",
            remedy=f"set min to {replicas.max} or less, or max to {replicas.min} or more",
        )


def _only_generation_has_stages(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    stages = model.pipeline.stages
    if model.task != "generate" and stages != "auto" and stages > 1:
        yield Finding(
            at=_at(index, "pipeline", "stages"),
            message=f"is more than a model with task {model.task} can have",
            limit=f"1 with task {model.task}",
            remedy="set stages to 1, or add replicas to use more machines",
        )


def _step_holds_a_token_each(config: ClusterConfig, index: int) -> Iterator[Finding]:
    batching = config.models[index].batching
    if batching.max_step_tokens < batching.max_running:
        yield Finding(
            at=_at(index, "batching", "max_step_tokens"),
            message="is less than one token for each running request",
            value=str(batching.max_step_tokens),
            limit=f"at least max_running, which is {batching.max_running}",
            remedy=f"set it to {batching.max_running} or more, or lower max_running to {batching.max_step_tokens}",
        )


def _step_timeout_is_shorter(config: ClusterConfig, index: int) -> Iterator[Finding]:
    timeouts = config.models[index].timeouts
    if timeouts.step > timeouts.request:
        yield Finding(
            at=_at(index, "timeouts", "step"),
            message="is longer than a whole request may take",
            value=f"{timeouts.step:g}s",
            limit=f"at most timeouts.request, which is {timeouts.request:g}s",
            remedy=f"set it to {timeouts.request:g}s or less, or make request longer",
        )


def _digest_has_one_file(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    if model.sha256 is not None and model.source.kind in ("hf", "registry"):
        instead = {
            "hf": "remove it, and pin the source by a commit: hf://org/repo@COMMIT",
            "registry": "remove it; the registry verifies every file by itself",
        }
        yield Finding(
            at=_at(index, "sha256"),
            message=f"cannot be checked for a source with {model.source.kind}://, which is not one file",
            limit="sources with wheel:// or path://",
            remedy=instead[model.source.kind],
        )


def _quantization_is_possible(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    if model.quantization is None:
        return
    at, value = _at(index, "quantization"), model.quantization
    if model.task != "generate":
        yield Finding(
            at=at,
            message=f"is not possible for a model with task {model.task}",
            value=value,
            limit="models with task generate",
            remedy="remove quantization",
        )
    elif model.device != "cpu":
        yield Finding(
            at=at,
            message="has no kernels on a GPU",
            value=value,
            limit="device cpu",
            remedy="remove quantization, or set device to cpu",
        )
    elif model.dtype != "bfloat16":
        yield Finding(
            at=at,
            message=f"has no kernels that compute in {model.dtype}",
            value=value,
            limit="dtype bfloat16, in which everything but the quantized weights stays",
            remedy="remove quantization, or set dtype to bfloat16",
        )


def _native_kernels_are_possible(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    if model.kernels != "native":
        return
    reasons = {
        "task": (model.task, "generate"),
        "device": (model.device, "cpu"),
        "dtype": (model.dtype, "bfloat16"),
    }
    for key, (written, needed) in reasons.items():
        if written != needed:
            yield Finding(
                at=_at(index, "kernels"),
                message=f"do not exist for {key} {written}",
                value="native",
                limit="task generate, device cpu and dtype bfloat16",
                remedy=f"set kernels to auto, or {key} to {needed}",
            )
            return


def _vllm_is_possible(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    if model.engine.kind != "vllm":
        return
    pipeline, at = model.pipeline, _at(index, "engine", "kind")
    reasons = {
        "task": (model.task, model.task == "generate", "set task to generate, or remove engine"),
        "pipeline.stages": (pipeline.stages, pipeline.stages in ("auto", 1), "set pipeline.stages to 1"),
        "pipeline.split": (pipeline.split, pipeline.split is None, "remove pipeline.split"),
        "quantization": (model.quantization, model.quantization is None, "remove quantization"),
        "kernels": (model.kernels, model.kernels == "auto", "remove kernels"),
        "batching.speculative_tokens": (
            model.batching.speculative_tokens,
            model.batching.speculative_tokens in ("auto", 0),
            "remove batching.speculative_tokens",
        ),
        "batching.steps_ahead": (
            model.batching.steps_ahead,
            model.batching.steps_ahead == 0,
            "remove batching.steps_ahead",
        ),
    }
    for key, (written, fits, remedy) in reasons.items():
        if not fits:
            yield Finding(
                at=at,
                message=f"cannot be had with {key} {written}",
                value="vllm",
                limit="task generate in one stage, with weights and kernels as vLLM chooses them",
                remedy=f"{remedy}, or set engine to {{kind: manta}}",
            )
            return


def _adapters_are_possible(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    if not model.adapters:
        return
    reasons = {
        "task": (model.task, model.task == "generate", "set task to generate"),
        "engine.kind": (model.engine.kind, model.engine.kind == "manta", "set engine to {kind: manta}"),
    }
    for key, (written, fits, remedy) in reasons.items():
        if not fits:
            yield Finding(
                at=_at(index, "adapters"),
                message=f"cannot be had with {key} {written}",
                value=", ".join(adapter.name for adapter in model.adapters),
                limit="task generate and engine manta",
                remedy=f"{remedy}, or serve each adapter as a model of its own, merged: name and source as here",
            )
            return


def _adapters_are_versions(config: ClusterConfig, index: int) -> Iterator[Finding]:
    for number, adapter in enumerate(config.models[index].adapters):
        if adapter.source.kind != "registry":
            yield Finding(
                at=("models", index, "adapters", number, "source"),
                message=f"has {adapter.source.kind}://, which cannot hold an adapter",
                value=str(adapter.source),
                limit="registry://MODEL@ALIAS-OR-VERSION",
                remedy="train it with `adapter: {publish: adapter}`, which leaves a version",
            )


def _cuda_has_gpus(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    if model.device == "cuda" and model.resources.stage_gpus == 0:
        yield Finding(
            at=_at(index, "resources", "stage_gpus"),
            message="gives the stages no GPU, but device is cuda",
            value="0",
            limit="more than 0 with device cuda",
            remedy="set stage_gpus to 1, or to 0.5 when two stages share a GPU",
        )
    if model.device == "cpu" and model.resources.stage_gpus > 0:
        yield Finding(
            at=_at(index, "resources", "stage_gpus"),
            message="reserves a GPU that nothing uses, because device is cpu",
            limit="0 with device cpu",
            remedy="set device to cuda, or remove stage_gpus",
        )


def _gpu_share_is_whole(config: ClusterConfig, index: int) -> Iterator[Finding]:
    """Ray takes a share from one GPU and never from two, in units of 1/10000: only 1/k leaves nothing unusable."""
    share = config.models[index].resources.stage_gpus
    if share == 0 or config.models[index].device != "cuda":
        return
    fewer = min(10_000, int(1 / share + _TOLERANCE))
    allowed = [gpu_share(num_stages) for num_stages in (fewer, fewer + 1)]
    if share not in allowed:
        yield Finding(
            at=_at(index, "resources", "stage_gpus"),
            message="is not a share that stages can divide a GPU by",
            value=f"{share:g}",
            limit="1, or 1/k for k stages on one GPU: 0.5, 0.3333, 0.25, 0.2, ...; four decimals, rounded down",
            remedy=" or ".join(
                f"write {allowed_share:g} ({count} on a GPU)"
                for allowed_share, count in zip(allowed, (fewer, fewer + 1), strict=True)
                if allowed_share > 0
            ),
        )


def gpu_share(num_stages: int) -> float:
    """The largest share of a GPU that Ray can give to each of ``num_stages``; it counts in units of 1/10000."""
    return (10_000 // num_stages) / 10_000


def _some_node_has_gpus(config: ClusterConfig, index: int) -> Iterator[Finding]:
    if config.models[index].device != "cuda":
        return
    if all(group.resources.GPU == 0 for group in config.cluster.nodes):
        yield Finding(
            at=_at(index, "device"),
            message="needs a GPU, but no node has one",
            value="cuda",
            limit="cpu, when no node under cluster.nodes has GPU",
            remedy="add `GPU: 1` to the resources of the nodes that have one, or set device to cpu",
        )


def _cores_suffice(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    stage_cpus, at = model.resources.stage_cpus, _at(index, "resources", "stage_cpus")
    largest = max(group.resources.CPU for group in config.cluster.nodes)
    if stage_cpus > largest:
        yield Finding(
            at=at,
            message="is more than the cores of any node",
            value=f"{stage_cpus:g}",
            limit=f"at most {largest:g}, the largest CPU under cluster.nodes",
            remedy=f"set it to {largest:g} or less; it is a reservation, pipeline.threads sets the threads",
        )
        return
    offered = sum(group.resources.CPU * group.max for group in config.cluster.nodes)
    stages = 1 if model.pipeline.stages == "auto" else model.pipeline.stages
    copies = max(1, model.replicas.min)
    needed = copies * (stages * stage_cpus + model.resources.replica_cpus)
    if needed > offered:
        each = f"{stages} x {stage_cpus:g} + replica_cpus {model.resources.replica_cpus:g}"
        yield Finding(
            at=at,
            message=f"asks for {needed:g} cores in all ({copies} x ({each}))",
            value=f"{stage_cpus:g}",
            limit=f"{offered:g} cores, the CPU of all nodes at their max",
            remedy="lower stage_cpus, stages or replicas.min, or add nodes",
        )


def _stages_reserve_something(config: ClusterConfig, index: int) -> Iterator[Finding]:
    """Ray refuses a bundle of nothing; the replica's own cores are in the first stage's bundle."""
    resources, stages = config.models[index].resources, config.models[index].pipeline.stages
    memory = resources.reserve_memory and all(group.resources.memory for group in config.cluster.nodes)
    if resources.stage_cpus or resources.stage_gpus or memory or (stages == 1 and resources.replica_cpus):
        return
    yield Finding(
        at=_at(index, "resources", "stage_cpus"),
        message="leaves a stage that reserves nothing, which Ray cannot place",
        limit="more than 0, where stages reserve neither GPU nor memory",
        remedy="write a small amount such as 0.01; it is a reservation only",
    )


def _gpus_suffice(config: ClusterConfig, index: int) -> Iterator[Finding]:
    model = config.models[index]
    offered = sum(group.resources.GPU * group.max for group in config.cluster.nodes)
    if model.device != "cuda" or offered == 0:
        return
    stages = 1 if model.pipeline.stages == "auto" else model.pipeline.stages
    copies = max(1, model.replicas.min)
    needed = copies * stages * model.resources.stage_gpus
    if needed > offered:
        yield Finding(
            at=_at(index, "resources", "stage_gpus"),
            message=f"asks for {needed:g} GPUs in all ({copies} x {stages} x {model.resources.stage_gpus:g})",
            value=f"{model.resources.stage_gpus:g}",
            limit=f"{offered:g} GPUs, those of all nodes at their max",
            remedy="lower stage_gpus, stages or replicas.min, or add nodes",
        )


def _spread_has_nodes(config: ClusterConfig, index: int) -> Iterator[Finding]:
    pipeline = config.models[index].pipeline
    num_nodes = sum(group.max for group in config.cluster.nodes)
    if pipeline.placement == "STRICT_SPREAD" and pipeline.stages != "auto" and pipeline.stages > num_nodes:
        yield Finding(
            at=_at(index, "pipeline", "placement"),
            message=f"puts each of {pipeline.stages} stages on a node of its own",
            limit=f"{num_nodes} stages, the nodes at their max",
            remedy="write SPREAD, which shares nodes when it must, or lower stages",
        )


MODEL_RULES: tuple[ModelRule, ...] = (
    _split_matches_stages,
    _cache_holds_a_context,
    _cache_is_whole_blocks,
    _replica_range,
    _only_generation_has_stages,
    _step_holds_a_token_each,
    _step_timeout_is_shorter,
    _digest_has_one_file,
    _quantization_is_possible,
    _native_kernels_are_possible,
    _vllm_is_possible,
    _adapters_are_possible,
    _adapters_are_versions,
    _cuda_has_gpus,
    _gpu_share_is_whole,
    _some_node_has_gpus,
    _cores_suffice,
    _stages_reserve_something,
    _gpus_suffice,
    _spread_has_nodes,
)
