"""What may not be removed from a registry: the clusters that use it in, the versions that they serve out.

A version is named ``model@version`` by its name in the registry. Where a cluster runs and does not say what it
serves, that is an error: nothing is known to be free then.
"""

from collections.abc import Mapping
from typing import Any

from cluster.config.schema import ClusterConfig
from cluster.config.sources import RegistrySource
from cluster.control.dashboard import Dashboard
from cluster.control.provider import ray_of
from cluster.control.state import clusters_directory, read_state
from cluster.control.versions import without_awaited
from cluster.plan.serve_app import is_own
from cluster.registry.store import Registry


def served_by_config(config: ClusterConfig, registry: Registry) -> set[str]:
    """What the cluster of ``config`` serves now, and what its ``registry://`` sources name."""
    dashboard = ray_of(config).dashboard()
    references = set() if dashboard is None else references_of(dashboard.serve_details())
    config, _ = without_awaited(config, registry)
    sources = [model.source for model in config.models]
    sources += [adapter.source for model in config.models for adapter in model.adapters]
    for source in sources:
        if isinstance(source, RegistrySource):
            references.add(registry.resolve(f"{source.model}@{source.reference}").reference)
    return references


def served_on_this_machine(storage: str) -> set[str]:
    """What every local cluster that runs on this machine with ``storage`` serves now."""
    references: set[str] = set()
    for path in clusters_directory(storage).glob("*/local.json"):
        state = read_state(path.parent)
        if state is not None and state.alive:
            references |= references_of(Dashboard(state.dashboard_url).serve_details())
    return references


def references_of(details: Mapping[str, Any]) -> set[str]:
    """The versions in Serve's details, by their names in the registry."""
    configs = [app.get("deployed_app_config") or {} for app in details["applications"].values()]
    models = [config["args"] for config in configs if is_own(config) and "model" in config["args"]]
    adapters = [adapter for args in models for adapter in args.get("adapters", ())]
    own = {f"{args.get('registry_name') or args['model']}@{args['version']}" for args in models}
    return own | {f"{adapter['model']}@{adapter['version']}" for adapter in adapters}
