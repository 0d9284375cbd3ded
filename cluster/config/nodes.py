"""The ``cluster:`` section: who starts Ray, which machines there are, and how Manta's code reaches them."""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field

from cluster.config.base import Bytes, Name, StrictModel, at_least_bytes, refuse

Port = Annotated[int, Field(ge=1, le=65535)]
Amount = Annotated[float, Field(ge=0, le=1_000_000)]


def _read_dashboard(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"https?://[A-Za-z0-9._\[\]:-]+/?", value):
        refuse(
            "is not the address of a Ray dashboard",
            limit="http://HOST:PORT",
            remedy="write the address that `ray start` printed, such as http://127.0.0.1:8265",
        )
    return value.rstrip("/")


def _read_temp_dir(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"/[^\s\0]+", value):
        refuse(
            "is not an absolute path without spaces",
            limit="an absolute, short path",
            remedy="write one such as /tmp/manta, or remove the line to take the default",
        )
    return value.rstrip("/")


class LocalProvider(StrictModel):
    """Starts Ray on this machine, reachable from this machine only, and stops only what it started."""

    kind: Literal["local"] = "local"
    """``local`` starts Ray on this machine; ``existing`` attaches to a running cluster."""
    ray_port: Port = 6379
    """Port of Ray's control store (GCS). Change it when another Ray already runs on this machine."""
    dashboard_port: Port = 8265
    """Port of the Ray dashboard. Change it when another Ray already runs on this machine."""
    temp_dir: Annotated[str, BeforeValidator(_read_temp_dir, json_schema_input_type=str)] | None = None
    """Directory of Ray's sockets and logs, absolute and short; ``/tmp/manta-<name>`` when absent."""
    object_store: Annotated[Bytes, at_least_bytes(75 * 2**20)] = 200 * 2**20
    """Shared memory for Ray's objects; tokens and hidden states do not pass through it, so it can stay small."""

    def temp_dir_of(self, cluster_name: str) -> str:
        """Absolute directory of Ray's session: the one written, or the default for ``cluster_name``."""
        return self.temp_dir or f"/tmp/manta-{cluster_name}"  # noqa: S108 (sockets need a short path)


class ExistingProvider(StrictModel):
    """Attaches to a Ray cluster that somebody else runs; never starts or stops Ray."""

    kind: Literal["existing"]
    """``local`` starts Ray on this machine; ``existing`` attaches to a running cluster."""
    dashboard: Annotated[str, BeforeValidator(_read_dashboard, json_schema_input_type=str)]
    """Address of its dashboard, ``http://HOST:PORT``. The token, if it wants one, is read from RAY_AUTH_TOKEN."""


Provider: TypeAlias = LocalProvider | ExistingProvider

TRAIN_SLOT = "train_slot"
"""Ray's name for places for training workers: each takes one, besides its cores and GPUs."""


class Resources(StrictModel):
    """What one machine offers to Ray. Any further key is a custom resource with an amount."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Amount]

    CPU: Amount
    """Logical cores that Ray may hand out."""
    GPU: Amount = 0
    """Graphics processors that Ray may hand out."""
    memory: Annotated[Bytes, at_least_bytes(2**20)] | None = None
    """Memory that Ray may hand out; when absent, Ray's own estimate is used and plans are not checked against it."""

    train_slot: Annotated[int, Field(ge=0, le=10_000)] | None = None
    """Training workers that the machine takes; 0 keeps it for serving. When absent, one per GPU or, without, core."""

    @property
    def custom(self) -> dict[str, float]:
        """The custom resources and their amounts, places for training workers among them."""
        slots = int(self.GPU or self.CPU) if self.train_slot is None else self.train_slot
        return {TRAIN_SLOT: float(slots)} | self.__pydantic_extra__


class NodeGroup(StrictModel):
    """A number of machines that are alike."""

    name: Name
    """Name of the group, unique in the file."""
    resources: Resources
    """What each machine of the group offers."""
    min: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Machines that are always there."""
    max: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Machines there may be at most."""


class InstalledCode(StrictModel):
    """Manta is installed on every node (an image, a virtual environment)."""

    kind: Literal["installed"] = "installed"
    """``installed``: Manta is on every node. ``uri``: Ray unpacks an archive of it on every node."""


def _read_archive(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(
        r"(s3|gs|gcs|azure|abfss|https|file)://\S+\.(zip|whl|tar\.gz)", value
    ):
        refuse(
            "is not the address of a code archive",
            limit="s3://, gs://, azure://, abfss://, https:// or file://, ending in .zip, .whl or .tar.gz",
            remedy="write an address such as s3://bucket/manta.zip",
        )
    return value


class UriCode(StrictModel):
    """Ray downloads and unpacks an archive of Manta's packages on every node."""

    kind: Literal["uri"]
    """``installed``: Manta is on every node. ``uri``: Ray unpacks an archive of it on every node."""
    uri: Annotated[str, BeforeValidator(_read_archive, json_schema_input_type=str)]
    """Address of the archive, which every node can read."""


Code: TypeAlias = InstalledCode | UriCode


class ClusterSection(StrictModel):
    """The Ray cluster everything runs on."""

    provider: Annotated[Provider, Field(discriminator="kind")] = LocalProvider()
    """Who starts Ray."""
    nodes: Annotated[tuple[NodeGroup, ...], Field(min_length=1, strict=False)]
    """The machines, in groups that are alike."""
    code: Annotated[Code, Field(discriminator="kind")] = InstalledCode()
    """How Manta's own code reaches the nodes."""
