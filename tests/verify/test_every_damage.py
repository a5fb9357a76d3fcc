"""verify on every number format in every layout: silent about right conversions, and each kind of damage is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mso_hub.formats import FORMATS, IMPORTED, Scheme
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe, Rule
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from mso_hub.verify import Report, verify_checkpoint
from tests.helpers import checkpoint_files, random_tensor, tensors_in

Files = Mapping[str, bytes]
Tensors = dict[str, Tensor]
Config = dict[str, Any]

L0, L1 = "model.layers.0", "model.layers.1"
Q, K = f"{L0}.self_attn.q_proj", f"{L0}.self_attn.k_proj"
FIRST, SECOND = f"{L0}.mlp.down_proj", f"{L1}.mlp.down_proj"
LINEAR = (*(f"self_attn.{leaf}_proj" for leaf in "qkvo"), *(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")))


@cache
def model() -> Files:
    """Two layers of attention and MLP; the rows of a weight, and the weights, differ in magnitude."""
    tensors: Tensors = {"model.embed_tokens.weight": random_tensor(32, 128), "lm_head.weight": random_tensor(32, 128)}
    tensors["model.norm.weight"] = torch.ones(128, dtype=torch.bfloat16)
    for layer in (L0, L1):
        tensors[f"{layer}.input_layernorm.weight"] = torch.ones(128, dtype=torch.bfloat16)
        for name in LINEAR:
            seed = len(tensors)
            rows = torch.exp(random_tensor(128, 1, dtype=torch.float32, seed=seed + 100, spread=1.0))
            values = random_tensor(128, 128, dtype=torch.float32, seed=seed) * rows * seed
            tensors[f"{layer}.{name}.weight"] = values.bfloat16()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
    return checkpoint_files({"model.safetensors": tensors}, config)


def recipes() -> dict[str, Recipe]:
    """Every format in every layout with every kind of activations; groups, zero points, static scales, mixtures."""
    found = {}
    for name, entry in FORMATS.items():
        for layout in entry.choices.loaders:
            for bits in entry.choices.activations[layout]:
                static: dict[str, Any] = {"input_scale": 1.0} if (name, layout) == ("fp8", "modelopt") else {}
                sizes: list[dict[str, Any]] = [{}]
                if entry.choices.group_sizes:
                    sizes = [{"group_size": g, "symmetric": s} for g in (32, 0) for s in (True, False)]
                for size in sizes:
                    kind = " ".join([name, layout, f"A{bits}", *map(str, size.values())])
                    found[kind] = Recipe(
                        scheme=name, layout=layout, mode="all-linear", activations=bits, **static, **size
                    )
    amax = {f"{layer}.{name}": 3.0 for layer in (L0, L1) for name in LINEAR}
    for layout in ("compressed-tensors", "modelopt"):
        found[f"fp8 {layout} static"] = Recipe(
            scheme="fp8", layout=layout, mode="all-linear", input_scale=IMPORTED, input_amax=amax
        )
        rules = (Rule(Scheme("nvfp4"), ("*.mlp.*",)), Rule(Scheme("fp8_dynamic"), ("*.self_attn.*",)))
        found[f"mixed {layout}"] = Recipe(rules=rules, layout=layout)
        scales = {f"{layer}.self_attn": (0.5, 0.25) for layer in (L0, L1)}
        found[f"cache {layout}"] = Recipe(layout=layout, kv_cache=True, kv_scales=scales)
    return found


RECIPES = recipes()


@cache
def written(kind: str) -> Files:
    """An output, made once; its manifest lists no files, so that no digest finds the damage."""
    sink = MemorySink()
    convert(MemorySource(model()), sink, RECIPES[kind])
    manifest = json.loads(sink.files["mso_hub.json"]) | {"files": {}}
    return {**sink.files, "mso_hub.json": json.dumps(manifest).encode()}


def damaged(files: Files, tensors: Tensors | None = None, config: Config | None = None) -> Files:
    """The files with other tensors, or another config.json."""
    made = checkpoint_files({"model.safetensors": tensors}) if tensors is not None else {}
    return {**files, **made} | ({"config.json": json.dumps(config).encode()} if config is not None else {})


def checked(files: Files) -> Report:
    """Against the model."""
    return verify_checkpoint(MemorySource(files), source=MemorySource(model()))


def require(files: Files, *patterns: str) -> None:
    """Each of the patterns is in some problem."""
    problems = checked(files).problems
    for pattern in patterns:
        assert any(re.search(pattern, problem) for problem in problems), (pattern, problems)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_right_conversion_passes(kind: str) -> None:
    """No problem, every packed weight is compared, and all its numbers have the nearest code."""
    report = checked(written(kind))
    assert report.problems == ()
    assert report.packed == len(report.errors) == (6 if kind.startswith("cache") else 14)
    assert all(error.strays == 0 for error in report.errors)


# --- tensors ----------------------------------------------------------------------------------------

LEAVES = ("weight_packed", "weight")
SCALES = ("weight_scale", "weight_scale_inv")


def part(tensors: Tensors, module: str, leaves: tuple[str, ...]) -> str:
    """Name of the first of some tensors that a module has."""
    return next(f"{module}.{leaf}" for leaf in leaves if f"{module}.{leaf}" in tensors)


def wrong(module: str) -> str:
    """What is said of a weight with other numbers."""
    return rf"^{re.escape(module)}\.weight: (relative squared error|[\d,]+ of [\d,]+ numbers do not have the code)"


def codes_of_another(tensors: Tensors) -> list[str]:
    """Two layers have each other's codes."""
    one, two = (part(tensors, module, LEAVES) for module in (FIRST, SECOND))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    return [wrong(FIRST), wrong(SECOND)]


