"""From what runs to what should run: a Plan and what was Observed in, ordered actions out, each with its sentence.

A new version is up before the routes move to it, and the old one goes after that::

    ImportModel -> StartCluster -> DeployApps (old + new) -> AwaitApps -> SwitchRoutes -> RemoveApps (old)

Where the plan has no room for both at once, the old one goes first. Where there is room for the new versions of some
models at once but not of all, they take turns.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from cluster.errors import PlanError
from cluster.plan.capacity import surge_batches
from cluster.plan.serve_app import (
    GATEWAY_APP,
    GATEWAY_DEPLOYMENT,
    IN_PLACE,
    ServeApp,
    ServeProxies,
    gateway_app,
    is_own,
    model_apps,
)
from cluster.plan.types import Plan, Route, RoutingTable

_COMPARED_KEYS = ("import_path", "route_prefix", "args", "runtime_env")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedApp:
    """One Serve application as it runs: Serve's status word, and the config it was deployed with."""

    name: str
    status: str
    config: ServeApp
    num_running_replicas: int = 0
    declarative: bool = True
    """Deployed over REST; Serve removes such an application when a later PUT does not name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What runs: whether Ray does, the proxies that Serve runs with if it does, and every application on it."""

    ray_running: bool
    proxies: ServeProxies | None = None
    apps: Mapping[str, ObservedApp] = field(default_factory=dict)

    @property
    def own(self) -> dict[str, ObservedApp]:
        """Applications that Manta deployed; all others are never touched."""
        return {name: app for name, app in self.apps.items() if is_own(app.config)}

    @property
    def owner(self) -> str | None:
        """Name of the cluster that the gateway here belongs to; None where none runs, or one that does not say."""
        gateway = self.own.get(GATEWAY_APP)
        return None if gateway is None else gateway.config["args"].get("cluster") or None

    def foreign_configs(self) -> list[ServeApp]:
        """Configs of other people's applications that every PUT must repeat, or Serve would remove them."""
        return [app.config for app in self.apps.values() if app.declarative and not is_own(app.config)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartCluster:
    """Start Ray on this machine."""

    sentence: str
    kind: Literal["start_cluster"] = "start_cluster"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportModel:
    """Bring a model's files into the registry."""

    model: str
    source: str
    sentence: str
    kind: Literal["import_model"] = "import_model"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployApps:
    """Deploy new and changed applications beside those that run."""

    apps: tuple[str, ...]
    sentence: str
    kind: Literal["deploy_apps"] = "deploy_apps"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeSettings:
    """Give running applications other bounds and timeouts; their replicas stay."""

    apps: tuple[str, ...]
    sentence: str
    kind: Literal["change_settings"] = "change_settings"


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaitApps:
    """Wait until applications run."""

    apps: tuple[str, ...]
    sentence: str
    kind: Literal["await_apps"] = "await_apps"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchRoutes:
    """Replace the gateway's routing table, in place."""

    sentence: str
    waiting: tuple[str, ...] = ()
    """Models whose turn comes later; their routes stay as they are."""
    kind: Literal["switch_routes"] = "switch_routes"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveApps:
    """Remove applications that nothing routes to any more."""

    apps: tuple[str, ...]
    sentence: str
    kind: Literal["remove_apps"] = "remove_apps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """Everything is as the config says."""

    sentence: str = "Nothing to do: everything is as the config says."
    kind: Literal["nothing"] = "nothing"


Action = StartCluster | ImportModel | DeployApps | ChangeSettings | AwaitApps | SwitchRoutes | RemoveApps | Nothing


def diff(plan: Plan, observed: Observed) -> tuple[Action, ...]:
    """Actions that turn ``observed`` into ``plan``, in order; ``(Nothing(),)`` when there are none.

    A plan with models that are not imported yet yields what comes before and the imports; their applications are
    planned after. Raises PlanError when what runs there belongs to a cluster of another name.
    """
    _check_owner(plan, observed)
    actions: list[Action] = []
    actions.extend(_import(model.name, model.source) for model in plan.missing)
    if not observed.ray_running:
        actions.append(StartCluster(sentence=f"Start Ray on this machine for cluster {plan.name}."))
    actions.extend(_app_actions(plan, observed))
    return tuple(actions) or (Nothing(),)


def _check_owner(plan: Plan, observed: Observed) -> None:
    if observed.owner not in (None, plan.name):
        raise PlanError(f"cluster {plan.name}: {belongs_to_another(observed.owner)}")


def belongs_to_another(owner: str | None) -> str:
    """Why nothing may be changed on a Ray that serves the cluster ``owner``, and what to do."""
    return (
        f"this Ray already serves cluster {owner}, and one Ray serves one cluster; use a Ray cluster of its own "
        f"(cluster.provider), or run `manta down` with the config of {owner} first"
    )


def _import(name: str, source: str) -> ImportModel:
    return ImportModel(model=name, source=source, sentence=f"Import {name} from {source}.")


def _app_actions(plan: Plan, observed: Observed) -> list[Action]:
    desired = {app["name"]: app for app in model_apps(plan)}
    _check_foreign(desired, observed)
    own = observed.own
    waiting_for_import = {model.name for model in plan.missing}
    stale = [
        name
        for name, app in own.items()
        if name not in desired and name != GATEWAY_APP and app.config["args"].get("model") not in waiting_for_import
    ]
    changed = [name for name, app in desired.items() if name not in own or differs(app, own[name].config)]
    if _gateway_differs(plan, own.get(GATEWAY_APP)):
        changed.append(GATEWAY_APP)
    stuck = [name for name in (*desired, GATEWAY_APP) if name in own and _is_stuck(own[name]) and name not in changed]
    gone = [*stuck, *([] if plan.surge else _in_the_way(stale, changed, own))]
    adjusted = {
        name: keys
        for name, app in desired.items()
        if name in own and name not in changed and (keys := changed_settings(app, own[name].config))
    }
    actions: list[Action] = []
    if gone:
        actions.append(RemoveApps(apps=tuple(gone), sentence=_removal_first(gone, stuck)))
    if adjusted:
        actions.append(ChangeSettings(apps=tuple(adjusted), sentence=_adjustment(adjusted)))
    unready = [name for name in own if own[name].status != "RUNNING"]
    turns = _turns(plan, [*changed, *stuck], own)
    table = routing_in_force(observed)
    for number, turn in enumerate(turns):
        later = {name for names in turns[number + 1 :] for name in names}
        waited = {*turn, *(() if number else (*adjusted, *unready))} - later
        wanted = routing_between(plan, observed, gone, _models_of(plan, later))
        actions.extend(_deploy(turn, own))
        actions.extend(_await([name for name in (*desired, GATEWAY_APP) if name in waited]))
        if desired and (table != wanted or _routes_without(gone, wanted) != wanted.routes):
            actions.append(SwitchRoutes(sentence=_switch(wanted), waiting=_models_of(plan, later)))
        going = [name for name in stale if name not in gone and not later & _successors(own[name], plan)]
        actions.extend(_remove(going))
        gone.extend(going)
        table = wanted
    return actions


def _turns(plan: Plan, to_deploy: Sequence[str], own: Mapping[str, ObservedApp]) -> list[tuple[str, ...]]:
    """Which applications are deployed together, in order: all of them, where all have room beside the old ones."""
    apps = [model.args for model in plan.models if model.args is not None]
    served_now = {app.config["args"].get("model") for app in own.values()}
    replacing = [app.app for app in apps if app.app in to_deploy and app.model in served_now]
    batches = surge_batches(replacing, apps, plan.gateway, plan.nodes) if plan.surge else []
    if len(batches) <= 1:
        return [tuple(to_deploy)]
    others = [name for name in to_deploy if name not in replacing]
    return [(*batches[0], *others), *map(tuple, batches[1:])]


def _deploy(names: Sequence[str], own: Mapping[str, ObservedApp]) -> list[Action]:
    return [DeployApps(apps=tuple(names), sentence=_deployment(names, own))] if names else []


def _await(names: Sequence[str]) -> list[Action]:
    return [AwaitApps(apps=tuple(names), sentence=f"Wait until {join(names)} {_run(names)}.")] if names else []


def _remove(names: Sequence[str]) -> list[Action]:
    sentence = f"Remove {join(names)}: nothing asks for it any more."
    return [RemoveApps(apps=tuple(names), sentence=sentence)] if names else []


def _models_of(plan: Plan, apps: Collection[str]) -> tuple[str, ...]:
    return tuple(model.name for model in plan.models if model.args is not None and model.args.app in apps)


def _successors(app: ObservedApp, plan: Plan) -> set[str]:
    """The planned application of the same model, if there is one."""
    name = app.config["args"].get("model")
    return {model.args.app for model in plan.models if model.args is not None and model.name == name}


def _check_foreign(desired: Mapping[str, ServeApp], observed: Observed) -> None:
    for name, app in observed.apps.items():
        if not is_own(app.config) and (name in desired or name == GATEWAY_APP):
            raise PlanError(
                f"the cluster already runs an application named {name} that Manta did not deploy "
                f"({app.config.get('import_path')}); remove it, or rename the model"
            )


def differs(wanted: ServeApp, deployed: ServeApp) -> bool:
    """Whether Serve must be told: anything but the routing table, which changes in place."""
    return any(wanted.get(key) != deployed.get(key) for key in _COMPARED_KEYS)


def _gateway_differs(plan: Plan, running: ObservedApp | None) -> bool:
    wanted = gateway_app(plan.gateway, plan.routing, plan.runtime_env)
    return running is None or differs(wanted, running.config)


def _is_stuck(app: ObservedApp) -> bool:
    return app.status == "DEPLOY_FAILED" and app.num_running_replicas == 0


def _in_the_way(stale: Sequence[str], changed: Sequence[str], own: Mapping[str, ObservedApp]) -> list[str]:
    """Applications that must go before the changed ones can start, when there is no room for both."""
    models = [name for name in changed if name != GATEWAY_APP]
    return [*stale, *(name for name in models if name in own)] if models else []


def changed_settings(wanted: ServeApp, deployed: ServeApp) -> tuple[str, ...]:
    """The keys of the YAML, under a model, whose values Serve has to be told although no replica restarts."""
    new, old = _options(wanted), _options(deployed)
    names = [key for key in new if new[key] != old.get(key)]
    return tuple(dict.fromkeys(IN_PLACE.get(name, name) for name in names))


def _options(app: ServeApp) -> dict[str, Any]:
    """The options of the one deployment of a model's application, without the sections they stand in."""
    options: dict[str, Any] = dict(next(iter(app.get("deployments", [])), {}))
    scaling, settings = options.pop("autoscaling_config", {}), options.pop("user_config", {})
    return {**options, **scaling, **settings}


def _routing_of(gateway: ObservedApp | None) -> dict[str, Any] | None:
    if gateway is None:
        return None
    for deployment in gateway.config.get("deployments", []):
        if deployment.get("name") == GATEWAY_DEPLOYMENT:
            in_force: dict[str, Any] | None = deployment.get("user_config")
            return in_force
    return None


def routing_in_force(observed: Observed) -> RoutingTable | None:
    """The gateway's table; None where there is none, or one that another release wrote."""
    try:
        return RoutingTable.model_validate(_routing_of(observed.own.get(GATEWAY_APP)))
    except ValidationError:
        return None


def routing_between(plan: Plan, observed: Observed, removed: Sequence[str], waiting: Collection[str]) -> RoutingTable:
    """The plan's table, but the routes in force for models that are ``waiting`` for their turn."""
    if not waiting:
        return plan.routing
    in_force = {route.model: route for route in routing_for_now(plan, observed, removed).routes}
    planned = {route.model: route for route in plan.routing.routes}
    routes = [in_force.get(name) if (route.parent or name) in waiting else route for name, route in planned.items()]
    return RoutingTable(settings=plan.routing.settings, routes=tuple(route for route in routes if route is not None))


def routing_for_now(plan: Plan, observed: Observed, removed: Sequence[str] = ()) -> RoutingTable:
    """The table to keep while applications start: the one in force, less the routes to ``removed`` applications.

    Limits are the plan's at once; a gateway that is new begins without routes.
    """
    in_force = _routing_of(observed.own.get(GATEWAY_APP)) or {}
    settings = plan.routing.settings  # those in force may be of another release, with other limits
    table = RoutingTable.model_validate({"settings": settings, "routes": in_force.get("routes", ())})
    return RoutingTable(settings=settings, routes=_routes_without(removed, table))


def _routes_without(removed: Sequence[str], table: RoutingTable) -> tuple[Route, ...]:
    return tuple(route for route in table.routes if not any(target.app in removed for target in route.targets))


def _removal_first(names: Sequence[str], stuck: Sequence[str]) -> str:
    if all(name in stuck for name in names):
        return f"Remove {join(names)}, whose last deployment failed, to try again."
    return f"Remove {join(names)} first: there is no room for the old and the new version at once."


def _deployment(names: Sequence[str], own: Mapping[str, ObservedApp]) -> str:
    new, changed = [n for n in names if n not in own], [n for n in names if n in own]
    parts = ([f"Deploy {join(new)}"] if new else []) + ([f"update {join(changed)}"] if changed else [])
    sentence = " and ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _adjustment(adjusted: Mapping[str, Sequence[str]]) -> str:
    return f"Change {join([f'{join(keys)} of {name}' for name, keys in adjusted.items()])} in place."


def _switch(routing: RoutingTable) -> str:
    targets = [f"{route.model} to {join([target.app for target in route.targets])}" for route in routing.routes]
    return f"Route {join(targets)}."


def _run(names: Sequence[str]) -> str:
    return "runs" if len(names) == 1 else "run"


def join(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
