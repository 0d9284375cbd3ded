"""One drill: a site, a client and scenarios in, a Result for each out; the cluster is left as it was found."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil

from cluster.config.models import ModelConfig
from cluster.config.schema import ClusterConfig
from cluster.control.drill.asks import Ask, make_asks
from cluster.control.drill.client import Client
from cluster.control.drill.idle import describe_health, is_idle
from cluster.control.drill.judge import (
    Golden,
    Hit,
    Promise,
    changed,
    failures,
    nothing_changed,
    nothing_failed,
    one_end_each,
    pause,
)
from cluster.control.drill.phase import NotPossible, Options, Phase, Result, Scenario
from cluster.control.drill.site import Site
from cluster.control.drill.traffic import Traffic, ticks
from cluster.control.report import Report
from cluster.errors import ControlError, MantaError, PlanError, UsageError

Found = TypeVar("Found")

_NUM_ASKS = 24
_GOLDEN_LANES = 4
_REPORTED_S = 2.5
"""Replicas tell the gateway how busy they are once a second; what it says then is of after the traffic."""
_CLEAN_TIMEOUT_S = 60.0
_MOMENT_S = 1.0
"""A kill comes at a random moment of this time, wherever streams are then."""


class Drill:
    """Plays scenarios one after the other on one site. ``results`` has those that are over."""

    def __init__(self, site: Site, client: Client, report: Report, options: Options) -> None:
        self.site = site
        self.client = client
        self.report = report
        self.options = options
        self.random = random.Random(options.seed)  # noqa: S311 (moments and prompts, not secrets)
        self.asks: tuple[Ask, ...] = ()
        self.golden: Golden = {}
        self.comparable = False
        self.arguments: dict[str, Any] = {}
        self.notes: list[str] = []
        self.results: list[Result] = []

    async def run(self, scenarios: Sequence[Scenario]) -> None:
        """Play ``scenarios``; whatever happens, put the cluster back. ControlError when it does not serve at all."""
        try:
            await self._prepare()
            for scenario in scenarios:
                self.results.append(await self._play(scenario))
        finally:
            await in_thread(lambda: self.site.restore(self.report))

    async def _prepare(self) -> None:
        """Find out what the model can do, and what it answers while nothing happens."""
        await in_thread(self.site.require_settled)
        self.arguments = await in_thread(self.site.arguments)
        busy = (await self.client.health()).get("num_requests", 0)
        if busy:
            raise ControlError(f"{busy} requests of others are in flight; a drill needs the cluster for itself")
        self._require_room()
        self.comparable, note = comparable(self.arguments)
        self.notes.append(note)
        self.report.say("Asking everything once while nothing happens.")
        asks = make_asks(self.site.model, self.arguments["context_tokens"], _NUM_ASKS, self.options.seed)
        await self._learn(asks)

    def _require_room(self) -> None:
        """UsageError where the drill alone would be too much: what is refused then proves nothing."""
        places = num_places(self.site.config, self.arguments)
        if self.options.lanes > places:
            raise UsageError(
                f"manta drill: {self.options.lanes} streams, but there are places for {places} requests "
                "(gateway.limits.max_streams, batching); lower --streams"
            )

    async def _learn(self, asks: Sequence[Ask]) -> None:
        traffic = Traffic(self.client, asks, self.options.patience_s)
        await asyncio.gather(*(traffic.send_each(len(asks) // _GOLDEN_LANES) for _ in range(_GOLDEN_LANES)))
        refused = {each.ask.kind: each.error for each in traffic.outcomes if each.status == 400}
        self.notes += [f"not asked: {kind} ({error})" for kind, error in sorted(refused.items())]
        known = [each for each in traffic.outcomes if each.ask.kind not in refused]
        wrong = [promise for promise in (nothing_failed(known), one_end_each(known)) if not promise.kept]
        if wrong:
            raise ControlError(f"{self.site.model} fails while nothing happens: {wrong[0].detail}")
        self.asks = tuple(each.ask for each in known)
        self.golden = dict(enumerate(known))

    async def _play(self, scenario: Scenario) -> Result:
        self.report.say(f"{scenario.name}: {scenario.summary}.")
        phase = Phase(traffic=self.new_traffic())
        showing = asyncio.create_task(self._show(scenario.name, phase))
        try:
            await scenario.play(self, phase)
            await phase.traffic.stop()
        except (NotPossible, PlanError) as error:
            self.report.say(f"{scenario.name}: skipped, {error}")
            return Result(scenario=scenario.name, skipped=str(error))
        except MantaError as error:
            phase.promises.append(Promise(text="the scenario goes to its end", kept=False, detail=str(error)))
        finally:
            showing.cancel()
            await phase.traffic.abandon()
        return await self._judge(scenario, phase)

    async def _show(self, name: str, phase: Phase) -> None:
        total = self.options.min_requests
        async for _ in ticks(float("inf"), period_s=1.0):
            self.report.progress(name, min(phase.traffic.num_ended, total), total, "requests")

    async def _judge(self, scenario: Scenario, phase: Phase) -> Result:
        outcomes = phase.traffic.outcomes
        if phase.judged:
            phase.promises += [nothing_failed(outcomes), one_end_each(outcomes)]
        if phase.judged and self.comparable:
            phase.promises.append(nothing_changed(outcomes, self.golden))
        phase.promises += [await self.all_is_free(), await self._nothing_is_left()]
        result = Result(
            scenario=scenario.name,
            num_requests=len(outcomes),
            num_failed=len(failures(outcomes)),
            num_changed=len(changed(outcomes, self.golden)) if phase.judged and self.comparable else None,
            pause=pause(outcomes, phase.hits),
            parts=phase.parts,
            promises=tuple(phase.promises),
            notes=tuple(phase.notes),
        )
        self.report.say(f"{scenario.name}: {'kept' if result.kept else 'BROKEN'}.")
        return result

    def new_traffic(self, asks: Sequence[Ask] | None = None, patience_s: float | None = None) -> Traffic:
        """Traffic of ``asks`` (the pool) whose requests are given up after ``patience_s`` (the options')."""
        return Traffic(self.client, asks or self.asks, patience_s or self.options.patience_s)

    async def all_is_free(self) -> Promise:
        """No request holds anything, by the gateway's own account."""
        text, states = "nothing is held when no request is open", "the gateway does not answer /health"
        num_idle, wanted = 0, 2 * self.site.config.gateway.replicas
        await asyncio.sleep(_REPORTED_S)
        async for _ in ticks(_CLEAN_TIMEOUT_S, period_s=0.2):
            health = await self.client.health()
            states = describe_health(health, self.site.model) or states
            num_idle = num_idle + 1 if is_idle(health, self.site.model) else 0
            if num_idle >= wanted:
                return Promise(text=text, kept=True, detail=states)
        return Promise(text=text, kept=False, detail=states)

    async def _nothing_is_left(self) -> Promise:
        """No actor, placement group or process without a replica it belongs to."""
        text, found = "no process, actor or placement group is left over", ["unknown"]
        async for _ in ticks(_CLEAN_TIMEOUT_S, period_s=1.0):
            found = await in_thread(self.site.leftovers)
            if not found:
                return Promise(text=text, kept=True, detail="none")
        return Promise(text=text, kept=False, detail=", ".join(found))

    async def strike(self, phase: Phase, what: str, victims: Sequence[psutil.Process], blow: "Blow") -> None:
        """Hurt ``victims`` while tokens flow; wait until every stream of then has ended and replicas are whole."""
        if not await phase.traffic.flowing(self.options.patience_s):
            raise ControlError("no tokens come, although nothing has been done yet")
        await asyncio.sleep(self.random.uniform(0, _MOMENT_S))
        num_replicas = len(await in_thread(self.site.replicas))
        open_streams = phase.traffic.in_flight
        now = time.monotonic()
        for victim in victims:
            blow(victim)
        phase.hits.append(Hit(what=what, at=now, until=now))
        self.report.say(f"  {what}: {len(open_streams)} streams open")
        if not await phase.traffic.ended(open_streams, self.options.patience_s):
            raise ControlError(f"{what}: streams did not go on within {self.options.patience_s:g} s")
        await self.whole(num_replicas, {victim.pid for victim in victims})

    async def whole(self, num_replicas: int, without: set[int]) -> None:
        """Wait for ``num_replicas`` complete replicas in which none of the processes ``without`` is."""
        async for _ in ticks(self.options.patience_s, period_s=0.5):
            try:
                replicas = await in_thread(self.site.replicas)
            except ControlError:
                continue  # control may be what was hurt
            pids = {pid for each in replicas for pid in (each.pid, *(stage.pid for stage in each.stages))}
            if len(replicas) >= num_replicas and not pids & without:
                return
        raise ControlError(
            f"there were not {num_replicas} complete replicas again within {self.options.patience_s:g} s"
        )

    async def enough(self, phase: Phase) -> None:
        """Wait until the traffic has had as many requests as the options want."""
        async for _ in ticks(float("inf")):
            if len(phase.traffic.outcomes) >= self.options.min_requests:
                return

    async def scale(self, num_replicas: int) -> None:
        """Have exactly ``num_replicas`` while nothing is asked; NotPossible where there is no room for them."""
        if len(await in_thread(self.site.replicas)) == num_replicas:
            return
        self.report.say(f"  getting {num_replicas} replicas first")
        await in_thread(lambda: self.site.change(lambda model: with_replicas(model, num_replicas), self.report))
        await self.whole(num_replicas, set())

    async def change(self, phase: Phase, what: str, change: Callable[[ModelConfig], ModelConfig]) -> None:
        """Run ``manta up`` with the model's entry changed while tokens flow."""
        if not await phase.traffic.flowing(self.options.patience_s):
            raise ControlError("no tokens come, although nothing has been done yet")
        self.report.say(f"  {what}: {len(phase.traffic.in_flight)} streams open")
        began = time.monotonic()
        await in_thread(lambda: self.site.change(change, self.report))
        phase.hits.append(Hit(what=what, at=began, until=time.monotonic()))


Blow = Callable[[psutil.Process], None]


async def in_thread(work: Callable[[], Found]) -> Found:
    """The result of blocking ``work``; where the caller is cancelled meanwhile, only after it has ended."""
    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def num_places(config: ClusterConfig, arguments: dict[str, Any]) -> int:
    """Requests that may be inside at the same time, running or waiting, where there is one replica."""
    in_replica = int(arguments["max_running"]) + int(arguments["max_waiting"])
    return min(config.gateway.limits.max_streams * config.gateway.replicas, in_replica)


def with_replicas(model: ModelConfig, count: int) -> ModelConfig:
    """``model`` with exactly ``count`` replicas, whatever the load."""
    return model.model_copy(update={"replicas": model.replicas.model_copy(update={"min": count, "max": count})})


def comparable(arguments: dict[str, Any]) -> tuple[bool, str]:
    """Whether equal requests must give equal text in any company, by the replicas' arguments; and why, in words."""
    dtype, kernels = arguments["dtype"], arguments.get("kernels", "torch")
    if dtype == "float32" or kernels == "native":
        return True, f"answers are compared with undisturbed ones (dtype {dtype}, kernels {kernels})"
    return False, (
        f"answers are not compared: with dtype {dtype} and kernels {kernels}, rounding may depend on the company "
        "a request is computed in; float32 or kernels: native make them comparable"
    )
