"""Rules between keys: a config, perhaps with wrong parts missing, becomes a finding for every rule that is broken.

A rule is a generator over the config, or over one model in it. Reading a part that was wrong raises NotParsed, which
ends that rule only: what it found before stays, and every other rule still runs.
"""

from collections.abc import Callable, Iterator

from cluster.config.base import NotParsed
from cluster.config.findings import Finding, Location
from cluster.config.job_relations import JOB_RULES
from cluster.config.model_relations import MODEL_RULES
from cluster.config.nodes import LocalProvider, NodeGroup
from cluster.config.schema import ClusterConfig
from cluster.config.train_relations import TRAIN_RULES
from cluster.units import exact_bytes

UNIX_SOCKET_BYTES = 107
"""Longest path of a unix socket on Linux."""
RAY_SOCKET_SUFFIX = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray appends to its temporary directory for its longest socket name."""
MAX_TEMP_DIR_BYTES = UNIX_SOCKET_BYTES - len(RAY_SOCKET_SUFFIX)


def check_relations(config: ClusterConfig) -> list[Finding]:
    """All broken rules between keys of ``config``."""
    findings: list[Finding] = []
    for rule in CONFIG_RULES:
        findings += _all_found(rule(config))
    for key, rules in (("models", MODEL_RULES), ("jobs", (*JOB_RULES, *TRAIN_RULES))):
        for index in range(_num_entries(config, key)):
            for entry_rule in rules:
                findings += _all_found(entry_rule(config, index))
    return findings


def _all_found(rule: Iterator[Finding]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(rule)
    except NotParsed:
        return found
    return found


def _num_entries(config: ClusterConfig, key: str) -> int:
    try:
        return len(getattr(config, key))
    except NotParsed:
        return 0


def _repeated(names: list[str | None], at: Location, what: str) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if name is None:
            continue
        if name in first:
            message = f"is the name of another {what} too, {at[-1]}[{first[name]}]"
            yield Finding(
                at=(*at, index, "name"), message=message, limit="each name once", remedy="rename one of them"
            )
        first.setdefault(name, index)


def _name_of(entry: object) -> str | None:
    try:
        name: str = entry.name  # type: ignore[attr-defined]
    except (NotParsed, AttributeError):
        return None  # the name, or all of the entry, was wrong
    return name


def _model_names_differ(config: ClusterConfig) -> Iterator[Finding]:
    yield from _repeated([_name_of(model) for model in config.models], ("models",), "model")
    taken = {_name_of(model): f"model, models[{index}]" for index, model in enumerate(config.models)}
    for index in range(len(config.models)):
        yield from _all_found(_adapter_names_differ(config, index, taken))


def _adapter_names_differ(config: ClusterConfig, index: int, taken: dict[str | None, str]) -> Iterator[Finding]:
    """``taken`` is what has each name so far; grows by these."""
    for number, adapter in enumerate(config.models[index].adapters):
        name = _name_of(adapter)
        if name is not None and name in taken:
            yield Finding(
                at=("models", index, "adapters", number, "name"),
                message=f"is the name of another {taken[name]}",
                limit="each name once, of models and adapters",
                remedy="rename one of them",
            )
        taken.setdefault(name, f"adapter, models[{index}].adapters[{number}]")


def _job_names_differ(config: ClusterConfig) -> Iterator[Finding]:
    yield from _repeated([_name_of(job) for job in config.jobs], ("jobs",), "job")


def _there_is_something_to_do(config: ClusterConfig) -> Iterator[Finding]:
    if not config.models and not config.jobs:
        remedy = "begin each entry of models with `- `, and write its name and source; or write jobs"
        yield Finding(at=("models",), message="has no entries", limit="one model or job at least", remedy=remedy)


def _node_names_differ(config: ClusterConfig) -> Iterator[Finding]:
    yield from _repeated([_name_of(group) for group in config.cluster.nodes], ("cluster", "nodes"), "group of nodes")


def _node_range(group: NodeGroup, at: Location) -> Iterator[Finding]:
    if group.min > group.max:
        yield Finding(
            at=(*at, "min"),
            message="is more than max",
            value=str(group.min),
            limit=f"at most max, which is {group.max}",
            remedy=f"set min to {group.max} or less, or max to {group.min} or more",
        )


def _node_ranges(config: ClusterConfig) -> Iterator[Finding]:
    for index, group in enumerate(config.cluster.nodes):
        yield from _all_found(_node_range(group, ("cluster", "nodes", index)))


def _local_is_one_machine(config: ClusterConfig) -> Iterator[Finding]:
    if not isinstance(config.cluster.provider, LocalProvider):
        return
    limit = "one group with one machine, with provider kind local"
    remedy = "describe this machine only, or attach to a cluster with `kind: existing`"
    for index in range(1, len(config.cluster.nodes)):
        yield Finding(
            at=("cluster", "nodes", index), message="is a second group of nodes", limit=limit, remedy=remedy
        )
    group = config.cluster.nodes[0]
    if group.max > 1:
        message = "asks for more machines than this one"
        yield Finding(at=("cluster", "nodes", 0, "max"), message=message, limit=limit, remedy=remedy)
    if group.min < 1:
        message = "would start no machine"
        yield Finding(at=("cluster", "nodes", 0, "min"), message=message, limit=limit, remedy="set min to 1")


def _ports_differ(config: ClusterConfig) -> Iterator[Finding]:
    provider = config.cluster.provider
    if not isinstance(provider, LocalProvider):
        return
    at_provider: Location = ("cluster", "provider")
    readers: tuple[tuple[Location, Callable[[], int]], ...] = (
        ((*at_provider, "ray_port"), lambda: provider.ray_port),
        ((*at_provider, "dashboard_port"), lambda: provider.dashboard_port),
        (("gateway", "http", "port"), lambda: config.gateway.http.port),
    )
    taken: dict[int, Location] = {}
    for at, read in readers:
        try:
            port = read()
        except NotParsed:
            continue
        if port in taken:
            other = ".".join(str(part) for part in taken[port])
            message = f"is also the port of {other}"
            yield Finding(
                at=at, message=message, value=str(port), limit="each port once", remedy="choose another port"
            )
        taken.setdefault(port, at)


def _temp_dir_fits(config: ClusterConfig) -> Iterator[Finding]:
    """Ray's sockets lie under its temporary directory, and the path of a socket is short."""
    provider = config.cluster.provider
    if not isinstance(provider, LocalProvider):
        return
    written = provider.temp_dir is not None
    directory = provider.temp_dir_of("" if written else config.name)
    if len(directory.encode()) > MAX_TEMP_DIR_BYTES:
        num_bytes = len(directory.encode())
        yield Finding(
            at=("cluster", "provider", "temp_dir") if written else ("name",),
            message=f"makes the paths of Ray's sockets too long ({directory} has {num_bytes} bytes)",
            limit=f"{MAX_TEMP_DIR_BYTES} bytes, because a socket's path has at most {UNIX_SOCKET_BYTES}",
            remedy="set cluster.provider.temp_dir to a short path, such as /tmp/manta",
        )


