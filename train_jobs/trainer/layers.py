"""A model's repeated layers, found by structure: what sharding, recomputation and compilation work on."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Entries of the outermost ModuleLists by name, in order: the layers of every transformer of that kind."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{layer}.") for layer in found):
            found |= {f"{name}.{number}": layer for number, layer in module.named_children()}
    return found


def layer_matrices(model: nn.Module) -> frozenset[str]:
    """Names of the trained matrices within the layers: not embeddings, not the head."""
    prefixes = tuple(f"{name}." for name in repeated_layers(model))
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and name.startswith(prefixes)
    )


def matrix_flops_per_position(model: nn.Module) -> float:
    """Operations of forward and backward passes per position: 6 per element of a matrix that multiplies.

    Embeddings only look up. Attention scores are not counted, so it is a little too low for long sequences.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return 6.0 * sum(
        parameter.numel()
        for parameter in model.parameters()
        if parameter.ndim >= 2 and (id(parameter) not in looked_up or id(parameter) in multiplied)
    )


def recompute_activations(model: nn.Module) -> None:
    """Each layer keeps its input only and computes again in the backward pass; random numbers are the same again."""
    for layer in repeated_layers(model).values():
        recomputed = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        layer.forward = recomputed  # the module stays, and so do its parameters' names


def compile_layers(model: nn.Module) -> None:
    """Each layer is compiled by itself, the same code for all of one shape."""
    for layer in repeated_layers(model).values():
        layer.compile()


def running_statistics(model: nn.Module) -> str | None:
    """The first module that counts along in the forward pass, as batch norms do; None when there is none."""
    counting = (name for name, module in model.named_modules() if getattr(module, "track_running_stats", False))
    return next(counting, None)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
