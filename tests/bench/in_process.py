"""A replica driven in this process: its engine here, its stages where Ray placed them, no gateway, no Serve, no HTTP.

What a request costs beyond this is what the layers above the engine take.
"""

import asyncio
import itertools
import os
import shutil
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.config.load import load_text
from cluster.control.code import code_digest
from cluster.control.versions import known_versions
from cluster.plan.build import build_plan
from cluster.plan.placement import replica_bundles
from cluster.plan.types import ModelAppArgs
from cluster.registry.store import Registry
from deployments.messages import Delta, Finished, Generate, RequestRefused, SamplingParams, Started, TextPrompt
from deployments.replica.service import ReplicaService
from tests.bench.closed_loop import Exchange
from tests.bench.figures import Record
from tests.bench.machine import started_with
from tests.bench.stage_shares import StageTotals, read_stage_totals
from tests.support.running import free_ports

DEADLINE_S = 600.0
_SAMPLE_S = 1.0


class LocalRay:
    """A Ray of this process alone, on the loopback, with its metrics where :meth:`stage_totals` finds them."""

    def __init__(self, temp_dir: str, metrics_port: int) -> None:
        self._temp_dir = temp_dir
        self._metrics_port = metrics_port

    def roots(self) -> Iterable[psutil.Process]:
        """Its daemons; stages are their descendants."""
        return started_with(f"{self._temp_dir}/")

    def stage_totals(self) -> StageTotals:
        """Steps and seconds of each kind, by stage, as they were one or two seconds ago."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=10) as response:
            return read_stage_totals(response.read().decode())


@asynccontextmanager
async def stage_samples(local: LocalRay) -> AsyncIterator[list[tuple[float, StageTotals]]]:
    """Totals about once a second while the block runs, each with the time of ``time.perf_counter``."""
    samples: list[tuple[float, StageTotals]] = []

    async def sample() -> None:
        while True:
            samples.append((time.perf_counter(), await asyncio.to_thread(local.stage_totals)))
            await asyncio.sleep(_SAMPLE_S)

    task = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextmanager
def local_ray(num_replicas: int = 1) -> Iterator[LocalRay]:
    """Started for this process, and ended with it; each replica may have all cores, as one computes at a time."""
    (port,) = free_ports(1)
    temp_dir = tempfile.mkdtemp(prefix="manta-bench-ray-", dir="/tmp")
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_metrics_report_interval_ms="500", RAY_DISABLE_IMPORT_WARNING="1")
    os.environ.update(RAY_worker_niceness="0")  # as the local provider has it
    ray.init(
        address="local",
        num_cpus=num_replicas * (os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=temp_dir,
        _metrics_export_port=port,
    )
    try:
        yield LocalRay(temp_dir, port)
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)


def model_args(model: dict[str, Any], storage: Path) -> ModelAppArgs:
    """The arguments that ``manta up`` would give a replica of one entry of ``models``, which must be imported."""
    values = {
        "name": "bench",
        "storage": str(storage),
        "cluster": {
            "provider": {"kind": "local"},
            "nodes": [{"name": "box", "resources": {"CPU": os.cpu_count()}, "min": 1, "max": 1}],
        },
        "models": [model],
    }
    config = load_text(yaml.safe_dump(values), "bench.yaml")
    plan = build_plan(config, known_versions(config, Registry(config.storage_root)), code_digest())
    args = plan.models[0].args
    assert args is not None, f"{model['name']} is not in {storage} yet"
    return args


@asynccontextmanager
async def replica(args: ModelAppArgs, name: str = "bench") -> AsyncIterator[ReplicaService]:
    """One replica with its stages, which has produced its first token; several at a time need names of their own."""
    group = placement_group(replica_bundles(args), strategy=args.placement_strategy)
    await group.ready()
    try:
        service = await ReplicaService.start(args, name, group)
        try:
            yield service
        finally:
            await service.stop()
    finally:
        remove_placement_group(group)


class ReplicaSource:
    """A :class:`~tests.bench.closed_loop.Source`: requests go straight to the replica's engine."""

    def __init__(self, service: ReplicaService) -> None:
        self._service = service
        self._numbers = itertools.count()

    async def stream(self, prompt: str, max_tokens: int, exchange: Exchange) -> None:
        """One request; what it comes to is stamped as it comes."""
        request = Generate(
            request_id=f"bench-{next(self._numbers)}",
            prompt=TextPrompt(text=prompt),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            max_tokens=max_tokens,
            deadline_s=DEADLINE_S,
        )
        events = self._service.generate(request)
        try:
            async for event in events:
                exchange.arrivals.append((time.perf_counter(), event))
        except RequestRefused as error:
            exchange.failure = str(error)
        finally:
            await events.aclose()

    def read(self, exchange: Exchange) -> Record:
        """The record of what came."""
        record = Record(sent_s=exchange.sent_s, error=exchange.failure)
        for at, event in exchange.arrivals:
            match event:
                case Started():
                    record.num_prompt_tokens = event.num_prompt_tokens
                case Delta() if event.text:
                    record.event_times.append(at)
                case Finished():
                    record.num_tokens = event.num_completion_tokens
        return record
