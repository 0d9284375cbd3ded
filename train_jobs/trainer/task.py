"""What is learned: the protocol between the trainer and a task, and the batches and losses that pass between them.

Dimensions: B sequences of a micro-batch, S positions of a sequence, D model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from train_jobs.trainer.spec import TrainSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LossParts:
    """A loss before it is divided, so that any split of a batch gives the same mean.

    ``sum`` is a float32 scalar with a gradient, over ``count`` targets (a float32 scalar without one).
    """

    sum: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward pass reads, on the worker's device.

    ``fields`` are the arrays of the data's Sequences by name, without those the data do not have: token_ids_BS int64,
    segments_BS int32 (document within a packed sequence, 0 padding), loss_mask_BS bool (the token is a target),
    labels_B int64 ... With several sides of data, such as chosen and rejected, names are ``chosen_token_ids_BS`` ...
    ``number`` is the micro-batch's place in the global batch of ``step``, the same at any number of workers.
    """

    step: int
    number: int
    sequence_ids: tuple[int, ...]
    fields: Mapping[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        """One array; raises KeyError naming what the data have."""
        if name not in self.fields:
            raise KeyError(f"the data have no {name}; they have {', '.join(self.fields)}")
        return self.fields[name]


@runtime_checkable
class Task(Protocol):
    """One kind of training: builds the model, and says what its loss is."""

    def build_model(self, spec: TrainSpec) -> nn.Module:
        """The whole model in float32 on the CPU, the same in every process for the same ``spec.seed``.

        Only parameters that require a gradient are trained and saved.
        """

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> LossParts:
        """Forward pass; ``model`` must be called, not looked into, as the strategy may have wrapped it."""

    def evaluate(self, model: nn.Module, data: Any) -> Mapping[str, Any]:
        """Metrics of ``model`` over the evaluation data, by name; every worker calls it with the same data."""

    def export(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """Write the trained ``weights`` (parameter name -> whole tensor) as a directory that transformers loads."""


@runtime_checkable
class PipelineTask(Task, Protocol):
    """A task whose model can be cut into stages."""

    def pipeline_parts(self, model: nn.Module, num_stages: int) -> Sequence[nn.Module]:
        """Stages in order; parameters keep the names they have in ``model``.

        Each is called as ``stage(x, **inputs)``: x is token_ids_BS for the first and the output of the stage before
        for the others, inputs are :meth:`pipeline_inputs`. Raises PlanError when the model cannot be cut so.
        """

    def pipeline_inputs(self, micro_batch: MicroBatch) -> Mapping[str, torch.Tensor]:
        """What every stage is given besides its predecessor's output; first dimension B."""

    def pipeline_loss(self, output: torch.Tensor, micro_batch: MicroBatch) -> LossParts:
        """Loss of the last stage's output."""
