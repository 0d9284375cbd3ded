"""Scenarios of traffic alone: nothing at all, too much, clients that leave, and a long time."""

import asyncio
import time
from collections.abc import Iterator

import psutil

from cluster.control.drill.asks import Ask, short_ask
from cluster.control.drill.drill import Drill, in_thread, num_places
from cluster.control.drill.judge import Hit, Promise, changed, pause
from cluster.control.drill.memory import Memory
from cluster.control.drill.phase import Phase
from cluster.control.drill.rates import answered_per_second, overload_promises
from cluster.control.drill.traffic import ticks
from cluster.errors import ControlError

_OVERLOAD = 3.0
_GOODPUT_SHARE = 0.9
_SHORT_TOKENS = 64
"""The mean: with much shorter answers, sending three times as many takes a good part of the machine."""
_LENGTH_STEP = 7
"""From one request to the next. Equal ones all begin together, and a peak measured so is never reached again."""
_RAMP_S = 2.0
_MAX_FILL_S = 120.0
_DROP_LANES = 32
_SAMPLE_S = 2.0


async def undisturbed(drill: Drill, phase: Phase) -> None:
    """Mixed requests in each other's company; what the other scenarios are measured against."""
    phase.traffic.start_lanes(drill.options.lanes)
    await drill.enough(phase)
    await phase.traffic.stop()
    outcomes = phase.traffic.outcomes
    usual = pause(outcomes, [Hit(what="nothing", at=outcomes[0].sent_at, until=time.monotonic())])
    if usual is not None:
        phase.notes.append(f"longest silence of a stream while nothing happens: {usual.max_s:.2f} s")
    if not drill.comparable:
        num_changed = len(changed(outcomes, drill.golden))
        phase.notes.append(f"{num_changed} of {len(outcomes)} answers differ from those given in other company")


async def overload(drill: Drill, phase: Phase) -> None:
    """Three times as many requests as can be answered: the rest is refused at once, with a time to come back."""
    phase.judged = False
    peak_tokens, peak_requests = await _peak(drill, phase)
    seconds = drill.options.load_s + _fill_s(drill, peak_requests)
    drill.report.say(f"  peak {peak_tokens:.1f} tokens/s, {peak_requests:.1f} requests/s; now 3 times that")
    patience_s = drill.options.patience_s + 2 * num_places(drill.site.config, drill.arguments) / peak_requests
    traffic = phase.traffic = drill.new_traffic(_short_asks(drill), patience_s)
    began = time.monotonic()
    await traffic.send_at_rate(_OVERLOAD * peak_requests, seconds)
    ended = time.monotonic()
    await traffic.stop()
    goodput = answered_per_second(traffic.outcomes, began + _RAMP_S, ended)
    share = goodput / peak_tokens
    detail = f"{goodput:.1f} of {peak_tokens:.1f} tokens/s, {share:.0%}"
    text = f"goodput is at least {_GOODPUT_SHARE:.0%} of its peak"
    phase.promises.append(Promise(text=text, kept=share >= _GOODPUT_SHARE, detail=detail, shown=True))
    phase.promises += overload_promises(traffic.outcomes)


async def _peak(drill: Drill, phase: Phase) -> tuple[float, float]:
    """Tokens and requests answered per second when every place is taken and nobody waits long."""
    traffic = phase.traffic = drill.new_traffic(_short_asks(drill))
    began = time.monotonic()
    traffic.start_lanes(int(drill.arguments["max_running"]))
    await asyncio.sleep(_RAMP_S + drill.options.load_s)
    ended = time.monotonic()
    await traffic.stop()
    tokens = answered_per_second(traffic.outcomes, began + _RAMP_S, ended)
    return tokens, tokens / _SHORT_TOKENS


def _short_asks(drill: Drill) -> list[Ask]:
    shortest, num_lengths = _SHORT_TOKENS // 2, _SHORT_TOKENS + 1
    lengths = [shortest + number * _LENGTH_STEP % num_lengths for number in range(num_lengths)]
    return [short_ask(drill.site.model, number, length) for number, length in enumerate(lengths)]


def _fill_s(drill: Drill, peak_requests: float) -> float:
    """How long the places take to fill at the excess rate; bounded, as a queue may be longer than anybody waits."""
    return min(_MAX_FILL_S, num_places(drill.site.config, drill.arguments) / ((_OVERLOAD - 1) * peak_requests))


async def disconnect(drill: Drill, phase: Phase) -> None:
    """Clients that leave before, at, or after the first tokens, beside some that stay."""
    memory = Memory(await in_thread(lambda: _processes(drill)))
    phase.traffic.start_lanes(2)
    memory.sample()
    cycles = iter(range(drill.options.num_cycles))
    await asyncio.gather(*(_drop(drill, cycles) for _ in range(_DROP_LANES)))
    await phase.traffic.stop()
    left_at = time.monotonic()
    free = await drill.all_is_free()
    memory.sample()
    grown = ", ".join(f"{name} {size / 2**20:+.1f} MiB" for name, size in memory.growth().items())
    phase.notes.append(f"{drill.options.num_cycles} connections dropped; memory: {grown or 'not on this machine'}")
    if free.kept:
        phase.notes.append(f"all was free {time.monotonic() - left_at:.1f} s after the last one (told once a second)")


async def _drop(drill: Drill, cycles: Iterator[int]) -> None:
    for number in cycles:
        undisturbed = drill.golden[number % len(drill.golden)]
        assert undisturbed.ended_at is not None
        took_s = undisturbed.ended_at - undisturbed.sent_at
        await drill.client.drop(undisturbed.ask, drill.random.uniform(0, took_s))


async def soak(drill: Drill, phase: Phase) -> None:
    """Mixed requests for a long time: memory stays flat."""
    memory = Memory(await in_thread(lambda: _processes(drill)))
    phase.traffic.start_lanes(drill.options.lanes)
    async for _ in ticks(drill.options.soak_s, period_s=_SAMPLE_S):
        memory.sample()
    await drill.enough(phase)
    memory.sample()
    phase.promises.append(memory.is_flat())


def _processes(drill: Drill) -> dict[str, psutil.Process]:
    """Gateway, replicas and stages, as far as they run on this machine."""
    site = drill.site
    gateway = site.gateway_process()
    found = {} if gateway is None else {"gateway": gateway}
    for number, replica in enumerate(site.replicas()):
        try:
            found[f"replica {number}"] = site.replica_process(replica)
            found |= {f"stage {number}.{stage.index}": site.stage_process(stage) for stage in replica.stages}
        except ControlError:
            continue  # on another machine
    return found
