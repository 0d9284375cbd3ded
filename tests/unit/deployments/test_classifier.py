"""A classifier's probabilities are those of plain transformers, whatever company an input has."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from deployments.runtime.classifier import ClassifierRunner
from deployments.runtime.support import UnsupportedModelError
from tests.support.tiny_models import save_tiny_classifier

LABELS = ("business", "sport", "tech")
INPUTS = [tuple(range(5, 5 + length)) for length in (3, 11, 1, 7)]


def load(directory: Path) -> ClassifierRunner:
    return ClassifierRunner(directory, dtype=torch.float32, device=torch.device("cpu"))


@torch.inference_mode()
def plain_logits(directory: Path) -> torch.Tensor:
    """Each input alone, through transformers only."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    return torch.cat([model(input_ids=torch.tensor([token_ids])).logits for token_ids in INPUTS])


@pytest.mark.parametrize("pad_token_id", [0, None])
@pytest.mark.parametrize("model_type", ["bert", "llama", "qwen3"])
def test_probabilities_are_those_of_transformers(model_type: str, pad_token_id: int | None, tmp_path: Path) -> None:
    save_tiny_classifier(tmp_path, model_type, LABELS, pad_token_id=pad_token_id)
    probabilities = load(tmp_path).embed(INPUTS)
    np.testing.assert_allclose(probabilities, plain_logits(tmp_path).softmax(-1), atol=1e-6)
    assert probabilities.dtype == np.float32
    assert np.ptp(probabilities, axis=0).min() > 0.01, "inputs that all look alike would prove nothing"


def test_several_labels_at_once_have_a_probability_each(tmp_path: Path) -> None:
    save_tiny_classifier(tmp_path, "bert", LABELS, problem_type="multi_label_classification")
    np.testing.assert_allclose(load(tmp_path).embed(INPUTS), plain_logits(tmp_path).sigmoid(), atol=1e-6)


def test_a_head_of_regression_is_refused(tmp_path: Path) -> None:
    save_tiny_classifier(tmp_path, "bert", LABELS, problem_type="regression")
    with pytest.raises(UnsupportedModelError, match="gives no probabilities"):
        load(tmp_path)


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    save_tiny_classifier(tmp_path, "bert", LABELS).bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the tensors .*classifier\.weight"):
        load(tmp_path)
