"""parameter_server, first worker: gradients of the others in, one update each; weights out to those that are free.

A checkpoint holds the updates of the first so many batches, each once: where one follows, nothing beyond it is
handed out until all before it is applied. So a run goes on from it under any strategy, as from any other.
"""

import queue
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cluster.errors import MantaError
from train_jobs.trainer.batches import Share
from train_jobs.trainer.duration import next_save
from train_jobs.trainer.hooks import TrainResult
from train_jobs.trainer.spec import ParameterServer, TrainSpec
from train_jobs.trainer.strategies.links import Link, Parcel, open_links
from train_jobs.trainer.strategies.replicated import Replicated
from train_jobs.trainer.strategies.staleness import Handouts
from train_jobs.trainer.strategies.strategy import Forward, Sums
from train_jobs.trainer.task import MicroBatch, Task
from train_jobs.trainer.world import World, alone


@dataclass(frozen=True, slots=True)
class Arrival:
    """What came from a worker: the sums of its gradient, or why nothing will come any more."""

    worker: int
    what: Sums | Exception


class Counterpart(threading.Thread):
    """The server's side of one worker: a thread, so that a slow link holds up nobody else.

    ``parcel`` has the weights on their way to the worker, then its gradient, until the next weights are given.
    """

    def __init__(self, worker: int, link: Link, parcel: Parcel, arrivals: "queue.SimpleQueue[Arrival]") -> None:
        super().__init__(name=f"worker-{worker}", daemon=True)
        self.parcel = parcel
        self._worker = worker
        self._link = link
        self._arrivals = arrivals
        self._items: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._end: TrainResult | Exception | None = None

    def give(self, item: int, weights: Sequence[torch.Tensor]) -> None:
        """Let the worker compute global batch ``item`` on these weights, as they are now."""
        self.parcel.pack(weights)
        self._items.put(item)

    def end(self, end: TrainResult | Exception) -> None:
        """Tell the worker how the attempt ended, after what it computes."""
        self._end = end
        self._items.put(None)

    def run(self) -> None:
        """Until the worker is told the end, or is lost."""
        try:
            while (item := self._items.get()) is not None:
                self._link.send_item(item)
                self._link.send(self.parcel.values)
                sums = self._link.receive_sums()
                self._link.receive(self.parcel.values)
                self._arrivals.put(Arrival(self._worker, sums))
            self._link.send_item(None)
            self._link.send_object(self._end)
        except Exception as error:  # handed to the training thread
            self._arrivals.put(Arrival(self._worker, error))


class Server:
    """The whole model, its optimizer and nothing to compute; the strategy of a world of one."""

    share: Share | None = None

    def __init__(self, model: nn.Module, forward: Forward, world: World, spec: TrainSpec, steps: range) -> None:
        """``steps`` are those this attempt has to do."""
        assert isinstance(spec.strategy, ParameterServer)
        self._whole = Replicated(model, forward, replace(world, size=1))
        self._device = world.device
        self._spec, self._num_steps = spec, steps.stop
        self.parameters: Mapping[str, nn.Parameter] = self._whole.parameters
        self.buffers: Mapping[str, torch.Tensor] = self._whole.buffers
        self._handouts = Handouts(first=steps.start, max_staleness=spec.strategy.max_staleness)
        self._stop = steps.start
        """Batches from this one on are not handed out yet."""
        self._stopping = False
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._sums: dict[int, Sums] = {}
        self._counterparts = {
            worker: Counterpart(worker, link, Parcel(self.parameters.values(), world.device), self._arrivals)
            for worker, link in open_links(world.rank, world.size).items()
        }
        self._free = deque(self._counterparts)
        for counterpart in self._counterparts.values():
            counterpart.start()

    def accumulate(self, micro_batches: list[MicroBatch]) -> Sums:
        """Wait for the gradient that is to be applied next; RuntimeError when a worker is lost."""
        assert not micro_batches, "others compute"
        while (found := self._handouts.apply()) is None:
            self._receive()
        handout, staleness = found
        gradient = self._counterparts[handout.worker].parcel.parts
        for parameter, part in zip(self.parameters.values(), gradient, strict=True):
            parameter.grad = part.to(self._device)  # on the CPU, the parcel itself: it is free after the update
        self._free.append(handout.worker)
        return replace(self._sums.pop(handout.worker), staleness=staleness, stop=self._stopping)

    def sum_squares(self, squares: torch.Tensor) -> torch.Tensor:
        """All gradients are here."""
        return squares

    def evaluate(self, task: Task, data: Any) -> Mapping[str, Any]:
        """By the server alone, while the others compute."""
        with alone():
            return self._whole.evaluate(task, data)

    def settle(self) -> bool:
        """Hand out nothing more; what is handed out is applied first."""
        self._stopping = True
        return not self._handouts.num_under_way

    def updated(self, step: int) -> None:
        """Give new batches, on the weights as they are now, to workers in the order in which they became free."""
        if step == self._stop and step < self._num_steps:
            assert not self._handouts.num_under_way
            self._stop = next_save(self._spec, step, self._num_steps)
        weights = [parameter.detach() for parameter in self.parameters.values()]
        while self._free and not self._stopping:
            handout = self._handouts.hand_out(self._free[0], self._stop)
            if handout is None:
                return
            self._counterparts[self._free.popleft()].give(handout.item, weights)

    def conclude(self, end: TrainResult | Exception) -> None:
        """Tell all workers, which finish what they compute before they hear it."""
        if not isinstance(end, TrainResult | MantaError):
            end = RuntimeError(f"the parameter server failed: {end!r}")
        for counterpart in self._counterparts.values():
            counterpart.end(end)
        for counterpart in self._counterparts.values():
            counterpart.join()

    def _receive(self) -> None:
        arrival = self._arrivals.get()
        if isinstance(arrival.what, Exception):
            raise RuntimeError(f"worker {arrival.worker} is lost: {arrival.what}") from arrival.what
        self._sums[arrival.worker] = arrival.what
        self._stopping |= arrival.what.stop
        self._handouts.arrived(arrival.worker)
