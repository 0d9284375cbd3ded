"""The one table of what can go wrong: a code or an exception in, an HTTP status and OpenAI's error body out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from starlette.exceptions import HTTPException

from deployments.channel import ChannelError
from deployments.messages import RequestRefused


class Kind(NamedTuple):
    """HTTP status and OpenAI error ``type`` of one code."""

    status: int
    type: str


_INVALID = Kind(400, "invalid_request_error")

KINDS: Mapping[str, Kind] = {
    # The request's JSON
    "invalid_json": _INVALID,
    "invalid_encoding": _INVALID,
    "duplicate_key": _INVALID,
    "invalid_unicode": _INVALID,
    "invalid_header": _INVALID,
    "invalid_http": _INVALID,
    "head_too_large": Kind(431, "invalid_request_error"),
    # One field of it
    "missing_required_parameter": _INVALID,
    "unknown_parameter": _INVALID,
    "unsupported_parameter": _INVALID,
    "unsupported_value": _INVALID,
    "invalid_type": _INVALID,
    "invalid_value": _INVALID,
    "below_min_value": _INVALID,
    "above_max_value": _INVALID,
    "empty_array": _INVALID,
    "array_above_max_length": _INVALID,
    "empty_string": _INVALID,
    "string_above_max_length": _INVALID,
    "conflicting_parameters": _INVALID,
    # Which model and where
    "model_not_found": Kind(404, "invalid_request_error"),
    "wrong_endpoint": _INVALID,
    "unknown_url": Kind(404, "invalid_request_error"),
    "method_not_allowed": Kind(405, "invalid_request_error"),
    # What replicas answer (deployments.messages.RefusalCode)
    "invalid_request": _INVALID,
    "context_length_exceeded": _INVALID,
    "unsupported": _INVALID,
    "overloaded": Kind(429, "rate_limit_error"),
    "deadline_exceeded": Kind(408, "timeout_error"),
    "draining": Kind(503, "service_unavailable_error"),
    "internal": Kind(500, "server_error"),
    # The gateway's own
    "body_too_large": Kind(413, "invalid_request_error"),
    "client_too_slow": Kind(408, "timeout_error"),
    "unavailable": Kind(503, "service_unavailable_error"),
    "http_error": Kind(500, "server_error"),
}


class ApiError(Exception):
    """A failure as the client will see it; ``code`` is a key of :data:`KINDS`, ``param`` the field at fault."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.extra_headers = dict(headers or {})

    @property
    def status(self) -> int:
        """HTTP status."""
        return KINDS[self.code].status

    @property
    def headers(self) -> dict[str, str]:
        """Response headers beside the usual ones; Retry-After is whole seconds, at least 1."""
        if self.retry_after_s is None:
            return self.extra_headers
        return self.extra_headers | {"retry-after": str(max(1, -int(-self.retry_after_s // 1)))}

    def body(self) -> bytes:
        """``{"error": {"message", "type", "param", "code"}}`` as JSON."""
        return msgspec.json.encode({"error": self.as_dict()})

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"message": self.message, "type": KINDS[self.code].type, "param": self.param, "code": self.code}


class ClientGone(Exception):
    """The client closed the connection before the answer was complete; there is nobody to tell."""


CLIENT_GONE_STATUS = 499


def as_api_error(error: BaseException, request_id: str, timeout_s: float) -> ApiError:
    """What the client is told about ``error``; anything not foreseen is ``internal`` and shows no detail."""
    match error:
        case ApiError():
            return error
        case RequestRefused(refused=refused) if refused.code == "internal":  # may tell of hosts and of our code
            return ApiError("internal", f"The model could not finish this request. Request id: {request_id}.")
        case RequestRefused():
            refused = error.refused
            return ApiError(refused.code, refused.message, param=refused.param, retry_after_s=refused.retry_after_s)
        case TimeoutError():
            return ApiError("deadline_exceeded", f"The request took longer than the limit of {timeout_s:g} s.")
        case ChannelError():
            message = "The connection to the model broke. The request may be sent again."
            return ApiError("unavailable", message, retry_after_s=1.0)
        case HTTPException():
            return _from_http(error)
    return ApiError("internal", f"Internal error: this is a bug in the server. Request id: {request_id}.")


def _from_http(error: HTTPException) -> ApiError:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return ApiError("unknown_url", "Unknown request URL. GET /openapi.json lists the endpoints.", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", ""))
        return ApiError("method_not_allowed", f"Method not allowed here; allowed: {allowed}.", headers=headers)
    return ApiError("http_error", str(error.detail), headers=headers)
