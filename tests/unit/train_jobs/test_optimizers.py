"""Optimizers against closed forms and torch's own; schedules against their formulas; durations."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import nn

from cluster.errors import PlanError
from train_jobs.trainer.duration import total_steps
from train_jobs.trainer.optimizers import Optimizers
from train_jobs.trainer.schedules import check_schedule, learning_rate_factor
from train_jobs.trainer.spec import Adam, BatchSpec, DurationSpec, Muon, OptimizerSpec, RmsProp, ScheduleSpec, Sgd

LR, DECAY, EPS, BETAS = 0.1, 0.05, 1e-8, (0.9, 0.99)


def run(spec: OptimizerSpec, gradients: list[torch.Tensor], weight: torch.Tensor, name: str = "w") -> torch.Tensor:
    """The weight after one update per gradient."""
    parameter = nn.Parameter(weight.clone())
    matrices = frozenset({"w"} if parameter.ndim == 2 else ())
    optimizers = Optimizers(spec, {name: parameter}, layer_matrices=matrices)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizers.step(1.0)
    return parameter.detach()


def random(*shape: int, number: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(number)]


def closed_form(spec: OptimizerSpec, gradients: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """The textbook's formulas, one update after the other."""
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for number, gradient in enumerate(gradients, 1):
        match spec:
            case Sgd():
                gradient = gradient + spec.weight_decay * weight
                first = spec.momentum * first + gradient
                weight = weight - spec.lr * (gradient + spec.momentum * first if spec.nesterov else first)
            case RmsProp():
                gradient = gradient + spec.weight_decay * weight
                second = spec.alpha * second + (1 - spec.alpha) * gradient**2
                first = spec.momentum * first + gradient / (second.sqrt() + spec.eps)
                weight = weight - spec.lr * first
            case Adam():
                if spec.kind == "adam":
                    gradient = gradient + spec.weight_decay * weight
                else:
                    weight = weight * (1 - spec.lr * spec.weight_decay)
                first = spec.betas[0] * first + (1 - spec.betas[0]) * gradient
                second = spec.betas[1] * second + (1 - spec.betas[1]) * gradient**2
                mean, square = first / (1 - spec.betas[0] ** number), second / (1 - spec.betas[1] ** number)
                weight = weight - spec.lr * mean / (square.sqrt() + spec.eps)
    return weight


@pytest.mark.parametrize(
    "spec",
    [
        Sgd(lr=LR, weight_decay=DECAY, momentum=0.0, nesterov=False),
        Sgd(lr=LR, weight_decay=DECAY, momentum=0.9, nesterov=False),
        Sgd(lr=LR, weight_decay=DECAY, momentum=0.9, nesterov=True),
        RmsProp(lr=LR, weight_decay=DECAY, momentum=0.0, alpha=0.9, eps=EPS),
        RmsProp(lr=LR, weight_decay=DECAY, momentum=0.5, alpha=0.9, eps=EPS),
        Adam(kind="adam", lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS),
        Adam(kind="adamw", lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS),
    ],
    ids=["sgd", "momentum", "nesterov", "rmsprop", "rmsprop-momentum", "adam", "adamw"],
)
def test_updates_equal_the_closed_form(spec: OptimizerSpec) -> None:
    weight, *gradients = random(3, 5, number=6)
    torch.testing.assert_close(run(spec, gradients, weight), closed_form(spec, gradients, weight))


