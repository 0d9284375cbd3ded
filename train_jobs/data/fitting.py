"""Prepared data and what a model can take enter; nothing leaves but an error that says what does not fit."""

from collections.abc import Sequence

from cluster.errors import DataError
from cluster.runs.prepared import Manifest


def check_fits(
    manifest: Manifest,
    *,
    vocab_size: int,
    context_tokens: int | None = None,
    labels: Sequence[str] | None = None,
    tokenizer_digest: str | None = None,
) -> None:
    """DataError when a model with these limits cannot be trained or evaluated on the data.

    ``labels`` are those that a trained classifier knows, in the order of its outputs.
    """
    name = f"data {manifest.name}"
    if manifest.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{name}: its tokenizer has {manifest.tokenizer.vocab_size} tokens, the model reads {vocab_size}; "
            "prepare it with the model's own tokenizer"
        )
    if context_tokens is not None and manifest.sequence_tokens > context_tokens:
        raise DataError(
            f"{name}: sequences of {manifest.sequence_tokens} tokens, but the model's context is {context_tokens}; "
            f"set sequence_tokens <= {context_tokens}"
        )
    if tokenizer_digest is not None and tokenizer_digest != manifest.tokenizer.digest:
        raise DataError(
            f"{name}: it was tokenized by {manifest.tokenizer.source}, not by the model's own tokenizer; prepare it "
            "with the model as `tokenizer`"
        )
    if labels is not None and manifest.labels is not None and tuple(labels) != manifest.labels:
        unknown = [label for label in manifest.labels if label not in labels]
        what = (
            f"the model does not know {', '.join(unknown)}" if unknown else "the model has others, or another order"
        )
        raise DataError(f"{name}: labels {', '.join(manifest.labels)}: {what}; set `labels` to {', '.join(labels)}")
