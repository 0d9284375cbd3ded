"""A backend in, the FastAPI application out."""

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deployments.gateway.admission import Permits
from deployments.gateway.backend import Backend
from deployments.gateway.call import Call
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
    answers_request_id: bool = True,
) -> FastAPI:
    """The gateway over ``backend``.

    Limits are ``backend.table.settings``, read at every request, so that a new table is in force at once. A stream
    that is silent for ``heartbeat_s`` gets a comment. ``answers_request_id`` is False behind a server that writes the
    ``x-request-id`` response header itself, as Ray Serve does: it would be there twice.
    """
    permits = Permits()
    app = FastAPI(title="Manta", version="1", description=_DESCRIPTION, redirect_slashes=False, redoc_url=None)
    app.add_middleware(
        Gate,
        settings=lambda: backend.table.settings,
        telemetry=telemetry if telemetry is not None else NoTelemetry(),
        permits=permits,
        answers_request_id=answers_request_id,
    )
    app.add_exception_handler(HTTPException, _answer_http_error)  # type: ignore[arg-type]
    Endpoints(backend, heartbeat_s, permits).add_to(app)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own 404 and 405, in OpenAI's shape."""
    call: Call = request.state.call
    return error_response(call.fail(error))
