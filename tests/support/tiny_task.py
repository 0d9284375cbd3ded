"""A small language model in plain torch, data for it, and specs: all that trainer tests need, made in milliseconds.

Dimensions: B sequences, S positions, D width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from train_jobs.trainer.spec import (
    Adam,
    BatchSpec,
    CheckpointSpec,
    DurationSpec,
    EvaluationSpec,
    ScheduleSpec,
    Single,
    TrainSpec,
)
from train_jobs.trainer.task import LossParts, MicroBatch

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 61, 32, 4, 4, 16

TINY_SPEC = TrainSpec(
    optimizer=Adam(kind="adamw", lr=3e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8),
    schedule=ScheduleSpec(kind="cosine", warmup_steps=3, final_fraction=0.1, decay_steps=None),
    strategy=Single(),
    batch=BatchSpec(sequences=16, micro_sequences=4),
    duration=DurationSpec(kind="steps", amount=20),
    checkpoint=CheckpointSpec(every_steps=5, keep_last=2, keep_best=0),
    evaluation=None,
    precision="float32",
    clip_norm=1.0,
    ema=None,
    activation_checkpointing=False,
    compile=False,
    deterministic=True,
    seed=7,
    data_digest="d" * 12,
)
EVALUATION = EvaluationSpec(every_steps=5, metric="loss", mode="min")


def tiny_spec(**changes: Any) -> TrainSpec:
    """The tiny spec with some fields changed."""
    return replace(TINY_SPEC, **changes)


@dataclass(frozen=True)
class TinySequences:
    """What the data give per read."""

    token_ids_BS: np.ndarray  # noqa: N815
    segments_BS: np.ndarray  # noqa: N815
    loss_mask_BS: np.ndarray  # noqa: N815
    labels_B: np.ndarray | None = None  # noqa: N815


class TinyShards:
    """Random sequences with padding of random length, so that micro-batches have different numbers of targets."""

    sequence_tokens = LENGTH

    def __init__(self, num_sequences: int = 50, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        start, stride = random.integers(0, VOCABULARY, (2, num_sequences, 1))
        self._tokens = ((start + stride * np.arange(LENGTH)) % VOCABULARY).astype(np.int32)
        lengths = random.integers(LENGTH // 2, LENGTH + 1, (num_sequences, 1))
        self._segments = (np.arange(LENGTH) < lengths).astype(np.int32)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, indices: np.ndarray) -> TinySequences:
        """Rows by number."""
        segments = self._segments[indices]
        mask = segments.astype(np.uint8)
        mask[:, 0] = 0
        return TinySequences(self._tokens[indices], segments, mask)


class TinyLayer(nn.Module):
    """Attention and a feed-forward part, each behind a norm."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.merge = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Causal."""
        parts = self.attend(self.norm_1(x_BSD)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x_BSD = x_BSD + self.dropout(self.merge(heads.transpose(1, 2).flatten(2)))
        return x_BSD + self.dropout(self.down(torch.relu(self.up(self.norm_2(x_BSD)))))


class TinyModel(nn.Module):
    """Any run of layers, with the embedding and the head or without; names are those of the whole."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(TinyLayer(dropout) for _ in range(LAYERS))
        self.head: nn.Module | None = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids or activations to activations or logits."""
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            x = layer(x)
        return x if self.head is None else self.head(x)


@dataclass
class TinyTask:
    """Next-token prediction; remembers which sequences it saw at which step, as ``seen``."""

    dropout: float = 0.0
    frozen: str | None = None
    """Parameters whose names begin so are not trained."""

    def __post_init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def build_model(self, spec: TrainSpec) -> nn.Module:
        """Random under the spec's seed."""
        torch.manual_seed(spec.seed)
        model = TinyModel(self.dropout)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.frozen is None or not name.startswith(self.frozen))
        return model

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> LossParts:
        """Sum of cross entropies over the targets."""
        return self.pipeline_loss(model(micro_batch["token_ids_BS"]), micro_batch)

    def evaluate(self, model: nn.Module, data: TinyShards) -> Mapping[str, Any]:
        """Mean loss."""
        batch = data.read(np.arange(len(data)))
        logits = model(torch.from_numpy(batch.token_ids_BS.astype(np.int64)))
        parts = _loss(
            logits, torch.from_numpy(batch.token_ids_BS.astype(np.int64)), torch.from_numpy(batch.loss_mask_BS)
        )
        return {"loss": float(parts.sum / parts.count)}

    def export(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """One file."""
        save_file(dict(weights), directory / "model.safetensors")

    def pipeline_parts(self, model: nn.Module, num_stages: int) -> Sequence[nn.Module]:
        """Equal runs of layers."""
        assert isinstance(model, TinyModel)
        per_stage = LAYERS // num_stages
        parts = []
        for number in range(num_stages):
            part = TinyModel()
            part.embed = model.embed if number == 0 else None
            part.head = model.head if number == num_stages - 1 else None
            chosen = range(number * per_stage, (number + 1) * per_stage)
            part.layers = nn.ModuleDict({str(layer): model.layers[layer] for layer in chosen})
            parts.append(part)
        return parts

    def pipeline_inputs(self, micro_batch: MicroBatch) -> Mapping[str, torch.Tensor]:
        """Nothing: attention is causal, and padding comes last."""
        return {}

    def pipeline_loss(self, output: torch.Tensor, micro_batch: MicroBatch) -> LossParts:
        """Of logits."""
        self.seen.setdefault(micro_batch.step, []).extend(micro_batch.sequence_ids)
        return _loss(output, micro_batch["token_ids_BS"], micro_batch["loss_mask_BS"])


def _loss(logits_BSV: torch.Tensor, token_ids_BS: torch.Tensor, loss_mask_BS: torch.Tensor) -> LossParts:
    targets = token_ids_BS[:, 1:].masked_fill(loss_mask_BS[:, 1:] == 0, -100)
    total = cross_entropy(logits_BSV[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")
    return LossParts(sum=total, count=(targets != -100).sum().float())
