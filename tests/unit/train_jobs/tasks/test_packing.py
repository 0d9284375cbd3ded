"""Documents of a packed sequence do not see each other."""

import pytest
import torch

from tests.support.tiny_models import tiny_model
from train_jobs.tasks.language import LanguageModel
from train_jobs.tasks.packing import longest_tokens, packed_positions

SEGMENTS_BS = torch.tensor([[1, 1, 1, 2, 3, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.int32)


def test_positions_begin_anew_with_every_document_and_padding_goes_on() -> None:
    assert packed_positions(SEGMENTS_BS).tolist() == [
        [0, 1, 2, 0, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]


def test_length_is_that_of_the_longest_in_steps_of_sixteen() -> None:
    segments_BS = torch.zeros((2, 40), dtype=torch.int32)
    segments_BS[0, :17] = 1
    assert longest_tokens(segments_BS) == 32
    segments_BS[1, :36] = 1
    assert longest_tokens(segments_BS) == 40


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mistral", "qwen3_moe"])
def test_logits_of_packed_documents_are_those_of_each_alone(model_type: str) -> None:
    network = tiny_model(model_type)
    ids_BS = torch.randint(3, 320, SEGMENTS_BS.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_NV = LanguageModel(network)(ids_BS, SEGMENTS_BS, torch.ones_like(SEGMENTS_BS, dtype=torch.bool))
        logits_BSV = logits_NV.view(2, 9, -1)
        for row, first, stop in [(0, 0, 3), (0, 3, 4), (0, 4, 8), (1, 0, 6)]:
            alone_SV = network(input_ids=ids_BS[row : row + 1, first:stop], use_cache=False).logits[0]
            torch.testing.assert_close(logits_BSV[row, first:stop], alone_SV, rtol=1e-4, atol=1e-4)
