"""The scenarios by name, in the order in which they are played."""

from cluster.control.drill import changes, faults, loads
from cluster.control.drill.phase import Scenario
from cluster.errors import UsageError

SCENARIOS = (
    Scenario(name="undisturbed", summary="mixed requests, and nothing happens", play=loads.undisturbed),
    Scenario(name="kill-stage", summary="kill -9 of every stage in turn", play=faults.kill_stages),
    Scenario(name="stop-stage", summary="a stage hangs (kill -STOP)", play=faults.stop_stage),
    Scenario(name="kill-all", summary="kill -9 of all replicas at once", play=faults.kill_all_replicas),
    Scenario(name="update", summary="a changed setting replaces the replicas", play=changes.update),
    Scenario(name="scale-up", summary="from one replica to two", play=changes.scale_up),
    Scenario(name="kill-replica", summary="kill -9 of one of two replicas", play=faults.kill_replica),
    Scenario(name="scale-down", summary="from two replicas to one", play=changes.scale_down),
    Scenario(name="overload", summary="three times the requests that can be answered", play=loads.overload),
    Scenario(name="disconnect", summary="clients leave in the middle", play=loads.disconnect),
    Scenario(name="head", summary="kill -9 of Ray's control store", play=faults.kill_head),
    Scenario(name="soak", summary="a long time; memory stays flat", play=loads.soak, by_default=False),
)


def chosen(names: list[str]) -> list[Scenario]:
    """The scenarios of these names, in their own order; the default ones for no names. UsageError for others."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"manta drill: no scenario is called {unknown[0]}; there are {', '.join(known)}")
    if not names:
        return [scenario for scenario in SCENARIOS if scenario.by_default]
    return [scenario for scenario in SCENARIOS if scenario.name in names]
