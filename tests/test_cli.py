"""The program: every verb, every option in both spellings, messages, exit codes, and what goes to which stream.

`python -m tests.test_cli accept` accepts the options as they are now into golden/cli_options.txt.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

import mso_hub
from mso_hub.cli import main
from mso_hub.formats import ALIASES, DENSE, FORMATS, READABLE
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Recipe
from mso_hub.plan.recipe import LAYOUTS
from tests.helpers import tensors_of, tiny_llama, tiny_moe, write_checkpoint, write_files

KT_OPTIONS = ("threadpool_count", "no_merge_safetensor", "experts_only", "resume_layer")
GOLDEN = Path(__file__).parent / "golden" / "cli_options.txt"
VERBS = (
    "quantize", "decompress", "extract", "extract-text", "inspect", "plan", "errors", "verify", "compare", "formats",
    "demo", "card", "calibrate", "evaluate", "devhub", "smoke", "setup-vllm", "serve-check", "kt",
)  # fmt: skip
PROGRAMS = Path(sys.executable).parent


def invoke(*arguments: object) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    """Run the program to a good end."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an installed program as a process."""
    words = [str(PROGRAMS / program), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(autouse=True)
def _this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has no vLLM, whatever the environment names."""
    monkeypatch.delenv("MSO_VLLM_PYTHON", raising=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert model in two shards."""
    return tiny_moe(tmp_path_factory.mktemp("cli") / "in")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, quantized."""
    folder = tmp_path_factory.mktemp("cli") / "packed"
    convert(source, folder, Recipe())
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a quantized model with twelve patterns, three of which match the source."""
    patterns = ["lm_head", "model.layers.0*", "*.mlp.gate", *(f"model.layers.{n}.nothing" for n in range(9))]
    content = {"quantization": {"exclude_modules": patterns}}
    return write_files(tmp_path_factory.mktemp("reference"), {"hf_quant_config.json": json.dumps(content).encode()})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of nothing but scales of a KV cache."""
    tensors = {
        f"model.layers.{n}.self_attn.{leaf}": torch.tensor([value])
        for n in (0, 1) for leaf, value in (("k_scale", 0.5), ("v_scale", 0.25))
    }  # fmt: skip
    return write_checkpoint(tmp_path_factory.mktemp("cache") / "kv", {"model.safetensors": tensors})


def parameters() -> Iterator[tuple[str, click.Parameter]]:
    """Every parameter of every command."""
    for verb, command in sorted(main.commands.items()):
        for parameter in command.params:
            yield verb, parameter


def options_text() -> str:
    """One line for each parameter, hidden ones marked."""
    lines = []
    for verb, parameter in parameters():
        forms = " ".join([*parameter.opts, *parameter.secondary_opts])
        if isinstance(parameter, click.Option):
            lines.append(f"{verb} {forms}{' (hidden)' if parameter.hidden else ''}")
        else:
            lines.append(f"{verb} {forms.upper()}")
    return "\n".join(lines) + "\n"


def test_options_are_frozen() -> None:
    """Adding or removing one is a decision: see the module docstring for how to accept it."""
    assert options_text() == GOLDEN.read_text()


def test_the_verbs_are_those_of_the_readme() -> None:
    """And no other."""
    assert sorted(main.commands) == sorted(VERBS)


def test_every_option_has_an_underscore_and_a_dash_form() -> None:
    """Old scripts use one, people type the other."""
    for verb, parameter in parameters():
        if isinstance(parameter, click.Option):
            forms = {*parameter.opts, *parameter.secondary_opts}
            for form in forms:
                stem = form.removeprefix("--")
                assert f"--{stem.replace('_', '-')}" in forms, (verb, form)
                assert f"--{stem.replace('-', '_')}" in forms, (verb, form)


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb: str) -> None:
    """All forms of each option and its text, the command's own sentence, nothing hidden."""
    shown = " ".join(succeed(verb, "--help").stdout.split())
    assert succeed(verb, "-h").stdout == succeed(verb, "--help").stdout
    command = main.commands[verb]
    assert command.help
    assert " ".join(command.help.split()) in shown
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for form in parameter.opts:
                assert (form in shown.split()) or (f"{form}," in shown.split()) != parameter.hidden, form
            assert parameter.hidden or parameter.help
            assert parameter.hidden or " ".join(str(parameter.help).split()) in shown, parameter.name


def test_help_lists_every_verb_with_its_sentence() -> None:
    """What `mso-hub` alone prints."""
    shown = succeed("--help").stdout
    for verb in VERBS:
        assert re.search(rf"^  {verb}  +\S", shown, re.MULTILINE), verb


def test_the_version_is_the_packages() -> None:
    """One number."""
    assert mso_hub.__version__ in succeed("--version").stdout


# ---------------------------------------------------------------------------------------------------------- verbs


def test_quantize_verify_compare_decompress(source: Path, tmp_path: Path) -> None:
    """The whole way by commands; each ends with what to do next or what it found."""
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    done = succeed("quantize", "--input_dir", source, "--output_dir", packed, "--all_linear")
    assert f"check it: mso-hub verify {packed} --source {source}" in done.stdout
    assert "32 weights" in done.stdout
    report = succeed("verify", packed, "--source", source).stdout
    assert "no problems found" in report
    assert "fused units with one shared scale: 10 of 10" in report
    done = succeed("decompress", "--input_dir", packed, "--output_dir", dense)
    assert "32 weights" in done.stdout
    assert {t.dtype for t in tensors_of(dense).values()} == {torch.bfloat16}
    assert "no problems found" in succeed("verify", dense, "--source", packed).stdout
    compared = succeed("compare", source, packed).stdout
    assert f"{len(tensors_of(source))} weights in both" in compared
    assert "NVFP4 scale" in compared


def test_verify_ends_with_two_when_something_is_wrong(packed: Path, source: Path, tmp_path: Path) -> None:
    """The report is on stdout, in both forms; a script sees the exit code."""
    damaged = tmp_path / "damaged"
    convert(source, damaged, Recipe())
    data = bytearray((damaged / "config.json").read_bytes())
    (damaged / "config.json").write_bytes(data + b" ")
    for flags in ((), ("--json",)):
        result = invoke("verify", damaged, *flags)
        assert result.exit_code == 2
        assert "config.json: had" in result.stdout
        assert result.stderr == ""
    assert invoke("verify", packed).exit_code == 0


def test_verify_takes_a_reference(packed: Path, source: Path, tmp_path: Path) -> None:
    """Another checkpoint, or ModelOpt, which does not search scales."""
    twin, theirs = tmp_path / "twin", tmp_path / "theirs"
    convert(source, twin, Recipe())
    assert f"byte for byte like {twin}:" in succeed("verify", packed, "--reference", twin).stdout
    convert(source, theirs, Recipe(scale_search="absmax"))
    shown = succeed("verify", theirs, "--source", source, "--reference", "modelopt").stdout
    assert "byte for byte like modelopt: 24 tensors" in shown


def test_inspect_shows_dtypes_shards_and_quantization(source: Path, packed: Path) -> None:
    """From headers, for a folder given either way."""
    shown = succeed("inspect", packed).stdout
    assert "Qwen3MoeForCausalLM" in shown
    assert "compressed-tensors nvfp4-pack-quantized" in shown
    assert "F8_E4M3" in shown
    assert "model-00002-of-00002.safetensors" in shown
    assert "none announced" in succeed("inspect", "--input_dir", source).stdout


@pytest.mark.parametrize("value", [None, 5, "Linear", ["x", 1], {"a": [1]}])
@pytest.mark.parametrize("field", ["architectures", "model_type", "quantization_config", "text_config"])
def test_inspect_survives_any_config(field: str, value: object, tmp_path: Path) -> None:
    """The first thing one does with a strange checkpoint; of two configs the quantization is shown as it is."""
    config = {field: value, "compression_config": {"quant_method": 5, "format": ["f"]}}
    folder = write_checkpoint(tmp_path / "in", {"model.safetensors": {"a.weight": torch.zeros(2, 2)}}, config)
    assert "5 ['f']" in succeed("inspect", folder).stdout


def test_plan_shows_what_changes_and_why_not(source: Path) -> None:
    """Kinds of modules with counts, reasons, units, sizes."""
    shown = succeed("plan", source).stdout
    assert re.search(r"model\.layers\.N\.mlp\.experts\.N\.up_proj +nvfp4 +8", shown)
    assert re.search(r"model\.layers\.N\.mlp\.gate +2 +router or gate", shown)
    assert re.search(r"model\.layers\.N\.self_attn\.q_proj +2 +outside the MLP", shown)
    assert re.search(r"experts\.N\.gate_up_proj +8 +gate_proj, up_proj", shown)
    assert re.search(r"size +\S+ KB -> \S+ KB \(\d+%\)", shown)
    assert "2 shards written" in shown


@pytest.mark.parametrize("verbose", [False, True])
def test_extract_prints_and_writes_patterns(verbose: bool, reference: Path, tmp_path: Path) -> None:
    """Ten of them, or all; the file has all, one a line."""
    flags = ["--verbose"] if verbose else []
    shown = succeed("extract", "--config", reference, "--output", tmp_path / "list.txt", *flags).stdout
    written = (tmp_path / "list.txt").read_text().splitlines()
    assert len(written) == 12
    assert shown.splitlines()[:10] == written[:10]
    assert ("and 2 more (--verbose shows all 12)" in shown) == (not verbose)
    assert (shown.splitlines() == written) == verbose


def test_extract_text_writes_the_language_model(tmp_path: Path) -> None:
    """Names and config flattened."""
    tensors = {
        "language_model.model.embed_tokens.weight": torch.zeros(8, 16),
        "language_model.model.layers.0.mlp.up_proj.weight": torch.zeros(16, 16),
        "vision_tower.x.weight": torch.zeros(4),
    }
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    vision = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    succeed("extract-text", "--input_dir", vision, "--output_dir", tmp_path / "text")
    assert set(tensors_of(tmp_path / "text")) == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}


