"""The gateway's account of itself: the answer of ``/health`` in, whether it holds anything at all out."""

from collections.abc import Mapping
from typing import Any


def _entry(health: Mapping[str, Any], model: str) -> Mapping[str, Any] | None:
    return next((entry for entry in health.get("models", ()) if entry["model"] == model), None)


def is_idle(health: Mapping[str, Any], model: str) -> bool:
    """Whether nothing is in flight, waits, or holds a block, in the answer of ``/health``."""
    entry = _entry(health, model)
    if entry is None:
        return False
    return not any((health["num_requests"], entry["num_running"], entry["num_waiting"], entry["kv_used_fraction"]))


def describe_health(health: Mapping[str, Any], model: str) -> str:
    """The same in words; empty where there is no answer."""
    entry = _entry(health, model)
    if entry is None:
        return ""
    return (
        f"{health['num_requests']} requests in flight, {entry['num_running']} running, "
        f"{entry['num_waiting']} waiting, {entry['kv_used_fraction']:.0%} of KV blocks used"
    )
