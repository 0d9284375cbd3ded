"""The Channel: how tokens and activations move between processes.

One TCP connection, one frame per message (:mod:`deployments.frames`), both ways.

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
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import Self, cast

from deployments.frames import Buffer, CorruptFrame, decode, encode, measure
from deployments.messages import AnyMessage

HANDSHAKE_TIMEOUT_S = 10.0

_NONCE_BYTES = 16
_PROOF_BYTES = 32
_HANDSHAKE_BYTES = 4 * 2**10  # what a peer may send before it has proved anything
_SOCKET_BUFFER_BYTES = 4 * 2**20  # a writer waits when the peer lags by more
_READ_BYTES = 256 * 2**10  # a longer frame gets memory of its own
_MAX_UNREAD_BYTES = 64 * 2**20  # beyond, the socket is not read until the owner has caught up


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


class _Wire(asyncio.BufferedProtocol):
    """One connection's bytes: cut into frames as they arrive, once the handshake is over.

    Bytes are received into one buffer, ``[_start, _stop)`` of which is not used yet; the rest of a frame that does
    not fit is received straight into ``_large``.
    """

    def __init__(self, on_connect: Callable[["_Wire"], None] | None = None) -> None:
        self.transport: asyncio.Transport
        self.frames: deque[tuple[AnyMessage, list[bytes], int]] = deque()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_connect = on_connect
        self._in_frames = False
        self._error: ChannelError | None = None
        self._buffer = bytearray(_HANDSHAKE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0
        self._large: memoryview | None = None
        self._num_filled = 0
        self._num_unread_bytes = 0
        self._is_reading = True
        self._news: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None

    # --- called by the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        raw: socket.socket | None = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport.set_write_buffer_limits(high=_SOCKET_BUFFER_BYTES)
        if self._on_connect is not None:
            self._on_connect(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the transport's suggestion
        if self._large is not None:
            return self._large[self._num_filled :]
        if self._start == self._stop:
            self._start = self._stop = 0
        elif self._stop == len(self._view):
            self._move_to_front()
        return self._view[self._stop :]

    def _move_to_front(self) -> None:
        num_bytes = self._stop - self._start
        self._view[:num_bytes] = bytes(self._view[self._start : self._stop])
        self._start, self._stop = 0, num_bytes

    def buffer_updated(self, nbytes: int) -> None:
        if self._large is not None:
            self._num_filled += nbytes
        else:
            self._stop += nbytes
        if self._in_frames:
            self._cut()
        elif self._stop == len(self._view):
            self._pause()
        self._wake()

    def eof_received(self) -> bool:
        return False  # the transport closes

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._end(ChannelClosed(f"{self.peer} is gone: {exc}"))
        elif self._in_frames and (self._large is not None or self._start != self._stop):
            self._end(ChannelCorrupt(f"{self.peer} stopped inside a frame"))
        else:
            self._end(ChannelClosed(f"{self.peer} closed the connection"))
        if not self.lost.done():
            self.lost.set_result(None)
        self.resume_writing()

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # --- frames ---

    def begin_frames(self) -> None:
        """The handshake is over: what comes now, or has come already, is frames."""
        self._in_frames = True
        view = self._view[self._start : self._stop]
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._view[: len(view)] = view
        self._start, self._stop = 0, len(view)
        self._resume()
        self._cut()

    def _cut(self) -> None:
        """Take every whole frame out of the buffer."""
        try:
            while self._error is None and (frame := self._next_frame()) is not None:
                view, lengths = frame
                self.frames.append((*decode(view, lengths), len(view)))
                self._num_unread_bytes += len(view)
        except CorruptFrame as error:
            self._end(ChannelCorrupt(f"{self.peer} {error}"))
            self.transport.abort()
        if self._num_unread_bytes > _MAX_UNREAD_BYTES:
            self._pause()

    def _pause(self) -> None:
        if self._is_reading and not self.transport.is_closing():
            self._is_reading = False
            self.transport.pause_reading()

    def _resume(self) -> None:
        if not self._is_reading and not self.transport.is_closing():
            self._is_reading = True
            self.transport.resume_reading()

    def _next_frame(self) -> tuple[memoryview, tuple[int, ...]] | None:
        if self._large is not None:
            if self._num_filled < len(self._large):
                return None
            view, self._large = self._large, None
            measured = measure(view)
            assert measured is not None, "its head was complete when its memory was taken; this is a bug"
            return view, measured[1]
        unread = self._view[self._start : self._stop]
        measured = measure(unread)
        if measured is None:
            return None
        num_bytes, lengths = measured
        if num_bytes <= len(unread):
            self._start += num_bytes
            return unread[:num_bytes], lengths
        if num_bytes > len(self._view):
            self._large = memoryview(bytearray(num_bytes))
            self._large[: len(unread)] = unread
            self._num_filled = len(unread)
            self._start = self._stop
        elif self._start + num_bytes > len(self._view):
            self._move_to_front()
        return None

    # --- for the channel ---

    def _end(self, error: ChannelError) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def wait_news(self) -> None:
        """Until more has arrived, or the connection has ended."""
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    async def read(self, num_bytes: int) -> bytes:
        """Exactly so many bytes of the handshake; raises the connection's end."""
        while self._stop - self._start < num_bytes:
            if self._error is not None:
                raise self._error
            await self.wait_news()
        self._start += num_bytes
        return bytes(self._view[self._start - num_bytes : self._start])

    def take_frame(self) -> tuple[AnyMessage, list[bytes]] | None:
        """The oldest frame, if there is one; after the last one raises the connection's end."""
        if not self.frames:
            if self._error is not None:
                raise self._error
            return None
        message, buffers, num_bytes = self.frames.popleft()
        self._num_unread_bytes -= num_bytes
        if self._num_unread_bytes < _MAX_UNREAD_BYTES // 2:
            self._resume()
        return message, buffers

    async def drain(self) -> None:
        """Wait while the peer lags too far behind; raises when the connection is gone."""
        if self._writable is not None:
            await asyncio.shield(self._writable)
        if self._error is not None and self.transport.is_closing():
            raise self._error

    @property
    def peer(self) -> str:
        """``host:port`` of the other end, for messages."""
        name = self.transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if name else "the peer"


