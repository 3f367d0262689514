"""Options and fixtures shared by all tests."""

import os

# before vLLM is imported: one process, so that a test can look inside the engine and start many of them
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pathlib

import pytest
import torch
from triton_interpreter import use_interpreter_without_a_gpu

use_interpreter_without_a_gpu()
if torch.cuda.is_available():  # which has woken CUDA up: a forked worker could not use it
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

TINY = pathlib.Path(__file__).parent.parent / "examples" / "bamba-tiny"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail, instead of skip, tests whose GPUs are missing")


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = 2 if item.get_closest_marker("gpu2") else 1 if item.get_closest_marker("gpu") else 0
    found = torch.cuda.device_count()
    if needed > found:
        reason = f"needs {needed} NVIDIA GPU(s), found {found}"
        if item.config.getoption("--require-gpu"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny() -> str:
    """Path of the embedded trained checkpoint."""
    assert (TINY / "model.safetensors").is_file(), f"{TINY} is part of the repository and must be there"
    return str(TINY)
