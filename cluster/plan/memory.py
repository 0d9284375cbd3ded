"""Bytes a stage needs: facts of the model and the shape of a step in, weights, KV cache and activations out."""

from dataclasses import dataclass

from cluster.plan.types import Dtype, Kernels, ModelFacts, Quantization

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED_BITS: dict[Quantization, int] = {"int8": 8, "int4": 5}
"""Of a weight; with int4, 32 of them share a grid of 32 bits."""
_HEAD_BITS = 8
_SCALE_BYTES = 4
"""Of a row of 8-bit weights."""
_FLOAT32_BYTES = 4
_KEY_LANE = 32
_BF16_INPUT = 2
_INTEGER_INPUT = 6
"""Bytes that native kernels hold for each value that goes into a matrix product."""
VLLM_BYTES = 2 * 2**30
"""What a process of vLLM takes besides weights and cache: 1.0 GiB of libraries and buffers for a small model that is
not compiled, and more while it compiles."""
_MAX_PADDING = 2
"""Padded area of gathered contexts over their tokens, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What bounds the tensors of one step: tokens computed, sequences sampled, and the KV pool they read."""

    dtype: Dtype
    quantization: Quantization | None = None
    kernels: Kernels = "torch"
    """``auto`` counts what the hungrier of the two needs."""
    max_step_tokens: int
    max_running: int
    speculative_tokens: int = 0
    num_blocks: int
    block_tokens: int

    @property
    def max_logits(self) -> int:
        """Rows of logits: one for each sequence, and one for each draft."""
        return self.max_running + max_step_drafts(self.max_running, self.speculative_tokens)


def max_step_drafts(max_running: int, speculative_tokens: int) -> int:
    """Drafts of one step, of all sequences together: as many as sequences, so that logits take twice the memory."""
    return max(max_running, speculative_tokens) if speculative_tokens else 0


def weight_bytes(
    facts: ModelFacts,
    *,
    start: int,
    stop: int,
    dtype: Dtype,
    quantization: Quantization | None = None,
    kernels: Kernels = "auto",
) -> int:
    """Bytes of the parameters of layers ``start .. stop`` and of what stands before the first and after the last.

    A tied output head is the embedding's own tensor, so a last stage that is not the first holds a second copy; a
    quantized one is always a second tensor. With torch, quantized weights are unpacked to ``dtype``; otherwise native
    kernels are taken for granted, because without them quantizing would be pointless. Norms and biases count as if
    they were quantized with the matrices of their layers; they are less than a thousandth of a layer.
    """
    size = DTYPE_BYTES[dtype]
    layers = sum(facts.layer_params[start:stop])
    first, last = start == 0, stop == facts.num_layers
    head = (facts.embedding_params if facts.tied_head else facts.head_params) if last else 0
    embedding = facts.embedding_params if first else 0
    other = facts.other_params * size if last else 0
    if quantization is None or kernels == "torch":
        shared = first and facts.tied_head and quantization is None
        return (layers + embedding + (0 if shared else head)) * size + other
    row = facts.hidden_size
    return (
        _quantized_bytes(layers, QUANTIZED_BITS[quantization], row)
        + embedding * size
        + _quantized_bytes(head, _HEAD_BITS, row)
        + other
    )


def _quantized_bytes(num_params: int, bits: int, row: int) -> int:
    """Packed integers, and with 8 bits the scales of rows of ``row``: longer ones have fewer."""
    scales = -(-num_params // row) * _SCALE_BYTES if bits == 8 else 0
    return num_params * bits // 8 + scales


def kv_bytes_per_token(facts: ModelFacts, dtype: Dtype, kernels: Kernels = "torch") -> int:
    """Bytes of the keys and values of one token in one layer; native kernels hold keys in rows of 32 values."""
    plain = 2 * facts.head_dim * DTYPE_BYTES[dtype]
    native = (-(-facts.head_dim // _KEY_LANE) * _KEY_LANE + facts.head_dim) * DTYPE_BYTES["bfloat16"]
    return facts.num_kv_heads * _most({"torch": plain, "native": native}, kernels)


def kv_bytes(facts: ModelFacts, shape: StepShape, num_layers: int) -> int:
    """Bytes of the paged KV cache of ``num_layers`` layers; nothing for a model that keeps no past."""
    if facts.task != "generate":
        return 0
    per_token = kv_bytes_per_token(facts, shape.dtype, shape.kernels)
    return shape.num_blocks * shape.block_tokens * num_layers * per_token


def activation_bytes(facts: ModelFacts, shape: StepShape, *, last: bool) -> int:
    """Most bytes of intermediate tensors at once, in one step of ``max_step_tokens`` tokens."""
    last = last and facts.task == "generate"
    return _most(
        {
            "torch": _torch_activation_bytes(facts, shape, last=last),
            "native": _native_activation_bytes(facts, shape, last=last),
        },
        shape.kernels,
    )


def _most(num_bytes: dict[Kernels, int], kernels: Kernels) -> int:
    """What ``kernels`` needs; with ``auto`` it is the processor that decides, so whatever is more."""
    return num_bytes.get(kernels, max(num_bytes.values()))


def _torch_activation_bytes(facts: ModelFacts, shape: StepShape, *, last: bool) -> int:
    """Of transformers' modules.

    Either one layer (residual and its copy, queries, keys, values, attention output, the two halves of the MLP, and
    the keys and values gathered from their blocks), or, on the last stage, the logits: a row per sequence and draft
    in the model's dtype and twice in float32, where sampling works. The two never exist together.

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
    logits = shape.max_logits * facts.vocab_size * (size + 2 * _FLOAT32_BYTES)
    return max(layer, logits) if last else layer


def _native_activation_bytes(facts: ModelFacts, shape: StepShape, *, last: bool) -> int:
    """Of the native kernels: float32 residual, queries, keys and values, and the inputs of matrix products.

    Those are bfloat16, or three bytes of integers twice over with quantized weights. Logits are float32 and stay
    beside them; sampling makes two more copies.
    """
    queries = facts.num_attention_heads * facts.head_dim
    kv = facts.num_kv_heads * facts.head_dim
    wide = _FLOAT32_BYTES * (facts.hidden_size + queries + 2 * kv)
    inputs = (_BF16_INPUT if shape.quantization is None else _INTEGER_INPUT) * (
        facts.hidden_size + queries + facts.intermediate_size
    )
    logits = shape.max_logits * facts.vocab_size * 3 * _FLOAT32_BYTES if last else 0
    return shape.max_step_tokens * (wide + inputs) + logits
