"""Chunks become a Ray Data job: actors transform them, wherever the cluster has room, and batches come back in order.

The workers read the inputs' files themselves, so on several nodes ``storage`` and ``path://`` inputs must be on a
file system that all of them see.
"""

from collections.abc import Iterator, Sequence

import msgspec
import pyarrow
import ray
import ray.data
import ray.exceptions

from cluster.errors import MantaError
from train_jobs.data.chunking import Chunk
from train_jobs.data.transform import Batch, Transform


class RayDataExecutor:
    """Runs on the Ray cluster that this process is connected to, with 1 to ``max_workers`` actors."""

    def __init__(self, *, max_workers: int, cpus_per_worker: float = 1.0) -> None:
        self._max_workers = max_workers
        self._cpus_per_worker = cpus_per_worker

    def run(self, transform: Transform, chunks: Sequence[Chunk]) -> Iterator[Batch]:
        """The batches of all chunks, in order."""
        rows = [{"chunk": msgspec.msgpack.encode(chunk)} for chunk in chunks]
        dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))
        options = dataset.context.execution_options
        options.preserve_order = True
        dataset.context.enable_progress_bars = False
        done = dataset.map_batches(
            _Worker,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(transform,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(self._max_workers, max(1, len(rows)))),
            num_cpus=self._cpus_per_worker,
        )
        try:
            for row in done.iter_rows():
                yield msgspec.msgpack.decode(row["batch"], type=Batch)
        except ray.exceptions.RayError as error:
            raise _own_error(error) from error


class _Worker:
    """Transforms one chunk per call; lives as long as the job, so that its tokenizer is read once."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, rows: pyarrow.Table) -> Iterator[pyarrow.Table]:
        for row in rows.to_pylist():
            chunk = msgspec.msgpack.decode(row["chunk"], type=Chunk)
            for batch in self._transform(chunk):
                yield pyarrow.table({"batch": pyarrow.array([msgspec.msgpack.encode(batch)], pyarrow.large_binary())})


def _own_error(error: BaseException) -> BaseException:
    """The transform's own error, where that is what ended the job."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MantaError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return error