def test_formats_lists_what_works() -> None:
    """Written and read: every name with what it can be asked for."""
    shown = succeed("formats").stdout
    for name in (*FORMATS, *ALIASES, DENSE, *READABLE, *LAYOUTS, "absmax four_over_six mse"):
        assert name in shown, name


# -------------------------------------------------------------------------------------------------------- options


INT4 = ["--format", "w4a16", "--group_size", "32"]
SCHEME_OPTIONS: dict[str, tuple[list[str], Recipe]] = {
    "format": (["fp8_dynamic"], Recipe(scheme="fp8_dynamic")),
    "layout": (["modelopt"], Recipe(layout="modelopt")),
    "mlp_only": ([], Recipe(mode="mlp")),
    "all_linear": ([], Recipe(mode="all-linear")),
    "targets": (["*.experts"], Recipe(targets=("*.experts",))),
    "ignore": (["model.layers.1"], Recipe(ignore=("model.layers.1",))),
    "exclude": (["re:.*layers.1.*"], Recipe(ignore=("re:.*layers.1.*",))),
    "no_default_ignore": ([], Recipe(default_ignore=False)),
    "skip_layers": (["0"], Recipe(skip_layers=("0",))),
    "activations": (["4"], Recipe(activations=4)),
    "group_size": (["32", "--format", "w4a16"], Recipe(scheme="w4a16", group_size=32)),
    "symmetric": (INT4, Recipe(scheme="w4a16", group_size=32, symmetric=True)),
    "asymmetric": (INT4, Recipe(scheme="w4a16", group_size=32, symmetric=False)),
    "input_scale": (["0.5"], Recipe(input_scale=0.5)),
    "scale_search": (["absmax"], Recipe(scale_search="absmax")),
    "kv_cache": (["fp8"], Recipe(kv_cache=True)),
    "block_size": (["16"], Recipe()),
}


