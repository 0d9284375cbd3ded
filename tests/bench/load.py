"""A closed-loop client: N streams at a time over ``/v1/completions``, tokens counted as they arrive."""

import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field

import httpx2


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``num_streams`` requests at a time, each with ``prompt_tokens`` in and ``output_tokens`` out."""

    name: str
    num_streams: int
    prompt_tokens: int
    output_tokens: int


WORKLOADS = (
    Workload(name="W1", num_streams=1, prompt_tokens=128, output_tokens=128),
    Workload(name="W2", num_streams=8, prompt_tokens=128, output_tokens=128),
    Workload(name="W3", num_streams=16, prompt_tokens=128, output_tokens=128),
    Workload(name="W4", num_streams=32, prompt_tokens=128, output_tokens=128),
    Workload(name="W5", num_streams=8, prompt_tokens=1024, output_tokens=64),
)


@dataclass(slots=True)
class Measured:
    """What one run saw. Times in seconds since the run began."""

    token_times: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    num_errors: int = 0

    def tokens_per_second(self, begin_s: float, stop_s: float) -> float:
        """Output tokens that arrived in the window, per second."""
        return sum(begin_s <= at < stop_s for at in self.token_times) / (stop_s - begin_s)

    @property
    def first_token_p50_ms(self) -> float:
        """Median time to the first token."""
        return statistics.median(self.first_token_s) * 1e3


async def run(url: str, model: str, workload: Workload, *, warm_up_s: float, seconds: float) -> Measured:
    """Keep ``num_streams`` requests open for ``warm_up_s + seconds``; every prompt is different."""
    measured = Measured()
    begin = time.perf_counter()
    stop = begin + warm_up_s + seconds
    limits = httpx2.Limits(max_connections=workload.num_streams + 1)
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def stream(lane: int) -> None:
            number = 0
            while time.perf_counter() < stop:
                await _one(client, model, workload, lane * 100_000 + number, begin, measured)
                number += 1

        lanes = [asyncio.create_task(stream(lane)) for lane in range(workload.num_streams)]
        await asyncio.sleep(warm_up_s + seconds)
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
    return measured


async def _one(
    client: httpx2.AsyncClient, model: str, workload: Workload, number: int, begin: float, measured: Measured
) -> None:
    body = {
        "model": model,
        "prompt": prompt_ids(workload.prompt_tokens, number),
        "max_tokens": workload.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    first = True
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            measured.num_errors += 1
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: {") or not json.loads(line[6:])["choices"]:
                continue
            now = time.perf_counter()
            measured.token_times.append(now - begin)
            if first:
                measured.first_token_s.append(now - sent)
                first = False


def prompt_ids(num_tokens: int, number: int) -> list[int]:
    """Token ids that no other request shares a prefix with."""
    return [1000 + (number * 7919 + index * 104_729) % 40_000 for index in range(num_tokens)]
