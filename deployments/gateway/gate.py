"""Every HTTP request enters here and every failure leaves here: request id, permit, error body, outcome reported."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.plan.types import GatewaySettings
from deployments.gateway.admission import Permits
from deployments.gateway.call import Call
from deployments.gateway.closing import Closing
from deployments.gateway.errors import ApiError, ClientGone
from deployments.gateway.protocol import STALL_TIMEOUT_S, STALLED
from deployments.gateway.telemetry import Telemetry

MODEL_ENDPOINTS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify", "/tokenize", "/detokenize"}
)
MAX_REQUEST_ID_CHARS = 128

logger = logging.getLogger(__name__)


class Gate:
    """ASGI middleware around the application; holds no request, only who is inside."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Callable[[], GatewaySettings],
        telemetry: Telemetry,
        permits: Permits,
        closing: Closing,
    ) -> None:
        self._app = app
        self._settings = settings
        self._telemetry = telemetry
        self._permits = permits
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: refuse it, or let it through and report how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = self._open(scope)
        scope.setdefault("state", {})["call"] = call
        counted = scope["method"] == "POST" and call.endpoint in MODEL_ENDPOINTS
        if not counted:
            await self._pass(call, scope, receive, send, counted=False)
            return
        self._telemetry.started(endpoint=call.endpoint)
        try:
            await self._pass(call, scope, receive, send, counted=True)
        finally:
            call.close()

    def _own_headers(self, call: Call) -> list[tuple[bytes, bytes]]:
        """What every response carries beside its own headers."""
        own = [(b"x-request-id", call.request_id.encode())]
        return [*own, (b"connection", b"close")] if self._closing.is_closing else own

    def _open(self, scope: Scope) -> Call:
        unique_id = secrets.token_hex(12)
        return Call(
            request_id=unique_id,
            unique_id=unique_id,
            endpoint=scope["path"].removeprefix(scope.get("root_path", "")),
            settings=self._settings(),
            arrived_at=asyncio.get_running_loop().time(),
            telemetry=self._telemetry,
            closing=self._closing,
        )

    async def _pass(self, call: Call, scope: Scope, receive: Receive, send: Send, *, counted: bool) -> None:
        answering = False

        def send_tagged(message: Message) -> Awaitable[None]:
            nonlocal answering
            if message["type"] == "http.response.start":
                answering = True
                message = {**message, "headers": [*message.get("headers", ()), *self._own_headers(call)]}
            return send(message)

        try:
            call.request_id = _request_id(scope) or call.unique_id
            if not counted:
                await self._app(scope, receive, send_tagged)
                return
            with self._permits.hold(call):
                await self._app(scope, receive, send_tagged)
        except ClientGone:
            if scope["state"].get(STALLED):
                call.fail(ApiError("client_too_slow", f"The client took nothing for {STALL_TIMEOUT_S:g} s."))
            else:
                call.client_gone = True
        except asyncio.CancelledError:
            call.client_gone = True
            raise
        except Exception as error:
            failure = call.fail(error)
            if answering:  # too late for a status: the server cuts the connection, which the client notices
                raise
            await error_response(failure)(scope, receive, send_tagged)


def error_response(failure: ApiError) -> Response:
    """``failure`` as an HTTP response in OpenAI's shape."""
    return Response(failure.body(), failure.status, failure.headers, media_type="application/json")


def _request_id(scope: Scope) -> str | None:
    """The client's ``x-request-id``; ApiError where it is not 1 to 128 printable ASCII characters."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if not 1 <= len(value) <= MAX_REQUEST_ID_CHARS or not all(32 <= byte < 127 for byte in value):
                limit = f"1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters"
                raise ApiError("invalid_header", f"The header x-request-id must be {limit}.", param="x-request-id")
            return str(value, "ascii")
    return None
