"""Every private name of vLLM that this package touches, by version: nothing outside this room names one.

vLLM promises nothing about these names. Each is fetched by `private`, and one that is gone is an error that names it
and the versions this package is tested on, instead of an AttributeError somewhere below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

OLDEST, NEWEST = (0, 32), (0, 33)
TESTED = "0.32 and 0.33"

# Before `import vllm`: no plugins, no network, no statistics, and a log that holds errors only.
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "VLLM_PLUGINS": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
)


class MissingName(RuntimeError):
    """A private name that this package needs is not in the vLLM that is installed."""


def prepare_environment(*, gpu: bool) -> None:
    """Set what vLLM reads at import; `gpu` False makes it a CPU vLLM even where a GPU build is installed."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not gpu:
        os.environ["VLLM_TARGET_DEVICE"] = "cpu"


def version() -> str:
    """`vllm.__version__` of the vLLM that is imported, for example "0.32.0"."""
    return str(import_module("vllm").__version__)


def unsupported(found: str) -> str | None:
    """Why this version cannot be used, as one sentence; None when it is tested."""
    try:
        release = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        return f"vLLM {found}: not a release; vllm_mso_hub is tested on vLLM {TESTED}; install one of these"
    if OLDEST <= release <= NEWEST:
        return None
    side = "older" if release < OLDEST else "newer"
    return f"vLLM {found} is {side} than what vllm_mso_hub is tested on ({TESTED}); install one of these"


def private(module: str, name: str) -> Any:
    """`module.name` (dotted names reach into classes); MissingName when either is gone."""
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        raise MissingName(f"vLLM {version()} has no module {module}; tested are {TESTED}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise MissingName(f"vLLM {version()} has no {module}.{name}; tested are {TESTED}")
        found = getattr(found, part)
    return found
