"""What a training worker holds, by strategy and optimizer."""

from dataclasses import replace

import pytest

from tests.support.tiny_task import tiny_spec
from train_jobs.sizes import ModelSizes, WorkerMemory, worker_memory
from train_jobs.trainer.spec import Adam, BatchSpec, Ddp, Fsdp, Hsdp, ParameterServer, Pipeline, Sgd, TrainSpec

MODEL = ModelSizes(num_parameters=1000, num_trained=1000, num_layers=10, hidden_size=8, vocab_size=50)
ADAMW = Adam(kind="adamw", lr=1.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
SPEC = replace(
    tiny_spec(strategy=Ddp()), optimizer=ADAMW, precision="float32", ema=None, activation_checkpointing=False,
    batch=BatchSpec(sequences=8, micro_sequences=2),
)  # fmt: skip


def memory(spec: TrainSpec = SPEC, num_workers: int = 4, model: ModelSizes = MODEL) -> WorkerMemory:
    return worker_memory(model, spec, num_workers, sequence_tokens=16, has_logits=True)


def test_whole_weights_gradients_and_two_states() -> None:
    found = memory()
    assert (found.weights, found.gradients, found.optimizer, found.average, found.gathered) == (
        4000,
        4000,
        8000,
        0,
        0,
    )
    assert found.checkpoint == 12000
    assert found.certain == 16000


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        (Fsdp(), 4),
        (Hsdp(shard_workers=2), 2),
        (Pipeline(schedule="1f1b", data_parallel=2, stages_per_worker=1), 2),
    ],
)
def test_what_is_cut_is_shared(strategy: object, parts: int) -> None:
    found = memory(replace(SPEC, strategy=strategy))  # type: ignore[arg-type]
    assert found.certain == 16000 // parts
    assert (found.gathered > 0) == (not isinstance(strategy, Pipeline))


def test_a_parameter_server_has_the_states_and_the_others_the_activations() -> None:
    spec = replace(SPEC, strategy=ParameterServer(max_staleness=4), ema=0.9)
    server = memory(spec, model=replace(MODEL, hidden_size=1, vocab_size=1))
    assert (server.weights, server.gradients, server.optimizer, server.average) == (4000, 0, 8000, 4000)
    assert (server.messages, server.activations) == (3 * 4000, 0)
    assert server.certain == 4000 + 8000 + 4000 + 3 * 4000
    other = memory(spec, model=replace(MODEL, hidden_size=800))
    assert (other.weights, other.gradients, other.messages) == (4000, 4000, 4000)
    assert (other.optimizer, other.average, other.checkpoint) == (0, 0, 0)
    assert other.activations == memory(model=replace(MODEL, hidden_size=800)).activations


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        (Sgd(lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False), 0),
        (Sgd(lr=1.0, weight_decay=0.0, momentum=0.9, nesterov=False), 4000),
        (replace(ADAMW, kind="adamw8bit"), 2000),
    ],
)
def test_optimizers_keep_more_or_less(optimizer: object, states: int) -> None:
    assert memory(replace(SPEC, optimizer=optimizer)).optimizer == states  # type: ignore[arg-type]


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    found = memory(model=replace(MODEL, num_trained=10))
    assert (found.weights, found.gradients, found.optimizer) == (4000, 40, 80)


def test_activations_grow_with_the_micro_batch_and_shrink_by_recomputing() -> None:
    plain = memory().activations
    assert memory(replace(SPEC, batch=BatchSpec(sequences=8, micro_sequences=4))).activations == 2 * plain
    assert memory(replace(SPEC, activation_checkpointing=True)).activations < plain / 3
    assert memory(replace(SPEC, precision="bfloat16")).activations < plain


def test_an_average_is_another_copy() -> None:
    assert memory(replace(SPEC, ema=0.99)).average == 4000
