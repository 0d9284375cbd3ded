"""A transformers model's own parts, by the pipeline plan of its class: what lies before, in and after its layers.

A module that belongs to another stage becomes a :class:`PassThrough`, so layer indices, parameter names and
everything the model's own ``forward`` does per layer stay as they are.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deployments.runtime.support import UnsupportedModelError


class PassThrough(nn.Module):
    """Stands where another stage's module would: returns its first argument unchanged."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Hidden states in, the same out."""
        return hidden


def plan_parts(base: nn.Module) -> tuple[list[str], str, list[str]]:
    """Names of the modules before, of, and after the layer stack, by the class's own pipeline plan."""
    names = [name for name in base.config.base_model_pp_plan if hasattr(base, name)]  # type: ignore[union-attr]
    stacks = [name for name in names if isinstance(getattr(base, name), nn.ModuleList)]
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"{type(base).__name__}: the pipeline plan names {len(stacks)} layer stacks, not one"
        )
    middle = names.index(stacks[0])
    return names[:middle], stacks[0], names[middle + 1 :]


@torch.no_grad()
def check_passes_hidden_through(model: PreTrainedModel, *, dtype: torch.dtype, device: torch.device) -> None:
    """Some architectures scale or shift embeddings in ``forward`` itself; an inner stage would do it twice."""
    base = model.base_model
    before, layers, after = plan_parts(base)
    kept = {name: getattr(base, name) for name in (layers, *after)}
    setattr(base, layers, nn.ModuleList(PassThrough() for _ in kept[layers]))
    for name in after:
        setattr(base, name, PassThrough())
    probe = torch.ones((1, 2, model.config.hidden_size), dtype=dtype, device=device)
    try:
        out = base(inputs_embeds=probe, position_ids=torch.arange(2, device=device)[None], use_cache=False)
    finally:
        for name, module in kept.items():
            setattr(base, name, module)
    if not torch.equal(out.last_hidden_state, probe):
        raise UnsupportedModelError(
            f"{model.config.model_type} cannot be sharded: its forward changes activations outside "
            f"{', '.join((*before, layers, *after))}; set pipeline.stages to 1"
        )
