"""How many optimizer steps a duration is, and micro-batches a step: sizes in, a number out."""

from cluster.errors import PlanError
from train_jobs.trainer.spec import BatchSpec, DurationSpec


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
