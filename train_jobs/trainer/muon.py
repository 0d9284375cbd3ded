"""Muon over parameters that may be cut over workers: gradients in, orthogonalized updates out."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from train_jobs.trainer.spec import Muon as MuonSpec


class Muon(Optimizer):
    """torch.optim.Muon, with each matrix gathered for its update where it is cut over workers.

    The update of a matrix depends on all of it, so cut momenta are gathered, orthogonalized by everybody, and each
    worker keeps its part. Matrices that are whole go to torch.optim.Muon as they are.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], spec: MuonSpec) -> None:
        super().__init__(list(matrices), {"lr": spec.lr})
        self._spec = spec

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None, "closures are not used here"
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step_matrix(matrix, group["lr"])

    def _step_matrix(self, matrix: nn.Parameter, lr: float) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.detach())
        if not isinstance(matrix, DTensor):
            _update(matrix.detach(), matrix.grad, state["momentum_buffer"], self._spec, lr)
            return
        assert isinstance(matrix.grad, DTensor)
        cut = cast(DTensor, matrix.detach())
        whole, momentum = cut.full_tensor(), state["momentum_buffer"].full_tensor()
        _update(whole, matrix.grad.full_tensor(), momentum, self._spec, lr)
        for target, source in ((cut, whole), (state["momentum_buffer"], momentum)):
            part = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(part.to_local())


def _update(
    matrix: torch.Tensor, gradient: torch.Tensor | None, momentum: torch.Tensor, spec: MuonSpec, lr: float
) -> None:
    """One whole matrix, in place, by torch's own arithmetic."""
    parameter = nn.Parameter(matrix)
    parameter.grad = gradient
    optimizer = torch.optim.Muon(
        [parameter],
        lr=lr,
        weight_decay=spec.weight_decay,
        momentum=spec.momentum,
        nesterov=spec.nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    optimizer.state[parameter]["momentum_buffer"] = momentum
    optimizer.step()  # type: ignore[no-untyped-call]
