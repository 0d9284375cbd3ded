"""Stages that die, stand still, compute for ever or are misheard: noticed, replaced, and no token is different."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from deployments.channel import Channel, ChannelError, Listener
from deployments.messages import Alive, SamplingParams, SequenceStart, SequenceStep, StepInput
from deployments.replica.engine import Engine
from deployments.replica.supervise import Supervisor
from deployments.stage.deadline import StepDeadline
from deployments.stage.link import StageAddress, StageLink, StageLostError
from tests.support.bad_wire import BadWire
from tests.support.local_stages import LocalStages, Reroute, load_runners
from tests.support.tiny_models import greedy, save_tiny_model
from tests.support.tiny_tokenizer import tiny_text
from tests.unit.deployments.test_engine_exact import PROMPTS as MANY_PROMPTS
from tests.unit.deployments.test_engine_exact import config, run

PROMPTS = MANY_PROMPTS[1:4]
HANDSHAKE_BYTES = 48
OPENING_BYTES = 64
"""The first message on every connection is no longer than this."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """Two stages of a tiny model, and what it says undisturbed."""
    directory = tmp_path_factory.mktemp("llama")
    reference = save_tiny_model(directory, "llama", eos_token_id=0)
    return load_runners(directory, [0, 2, 4], num_blocks=96), [greedy(reference, prompt, 16) for prompt in PROMPTS]


@pytest.fixture
async def lay():
    """Lays a wire in place of one connection; taken up again at the end."""
    wires: list[BadWire] = []

    def reroute_by(wire: BadWire, kind: str, stage: int) -> Reroute:
        async def reroute(place: tuple[str, int], address: str) -> str:
            if place != (kind, stage):
                return address
            wires.append(wire)
            return await wire.start(address)

        return reroute

    yield reroute_by
    for wire in wires:
        await wire.stop()


async def say_all(engine: Engine) -> list[list[int]]:
    together = await asyncio.gather(*(run(engine, i, prompt) for i, prompt in enumerate(PROMPTS)))
    return [choices[0] for choices in together]


@contextlib.asynccontextmanager
async def supervised(stages: LocalStages, **changes) -> AsyncIterator[Engine]:
    link = await stages.start()
    engine = Engine(config(on_stage_failure="hold", **changes), tiny_text(), link)
    await engine.start()
    supervisor = Supervisor(engine, stages, link)
    task = asyncio.create_task(supervisor.run())
    try:
        yield engine
        assert supervisor.given_up is None
        engine.pool.check_integrity(())
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.stop()
        await supervisor._link.close()
        await stages.stop()


WIRES = [
    pytest.param("replica", 0, "target", (), id="steps-to-the-first-stage"),
    pytest.param("replica", 1, "target", (), id="steps-to-the-last-stage"),
    pytest.param("replica", 1, "caller", (1,), id="samples-to-the-replica"),
    pytest.param("stages", 0, "target", (1,), id="choices-to-the-first-stage"),
    pytest.param("stages", 1, "target", (0,), id="activations-to-the-next-stage"),
]


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize(("damage", "at_byte"), [("flip", 9), ("flip", 80), ("flip", 700), ("cut", 700)])
@pytest.mark.parametrize(("kind", "stage", "toward", "suspects"), WIRES)
async def test_a_damaged_frame_costs_a_repair_and_never_a_token(
    model, lay, kind, stage, toward, suspects, at_byte, damage, steps_ahead
) -> None:
    runners, expected = model
    wire = BadWire(damage, toward=toward, at_byte=HANDSHAKE_BYTES + at_byte)
    stages = LocalStages(runners, reroute=lay(wire, kind, stage))
    async with supervised(stages, steps_ahead=steps_ahead) as engine:
        assert await say_all(engine) == expected
        assert wire.happened.is_set()
        assert engine.stats().num_recoveries == len(stages.repairs) == 1
        if damage == "flip" and at_byte > OPENING_BYTES:
            # the accusation may come too late, which costs a second repair where the sender is bad, never a token
            assert stages.repairs[0] <= frozenset(suspects)


@pytest.mark.parametrize(("kind", "stage", "toward", "suspects"), WIRES[-2:])
async def test_a_wire_that_falls_silent_is_noticed_and_never_waited_for(
    model, lay, kind, stage, toward, suspects
) -> None:
    runners, expected = model
    wire = BadWire("hold", toward=toward, at_byte=HANDSHAKE_BYTES + 700)
    stages = LocalStages(runners, reroute=lay(wire, kind, stage), step_timeout_s=1.0, silence_s=1.0)
    async with supervised(stages, steps_ahead=1) as engine:  # else nothing waits for what was chosen
        assert await say_all(engine) == expected
        assert wire.happened.is_set()
        assert (suspects if toward == "caller" else ()) == tuple(stages.repairs[0])


@contextlib.asynccontextmanager
async def fake_stage(*, alive: bool) -> AsyncIterator[StageAddress]:
    """Takes every step and never answers; tells that it lives, or not even that."""

    async def converse(channel: Channel) -> None:
        with contextlib.suppress(ChannelError):
            if not alive:
                await asyncio.Event().wait()
            while True:
                await channel.send(Alive())
                await asyncio.sleep(0.01)

    listener = Listener(converse)
    address = await listener.start("127.0.0.1")
    yield StageAddress(address=address, secret=listener.secret)
    await listener.stop()


STEP = StepInput(
    step=1,
    sequences=(SequenceStep(1, (5, 6, 7), 0, (0,), True),),
    started=(SequenceStart(1, (5, 6, 7), 3, SamplingParams(max_tokens=1), 0, 0, ()),),
)


async def test_a_stage_that_stands_still_is_lost_while_nothing_is_under_way() -> None:
    async with fake_stage(alive=True) as first, fake_stage(alive=False) as second:
        link = await StageLink.connect([first, second], step_timeout_s=60.0, silence_s=0.2)
        loss = await asyncio.wait_for(link.wait_lost(), 10)
        assert loss.stage == 1
        assert "no sign of life" in str(loss)
        assert link.suspects == {1}
        assert link.quiet_s(1) > 0.0
        await link.close()


async def test_a_stage_that_lives_but_never_answers_is_overdue() -> None:
    async with fake_stage(alive=True) as stage:
        link = await StageLink.connect([stage], step_timeout_s=0.2)
        await link.send(STEP)
        with pytest.raises(StageLostError, match=r"a step of 3 tokens within 0\.2 s"):
            await asyncio.wait_for(link.receive(), 10)
        await link.close()


async def test_another_step_timeout_holds_for_the_step_in_flight() -> None:
    async with fake_stage(alive=True) as stage:
        link = await StageLink.connect([stage], step_timeout_s=300.0)
        await link.send(STEP)
        link.set_step_timeout(0.1)
        with pytest.raises(StageLostError, match=r"a step of 3 tokens within 0\.1 s"):
            await asyncio.wait_for(link.receive(), 10)
        await link.close()


async def test_a_link_without_a_step_under_way_waits_for_ever() -> None:
    async with fake_stage(alive=True) as stage:
        link = await StageLink.connect([stage], step_timeout_s=0.1, silence_s=60.0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link.wait_lost(), 0.5)
        await link.close()


def test_the_deadline_follows_honest_steps_between_floor_and_ceiling() -> None:
    deadline = StepDeadline(60.0)
    assert deadline.limit_s(1) == 60.0
    deadline.observe(1, 0.02)
    assert deadline.limit_s(1) == 10.0, "never below the floor"
    assert deadline.limit_s(512) == 60.0, "nothing of that size is known"
    assert deadline.limit_s(0) == 60.0, "its size is not known here"
    deadline.observe(512, 1.5)
    assert deadline.limit_s(512) == 30.0
    assert deadline.limit_s(300) == 30.0
    assert deadline.limit_s(1024) == 60.0
    deadline.observe(600, 9.0)
    assert deadline.limit_s(512) == 60.0, "never above the ceiling"


def test_a_ceiling_below_the_floor_is_the_limit() -> None:
    deadline = StepDeadline(0.5)
    deadline.observe(1, 0.01)
    assert deadline.limit_s(1) == 0.5
