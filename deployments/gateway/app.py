"""A backend in, the FastAPI application out."""

from collections.abc import Mapping
from functools import partial

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.admission import Permits
from deployments.gateway.backend import Backend
from deployments.gateway.call import Call
from deployments.gateway.closing import Closing
from deployments.gateway.gate import Gate, error_response
from deployments.gateway.http import Endpoint, Endpoints
from deployments.gateway.openapi import document
from deployments.gateway.sse import HEARTBEAT_S
from deployments.gateway.telemetry import NoTelemetry, Telemetry

_DESCRIPTION = (
    "Models behind OpenAI's API. Every field is either honoured or refused with a 400 that names it; every error is "
    '`{"error": {"message", "type", "param", "code"}}`.'
)


def create_app(
    backend: Backend,
    telemetry: Telemetry | None = None,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    closing: Closing | None = None,
) -> FastAPI:
    """The gateway over ``backend``.

    Limits are ``backend.table.settings``, read at every request, so that a new table is in force at once. A stream
    that is silent for ``heartbeat_s`` gets a comment. ``closing`` is that of the server, which knows when it stops.
    """
    permits, closing = Permits(), closing if closing is not None else Closing()
    endpoints = Endpoints(backend, heartbeat_s, permits, closing)
    gate = partial(
        Gate,
        settings=lambda: backend.table.settings,
        telemetry=telemetry if telemetry is not None else NoTelemetry(),
        permits=permits,
        closing=closing,
    )
    app = GatewayApi({path: gate(_Direct(endpoint)) for path, endpoint in endpoints.by_model.items()})
    app.add_middleware(gate)
    app.add_exception_handler(HTTPException, _answer_http_error)  # type: ignore[arg-type]
    endpoints.add_to(app)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


class GatewayApi(FastAPI):
    """FastAPI, except for ``direct`` (path to application): POSTs there pass none of its layers.

    The layers cost more than a third of the CPU time of a short request. FastAPI knows the routes all the same: it
    documents them and answers wrong methods.
    """

    def __init__(self, direct: Mapping[str, ASGIApp]) -> None:
        super().__init__(title="Manta", version="1", description=_DESCRIPTION, redirect_slashes=False, redoc_url=None)
        self._direct = direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        direct = self._direct.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if direct is None:
            await super().__call__(scope, receive, send)
        else:
            await direct(scope, receive, send)


class _Direct:
    """One endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own 404 and 405, in OpenAI's shape."""
    call: Call = request.state.call
    return error_response(call.fail(error))
