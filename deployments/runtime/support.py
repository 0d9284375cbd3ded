"""Can this architecture be cut into stages by this runtime? A transformers config in; nothing, or the reason, out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ATTENTION_KINDS = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class UnsupportedModelError(Exception):
    """The model cannot be run, or not be sharded, by this runtime; the message says why."""


def check_supported(config: "PretrainedConfig", *, context_tokens: int, num_stages: int) -> None:
    """Raise UnsupportedModelError with every reason that stands against running ``config`` in ``num_stages``."""
    reasons = [reason for reason in _reasons(config, context_tokens, num_stages) if reason]
    if reasons:
        raise UnsupportedModelError(f"{config.model_type} cannot be served: " + "; ".join(reasons))


def _reasons(config: "PretrainedConfig", context_tokens: int, num_stages: int) -> list[str | None]:
    return [
        _no_plan(config),
        _too_many_stages(config, num_stages),
        _encoder_decoder(config),
        _attention_kinds(config),
        _present(config, "kv_lora_rank", "latent attention (kv_lora_rank) has no paged cache here"),
        _present(config, "num_kv_shared_layers", "layers share keys and values (num_kv_shared_layers)"),
        _present(config, "use_bidirectional_attention", "its attention is bidirectional"),
        _length_dependent_rope(config, context_tokens),
    ]


def _no_plan(config: "PretrainedConfig") -> str | None:
    if config.base_model_pp_plan:
        return None
    return "its transformers class carries no pipeline plan (base_model_pp_plan)"


def _too_many_stages(config: "PretrainedConfig", num_stages: int) -> str | None:
    num_layers = getattr(config, "num_hidden_layers", 0)
    return f"{num_stages} stages but only {num_layers} layers" if num_stages > num_layers else None


def _encoder_decoder(config: "PretrainedConfig") -> str | None:
    return "it is an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else None


def _attention_kinds(config: "PretrainedConfig") -> str | None:
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_KINDS
    return f"layers of type {', '.join(sorted(kinds))} keep a state that is not paged" if kinds else None


def _present(config: "PretrainedConfig", key: str, reason: str) -> str | None:
    return reason if getattr(config, key, None) else None


def _length_dependent_rope(config: "PretrainedConfig", context_tokens: int) -> str | None:
    """Such a rope changes with the longest sequence of a batch: tokens would depend on a sequence's company."""
    for rope in _rope_parameters(getattr(config, "rope_parameters", None) or {}):
        kind = rope.get("rope_type", "default")
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        if kind in _LENGTH_DEPENDENT_ROPE and context_tokens > original:
            return f"its {kind} rope depends on the batch beyond {original} tokens; set context_tokens <= {original}"
    return None


def _rope_parameters(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Rope parameters are one dict, or one dict per kind of layer."""
    if "rope_type" in parameters:
        return [parameters]
    return [value for value in parameters.values() if isinstance(value, dict)]
