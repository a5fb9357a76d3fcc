"""Packed checkpoints, repos on a Hub, and models that cannot be walked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mso_hub import Recipe, convert
from mso_hub.calibrate.walk import Observer, Walk
from mso_hub.errors import CheckpointError, MsoError, RecipeError
from mso_hub.hub import Client
from mso_hub.source import open_source
from tests.calibrate.architectures import quiet_transformers, save
from tests.hubs import world

MODELS = Path(__file__).parents[1] / "models"
TRAINED = MODELS / "tiny-qwen3-moe"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without transformers' bars."""
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Text that the trained model has not seen."""
    ids = load_file(MODELS / "tiny-qwen3-moe-token-ids.safetensors")["heldout_ids"].flatten()[:256].long()
    return list(ids.view(2, 2, 64))


class Maxima(Observer):
    """Largest inputs."""

    def __init__(self) -> None:
        self.amax: dict[str, float] = {}

    def inputs(self, module: str, x: Tensor) -> Tensor:
        self.amax[module] = max(self.amax.get(module, 0.0), float(x.abs().max()))
        return x


def walked(walk: Walk, batches: list[Tensor]) -> tuple[list[Tensor], dict[str, float]]:
    """Final hidden states and maxima."""
    last: dict[int, Tensor] = {}
    maxima = Maxima()
    walk.run(batches, maxima, logits=last.__setitem__)
    return [last[number] for number in range(len(batches))], maxima.amax


def require_equal(ours: tuple[list[Tensor], Any], theirs: tuple[list[Tensor], Any]) -> None:
    assert [torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True)] == [True] * len(ours[0])
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("experts", ["expert", "stack"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(scheme="fp8_block", mode="all-linear"),
        Recipe(scheme="w4a16", group_size=32),
        Recipe(scheme="nvfp4", layout="modelopt", mode="all-linear"),
    ],
    ids=["fp8-block", "int4", "nvfp4-modelopt"],
)
def test_a_packed_checkpoint_is_walked_as_its_decompressed_one(
    recipe: Recipe, experts: str, batches: list[Tensor], tmp_path: Path
) -> None:
    convert(TRAINED, tmp_path / "packed", recipe)
    convert(tmp_path / "packed", tmp_path / "dense", Recipe(scheme="bf16"))
    packed, dense = (Walk(open_source(tmp_path / name), experts=experts) for name in ("packed", "dense"))
    assert any(packed.weights.packed(name) for name in packed.weights.names)
    assert packed.modules == dense.modules
    found = walked(packed, batches)
    require_equal(found, walked(dense, batches))
    original, _ = walked(Walk(open_source(TRAINED), experts=experts), batches)
    assert not torch.equal(found[0][0], original[0])


@pytest.mark.parametrize("experts", ["expert", "stack"])
def test_gpt_oss_in_mxfp4_is_walked_as_its_decompressed_one(experts: str, tmp_path: Path) -> None:
    """Its experts are banks of blocks, one row of which is decoded at a time."""
    folder = save("gpt_oss", tmp_path / "made", torch.bfloat16)
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith("_proj") and tensors[n].dim() == 3]:
        count, columns, rows = tensors.pop(name).shape  # [E, K, N]; K is a multiple of 32 for gate and up only
        if columns % 32:
            tensors[name] = torch.randn(count, columns, rows, generator=generator).mul(0.2).bfloat16()
            continue
        groups = columns // 32
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (count, rows, groups, 16), generator=generator, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.full((count, rows, groups), 123, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "dense", Recipe(scheme="bf16"))
    ids = [torch.arange(3, 27).view(2, 12), torch.arange(30, 39).view(1, 9)]
    packed, dense = (Walk(open_source(f), experts=experts) for f in (folder, tmp_path / "dense"))
    assert any(packed.weights.packed(name) for name in packed.weights.names)
    require_equal(walked(packed, ids), walked(dense, ids))


def test_a_repo_on_the_hub_is_walked_as_a_folder(batches: list[Tensor], tmp_path: Path) -> None:
    """Every stored byte travels once, however many batches there are, apart from headers."""
    files = {path.name: path.read_bytes() for path in TRAINED.iterdir()}
    with world(tmp_path, xet=False) as place:
        repo = place.put(files)
        place.log()
        client = Client(place.hub.endpoint, place.hub.token())
        source = open_source(f"hf://{repo}", client=client)
        try:
            require_equal(walked(Walk(source), batches), walked(Walk(open_source(TRAINED)), batches))
        finally:
            source.close()
        sent = sum(request.bytes_out for request in place.log() if request.origin == "storage")
    weights = sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))
    assert sent < 1.2 * weights


def change(folder: Path, **said: Any) -> Path:
    """The same with other words in config.json."""
    config = json.loads((folder / "config.json").read_text()) | said
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class StrangeConfig(LlamaConfig):
    model_type = "strange"
"""
MODEL = """
{imports}
from transformers import LlamaForCausalLM
from .configuration_strange import StrangeConfig

class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""


def strange(folder: Path, imports: str = "") -> Path:
    """A Llama under another name, with the code for it."""
    save("llama", folder)
    (folder / "configuration_strange.py").write_text(CODE)
    (folder / "modeling_strange.py").write_text(MODEL.format(imports=imports))
    auto = {"AutoConfig": "configuration_strange.StrangeConfig"}
    auto["AutoModelForCausalLM"] = "modeling_strange.StrangeForCausalLM"
    return change(folder, model_type="strange", architectures=["StrangeForCausalLM"], auto_map=auto)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"model_type": "tomorrow"}, r"no LlamaForCausalLM of type 'tomorrow'; .*--input_scale"),
        ({"architectures": ["TomorrowForCausalLM"]}, r"no TomorrowForCausalLM of type 'llama'; .*--input_scale"),
        ({"hidden_size": "many"}, r"transformers \S+ cannot use config.json: "),
        ({"hidden_size": 64}, r"config.json makes it \[\d+, 64\], the stored tensors \[\d+, 32\]|stored tensor"),
        ({"num_hidden_layers": 4}, r"no stored tensor makes model.layers.3."),
    ],
)
def test_a_model_that_cannot_be_built_says_why(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = change(save("llama", tmp_path), **said)
    with pytest.raises(MsoError, match=message):
        Walk(open_source(folder)).run([torch.arange(3, 9).view(1, 6)], Observer())


def test_a_repo_without_config_is_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        Walk(open_source(folder))


def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of a test's own for the code of repos; Python forgets the package of an earlier one."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def test_code_of_a_repo_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_modules(tmp_path, monkeypatch)
    folder = strange(tmp_path / "strange", "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()")
    with pytest.raises(RecipeError, match=r"--trust_remote_code, or leave calibration out: `--input_scale NUMBER`"):
        Walk(open_source(folder))
    assert not list(tmp_path.rglob("*.ran"))
    plain = save("llama", tmp_path / "plain")
    ids = [torch.arange(3, 27).view(2, 12)]
    trusted = Walk(open_source(folder), trust_remote_code=True)
    require_equal(walked(trusted, ids), walked(Walk(open_source(plain)), ids))
    assert list(tmp_path.rglob("*.ran"))


def test_code_that_needs_a_missing_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_modules(tmp_path, monkeypatch)
    folder = strange(tmp_path / "strange", "import a_package_that_nobody_has")
    with pytest.raises(RecipeError, match=r"needs a package that is missing: .*a_package_that_nobody_has"):
        Walk(open_source(folder), trust_remote_code=True)


def test_an_attention_that_a_model_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be built"):
        Walk(open_source(save("llama", tmp_path)), attention="fast_attention")


def test_experts_are_read_in_one_of_two_ways(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="experts must be 'expert' or 'stack', got 'all'"):
        Walk(open_source(save("llama", tmp_path)), experts="all")


def test_an_expert_that_is_not_stored_is_missed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.4.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not all stored tensors of expert 4 are there"):
        Walk(open_source(folder))
