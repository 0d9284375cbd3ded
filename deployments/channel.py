"""The Channel: how tokens and activations move between processes.

One TCP connection, one frame per message::

    0      4          8            12            16            20          24                    payload
    | MNT2 | head crc | length crc | payload crc | message len | buffers n | n lengths (u32 each) | message | buffers ..

All integers are little-endian; each CRC-32 covers a part of its own: the rest of the head, the lengths, the payload.
So a damaged length is refused at once and never waited for. The message is msgpack (never pickle), checked against
:data:`deployments.messages.AnyMessage`; buffers are raw bytes (tensors).

Both ends prove that they know the listener's secret before the first frame: each sends a 16-byte nonce, then
HMAC-SHA256(secret, own role + peer's nonce + own nonce). The secret travels by Ray, inside the cluster.

Failure behaviour: a peer that dies is a :class:`ChannelClosed` at once; a peer that is silent beyond the given
deadline is a :class:`ChannelTimeout`; a frame that is too long, truncated, altered or of an unknown type is a
:class:`ChannelCorrupt`, and the connection is closed. Nothing hangs, nothing is resent.
"""

import asyncio
import hmac
import secrets
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

import msgspec

from deployments.messages import AnyMessage

Buffer = bytes | bytearray | memoryview

MAGIC = b"MNT2"
MAX_FRAME_BYTES = 256 * 2**20
HANDSHAKE_TIMEOUT_S = 10.0

_MARK = struct.Struct("<4sI")
_HEAD = struct.Struct("<IIII")
_HEAD_BYTES = _MARK.size + _HEAD.size
_NONCE_BYTES = 16
_MAX_BUFFERS = 64
_SOCKET_BUFFER_BYTES = 4 * 2**20

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


class ChannelError(Exception):
    """Base of all channel failures; the connection is unusable afterwards."""


class ChannelClosed(ChannelError):
    """The peer closed the connection, or died."""


class ChannelTimeout(ChannelError):
    """The peer was silent for longer than the deadline."""


class ChannelCorrupt(ChannelError):
    """What arrived is not a frame of ours: wrong magic, length, checksum or type."""


class ChannelRefused(ChannelError):
    """The peer does not know the secret."""


