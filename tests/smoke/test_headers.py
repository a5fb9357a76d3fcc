"""What vLLM gets to see: the headers of a plan are those of its output, a repo is read by its first bytes only."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from mso_hub.errors import CheckpointError
from mso_hub.hub import Address
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Recipe
from mso_hub.smoke.headers import CONFIGS, Headers, headers_of_plan, headers_of_source
from mso_hub.source import open_source
from mso_hub.source.hub import HubSource
from tests.helpers import checkpoint_files, random_tensor, tiny_llama, tiny_moe, write_checkpoint, write_files
from tests.hub.serving import serving

RECIPES = {
    "nvfp4": Recipe(),
    "modelopt": Recipe(layout="modelopt", mode="all-linear", activations=4, kv_cache=True),
    "w4a16": Recipe(scheme="w4a16", group_size=32, mode="all-linear"),
    "a shard that stays": Recipe(ignore=("model.layers.1",)),
}


def read(folder: Path, *, code: bool = False) -> Headers:
    with closing(open_source(folder)) as source:
        return headers_of_source(source, code=code)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("make", [tiny_llama, tiny_moe])
def test_a_plan_has_the_headers_of_what_it_writes(make: Callable[..., Path], recipe: Recipe, tmp_path: Path) -> None:
    """Names, dtypes, shapes, files, order and every byte of every config."""
    folder = make(tmp_path / "in", shards=3)
    (folder / "generation_config.json").write_text('{"top_p": 0.9}')
    (folder / "hf_quant_config.json").write_text('{"stale": true}')
    with closing(open_source(folder)) as source:
        planned = headers_of_plan(make_plan(source, recipe), source)
    convert(folder, tmp_path / "out", recipe)
    written = read(tmp_path / "out")
    assert planned.files == written.files
    assert planned.tensors == written.tensors
    assert ("hf_quant_config.json" in planned.files) == (recipe.layout == "modelopt")
    assert planned.files["generation_config.json"] == b'{"top_p": 0.9}'


def test_a_plan_of_a_decoded_checkpoint_too(tmp_path: Path) -> None:
    convert(tiny_llama(tmp_path / "in"), tmp_path / "packed", Recipe())
    recipe = Recipe(scheme="bf16")
    with closing(open_source(tmp_path / "packed")) as source:
        planned = headers_of_plan(make_plan(source, recipe), source)
    convert(tmp_path / "packed", tmp_path / "dense", recipe)
    assert planned == Headers(planned.name, read(tmp_path / "dense").files, read(tmp_path / "dense").tensors)


def test_vllm_sees_what_lies_at_the_top_and_in_the_index(tmp_path: Path) -> None:
    """A copy in another folder and a file beside the index are not loaded."""
    folder = tiny_llama(tmp_path / "in")
    expected = read(folder).tensors
    extra = checkpoint_files({"x.safetensors": {"stale": torch.zeros(2)}})
    write_files(folder / "original", extra)
    write_files(folder, extra)
    assert read(folder).tensors == expected
    assert {info.file for info in expected} == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}


def test_only_small_files_are_written_and_code_only_when_it_may_run(tmp_path: Path) -> None:
    """The folder of a job holds configs and nothing else."""
    folder = tiny_llama(tmp_path / "in")
    for name in ("modeling_x.py", "tokenizer.json", "README.md"):
        (folder / name).write_text("x")
    write_files(folder, {"sub/helper.py": b"x", "hf_quant_config.json": b"{}"})
    out, trusted = tmp_path / "out", tmp_path / "trusted"
    out.mkdir()
    trusted.mkdir()
    read(folder).write(out)
    assert {path.name for path in out.iterdir()} == {"config.json", "hf_quant_config.json"} <= set(CONFIGS)
    read(folder, code=True).write(trusted)
    assert {path.name for path in trusted.iterdir()} == {"config.json", "hf_quant_config.json", "modeling_x.py"}
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_checkpoint_that_vllm_cannot_find_is_refused(tmp_path: Path) -> None:
    """No config, no weights at the top."""
    tensors = {"model.safetensors": {"a.weight": torch.zeros(2, 2)}}
    with pytest.raises(CheckpointError, match=r"vLLM needs its config\.json, there is none; add it"):
        read(write_checkpoint(tmp_path / "bare", tensors))
    write_checkpoint(tmp_path / "deep" / "sub", tensors)
    (tmp_path / "deep" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found none among 1 files; give the folder or the branch of the model"):
        read(tmp_path / "deep")


def test_a_repo_is_read_by_its_headers_only(tmp_path: Path) -> None:
    """24 MB of weights on the Hub: less than 300 KB travel, and no file is fetched whole."""
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": random_tensor(1024, 1024, seed=n) for n in range(12)}
    names = list(tensors)
    shards = {f"model-0000{n + 1}-of-00003.safetensors": {k: tensors[k] for k in names[n::3]} for n in range(3)}
    files = checkpoint_files(shards, {"model_type": "llama"}) | {"tokenizer.json": bytes(4 << 20)}
    with serving(tmp_path, xet=False) as served:
        repo = served.put(files)
        with closing(HubSource(served.client(), Address(repo))) as source:
            found = headers_of_source(source)
        moved = sum(request.bytes_out for request in served.hub.log())
        paths = [request.path for request in served.hub.log() if request.method == "GET"]
    assert {info.name for info in found.tensors} == set(tensors)
    assert json.loads(found.files["config.json"]) == {"model_type": "llama"}
    assert sum(map(len, files.values())) > 24_000_000
    assert moved < 300_000
    assert not any("tokenizer" in path for path in paths)
