"""A backend in, the FastAPI application out."""

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deployments.gateway.admission import Permits
from deployments.gateway.backend import Backend
from deployments.gateway.call import Call
from deployments.gateway.closing import Closing
from deployments.gateway.gate import Gate, error_response
from deployments.gateway.http import Endpoints
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
    app = FastAPI(title="Manta", version="1", description=_DESCRIPTION, redirect_slashes=False, redoc_url=None)
    app.add_middleware(
        Gate,
        settings=lambda: backend.table.settings,
        telemetry=telemetry if telemetry is not None else NoTelemetry(),
        permits=permits,
        closing=closing,
    )
    app.add_exception_handler(HTTPException, _answer_http_error)  # type: ignore[arg-type]
    Endpoints(backend, heartbeat_s, permits, closing).add_to(app)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own 404 and 405, in OpenAI's shape."""
    call: Call = request.state.call
    return error_response(call.fail(error))