def _object_store_fits(config: ClusterConfig) -> Iterator[Finding]:
    provider = config.cluster.provider
    if not isinstance(provider, LocalProvider):
        return
    memory = config.cluster.nodes[0].resources.memory
    if memory is not None and provider.object_store > memory:
        yield Finding(
            at=("cluster", "provider", "object_store"),
            message="is more than the memory of the node",
            value=exact_bytes(provider.object_store),
            limit=f"at most nodes[0].resources.memory, which is {exact_bytes(memory)}",
            remedy="make it smaller; 200MiB is enough for serving",
        )


def _local_counts_whole(config: ClusterConfig) -> Iterator[Finding]:
    """`ray start` takes whole numbers of both."""
    if not isinstance(config.cluster.provider, LocalProvider):
        return
    resources = config.cluster.nodes[0].resources
    for name in ("CPU", "GPU"):
        amount: float = getattr(resources, name)
        if amount % 1:
            yield Finding(
                at=("cluster", "nodes", 0, "resources", name),
                message="is not a whole number",
                limit="a whole number, with provider kind local",
                remedy=f"write {max(1, int(amount))}",
            )


def _gateway_fits(config: ClusterConfig) -> Iterator[Finding]:
    largest = max(group.resources.CPU for group in config.cluster.nodes)
    if config.gateway.cpus > largest:
        yield Finding(
            at=("gateway", "cpus"),
            message="is more than the cores of any node",
            value=f"{config.gateway.cpus:g}",
            limit=f"at most {largest:g}, the largest CPU under cluster.nodes",
            remedy=f"set it to {largest:g} or less; it is a reservation, not a bound",
        )


CONFIG_RULES: tuple[Callable[[ClusterConfig], Iterator[Finding]], ...] = (
    _model_names_differ,
    _job_names_differ,
    _there_is_something_to_do,
    _node_names_differ,
    _node_ranges,
    _local_is_one_machine,
    _ports_differ,
    _temp_dir_fits,
    _object_store_fits,
    _local_counts_whole,
    _gateway_fits,
)
