"""Quantized weights on the torch path: the distribution is that of a transformers model with the rounded weights."""

from pathlib import Path

import pytest
import torch

from deployments.messages import SamplingParams, SequenceStart, SequenceStep, StepInput
from deployments.runtime.quantize import dequantize, quantize
from deployments.runtime.support import UnsupportedModelError
from tests.support.local_stages import load_runners
from tests.support.tiny_models import save_tiny_model

PROMPT = (5, 9, 200, 31, 17, 44, 3)


def next_logprobs(directory: Path, borders: list[int], quantization: str | None) -> torch.Tensor:
    """Log-probabilities of the token after PROMPT, by token id."""
    sampling = SamplingParams(max_tokens=1, logprobs=320)
    start = SequenceStart(1, PROMPT, len(PROMPT), sampling, 7, 0, (2,))
    step = StepInput(step=0, sequences=(SequenceStep(1, PROMPT, 0, tuple(range(2)), True),), started=(start,))
    result = None
    for runner in load_runners(directory, borders, quantization=quantization):
        result = runner.run(step, result)
    (sample,) = result
    return torch.tensor([logprob for _, logprob in sorted(sample.top)])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("int4", 4)])
def test_every_cut_computes_with_the_rounded_weights(tmp_path, model_type, quantization, bits):
    reference = save_tiny_model(tmp_path, model_type)
    plain = next_logprobs(tmp_path, [0, 4], None)
    head = reference.lm_head.weight.detach().clone()
    reference.lm_head.weight = torch.nn.Parameter(head)  # llama's is tied to the embedding, which is not rounded
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                rounded = quantize(parameter, bits=8 if name == "lm_head.weight" else bits)
                parameter.copy_(dequantize(rounded, torch.float32))
        expected = torch.log_softmax(reference(torch.tensor([PROMPT])).logits[0, -1], dim=-1)
    for borders in ([0, 4], [0, 1, 4]):
        ours = next_logprobs(tmp_path, borders, quantization)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert (ours - plain).abs().max() > 1e-3


def test_mixtures_of_experts_are_refused(tmp_path):
    save_tiny_model(tmp_path, "mixtral")
    with pytest.raises(UnsupportedModelError, match=r"experts.* has shape \[4, .*remove `quantization`"):
        load_runners(tmp_path, [0, 4], quantization="int8")
