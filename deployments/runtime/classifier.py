"""A classifier: tokenized inputs in, the probability of every label out. Runs whole, in one stage.

The model is transformers' own class with its own head: pooler and classifier of an encoder, the last token's score of
a decoder. Notation: B inputs, T tokens of the longest, L labels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from deployments.runtime.adapter import merge_adapter
from deployments.runtime.loading import load_model
from deployments.runtime.padding import pad
from deployments.runtime.support import UnsupportedModelError


class ClassifierRunner:
    """The model with its head. Not thread-safe."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """Load it; UnsupportedModelError for a head of regression, ValueError when tensors are missing."""
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        if config.problem_type == "regression":
            raise UnsupportedModelError(f"{directory}: a head of regression (problem_type) gives no probabilities")
        config.use_cache = False
        self._labels_exclude_each_other = config.problem_type != "multi_label_classification"
        self._device = device
        self._padding_id: int | None = config.get_text_config().pad_token_id
        self.model = load_model(
            AutoModelForSequenceClassification, directory, config, dtype=dtype, device=device, attention="sdpa"
        )
        merge_adapter(directory, self.model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @torch.inference_mode()
    def embed(self, inputs: Sequence[Sequence[int]]) -> np.ndarray:
        """Probabilities of the labels for each tokenized input, float32 [B, L]; inputs must not be empty.

        They sum to one, except where a text may have several labels (``problem_type``). Decoders find the last token
        by the padding token's id, so one that has none takes its inputs one by one.
        """
        if self._padding_id is None:
            logits_BL = torch.cat([self._logits([token_ids], 0) for token_ids in inputs])
        else:
            logits_BL = self._logits(inputs, self._padding_id)
        if self._labels_exclude_each_other:
            return logits_BL.softmax(-1).cpu().numpy()
        return logits_BL.sigmoid().cpu().numpy()

    def _logits(self, inputs: Sequence[Sequence[int]], padding_id: int) -> torch.Tensor:
        ids_BT, mask_BT = pad(inputs, padding_id, self._device)
        logits_BL: torch.Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return logits_BL.float()
