"""How the workers of an attempt meet: Ray Train's hooks around a group of them in, torch's process group out.

In place of Ray's own, which the controller of a run would import, and torch with it, to compute nothing. Here the
workers alone do.
"""

import importlib
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray import train
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

logger = logging.getLogger(__name__)

_LEAVE_TIMEOUT_S = 30.0


@dataclass(kw_only=True)
class ProcessGroup(BackendConfig):  # type: ignore[misc]  # Ray has no types
    """Gloo between processors and, where workers have GPUs, NCCL between those. Ray shows the fields.

    No ``framework`` is named: torch's version, which Ray would show, is an object whose every reader imports torch.
    """

    has_gpus: bool
    timeout_s: int
    """Of whatever the workers do together."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Of Ray: what it calls."""
        return Meeting

    def to_dict(self) -> dict[str, Any]:
        """Of Ray: for its dashboard."""
        return {"has_gpus": self.has_gpus, "timeout_s": self.timeout_s}


class Meeting(Backend):  # type: ignore[misc]  # Ray has no types
    """What Ray's controller does when a group has started, and before it ends."""

    share_cuda_visible_devices = True
    """Of Ray: workers of a node see each other's GPUs, or NCCL could not copy between them directly."""

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Have all workers join; the first is where they meet."""
        host, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(join, backend_config, host, port)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:  # noqa: ARG002 (Ray's signature)
        """Have them leave, those that still can."""
        try:
            ray.get(worker_group.execute_async(leave), timeout=_LEAVE_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            logger.warning("workers did not leave their process group within %g s", _LEAVE_TIMEOUT_S)


def join(group: ProcessGroup, host: str, port: int) -> None:
    """In a worker: wait for the others at ``host`` and ``port``; environment variables are those of torchrun."""
    context = train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    if group.has_gpus:
        device = importlib.import_module("ray.train.torch").get_device()
        importlib.import_module("torch").cuda.set_device(device)  # before NCCL takes the first that it finds
    importlib.import_module("torch.distributed").init_process_group(
        backend="cpu:gloo,cuda:nccl" if group.has_gpus else "gloo",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=group.timeout_s),
    )


def leave() -> None:
    """In a worker: free what the group holds."""
    distributed = importlib.import_module("torch.distributed")
    if distributed.is_initialized():
        distributed.destroy_process_group()