def scale_is(value: int) -> Callable[[Tensors], list[str]]:
    """One scale, the last of Q, gets these bytes."""

    def damage(tensors: Tensors) -> list[str]:
        name = part(tensors, Q, SCALES)
        scale = tensors[name].clone().reshape(-1)
        size = scale.element_size()
        scale.view(torch.uint8)[-size:] = torch.full((size,), value, dtype=torch.uint8)
        tensors[name] = scale.reshape(tensors[name].shape)
        return [wrong(Q)] if value == 0 else [rf"^{re.escape(Q)}: a .*(NaN|not finite)"]

    return damage


def scale_of_another_row(tensors: Tensors) -> list[str]:
    """The last row has the scales of the row whose scales are largest; where there is one scale, of a third weight."""
    name = part(tensors, Q, SCALES)
    scale = tensors[name].clone()
    if scale.shape[:1] == (128,):
        size = scale.view(torch.uint8).int() if scale.dtype == torch.uint8 else scale.float()
        size = size.reshape(128, -1).sum(1)
        scale[int(size.argmin())] = scale[int(size.argmax())]
    else:
        scale = tensors[part(tensors, FIRST, SCALES)].clone().reshape(scale.shape)
    tensors[name] = scale
    return [wrong(Q)]


def negative_scale(tensors: Tensors) -> list[str]:
    """One of Q's; engines that take the sign bit for something else would serve garbage."""
    name = part(tensors, Q, SCALES)
    if tensors[name].dtype == torch.uint8:
        return []  # exponents have no sign
    scale = tensors[name].clone().reshape(-1)
    scale[-1:] = (-scale[-1:].float()).to(scale.dtype)
    tensors[name] = scale.reshape(tensors[name].shape)
    return [rf"^{re.escape(Q)}: a (block )?scale is negative"]


def swapped_halves(tensors: Tensors) -> list[str]:
    """Blocks of rows that were written in each other's place."""
    name = part(tensors, Q, LEAVES)
    tensors[name] = tensors[name].roll(64, 0) if tensors[name].dtype != torch.float8_e4m3fn else (
        tensors[name].view(torch.uint8).roll(64, 0).view(torch.float8_e4m3fn)
    )  # fmt: skip
    return [wrong(Q)]


