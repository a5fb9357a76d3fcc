"""`--recipe`: files, presets and manifests; numbers of layers; what the command line adds; what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from mso_hub.cli import main
from mso_hub.errors import PlanError, RecipeError
from mso_hub.formats import FORMATS, Scheme
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Plan, Recipe, Rule
from mso_hub.plan.layers import layer_numbers, split_layers
from mso_hub.plan.recipe_file import read_recipe
from mso_hub.plan.select import decoder_layer
from mso_hub.plan.summary import command
from tests.helpers import base_config, in_shards, mlp_shapes, tiny_llama, tiny_moe, weights, write_checkpoint

TOML = """
layout = "modelopt"
kv_cache = "fp8"
ignore = ["model.layers.1", 're:.*k_proj']
default_ignore = false
skip_layers = [0, "2-3", -1]
text_only = true

[[rules]]
format = "nvfp4"
targets = ["*.experts"]
activations = 4
scale_search = "mse"
input_scale = 2

[[rules]]
format = "fp8_dynamic"
mode = "all-linear"
layers = "0-3, -1"
optional = true

[[rules]]
format = "bf16"
targets = ["lm_head"]
default_ignore = false
layers = 4
"""
READ = Recipe(
    layout="modelopt",
    kv_cache=True,
    ignore=("model.layers.1", "re:.*k_proj"),
    default_ignore=False,
    skip_layers=(0, "2-3", -1),
    text_only=True,
    rules=(
        Rule(Scheme("nvfp4", 4, search="mse", input_scale=2.0), ("*.experts",)),
        Rule(Scheme("fp8_dynamic"), mode="all-linear", layers=("0-3", "-1"), optional=True),
        Rule(Scheme("bf16"), ("lm_head",), layers=(4,), default_ignore=False),
    ),
)
FP8 = '[[rules]]\nformat = "fp8_dynamic"\nmode = "all-linear"\n'


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers."""
    return tiny_llama(tmp_path_factory.mktemp("llama") / "in", layers=6)


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def quantized(plan: Plan) -> dict[str, str]:
    """Module -> format."""
    return {module: form.name for module, form in plan.formats.items()}


def layers_of(plan: Plan) -> set[int]:
    """Decoder layers with something quantized."""
    return {int(module.split(".")[2]) for module in plan.formats}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# --- files ----------------------------------------------------------------------------------------


def test_a_toml_file_says_everything_that_a_recipe_has(tmp_path: Path) -> None:
    """Each key once."""
    assert read_recipe(write(tmp_path, TOML)) == READ


def test_a_yaml_file_says_the_same(tmp_path: Path) -> None:
    """Both suffixes."""
    text = """
layout: modelopt
kv_cache: fp8
ignore: [model.layers.1, 're:.*k_proj']
default_ignore: false
skip_layers: [0, 2-3, -1]
text_only: true
rules:
  - {format: nvfp4, targets: ['*.experts'], activations: 4, scale_search: mse, input_scale: 2}
  - {format: fp8_dynamic, mode: all-linear, layers: '0-3, -1', optional: true}
  - {format: bf16, targets: [lm_head], default_ignore: false, layers: 4}
"""
    for name in ("recipe.yaml", "recipe.yml"):
        assert read_recipe(write(tmp_path, text, name)) == READ


PATTERN = st.text("abz.*\\é\"' :#-", min_size=1, max_size=8)


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    """A file as a table, every key with a valid value."""
    rule = st.fixed_dictionaries(
        {"format": st.sampled_from(["nvfp4", "mxfp8", "fp8_block", "fp8_dynamic"])},
        optional={"scale_search": st.just("absmax"), "optional": st.booleans()},
    )
    rules = draw(st.lists(rule, min_size=1, max_size=3))
    for entry in rules:
        if draw(st.booleans()):
            entry["targets"] = draw(st.lists(PATTERN, min_size=1, max_size=3))
        else:
            entry["mode"] = draw(st.sampled_from(["mlp", "all-linear"]))
        if draw(st.booleans()):
            entry["layers"] = draw(st.lists(st.integers(-9, 99), min_size=1, max_size=2))
    top = st.fixed_dictionaries(
        {}, optional={"layout": st.just("compressed-tensors"), "kv_cache": st.sampled_from(["fp8", False]),
                      "ignore": st.lists(PATTERN, max_size=3, unique=True), "skip_layers": st.lists(
                          st.integers(-3, 9), max_size=3, unique=True)},
    )  # fmt: skip
    return {**draw(top), "rules": rules}


