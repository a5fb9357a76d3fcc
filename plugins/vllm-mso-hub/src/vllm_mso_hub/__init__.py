"""vllm_mso_hub: what mso_hub asks of vLLM, run in vLLM's own environment.

    rank  module      what enters -> what leaves
    4     __main__    a job as JSON -> a report as JSON, for `mso-hub smoke`
    3     shapes      headers -> every tensor that a rank would not load as it is stored
    3     generate    a folder -> tokens and log-likelihoods
    2     loader      `--load-format mso_checked`: vLLM's own loader, and an error instead of a partly written model
    2     emulate     kernels for formats that vLLM has none for on a CPU
    1     track       what load_weights reads and writes, element by element
    1     compat      every private name of vLLM, by version
    0     regions     runs and boxes of bytes -> which of them were touched
    0     job         the JSON on both sides

A module imports lower ranks and its own room only. vLLM and torch are imported inside functions: vLLM imports this
package in every process that it starts.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

LOAD_FORMAT = "mso_checked"
EMULATE = "MSO_VLLM_EMULATE"

_LOADERS = "vllm.model_executor.model_loader"
_log = logging.getLogger("vllm.mso_hub")  # vLLM shows what is below its own name
_registered: set[str] = set()


def register() -> None:
    """Entry point `vllm.general_plugins`, called in every process of vLLM, perhaps more than once.

    Makes `--load-format mso_checked` known, and emulates formats on a CPU where MSO_VLLM_EMULATE=1. A vLLM that this
    package is not tested on gets a warning and nothing else; with MSO_VLLM_EMULATE=1, where the formats would not
    work, it is a RuntimeError. ValueError when the variable is neither 0 nor 1.
    """
    from vllm_mso_hub.compat import unsupported, version

    value = os.environ.get(EMULATE) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{EMULATE}={value!r}: expected 1 (emulate formats on a CPU) or 0; set it to one of these")
    reason = unsupported(version())
    if reason is None:
        _offer_loader()
        if value == "1":
            _emulate()
    elif value == "1":
        raise RuntimeError(f"{reason}, or unset {EMULATE}")
    elif _first("warning"):
        _log.warning("%s; --load-format %s and %s do nothing here", reason, LOAD_FORMAT, EMULATE)


def _emulate() -> None:
    """Install the kernels, or say that this machine needs none."""
    if not _first("emulation"):
        return
    from vllm_mso_hub.compat import private

    platform = private("vllm.platforms", "current_platform")
    if platform.is_cpu():
        from vllm_mso_hub.emulate import install

        install()
        _log.info("%s=1: formats without a CPU kernel are emulated", EMULATE)
    else:
        _log.warning("%s=1 is for CPUs: this is %s, its native kernels are used", EMULATE, platform.device_name)


def _offer_loader() -> None:
    """Register the load format when vLLM imports its loaders: many of its processes never do, and it takes a second."""
    if not _first(LOAD_FORMAT):
        return
    if _LOADERS in sys.modules:
        _register_loader()
    else:
        sys.meta_path.insert(0, _AfterLoaders())


class _AfterLoaders(MetaPathFinder):
    """Finds nothing itself; has the module of loaders followed by `_register_loader`, when it is really imported."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The real spec of the module of loaders, None for all others."""
        if fullname != _LOADERS or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register_loader()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_loader() -> None:
    from vllm_mso_hub.loader import CheckedLoader

    sys.modules[_LOADERS].register_model_loader(LOAD_FORMAT)(CheckedLoader)


def _first(what: str) -> bool:
    """Whether this is the first time in this process."""
    new = what not in _registered
    _registered.add(what)
    return new
