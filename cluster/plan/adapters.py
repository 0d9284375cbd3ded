"""Adapters beside their base: a model of the config and what the registry knows in, what its replicas serve out."""

from collections.abc import Mapping, Sequence

from cluster.config.models import ModelConfig
from cluster.errors import PlanError
from cluster.plan.memory import DTYPE_BYTES, QUANTIZED_BITS
from cluster.plan.types import AdapterArgs, AdapterPlan, KnownVersion, ModelFacts

_FLOAT32_BITS = 32


def known_adapters(
    model: ModelConfig, base: KnownVersion, versions: Mapping[str, KnownVersion]
) -> tuple[KnownVersion, ...]:
    """The versions of the adapters of ``model``, in order; PlanError for one that cannot be beside ``base``."""
    found = tuple(versions[adapter.name] for adapter in model.adapters)
    for served, version in zip(model.adapters, found, strict=True):
        path, reference = f"models.{model.name}.adapters.{served.name}", f"{version.name}@{version.version}"
        if version.adapter is None:
            raise PlanError(f"{path}.source: {reference} is a whole model; serve it as a model of its own")
        if base.adapter is not None:
            raise PlanError(f"{path}: {model.name} is an adapter itself, merged; list {served.name} beside its base")
        if version.adapter.of != f"{base.name}@{base.version}":
            raise PlanError(
                f"{path}.source: {reference} adapts {version.adapter.of}, but {model.name} is {base.name}@"
                f"{base.version}; serve that version (source: registry://{version.adapter.of}), or the adapter as a "
                "model of its own"
            )
        if version.adapter.kind != "lora":
            raise PlanError(
                f"{path}.source: {reference} is a {version.adapter.kind}, whose change of a matrix is no product of "
                "two thin ones, so its rows cannot be computed with the base's; serve it as a model of its own: "
                f"{{name: {served.name}, source: {served.source}}}"
            )
    return found


def adapter_args(model: ModelConfig, adapters: Sequence[KnownVersion]) -> tuple[AdapterArgs, ...]:
    """What replicas must know of them."""
    return tuple(
        AdapterArgs(name=served.name, model=version.name, version=version.version)
        for served, version in zip(model.adapters, adapters, strict=True)
    )


def adapter_plans(model: ModelConfig, adapters: Sequence[KnownVersion]) -> tuple[AdapterPlan, ...]:
    """What people and the gateway must know of them."""
    return tuple(
        AdapterPlan(name=served.name, source=str(served.source), created=version.created)
        for served, version in zip(model.adapters, adapters, strict=True)
    )


def with_adapters(model: ModelConfig, facts: ModelFacts, adapters: Sequence[KnownVersion]) -> ModelFacts:
    """``facts`` with what the adapters take, in float32, counted as parameters of the layers, evenly."""
    num_params = sum(version.adapter.num_params for version in adapters if version.adapter is not None)
    unpacked = model.quantization is None or model.kernels == "torch"
    param_bits = 8 * DTYPE_BYTES[model.dtype] if unpacked else QUANTIZED_BITS[model.quantization or "int8"]
    each = -(-num_params * _FLOAT32_BITS // (param_bits * facts.num_layers))
    return facts.model_copy(update={"layer_params": tuple(params + each for params in facts.layer_params)})
