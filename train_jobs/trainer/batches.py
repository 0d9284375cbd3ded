"""Which sequences a worker trains on at a step: the order, the step and the worker's share in, micro-batches out.

A global batch is consecutive positions of the order, cut into micro-batches that are numbered the same at any number
of workers; each worker takes a run of equally many. So the batch is the same at every world size, and only who
computes what differs.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from train_jobs.data.sampler import Order
from train_jobs.trainer.duration import num_micro_batches
from train_jobs.trainer.spec import BatchSpec
from train_jobs.trainer.task import MicroBatch


class Readable(Protocol):
    """Sequences by number, as ``train_jobs.data.shards.Shards`` gives them."""

    @property
    def sequence_tokens(self) -> int:
        """Positions of each sequence."""

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> Any:
        """A dataclass of arrays, or None for those that the data do not have."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker takes of every global batch: share ``index`` of ``count``."""

    index: int
    count: int


class Feed:
    """Micro-batches of steps, each read on a thread while something else is done."""

    def __init__(
        self, sides: Mapping[str, Readable], batch: BatchSpec, share: Share, *, seed: int, device: torch.device
    ) -> None:
        """``sides`` are read at the same numbers; arrays get the side's name in front, unless it is empty."""
        self._sides = sides
        self._order = Order(len(next(iter(sides.values()))), seed)
        self._batch = batch
        self._num_micro = num_micro_batches(batch, share.count)
        self._first = share.index * self._num_micro
        self._device = device
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-batches")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def begin(self, step: int) -> None:
        """Start to read what :meth:`take` will be asked for next."""
        self._ahead = (step, self._reader.submit(self._read, step))

    def take(self, step: int) -> list[MicroBatch]:
        """Micro-batches of a step that belong to this worker."""
        begun, reading = self._ahead or (None, None)
        if reading is None or begun != step:
            reading = self._reader.submit(self._read, step)
        self._ahead = None
        taken = reading.result()
        if self._device.type == "cpu":
            return taken
        return [self._moved(micro_batch) for micro_batch in taken]

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[MicroBatch]:
        size = self._batch.micro_sequences
        cursor = step * self._batch.sequences + self._first * size
        ids = self._order.batch(cursor, self._num_micro * size)
        arrays = {
            f"{side}_{name}" if side else name: torch.from_numpy(array)
            for side, data in self._sides.items()
            for name, array in _arrays(data.read(ids))
        }
        return [
            MicroBatch(
                step=step,
                number=self._first + number,
                sequence_ids=tuple(ids[start : start + size].tolist()),
                fields={name: array[start : start + size] for name, array in arrays.items()},
            )
            for number, start in enumerate(range(0, len(ids), size))
        ]

    def _moved(self, micro_batch: MicroBatch) -> MicroBatch:
        return MicroBatch(
            step=micro_batch.step,
            number=micro_batch.number,
            sequence_ids=micro_batch.sequence_ids,
            fields={name: array.to(self._device, non_blocking=True) for name, array in micro_batch.fields.items()},
        )


_DTYPES: dict[str, type[np.generic]] = {"token_ids_BS": np.int64, "loss_mask_BS": np.bool_, "labels_B": np.int64}
"""What torch wants ids and masks to be; the rest stays as it is."""


def _arrays(sequences: Any) -> list[tuple[str, NDArray[Any]]]:
    found = [(field.name, getattr(sequences, field.name)) for field in fields(sequences)]
    return [
        (name, array.astype(_DTYPES.get(name, array.dtype), copy=False)) for name, array in found if array is not None
    ]


def count_positions(micro_batches: list[MicroBatch]) -> tuple[int, int]:
    """Real tokens and all positions of micro-batches, padding being segment 0."""
    segments = [
        field
        for micro_batch in micro_batches
        for name, field in micro_batch.fields.items()
        if name.endswith("segments_BS")
    ]
    return sum(int(torch.count_nonzero(one)) for one in segments), sum(one.numel() for one in segments)
