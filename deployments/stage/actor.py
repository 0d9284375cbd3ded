"""The Ray actor around one stage: placed by Ray, loaded once, then its loop runs beside it on a thread of its own.

The replica imports this module to place the actor, so torch is imported only where one is made.
"""

import asyncio
import importlib
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import ray
import uvloop

from cluster.control.code import check_code_digest
from cluster.plan.types import ModelAppArgs
from cluster.registry.adapter import FOLDER
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from cluster.telemetry.log import log_to_stderr
from deployments.stage.link import StageAddress

if TYPE_CHECKING:
    from deployments.stage.loaded import LoadedStage


class StageActor:
    """One slice of one replica. ``start``, ``connect_next``, then it serves; it ends when its replica does."""

    def __init__(self, args: ModelAppArgs, index: int) -> None:
        self._args = args
        self._index = index
        self._stage: LoadedStage | None = None
        self._loaded = importlib.import_module("deployments.stage.loaded")
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stage-loop", daemon=True)
        self._thread.start()

    def start(self) -> StageAddress:
        """Load the slice and listen; called again, keep the weights, forget every sequence, and listen anew.

        Raises what the registry, the runtime or the system says is wrong.
        """
        begin = time.monotonic()
        if self._stage is None:
            log_to_stderr(model=self._args.model, version=self._args.version, stage=self._index)
            check_code_digest(self._args.code_digest)
            self._stage = self._load()
        load_s = time.monotonic() - begin
        address, secret = self._call(self._stage.listen(ray.util.get_node_ip_address()))
        process = psutil.Process()
        return StageAddress(
            address=address,
            secret=secret,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=process.pid,
            process_started_at=process.create_time(),
            load_s=load_s,
        )

    def _load(self) -> "LoadedStage":
        registry = Registry(self._args.storage)
        name = self._args.registry_name or self._args.model
        directory = materialize(registry, registry.get(name, self._args.version))
        adapters = {
            adapter.name: materialize(registry, registry.get(adapter.model, adapter.version)) / FOLDER
            for adapter in self._args.adapters
        }
        loaded: LoadedStage = self._loaded.LoadedStage(self._args, self._index, directory, adapters)
        return loaded

    def connect_next(self, after: StageAddress) -> None:
        """Connect to the stage after this one; from the last, to the first."""
        self._call(self._started.worker.connect_next(after.address, after.secret))

    def serve(self) -> None:
        """Compute steps until the replica leaves; raises what a step raised."""
        self._call(self._started.worker.serve())

    @property
    def _started(self) -> "LoadedStage":
        assert self._stage is not None, "a stage is started before anything else is asked of it"
        return self._stage

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