DAMAGES: dict[str, Callable[[Tensors], list[str]]] = {
    "codes of another weight": codes_of_another,
    "a scale that is zero": scale_is(0),
    "a scale that is NaN": scale_is(0xFF),
    "a negative scale": negative_scale,
    "scales of another row": scale_of_another_row,
    "rows in another place": swapped_halves,
}
ALL_LINEAR = [kind for kind in RECIPES if "cache" not in kind]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ALL_LINEAR)
def test_damaged_tensors_are_found(kind: str, damage: str) -> None:
    """With the name of the weight."""
    tensors = tensors_in(written(kind))
    patterns = DAMAGES[damage](tensors)
    require(damaged(written(kind), tensors), *patterns)


@pytest.mark.parametrize("kind", [kind for kind in RECIPES if kind.endswith("False")])
@pytest.mark.parametrize("rows", ["one", "all"])
def test_a_shifted_zero_point_is_found(kind: str, rows: str) -> None:
    """By one code, for eight rows or four; the error itself stays plausible."""
    tensors = tensors_in(written(kind))
    words = tensors[f"{Q}.weight_zero_point"].clone()
    target = words[:1, :1] if rows == "one" else words
    target ^= 0x11111111 if kind.startswith("w4") else 0x01010101
    tensors[f"{Q}.weight_zero_point"] = words
    require(damaged(written(kind), tensors), wrong(Q))


@pytest.mark.parametrize("kind", ["w4a16 compressed-tensors A16 32 False", "w8a16 compressed-tensors A16 0 False"])
def test_a_zero_point_shifted_everywhere_is_found_in_any_checkpoint(kind: str) -> None:
    """Without a manifest another tool may have chosen the codes, so only more strays than GPTQ leaves count."""
    tensors = tensors_in(written(kind))
    tensors[f"{Q}.weight_zero_point"] ^= 0x11111111 if kind.startswith("w4") else 0x01010101
    files = damaged(written(kind), tensors)
    require({name: data for name, data in files.items() if name != "mso_hub.json"}, wrong(Q))


W4A4 = ("nvfp4 compressed-tensors A4", "nvfp4 modelopt A4")


@pytest.mark.parametrize("kind", [kind for kind in RECIPES if "static" in kind or kind in W4A4])
def test_a_missing_activation_scale_is_found(kind: str) -> None:
    """Static FP8 and W4A4, in both layouts."""
    tensors = tensors_in(written(kind))
    del tensors[part(tensors, Q, ("input_scale", "input_global_scale"))]
    require(damaged(written(kind), tensors), rf"input scales are announced and missing.*: {re.escape(Q)}$")


# --- the cache --------------------------------------------------------------------------------------

CACHES = [kind for kind in RECIPES if kind.startswith("cache")]
cache_kinds = pytest.mark.parametrize("kind", CACHES)


def k_scale(tensors: Tensors) -> str:
    """The first layer's."""
    return part(tensors, f"{L0}.self_attn", ("k_scale", "k_proj.k_scale"))


@cache_kinds
@pytest.mark.parametrize("place", ["model.layers.7.self_attn", f"{L0}.mlp"])
def test_a_cache_scale_of_a_wrong_module_is_found(kind: str, place: str) -> None:
    """Where no attention is; loaders leave it out and take 1.0."""
    tensors = tensors_in(written(kind))
    name = k_scale(tensors)
    tensors[name.replace(f"{L0}.self_attn", place)] = tensors.pop(name)
    place = re.escape(place)
    require(
        damaged(written(kind), tensors), rf"beside what is no attention layer.*: {place}", rf"is missing: .*{place}"
    )


@cache_kinds
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cache_scale_must_be_a_positive_number(kind: str, value: float) -> None:
    """As every scale."""
    tensors = tensors_in(written(kind))
    name = k_scale(tensors)
    tensors[name] = torch.full_like(tensors[name], value)
    require(damaged(written(kind), tensors), rf"^{re.escape(L0)}\.self_attn: k_scale must be finite and > 0, found")


