"""A stage's slice on the native kernels: a step and activations in, activations or logits out.

Activations between stages are the float32 residual stream, so that the number of stages changes no bit.
T tokens in the step, D hidden size, R rows whose logits are wanted, V vocabulary.
"""

import ctypes
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain

import torch

from deployments.messages import SequenceStep
from deployments.runtime.native.architecture import Architecture, NotNativeError, read_architecture
from deployments.runtime.native.build import load_library
from deployments.runtime.native.library import Format, Handle, SliceShape, StepArrays
from deployments.runtime.native.rope import rotary_angles
from deployments.runtime.native.weights import Checkpoint, check_tensors, load_adapters, load_weights
from deployments.runtime.settings import RunnerConfig

_UNIT_TOKENS = 16
_FORMATS = {None: Format.BF16, "int8": Format.INT8, "int4": Format.INT4}


class NativeSlice:
    """Layers of a model with their KV cache. Not thread-safe."""

    dtype = torch.float32
    """Of the activations between stages."""

    def __init__(self, config: RunnerConfig) -> None:
        architecture, checkpoint = _examine(config)
        self.kernels = f"amx-{config.quantization or 'bf16'}"
        self.hidden_size = architecture.hidden_size
        self.vocab_size = architecture.vocab_size
        self._part = config.part
        shape = _shape(config, architecture)
        self._handle = Handle(shape)
        angles = rotary_angles(
            architecture.rope, head_dim=architecture.head_dim, num_positions=config.context_tokens
        ).contiguous()
        self._handle.call("load_angles", angles.data_ptr())
        for index, layer in enumerate(range(config.part.start, config.part.stop)):
            window, rotates = architecture.windows[layer] or 0, architecture.rotates[layer]
            self._handle.call("set_layer", index, window, int(rotates))
        load_weights(
            self._handle,
            checkpoint,
            architecture,
            config.part,
            quantization=config.quantization,
            shares_embedding=bool(shape.shares_embedding),
        )
        self._adapters = {name: number for number, name in enumerate(config.adapters)}
        self._adapter_bytes = load_adapters(self._handle, checkpoint, architecture, config.part, config.adapters)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights, with their scales and padding, and of the adapters beside them."""
        return self._handle.call("weight_bytes") + self._adapter_bytes

    def compute(
        self, sequences: Sequence[SequenceStep], hidden_TD: torch.Tensor | None, every_row: bool
    ) -> torch.Tensor:
        """Activations [T, D] float32, or on the last stage logits [R, V] float32.

        ValueError for a block table that does not cover its positions or names a block that does not exist, a token
        outside the vocabulary, a position beyond context_tokens, an adapter that is not here; the cache is then as it
        was.
        """
        arrays, kept = _step_arrays(sequences, every_row, self._adapters)
        if hidden_TD is not None:
            hidden_TD = hidden_TD.to(torch.float32).contiguous()
            if tuple(hidden_TD.shape) != (arrays.num_rows, self.hidden_size):
                raise ValueError(f"activations have shape {tuple(hidden_TD.shape)}, not {arrays.num_rows} rows")
            arrays.hidden_in = hidden_TD.data_ptr()
        elif not self._part.is_first:
            raise ValueError("a stage that is not the first needs activations")
        if self._part.is_last:
            output = torch.empty((arrays.num_samples, self.vocab_size), dtype=torch.float32)
            arrays.logits = output.data_ptr()
        else:
            output = torch.empty((arrays.num_rows, self.hidden_size), dtype=torch.float32)
            arrays.hidden_out = output.data_ptr()
        self._handle.call("forward", ctypes.byref(arrays))
        del kept
        return output


def _examine(config: RunnerConfig) -> tuple[Architecture, Checkpoint]:
    """What is to be loaded; raises NotNativeError with the reason why these kernels cannot."""
    if config.device.type != "cpu":
        raise NotNativeError(f"the device is {config.device.type}")
    if config.dtype != torch.bfloat16:
        raise NotNativeError(f"the dtype is {str(config.dtype).removeprefix('torch.')}, not bfloat16")
    if config.block_tokens % _UNIT_TOKENS:
        raise NotNativeError(f"block_tokens {config.block_tokens} is not a multiple of {_UNIT_TOKENS}")
    architecture = read_architecture(config.directory)
    checkpoint = Checkpoint(config.directory, range(config.part.start, config.part.stop))
    check_tensors(checkpoint, architecture, config.part)
    load_library()
    return architecture, checkpoint


def _shape(config: RunnerConfig, architecture: Architecture) -> SliceShape:
    part = config.part
    shares = part.is_first and part.is_last and architecture.ties_head and config.quantization is None
    return SliceShape(
        format=_FORMATS[config.quantization],
        head_format=Format.BF16 if config.quantization is None else Format.INT8,
        num_layers=part.stop - part.start,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        vocab_size=architecture.vocab_size,
        num_query_heads=architecture.num_query_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        has_embedding=part.is_first,
        has_head=part.is_last,
        shares_embedding=shares,
        has_head_norms=architecture.has_head_norms,
        num_blocks=config.num_blocks,
        block_tokens=config.block_tokens,
        context_tokens=config.context_tokens,
        num_threads=config.num_threads,
        norm_epsilon=architecture.norm_epsilon,
        attention_scale=architecture.head_dim**-0.5,
    )


def _step_arrays(
    sequences: Sequence[SequenceStep], every_row: bool, adapters: Mapping[str, int]
) -> tuple[StepArrays, "list[array[int]]"]:
    """The step as the library takes it, and the arrays that it points into."""
    unknown = [s for s in sequences if s.adapter is not None and s.adapter not in adapters]
    if unknown:
        raise ValueError(f"sequence {unknown[0].sequence_id}: no adapter {unknown[0].adapter!r} here")
    first_rows = [0, *accumulate(len(sequence.token_ids) for sequence in sequences)]
    sampled: Iterable[int] = (
        range(first_rows[-1])
        if every_row
        else chain.from_iterable(
            range(stop - sequence.num_logits, stop) for sequence, stop in zip(sequences, first_rows[1:], strict=True)
        )
    )
    try:
        columns = {
            "first_rows": array("i", first_rows),
            "positions": array("i", [sequence.position for sequence in sequences]),
            "first_blocks": array("i", [0, *accumulate(len(sequence.block_ids) for sequence in sequences)]),
            "blocks": array("i", chain.from_iterable(sequence.block_ids for sequence in sequences)),
            "tokens": array("i", chain.from_iterable(sequence.token_ids for sequence in sequences)),
            "sampled_rows": array("i", sampled),
        }
        if adapters:
            columns["adapters"] = array("i", [adapters.get(sequence.adapter or "", -1) for sequence in sequences])
    except OverflowError as error:
        raise ValueError(f"a token, position or block id of the step is no 32-bit integer: {error}") from error
    arrays = StepArrays(
        num_sequences=len(sequences),
        num_rows=first_rows[-1],
        num_samples=len(columns["sampled_rows"]),
        **{name: column.buffer_info()[0] for name, column in columns.items()},
    )
    return arrays, list(columns.values())
