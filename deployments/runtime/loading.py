"""A transformers class and a directory in, the model ready for inference out: every tensor it needs, or an error."""

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging


def load_model(
    model_class: Any,
    directory: Path,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    may_lack: str | None = None,
) -> Any:
    """``model_class.from_pretrained``, from this machine's safetensors only, without gradients.

    ValueError when the checkpoint lacks a tensor, unless its name begins with ``may_lack``.
    """
    transformers_logging.disable_progress_bar()
    model, info = model_class.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        device_map={"": device},
    )
    missing = sorted(key for key in info["missing_keys"] if may_lack is None or not key.startswith(may_lack))
    if missing:
        raise ValueError(f"{directory} lacks the tensors {', '.join(missing)}")
    return model.eval().requires_grad_(False)
