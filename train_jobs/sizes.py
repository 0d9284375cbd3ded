"""Memory of a training worker: sizes of a model and a job in, bytes by what they are for out. An estimate, no torch.

Dimensions: B sequences of a micro-batch, S tokens of a sequence, D model width, L layers, V vocabulary.
"""

from dataclasses import asdict, dataclass, replace

from train_jobs.trainer.spec import (
    Adam,
    Fsdp,
    Hsdp,
    Muon,
    OptimizerSpec,
    ParameterServer,
    Pipeline,
    RmsProp,
    Sgd,
    TrainSpec,
)

_FLOAT = 4
PROCESS_BYTES = 450 * 2**20
"""Resident memory of a worker with torch, transformers and Ray imported, before it has a model."""
_VALUES_PER_LAYER = 17
"""Values of width D that a layer keeps for its backward pass, for each token: 34 bytes of 16 bits, without the scores
of attention, which fused kernels do not keep (arXiv 2205.05198, section 4.1)."""
_LOGIT_COPIES = 3
"""Logits, their softmax in float32, and their gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What a model is made of; ``num_parameters`` are all that a worker holds, ``num_trained`` those that learn."""

    num_parameters: int
    num_trained: int
    num_layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMemory:
    """Bytes of one worker, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    """Of the weights (``ema``)."""
    gathered: int
    """Layers that are whole for a moment, where weights are cut."""
    messages: int
    """Weights and gradients on their way between a parameter server and its workers, in host memory."""
    activations: int
    checkpoint: int
    """Copy in host memory that is being written."""
    process: int = PROCESS_BYTES

    @property
    def certain(self) -> int:
        """What is needed whatever the activations turn out to be."""
        return self.weights + self.gradients + self.optimizer + self.average + self.messages

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def worker_memory(
    model: ModelSizes, spec: TrainSpec, num_workers: int, *, sequence_tokens: int, has_logits: bool
) -> WorkerMemory:
    """Of the worker with the most to hold; ``has_logits``: the loss is over the vocabulary."""
    whole = _equal_memory(model, spec, num_workers, sequence_tokens=sequence_tokens, has_logits=has_logits)
    if not isinstance(spec.strategy, ParameterServer):
        return whole
    return max(server_memory(whole, num_workers), computing_memory(whole), key=lambda memory: memory.total)


def server_memory(whole: WorkerMemory, num_workers: int) -> WorkerMemory:
    """Of a parameter server: all that is trained, and a message for each other worker, its gradient."""
    return replace(whole, gradients=0, activations=0, messages=(num_workers - 1) * whole.gradients)


def computing_memory(whole: WorkerMemory) -> WorkerMemory:
    """Of a worker that only computes gradients, for a parameter server."""
    return replace(whole, optimizer=0, average=0, checkpoint=0, messages=whole.gradients)


def _equal_memory(
    model: ModelSizes, spec: TrainSpec, num_workers: int, *, sequence_tokens: int, has_logits: bool
) -> WorkerMemory:
    """Of a worker where all do the same."""
    cut = _cut(spec, num_workers)
    width = 2 if spec.precision == "bfloat16" else _FLOAT
    weights = _FLOAT * model.num_parameters // cut
    trained = _FLOAT * model.num_trained // cut
    states = int(trained * _states(spec.optimizer))
    average = trained if spec.ema is not None else 0
    return WorkerMemory(
        weights=weights,
        gradients=trained,
        optimizer=states,
        average=average,
        gathered=_gathered(model, spec, cut, width),
        messages=0,
        activations=_activations(model, spec, num_workers, sequence_tokens, width, has_logits=has_logits),
        checkpoint=trained + states + average,
    )


def _cut(spec: TrainSpec, num_workers: int) -> int:
    """Into how many parts one copy of the weights is cut."""
    match spec.strategy:
        case Fsdp():
            return num_workers
        case Hsdp(shard_workers=shard_workers):
            return shard_workers
        case Pipeline(data_parallel=data_parallel):
            return num_workers // data_parallel
        case _:
            return 1


def _states(optimizer: OptimizerSpec) -> float:
    """Bytes of states over bytes of float32 weights; Muon's are counted as if all were AdamW's."""
    match optimizer:
        case Sgd(momentum=momentum):
            return 1.0 if momentum else 0.0
        case RmsProp(momentum=momentum):
            return 2.0 if momentum else 1.0
        case Adam(kind="adamw8bit"):
            return 0.5
        case Adam() | Muon():
            return 2.0


def _gathered(model: ModelSizes, spec: TrainSpec, cut: int, width: int) -> int:
    """Where weights are cut (fsdp, hsdp), two whole layers are there at a time: that which computes, and the next."""
    if cut == 1 or not isinstance(spec.strategy, Fsdp | Hsdp):
        return 0
    return 2 * width * model.num_parameters // max(1, model.num_layers)


def _activations(
    model: ModelSizes, spec: TrainSpec, num_workers: int, sequence_tokens: int, width: int, *, has_logits: bool
) -> int:
    """Of one micro-batch; a pipeline's first worker has as many under way as there are workers in a row."""
    tokens = spec.batch.micro_sequences * sequence_tokens
    values_per_layer = _VALUES_PER_LAYER * width * tokens * model.hidden_size
    if spec.activation_checkpointing:
        kept = model.num_layers * width * tokens * model.hidden_size + values_per_layer
    else:
        kept = model.num_layers * values_per_layer
    if isinstance(spec.strategy, Pipeline):
        depth = num_workers // spec.strategy.data_parallel
        kept = kept // depth * depth
    logits = _LOGIT_COPIES * _FLOAT * tokens * model.vocab_size if has_logits else 0
    return kept + logits
