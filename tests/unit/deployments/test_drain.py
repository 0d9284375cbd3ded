"""Nodes drain, the control store comes and goes: stages are moved, and the engine is told once they are ready."""

import asyncio
from collections.abc import Collection

from deployments.replica.drain import DrainWatch


class World:
    """What the watch sees and does: ``answers`` are draining nodes, or the error of a control store that is away."""

    def __init__(self, *answers: set[str] | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[set[str]] = []
        self.losses: list[str] = []
        self.done = asyncio.Event()

    async def list_draining(self) -> Collection[str]:
        answer = self.answers.pop(0)
        if not self.answers:
            self.done.set()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def prepare_moves(self, draining: Collection[str]) -> list[int]:
        self.asked.append(set(draining))
        if "full" in draining:
            raise TimeoutError
        return [1] if "leaving" in draining else []

    def report_loss(self, reason: str) -> None:
        self.losses.append(reason)

    async def play(self) -> None:
        task = asyncio.create_task(DrainWatch(self, self, self.list_draining, poll_s=0.001).run())
        await asyncio.wait_for(self.done.wait(), 10)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_stage_is_moved_when_its_node_drains_and_never_before() -> None:
    world = World(set(), {"other"}, {"leaving"}, set())
    await world.play()
    assert world.asked[:3] == [set(), {"other"}, {"leaving"}]
    assert len(world.losses) == 1
    assert "stages [1]" in world.losses[0]


async def test_a_control_store_that_is_away_and_nodes_without_room_are_borne() -> None:
    world = World(ConnectionError("away"), ConnectionError("away"), {"full"}, {"leaving"}, set())
    await world.play()
    assert world.asked[:2] == [{"full"}, {"leaving"}]
    assert len(world.losses) == 1
