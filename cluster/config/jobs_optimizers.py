"""The ``optimizer:`` and ``schedule:`` of a train job: how gradients become updates, and how large these are when."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from cluster.config.base import StrictModel

MAX_STEPS = 10**9
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Share = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=1000)]
Decay = Annotated[float, Field(ge=0, le=10)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Betas = Annotated[tuple[Share, Share], Field(strict=False)]


class SgdOptimizer(StrictModel):
    """Stochastic gradient descent."""

    kind: Literal["sgd"]
    """How gradients become updates: ``sgd``, ``rmsprop``, ``adam``, ``adamw``, ``adamw8bit`` or ``muon``."""
    lr: LearningRate
    """Learning rate: size of a step, at the top of the schedule."""
    weight_decay: Decay = 0.0
    """Share of a matrix's weights, times the learning rate, that each step takes away."""
    momentum: Share = 0.0
    """Share of the last update that is made again."""
    nesterov: bool = False
    """Whether the momentum looks one step ahead."""


class RmsPropOptimizer(StrictModel):
    """RMSprop: each step is divided by the running size of its gradients."""

    kind: Literal["rmsprop"]
    """How gradients become updates: ``sgd``, ``rmsprop``, ``adam``, ``adamw``, ``adamw8bit`` or ``muon``."""
    lr: LearningRate
    """Learning rate: size of a step, at the top of the schedule."""
    weight_decay: Decay = 0.0
    """Share of a matrix's weights, times the learning rate, that each step takes away."""
    momentum: Share = 0.0
    """Share of the last update that is made again."""
    alpha: Share = 0.99
    """Share of the old mean square that is kept each step."""
    eps: Epsilon = 1e-8
    """Added to what is divided by."""


class AdamOptimizer(StrictModel):
    """Adam, whose weight decay goes through the gradient."""

    kind: Literal["adam"]
    """How gradients become updates: ``sgd``, ``rmsprop``, ``adam``, ``adamw``, ``adamw8bit`` or ``muon``."""
    lr: LearningRate
    """Learning rate: size of a step, at the top of the schedule."""
    weight_decay: Decay = 0.0
    """Share of a matrix's weights that is added to its gradient."""
    betas: Betas = (0.9, 0.999)
    """Shares of the old mean and of the old mean square that are kept each step."""
    eps: Epsilon = 1e-8
    """Added to what is divided by."""


class AdamWOptimizer(StrictModel):
    """AdamW, with states in 32 bits, or in 8 for a quarter of the memory (needs torchao)."""

    kind: Literal["adamw", "adamw8bit"]
    """How gradients become updates: ``sgd``, ``rmsprop``, ``adam``, ``adamw``, ``adamw8bit`` or ``muon``."""
    lr: LearningRate
    """Learning rate: size of a step, at the top of the schedule."""
    weight_decay: Decay = 0.01
    """Share of a matrix's weights, times the learning rate, that each step takes away."""
    betas: Betas = (0.9, 0.999)
    """Shares of the old mean and of the old mean square that are kept each step."""
    eps: Epsilon = 1e-8
    """Added to what is divided by."""


class MuonOptimizer(StrictModel):
    """Muon for the matrices of the layers, AdamW for everything else, at one learning rate."""

    kind: Literal["muon"]
    """How gradients become updates: ``sgd``, ``rmsprop``, ``adam``, ``adamw``, ``adamw8bit`` or ``muon``."""
    lr: LearningRate
    """Learning rate, scaled so that one of AdamW fits."""
    weight_decay: Decay = 0.01
    """Share of a matrix's weights, times the learning rate, that each step takes away."""
    momentum: Share = 0.95
    """Share of the last update of a matrix that is made again."""
    nesterov: bool = True
    """Whether the momentum looks one step ahead."""
    betas: Betas = (0.9, 0.999)
    """AdamW's shares of the old mean and mean square."""
    eps: Epsilon = 1e-8
    """Added to what AdamW divides by."""


Optimizer: TypeAlias = AdamWOptimizer | SgdOptimizer | RmsPropOptimizer | AdamOptimizer | MuonOptimizer


class ScheduleSection(StrictModel):
    """The learning rate over the steps: it rises during the warm-up, then goes on by ``kind``."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """``linear`` and ``cosine`` fall until the end, ``wsd`` stays and falls in its last ``decay_steps``."""
    warmup_steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 0
    """Steps over which it rises from nothing."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the learning rate at the end; 0 when absent. Not with ``constant``."""
    decay_steps: Steps | None = None
    """Steps over which ``wsd`` falls."""