@pytest.mark.parametrize("dashed", [False, True])
@pytest.mark.parametrize("name", SCHEME_OPTIONS)
def test_every_scheme_option_reaches_the_recipe(name: str, dashed: bool, source: Path) -> None:
    """The job digest of the command's plan is that of the recipe."""
    values, recipe = SCHEME_OPTIONS[name]
    form = f"--{name.replace('_', '-') if dashed else name}"
    planned = json.loads(succeed("plan", source, form, *values, "--json").stdout)
    assert planned["job"] == make_plan(source, recipe).job


def test_the_options_above_are_all_scheme_options(source: Path) -> None:
    """Those that read another checkpoint or a file are tested on their own, below and with recipes."""
    elsewhere = {"exclude_config", "kv_scales", "recipe", "like", "text_only", "source", "input_dir", "json"}
    elsewhere |= {"smoke", "tp", "vllm_python", "stats", "headroom", *KT_OPTIONS}
    assert {p.name for p in main.commands["plan"].params} - elsewhere == set(SCHEME_OPTIONS) - {"asymmetric"}


@pytest.mark.parametrize("form", ["--kv_scales", "--kv-scales"])
def test_scales_of_a_cache_reach_the_recipe(form: str, source: Path, cache: Path) -> None:
    """Read from another checkpoint, whatever its layout."""
    planned = json.loads(succeed("plan", source, "--kv_cache", "fp8", form, cache, "--json").stdout)
    attention = [f"model.layers.{n}.self_attn" for n in (0, 1)]
    recipe = Recipe(kv_cache=True, kv_scales=dict.fromkeys(attention, (0.5, 0.25)))
    assert planned["job"] == make_plan(source, recipe).job
    assert planned["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8


@pytest.mark.parametrize("form", ["--exclude_config", "--exclude-config"])
def test_exclude_config_reaches_the_recipe(form: str, source: Path, reference: Path) -> None:
    """What a reference model left dense stays dense."""
    planned = json.loads(succeed("plan", source, form, reference, "--json").stdout)
    assert not any(name.startswith("model.layers.0.") for name in planned["quantized"])
    assert any(name.startswith("model.layers.1.") for name in planned["quantized"])
    assert "model.layers.0.mlp.experts.0.up_proj" in planned["quantization_config"]["ignore"]


@pytest.mark.parametrize("form", ["--text_only", "--text-only"])
@pytest.mark.parametrize("verb", ["plan", "quantize", "decompress"])
def test_text_only_reaches_the_recipe(verb: str, form: str, tmp_path: Path) -> None:
    """For all verbs that write a checkpoint."""
    tensors = {
        "language_model.model.embed_tokens.weight": torch.zeros(8, 16),
        "language_model.model.layers.0.mlp.up_proj.weight": torch.zeros(16, 16),
        "vision_tower.x.weight": torch.zeros(4),
    }
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    vision = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    if verb == "plan":
        planned = json.loads(succeed("plan", vision, form, "--json").stdout)
        assert planned["dropped"] == ["vision_tower.x.weight"]
        return
    succeed(verb, "--input_dir", vision, "--output_dir", tmp_path / "out", form)
    assert all(name.startswith("model.") for name in tensors_of(tmp_path / "out"))


@pytest.mark.parametrize("first", [True, False])
def test_repeated_patterns_add_up(first: bool, source: Path) -> None:
    """--ignore and --exclude are one list."""
    forms = ("--ignore", "--exclude") if first else ("--exclude", "--ignore")
    planned = json.loads(
        succeed(
            "plan", source, forms[0], "*.experts.0*", forms[0], "*.experts.1*", forms[1], "*.experts.[23]*",
            "--all_linear", "--json",
        ).stdout
    )  # fmt: skip
    assert all(".self_attn." in name for name in planned["quantized"])


@pytest.mark.parametrize(
    ("value", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtype_of_decompressed_weights(value: str, dtype: torch.dtype, packed: Path, tmp_path: Path) -> None:
    """Packed weights only: what was dense keeps its dtype."""
    succeed("decompress", "--input_dir", packed, "--output_dir", tmp_path / "out", "--dtype", value)
    found = tensors_of(tmp_path / "out")
    assert found["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == dtype
    assert found["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("dashed", [False, True])
def test_run_options_do_not_show_in_the_bytes(dashed: bool, source: Path, packed: Path, tmp_path: Path) -> None:
    """Threads, budget, device: the same files as without them."""
    words = [
        "quantize", "--input_dir", str(source), "--output_dir", str(tmp_path / "out"), "--workers", "3",
        "--memory_budget", "1MiB", "--device", "cpu", "--num_gpus", "0", "--progress", "none", "--resume", "--fresh",
    ]  # fmt: skip
    succeed(*(word.replace("_", "-") if dashed and word.startswith("--") else word for word in words))
    for path in packed.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("form", ["--no_resume", "--no-resume", "--fresh"])
def test_starting_over_replaces_a_finished_output(form: str, source: Path, tmp_path: Path) -> None:
    """Other settings over it are refused without."""
    words = ("quantize", "--input_dir", source, "--output_dir", tmp_path / "out", "--quiet")
    succeed(*words)
    refused = invoke(*words, "--all_linear")
    assert refused.exit_code == 2
    assert "--fresh" in refused.stderr
    succeed(*words, "--all_linear", form)
    assert "model.layers.0.self_attn.q_proj.weight_packed" in tensors_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1MiB", 1 << 20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("3000000", 3_000_000), ("64mb", 64_000_000)],
)
def test_sizes_are_read_with_units(text: str, nbytes: int) -> None:
    """Decimal and binary."""
    from mso_hub.cli.options import read_size

    assert read_size(text) == nbytes


@pytest.mark.parametrize("program", ["mso-hub", "modelopt-streaming"])
def test_historic_command_lines_still_run(program: str, source: Path, reference: Path, tmp_path: Path) -> None:
    """The prototype's flags word for word, under both names of the program."""
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    lines: list[list[object]] = [
        ["quantize", "--input_dir", source, "--output_dir", packed, "--format", "nvfp4", "--mlp_only",
         "--exclude_config", reference / "hf_quant_config.json", "--block_size", 16, "--device", "cpu",
         "--num_gpus", 0, "--resume", "--quiet"],
        ["decompress", "--input_dir", packed, "--output_dir", dense, "--num_gpus", 0, "--fresh", "--quiet"],
        ["extract", "--config", reference / "hf_quant_config.json", "--output", tmp_path / "x.txt", "--verbose"],
    ]  # fmt: skip
    for line in lines:
        done = run(program, *line)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert bool(done.stdout) == (line[0] == "extract")
    assert "model.layers.1.mlp.experts.0.up_proj.weight_packed" in tensors_of(packed)
    assert len((tmp_path / "x.txt").read_text().splitlines()) == 12


def test_both_programs_are_one() -> None:
    """The same function under two names, and the same help."""
    scripts = {e.name: e.value for e in entry_points(group="console_scripts") if e.value.startswith("mso_hub")}
    assert scripts == {"mso-hub": "mso_hub.cli:main", "modelopt-streaming": "mso_hub.cli:main"}
    helps = [run(name, "--help").stdout.replace(name, "PROGRAM") for name in scripts]
    assert helps[0] == helps[1]


# -------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("command", ["inspect", "plan", "verify", "compare"])
def test_json_is_one_object_and_nothing_else(command: str, source: Path, packed: Path) -> None:
    """For machines; strict, so no NaN and no Infinity."""
    arguments: dict[str, list[object]] = {
        "inspect": [source], "plan": [source], "verify": [packed, "--source", source], "compare": [source, packed],
    }  # fmt: skip
    result = succeed(command, *arguments[command], "--json")

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    content = json.loads(result.stdout, parse_constant=refuse)
    assert isinstance(content, dict)
    assert result.stderr == ""
    expected = {"inspect": "dtypes", "plan": "quantized", "verify": "problems", "compare": "scales"}[command]
    assert expected in content


def test_plan_json_says_what_will_be_written(source: Path, tmp_path: Path) -> None:
    """Sizes to the byte, units, config."""
    planned = json.loads(succeed("plan", source, "--json").stdout)
    convert(source, tmp_path / "out", Recipe())
    for shard in planned["shards"]:
        assert (tmp_path / "out" / shard["name"]).stat().st_size == shard["nbytes"]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert planned["quantization_config"] == written["quantization_config"]
    assert planned["units"]["model.layers.0.mlp.experts.0.gate_up_proj"] == [
        "model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.0.up_proj",
    ]  # fmt: skip
    assert planned["kept"]["lm_head"] == "output head"


def test_damage_is_json_too(source: Path, tmp_path: Path) -> None:
    """An infinite error is no JSON number; it must not break a strict reader."""
    convert(source, tmp_path / "out", Recipe())
    from safetensors.torch import load_file, save_file

    path = tmp_path / "out" / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    result = invoke("verify", tmp_path / "out", "--source", source, "--json")
    assert result.exit_code == 2

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    content = json.loads(result.stdout, parse_constant=refuse)
    assert content["ok"] is False


def test_progress_as_json_lines(source: Path, tmp_path: Path) -> None:
    """One event a line on stdout, from the plan to the publication, and nothing on stderr."""
    done = run("mso-hub", "quantize", "--input_dir", source, "--output_dir", tmp_path / "out", "--progress", "json")
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "PlanReady"
    assert events[-1] == {
        "event": "Published", "where": str(tmp_path / "out"), "nbytes": events[-1]["nbytes"],
    }  # fmt: skip
    assert sum(e["nbytes"] for e in events if e["event"] == "TensorDone") == events[0]["read_bytes"]
    shards = {e["shard"]: e for e in events if e["event"] == "ShardDone"}
    assert len(shards) == events[0]["shards"] == 2
    manifest = json.loads((tmp_path / "out" / "mso_hub.json").read_text())
    assert {name: e["sha256"] for name, e in shards.items()} == {
        name: entry["sha256"] for name, entry in manifest["files"].items() if name in shards
    }


def test_the_bar_is_on_stderr_and_the_result_on_stdout(source: Path, tmp_path: Path) -> None:
    """Bytes, rate and shards while it runs; what to do next at the end."""
    done = run("mso-hub", "quantize", "--input_dir", source, "--output_dir", tmp_path / "out")
    assert done.returncode == 0
    assert re.search(r"100%\|.*B/s.*shard 2/2", done.stderr.replace("\r", "\n"), re.DOTALL)
    assert "check it: mso-hub verify" in done.stdout
    assert "100%" not in done.stdout


@pytest.mark.parametrize("flag", ["--quiet", "--progress=none"])
def test_silence_is_complete(flag: str, source: Path, tmp_path: Path) -> None:
    """Nothing on either stream when all goes well."""
    done = succeed("quantize", "--input_dir", source, "--output_dir", tmp_path / "out", flag)
    assert (done.stdout, done.stderr) == ("", "")


# --------------------------------------------------------------------------------------------------------- errors


REFUSED: dict[str, tuple[list[str], str]] = {
    "both modes": (["quantize", "IN", "OUT", "--mlp_only", "--all_linear"], "contradict each other; keep one"),
    "block size": (["quantize", "IN", "OUT", "--block_size", "32"], "block_size must be 16 for nvfp4, got 32"),
    "calibration without a tokenizer": (["quantize", "IN", "OUT", "--calibrate"], "needs tokenizer.json"),
    "calibration size": (["quantize", "IN", "OUT", "--calib_size", "8"], "--calib_size: is for a run that reads text"),
    "calibration text": (["quantize", "IN", "OUT", "--calib-dataset", "c4"], "add --calibrate, or --method NAME, or"),
    "a GPU that is not there": (["quantize", "IN", "OUT", "--device", "cuda:99"], "CUDA devices are here; leave it"),
    "several GPUs": (["decompress", "IN", "OUT", "--num-gpus", "8"], "num_gpus 8: this version computes on"),
    "a format that is none": (["quantize", "IN", "OUT", "--format", "int3"], "format must be one of nvfp4, mxfp4"),
    "a layout that is none": (["plan", "SOURCE", "--layout", "gguf"], "layout must be one of compressed-tensors, mod"),
    "a search that is none": (["plan", "SOURCE", "--scale_search", "best"], "must be mse or absmax or four_over_six"),
    "a negative scale": (["plan", "SOURCE", "--input_scale=-1"], "input_scale must be a finite number > 0"),
    "scales of nowhere": (["plan", "SOURCE", "--input_scale", "/nowhere"], "a checkpoint with such scales, found none"),
    "scales of a dense model": (["plan", "SOURCE", "--input_scale", "SOURCE"], "a checkpoint with such scales, found"),
    "cache scales of nowhere": (["plan", "SOURCE", "--kv_cache", "fp8", "--kv_scales", "/no"], "such scales, found no"),
    "cache scales without a cache": (["plan", "SOURCE", "--kv_scales", "KV"], "were given without kv_cache; add it"),
    "a group of NVFP4": (["plan", "SOURCE", "--group_size", "32"], "group_size: nvfp4 has no choice of it, got 32"),
    "asymmetric FP4": (["plan", "SOURCE", "--asymmetric"], "nvfp4 is always symmetric; leave --asymmetric out"),
    "W4A8 NVFP4": (["plan", "SOURCE", "--activations", "8"], "no runtime loads NVFP4 weights with FP8 activations"),
    "INT4 for ModelOpt": (["plan", "SOURCE", "--format", "w4a16", "--layout", "modelopt"], "no runtime loads integer"),
    "FP8 for ModelOpt without scales": (
        ["quantize", "IN", "OUT", "--format", "fp8", "--layout", "modelopt"],
        "add --input_scale, or take fp8_dynamic",
    ),
    "FP8 experts for ModelOpt": (
        ["quantize", "IN", "OUT", "--format", "fp8_dynamic", "--layout", "modelopt"],
        "use the layout compressed-tensors",
    ),
    "what nobody writes, whatever the flag": (
        ["plan", "SOURCE", "--format", "w4a16", "--layout", "modelopt", "--no_smoke"],
        "no runtime loads integer",
    ),
    "a vLLM of nowhere": (
        ["quantize", "IN", "OUT", "--smoke", "--vllm-python", "/nowhere"],
        "must be a Python that has vLLM, found nothing",
    ),
    "no vLLM": (["quantize", "IN", "OUT", "--smoke"], "has no vLLM; `mso-hub setup-vllm` makes an environment"),
    "no vLLM for a plan": (["plan", "SOURCE", "--smoke", "--tp", "1"], "has no vLLM; `mso-hub setup-vllm` makes"),
    "no vLLM for a proof": (["smoke", "SOURCE"], "has no vLLM; `mso-hub setup-vllm` makes"),
    "no vLLM to generate": (["smoke", "PACKED", "--generate"], "has no vLLM; `mso-hub setup-vllm` makes"),
    "sizes without a proof": (["plan", "SOURCE", "--tp", "2"], "--tp 2: is for --smoke; add it, or leave this out"),
    "a vLLM without a proof": (["plan", "SOURCE", "--vllm_python", "x"], "--vllm_python x: is for --smoke; add it"),
    "a size that is no number": (["smoke", "SOURCE", "--tp", "1,two"], "--tp 1,two: needs different whole numbers > 0"),
    "a size of nothing": (["verify", "PACKED", "--tp", "0"], "--tp 0: needs different whole numbers > 0"),
    "an empty size": (["plan", "SOURCE", "--smoke", "--tp", "1,,2"], "--tp 1,,2: needs different whole numbers > 0"),
    "a size twice": (["smoke", "SOURCE", "--tp", "2,2"], "--tp 2,2: needs different whole numbers > 0"),
    "more stages than layers": (
        ["smoke", "SOURCE", "--pp", "3"],
        "pp must be at most 2, a layer for each stage, got 3",
    ),
    "no stage": (["smoke", "SOURCE", "--pp", "0"], "pp must be a number of pipeline stages > 0, got 0"),
    "more layers than there are": (
        ["smoke", "SOURCE", "--layers", "3"],
        "layers must be at most 2, the decoder layers",
    ),
    "a proof of nowhere": (["smoke", "/nowhere"], "found nothing there"),
    "a prompt for a proof": (["smoke", "SOURCE", "--prompt", "x"], "--prompt: is for --generate; add it"),
    "sizes for generating": (["smoke", "SOURCE", "--generate", "--tp", "2"], "--real_tp is its size"),
    "a prompt without a tokenizer": (
        ["smoke", "SOURCE", "--generate", "--prompt", "x"],
        "needs a tokenizer, there is no",
    ),
    "generating from a repo": (["smoke", "hf://org/name", "--generate"], "generating needs the weights in a folder"),
    "no token": (["smoke", "SOURCE", "--generate", "--max_tokens", "0"], "max_tokens and tp must be at least 1"),
    "a gap below nothing": (["smoke", "SOURCE", "--generate", "--max_nll_gap=-1"], "max_nll_gap at least 0, got"),
    "groups that do not fit": (["plan", "SOURCE", "--format", "w4a16"], "choose another --group_size"),
    "a size that is none": (["quantize", "IN", "OUT", "--memory_budget", "many"], "needs a size like 512MiB or 2GB"),
    "an infinite size": (["quantize", "IN", "OUT", "--memory_budget", "inf"], "needs a size like 512MiB or 2GB"),
    "a huge size": (["quantize", "IN", "OUT", "--memory_budget", "1e999GB"], "needs a size like 512MiB or 2GB"),
    "a small size": (["quantize", "IN", "OUT", "--memory_budget", "1KB"], "must be at least 1MiB, got '1KB'"),
    "an ignore without a match": (["plan", "SOURCE", "--ignore", "typo*"], "ignore 'typo*' matches no weight"),
    "a target without a match": (["plan", "SOURCE", "--targets", "re:typo"], "targets 're:typo' matches no weight"),
    "a broken pattern": (["plan", "SOURCE", "--targets", "re:("], "'re:(' is not a regular expression"),
    "half a unit": (["plan", "SOURCE", "--ignore", "*.up_proj"], "so all must be stored alike"),
    "an exclude config of nowhere": (["plan", "SOURCE", "--exclude_config", "/nowhere"], "needs a quantization config"),
    "patterns of nowhere": (["extract", "--config", "/nowhere"], "needs a quantization config"),
    "patterns of a dense model": (["extract", "--config", "SOURCE"], "has none of the lists"),
    "patterns into nowhere": (["extract", "--config", "REFERENCE", "--output", "/nowhere/x"], "/nowhere/x"),
    "an input of nowhere": (["quantize", "--input_dir", "/nowhere", "OUT"], "found nothing there"),
    "a file as input": (["inspect", "SOURCE/config.json"], "must be a folder with safetensors files, found a file"),
    "no weights": (["inspect", "REFERENCE"], "needs at least one .safetensors file"),
    "output inside input": (["quantize", "IN", "--output_dir", "SOURCE/out"], "input and output must be separate"),
    "output as input": (["quantize", "IN", "--output_dir", "SOURCE"], "input and output must be separate"),
    "an output of others": (["quantize", "IN", "--output_dir", "REFERENCE"], "must be a new or empty folder"),
    "nothing to decompress": (["decompress", "IN", "OUT"], "every weight is dense already"),
    "text of a text model": (["extract-text", "IN", "OUT"], "so it is text-only already or of an unknown kind"),
    "two sources": (["inspect", "SOURCE", "--input_dir", "SOURCE"], "give the source once"),
    "no source": (["plan"], "give the source once, as an argument or as --input_dir"),
    "verify of nowhere": (["verify", "/nowhere"], "found nothing there"),
    "modelopt without a source": (["verify", "PACKED", "--reference", "modelopt"], "give --source too"),
    "comparison with nowhere": (["compare", "SOURCE", "/nowhere"], "found nothing there"),
    "a demo of nowhere": (["demo", "--source", "/nowhere", "OUT"], "pass --source DIR"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_are_one_message_and_exit_code_two(
    kind: str, source: Path, packed: Path, reference: Path, cache: Path, tmp_path: Path
) -> None:
    """On stderr, named, with a way out; nothing on stdout, no traceback, nothing written."""
    words, message = REFUSED[kind]
    places = {"SOURCE": str(source), "PACKED": str(packed), "REFERENCE": str(reference), "KV": str(cache)}
    arguments: list[str] = []
    for word in words:
        if word in ("IN", "OUT"):
            flag, where = ("--input_dir", source) if word == "IN" else ("--output_dir", tmp_path / "out")
            arguments += [flag, str(where)]
        else:
            first, slash, rest = word.partition("/")
            arguments.append(places.get(first, first) + slash + rest)
    before = sorted(path for folder in (source, reference) for path in folder.rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("mso-hub: ")
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "out").exists()
    assert sorted(path for folder in (source, reference) for path in folder.rglob("*")) == before


@pytest.mark.parametrize("form", ["--no_smoke", "--no-smoke"])
def test_what_vllm_does_not_load_is_written_when_told(form: str, source: Path, tmp_path: Path) -> None:
    """The note says so, and the command that makes it again has the flag."""
    words = ("--input_dir", source, "--output_dir", tmp_path / "out", "--format", "fp8_dynamic", "--layout", "modelopt")
    assert invoke("quantize", *words).exit_code == 2
    done = succeed("quantize", *words, form, "--progress", "bar")
    assert (
        "note: vLLM does not load this: model.layers.0.mlp.experts: no engine loads fp8_dynamic experts" in done.stdout
    )
    assert tensors_of(tmp_path / "out")["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn
    again = succeed("plan", source, "--recipe", tmp_path / "out", "--json")
    assert json.loads(again.stdout)["job"] == json.loads((tmp_path / "out" / "mso_hub.json").read_text())["job"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize"], "Missing option"),
        (["quantize", "--nonsense"], "No such option"),
        (["nonsense"], "No such command"),
        (["quantize", "--workers", "0"], "0 is not in the range"),
        (["quantize", "--progress", "film"], "'film' is not one of"),
        (["decompress", "--dtype", "int8"], "'int8' is not one of"),
        (["verify"], "Missing argument"),
        (["compare", "a"], "Missing argument"),
        (["extract"], "Missing option '--config'"),
    ],
)
def test_wrong_usage_is_exit_code_two(arguments: list[str], message: str) -> None:
    """Click's own messages, on stderr."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_no_traceback_reaches_the_user(source: Path, tmp_path: Path) -> None:
    """A real process over a truncated shard: one line, exit code 2, the input untouched, nothing published."""
    broken = tiny_llama(tmp_path / "in", layers=1)
    shard = broken / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    before = shard.read_bytes()
    done = run("mso-hub", "quantize", "--input_dir", broken, "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("mso-hub: model-00002-of-00002.safetensors: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert shard.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_module_runs_like_the_program(source: Path) -> None:
    """`python -m mso_hub.cli`, for environments without scripts on the path."""
    words = [sys.executable, "-m", "mso_hub.cli", "inspect", str(source), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["model_type"] == "qwen3_moe"


if __name__ == "__main__" and sys.argv[1:] == ["accept"]:
    GOLDEN.write_text(options_text())
