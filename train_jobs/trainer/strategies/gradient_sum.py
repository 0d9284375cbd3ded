"""Gradients of every worker in, their sum over all workers out, sent while the backward pass goes on.

Buckets are fixed when the model is built, and sent in their order, so that a sum's rounding is the same in every step
and in every attempt. torch's DistributedDataParallel arranges its buckets anew after its first step, which with three
or more workers would round a resumed run differently.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

BUCKET_BYTES = 25 << 20


class GradientSum:
    """Sums gradients over ``group``. Between :meth:`arm` and :meth:`finish` lies the backward pass that is sent."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._buckets = _buckets(parameters)
        self._bucket_of = {id(p): number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._armed = False
        self._missing: list[int] = []
        self._sent: list[tuple[torch.Tensor, dist.Work]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]

    def arm(self) -> None:
        """The next backward pass is the last one of the step: send what it completes."""
        self._armed = True
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = []

    def finish(self) -> None:
        """Wait for all sums; every gradient is then a view of its bucket. Where there was none, zeros count."""
        while len(self._sent) < len(self._buckets):
            self._send_next()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            parts = torch.split(flat, [parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        self._armed, self._sent = False, []

    def _ready(self, parameter: torch.Tensor) -> None:
        if not self._armed:
            return
        self._missing[self._bucket_of[id(parameter)]] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[len(self._sent)]
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        self._sent.append((flat, work))


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters from last to first, as gradients appear, cut at a size and where dtypes change."""
    buckets: list[list[nn.Parameter]] = []
    size = BUCKET_BYTES
    for parameter in reversed(parameters):
        num_bytes = parameter.numel() * parameter.element_size()
        if size + num_bytes > BUCKET_BYTES or buckets[-1][-1].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += num_bytes
    return buckets
