"""What happens to gradients between the last backward pass and the optimizer: mean, global norm, clipping."""

import math
from collections.abc import Callable, Iterable

import torch
from torch.distributed.tensor import DTensor

from train_jobs.trainer.errors import TrainingError


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this worker holds of a tensor that may be cut over workers; shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def finish_gradients(
    parameters: Iterable[torch.nn.Parameter],
    *,
    factor: float,
    clip_norm: float | None,
    sum_squares: Callable[[torch.Tensor], torch.Tensor],
    step: int,
) -> float:
    """Scale gradients in place by ``factor``, clip their global norm to ``clip_norm``; returns the norm before that.

    ``sum_squares`` adds a float32 scalar over the workers that hold other parts of the model.
    TrainingError when the norm is not finite.
    """
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    norms = torch._foreach_norm(gradients) if gradients else [torch.zeros(())]
    squares = torch.stack([norm.float() for norm in norms]).square().sum()
    norm = factor * math.sqrt(float(sum_squares(squares)))
    if not math.isfinite(norm):
        raise TrainingError(f"step {step}: the gradient's norm is {norm}; lower optimizer.lr, or look at the data")
    if clip_norm is not None and norm > clip_norm:
        factor *= clip_norm / norm
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)
    return norm
