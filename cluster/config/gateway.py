"""The ``gateway:`` section: where HTTP is served, and how much one request or client may ask for."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

from cluster.config.base import Bytes, PositiveSeconds, StrictModel, at_least_bytes, refuse
from cluster.config.nodes import Amount, Port


def _check_host(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(
        r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9A-Fa-f:]*::?[0-9A-Fa-f:]*", value
    ):
        refuse(
            "is not a host name or address",
            limit="a name or an address without scheme and port",
            remedy="write 127.0.0.1 for this machine only, 0.0.0.0 for every network interface",
        )
    return value


class HttpSection(StrictModel):
    """The address of the HTTP endpoint."""

    host: Annotated[str, BeforeValidator(_check_host, json_schema_input_type=str)] = "127.0.0.1"
    """Address to listen on; ``0.0.0.0`` opens it to the network, without authentication."""
    port: Port = 8000
    """Port to listen on."""


class LimitsSection(StrictModel):
    """What one request may ask for, and how many there may be."""

    max_body: Annotated[Bytes, at_least_bytes(1024)] = 8 * 2**20
    """Largest request body; a larger one is refused with 413."""
    max_streams: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Requests in flight in one gateway replica; one more is refused with 429."""
    max_choices: Annotated[int, Field(ge=1, le=1024)] = 16
    """Largest ``n`` of a request."""
    max_stop_strings: Annotated[int, Field(ge=0, le=1024)] = 16
    """Most stop strings of a request."""
    max_logprobs: Annotated[int, Field(ge=0, le=1000)] = 20
    """Most alternatives per token in ``logprobs`` and ``top_logprobs``."""
    request_timeout: PositiveSeconds = 600.0
    """Longest life of a request at the gateway, after which it ends with an error."""


class GatewaySection(StrictModel):
    """The HTTP front: OpenAI-compatible, one for all models."""

    http: HttpSection = HttpSection()
    """Where it listens."""
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    """Gateway processes; add some when one cannot keep up with the number of streams."""
    cpus: Amount = 0.1
    """Cores each gateway process reserves in Ray; it may use more when they are idle."""
    drain_timeout: PositiveSeconds = 60.0
    """How long a gateway process that is replaced or stopped lets requests finish; then they end with an error."""
    limits: LimitsSection = LimitsSection()
    """What requests may ask for; changed in place, without a restart."""
