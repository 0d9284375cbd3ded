"""Accepting connections from a listening socket that other processes accept from too.

Not the event loop's own server: when that is closed, connections it has accepted and not yet given a protocol are
lost, and their clients wait or see them closed without an answer.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

_BATCH = 64
"""Connections accepted in one turn of the loop, so that a crowd does not hold up the streams."""
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NO_ROOM_PAUSE_S = 1.0

logger = logging.getLogger(__name__)


class Acceptor:
    """Gives each connection of ``listening``, which does not block, a protocol of ``factory``; runs on one loop."""

    def __init__(self, listening: socket.socket, factory: Callable[[], asyncio.Protocol]) -> None:
        self._listening = listening
        self._factory = factory
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._watch()

    def _watch(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                logger.exception("no connection can be accepted; tried again in %g s", _NO_ROOM_PAUSE_S)
                self._loop.remove_reader(self._listening)
                self._pause = self._loop.call_later(_NO_ROOM_PAUSE_S, self._watch)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._start(connection))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, connection)
        except OSError as error:  # the client is gone already
            logger.debug("a connection ended at once: %s", error)
            connection.close()

    async def stop(self) -> None:
        """Accept no more and close the socket; returns when every accepted connection has its protocol."""
        if self._listening.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()
        if self._starting:
            await asyncio.wait(tuple(self._starting))