def test_vectors_do_not_decay() -> None:
    weight, *gradients = random(7, number=4)
    spec = Adam(kind="adamw", lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    without = Adam(kind="adamw", lr=LR, weight_decay=0.0, betas=BETAS, eps=EPS)
    torch.testing.assert_close(run(spec, gradients, weight), closed_form(without, gradients, weight))


MUON = Muon(lr=LR, weight_decay=DECAY, momentum=0.95, nesterov=True, betas=BETAS, eps=EPS)


def test_muon_of_layers_is_torchs() -> None:
    weight, *gradients = (tensor.float() for tensor in random(4, 6, number=4))
    expected = nn.Parameter(weight.clone())
    reference = torch.optim.Muon([expected], lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        expected.grad = gradient.clone()
        reference.step()
    assert torch.equal(run(MUON, gradients, weight), expected.detach())


def test_muon_leaves_the_rest_to_adamw() -> None:
    weight, *gradients = random(4, 6, number=4)
    spec = Adam(kind="adamw", lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    torch.testing.assert_close(run(MUON, gradients, weight, "head"), closed_form(spec, gradients, weight))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_8_bit_states_without_torchao_are_refused() -> None:
    spec = Adam(kind="adamw8bit", lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    with pytest.raises(PlanError, match=r"adamw8bit needs torchao.*install .*choose adamw"):
        Optimizers(spec, {"w": nn.Parameter(torch.ones(2, 2))}, layer_matrices=frozenset())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torchao compiles its step
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_8_bit_states_come_close_to_adamw() -> None:
    weight, *gradients = (tensor.float() for tensor in random(64, 128, number=6))
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": DECAY, "betas": BETAS, "eps": EPS}
    exact = run(Adam(kind="adamw", **settings), gradients, weight)
    close = run(Adam(kind="adamw8bit", **settings), gradients, weight)
    assert not torch.equal(close, exact)
    assert float((close - exact).norm() / (exact - weight).norm()) < 0.1


def schedule(kind: Any, *, warmup: int = 0, final: float | None = None, decay: int | None = None) -> ScheduleSpec:
    return ScheduleSpec(kind=kind, warmup_steps=warmup, final_fraction=final, decay_steps=decay)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (schedule("constant", warmup=2), [0.5] + [1.0] * 9),
        (schedule("linear", warmup=2, final=0.0), [0.5, 1.0] + [1 - n / 8 for n in range(8)]),
        (schedule("linear", final=0.2), [1 - 0.8 * n / 10 for n in range(10)]),
        (
            schedule("cosine", warmup=4, final=0.1),
            [0.25, 0.5, 0.75, 1.0] + [0.1 + 0.45 * (1 + math.cos(math.pi * n / 6)) for n in range(6)],
        ),
        (schedule("wsd", warmup=2, final=0.0, decay=4), [0.5] + [1.0] * 5 + [1.0, 0.75, 0.5, 0.25]),
    ],
    ids=["constant", "linear", "linear-final", "cosine", "wsd"],
)
def test_learning_rates(spec: ScheduleSpec, expected: list[float]) -> None:
    assert [learning_rate_factor(spec, step, 10) for step in range(10)] == pytest.approx(expected)


def test_schedules_that_do_not_fit_are_refused() -> None:
    check_schedule(schedule("wsd", warmup=5, decay=5), 10)
    with pytest.raises(PlanError, match="6 warm-up and 5 decay steps; limit: 10"):
        check_schedule(schedule("wsd", warmup=6, decay=5), 10)
    with pytest.raises(PlanError, match="wsd needs 1 or more"):
        check_schedule(schedule("wsd"), 10)


@pytest.mark.parametrize(
    ("kind", "amount", "steps"),
    [("steps", 7, 7), ("epochs", 3, 10), ("tokens", 1, 1), ("tokens", 2 * 16 * 100 + 1, 3)],
)
def test_duration_covers_what_was_asked_for(kind: Any, amount: int, steps: int) -> None:
    batch = BatchSpec(sequences=16, micro_sequences=4)
    duration = DurationSpec(kind=kind, amount=amount)
    assert total_steps(duration, batch, num_sequences=50, sequence_tokens=100) == steps


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torchao compiles its step
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_8_bit_states_come_back_as_they_were() -> None:
    weight, *gradients = (tensor.float() for tensor in random(64, 128, number=4))
    spec = Adam(kind="adamw8bit", lr=1e-2, weight_decay=DECAY, betas=BETAS, eps=EPS)
    first = nn.Parameter(weight.clone())
    before = Optimizers(spec, {"w": first}, layer_matrices=frozenset())
    for gradient in gradients[:2]:
        first.grad = gradient.clone()
        before.step(1.0)
    second = nn.Parameter(first.detach().clone())
    after = Optimizers(spec, {"w": second}, layer_matrices=frozenset())
    saved = {name: state.clone() for name, state in before.states().items()}
    empty = after.prepare_states({name: (state.shape, state.dtype) for name, state in saved.items()})
    assert {"w/exp_avg.codes", "w/exp_avg_sq.scale"} <= empty.keys() == saved.keys()
    for name, state in empty.items():
        state.copy_(saved[name])
    for parameter, optimizers in ((first, before), (second, after)):
        parameter.grad = gradients[2].clone()
        optimizers.step(1.0)
    assert torch.equal(first, second)
