"""Scenarios that kill: one process of the cluster dies or hangs under traffic, and its streams must go on."""

import asyncio

import psutil

from cluster.control.drill.drill import Drill, in_thread
from cluster.control.drill.judge import Promise
from cluster.control.drill.parts import DETECT, Parts, added, describe_parts, noticed_at_once
from cluster.control.drill.phase import NotPossible, Phase
from cluster.control.drill.traffic import ticks
from cluster.control.observe import ReplicaStatus
from cluster.errors import ControlError

_AFTER_HEAD_S = 10.0
_EXPORT_TIMEOUT_S = 30.0


async def kill_stages(drill: Drill, phase: Phase) -> None:
    """``kill -9`` of every stage of one replica, one after the other."""
    before = await in_thread(drill.site.recovery_parts)
    phase.traffic.start_lanes(drill.options.lanes)
    num_stages = len((await _first_replica(drill)).stages)
    for index in list(range(num_stages)) * drill.options.rounds:
        victim = await _stage_process(drill, index)
        await drill.strike(phase, f"kill -9 of stage {index} (pid {victim.pid})", [victim], psutil.Process.kill)
    await drill.enough(phase)
    await _account(drill, phase, before)
    if DETECT in phase.parts:
        phase.promises.append(noticed_at_once(phase.parts[DETECT]))


async def stop_stage(drill: Drill, phase: Phase) -> None:
    """``kill -STOP`` of the last stage: it lives, keeps its connections, and answers nothing."""
    before = await in_thread(drill.site.recovery_parts)
    phase.traffic.start_lanes(drill.options.lanes)
    last = len((await _first_replica(drill)).stages) - 1
    victim = await _stage_process(drill, last)
    try:
        await drill.strike(phase, f"kill -STOP of stage {last} (pid {victim.pid})", [victim], psutil.Process.suspend)
        phase.promises.append(await _ended(victim))
    finally:
        if _lives(victim):
            victim.resume()
    await drill.enough(phase)
    await _account(drill, phase, before)


async def _account(drill: Drill, phase: Phase, before: Parts) -> None:
    """Wait for the replicas' own account of as many recoveries as there were hits; it may never come."""
    await phase.traffic.stop()
    async for _ in ticks(_EXPORT_TIMEOUT_S, period_s=2.0):
        phase.parts = added(before, await in_thread(drill.site.recovery_parts))
        if DETECT in phase.parts and phase.parts[DETECT].count >= len(phase.hits):
            phase.notes.append(f"a recovery by its parts: {describe_parts(phase.parts)}")
            return
    phase.notes.append("the replicas' own account of their recoveries did not come")


async def _ended(victim: psutil.Process) -> Promise:
    text = "the stuck process is ended"
    async for _ in ticks(10.0):
        if not _lives(victim):
            return Promise(text=text, kept=True, detail=f"pid {victim.pid} is gone")
    return Promise(text=text, kept=False, detail=f"pid {victim.pid} is still there, stopped")


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def kill_replica(drill: Drill, phase: Phase) -> None:
    """``kill -9`` of one of two replicas: its streams go on in the other."""
    await drill.scale(2)
    phase.traffic.start_lanes(drill.options.lanes)
    replica = drill.random.choice(await in_thread(drill.site.replicas))
    victim = await in_thread(lambda: drill.site.replica_process(replica))
    await drill.strike(phase, f"kill -9 of replica {replica.id} (pid {victim.pid})", [victim], psutil.Process.kill)
    await drill.enough(phase)


async def kill_all_replicas(drill: Drill, phase: Phase) -> None:
    """``kill -9`` of every replica at once: streams wait for a new one."""
    phase.traffic.start_lanes(drill.options.lanes)
    replicas = await in_thread(drill.site.replicas)
    victims = await in_thread(lambda: [drill.site.replica_process(replica) for replica in replicas])
    pids = ", ".join(str(victim.pid) for victim in victims)
    await drill.strike(phase, f"kill -9 of all {len(victims)} replicas (pid {pids})", victims, psutil.Process.kill)
    await drill.enough(phase)


async def kill_head(drill: Drill, phase: Phase) -> None:
    """``kill -9`` of Ray's control store: streams do not notice, and control comes back."""
    try:
        victim = await in_thread(drill.site.gcs_process)
    except ControlError as error:
        raise NotPossible(str(error)) from error
    phase.traffic.start_lanes(drill.options.lanes)
    await drill.strike(phase, f"kill -9 of the control store (pid {victim.pid})", [victim], psutil.Process.kill)
    await asyncio.sleep(_AFTER_HEAD_S)
    await drill.enough(phase)


async def _first_replica(drill: Drill) -> ReplicaStatus:
    replicas = await in_thread(drill.site.replicas)
    if not replicas:
        raise ControlError(f"no complete replica of {drill.site.model} runs; see `manta status`")
    return replicas[0]


async def _stage_process(drill: Drill, index: int) -> psutil.Process:
    replica = await _first_replica(drill)
    return await in_thread(lambda: drill.site.stage_process(replica.stages[index]))