def encode(message: AnyMessage, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """The parts of one frame, ready for ``writelines``; buffers are not copied."""
    body = _encoder.encode(message)
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    lengths = struct.pack(f"<{len(views)}I", *(len(view) for view in views))
    total = _HEAD_BYTES + len(lengths) + len(body) + sum(len(view) for view in views)
    if total > MAX_FRAME_BYTES:
        raise ValueError(f"a {type(message).__name__} of {total} bytes exceeds the frame limit {MAX_FRAME_BYTES}")
    checksum = zlib.crc32(body)
    for view in views:
        checksum = zlib.crc32(view, checksum)
    head = _HEAD.pack(zlib.crc32(lengths), checksum, len(body), len(views))
    return [_MARK.pack(MAGIC, zlib.crc32(head)) + head + lengths, body, *views]


class Channel:
    """One authenticated connection that carries messages both ways, in order.

    ``send`` may be called from several tasks (a frame is written whole); ``receive`` from one.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        raw: socket.socket | None = writer.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer.transport.set_write_buffer_limits(high=_SOCKET_BUFFER_BYTES)

    @classmethod
    async def connect(cls, address: str, secret: bytes, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> Self:
        """Connect to ``host:port``; raises ChannelClosed, ChannelTimeout or ChannelRefused."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(host, int(port), limit=_SOCKET_BUFFER_BYTES)
                await _prove_or_close(reader, writer, secret, role=b"connector")
        except TimeoutError as error:
            raise ChannelTimeout(f"{address} did not answer within {timeout_s:g} s") from error
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ChannelClosed(f"{address} refused or dropped the connection: {error}") from error
        return cls(reader, writer)

    async def send(self, message: AnyMessage, buffers: Sequence[Buffer] = ()) -> None:
        """Write one frame; waits only while the peer lags by more than the socket buffers."""
        self.send_nowait(message, buffers)
        try:
            await self._writer.drain()
        except OSError as error:
            raise ChannelClosed(f"{self.peer} is gone: {error}") from error

    def send_nowait(self, message: AnyMessage, buffers: Sequence[Buffer] = ()) -> None:
        """Hand one frame to the transport without waiting; ChannelClosed when the connection is gone."""
        if self._writer.is_closing():
            raise ChannelClosed(f"{self.peer} is gone")
        self._writer.writelines(encode(message, buffers))

    async def receive(self, timeout_s: float | None = None) -> tuple[AnyMessage, list[bytes]]:
        """The next message and its buffers; None waits for as long as the connection lives."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._read_frame()
        except TimeoutError as error:
            self.close()
            raise ChannelTimeout(f"{self.peer} was silent for {timeout_s:g} s") from error
        except asyncio.IncompleteReadError as error:
            self.close()
            if error.partial:
                raise ChannelCorrupt(f"{self.peer} stopped inside a frame") from error
            raise ChannelClosed(f"{self.peer} closed the connection") from error
        except ChannelCorrupt:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ChannelClosed(f"{self.peer} is gone: {error}") from error

    async def _read_frame(self) -> tuple[AnyMessage, list[bytes]]:
        raw_head = await self._reader.readexactly(_HEAD_BYTES)
        magic, head_checksum = _MARK.unpack_from(raw_head)
        lengths_checksum, checksum, body_bytes, num_buffers = _HEAD.unpack_from(raw_head, _MARK.size)
        if magic != MAGIC or zlib.crc32(raw_head[_MARK.size :]) != head_checksum or num_buffers > _MAX_BUFFERS:
            raise ChannelCorrupt(f"{self.peer} sent something that is not a frame")
        raw_lengths = await self._continue_frame(4 * num_buffers) if num_buffers else b""
        lengths = struct.unpack(f"<{num_buffers}I", raw_lengths)
        if zlib.crc32(raw_lengths) != lengths_checksum:
            raise ChannelCorrupt(f"{self.peer} sent a frame whose lengths do not match their checksum")
        if body_bytes + sum(lengths) > MAX_FRAME_BYTES:
            raise ChannelCorrupt(f"{self.peer} announced a frame above the limit of {MAX_FRAME_BYTES} bytes")
        body = await self._continue_frame(body_bytes)
        buffers = [await self._continue_frame(length) for length in lengths]
        actual = zlib.crc32(body)
        for buffer in buffers:
            actual = zlib.crc32(buffer, actual)
        if actual != checksum:
            raise ChannelCorrupt(f"{self.peer} sent a frame whose checksum does not match")
        try:
            return _decoder.decode(body), buffers
        except msgspec.MsgspecError as error:
            raise ChannelCorrupt(f"{self.peer} sent a message that does not decode: {error}") from error

    async def _continue_frame(self, num_bytes: int) -> bytes:
        try:
            return await self._reader.readexactly(num_bytes)
        except asyncio.IncompleteReadError as error:
            raise ChannelCorrupt(f"{self.peer} stopped inside a frame") from error

    @property
    def peer(self) -> str:
        """``host:port`` of the other end, for messages."""
        name = self._writer.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if name else "the peer"

    def close(self) -> None:
        """Close at once; what the transport already took may still be delivered."""
        self._writer.close()

    async def wait_closed(self) -> None:
        """Wait until the connection is down (after :meth:`close`)."""
        try:
            await self._writer.wait_closed()
        except OSError:
            return  # it is down, which is all that was asked


Handler = Callable[[Channel], Awaitable[None]]


class Listener:
    """Accepts channels on one address and hands each to ``handler`` in a task of its own.

    Bound to one address of the node, never to all interfaces. A connection that fails the handshake is dropped
    and disturbs nobody else.
    """

    def __init__(self, handler: Handler, secret: bytes | None = None) -> None:
        self.secret = secret if secret is not None else secrets.token_bytes(32)
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    async def start(self, host: str, port: int = 0) -> str:
        """Bind; port 0 lets the system choose. Returns ``host:port``."""
        self._server = await asyncio.start_server(self._accept, host, port, limit=_SOCKET_BUFFER_BYTES)
        bound = self._server.sockets[0].getsockname()
        self.address = f"{bound[0]}:{bound[1]}"
        return self.address

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await _prove_or_close(reader, writer, self.secret, role=b"listener")
        except (TimeoutError, OSError, asyncio.IncompleteReadError, ChannelRefused):
            return
        channel = Channel(reader, writer)
        try:
            await self._handler(channel)
        finally:
            channel.close()

    async def stop(self) -> None:
        """Stop accepting, cancel the handlers, close their connections."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _prove_or_close(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, role: bytes
) -> None:
    """The handshake; a connection on which it fails, or is cut short, is closed."""
    try:
        await _prove(reader, writer, secret, role)
    except BaseException:
        writer.close()
        raise


async def _prove(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, role: bytes) -> None:
    other = b"listener" if role == b"connector" else b"connector"
    own_nonce = secrets.token_bytes(_NONCE_BYTES)
    writer.write(own_nonce)
    peer_nonce = await reader.readexactly(_NONCE_BYTES)
    writer.write(hmac.digest(secret, role + peer_nonce + own_nonce, "sha256"))
    proof = await reader.readexactly(32)
    if not hmac.compare_digest(proof, hmac.digest(secret, other + own_nonce + peer_nonce, "sha256")):
        raise ChannelRefused("the peer does not know the channel's secret")
