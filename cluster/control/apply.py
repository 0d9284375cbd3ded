"""``manta up`` and ``manta down``: a config in, the cluster as it says (or an error in the replica's own words) out.

plan -> observe -> diff -> import -> start -> deploy -> wait -> switch -> remove, each step only where it is needed.
Interrupted anywhere, the next run sees what is there and does the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from cluster.config.schema import ClusterConfig
from cluster.control.code import code_digest
from cluster.control.dashboard import Dashboard
from cluster.control.observe import observe
from cluster.control.provider import Ray, ray_of
from cluster.control.report import Report
from cluster.control.state import exclusive, state_directory
from cluster.control.versions import finish_imports, import_missing, known_versions, without_awaited
from cluster.control.wait import await_apps, await_gone
from cluster.errors import ControlError
from cluster.plan.build import build_plan
from cluster.plan.diff import (
    Action,
    AwaitApps,
    ChangeSettings,
    DeployApps,
    ImportModel,
    Nothing,
    Observed,
    RemoveApps,
    StartCluster,
    SwitchRoutes,
    diff,
    join,
    routing_between,
    routing_for_now,
)
from cluster.plan.serve_app import GATEWAY_APP, NO_PROXIES, ServeApp, gateway_app, model_apps, serve_config
from cluster.plan.types import Plan
from cluster.registry.store import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What ``up`` did."""

    plan: Plan
    actions: tuple[Action, ...]
    dashboard_url: str


def plan_actions(config: ClusterConfig) -> tuple[Plan, tuple[Action, ...]]:
    """The plan and what ``up`` would do now; changes nothing."""
    registry = Registry(config.storage_root)
    config, awaited = without_awaited(config, registry)
    plan = build_plan(config, known_versions(config, registry), code_digest())
    plan = plan.model_copy(update={"notes": (*awaited, *plan.notes)})
    return plan, diff(plan, observe(ray_of(config).dashboard()))


def up(config: ClusterConfig, report: Report, *, timeout_s: float) -> Applied:
    """Make the cluster as ``config`` says; ``timeout_s`` bounds the wait for its applications.

    Raises PlanError, SourceError, RegistryError or ControlError; what ran before goes on running.
    """
    with exclusive(state_directory(config)):
        registry, digest = Registry(config.storage_root), code_digest()
        config, awaited = without_awaited(config, registry)
        known = known_versions(config, registry)
        finish_imports(config, registry, known)
        plan = build_plan(config, known, digest)
        ray = ray_of(config)
        actions = diff(plan, observe(ray.dashboard()))
        done = [action for action in actions if isinstance(action, ImportModel)]
        if plan.missing:
            for action in done:
                report.say(action.sentence)
            plan = build_plan(config, import_missing(config, registry, known, report.progress, digest), digest)
        for note in (*awaited, *plan.notes):
            report.say(f"Note: {note}.")
        applied = apply_plan(plan, ray, report, timeout_s=timeout_s)
        dashboard = ray.dashboard()
        assert dashboard is not None
        return Applied(plan=plan, actions=(*done, *applied) or (Nothing(),), dashboard_url=dashboard.url)


def down(config: ClusterConfig, report: Report) -> bool:
    """End what ``up`` started, and only that; False when nothing of it runs."""
    with exclusive(state_directory(config)):
        return ray_of(config).stop(report.say)


def apply_plan(plan: Plan, ray: Ray, report: Report, *, timeout_s: float) -> list[Action]:
    """Start Ray if it does not run and carry out what the diff says; the actions that were taken.

    ControlError when an application does not start: its earlier config is given back to Serve before that.
    """
    dashboard = ray.dashboard()
    done: list[Action] = []
    if dashboard is None:
        done.append(StartCluster(sentence="Start Ray on this machine."))
        dashboard = ray.start(report.say)
    observed = observe(dashboard)
    rollout = _Rollout(plan, observed, dashboard, report, timeout_s)
    for action in diff(plan, observed):
        if not isinstance(action, Nothing):
            report.say(action.sentence)
            rollout.do(action)
            done.append(action)
    return done


class _Rollout:
    """Carries out the Serve actions of one diff; ``apps`` is what Serve was last told, by name."""

    def __init__(
        self, plan: Plan, observed: Observed, dashboard: Dashboard, report: Report, timeout_s: float
    ) -> None:
        self._plan = plan
        self._dashboard = dashboard
        self._report = report
        self._timeout_s = timeout_s
        self._observed = observed
        self._apps = {name: app.config for name, app in observed.own.items()}
        self._desired = {app["name"]: app for app in model_apps(plan)}
        self._removed: list[str] = []
        self._before: dict[str, ServeApp] = dict(self._apps)

    def do(self, action: Action) -> None:
        """Carry out one action; ControlError when the cluster does not follow."""
        match action:
            case DeployApps() | ChangeSettings():
                self._deploy(action.apps)
            case AwaitApps():
                self._wait(action.apps)
            case SwitchRoutes():
                routing = routing_between(self._plan, self._observed, self._removed, action.waiting)
                self._apps[GATEWAY_APP] = gateway_app(self._plan.gateway, routing, self._plan.runtime_env)
                self._put()
                self._wait((GATEWAY_APP,))
            case RemoveApps():
                self._remove(action.apps)
            case StartCluster() | ImportModel() | Nothing():
                raise AssertionError(f"this is a bug: {action.kind} in a rollout")
            case _:
                assert_never(action)

    def _deploy(self, names: Sequence[str]) -> None:
        for name in names:
            if name != GATEWAY_APP:
                self._apps[name] = self._desired[name]
        if GATEWAY_APP in names:
            routing = routing_for_now(self._plan, self._observed, self._removed)
            self._apps[GATEWAY_APP] = gateway_app(self._plan.gateway, routing, self._plan.runtime_env)
        self._put()

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._apps.pop(name, None)
            self._before.pop(name, None)
        self._removed.extend(names)
        if GATEWAY_APP in self._apps and GATEWAY_APP not in names:
            self._keep_only_routes_that_run()
        self._put()
        await_gone(self._dashboard, names, timeout_s=self._timeout_s)

    def _keep_only_routes_that_run(self) -> None:
        routing = routing_for_now(self._plan, self._observed, self._removed)
        gateway = self._apps[GATEWAY_APP]
        deployed = next(iter(gateway["deployments"]))["user_config"]
        routed = {target["app"] for route in deployed["routes"] for target in route["targets"]}
        if routed & set(self._removed):
            self._apps[GATEWAY_APP] = gateway | {
                "deployments": [{**gateway["deployments"][0], "user_config": routing.model_dump(mode="json")}]
            }

    def _put(self) -> None:
        applications = [*self._observed.foreign_configs(), *self._apps.values()]
        self._dashboard.put_applications(serve_config(self._observed.proxies or NO_PROXIES, applications))

    def _wait(self, names: Sequence[str]) -> None:
        failed = await_apps(self._dashboard, names, self._report.apps, timeout_s=self._timeout_s)
        self._report.close()
        if failed:
            kept = self._put_back(list(failed))
            raise ControlError("\n".join([*failed.values(), kept]))

    def _put_back(self, names: Sequence[str]) -> str:
        """Give Serve the configs from before for ``names``, so that it stops trying; says what goes on running."""
        for name in names:
            self._apps.pop(name)
            if name in self._before:
                self._apps[name] = self._before[name]
        self._put()
        serving = [name for name in self._before if name != GATEWAY_APP]
        return f"{join(serving)} keeps serving as before." if serving else f"{join(names)} was taken back."
