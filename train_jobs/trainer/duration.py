"""How many steps a duration is, micro-batches a step, and what is due after which step: numbers in and out."""

from cluster.errors import PlanError
from train_jobs.trainer.spec import BatchSpec, DurationSpec, EvaluationSpec, TrainSpec


def total_steps(duration: DurationSpec, batch: BatchSpec, *, num_sequences: int, sequence_tokens: int) -> int:
    """Steps that train on at least what was asked for; the last one is as large as every other."""
    match duration.kind:
        case "steps":
            return duration.amount
        case "epochs":
            return _ceil(duration.amount * num_sequences, batch.sequences)
        case "tokens":
            return _ceil(duration.amount, batch.sequences * sequence_tokens)


def _ceil(amount: int, per_step: int) -> int:
    return -(-amount // per_step)


def num_micro_batches(batch: BatchSpec, num_shares: int) -> int:
    """Micro-batches per step of each of ``num_shares`` shares; PlanError when they would not be equally many."""
    if batch.micro_sequences < 1 or batch.sequences < 1 or batch.sequences % batch.micro_sequences:
        raise PlanError(
            f"batch.micro_sequences: {batch.sequences} sequences are not a multiple of {batch.micro_sequences}; "
            "set micro_sequences to a divisor of sequences"
        )
    number = batch.sequences // batch.micro_sequences
    if number % num_shares:
        possible = ", ".join(map(str, exact_shares(batch, number)))
        raise PlanError(
            f"batch: {number} micro-batches of {batch.micro_sequences} sequences cannot be shared equally by "
            f"{num_shares} workers; allowed: {possible}; change workers, or batch.micro_sequences"
        )
    return number // num_shares


def exact_shares(batch: BatchSpec, limit: int) -> tuple[int, ...]:
    """Numbers of data-parallel workers up to ``limit`` at which the global batch stays exact."""
    number = batch.sequences // batch.micro_sequences
    return tuple(shares for shares in range(1, min(number, limit) + 1) if number % shares == 0)


def evaluation_due(evaluation: EvaluationSpec, step: int, num_steps: int) -> bool:
    """Whether the model is measured after ``step`` steps."""
    return step == num_steps or (evaluation.every_steps is not None and step % evaluation.every_steps == 0)


def save_due(spec: TrainSpec, step: int, num_steps: int) -> bool:
    """Whether a checkpoint follows ``step`` steps of a run that nobody stops: it is due, or an evaluation is."""
    if step == num_steps or step % spec.checkpoint.every_steps == 0:
        return True
    return spec.evaluation is not None and evaluation_due(spec.evaluation, step, num_steps)


def next_save(spec: TrainSpec, step: int, num_steps: int) -> int:
    """The first number of steps above ``step`` after which a checkpoint follows."""
    return next(later for later in range(step + 1, num_steps + 1) if save_due(spec, later, num_steps))
