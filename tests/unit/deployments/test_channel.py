"""The Channel carries messages unchanged, refuses everything else, and never hangs."""

import asyncio
import contextlib
import struct
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from deployments.channel import Channel, ChannelClosed, ChannelCorrupt, ChannelError, ChannelTimeout, Listener
from deployments.frames import MAX_FRAME_BYTES, encode
from deployments.messages import Cancel, CompactPart, CompactStep, Hidden, SamplingParams, SequenceStart

SECRET = b"s" * 32


@contextlib.asynccontextmanager
async def pair():
    """A connected pair: (connector, acceptor)."""
    accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def hold(channel: Channel) -> None:
        accepted.set_result(channel)
        await done.wait()

    listener = Listener(hold, SECRET)
    address = await listener.start("127.0.0.1")
    connector = await Channel.connect(address, SECRET)
    try:
        yield connector, await accepted
    finally:
        done.set()
        connector.close()
        await connector.wait_closed()
        await listener.stop()


async def test_messages_and_buffers_arrive_unchanged_and_in_order() -> None:
    sampling = SamplingParams(max_tokens=5, stop=("é", "\x00"), logit_bias={7: -1.5})
    step = CompactStep(
        step=3,
        follows=True,
        parts=(CompactPart(1, (4, 5), 0, (9,), True), CompactPart(2, (), 7, (), True, 2)),
        started=(SequenceStart(1, (4, 5), 2, sampling, -(2**63), 0, (2,)),),
        ended=(8, 9),
    )
    hidden = Hidden(step=3, num_tokens=2, hidden_size=4, dtype="float32")
    payload = bytes(range(256)) * 4096
    async with pair() as (left, right):
        for _ in range(3):
            await left.send(step)
            await left.send(hidden, [payload, b"", memoryview(payload)[5:90]])
        for _ in range(3):
            assert await right.receive(5) == (step, [])
            assert await right.receive(5) == (hidden, [payload, b"", payload[5:90]])
        await right.send(Cancel(request_id="x"))
        assert await left.receive(5) == (Cancel(request_id="x"), [])


async def test_the_wrong_secret_is_turned_away_and_disturbs_nobody() -> None:
    async with pair() as (left, right):
        host, port = left.peer.split(":")
        with pytest.raises(ChannelError):
            stranger = await Channel.connect(f"{host}:{port}", b"wrong" * 8)
            await stranger.receive(5)
        await left.send(Cancel(request_id="still here"))
        assert (await right.receive(5))[0] == Cancel(request_id="still here")


async def test_a_handshake_that_fails_leaves_no_connection_open() -> None:
    left = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the connector closes
        left.set()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1")
    host, port = server.sockets[0].getsockname()
    with pytest.raises(ChannelTimeout, match="did not answer"):
        await Channel.connect(f"{host}:{port}", SECRET, timeout_s=0.05)
    await asyncio.wait_for(left.wait(), 5)
    server.close()


async def test_a_listener_that_stops_ends_the_handshakes_under_way() -> None:
    async def hold(channel: Channel) -> None:
        await channel.receive()

    listener = Listener(hold, SECRET)
    host, port = (await listener.start("127.0.0.1")).split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    await reader.readexactly(16)
    await listener.stop()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_a_peer_that_dies_is_closed_at_once() -> None:
    async with pair() as (left, right):
        waiting = asyncio.create_task(left.receive())
        right.close()
        with pytest.raises(ChannelClosed):
            await asyncio.wait_for(waiting, 5)


async def test_a_silent_peer_is_a_timeout_and_ends_the_connection() -> None:
    async with pair() as (left, right):
        with pytest.raises(ChannelTimeout, match=r"silent for 0\.05 s"):
            await left.receive(0.05)
        with pytest.raises(ChannelClosed):
            await right.receive(5)


def frame(*buffers: bytes) -> bytearray:
    return bytearray(b"".join(bytes(part) for part in encode(Cancel(request_id="abc"), buffers)))


def flip(data: bytearray, index: int) -> bytes:
    data[index] ^= 0x40
    return bytes(data)


def head(body_bytes: int, *lengths: int) -> bytes:
    """A head whose checksums are right."""
    raw_lengths = struct.pack(f"<{len(lengths)}I", *lengths)
    rest = struct.pack("<IIII", zlib.crc32(raw_lengths), 0, body_bytes, len(lengths))
    return b"MNT2" + struct.pack("<I", zlib.crc32(rest)) + rest + raw_lengths


@pytest.mark.parametrize("index", range(len(frame(b"hidden"))))
async def test_a_flipped_bit_anywhere_is_refused_at_once_while_the_connection_stays_open(index: int) -> None:
    async with pair() as (left, right):
        left._wire.transport.write(flip(frame(b"hidden"), index))
        with pytest.raises(ChannelCorrupt):
            await right.receive(5)


@pytest.mark.parametrize(
    "wire",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        head(MAX_FRAME_BYTES + 1),
        head(4, *[1] * 65),
        head(4, 2**32 - 1),
        bytes(frame(b"hidden"))[:-3],
        bytes(frame())[:7],
    ],
)
async def test_a_damaged_or_truncated_frame_is_refused(wire: bytes) -> None:
    async with pair() as (left, right):
        left._wire.transport.write(wire)
        left._wire.transport.write_eof()
        with pytest.raises(ChannelCorrupt):
            await right.receive(5)


async def test_a_frame_above_the_limit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="exceeds the frame limit"):
        encode(Hidden(step=0, num_tokens=1, hidden_size=1, dtype="float32"), [memoryview(bytearray(MAX_FRAME_BYTES))])


@pytest.mark.parametrize(
    "scenario",
    [
        test_messages_and_buffers_arrive_unchanged_and_in_order,
        test_the_wrong_secret_is_turned_away_and_disturbs_nobody,
        test_a_listener_that_stops_ends_the_handshakes_under_way,
        test_a_peer_that_dies_is_closed_at_once,
        test_a_silent_peer_is_a_timeout_and_ends_the_connection,
        lambda: test_a_damaged_or_truncated_frame_is_refused(bytes(frame(b"hidden"))[:-3]),
        lambda: test_a_flipped_bit_anywhere_is_refused_at_once_while_the_connection_stays_open(3),
    ],
)
def test_the_same_on_the_event_loop_that_ray_gives_its_actors(
    scenario: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
