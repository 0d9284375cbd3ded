"""What a parameter server and a computing worker send each other: values in at one end, out at the other.

Each pair has a gloo group of its own, also where workers compute on GPUs: weights and gradients travel as one run of
float32 values on the host.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from train_jobs.trainer.strategies.strategy import Sums

SERVER = 0
"""Its rank."""
_PIECE_VALUES = 64 << 20
"""Of one message."""
_TIMEOUT = timedelta(days=1)
"""A worker may wait for long; who waits for too long is the watchdog's business."""


class Parcel:
    """Room for as many float32 values as some parameters have, on the host."""

    def __init__(self, parameters: Iterable[torch.Tensor], device: torch.device) -> None:
        """``device`` is where the parameters are."""
        shapes = [parameter.shape for parameter in parameters]
        sizes = [shape.numel() for shape in shapes]
        self.values = torch.zeros(sum(sizes), dtype=torch.float32, pin_memory=device.type == "cuda")
        self.parts = [part.view(shape) for part, shape in zip(torch.split(self.values, sizes), shapes, strict=True)]
        """The values in the shapes of the parameters."""

    @torch.no_grad()
    def pack(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """Copy tensors of these shapes in; zeros where there is none."""
        for part, tensor in zip(self.parts, tensors, strict=True):
            part.zero_() if tensor is None else part.copy_(tensor)

    @torch.no_grad()
    def unpack(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy what is in it to tensors of these shapes."""
        for part, tensor in zip(self.parts, tensors, strict=True):
            tensor.copy_(part)


class Link:
    """One end of the connection of two workers; used by one thread at a time. RuntimeError when the peer is gone."""

    def __init__(self, peer: int, group: dist.ProcessGroup) -> None:
        """``group`` is that of the two."""
        self._peer = peer
        self._group = group

    def send(self, values: torch.Tensor) -> None:
        """A run of values whose number and dtype the peer knows."""
        for piece in torch.split(values, _PIECE_VALUES):
            dist.send(piece, dst=self._peer, group=self._group)

    def receive(self, values: torch.Tensor) -> None:
        """Fill a run of values."""
        for piece in torch.split(values, _PIECE_VALUES):
            dist.recv(piece, src=self._peer, group=self._group)

    def send_item(self, item: int | None) -> None:
        """The number of the next batch; None when there is none."""
        self.send(torch.tensor([item is not None, item or 0], dtype=torch.int64))

    def receive_item(self) -> int | None:
        """What :meth:`send_item` was given."""
        message = torch.empty(2, dtype=torch.int64)
        self.receive(message)
        is_there, item = message.tolist()
        return item if is_there else None

    def send_sums(self, sums: Sums) -> None:
        """What belongs to a gradient."""
        values = [sums.loss, sums.targets, float(sums.tokens), float(sums.positions), float(sums.stop)]
        self.send(torch.tensor(values, dtype=torch.float64))

    def receive_sums(self) -> Sums:
        """What :meth:`send_sums` was given, but for the staleness."""
        message = torch.empty(5, dtype=torch.float64)
        self.receive(message)
        loss, targets, tokens, positions, stop = message.tolist()
        return Sums(loss=loss, targets=targets, tokens=int(tokens), positions=int(positions), stop=bool(stop))

    def send_object(self, value: Any) -> None:
        """Something small that is no tensor."""
        dist.send_object_list([value], dst=self._peer, group=self._group)

    def receive_object(self) -> Any:
        """What :meth:`send_object` was given."""
        received = [None]
        dist.recv_object_list(received, src=self._peer, group=self._group)
        return received[0]


def open_links(rank: int, num_workers: int) -> dict[int, Link]:
    """Links by worker on the server, which is rank 0, or the one to the server; all workers call this in step."""
    links = {}
    for worker in range(1, num_workers):
        group = dist.new_group([SERVER, worker], backend="gloo", timeout=_TIMEOUT)  # those of others count along
        if rank in (SERVER, worker):
            peer = worker if rank == SERVER else SERVER
            links[peer] = Link(peer, group)
    return links
