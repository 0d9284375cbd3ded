import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager

import msgspec
import pytest

from deployments.channel import Channel, Listener
from deployments.messages import Cancel, Delta, Finished, Load, Opened, Replies, Started
from deployments.replica.session import MANY_STREAMS, PATIENCE_S, GatewaySession, Outbox, _can_wait
from tests.support.engine_runs import generate, ticks, until

NUM_TOKENS = 12


class MetronomeService:
    """All requests get a token at every tick; ``pause_after`` so many, nothing comes until released."""

    def __init__(self, tick_s: float, pause_after: int | None = None) -> None:
        self.tick_s = tick_s
        self.pause_after = pause_after
        self.released = asyncio.Event()
        self._begin_s: float | None = None

    async def generate(self, request):
        loop = asyncio.get_running_loop()
        self._begin_s = self._begin_s or loop.time()
        yield Started(request_id=request.request_id, num_prompt_tokens=1, num_cached_tokens=0, seed=1)
        for number in range(NUM_TOKENS):
            if number == self.pause_after:
                await self.released.wait()
            await asyncio.sleep(max(0.0, self._begin_s + (number + 1) * self.tick_s - loop.time()))
            reason = "length" if number == NUM_TOKENS - 1 else None
            yield Delta(request_id=request.request_id, index=0, text="x", token_ids=(number,), finish_reason=reason)
        yield Finished(
            request_id=request.request_id, num_prompt_tokens=1, num_cached_tokens=0, num_completion_tokens=NUM_TOKENS
        )

    def load(self):
        return Load(num_running=0, num_waiting=0, num_waiting_tokens=0, kv_used_fraction=0.0, draining=False)


@asynccontextmanager
async def conversation(service, num_streams):
    listener = Listener(lambda channel: GatewaySession(channel, service).run())
    channel = await Channel.connect(await listener.start("127.0.0.1"), listener.secret)
    try:
        await channel.send(Opened(role="gateway"))
        for number in range(num_streams):
            await channel.send(generate(f"r{number}"))
        yield channel
    finally:
        channel.close()
        await listener.stop()


async def frames(channel):
    while True:
        message, _ = await channel.receive(timeout_s=10.0)
        if isinstance(message, Replies):
            yield message.replies


async def all_frames(service, num_streams):
    """Frames until every stream has finished, each with what came before it in the order that it came."""
    heard, num_finished = [], 0
    async with conversation(service, num_streams) as channel:
        async for replies in frames(channel):
            heard.append(replies)
            num_finished += sum(isinstance(reply, Finished) for reply in replies)
            if num_finished == num_streams:
                return heard
    raise AssertionError("unreachable")


def by_request(heard):
    said = defaultdict(list)
    for replies in heard:
        for reply in replies:
            said[reply.request_id].append(reply)
    return said


@pytest.mark.parametrize("num_streams", [1, MANY_STREAMS - 1, MANY_STREAMS, 3 * MANY_STREAMS])
async def test_every_stream_hears_everything_in_order(num_streams):
    said = by_request(await all_frames(MetronomeService(0.002), num_streams))
    assert len(said) == num_streams
    for replies in said.values():
        assert isinstance(replies[0], Started)
        assert isinstance(replies[-1], Finished)
        assert [token for reply in replies[1:-1] for token in reply.token_ids] == list(range(NUM_TOKENS))


async def test_with_many_streams_tokens_of_several_steps_travel_together():
    heard = await all_frames(MetronomeService(PATIENCE_S / 4), MANY_STREAMS)
    widths = [len(deltas_of(replies, "r1")) for replies in heard if deltas_of(replies, "r1")]
    assert len(widths) <= NUM_TOKENS // 2


def deltas_of(replies, request_id):
    return [reply for reply in replies if isinstance(reply, Delta) and reply.request_id == request_id]


async def test_a_token_that_waits_leaves_in_time_though_no_other_comes():
    service = MetronomeService(0.002, pause_after=5)
    async with conversation(service, MANY_STREAMS) as channel:
        said = defaultdict(list)
        async with asyncio.timeout(10):
            async for replies in frames(channel):
                for reply in replies:
                    said[reply.request_id].append(reply)
                if len(said) == MANY_STREAMS and all(len(heard) == 6 for heard in said.values()):
                    break
        service.released.set()


