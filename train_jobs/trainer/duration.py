"""How many optimizer steps a duration is: sizes in, a number out."""

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
