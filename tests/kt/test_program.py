"""The command line, and Hub to Hub: the historic flags, the same bytes everywhere, a card that says how to serve it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mso_hub.cli import main
from mso_hub.plan.kt import KtRecipe
from tests.helpers import tensors_of, write_files
from tests.hubs import World, local_output, world
from tests.kt.helpers import Experts, converted, moe_files

EXPERTS = Experts(layers=2)


def call(*words: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in a folder."""
    return write_files(tmp_path / "in", moe_files(EXPERTS))


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "mso_hub.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def of(recipe: KtRecipe) -> dict[str, bytes]:
    """What a conversion in memory makes."""
    return {name: data for name, data in converted(moe_files(EXPERTS), recipe)[1].items() if name != "mso_hub.json"}


def test_the_historic_flags(source: Path, tmp_path: Path) -> None:
    """As scripts/convert_cpu_weights.py was called, on a machine without a GPU."""
    done = call(
        "kt", "convert", "--input-path", source, "--input-type", "bf16", "--output", tmp_path / "out",
        "--quant-method", "int4", "--cpuinfer-threads", 2, "--threadpool-count", 2, "--no-merge-safetensor", "--gpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "--gpu: nothing here needs one" in done.output
    assert content(tmp_path / "out") == of(KtRecipe(scheme="kt-int4", threadpool_count=2, merge=False))


def test_the_same_under_quantize(source: Path, tmp_path: Path) -> None:
    """--format kt-int8 is the same conversion; its defaults are one node and the rest of the model beside it."""
    done = call("quantize", "--input_dir", source, "--output_dir", tmp_path / "out", "--format", "kt-int8", "--quiet")
    assert done.exit_code == 0, done.output
    assert content(tmp_path / "out") == of(KtRecipe())
    done = call(
        "kt", "convert", "--input_path", source, "--output", tmp_path / "again", "--quant_method", "int8",
        "--threadpool_count", 1, "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_every_error_is_reported(source: Path, tmp_path: Path) -> None:
    """--report: each part of each expert, measured on every number."""
    report = tmp_path / "errors.json"
    words = ("--format", "kt-int8", "--threadpool_count", 2, "--report", report, "--quiet")
    done = call("quantize", "--input_dir", source, "--output_dir", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    weights = json.loads(report.read_text())["weights"]
    assert len(weights) == 2 * 2 * (2 + 2 + 1)
    assert all(w["squared_error"] > 0 and w["bytes"] < 1.1 * w["numbers"] for w in weights.values())


def test_an_output_is_a_recipe(source: Path, tmp_path: Path) -> None:
    """--recipe takes the settings of an earlier conversion."""
    first, second = tmp_path / "first", tmp_path / "second"
    words = ("--format", "kt-int4", "--threadpool_count", 2, "--experts_only", "--quiet")
    assert call("quantize", "--input_dir", source, "--output_dir", first, *words).exit_code == 0
    done = call("quantize", "--input_dir", source, "--output_dir", second, "--recipe", first, "--quiet")
    assert done.exit_code == 0, done.output
    assert content(first) == content(second)
    done = call("quantize", "--input_dir", source, "--output_dir", second, "--recipe", first, "--ignore", "lm_head")
    assert (done.exit_code, "is for kt-kernel and takes no ignore" in done.output) == (2, True)


def test_what_vllm_cannot_load_is_not_served_with_it(source: Path, tmp_path: Path) -> None:
    """serve-check is about vLLM."""
    assert call("kt", "convert", "--input-path", source, "--output", tmp_path / "out", "--quiet").exit_code == 0
    done = call("serve-check", tmp_path / "out", "--gpu", "H100")
    assert (done.exit_code, "KTransformers" in done.output) == (2, True), done.output


def test_later_layers_only(source: Path, tmp_path: Path) -> None:
    done = call("kt", "convert", "--input-path", source, "--output", tmp_path / "out", "--resume-layer", 1, "--quiet")
    assert done.exit_code == 0, done.output
    assert {name.split(".")[1] for name in tensors_of(tmp_path / "out") if "_exps." in name} == {"1"}


def test_verify_and_decompress(source: Path, tmp_path: Path) -> None:
    """The commands that follow."""
    out, back = tmp_path / "out", tmp_path / "back"
    assert call("kt", "convert", "--input-path", source, "--output", out, "--quiet").exit_code == 0
    done = call("verify", out, "--source", source)
    assert (done.exit_code, "no problems found" in done.output) == (0, True)
    assert call("decompress", "--input_dir", out, "--output_dir", back, "--quiet").exit_code == 0
    assert tensors_of(back).keys() == tensors_of(source).keys()
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "kt-int8", "--all_linear"), "--all_linear: kt-int8 takes the routed experts"),
        (("--format", "kt-int8", "--targets", "*up*"), "--targets: kt-int8 takes all routed experts"),
        (("--format", "kt-int8", "--group_size", "32"), "--group_size"),
        (("--format", "kt-int8", "--layout", "modelopt"), "always in the layout ktransformers"),
        (("--format", "kt-int8", "--ignore", "lm_head"), "ignore: kt-int8 takes all routed experts"),
        (("--threadpool_count", "2"), "--threadpool_count: is for --format kt-int4 and kt-int8"),
        (("--format", "nvfp4", "--experts_only"), "--experts_only: is for --format kt-int4 and kt-int8"),
        (("--format", "kt-int8", "--threadpool-count", "3"), "--threadpool-count may be 1, 2, 4"),
    ],
)
def test_options_that_mean_nothing_are_refused(source: Path, words: tuple[str, ...], said: str) -> None:
    done = call("plan", source, *words)
    assert (done.exit_code, said in done.output) == (2, True), done.output


