"""One log format: JSON lines whose fields find a request again, from the gateway to the stages.

Fields by name: ``request_id``, ``model``, ``version``, ``stage``, ``endpoint``, ``status``, ``seconds``, ``outcome``.
Code logs with the standard library (``logger.info(text, extra={...})``); prompts and answers are never logged.
"""

import json
import logging
import sys

_OURS = ("cluster", "deployments", "train_jobs")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, message, the record's extra fields, and those of the process."""

    def __init__(self, **process_fields: str | int) -> None:
        super().__init__()
        self._process_fields = process_fields

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; an exception's trace is the field ``trace``."""
        line: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "message": record.getMessage(),
            **self._process_fields,
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(**process_fields: str | int) -> None:
    """Write our loggers' lines to standard error, which Ray keeps in a file per process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(**process_fields))
    _send_to([handler])


def log_with_serve() -> None:
    """Write our loggers' lines where Serve writes its own: the replica's log file, in Serve's JSON encoding."""
    _send_to(logging.getLogger("ray.serve").handlers)


def _send_to(handlers: list[logging.Handler]) -> None:
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers = list(handlers)
        logger.setLevel(logging.INFO)
        logger.propagate = False