@cache_kinds
def test_cache_scales_must_be_announced(kind: str) -> None:
    """In config.json and, for ModelOpt, in the file beside it."""
    config = json.loads(written(kind)["config.json"])
    config["quantization_config"].pop("kv_cache_scheme")
    files = damaged(written(kind), config=config)
    require(files, rf"announces no KV cache, so loaders leave out its scales: {re.escape(L0)}\.self_attn, ")
    if "modelopt" in kind:
        require(files, "kv_cache_quant_algo differs from kv_cache_scheme")


# --- the config -------------------------------------------------------------------------------------


def compressed(kind: str, change: Callable[[Config], object]) -> Files:
    """Another `weights` in the first config group of compressed-tensors."""
    config = json.loads(written(kind)["config.json"])
    change(config["quantization_config"]["config_groups"]["group_0"])
    return damaged(written(kind), config=config)


def settings(**changed: Any) -> Callable[[Config], object]:
    """Other fields of `weights`."""
    return lambda group: group["weights"].update(changed)


G32, ROW = "w4a16 compressed-tensors A16 32 True", "w4a16 compressed-tensors A16 0 True"
ALL = r".* \(and 13 more weights like it\)$"
CLAIMS: dict[str, tuple[str, Callable[[Config], object], str]] = {
    "INT4 in other groups": (G32, settings(group_size=64), r"config\.json says groups of 64" + ALL),
    "INT4 in groups instead of rows": (
        ROW, settings(strategy="group", group_size=32), "says one scale for 32 columns, stored is one for a row: "),
    "INT4 as INT8": (G32, settings(num_bits=8), r"config\.json says 8 bits" + ALL),
    "symmetric with zero points": (
        "w4a16 compressed-tensors A16 32 False", settings(symmetric=True),
        r"config\.json says symmetric, weight_zero_point is there" + ALL),
    "asymmetric without zero points": (
        G32, settings(symmetric=False), r"config\.json says asymmetric, weight_zero_point is missing" + ALL),
    "INT8 as INT4": (
        "int8 compressed-tensors A8", settings(num_bits=4),
        r"config\.json says 4 bits, stored are codes from -12\d to 127" + ALL),
    "INT8 rows as a tensor": (
        "int8 compressed-tensors A8", settings(strategy="tensor"),
        r"config\.json says one scale for 128 x 128 .*, stored are .*weight_scale BF16 \[128, 1\]" + ALL),
    "FP8 rows as blocks": (
        "fp8_dynamic compressed-tensors A8", settings(strategy="block", block_structure=[64, 64]),
        r"config\.json says one scale for 64 x 64" + ALL),
    "FP8 as INT8": (
        "fp8_dynamic compressed-tensors A8", settings(type="int"), r"config\.json says int8 \(int 8 bits" + ALL),
    "FP8 as 4 bits": ("fp8 compressed-tensors A8", settings(num_bits=4), r"config\.json: says 4 bits, stored are 8: "),
    "MXFP8 as FP8": ("mxfp8 compressed-tensors A8", settings(scale_dtype=None), r"config\.json says fp8 " + ALL),
    "MXFP4 as NVFP4": ("mxfp4 compressed-tensors A16", settings(group_size=16), r"config\.json says nvfp4 " + ALL),
    "NVFP4 in groups of 64": (
        "nvfp4 compressed-tensors A16", settings(group_size=64),
        "says one scale for 64 columns, stored is one for 16 columns: "),
    "another format": (
        G32, lambda group: group.update(format="int-quantized"),
        "says format int-quantized, stored is pack-quantized: "),
    "a group of another module": (
        "mixed compressed-tensors", lambda group: group.update(targets=group["targets"][1:]),
        "stored packed and in no group, so loaders expect them dense: "),
    "a group of no module": (
        G32, lambda group: group.update(targets=["model.layers.9"]),
        "no config group of quantization_config covers it" + ALL),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_config_of_other_weights_is_found(claim: str) -> None:
    """A problem and no crash, whether decoding depends on the config or not."""
    kind, change, message = CLAIMS[claim]
    files = compressed(kind, change)
    require(files, message)
    assert len(checked(files).problems) == 1


@pytest.mark.parametrize("kind", [kind for kind in RECIPES if "A" in kind])
def test_an_ignored_module_that_is_packed_is_found(kind: str) -> None:
    """In every layout's own list."""
    config = json.loads(written(kind)["config.json"])
    said = config["quantization_config"]
    key = "modules_to_not_convert" if "deepseek" in kind else "ignore"
    said[key] = [*said[key], Q]
    require(
        damaged(written(kind), config=config),
        rf"the entry .* of ignore covers modules that are stored packed: {re.escape(Q)}$",
    )


def test_deepseek_needs_its_block_size() -> None:
    """Without one vLLM makes room for one scale a tensor."""
    kind = "fp8_block deepseek A8"
    config = json.loads(written(kind)["config.json"])
    config["quantization_config"]["weight_block_size"] = None
    files = damaged(written(kind), config=config)
    assert [p for p in checked(files).problems if "says one scale for the tensor" in p] == []  # 128 rows: one block
    config["quantization_config"]["weight_block_size"] = [64, 64]
    require(damaged(written(kind), config=config), r"config\.json says one scale for 64 x 64")


def modelopt(kind: str, change: Callable[[Config], object]) -> Files:
    """Another quantization_config, and the file beside it unchanged."""
    config = json.loads(written(kind)["config.json"])
    change(config["quantization_config"])
    return damaged(written(kind), config=config)


def test_modelopts_layers_are_compared_one_by_one() -> None:
    """A module without an entry, one with another algorithm, one with other groups; the other file differs then."""
    kind = "mixed modelopt"
    beside = "hf_quant_config.json: quantized_layers differs"
    require(
        modelopt(kind, lambda said: said["quantized_layers"].pop(Q)),
        rf"stored packed and in no group.*: {re.escape(Q)}$",
        beside,
    )
    require(
        modelopt(kind, lambda said: said["quantized_layers"][Q].update(quant_algo="NVFP4")),
        rf"^{re.escape(Q)}: config\.json says nvfp4 \(quant_algo NVFP4\), stored are",
        beside,
    )
    require(
        modelopt(kind, lambda said: said["quantized_layers"][Q].update(quant_algo="FP8")),
        rf"says one scale for the tensor, stored is one for a row: {re.escape(Q)}$",
    )
    require(
        modelopt(kind, lambda said: said["quantized_layers"][FIRST].update(group_size=32)),
        rf"says one scale for 32 columns, stored is one for 16 columns: {re.escape(FIRST)}$",
    )


@pytest.mark.parametrize(("kind", "algo"), [
    ("fp8 modelopt A8", "FP8_PER_CHANNEL_PER_TOKEN"), ("fp8_dynamic modelopt A8", "FP8"),
    ("fp8_dynamic modelopt A8", "FP8_PB_WO"), ("mxfp8 modelopt A8", "FP8"), ("nvfp4 modelopt A16", "MXFP8"),
])  # fmt: skip
def test_another_algorithm_is_found(kind: str, algo: str) -> None:
    """ModelOpt's name decides what a loader makes room for."""
    require(modelopt(kind, lambda said: said.update(quant_algo=algo)), "config.json:? says", "quant_algo differs")


def test_many_weights_with_one_fault_are_one_problem() -> None:
    """Fourteen contradictions of the same kind: the sentence of the first one and a count."""
    problems = checked(compressed("int8 compressed-tensors A8", settings(type="float"))).problems
    (problem,) = [p for p in problems if "config.json says fp8" in p]
    assert problem.endswith("(and 13 more weights like it)")


def test_what_nobody_can_decode_is_a_problem_of_the_checkpoint() -> None:
    """E5M2 in place of E4M3: the others are compared all the same, and it is not called missing."""
    kind = "fp8_dynamic compressed-tensors A8"
    tensors = tensors_in(written(kind))
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].view(torch.float8_e5m2)
    report = checked(damaged(written(kind), tensors))
    assert len(report.errors) == 13
    (problem,) = report.problems
    assert re.match(rf"{re.escape(Q)}\.weight F8_E5M2 .*part of a packed weight without a decoder", problem)
