"""A wire between two processes that passes bytes on, and damages, cuts or holds them when a test says so."""

import asyncio
import contextlib
from typing import Literal

Damage = Literal["flip", "cut", "hold"]


class BadWire:
    """Listens on the loopback and connects each caller to its target; damages what flows at one place, once.

    ``toward`` names the direction that is damaged: to the target or back to the caller. ``at_byte`` counts
    that direction's bytes, handshake included. ``flip`` turns a bit, ``cut`` closes both ends inside a frame,
    ``hold`` passes nothing on any more.
    """

    def __init__(self, damage: Damage, *, toward: Literal["target", "caller"], at_byte: int) -> None:
        self._target = ""
        self.happened = asyncio.Event()
        self._damage = damage
        self._toward = toward
        self._at_byte = at_byte
        self._num_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, target: str) -> str:
        """Returns the address to call instead of ``target``, ``host:port``."""
        self._target = target
        self._server = await asyncio.start_server(self._accept, "127.0.0.1")
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        try:
            with contextlib.suppress(OSError):
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pass_on(reader, far_writer, damaged=self._toward == "target"))
                    group.create_task(self._pass_on(far_reader, writer, damaged=self._toward == "caller"))
        except* OSError:
            pass
        finally:
            writer.close()
            far_writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, damaged: bool) -> None:
        while data := await reader.read(65536):
            position = self._at_byte - self._num_bytes if damaged and not self.happened.is_set() else -1
            if damaged:
                self._num_bytes += len(data)
            if not 0 <= position < len(data):
                writer.write(data)
                continue
            self.happened.set()
            if self._damage == "flip":
                writer.write(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
                continue
            writer.write(data[:position])
            if self._damage == "hold":
                await asyncio.Event().wait()
            break
        writer.close()

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
