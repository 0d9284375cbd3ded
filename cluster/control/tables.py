"""Plans and states for people: what the control path knows in, text that fits 80 columns out."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cluster.control.observe import ClusterStatus, ReplicaStatus, VersionStatus
from cluster.control.quality import FormatQuality
from cluster.plan.diff import Action
from cluster.plan.types import ModelAppArgs, ModelPlan, NodePlan, Plan, StagePlan
from cluster.units import format_bytes


def plan_view(plan: Plan, actions: Iterable[Action]) -> RenderableType:
    """The plan: nodes, models with their stages, notes, and the actions that would be taken."""
    parts: list[RenderableType] = [Text(f"Cluster {plan.name}", style="bold")]
    parts.extend(Text(f"  {_node_line(node)}") for node in plan.nodes)
    gateway = plan.gateway
    parts.append(Text(f"  HTTP at {gateway.http_host}:{gateway.http_port}, {gateway.num_replicas} gateway"))
    for model in plan.models:
        parts.extend(["", *_model_parts(model)])
    parts.extend(["", Text("Actions", style="bold")])
    parts.extend(Text(f"  {number}. {action.sentence}") for number, action in enumerate(actions, 1))
    if plan.notes:
        parts.extend(["", Text("Notes", style="bold"), *(Text(f"  {note}") for note in plan.notes)])
    return Group(*parts)


def _node_line(node: NodePlan) -> str:
    amounts = ", ".join(
        f"{format_bytes(amount) if name == 'memory' else f'{amount:g}'} {name}"
        for name, amount in node.resources.items()
    )
    count = str(node.max) if node.min == node.max else f"{node.min} to {node.max}"
    return f"{count} x {node.name}: {amounts}"


def _model_parts(model: ModelPlan) -> list[RenderableType]:
    heading = Text.assemble((model.name, "bold"), f"  {model.task}  from {model.source}")
    if model.args is None:
        return [heading, Text("  Version, stages and memory are known after import.")]
    args = model.args
    weights = f", weights {args.quantization}" if args.quantization is not None else ""
    weights += ", computed by vLLM" if args.vllm is not None else ""
    line = (
        f"  {args.app}: {args.dtype}{weights} on {args.device}, {args.replicas.min} to {args.replicas.max} replicas, "
        f"context {args.context_tokens}, {args.placement_strategy}"
    )
    beside = [Text(f"  and its adapter {adapter.name} from {adapter.source}") for adapter in model.adapters]
    return [heading, Text(line), *beside, _stage_table(args)]


def _stage_table(args: ModelAppArgs) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("stage", justify="right")
    table.add_column("layers")
    for name in ("weights", "KV cache", "work", "memory", "CPU", "GPU"):
        table.add_column(name, justify="right")
    for stage in args.stages:
        cpus = args.stage_cpus + (args.replica_cpus if stage.index == 0 else 0)
        sizes = (stage.weight_bytes, stage.kv_bytes, stage.activation_bytes, stage.memory_bytes)
        numbers = (f"{cpus:.4g}", f"{args.stage_gpus:g}")
        table.add_row(str(stage.index), _layers(stage), *(format_bytes(size) for size in sizes), *numbers)
    return table


def _layers(stage: StagePlan) -> str:
    before = "embed " if stage.has_embedding else ""
    after = " head" if stage.has_head else ""
    return f"{before}{stage.layer_start}-{stage.layer_stop - 1}{after}"


def status_view(status: ClusterStatus) -> RenderableType:
    """What runs: one line per version and replica, one row per stage."""
    if status.ray == "stopped":
        return Text(f"Cluster {status.name} does not run. Start it with `manta up`.")
    parts: list[RenderableType] = [
        Text.assemble((f"Cluster {status.name}", "bold"), f"  dashboard {status.dashboard}")
    ]
    if status.gateway is not None:
        parts.append(Text(f"  gateway {status.url}/v1  {_version_line(status.gateway)}"))
    if not status.models:
        parts.append(Text("  No models are deployed."))
    for model in status.models:
        parts.append(Text(""))
        for version in model.versions:
            parts.append(
                Text.assemble((model.name, "bold"), f" {version.version}  {model.task}  {_version_line(version)}")
            )
            if version.status != "RUNNING" and version.message:
                parts.append(Text(f"  {version.message.splitlines()[-1]}", style="red"))
            if version.replicas:
                parts.append(_replica_table(version.replicas))
    return Group(*parts)


def quality_view(qualities: Sequence[FormatQuality], in_force: str) -> RenderableType:
    """One row per format; the one that the config asks for is marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("format")
    for name in ("perplexity", "ratio", "same token", "weights"):
        table.add_column(name, justify="right")
    table.add_column("kernels")
    for each in qualities:
        mark = " *" if each.format == in_force else ""
        numbers = (f"{each.perplexity:.3f}", f"{each.ratio:.4f}", f"{each.same_choice:.1%}")
        table.add_row(f"{each.format}{mark}", *numbers, format_bytes(each.weight_bytes), each.kernels)
    return Group(
        table,
        Text(f"Over {qualities[0].num_tokens} tokens; lower perplexity is better. * what the config asks for."),
        Text(f"same token: the most likely next token is that of {qualities[0].format}."),
    )


def _version_line(version: VersionStatus) -> str:
    running = sum(replica.state == "RUNNING" for replica in version.replicas)
    return f"{version.status.lower().replace('_', ' ')}, {running} of {version.target_replicas} replicas run"


def _replica_table(replicas: Iterable[ReplicaStatus]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("replica", "stage", "layers", "node", "pid", "resident", "state"):
        table.add_column(name, justify="right" if name in ("pid", "resident") else "left")
    for replica in replicas:
        table.add_row(
            escape(replica.id),
            "",
            "",
            replica.node,
            _number(replica.pid),
            _size(replica.resident_bytes),
            replica.state,
        )
        for stage in replica.stages:
            layers = f"{stage.layers[0]}-{stage.layers[1] - 1}"
            memory = _size(stage.resident_bytes)
            table.add_row("", str(stage.index), layers, stage.node, _number(stage.pid), memory, stage.state)
    return table


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)
