"""A program that talks in; what it prints, logs and warns of in a file, and none of it on the terminal, out."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

from train_jobs.tasks.networks import quiet

_LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "httpx2", "absl", "fsspec")
_ONE_PROCESS = "DISABLE_MULTIPROC"
"""lm-eval's word for: do not fork, as of a process that computes with threads, or on a GPU."""


@contextmanager
def hushed(log: TextIO | None) -> Iterator[None]:
    """Send progress bars, logs and warnings to ``log``, or nowhere, and keep lm-eval in one process."""
    heard = log or io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(heard))
        stack.enter_context(redirect_stderr(heard))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")
        stack.enter_context(quiet())
        for name in _LOGGERS:
            stack.enter_context(_logging_to(name, logging.StreamHandler(heard)))
        stack.enter_context(_environment(_ONE_PROCESS, "1"))
        yield


@contextmanager
def _logging_to(name: str, handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
