"""What this package touches of vLLM: there, put back afterwards, and a clear error where it is not."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models import WIDE, dense_headers
from vllm_mso_hub.compat import MissingName, private, unsupported, version
from vllm_mso_hub.compat.kernels import no_kernels
from vllm_mso_hub.compat.log import quiet
from vllm_mso_hub.compat.model import engine_config, meta_model
from vllm_mso_hub.compat.world import fake_world

LINEAR = "vllm.model_executor.kernels.linear"


@pytest.mark.parametrize("found", ["0.32.0", "0.33.0", "0.33.1rc2+cpu"])
def test_tested_versions_are_supported(found: str) -> None:
    assert unsupported(found) is None


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("0.31.9", "vLLM 0.31.9 is older than what vllm_mso_hub is tested on (0.32 and 0.33); install one of these"),
        ("1.0.0", "vLLM 1.0.0 is newer than what vllm_mso_hub is tested on (0.32 and 0.33); install one of these"),
        ("dev", "vLLM dev: not a release; vllm_mso_hub is tested on vLLM 0.32 and 0.33; install one of these"),
    ],
)
def test_other_versions_are_named_with_the_tested_ones(found: str, message: str) -> None:
    assert unsupported(found) == message


@pytest.mark.parametrize(
    ("module", "name"),
    [(LINEAR, "no_such_name"), (f"{LINEAR}.no_such_module", "x"), (LINEAR, "init_nvfp4_linear_kernel.gone")],
)
def test_a_name_that_is_gone_is_named_with_the_tested_versions(module: str, name: str) -> None:
    with pytest.raises(MissingName, match=rf"vLLM {version()} has no (module )?{module}.*tested are 0.32 and 0.33"):
        private(module, name)


def _state() -> list[object]:
    """Every function that the shape proof replaces, wherever it may have been imported to."""
    names = ("init_nvfp4_linear_kernel", "choose_mp_linear_kernel", "select_nvfp4_moe_backend")
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("vllm.")]
    held = [vars(module).get(name) for module in modules for name in names]
    manager = private("vllm.model_executor.layers.fused_moe.expert_map_manager", "ExpertMapManager")
    moe = private("vllm.model_executor.layers.fused_moe.config", "FusedMoEConfig")
    inspect = private("vllm.model_executor.models.registry", "_run_in_subprocess")
    return [*filter(None, held), manager.__init__, manager.update, moe.__post_init__, inspect]


def test_kernels_are_chosen_again_afterwards() -> None:
    with no_kernels():
        pass  # imports what it replaces
    before = _state()
    with no_kernels():
        assert _state() != before
    assert _state() == before


def test_kernels_are_chosen_again_after_an_error() -> None:
    before = _state()
    with pytest.raises(ZeroDivisionError), no_kernels():
        1 / 0  # noqa: B018
    assert _state() == before


def test_a_module_imported_inside_gets_the_real_function_back() -> None:
    import types

    late: Any = types.ModuleType("vllm.late_for_a_test")
    sys.modules[late.__name__] = late
    try:
        with no_kernels():
            late.init_nvfp4_linear_kernel = private(LINEAR, "init_nvfp4_linear_kernel")
            assert late.init_nvfp4_linear_kernel().apply is None
        assert late.init_nvfp4_linear_kernel is private(LINEAR, "init_nvfp4_linear_kernel")
    finally:
        del sys.modules[late.__name__]


@pytest.mark.parametrize(("tp", "pp", "rank"), [(1, 1, 0), (4, 1, 3), (2, 3, 5)])
def test_one_process_is_any_rank_and_leaves_no_world_behind(tp: int, pp: int, rank: int, tmp_path: Path) -> None:
    import torch.distributed as dist
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    folder = dense_headers("llama", tmp_path / "llama", WIDE)
    config = engine_config(str(folder), tp=tp, pp=pp, ep=False, trust_remote_code=False)
    new_group = dist.new_group
    with fake_world(config, rank):
        assert (get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()) == (tp, rank % tp)
        assert (get_pp_group().world_size, get_pp_group().rank_in_group) == (pp, rank // tp)
        with pytest.raises(RuntimeError, match=r"in a torch\.distributed world already"), fake_world(config, rank):
            pass
    assert not dist.is_initialized()
    assert dist.new_group is new_group


def test_a_model_is_built_without_memory(tmp_path: Path) -> None:
    folder = dense_headers("qwen3_moe", tmp_path / "model", WIDE)
    with no_kernels():
        config = engine_config(str(folder), tp=2, pp=1, ep=False, trust_remote_code=False)
        with fake_world(config, 1):
            model = meta_model(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_vllm_is_silent_inside_and_its_errors_are_kept(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("vllm.some.module")
    handlers = list(logging.getLogger("vllm").handlers)
    with quiet() as log:
        sys.stdout.write("noise")
        logger.warning("not worth keeping")
        try:
            Path("/no/such/file").read_bytes()
        except OSError:
            logger.exception("cannot read %s", "config")
        assert log() == "cannot read config: FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file'"
        assert log() == ""
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("vllm").handlers == handlers
