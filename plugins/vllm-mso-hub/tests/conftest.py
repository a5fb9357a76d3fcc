"""The environment of vLLM's tests, set before torch is imported, and checkpoints that several tests use."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: one import of vLLM for all tests
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(name, value)

from llvmlite.binding import ffi  # noqa: E402  below the environment, like everything that may import torch

ffi.lib._fntab["__dict__"] = {}
"""Conversions run in the process of vLLM here, which they never do elsewhere. vLLM's CPU runner asks for `vars()` of
every object in every module, and llvmlite's handle of its library answers any name with a function of that name."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Without vLLM nothing here can be tested, and nothing is skipped."""
    if importlib.util.find_spec("vllm") is None:
        pytest.exit(
            f"{sys.executable} has no vLLM: make an environment with `mso-hub setup-vllm --cpu` and run these tests "
            "with its Python",
            returncode=2,
        )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture, or "trained" -> a BF16 checkpoint with weights, made once."""
    from models import TRAINED, dense

    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        if name == "trained":
            return TRAINED
        return root / name if (root / name).exists() else dense(name, root / name)

    return folder


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture, or "trained" -> a BF16 checkpoint whose headers fit eight ranks in every format, made once."""
    from models import TRAINED, dense_headers

    root = tmp_path_factory.mktemp("wide")

    def folder(name: str) -> Path:
        if name == "trained":
            return TRAINED
        return root / name if (root / name).exists() else dense_headers(name, root / name)

    return folder