class Channel:
    """One authenticated connection that carries messages both ways, in order.

    ``send`` may be called from several tasks (a frame is written whole); ``receive`` from one. A buffer that is sent
    must not be written to afterwards: the transport may still hold it.
    """

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        wire.begin_frames()

    @classmethod
    async def connect(cls, address: str, secret: bytes, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> Self:
        """Connect to ``host:port``; raises ChannelClosed, ChannelTimeout or ChannelRefused."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(timeout_s):
                _, wire = await asyncio.get_running_loop().create_connection(_Wire, host, int(port))
                await _prove_or_close(wire, secret, role=b"connector")
        except TimeoutError as error:
            raise ChannelTimeout(f"{address} did not answer within {timeout_s:g} s") from error
        except (OSError, ChannelClosed) as error:
            raise ChannelClosed(f"{address} refused or dropped the connection: {error}") from error
        return cls(wire)

    async def send(self, message: AnyMessage, buffers: Sequence[Buffer] = ()) -> None:
        """Write one frame; waits only while the peer lags by more than the socket buffers."""
        self.send_nowait(message, buffers)
        await self.drain()

    def send_nowait(self, message: AnyMessage, buffers: Sequence[Buffer] = ()) -> None:
        """Hand one frame to the transport without waiting; ChannelClosed when the connection is gone."""
        self.send_encoded(encode(message, buffers))

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        """Hand over what :func:`encode` made, perhaps for several channels; ChannelClosed when this one is gone."""
        transport = self._wire.transport
        if transport.is_closing():
            raise ChannelClosed(f"{self.peer} is gone")
        for part in parts:
            transport.write(part)

    async def drain(self) -> None:
        """Wait while the peer lags by more than the socket buffers; ChannelClosed when it is gone."""
        await self._wire.drain()

    async def receive(self, timeout_s: float | None = None) -> tuple[AnyMessage, list[bytes]]:
        """The next message and its buffers; None waits for as long as the connection lives."""
        while (frame := self._wire.take_frame()) is None:
            try:
                async with asyncio.timeout(timeout_s) if timeout_s is not None else nullcontext():
                    await self._wire.wait_news()
            except TimeoutError as error:
                self.close()
                raise ChannelTimeout(f"{self.peer} was silent for {timeout_s:g} s") from error
        return frame

    @property
    def peer(self) -> str:
        """``host:port`` of the other end, for messages."""
        return self._wire.peer

    def close(self) -> None:
        """Close at once; what the transport already took may still be delivered."""
        self._wire.transport.close()

    async def wait_closed(self) -> None:
        """Wait until the connection is down (after :meth:`close`)."""
        await asyncio.shield(self._wire.lost)


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
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Wire(self._accept), host, port)
        bound = self._server.sockets[0].getsockname()
        self.address = f"{bound[0]}:{bound[1]}"
        return self.address

    def _accept(self, wire: _Wire) -> None:
        task = asyncio.create_task(self._serve(wire))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, wire: _Wire) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await _prove_or_close(wire, self.secret, role=b"listener")
        except (TimeoutError, ChannelError):
            return
        channel = Channel(wire)
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


async def _prove_or_close(wire: _Wire, secret: bytes, role: bytes) -> None:
    """The handshake; a connection on which it fails, or is cut short, is closed."""
    try:
        await _prove(wire, secret, role)
    except BaseException:
        wire.transport.close()
        raise


async def _prove(wire: _Wire, secret: bytes, role: bytes) -> None:
    other = b"listener" if role == b"connector" else b"connector"
    own_nonce = secrets.token_bytes(_NONCE_BYTES)
    wire.transport.write(own_nonce)
    peer_nonce = await wire.read(_NONCE_BYTES)
    wire.transport.write(hmac.digest(secret, role + peer_nonce + own_nonce, "sha256"))
    proof = await wire.read(_PROOF_BYTES)
    if not hmac.compare_digest(proof, hmac.digest(secret, other + own_nonce + peer_nonce, "sha256")):
        raise ChannelRefused("the peer does not know the channel's secret")
