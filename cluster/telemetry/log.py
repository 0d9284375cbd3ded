"""One log format: JSON lines with a level, a message, and the fields that find a request again."""

import json
import logging
import time
from typing import Any


def log_event(logger: logging.Logger, event: str, **fields: Any) -> None:
    """Log ``event`` with ``fields`` (``request_id``, ``model``, ``replica``, ``stage`` by those names)."""
    logger.info(json.dumps({"ts": round(time.time(), 3), "event": event} | fields, default=str))
