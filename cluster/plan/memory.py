"""Bytes a stage needs: facts of the model and the shape of a step in, weights, KV cache and activations out."""

from dataclasses import dataclass

from cluster.plan.types import Dtype, ModelFacts, Quantization

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED_BITS: dict[Quantization, int] = {"int8": 8, "int4": 4}
_HEAD_BITS = 8
_GROUP_SIZE = 64
"""4-bit weights that share one float32 scale; 8-bit ones do by the row."""
_FLOAT32_BYTES = 4
_MAX_PADDING = 2
"""Padded area of gathered contexts over their tokens, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What bounds the tensors of one step: tokens computed, sequences sampled, and the KV pool they read."""

    dtype: Dtype
    max_step_tokens: int
    max_running: int
    num_blocks: int
    block_tokens: int


def weight_bytes(
    facts: ModelFacts, *, start: int, stop: int, dtype: Dtype, quantization: Quantization | None = None
) -> int:
    """Bytes of the parameters of layers ``start .. stop`` and of what stands before the first and after the last.

    A tied output head is the embedding's own tensor, so a last stage that is not the first holds a second copy; a
    quantized one is always a second tensor. Norms and biases count as if they were quantized with the matrices of
    their layers; they are less than a thousandth of a layer.
    """
    size = DTYPE_BYTES[dtype]
    layers = sum(facts.layer_params[start:stop])
    first, last = start == 0, stop == facts.num_layers
    head = (facts.embedding_params if facts.tied_head else facts.head_params) if last else 0
    embedding = facts.embedding_params if first else 0
    other = facts.other_params * size if last else 0
    if quantization is None:
        shared = first and facts.tied_head
        return (layers + embedding + (0 if shared else head)) * size + other
    row = facts.hidden_size
    return (
        _quantized_bytes(layers, QUANTIZED_BITS[quantization], row)
        + embedding * size
        + _quantized_bytes(head, _HEAD_BITS, row)
        + other
    )


def _quantized_bytes(num_params: int, bits: int, row: int) -> int:
    """Packed integers and their scales, in rows of ``row``: longer ones have fewer scales."""
    group = row if bits == _HEAD_BITS else _GROUP_SIZE
    return num_params * bits // 8 + -(-num_params // group) * _FLOAT32_BYTES


def kv_bytes_per_token(facts: ModelFacts, dtype: Dtype) -> int:
    """Bytes of the keys and values of one token in one layer."""
    return 2 * facts.num_kv_heads * facts.head_dim * DTYPE_BYTES[dtype]


def kv_bytes(facts: ModelFacts, shape: StepShape, num_layers: int) -> int:
    """Bytes of the paged KV cache of ``num_layers`` layers; nothing for a model that keeps no past."""
    if facts.task == "embed":
        return 0
    return shape.num_blocks * shape.block_tokens * num_layers * kv_bytes_per_token(facts, shape.dtype)


def activation_bytes(facts: ModelFacts, shape: StepShape, *, last: bool) -> int:
    """Most bytes of intermediate tensors at once, in one step of ``max_step_tokens`` tokens.

    Either one layer (residual and its copy, queries, keys, values, attention output, the two halves of the MLP, and
    the keys and values gathered from their blocks), or, on the last stage, the logits: one row per sequence in the
    model's dtype and twice in float32, where sampling works. The two never exist together.

    Decoding gathers contexts of different lengths into batches whose padded area is at most twice their tokens, so
    twice the tokens of the pool are counted.
    """
    size = DTYPE_BYTES[shape.dtype]
    attention = (2 * facts.num_attention_heads + 2 * facts.num_kv_heads) * facts.head_dim
    per_token = 2 * facts.hidden_size + attention + 3 * facts.intermediate_size
    gathered = 0
    if facts.task == "generate":
        gathered = _MAX_PADDING * shape.num_blocks * shape.block_tokens * kv_bytes_per_token(facts, shape.dtype)
    layer = shape.max_step_tokens * per_token * size + gathered
    if not last or facts.task == "embed":
        return layer
    logits = shape.max_running * facts.vocab_size * (size + 2 * _FLOAT32_BYTES)
    return max(layer, logits)
