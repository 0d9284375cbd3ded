"""parameter_server, every worker but the first: a batch number and weights in, the gradient of that batch out."""

from dataclasses import replace

from torch import nn

from train_jobs.trainer.batches import Feed
from train_jobs.trainer.hooks import Hooks, TrainResult
from train_jobs.trainer.strategies.links import SERVER, Parcel, open_links
from train_jobs.trainer.strategies.replicated import Replicated
from train_jobs.trainer.strategies.strategy import Forward
from train_jobs.trainer.world import World


class ComputingWorker:
    """Computes whole global batches, one after the other, so that a faster one does more of them."""

    def __init__(self, model: nn.Module, forward: Forward, world: World, feed: Feed, hooks: Hooks) -> None:
        """``feed`` gives whole batches."""
        self._whole = Replicated(model, forward, replace(world, rank=0, size=1))
        self._parameters = list(self._whole.parameters.values())
        self._parcel = Parcel(self._parameters, world.device)
        self._feed = feed
        self._hooks = hooks
        self._link = open_links(world.rank, world.size)[SERVER]

    def run(self) -> TrainResult:
        """Until the server ends; returns its result, or raises what it raised."""
        self._hooks.waiting()
        while (item := self._link.receive_item()) is not None:
            self._hooks.heartbeat(item)
            self._compute(item)
            self._hooks.waiting()
        end = self._link.receive_object()
        if isinstance(end, Exception):
            raise end
        assert isinstance(end, TrainResult)
        return end

    def _compute(self, item: int) -> None:
        self._feed.begin(item)  # is read while the weights arrive
        self._link.receive(self._parcel.values)
        self._parcel.unpack(self._parameters)
        sums = self._whole.accumulate(self._feed.take(item))
        self._parcel.pack([parameter.grad for parameter in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None
        stop = self._hooks.should_stop() == "checkpoint_and_stop"
        self._link.send_sums(replace(sums, stop=stop))
        self._link.send(self._parcel.values)
