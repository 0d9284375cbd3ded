"""Documents of a packed sequence do not see each other."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.tiny_models import tiny_model
from train_jobs.tasks import language
from train_jobs.tasks.language import LanguageModel, by_position
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
def test_packed_documents_score_as_each_alone(model_type: str) -> None:
    network = tiny_model(model_type)
    ids_BS = torch.randint(3, 320, SEGMENTS_BS.shape, generator=torch.Generator().manual_seed(1))
    mask_BS = (SEGMENTS_BS > 0) & (packed_positions(SEGMENTS_BS) > 0)
    with torch.no_grad():
        nats_N, correct_N = LanguageModel(network)(ids_BS, SEGMENTS_BS, mask_BS)
        nats_BS, correct_BS = by_position(nats_N, mask_BS), by_position(correct_N.float(), mask_BS)
        for row, first, stop in [(0, 0, 3), (0, 4, 8), (1, 0, 6)]:
            document_BS = ids_BS[row : row + 1, first:stop]
            logits_SV = network(input_ids=document_BS, use_cache=False).logits[0, :-1]
            nats_S = cross_entropy(logits_SV, document_BS[0, 1:], reduction="none")
            torch.testing.assert_close(nats_BS[row, first + 1 : stop], nats_S, rtol=1e-4, atol=1e-4)
            hits_S = logits_SV.argmax(-1) == document_BS[0, 1:]
            assert correct_BS[row, first + 1 : stop].tolist() == hits_S.float().tolist()
    assert len(nats_N) == 2 + 3 + 5


def test_targets_scored_in_parts_have_the_same_losses_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_model("gemma2").train()
    ids_BS = torch.randint(3, 320, (2, 10), generator=torch.Generator().manual_seed(1))
    mask_BS = SEGMENTS_BS > 0
    found = []
    for rows in (language.ROWS_AT_ONCE, 4):
        monkeypatch.setattr(language, "ROWS_AT_ONCE", rows)
        nats_N, _ = LanguageModel(network)(ids_BS, SEGMENTS_BS, mask_BS)
        gradients = torch.autograd.grad(nats_N.sum(), [*network.parameters()])
        found.append([nats_N.detach(), *gradients])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