def test_the_plan_is_shown(source: Path) -> None:
    done = call("plan", source, "--format", "kt-int4")
    assert done.exit_code == 0
    for words in ("-> kt-int4 (ktransformers)", "not a routed expert", "kt-int4 is coarse"):
        assert words in done.output


def test_threads_are_given_once(source: Path, tmp_path: Path) -> None:
    done = call(
        "kt", "convert", "--input-path", source, "--output", tmp_path / "out", "--workers", 1, "--cpuinfer-threads", 1
    )
    assert (done.exit_code, "are the same option" in done.output) == (2, True)


def test_a_consumers_python_needs_the_consumer(source: Path) -> None:
    done = call("verify", source, "--kt_python", "/bin/python")
    assert (done.exit_code, "is for --consumer kt" in done.output) == (2, True)


@pytest.fixture(scope="module", params=[False, True], ids=["lfs", "xet"])
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub on this machine."""
    with world(tmp_path_factory.mktemp("hub"), xet=request.param) as found:
        yield found


def test_hub_to_hub(hub: World, tmp_path: Path) -> None:
    """The files of a conversion from folder to folder, in one commit; the card serves it with SGLang."""
    files = moe_files(EXPERTS) | {"README.md": b"---\nlicense: mit\n---\n"}
    source, out = hub.put(files), hub.name()
    hub.convert(f"hf://{source}", f"hf://{out}", "--format", "kt-int4", "--threadpool_count", 2)
    assert hub.output(out) == local_output(files, tmp_path, KtRecipe(scheme="kt-int4", threadpool_count=2))
    card = hub.content(out, "README.md").decode()
    name = out.partition("/")[2]
    assert f"sglang.launch_server --model={source} --kt-weight-path=./{name} --kt-method=AMXINT4" in card
    assert "--format kt-int4 --threadpool_count 2" in card
    assert "vllm" not in card


def test_a_tree_on_the_hub(hub: World, tmp_path: Path) -> None:
    """Every tensor is a file of its own there too."""
    files = moe_files(Experts())
    source, out = hub.put(files), hub.name()
    hub.convert(f"hf://{source}", f"hf://{out}", "--format", "kt-int8", "--no_merge_safetensor")
    assert hub.output(out) == local_output(files, tmp_path, KtRecipe(merge=False))
