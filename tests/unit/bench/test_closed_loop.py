"""The benchmark's client against a server that speaks just enough HTTP, and its report."""

import asyncio
import io
import itertools
import json
from contextlib import asynccontextmanager

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.bench.closed_loop import Exchange, Point, measure, turns
from tests.bench.figures import Figures, Latency
from tests.bench.http_client import CompletionsServer, events
from tests.bench.machine import CpuClock, CpuUse
from tests.bench.peer_report import Row, print_report
from tests.bench.stage_shares import read_stage_totals, stage_shares
from tests.bench.workloads import Workload

WORKLOAD = Workload(name="T", num_streams=3, prompt_tokens=2, output_tokens=6)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def answer(num_tokens: int) -> list[bytes]:
    deltas = [{"choices": [{"text": f"t{i}"}]} for i in range(num_tokens)]
    usage = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": num_tokens}}
    lines = [*(json.dumps(each).encode() for each in (*deltas, usage)), b"[DONE]"]
    return [b"data: " + line + b"\r\n\r\n" for line in lines]


@asynccontextmanager
async def server(status: str = "200 OK", pause_s: float = 0.0):
    """Answers every completion with as many tokens as were asked for; keeps what it was asked."""
    asked, tasks = [], set()

    async def handle(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            await respond(reader, writer)
        finally:
            writer.close()

    async def respond(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        asked.append(body)
        writer.write(b"HTTP/1.1 %s\r\nTransfer-Encoding: chunked\r\n\r\n" % status.encode())
        for event in answer(body["max_tokens"]):
            writer.write(chunk(event))
            await asyncio.sleep(pause_s)
        writer.write(b"0\r\n\r\n")

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        host, port = listening.sockets[0].getsockname()
        yield CompletionsServer(url=f"http://{host}:{port}", model="m"), asked
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


RAW = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(map(chunk, answer(9))) + b"0\r\n\r\n"


@given(st.lists(st.integers(1, len(RAW) - 1), max_size=40, unique=True))
def test_events_are_found_however_the_bytes_were_cut(cuts):
    borders = [0, *sorted(cuts), len(RAW)]
    arrivals = [(float(start), RAW[start:stop]) for start, stop in itertools.pairwise(borders)]
    found = list(events(arrivals))
    assert [data for _, data in found] == [event.decode().strip().removeprefix("data: ") for event in answer(9)]
    assert [at for at, _ in found] == sorted(at for at, _ in found)


async def test_a_whole_answer_is_read_with_its_usage():
    async with server() as (source, asked):
        exchange = Exchange(sent_s=0.0)
        await source.stream("hello", 5, exchange)
    record = source.read(exchange)
    assert (record.num_tokens, record.num_prompt_tokens, len(record.event_times)) == (5, 2, 5)
    assert record.error is None
    assert asked[0]["prompt"] == "hello"
    assert (asked[0]["temperature"], asked[0]["ignore_eos"]) == (0, True)


async def test_an_answer_that_is_cut_off_keeps_its_events_and_has_no_total():
    exchange = Exchange(sent_s=0.0, arrivals=[(1.0, RAW[: len(RAW) // 2])])
    record = CompletionsServer(url="http://127.0.0.1:1", model="m").read(exchange)
    assert record.event_times
    assert record.num_tokens is None
    assert record.error is None


async def test_another_status_and_a_closed_door_are_errors():
    async with server(status="503 Busy") as (source, _):
        exchange = Exchange(sent_s=0.0)
        await source.stream("hello", 5, exchange)
    assert "503 Busy" in source.read(exchange).error
    refused = Exchange(sent_s=0.0)
    await source.stream("hello", 5, refused)
    assert "refused" in source.read(refused).error.lower()


async def test_a_loop_keeps_its_lanes_busy_and_staggers_their_first_answers():
    async with server(pause_s=0.001) as (source, asked):
        point = await measure(
            source, WORKLOAD, itertools.cycle(["a", "b"]), clock=CpuClock(list), warm_up_s=0.0, seconds=0.2
        )
    assert point.figures.num_errors == 0
    assert point.figures.num_done >= WORKLOAD.num_streams
    assert point.figures.tokens_per_event == 1.0
    assert sorted(body["max_tokens"] for body in asked[:3]) == [4, 4, 6]
    assert {body["max_tokens"] for body in asked[3:]} == {6}


async def test_a_source_that_raises_ends_the_measurement():
    class Broken:
        async def stream(self, prompt, max_tokens, exchange):
            exchange.arrivals.append((0.0, b""))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await measure(Broken(), WORKLOAD, itertools.cycle("a"), clock=CpuClock(list), warm_up_s=0.0, seconds=0.1)


def test_cpu_of_others_is_what_neither_side_used():
    before = CpuUse(wall_s=0, busy_s=100, stolen_s=0, client_s=1, server_s={"a 1": 5})
    after = CpuUse(wall_s=10, busy_s=118, stolen_s=0, client_s=3, server_s={"a 1": 11, "b 2": 4})
    used = after - before
    assert used.server_s == {"a 1": 6, "b 2": 4}
    assert used.others_s == 18 - 2 - 10
    assert used.others_cores == pytest.approx(0.6)


def test_the_clock_sees_this_process_as_a_server():
    found = CpuClock(lambda: [psutil.Process()]).read()
    assert any(used > 0 for used in found.server_s.values())


def row(side: str, variant: str, repeat: int, tokens_per_s: float, first_ms: float) -> Row:
    latency = Latency(p50_ms=first_ms, p95_ms=first_ms, p99_ms=first_ms, count=9)
    found = Figures(
        tokens_per_s=tokens_per_s, first_token=latency, gap=latency, num_done=9, num_errors=0, first_error=None,
        tokens_per_event=1.0, num_prompt_tokens=(964, 964),
    )  # fmt: skip
    cpu = CpuUse(wall_s=10, busy_s=20, stolen_s=0, client_s=1, server_s={"s 1": 18})
    return Row(
        side=side, variant=variant, workload="W6", repeat=repeat, start_s=9.0, resident_bytes=2**30,
        point=Point(figures=found, cpu=cpu),
    )  # fmt: skip


def test_the_report_says_which_goals_are_met():
    rows = [row("manta", "bf16", 0, 260.0, 90.0), row("manta", "bf16", 1, 240.0, 90.0)]
    rows += [row("vllm", "bf16", repeat, 100.0, 100.0) for repeat in (0, 1)]
    rows += [row("llama.cpp", "Q4_1", repeat, 100.0, 100.0) for repeat in (0, 1)]
    output = io.StringIO()
    print_report(rows, Console(file=output, width=160))
    lines = [line for line in output.getvalue().splitlines() if "2.50x" in line or "0.90x" in line]
    assert ["met" in line for line in lines] == [True, False, False]
    assert "2.40..2.60" in lines[0]
    assert ">= 1.3x" in lines[0]
    assert "<= 0.7x" in lines[1]
    assert ">= 3.5x" in lines[2]


def test_computing_and_waiting_are_the_whole_of_a_stages_window():
    page = """# HELP ray_manta_stage_compute_seconds_total x
ray_manta_stage_compute_seconds_total{Component="c",model="m",stage="0",version="v1"} %s
ray_manta_stage_wait_seconds_total{stage="0"} %s
ray_manta_stage_bubble_seconds_total{stage="0"} %s
ray_manta_stage_steps_total{stage="0"} 7.0
ray_manta_steps_total{model="m"} 9.0
"""
    samples = [(float(at), read_stage_totals(page % (3 * at, at, at / 2))) for at in range(10)]
    assert samples[1][1] == {0: {"compute_seconds": 3.0, "wait_seconds": 1.0, "bubble_seconds": 0.5, "steps": 7.0}}
    assert stage_shares(samples, 2.0, 9.0) == {0: {"compute": 0.75, "wait": 0.25, "bubble": 0.125}}
    with pytest.raises(ValueError, match="longer"):
        stage_shares(samples, 2.0, 2.5)


def test_sides_take_turns_in_being_first():
    assert list(turns(["a", "b"], 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
