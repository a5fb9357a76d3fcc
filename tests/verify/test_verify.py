"""verify_checkpoint: silent about good outputs, and every kind of damage is found and named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mso_hub.display import report_text
from mso_hub.errors import CheckpointError, MsoError, PlanError, VerifyError
from mso_hub.events import Event, TensorDone
from mso_hub.formats import Scheme
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe, Rule
from mso_hub.verify import Report, verify_checkpoint
from tests.helpers import INDEX, random_tensor, tensors_of, tiny_llama, tiny_moe, write_checkpoint, write_files

REAL = Path(__file__).parents[1] / "models" / "tiny-qwen3-moe"
MODELOPTS: dict[str, Any] = {"mode": "all-linear", "scale_search": "absmax"}
"""Settings that give ModelOpt's bytes."""
KINDS: dict[str, Recipe] = {
    "compressed-tensors W4A16": Recipe(**MODELOPTS),
    "compressed-tensors W4A4": Recipe(**MODELOPTS, input_scale=1.0),
    "modelopt W4A16": Recipe(**MODELOPTS, layout="modelopt"),
    "modelopt W4A4": Recipe(**MODELOPTS, layout="modelopt", input_scale=1.0),
    "mlp only": Recipe(),
    "search": Recipe(mode="all-linear"),
    "mixed": Recipe(
        rules=(
            Rule(Scheme("nvfp4", search="absmax"), ("*.mlp.experts.*",)),
            Rule(Scheme("fp8_dynamic"), ("*_proj",)),
        )
    ),
}
MLP = "model.layers.1.mlp.experts.2"
QKV = "model.layers.0.self_attn"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert model in three shards, with a scalar, an integer tensor and files beside it."""
    folder = tiny_moe(tmp_path_factory.mktemp("source") / "in", shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    odd = {"model.scalar": torch.tensor(2.5), "model.positions": torch.arange(7)}
    save_file(load_file(shard) | odd, shard, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(odd, shard.name)
    index["metadata"]["total_size"] += 4 + 7 * 8
    (folder / INDEX).write_text(json.dumps(index))
    return write_files(folder, {"tokenizer.json": b"{}", "extra/notes.txt": b"notes"})


@pytest.fixture(scope="module")
def outputs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One output of each kind; tests copy what they damage."""
    folder = tmp_path_factory.mktemp("outputs")
    for name, recipe in KINDS.items():
        convert(source, folder / name, recipe)
    return {name: folder / name for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_output_passes(kind: str, source: Path, outputs: dict[str, Path]) -> None:
    """Everything is counted: files, packed weights, units, tensors left alone."""
    report = verify_checkpoint(outputs[kind], source=source)
    assert report.problems == ()
    assert report.ok
    mlp, attention = 2 * 4 * 3, 0 if kind == "mlp only" else 2 * 4
    fused = 2 if kind not in ("mlp only", "mixed") else 0
    assert report.packed == mlp + attention == len(report.errors)
    assert report.units == 2 * 4 + fused
    assert report.identical == len(tensors_of(source)) - report.packed
    assert report.tensors == len(tensors_of(outputs[kind]))
    files = [path for path in outputs[kind].rglob("*") if path.is_file()]
    assert report.hashed == len(files) - 1  # all but the manifest itself
    assert all(0.0004 < error.nmse < 0.02 for error in report.errors)
    assert all(error.strays == 0 for error in report.errors)


def test_the_error_is_the_distance_of_the_decompressed_weight(
    source: Path, outputs: dict[str, Path], tmp_path: Path
) -> None:
    """Against the F32 numbers of our decompression, in float64."""
    convert(outputs["compressed-tensors W4A16"], tmp_path / "dense", Recipe(scheme="bf16", dtype="F32"))
    near, far = tensors_of(tmp_path / "dense"), tensors_of(source)
    for error in verify_checkpoint(outputs["compressed-tensors W4A16"], source=source).errors:
        difference = near[error.name].double() - far[error.name].double()
        nmse = difference.square().sum() / far[error.name].double().square().sum()
        assert error.nmse == pytest.approx(nmse.item(), rel=1e-6)
        assert error.max_abs == pytest.approx(difference.abs().max().item(), rel=1e-6)
        assert error.stored == "nvfp4-pack-quantized"


def test_a_decompressed_output_passes(source: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    """Against what it was decoded from: rounded once. Against the original it is NVFP4's error, and that is said."""
    for kind in ("compressed-tensors W4A4", "modelopt W4A4"):
        dense = tmp_path / kind
        convert(outputs[kind], dense, Recipe(scheme="bf16"))
        report = verify_checkpoint(dense, source=outputs[kind])
        assert report.problems == ()
        assert (report.packed, report.units) == (0, 0)
        assert max(error.nmse for error in report.errors) < 1e-5
        original = verify_checkpoint(dense, source=source)
        assert len(original.problems) == len(report.errors)
        assert all("relative squared error" in problem for problem in original.problems)


@pytest.mark.parametrize("card", [None, "# Edited\n", "# original\n"])
def test_the_card_may_be_edited(card: str | None, outputs: dict[str, Path], tmp_path: Path) -> None:
    """On the website everybody does: it is no problem, and does not count as hashed; same size or not, or gone."""
    folder = write_files(Path(shutil.copytree(outputs["mlp only"], tmp_path / "x")), {"README.md": b"# Original\n"})
    digest = {"nbytes": 11, "sha256": hashlib.sha256(b"# Original\n").hexdigest()}
    with edited(folder / "mso_hub.json") as manifest:
        manifest["files"]["README.md"] = digest
    untouched = verify_checkpoint(folder)
    (folder / "README.md").unlink()
    write_files(folder, {"README.md": card.encode()} if card else {})
    report = verify_checkpoint(folder)
    assert (untouched.problems, report.problems) == ((), ())
    assert report.hashed == untouched.hashed - 1


def test_the_wrong_source_is_named(source: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    """First and once; not where all is well, as with a copy of the right one."""
    dense, commit = tmp_path / "dense", "a" * 40
    convert(outputs["mlp only"], dense, Recipe(scheme="bf16"))
    with edited(dense / "mso_hub.json") as manifest:
        manifest |= {"source": "org/packed", "commit": commit}
    problems = verify_checkpoint(dense, source=source).problems
    assert problems[0] == (
        f"{dense}: this checkpoint was made from hf://org/packed@{commit}, not from {source}; verify it against that"
    )
    assert len(problems) > 1
    assert all("relative squared error" in problem for problem in problems[1:])
    assert verify_checkpoint(dense, source=outputs["mlp only"]).problems == ()
    with edited(dense / "mso_hub.json") as manifest:
        manifest["source"] = "no repo"
    assert verify_checkpoint(dense, source=source).problems == problems[1:]


def test_every_weight_is_announced_to_the_listener(source: Path, outputs: dict[str, Path]) -> None:
    """For a progress bar over the source's bytes."""
    events: list[Event] = []
    verify_checkpoint(outputs["mlp only"], source=source, on_event=events.append)
    tensors = tensors_of(source)
    done = {event.name: event.nbytes for event in events if isinstance(event, TensorDone)}
    assert done == {name: tensor.nbytes for name, tensor in tensors.items()}


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    """A JSON file, read, changed and written again."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def shard_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(name: str, new: Callable[[Tensor], Tensor]) -> Damage:
    """Replace one tensor, by the safetensors library; the manifest goes, it would find any change."""

    def damage(folder: Path) -> None:
        path = shard_of(folder, name)
        tensors = load_file(path)
        tensors[name] = new(tensors[name]).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        (folder / "mso_hub.json").unlink()

    return damage


def bits(value: int, at: int = 5) -> Callable[[Tensor], Tensor]:
    """Overwrite one byte of a byte-sized tensor."""

    def new(tensor: Tensor) -> Tensor:
        changed = tensor.view(torch.uint8).clone()
        changed.view(-1)[at] = value
        return changed.view(tensor.dtype)

    return new


def config(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the quantization_config."""

    def damage(folder: Path) -> None:
        with edited(folder / "config.json") as content:
            edit(content["quantization_config"])
        (folder / "mso_hub.json").unlink()

    return damage


def put(name: str, data: bytes) -> Damage:
    """Overwrite or add a file."""

    def damage(folder: Path) -> None:
        write_files(folder, {name: data})

    return damage


def flip_a_byte(folder: Path) -> None:
    """One bit of the last byte of a shard."""
    path = folder / "model-00003-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_a_tensor(folder: Path) -> None:
    """A norm disappears from shard and index alike."""
    name = "model.norm.weight"
    path = shard_of(folder, name)
    tensors = load_file(path)
    size = tensors.pop(name).nbytes
    save_file(tensors, path, metadata={"format": "pt"})
    with edited(folder / INDEX) as index:
        del index["weight_map"][name]
        index["metadata"]["total_size"] -= size
    (folder / "mso_hub.json").unlink()


def add_a_tensor(folder: Path) -> None:
    """A file that the index does not list adds one."""
    save_file({"model.surplus.weight": torch.zeros(8)}, folder / "surplus.safetensors")


def nested_config(folder: Path) -> None:
    """The config of the source's quantization is left inside text_config."""
    with edited(folder / "config.json") as content:
        content["text_config"] = {"quantization_config": {"quant_method": "fp8"}}
    (folder / "mso_hub.json").unlink()


def no_config(folder: Path) -> None:
    """The announcement is lost."""
    with edited(folder / "config.json") as content:
        del content["quantization_config"]
    (folder / "mso_hub.json").unlink()


def total_size(folder: Path) -> None:
    """As the prototype had it."""
    with edited(folder / INDEX) as index:
        index["metadata"]["total_size"] += 1
    (folder / "mso_hub.json").unlink()


def drop_input_scales(folder: Path) -> None:
    """W4A4 stays announced."""
    for path in folder.glob("*.safetensors"):
        kept = {n: t for n, t in load_file(path).items() if not n.endswith(("input_global_scale", "input_scale"))}
        save_file(kept, path, metadata={"format": "pt"})
    with edited(folder / INDEX) as index:
        names = tensors_of(folder)
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if n in names}
        index["metadata"]["total_size"] = sum(t.nbytes for t in names.values())
    (folder / "mso_hub.json").unlink()


def weight_only(quantized: dict[str, Any]) -> None:
    """Announce W4A16 over W4A4 tensors."""
    quantized["config_groups"]["group_0"]["input_activations"] = None


def announce_activations(quantized: dict[str, Any]) -> None:
    """Announce W4A4 over W4A16 tensors."""
    quantized["config_groups"]["group_0"]["input_activations"] = {"num_bits": 4}


def other_file(folder: Path) -> None:
    """hf_quant_config.json announces FP8 beside a config.json that announces NVFP4."""
    path = folder / "hf_quant_config.json"
    path.write_text(path.read_text().replace("W4A16_NVFP4", "FP8"))
    (folder / "mso_hub.json").unlink()


def lose_a_scale(folder: Path) -> None:
    """The codes stay, in shard and index alike."""
    name = f"{MLP}.up_proj.weight_scale"
    path = shard_of(folder, name)
    tensors = load_file(path)
    size = tensors.pop(name).nbytes
    save_file(tensors, path, metadata={"format": "pt"})
    with edited(folder / INDEX) as index:
        del index["weight_map"][name]
        index["metadata"]["total_size"] -= size
    (folder / "mso_hub.json").unlink()


CT16, CT4, MO16, MO4 = list(KINDS)[:4]
FOUND: dict[str, tuple[str, Damage, str]] = {
    "a flipped bit": (CT16, flip_a_byte, r"model-00003-of-00003\.safetensors: its SHA-256 differs"),
    "a carried file that changed": (
        CT16, put("tokenizer.json", b"[]"), r"tokenizer\.json: its SHA-256 differs"),
    "a carried file that grew": (
        CT16, put("extra/notes.txt", b"more notes"),
        r"extra/notes\.txt: had 5 bytes when it was written, found 10"),
    "a carried file that is gone": (
        CT16, lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: had 2 bytes .* found None"),
    "a manifest of something else": (
        CT16, put("mso_hub.json", b'{"files": [1]}'), "not a manifest of this tool"),
    "gate and up with different scales": (
        CT16, change(f"{MLP}.up_proj.weight_global_scale", lambda t: t * 2),
        rf"{MLP}\.gate_up_proj: engines keep one global scale .*, found {MLP}\.gate_proj .*, {MLP}\.up_proj "),
    "q, k and v with different scales": (
        MO16, change(f"{QKV}.v_proj.weight_scale_2", lambda t: t * 1.001), rf"{QKV}\.qkv_proj: engines keep one"),
    "a global scale of zero": (
        CT16, change(f"{MLP}.down_proj.weight_global_scale", torch.zeros_like),
        rf"{MLP}\.down_proj: the global scale must be finite and > 0, found 0"),
    "a global scale that is NaN": (
        MO16, change(f"{MLP}.down_proj.weight_scale_2", lambda t: t * float("nan")), "finite and > 0, found nan"),
    "an infinite global scale": (
        CT16, change(f"{MLP}.down_proj.weight_global_scale", lambda t: t / 0), "finite and > 0, found inf"),
    "a negative global scale": (
        MO16, change(f"{MLP}.down_proj.weight_scale_2", lambda t: -t), "finite and > 0, found -"),
    "a block scale that is NaN": (
        CT16, change(f"{MLP}.gate_proj.weight_scale", bits(0x7F)), rf"{MLP}\.gate_proj: a block scale is NaN"),
    "a block scale that is a negative NaN": (
        MO16, change(f"{MLP}.gate_proj.weight_scale", bits(0xFF)), rf"{MLP}\.gate_proj: a block scale is NaN"),
    "a lost tensor": (CT16, lose_a_tensor, r"1 weights of the source are missing, the first is model\.norm\.weight"),
    "a lost scale": (
        CT16, lose_a_scale, rf"^{MLP}\.up_proj: weight_global_scale is there, weight_scale is not; the checkpoint is"),
    "a surplus tensor": (CT16, add_a_tensor, r"1 weights are not in the source, the first is model\.surplus"),
    "a nested config of an earlier quantization": (CT16, nested_config, "two different quantization configs"),
    "no config": (CT16, no_config, r"announces no quantization, 32 weights are packed"),
    "a router that ignore lacks": (
        CT16, config(lambda c: c["ignore"].remove("model.layers.1.mlp.gate")),
        r"stored dense and not in ignore.*: model\.layers\.1\.mlp\.gate"),
    "a packed layer in ignore": (
        CT16, config(lambda c: c["ignore"].append(f"{MLP}.up_proj")),
        rf"the entry .*{MLP}\.up_proj. of ignore covers modules that are stored packed: {MLP}\.up_proj"),
    "packed layers under a pattern in ignore": (
        CT16, config(lambda c: c["ignore"].append("re:.*self_attn.*")),
        rf"stored packed: {QKV}\.\w+, {QKV}\.\w+, {QKV}\.\w+ and 5 more"),
    "a pattern in ignore that is none": (
        CT16, config(lambda c: c["ignore"].append("re:(")), r"patterns that are no regular expressions: re:\("),
    "a glob in ModelOpt's ignore": (
        MO16, config(lambda c: c["ignore"].append("*.experts.2.up_*")), rf"stored packed: .*{MLP}\.up_proj"),
    "an ignore that is no list": (
        CT16, config(lambda c: c.update(ignore=5)), r"stored dense and not in ignore.*: model\.layers\.0\.mlp\.gate"),
    "a packed layer that contains an ignored name": (
        MO16, config(lambda c: c["ignore"].append("experts.2.up")), rf"stored packed: .*{MLP}\.up_proj"),
    "an activation scale that is zero": (
        CT4, change(f"{MLP}.down_proj.input_global_scale", torch.zeros_like),
        rf"{MLP}\.down_proj: the activation scale must be finite and > 0"),
    "activation scales that differ inside a unit": (
        MO4, change(f"{MLP}.up_proj.input_scale", lambda t: t * 3), "engines keep one activation scale"),
    "ModelOpt's file with another algorithm": (
        MO16, other_file, r"hf_quant_config\.json: quant_algo differs from quant_algo of config\.json"),
    "announced input scales that are missing": (
        CT16, config(announce_activations), "input scales are announced and missing"),
    "input scales that were lost": (CT4, drop_input_scales, "input scales are announced and missing"),
    "input scales that were lost, modelopt": (MO4, drop_input_scales, "input scales are announced and missing"),
    "input scales that are not announced": (
        CT4, config(weight_only), "input scales are stored, and the config does not announce any for them"),
    "the name of the other layout": (
        CT16, config(lambda c: c.update(quant_method="modelopt")), "stored in the layout compressed-tensors"),
    "hf_quant_config.json of an earlier quantization": (
        CT16, put("hf_quant_config.json", b"{}"), "left over from another quantization"),
    "no hf_quant_config.json": (
        MO16, lambda f: (f / "hf_quant_config.json").unlink(), r"hf_quant_config\.json: missing"),
    "a wrong total_size": (CT16, total_size, r"index\.json: total_size says [\d,]+ bytes, its tensors have"),
    "codes of another weight": (
        CT16, change(f"{MLP}.down_proj.weight_packed", lambda t: t.flip(0)),
        rf"{MLP}\.down_proj\.weight: relative squared error \d\S* \(nvfp4-pack-quantized\), at most 0\.12"),
    "swapped nibbles": (
        MO16, change(f"{MLP}.down_proj.weight", lambda t: (t >> 4) | (t << 4)), "relative squared error"),
    "a norm that changed": (
        CT16, change("model.norm.weight", lambda t: t * 1.1), r"model\.norm\.weight: relative squared error"),
    "a norm of another dtype and value": (
        CT16, change("model.norm.weight", lambda t: t.float() * 1.1), r"model\.norm\.weight: relative squared error"),
    "a norm with NaN": (
        CT16, change("model.norm.weight", lambda t: t * float("nan")), r"model\.norm\.weight: relative squared error"),
    "a norm with Inf": (
        CT16, change("model.norm.weight", lambda t: t / 0), r"model\.norm\.weight: relative squared error"),
    "integers that changed": (
        CT16, change("model.positions", lambda t: t + 1), r"model\.positions: relative squared error inf"),
    "a scalar that changed": (CT16, change("model.scalar", lambda t: t + 1), r"model\.scalar: relative squared error"),
    "another shape": (
        CT16, change("model.norm.weight", lambda t: t[:32]), r"model\.norm\.weight: relative squared error inf"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_damage_is_found(kind: str, source: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    """The good copy has no problems (see above), this one has the expected one."""
    which, damage, message = FOUND[kind]
    folder = Path(shutil.copytree(outputs[which], tmp_path / "damaged"))
    damage(folder)
    report = verify_checkpoint(folder, source=source)
    assert not report.ok
    assert [problem for problem in report.problems if re.search(message, problem)], report.problems


def test_wrong_scales_do_not_hide_among_right_ones(source: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    """A copy without its manifest passes: what the tests above find is the damage and nothing else."""
    folder = Path(shutil.copytree(outputs[CT16], tmp_path / "copy"))
    (folder / "mso_hub.json").unlink()
    report = verify_checkpoint(folder, source=source)
    assert report.problems == ()
    assert report.hashed == 0


@pytest.mark.parametrize("lost", ["up_proj.weight_packed", "up_proj.weight_scale"])
def test_a_tensor_that_no_shard_holds_stops_the_reading(lost: str, outputs: dict[str, Path], tmp_path: Path) -> None:
    """The index promises it; this is no finished checkpoint."""
    folder = Path(shutil.copytree(outputs[CT16], tmp_path / "damaged"))
    path = shard_of(folder, f"{MLP}.{lost}")
    tensors = load_file(path)
    del tensors[f"{MLP}.{lost}"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{MLP}\.{lost}"):
        verify_checkpoint(folder)


def test_a_truncated_shard_stops_the_reading(outputs: dict[str, Path], tmp_path: Path) -> None:
    """The header says more bytes than there are."""
    folder = Path(shutil.copytree(outputs[CT16], tmp_path / "damaged"))
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model-00001-of-00003"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("metadata", [None, [], {"total_size": "many"}, {"total_size": None}, {}])
def test_an_index_without_a_usable_total_is_no_crash(
    metadata: object, outputs: dict[str, Path], tmp_path: Path
) -> None:
    """Foreign indices leave it out or write anything there; only a wrong total is a problem."""
    folder = Path(shutil.copytree(outputs[CT16], tmp_path / "odd"))
    (folder / "mso_hub.json").unlink()
    with edited(folder / INDEX) as index:
        index["metadata"] = metadata
    problems = verify_checkpoint(folder).problems
    wrong = isinstance(metadata, Mapping) and metadata.get("total_size") == "many"
    assert [p for p in problems if "total_size" not in p] == []
    assert len(problems) == wrong


def test_dense_weights_under_a_quantization_config_are_a_problem(source: Path, tmp_path: Path) -> None:
    """What a careless decompression leaves."""
    folder = Path(shutil.copytree(source, tmp_path / "stale"))
    with edited(folder / "config.json") as content:
        content["quantization_config"] = {"quant_method": "compressed-tensors"}
    assert verify_checkpoint(folder).problems == (
        "config.json: announces a quantization, every weight is dense; remove quantization_config",
    )
    write_files(Path(shutil.copytree(source, tmp_path / "half")), {"hf_quant_config.json": b"{}"})
    assert "one of them is stale" in verify_checkpoint(tmp_path / "half").problems[0]


def test_another_checkpoint_is_a_reference_byte_for_byte(outputs: dict[str, Path], tmp_path: Path) -> None:
    """Equal tensors are counted, the first different byte is named, missing and surplus ones are listed."""
    mine = outputs[CT16]
    twin = Path(shutil.copytree(mine, tmp_path / "twin"))
    report = verify_checkpoint(mine, reference=twin)
    assert report.problems == ()
    assert report.reference == {str(twin): len(tensors_of(mine))}
    change(f"{MLP}.up_proj.weight_packed", bits(0x5A, at=77))(twin)
    change_again = change("model.norm.weight", lambda t: t.float())
    (twin / "mso_hub.json").touch()
    change_again(twin)
    save_file({"model.surplus": torch.zeros(2)}, twin / "surplus.safetensors")
    report = verify_checkpoint(mine, reference=twin)
    assert report.reference == {str(twin): len(tensors_of(mine)) - 2}
    assert set(report.problems) == {
        f"{MLP}.up_proj.weight_packed: differs from the reference from byte 77 of 1,024 on",
        "model.norm.weight: BF16 [64], the reference has F32 [64]",
        f"model.surplus: only in {twin}",
    }
    backwards = verify_checkpoint(twin, reference=mine)
    assert f"model.surplus: not in {mine}" in backwards.problems


@pytest.mark.parametrize("kind", [CT16, MO4])
def test_modelopt_is_a_reference(kind: str, source: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    """Its own quantizer over the source gives the bytes that we wrote; one other code is found."""
    report = verify_checkpoint(outputs[kind], source=source, reference="modelopt")
    assert report.problems == ()
    assert report.reference == {"modelopt": 32}
    codes = f"{MLP}.up_proj.weight{'_packed' if kind == CT16 else ''}"
    folder = Path(shutil.copytree(outputs[kind], tmp_path / "damaged"))
    change(codes, lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 9, t ^ 1, t))(folder)
    report = verify_checkpoint(folder, source=source, reference="modelopt")
    assert report.problems == (f"{MLP}.up_proj: 1 bytes differ from ModelOpt's codes and scales",)
    assert report.reference == {"modelopt": 31}


def test_modelopt_agrees_on_the_trained_model(tmp_path: Path) -> None:
    """112 layers with 36 units, real numbers."""
    convert(REAL, tmp_path / "out", Recipe(**MODELOPTS))
    report = verify_checkpoint(tmp_path / "out", source=REAL, reference="modelopt")
    assert report.problems == ()
    assert report.reference == {"modelopt": 112}
    assert report.units == 36


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("search", ["mse", "four_over_six"])
def test_searched_scales_are_one_problem(search: str, manifest: bool, source: Path, tmp_path: Path) -> None:
    """Other bytes on purpose: one sentence says so, found from the bytes; a damaged weight is named beside it."""
    convert(source, tmp_path / "out", Recipe(mode="all-linear", scale_search=search))
    if not manifest:
        (tmp_path / "out" / "mso_hub.json").unlink()
    report = verify_checkpoint(tmp_path / "out", source=source, reference="modelopt")
    assert report.reference == {"modelopt": 0}
    (problem,) = report.problems
    assert problem.startswith(f"32 NVFP4 weights have searched scales (--scale_search {search})")
    if manifest:
        change(f"{MLP}.up_proj.weight_packed", bits(0x5A, at=9))(tmp_path / "out")
        problems = verify_checkpoint(tmp_path / "out", source=source, reference="modelopt").problems
        damaged = f"{MLP}.up_proj: 1 bytes differ from what --scale_search {search} gives in codes and scales"
        assert [p for p in problems if "scale_search" in p][1:] == [damaged]


def test_exact_powers_of_two_are_told_from_a_search(source: Path, tmp_path: Path) -> None:
    """NVFP4 made from MXFP4 without loss; ModelOpt would round."""
    convert(source, tmp_path / "mx", Recipe(scheme="mxfp4", mode="all-linear"))
    convert(tmp_path / "mx", tmp_path / "out", Recipe(mode="all-linear"))
    report = verify_checkpoint(tmp_path / "out", source=tmp_path / "mx", reference="modelopt")
    assert [e.nmse for e in report.errors] == [0.0] * 32
    (problem,) = report.problems
    assert re.match(r"\d+ NVFP4 weights were MXFP4 and have exact powers of two", problem)


def test_modelopt_says_what_it_was_not_asked(source: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    """Its comparison is for NVFP4: others are counted in a note, and without any NVFP4 there is nothing to compare."""
    report = verify_checkpoint(outputs["mixed"], source=source, reference="modelopt")
    assert report.problems == ()
    assert report.reference == {"modelopt": 24}
    assert report.notes[1:] == ("8 packed weights are not NVFP4 and were not compared with ModelOpt",)
    assert f"note    {report.notes[1]}" in report_text(report)
    convert(source, tmp_path / "fp8", Recipe(scheme="fp8_dynamic"))
    with pytest.raises(VerifyError, match=r"shares none with the source \(24 packed weights in all\); leave it out"):
        verify_checkpoint(tmp_path / "fp8", source=source, reference="modelopt")


def test_modelopt_needs_the_source(outputs: dict[str, Path]) -> None:
    """It quantizes the original weights."""
    with pytest.raises(VerifyError, match="give --source too"):
        verify_checkpoint(outputs[CT16], reference="modelopt")


def test_fused_experts_of_the_source_are_matched_with_split_ones(tmp_path: Path) -> None:
    """The output has one tensor per expert where the source has a bank."""
    bank = "model.layers.0.mlp.experts"
    fused = {f"{bank}.gate_up_proj": random_tensor(3, 96, 64), f"{bank}.down_proj": random_tensor(3, 64, 48, seed=1)}
    settings = {"model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 48}
    folder = write_checkpoint(tmp_path / "in", {"model.safetensors": fused}, settings)
    convert(folder, tmp_path / "out", Recipe())
    report = verify_checkpoint(tmp_path / "out", source=folder)
    assert report.problems == ()
    assert len(report.errors) == 9


def test_large_tensors_are_compared_range_by_range(tmp_path: Path) -> None:
    """More than one range of eight megabytes; damage in the last row is found."""
    tensors = {"model.layers.0.mlp.down_proj.weight": random_tensor(6000, 1024)}
    folder = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": "llama"})
    convert(folder, tmp_path / "out", Recipe())
    good = verify_checkpoint(tmp_path / "out", source=folder)
    assert good.problems == ()
    path = tmp_path / "out" / "model.safetensors"
    packed = load_file(path)
    packed["model.layers.0.mlp.down_proj.weight_packed"][-1] = 0x77
    save_file(packed, path, metadata={"format": "pt"})
    bad = verify_checkpoint(tmp_path / "out", source=folder)
    assert bad.errors[0].nmse > good.errors[0].nmse
    assert bad.errors[0].max_abs > good.errors[0].max_abs


@pytest.mark.parametrize("other", ["another model", "nothing"])
def test_the_source_of_another_model_is_no_source(other: str, outputs: dict[str, Path], tmp_path: Path) -> None:
    """Names that do not fit are problems, a folder that is not there is an error."""
    if other == "nothing":
        with pytest.raises(MsoError, match="found nothing there"):
            verify_checkpoint(outputs[CT16], source=tmp_path / "nowhere")
        return
    llama = tiny_llama(tmp_path / "llama")
    report = verify_checkpoint(outputs[CT16], source=llama)
    assert any("weights of the source are missing" in problem for problem in report.problems)
    assert any("weights are not in the source" in problem for problem in report.problems)


def test_a_source_that_nobody_can_decode_is_an_error(outputs: dict[str, Path], tmp_path: Path) -> None:
    """Not a silent pass."""
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(16, 16).to(torch.float8_e4m3fn)}
    foreign = write_checkpoint(tmp_path / "fp8", {"model.safetensors": tensors}, {"model_type": "llama"})
    with pytest.raises(PlanError, match="without a decoder"):
        verify_checkpoint(outputs[CT16], source=foreign)


def test_the_report_is_json(source: Path, outputs: dict[str, Path]) -> None:
    """Every field, and the verdict first."""
    report: Report = verify_checkpoint(outputs[CT16], source=source)
    content = json.loads(json.dumps(report.as_dict()))
    assert next(iter(content)) == "ok"
    assert content["ok"] is True
    assert len(content["errors"]) == 32
    assert set(content["errors"][0]) == {"name", "nmse", "max_abs", "stored", "strays", "flips"}
