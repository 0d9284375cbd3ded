"""How long a sequence a model can take: the content of its ``config.json`` in, a number of tokens out."""

from collections.abc import Mapping
from typing import Any

_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
"""Model types whose position table starts after the padding token's id."""


def position_offset(config: Mapping[str, Any]) -> int:
    """Positions at the start of the table that no token has."""
    return int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in _OFFSET_POSITIONS else 0


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The longest context, in tokens; None where the config names none."""
    found = config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))
    return found - position_offset(config) if isinstance(found, int) else None
