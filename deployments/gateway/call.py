"""One HTTP request on its way through the gateway: its identity, its limits, and what has been seen of it."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from cluster.plan.types import GatewaySettings
from deployments.gateway.closing import Closing
from deployments.gateway.errors import CLIENT_GONE_STATUS, ApiError, as_api_error
from deployments.gateway.telemetry import Telemetry
from deployments.messages import Delta, Started, ToolFormat

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Call:
    """``request_id`` is the client's or ours, ``unique_id`` always ours; times are of the running loop's clock."""

    request_id: str
    unique_id: str
    endpoint: str
    settings: GatewaySettings
    arrived_at: float
    telemetry: Telemetry
    closing: Closing
    model: str = ""
    user: str | None = None
    failure: ApiError | None = None
    client_gone: bool = False
    has_token: bool = False
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    tool_format: ToolFormat | None = None
    """How the model writes calls of tools, once it has started."""

    @property
    def deadline(self) -> float:
        """When the request must have been answered."""
        return self.arrived_at + self.settings.request_timeout_s

    def limit(self) -> AbstractAsyncContextManager[None]:
        """Every wait of the request is under this: it ends at the deadline, or when the process has to stop."""
        return self.closing.limit(self.deadline)

    @property
    def elapsed_s(self) -> float:
        """Time since the request arrived."""
        return asyncio.get_running_loop().time() - self.arrived_at

    @property
    def remaining_s(self) -> float:
        """Time left before the deadline; never negative."""
        return max(0.0, self.settings.request_timeout_s - self.elapsed_s)

    def backend_id(self, index: int = 0) -> str:
        """Request id of the ``index``-th request to the backend: unique, and begins with the client's id."""
        own = self.unique_id if self.request_id == self.unique_id else f"{self.request_id}-{self.unique_id}"
        return f"{own}-{index}"

    def note_started(self, started: Started) -> None:
        """Count the prompt, and note how calls will be written."""
        self.num_prompt_tokens += started.num_prompt_tokens
        self.num_cached_tokens += started.num_cached_tokens
        self.tool_format = started.tool_format

    def note_delta(self, delta: Delta) -> None:
        """Count generated tokens; the first is an event of its own."""
        self.num_completion_tokens += len(delta.token_ids)
        if not self.has_token and delta.token_ids:
            self.has_token = True
            self.telemetry.first_token(endpoint=self.endpoint, model=self.model, seconds=self.elapsed_s)

    def fail(self, error: BaseException) -> ApiError:
        """Remember ``error`` as the outcome, and return what the client is told; a bug is logged with its trace."""
        self.failure = as_api_error(error, self.request_id, self.settings.request_timeout_s)
        if self.failure.code == "internal":
            extra = {"request_id": self.request_id, "endpoint": self.endpoint, "model": self.model}
            logger.error("request %s failed: %s", self.request_id, error, exc_info=error, extra=extra)
        return self.failure

    def close(self) -> None:
        """Report the outcome, once, when nothing more will be sent."""
        seconds = self.elapsed_s
        failure = self.failure
        status = CLIENT_GONE_STATUS if self.client_gone else failure.status if failure else 200
        if failure is not None and not self.client_gone:
            self.telemetry.refused(
                endpoint=self.endpoint, model=self.model, status=status, code=failure.code, seconds=seconds
            )
        else:
            self.telemetry.finished(
                endpoint=self.endpoint,
                model=self.model,
                status=status,
                seconds=seconds,
                num_prompt_tokens=self.num_prompt_tokens,
                num_cached_tokens=self.num_cached_tokens,
                num_completion_tokens=self.num_completion_tokens,
            )
        extra = {
            "request_id": self.request_id,
            "endpoint": self.endpoint,
            "model": self.model,
            "user": self.user,
            "status": status,
            "seconds": round(seconds, 6),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_completion_tokens": self.num_completion_tokens,
        }
        logger.info("request %s %s: %d in %.3f s", self.request_id, self.endpoint, status, seconds, extra=extra)
