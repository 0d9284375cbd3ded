"""Labels of a classifier: a checkpoint's ``config.json`` in, their names in the order of its logits out."""

from typing import Any

from cluster.plan.types import Task

_CLASSIFIER = "ForSequenceClassification"
_DEFAULT_LABELS = ("LABEL_0", "LABEL_1")
"""What transformers takes a classifier without ``id2label`` for."""


def task_mistake(config: dict[str, Any], task: Task) -> str | None:
    """Why a checkpoint with this ``config.json`` cannot serve ``task``, with the remedy; None when it can.

    A classifier's backbone may also embed.
    """
    architecture = (config.get("architectures") or ["none"])[0]
    is_classifier = architecture.endswith(_CLASSIFIER)
    if is_classifier and task == "generate":
        return f"{architecture} classifies and writes no text; set task: classify"
    if task != "classify":
        return None
    if not is_classifier:
        return f"{architecture} has no classification head, only classes *{_CLASSIFIER} have; set another task"
    try:
        read_labels(config)
    except ValueError as error:
        return f"config.json of this {architecture} has {error}"
    return None


def read_labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the labels; ValueError saying what is wrong with ``id2label``."""
    named = config.get("id2label")
    if named is None:
        return _DEFAULT_LABELS
    keys = [str(index) for index in range(len(named))]
    if not isinstance(named, dict) or sorted(map(str, named)) != sorted(keys):
        raise ValueError(f"id2label {named!r}, which must map 0, 1, ... to names; save it as transformers does")
    if len(keys) < 2:
        raise ValueError(
            f"id2label {named!r}: a single label has no probabilities to choose by, at least 2 are needed"
        )
    by_key = {str(key): str(name) for key, name in named.items()}
    return tuple(by_key[key] for key in keys)