class SpeakingService:
    """Each request says what the test puts into its queue."""

    def __init__(self) -> None:
        self.queues: dict[str, asyncio.Queue] = defaultdict(asyncio.Queue)
        self.num_left = 0

    async def generate(self, request):
        try:
            while True:
                yield await self.queues[request.request_id].get()
        finally:
            self.num_left += 1

    def load(self):
        return Load(num_running=0, num_waiting=0, num_waiting_tokens=0, kv_used_fraction=0.0, draining=False)


@pytest.fixture
def endless_patience(monkeypatch):
    """What is held does not leave by itself."""
    monkeypatch.setattr("deployments.replica.session.PATIENCE_S", 1000.0)


async def next_replies(channel):
    return await asyncio.wait_for(anext(frames(channel)), 10)


async def begin_all(service, channel, num_streams):
    """Until the last stream has spoken, and so all are open."""
    first = delta(f"r{num_streams - 1}", 0)
    service.queues[first.request_id].put_nowait(first)
    assert await next_replies(channel) == (first,)


@pytest.mark.usefixtures("endless_patience")
async def test_a_choices_first_and_last_token_leave_at_once_and_what_is_between_waits_for_them():
    service = SpeakingService()
    async with conversation(service, MANY_STREAMS) as channel:
        await begin_all(service, channel, MANY_STREAMS)
        speak = service.queues["r0"].put_nowait
        for index in range(2):
            first = delta("r0", 1, index)
            speak(first)
            assert await next_replies(channel) == (first,)
        between = [delta("r0", number, number % 2) for number in range(2, 6)]
        last = msgspec.structs.replace(delta("r0", 6), finish_reason="stop")
        for reply in (*between, last):
            speak(reply)
        assert await next_replies(channel) == (*between, last), "Finished is yet to come"


@pytest.mark.usefixtures("endless_patience")
async def test_with_few_streams_nothing_waits():
    service = SpeakingService()
    async with conversation(service, MANY_STREAMS - 1) as channel:
        await begin_all(service, channel, MANY_STREAMS - 1)
        for number in range(3):
            service.queues["r0"].put_nowait(delta("r0", number))
            assert await next_replies(channel) == (delta("r0", number),)


@pytest.mark.usefixtures("endless_patience")
async def test_a_cancelled_request_says_nothing_more():
    service = SpeakingService()
    async with conversation(service, MANY_STREAMS + 1) as channel:
        await begin_all(service, channel, MANY_STREAMS + 1)
        for number in range(3):
            service.queues["r0"].put_nowait(delta("r0", number))
        assert await next_replies(channel) == (delta("r0", 0),)
        await channel.send(Cancel(request_id="r0"))
        await channel.send(generate("r0"))
        await until(lambda: service.num_left == 1)
        service.queues["r0"].put_nowait(delta("r0", 7))
        assert await next_replies(channel) == (delta("r0", 7),), "what waited is gone, and this is a first token"


def test_a_token_of_a_slow_step_does_not_wait():
    assert _can_wait(delta("a", 2), {0: 10.0}, 10.0 + PATIENCE_S / 2)
    assert not _can_wait(delta("a", 2), {0: 10.0}, 10.0 + PATIENCE_S * 2)


class Wire:
    """Keeps the frames that are sent."""

    def __init__(self) -> None:
        self.frames: list[tuple[object, ...]] = []

    async def send(self, message):
        self.frames.append(message.replies)

    def send_nowait(self, message):
        self.frames.append(message.replies)


def delta(request_id, number, index=0):
    return Delta(request_id=request_id, index=index, text="x", token_ids=(number,))


async def test_what_cannot_wait_takes_along_what_waits_of_its_request_alone():
    wire = Wire()
    outbox = Outbox(wire)
    sender = asyncio.create_task(outbox.send_forever())
    outbox.hold(delta("a", 1))
    outbox.hold(delta("b", 1))
    outbox.put(delta("a", 2))
    await ticks(5)
    assert wire.frames == [(delta("a", 1), delta("a", 2))]
    outbox.hold(delta("c", 1))
    outbox.put(delta("d", 1))
    outbox.forget("c")
    outbox.forget("d")
    outbox.flush()
    assert wire.frames[1:] == [(delta("b", 1),)]
    sender.cancel()
    await asyncio.gather(sender, return_exceptions=True)