def toml_of(content: dict[str, Any]) -> str:
    """A TOML document: values are written as JSON, of which TOML has the same strings, numbers and lists."""

    def lines(table: dict[str, Any]) -> list[str]:
        return [f"{key} = {json.dumps(value)}" for key, value in table.items() if key != "rules"]

    blocks = ["\n".join(["[[rules]]", *lines(rule)]) for rule in content["rules"]]
    return "\n".join([*lines(content), *blocks]) + "\n"


@given(contents())
def test_toml_and_yaml_mean_the_same(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    """And nothing of the file is lost."""
    folder = tmp_path_factory.mktemp("same")
    first = read_recipe(write(folder, toml_of(content)))
    second = read_recipe(write(folder, yaml.safe_dump(content, allow_unicode=True), "recipe.yaml"))
    assert first == second
    assert [rule.scheme.format for rule in first.rules] == [rule["format"] for rule in content["rules"]]
    assert [list(rule.targets) for rule in first.rules] == [rule.get("targets", []) for rule in content["rules"]]
    assert [list(rule.layers) for rule in first.rules] == [rule.get("layers", []) for rule in content["rules"]]
    assert [rule.optional for rule in first.rules] == [rule.get("optional", False) for rule in content["rules"]]
    assert list(first.ignore) == content.get("ignore", [])
    assert list(first.skip_layers) == content.get("skip_layers", [])
    assert first.kv_cache == (content.get("kv_cache") == "fp8")


SCHEME = '[[rules]]\nformat = "nvfp4"\n'
REFUSED: dict[str, tuple[str, list[str]]] = {
    "unknown key": ('layuot = "modelopt"\n' + FP8, ["'layuot' is no setting, known are layout", "mean 'layout'"]),
    "unknown key of a rule": (FP8 + "target = ['x']", ["rule 1: 'target' is no setting, known", "mean 'targets'"]),
    "unknown format": (FP8.replace("dynamic", "dynamc"), ["rule 1: format must be one of nvfp4", "mean 'fp8_dynamic'"]),
    "format of a wrong type": (FP8.replace('"fp8_dynamic"', "8"), ["rule 1: format must be one of", "got 8"]),
    "no format": ('[[rules]]\nmode = "mlp"', ["rule 1: needs a format, has mode"]),
    "no targets": (SCHEME, ["rule 1: needs targets or else a mode (mlp or all-linear), has format"]),
    "targets and mode": (FP8 + 'targets = ["x"]', ["rule 1: needs targets or else a mode"]),
    "empty targets": (SCHEME + "targets = []", ["rule 1: needs targets or else a mode"]),
    "targets as text": (SCHEME + 'targets = "x"', ["rule 1: targets must be a list of patterns, got 'x'"]),
    "second rule": (FP8 + FP8 + 'optional = "yes"', ["rule 2: optional must be true or false, got 'yes'"]),
    "true for a number": (FP8 + "group_size = true", ["rule 1: group_size must be a whole number, got True"]),
    "one for true": ("default_ignore = 1\n" + FP8, ["default_ignore must be true or false, got 1"]),
    "unknown layout": ('layout = "modelop"\n' + FP8, ["layout must be compressed-tensors or", "mean 'modelopt'"]),
    "unknown mode": (SCHEME + 'mode = "all_linear"', ["mode must be mlp or all-linear", "mean 'all-linear'"]),
    "unknown cache": ('kv_cache = "int8"\n' + FP8, ['kv_cache must be "fp8" or false, got \'int8\'']),
    "no rules": ('layout = "modelopt"', ["needs at least one rule ([[rules]] with a format), got None"]),
    "empty rules": ("rules = []", ["needs at least one rule", "got []"]),
    "a rule that is text": ('rules = ["nvfp4"]', ["rule 1: must be a table of settings, got 'nvfp4'"]),
    "malformed layers": (FP8 + 'layers = ["first"]', ["layers must be layers like", "got ['first']"]),
    "layers as a number with a point": (FP8 + "layers = [1.5]", ["layers must be layers like", "got [1.5]"]),
    "layers as a table": (FP8 + "layers = {}", ["layers must be layers like", "got {}"]),
    "a scale that is text": (FP8 + 'input_scale = "1.0"', ['input_scale must be a number or "imported", got \'1.0\'']),
    "a scale below zero": (SCHEME + 'mode = "mlp"\ninput_scale = -1', ["rule 1: input_scale must be a finite", "-1.0"]),
    "what the format has not": (FP8 + "group_size = 32", ["group_size: fp8_dynamic has no choice of it, got 32"]),
    "what the layout has not": ('layout = "modelopt"\n' + SCHEME.replace("nvfp4", "w4a16") + 'mode = "mlp"',
                                ["w4a16 in the layout 'modelopt'", "use the layout compressed-tensors"]),
    "mode and default_ignore": (FP8 + "default_ignore = false", ["rule 1: default_ignore: a rule without targets"]),
    "only bf16": (FP8.replace("fp8_dynamic", "bf16"), ["rules must quantize something"]),
    "malformed TOML": ("[[rules]\n", ["cannot be read", "line 1"]),
    "twice in TOML": ('layout = "modelopt"\nlayout = "deepseek"\n' + FP8, ["Cannot overwrite a value", "line 2"]),
    "a recipe of ModelOpt": ("[quantize]\na = 1", ["is a recipe of ModelOpt", "found 'quantize'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_with_its_place(case: str, tmp_path: Path) -> None:
    """File, place, what was found, what is allowed."""
    text, words = REFUSED[case]
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    assert str(error.value).startswith(f"{path}: ")
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


REFUSED_YAML = {
    "twice": ("layout: modelopt\nlayout: deepseek\n", "'layout' stands there twice, line 1"),
    "malformed": ("rules: [\n", "cannot be read: .*line 2"),
    "a list": ("- format: nvfp4\n", "needs a table of settings with `rules`, got list"),
    "empty": ("", "needs a table of settings with `rules`, got NoneType"),
    "code": ("rules: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    "a recipe of llm-compressor": (
        "quant_stage:\n  quant_modifiers: {}\n",
        "is a recipe of llm-compressor; --like takes",
    ),
}


@pytest.mark.parametrize("case", REFUSED_YAML)
def test_a_wrong_yaml_file_is_refused(case: str, tmp_path: Path) -> None:
    """Keys that stand there twice too, of which PyYAML would take the last."""
    text, message = REFUSED_YAML[case]
    path = write(tmp_path, text, "recipe.yaml")
    with pytest.raises(RecipeError, match=f"^{path}: .*{message}"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nvfp4_mlponly", "no preset and no file has this name; did you mean 'nvfp4_mlp_only'"),
        ("zzz", "no preset and no file has this name; `mso-hub formats --presets` lists"),
        ("nowhere/recipe.toml", "found no file nowhere/recipe.toml"),
        ("recipe.yaml", "found no file recipe.yaml"),
    ],
)
def test_a_recipe_that_is_not_there(where: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(where)


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    """Another suffix, bytes that are no text, the config of a model."""
    with pytest.raises(
        RecipeError, match=r"a recipe is a file \.toml, \.yaml, \.yml or mso_hub\.json, got recipe\.txt"
    ):
        read_recipe(write(tmp_path, FP8, "recipe.txt"))
    (tmp_path / "recipe.toml").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        read_recipe(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match="is the config of a model; give it to --like"):
        read_recipe(write(tmp_path, '{"quantization_config": {}}', "config.json"))
    with pytest.raises(RecipeError, match=r"needs the settings of a conversion \(`recipe`\), has files"):
        read_recipe(write(tmp_path, '{"files": {}}', "mso_hub.json"))
    with pytest.raises(RecipeError, match="needs a recipe, found no file"):
        read_recipe(tmp_path / "empty" / "mso_hub.json")


# --- what is said beside a file -------------------------------------------------------------------


def test_what_is_said_beside_it_goes_before_the_file(tmp_path: Path) -> None:
    """Lists of what stays add up."""
    path = write(tmp_path, TOML)
    found = read_recipe(path, layout="compressed-tensors", text_only=False, ignore=("x",), skip_layers=("4",))
    assert (found.layout, found.text_only) == ("compressed-tensors", False)
    assert found.ignore == ("model.layers.1", "re:.*k_proj", "x")
    assert found.skip_layers == (0, "2-3", -1, "4")
    assert found.rules == READ.rules


def test_activation_scales_are_for_the_rules_that_can_have_them(tmp_path: Path) -> None:
    """W4A4 and FP8 with one scale a tensor; a rule that has none is an error only when all are."""
    text = '[[rules]]\nformat = "nvfp4"\nmode = "mlp"\nactivations = 4\n' + FP8
    found = read_recipe(write(tmp_path, text), input_scale="imported", input_amax={"a": 1.0})
    assert [rule.scheme.input_scale for rule in found.rules] == ["imported", None]
    with pytest.raises(RecipeError, match=r"--input_scale 1\.0: no rule has static activation scales .fp8_dynamic"):
        read_recipe(write(tmp_path, FP8), input_scale=1.0)
    needy = FP8.replace("fp8_dynamic", "fp8") + 'input_scale = "imported"'
    with pytest.raises(RecipeError, match="has static activation scales, which are not in it; add --input_scale WHERE"):
        read_recipe(write(tmp_path, needy))


@pytest.mark.parametrize(
    "words",
    [["--format", "nvfp4"], ["--mlp_only"], ["--all_linear"], ["--targets", "x"], ["--activations", "16"],
     ["--group_size", "0"], ["--symmetric"], ["--asymmetric"], ["--scale_search", "mse"]],
)  # fmt: skip
def test_options_that_are_in_the_rules_contradict_a_recipe(words: list[str], llama: Path, tmp_path: Path) -> None:
    """With the way out; --like is no different, and not together with --recipe."""
    result = invoke("plan", llama, "--recipe", write(tmp_path, FP8), *words)
    assert result.exit_code == 2
    assert words[0] in result.stderr
    assert "says this in its rules; keep one of them" in result.stderr
    both = invoke("plan", llama, "--recipe", "fp8", "--like", llama)
    assert "contradict each other; keep one" in both.stderr


def test_the_command_line_goes_before_a_file(llama: Path, tmp_path: Path) -> None:
    """--layout, --ignore, --skip_layers, --kv_cache."""
    words = ("--layout", "modelopt", "--ignore", "*.k_proj", "--ignore", "*.q_proj", "--ignore", "*.v_proj")
    result = invoke("plan", llama, "--recipe", write(tmp_path, FP8), *words, "--skip_layers", "-1,0-1",
                    "--kv_cache", "fp8", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["layout"] == "modelopt"
    assert plan["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert {name.split(".")[2] for name in plan["quantized"]} == {"2", "3", "4"}
    assert not any("k_proj" in name for name in plan["quantized"])
    assert plan["kept"]["model.layers.5.mlp.up_proj"] == "layer 5 is in skip_layers"


# --- layers ---------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.data())
def test_numbers_count_as_python_counts(count: int, data: st.DataObject) -> None:
    """From the front, or from the end."""
    first = data.draw(st.integers(-count, count - 1))
    last = data.draw(st.integers(-count, count - 1))
    places = list(range(count))
    assert layer_numbers("x", (first,), count) == (frozenset([places[first]]), [])
    begin, end = places[first], places[last]
    numbers, problems = layer_numbers("x", (f"{first}-{last}",), count)
    assert numbers == (set(range(begin, end + 1)) if begin <= end else set())
    assert bool(problems) == (begin > end)


@given(st.integers(1, 40), st.integers(0, 100))
def test_a_layer_beyond_the_last_is_a_problem(count: int, more: int) -> None:
    """On both ends."""
    for number in (count + more, -count - 1 - more):
        numbers, problems = layer_numbers("skip_layers", (number,), count)
        assert not numbers
        assert f"there is no layer {number}, config.json has num_hidden_layers {count}: 0 to {count - 1}" in problems[0]


def test_layers_of_a_command_line() -> None:
    assert split_layers("0, 2-4,-1") == ("0", "2-4", "-1")
    for text in ("0,", "a", "1-2-3", "--1", "1:2", "٣"):
        with pytest.raises(RecipeError, match='skip_layers must be numbers of layers like 0, "0-3" or -1'):
            Recipe(skip_layers=split_layers(text))
    with pytest.raises(RecipeError, match="layers must be numbers of layers"):
        Rule(Scheme(), layers=(True,))


def test_a_rule_is_for_its_layers(llama: Path) -> None:
    """The first and the last FP8, those between NVFP4, one left alone."""
    rules = (
        Rule(Scheme("fp8_dynamic"), layers=("0-1", -1)),
        Rule(Scheme("nvfp4"), layers=("1-4",)),
    )
    plan = make_plan(llama, Recipe(rules=rules, skip_layers=("-3",)))
    by_layer = {int(module.split(".")[2]): name for module, name in quantized(plan).items()}
    assert by_layer == {0: "fp8_dynamic", 1: "fp8_dynamic", 2: "nvfp4", 4: "nvfp4", 5: "fp8_dynamic"}
    assert "3 weights are covered by rule 1 (fp8_dynamic for mlp in layers 0-1, -1) and by rule 2" in plan.notes[0]
    assert plan.kept["model.layers.3.mlp.up_proj"] == "layer 3 is in skip_layers"


def test_a_layer_that_is_not_there_stops_the_plan(llama: Path) -> None:
    """All problems at once: of skip_layers and of each rule."""
    rules = (Rule(Scheme("fp8_dynamic"), layers=(6,)), Rule(Scheme("nvfp4"), layers=("-1-0",)))
    with pytest.raises(PlanError) as error:
        make_plan(llama, Recipe(rules=rules, skip_layers=(-7,)))
    assert "skip_layers: there is no layer -7, config.json has num_hidden_layers 6: 0 to 5" in str(error.value)
    assert "layers of rule 1: there is no layer 6" in str(error.value)
    assert "layers of rule 2: -1-0 is no range, layer 5 comes after 0" in str(error.value)


def test_without_a_count_only_numbers_from_the_front_are_known(tmp_path: Path) -> None:
    """A negative one needs num_hidden_layers; a layer that no weight is in is missed all the same."""
    tensors = weights({f"model.layers.{n}.mlp.up_proj": (32, 64) for n in range(3)}, dtype=torch.bfloat16, seed=0)
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": "llama"})
    assert layers_of(make_plan(source, Recipe(skip_layers=(0,)))) == {1, 2}
    with pytest.raises(PlanError, match=r"-1 counts from the last layer, config\.json has no num_hidden_layers"):
        make_plan(source, Recipe(skip_layers=(-1,)))
    with pytest.raises(PlanError, match="layers: there is no layer 3 here"):
        make_plan(source, Recipe(skip_layers=(0, "2-3")))


def test_mtp_and_vision_layers_are_not_counted(tmp_path: Path) -> None:
    """-1 is the last decoder layer though an MTP layer follows it, and layer 0 is not the tower's."""
    names = ["model.layers.0", "model.layers.1", "model.layers.2", "mtp.layers.0", "visual.blocks.0"]
    shapes = {name: shape for prefix in names for name, shape in mlp_shapes(f"{prefix}.mlp", 32, 64).items()}
    config = {"model_type": "llama", **base_config(32, 2, 8, torch.bfloat16)}
    source = write_checkpoint(tmp_path / "in", in_shards(weights(shapes, torch.bfloat16, 0), 1), config)
    plan = make_plan(source, Recipe(skip_layers=(0, -1), default_ignore=False))
    kept = {module.rpartition(".mlp")[0] for module, why in plan.kept.items() if "skip_layers" in why}
    assert kept == {"model.layers.0", "model.layers.1"}
    assert {module.rpartition(".mlp")[0] for module in plan.formats} == {
        "model.layers.2",
        "mtp.layers.0",
        "visual.blocks.0",
    }


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.7.mlp.up_proj", 7),
        ("model.language_model.layers.7.mlp.up_proj", 7),
        ("backbone.layers.7.mixer.in_proj", 7),
        ("transformer.h.7.mlp.c_fc", 7),
        ("transformer.blocks.7.ffn.w1", 7),
        ("model.layers.9.mlp.up_proj", None),
        ("model.layers.61.eh_proj", None),
        ("mtp.layers.0.mlp.up_proj", None),
        ("vision_tower.encoder.layers.3.mlp.fc1", None),
        ("lm_head", None),
        ("model.layers.mlp.up_proj", None),
    ],
)
def test_the_number_of_a_decoder_layer(module: str, layer: int | None) -> None:
    assert decoder_layer(module, 9) == layer


# --- rules that may find nothing, and rules that go over the default ---------------------------------


def test_an_optional_rule_is_noted_and_no_error(llama: Path) -> None:
    """A dense model has no experts; without the word it is an error, and nothing at all always is."""
    experts = Rule(Scheme("nvfp4"), ("*.experts",), optional=True)
    rest = Rule(Scheme("fp8_dynamic"), mode="all-linear")
    plan = make_plan(llama, Recipe(rules=(experts, rest)))
    assert set(quantized(plan).values()) == {"fp8_dynamic"}
    assert "rule 1 (nvfp4 for *.experts) covers no weight that could be quantized" in plan.notes
    with pytest.raises(PlanError, match=r"targets '\*.experts' matches no weight"):
        make_plan(llama, Recipe(rules=(Rule(Scheme("nvfp4"), ("*.experts",)), rest)))
    with pytest.raises(PlanError, match=r"no rule of the recipe covers a weight here \(nvfp4 for \*.experts\)"):
        make_plan(llama, Recipe(rules=(experts,)))


def test_an_optional_rule_says_how_much_of_it_is_missing(llama: Path) -> None:
    rule = Rule(Scheme("nvfp4"), ("*.o_proj", "*.out_proj", "*.c_proj"), optional=True)
    plan = make_plan(llama, Recipe(rules=(rule,)))
    label = "nvfp4 for *.o_proj, *.out_proj, ..."
    assert plan.notes == (f"rule 1 ({label}): 2 of its 3 targets match nothing here, the first is '*.out_proj'",)


def test_a_rule_can_go_over_the_default(llama: Path) -> None:
    """It alone: no other rule gets the head, and an embedding is never taken."""
    head = Rule(Scheme("fp8_dynamic"), ("lm_head",), default_ignore=False)
    plan = make_plan(llama, Recipe(rules=(head, Rule(Scheme("nvfp4"), mode="all-linear"))))
    assert quantized(plan)["lm_head"] == "fp8_dynamic"
    assert plan.kept["model.embed_tokens"] == "embedding"
    assert "lm_head" not in json.dumps(plan.config["quantization_config"]["ignore"])
    everything = Rule(Scheme("nvfp4"), ("*",), default_ignore=False)
    assert "model.embed_tokens" not in make_plan(llama, Recipe(rules=(everything,))).formats
    assert make_plan(llama, Recipe(mode="all-linear")).kept["lm_head"] == "output head"


# --- an output as a recipe ------------------------------------------------------------------------

MADE = {
    "flat": Recipe(mode="all-linear", scale_search="mse", skip_layers=(0,), ignore=("*.o_proj",)),
    "modelopt": Recipe(layout="modelopt", input_scale=0.5, kv_cache=True),
    "rules": Recipe(
        rules=(
            Rule(Scheme("fp8_dynamic"), layers=(0, "1-2", -1)),
            Rule(Scheme("nvfp4", activations=16), ("*.mlp",), optional=True),
            Rule(Scheme("w4a16", group_size=32, symmetric=False), ("re:.*self_attn",)),
        ),
        imported_ignore=("lm_head", "*.layers.4*"),
    ),
}


@pytest.mark.parametrize("kind", MADE)
def test_an_output_is_the_recipe_that_made_it(kind: str, llama: Path, tmp_path: Path) -> None:
    """Its mso_hub.json or its folder: the same job, so that the same command would find it complete."""
    plan = convert(llama, tmp_path / "out", MADE[kind])
    for where in (tmp_path / "out", tmp_path / "out" / "mso_hub.json"):
        found = read_recipe(where)
        assert found == MADE[kind]
        assert make_plan(llama, found).job == plan.job


def test_the_command_of_a_recipe_with_rules_works(llama: Path, tmp_path: Path) -> None:
    """The line that a card shows, read by a shell, makes the same bytes in another folder."""
    recipe = MADE["rules"]
    folder = tmp_path / "my out"
    convert(llama, folder, recipe)
    line = command(recipe, shlex.quote(str(llama)), shlex.quote(str(folder)))
    words = shlex.split(line)
    assert words[:4] == ["mso-hub", "quantize", "--recipe", f"{folder}/mso_hub.json"]
    again = tmp_path / "again"
    words[-1] = str(again)
    result = invoke(*words[1:])
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }


def test_imported_scales_are_asked_for_again(llama: Path, tmp_path: Path) -> None:
    """mso_hub.json has no activation scales, and says so."""
    amax = {f"model.layers.{n}.mlp.{leaf}_proj": 1.5 for n in range(6) for leaf in ("gate", "up", "down")}
    recipe = Recipe(rules=(Rule(Scheme("nvfp4", input_scale="imported")),), input_amax=amax)
    plan = convert(llama, tmp_path / "out", recipe)
    with pytest.raises(RecipeError, match="nvfp4 for mlp has static activation scales, which are not in it"):
        read_recipe(tmp_path / "out")
    result = invoke("plan", llama, "--recipe", tmp_path / "out", "--input_scale", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quantization_config"] == plan.config["quantization_config"]


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Settings of a later version, and values of other types."""
    for settings, message in (
        ({"scheme": "nvfp4", "later": 1}, "'later' is no setting of this version of mso_hub"),
        ({"scheme": 5}, "scheme is 5"),
        ({"rules": [{"targets": []}]}, "its recipe cannot be read"),
        ({"rules": [{"scheme": {"format": "nvfp5"}, "targets": ["x"]}]}, "format must be one of nvfp4, "),
        ({"targets": "all"}, "'all' is no list"),
    ):
        path = write(tmp_path, json.dumps({"recipe": settings}), "mso_hub.json")
        with pytest.raises(RecipeError, match=message):
            read_recipe(path)


def test_an_output_of_decompress_is_a_recipe_too(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "packed", Recipe())
    plan = convert(tmp_path / "packed", tmp_path / "dense", Recipe(scheme="bf16"))
    assert read_recipe(tmp_path / "dense") == plan.recipe


def test_every_format_can_stand_in_a_rule(tmp_path: Path) -> None:
    """And is listed where an unknown one is refused."""
    for name, entry in FORMATS.items():
        layout = next(iter(entry.choices.loaders))
        scale = "input_scale = 1.0" if name == "fp8" else ""
        text = f'layout = "{layout}"\n[[rules]]\nformat = "{name}"\nmode = "mlp"\n{scale}'
        assert read_recipe(write(tmp_path, text)).label == name


def test_moe_models_too(tmp_path: Path) -> None:
    """A whole bank of experts is one target."""
    source = tiny_moe(tmp_path / "in")
    rules = (Rule(Scheme("nvfp4"), ("*.experts",), layers=(-1,)), Rule(Scheme("fp8_dynamic")))
    plan = make_plan(source, Recipe(rules=rules))
    assert {m.split(".")[2]: n for m, n in quantized(plan).items()} == {"0": "fp8_dynamic", "1": "nvfp4"}
