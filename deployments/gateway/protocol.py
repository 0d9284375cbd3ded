"""One HTTP/1.1 connection: uvicorn's protocol over httptools, with the limits that it leaves open.

A head (request line and headers) must be short and come soon, a client must take what it is sent, and a connection
of a process that is being stopped does not stay for long. None of it costs anything per token.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from deployments.gateway.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0
STALL_TIMEOUT_S = 30.0
"""A client that has not taken 48 KiB of what waits for it within this time is too slow."""
CLOSING_IDLE_S = 5.0

STALLED = "stalled"
"""Key in a request's ASGI state, there when its connection was broken off because the client was too slow."""


class ConnectionState(ServerState):
    """uvicorn's state of all connections, and an event for whoever waits for their end."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = asyncio.Event()


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits; ``server_state`` is a :class:`ConnectionState`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes = 0
        self._in_head = True
        self._refusal = ApiError("invalid_http", "This is not a valid HTTP/1.1 request.")
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._is_closing = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected; its first request is due."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._clear_head_timer()
        self._clear_stall_timer()
        super().connection_lost(exc)
        assert isinstance(self.server_state, ConnectionState)
        self.server_state.lost.set()

    def data_received(self, data: bytes) -> None:
        """Parse; refuse a head that does not end."""
        was_in_head = self._in_head
        super().data_received(data)
        if self.transport.is_closing() or not self._in_head:
            return
        self._head_bytes += len(data) if was_in_head else 1  # it began somewhere in ``data``
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        elif self._head_timer is None:
            self._expect_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        self._head_bytes = 0
        self._clear_head_timer()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            raise ValueError(self._refusal.message)  # the parser gives it to send_400_response
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's words; ours are in OpenAI's shape)
        """Answer what cannot be parsed, and close."""
        self._refuse(self._refusal)

    def _refuse(self, refusal: ApiError) -> None:
        """Answer without a request, unless an answer is under way, and close."""
        if self.cycle is None or self.cycle.response_complete:
            body = refusal.body()
            head = (
                f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _expect_head(self) -> None:
        timeout_s = CLOSING_IDLE_S if self._is_closing else HEAD_TIMEOUT_S
        self._head_timer = self.loop.call_later(timeout_s, self._give_up_head)

    def _give_up_head(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_head()  # the part of a next request came during an answer
        elif self._head_bytes:
            self._refuse(ApiError("client_too_slow", f"No whole request came within {HEAD_TIMEOUT_S:g} s."))
        else:
            self.transport.close()

    def _clear_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        """The client lags by more than the transport's buffer."""
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self._break_off)

    def resume_writing(self) -> None:
        """It took nearly all of it."""
        self._clear_stall_timer()
        super().resume_writing()

    def _break_off(self) -> None:
        """The request ends as if the client had left; closing in good order would wait for it."""
        if self.cycle is not None:
            self.cycle.scope["state"][STALLED] = True
        self.transport.abort()

    def _clear_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def begin_closing(self) -> None:
        """Close soon when idle. Not at once: a request may be on its way, and its client would see a broken one."""
        self._is_closing = True
        self.timeout_keep_alive = min(self.timeout_keep_alive, int(CLOSING_IDLE_S))
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = self.loop.call_later(CLOSING_IDLE_S, self.timeout_keep_alive_handler)
        elif self._head_timer is not None:
            self._clear_head_timer()
            self._expect_head()


def _head_too_large() -> ApiError:
    return ApiError("head_too_large", f"Request line and headers exceed the limit of {MAX_HEAD_BYTES} bytes.")
