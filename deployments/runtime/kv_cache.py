"""The paged KV cache of one stage: block tables in, slots to write and gather out.

Notation: T tokens in the step, S context length of a sequence, K KV heads, D head width, B decoding sequences.
A slot is ``block_id * block_tokens + offset``; each layer holds keys and values as [num_slots, K, D].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from deployments.messages import SequenceStep

_MAX_PADDING = 2


class KVCache:
    """Keys and values of a contiguous range of layers.

    Memory is ``2 * num_layers * num_blocks * block_tokens * num_kv_heads * head_dim`` elements, taken at once.
    """

    def __init__(
        self,
        *,
        layers: range,
        num_blocks: int,
        block_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks * block_tokens, num_kv_heads, head_dim)
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.device = device
        self._first = layers.start
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def write(self, layer: int, slots_T: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor) -> None:
        """Store the step's keys and values of ``layer`` (index in the whole model)."""
        self._keys[layer - self._first].index_copy_(0, slots_T, key_TKD)
        self._values[layer - self._first].index_copy_(0, slots_T, value_TKD)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at ``slots`` (any shape): two tensors [*slots.shape, K, D]."""
        return self._keys[layer - self._first][slots], self._values[layer - self._first][slots]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSlice:
    """One sequence with several new tokens: its rows in the step, and the slots of its whole context."""

    row_start: int
    row_stop: int
    position: int
    slots_S: torch.Tensor
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """True where a row may look: causal, and within ``window`` positions if given. Shape [rows, S]."""
        if window not in self._masks:
            device = self.slots_S.device
            query = torch.arange(self.position, self.position + self.row_stop - self.row_start, device=device)[
                :, None
            ]
            key = torch.arange(len(self.slots_S), device=device)[None, :]
            allowed = key <= query
            self._masks[window] = allowed if window is None else allowed & (key > query - window)
        return self._masks[window]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """Sequences of similar length with exactly one new token, padded to the longest context among them.

    A row is padded with its own first slot: a masked value that is not finite still spoils the sum it is left out
    of, so what one sequence overflowed must not stand in the row of another.
    """

    rows_B: torch.Tensor
    slots_BS: torch.Tensor
    lengths_B: torch.Tensor
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """True where a row may look. Shape [B, 1, 1, S]."""
        if window not in self._masks:
            key = torch.arange(self.slots_BS.shape[1], device=self.slots_BS.device)[None, :]
            lengths = self.lengths_B[:, None]
            allowed = key < lengths
            if window is not None:
                allowed = allowed & (key >= lengths - window)
            self._masks[window] = allowed[:, None, None, :]
        return self._masks[window]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayout:
    """Where one step's tokens lie in the cache; made once per step, used by every layer."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    prefills: tuple[PrefillSlice, ...]
    decodes: tuple[DecodeBatch, ...]
    sample_rows: torch.Tensor
    """Rows whose next token is wanted, in the order of the sequences."""


def lay_out(sequences: Sequence[SequenceStep], cache: KVCache) -> StepLayout:
    """Translate block tables to slots; ValueError where a block table does not cover its positions."""
    token_ids: list[int] = []
    positions: list[int] = []
    new_slots: list[torch.Tensor] = []
    sample_rows: list[int] = []
    prefills: list[PrefillSlice] = []
    decoding: list[tuple[int, torch.Tensor]] = []
    for sequence in sequences:
        start, num_new = len(token_ids), len(sequence.token_ids)
        context = _context_slots(sequence, cache)
        token_ids.extend(sequence.token_ids)
        positions.extend(range(sequence.position, sequence.position + num_new))
        new_slots.append(context[sequence.position :])
        sample_rows.extend(range(start + num_new - sequence.num_logits, start + num_new))
        if num_new == 1:
            decoding.append((start, context))
        else:
            prefills.append(
                PrefillSlice(row_start=start, row_stop=start + num_new, position=sequence.position, slots_S=context)
            )
    device = cache.device
    return StepLayout(
        token_ids_T=torch.tensor(token_ids, device=device),
        positions_T=torch.tensor(positions, device=device),
        slots_T=torch.cat(new_slots),
        prefills=tuple(prefills),
        decodes=tuple(_pad(batch) for batch in _by_length(decoding)),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
    )


def _context_slots(sequence: SequenceStep, cache: KVCache) -> torch.Tensor:
    length = sequence.position + len(sequence.token_ids)
    covered = len(sequence.block_ids) * cache.block_tokens
    if not sequence.token_ids or covered < length:
        raise ValueError(
            f"sequence {sequence.sequence_id}: {len(sequence.block_ids)} blocks cover {covered} tokens, "
            f"but the step ends at position {length}"
        )
    if max(sequence.block_ids) >= cache.num_blocks or min(sequence.block_ids) < 0:
        raise ValueError(f"sequence {sequence.sequence_id}: block id outside 0..{cache.num_blocks - 1}")
    blocks = torch.tensor(sequence.block_ids, device=cache.device)
    offsets = torch.arange(cache.block_tokens, device=cache.device)
    return (blocks[:, None] * cache.block_tokens + offsets[None, :]).view(-1)[:length]


def _by_length(decoding: list[tuple[int, torch.Tensor]]) -> list[list[tuple[int, torch.Tensor]]]:
    """Cut into batches whose padded area is at most twice their tokens: one long context costs itself alone."""
    batches: list[list[tuple[int, torch.Tensor]]] = []
    num_tokens = 0
    for row, slots in sorted(decoding, key=lambda each: len(each[1])):
        num_tokens += len(slots)
        if not batches or (len(batches[-1]) + 1) * len(slots) > _MAX_PADDING * num_tokens:
            batches.append([])
            num_tokens = len(slots)
        batches[-1].append((row, slots))
    return batches


def _pad(decoding: list[tuple[int, torch.Tensor]]) -> DecodeBatch:
    device = decoding[0][1].device
    lengths_B = torch.tensor([len(slots) for _, slots in decoding], device=device)
    slots_BS = torch.nn.utils.rnn.pad_sequence([slots for _, slots in decoding], batch_first=True)
    filled_BS = torch.arange(slots_BS.shape[1], device=device)[None, :] < lengths_B[:, None]
    return DecodeBatch(
        rows_B=torch.tensor([row for row, _ in decoding], device=device),
        slots_BS=torch.where(filled_BS, slots_BS, slots_BS[:, :1]),
        lengths_B=lengths_B,
    )
