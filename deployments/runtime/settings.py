"""What a stage's runtime is told: which slice of which checkpoint, in which format, on what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from deployments.runtime.quantize import Quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Kernels = Literal["auto", "native", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSlice:
    """Which part of a model a stage holds: layers ``start .. stop`` (half-open), and whether it is an end."""

    start: int
    stop: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Everything one stage's runtime must know."""

    directory: Path
    part: StageSlice
    dtype: torch.dtype
    device: torch.device
    context_tokens: int
    num_blocks: int
    block_tokens: int
    quantization: Quantization | None = None
    kernels: Kernels = "auto"
    """``auto`` takes the native kernels where machine and model allow; ``native`` fails where they do not."""
    num_threads: int = 1
    """Threads of the native kernels; torch has its own setting, for the whole process."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the adapters that sequences may name."""
