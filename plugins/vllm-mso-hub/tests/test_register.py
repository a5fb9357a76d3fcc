"""The entry point: cheap, re-entrant, and nothing but the load format unless asked for more."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import vllm
import vllm.platforms
from vllm.platforms.interface import UnspecifiedPlatform

import vllm_mso_hub
from vllm_mso_hub import register
from vllm_mso_hub.compat import MissingName, emulation


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has registered nothing yet; what was installed in vLLM stays there."""
    monkeypatch.setattr(vllm_mso_hub, "_registered", set())
    monkeypatch.delenv(vllm_mso_hub.EMULATE, raising=False)
    return monkeypatch


CHEAP = """
import sys
import vllm
vllm.__version__
before = set(sys.modules)
from vllm_mso_hub import register
register()
register()
print(sorted(set(sys.modules) - before))
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
print(type(get_model_loader(LoadConfig(load_format="mso_checked"))))
from vllm.model_executor.kernels.linear import MarlinNvFp4LinearKernel
print(MarlinNvFp4LinearKernel.__module__)
print(len([finder for finder in sys.meta_path if type(finder).__module__ == "vllm_mso_hub"]))
"""


def test_it_imports_nothing_heavy_and_knows_the_load_format_when_vllm_asks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHEAP],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "VLLM_PLUGINS": "", vllm_mso_hub.EMULATE: "0"},  # tests before this one may have set it
    )
    imported, loader, marlin, left = done.stdout.splitlines()[-4:]
    assert imported == "['vllm_mso_hub', 'vllm_mso_hub.compat']"
    assert loader == "<class 'vllm_mso_hub.loader.CheckedLoader'>"
    assert marlin.startswith("vllm.")  # nothing is emulated
    assert left == "0"


FOUND_FIRST = """
import importlib.util
from vllm_mso_hub import register
register()
importlib.util.find_spec("vllm.model_executor.model_loader")
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
print(type(get_model_loader(LoadConfig(load_format="mso_checked"))))
"""


def test_whoever_only_looks_for_the_loaders_does_not_lose_the_load_format() -> None:
    environment = {**os.environ, "VLLM_PLUGINS": "", vllm_mso_hub.EMULATE: "0"}
    command = [sys.executable, "-c", FOUND_FIRST]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "<class 'vllm_mso_hub.loader.CheckedLoader'>"


def test_it_is_vllms_entry_point() -> None:
    (hook,) = (hook for hook in entry_points(group="vllm.general_plugins") if hook.name == "mso_hub")
    assert hook.load() is register


def test_a_second_call_changes_nothing(fresh: pytest.MonkeyPatch) -> None:
    register()
    finders = list(sys.meta_path)
    register()
    assert sys.meta_path == finders


@pytest.mark.parametrize("value", ["2", "yes", "true"])
def test_another_value_of_the_variable_is_an_error(value: str, fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(vllm_mso_hub.EMULATE, value)
    with pytest.raises(ValueError, match=f"MSO_VLLM_EMULATE='{value}': expected 1 .* or 0"):
        register()


@pytest.mark.parametrize("version", ["0.20.1", "0.99.0", "dev"])
def test_a_vllm_that_is_not_tested_gets_one_warning(
    version: str, fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setattr(vllm, "__version__", version)
    finders = list(sys.meta_path)
    with caplog.at_level(logging.WARNING, "vllm.mso_hub"):
        register()
        register()
    assert [record.getMessage().startswith(f"vLLM {version}") for record in caplog.records] == [True]
    assert sys.meta_path == finders


def test_emulation_on_a_vllm_that_is_not_tested_is_an_error(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(vllm, "__version__", "0.20.1")
    fresh.setenv(vllm_mso_hub.EMULATE, "1")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.20\.1 .* or unset MSO_VLLM_EMULATE"):
        register()


def test_emulation_elsewhere_than_on_a_cpu_says_that_native_kernels_are_used(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setattr(vllm.platforms, "current_platform", UnspecifiedPlatform())
    fresh.setenv(vllm_mso_hub.EMULATE, "1")
    with caplog.at_level(logging.WARNING, "vllm.mso_hub"):
        register()
    assert "native kernels are used" in caplog.text


def test_names_that_are_gone_are_listed_before_anything_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    monkeypatch.delattr(linear, "register_linear_kernel")
    monkeypatch.delattr(RoutedExperts, "_replace_quant_method")
    with pytest.raises(MissingName, match=r"register_linear_kernel.*RoutedExperts\._replace_quant_method"):
        emulation.check_names()
