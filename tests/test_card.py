"""Cards of conversions: what they say, what of the source's card they carry on, and that no interruption shows."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants

from mso_hub import Recipe, convert, open_sink, verify_checkpoint
from mso_hub.card import CARD, constant_scale, repo_of, target_of
from mso_hub.cli import main
from mso_hub.engine import ThreadEngine, note_errors, noted_errors
from mso_hub.events import Event, ShardDone
from mso_hub.formats import Scheme
from mso_hub.hub.lookup import read_small
from mso_hub.pipeline import make_plan
from mso_hub.plan import Rule
from mso_hub.plan.summary import Stored, by_reason, command, main_dtype, size
from mso_hub.sink import HubTarget, LocalSink, MemorySink
from mso_hub.source import MemorySource, open_source
from tests.helpers import checkpoint_files, random_tensor, tiny_llama, tiny_moe, write_checkpoint
from tests.hub.cards import metadata, validate
from tests.hub.serving import Served, serving

HEAD = b"""---
license: other
license_name: tiny-licence
license_link: LICENSE.txt
language: [en, no]
pipeline_tag: text-generation
library_name: Model Optimizer
base_model: somebody/grandparent
base_model_relation: finetune
inference: {parameters: {temperature: 0.7}}
model-index: [{name: x, results: []}]
tags: [conversational, FP8, w8a8, 4-bit, bf16, custom tag]
---
# The original

---
Text of the source
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A Hub that everything in this process takes for the one."""
    folder = tmp_path_factory.mktemp("card")
    with serving(folder, xet=False) as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", served.hub.endpoint)
        patch.setenv("HF_TOKEN", served.hub.token())
        patch.setenv("MSO_HUB_CACHE", str(folder / "cache"))
        yield served


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert model in three shards with a card and a licence."""
    folder = tiny_moe(tmp_path_factory.mktemp("source") / "in", shards=3)
    (folder / CARD).write_bytes(HEAD)
    (folder / "LICENSE.txt").write_text("Do what you like.\n")
    return folder


def card_of(source: Path | str, recipe: Recipe, name: str = "hf://org/out", **more: Any) -> str:
    """README.md of a conversion into memory."""
    sink = MemorySink(name)
    convert(source, sink, recipe, card=True, **more)
    return sink.files[CARD].decode()


def readme(served: Served, repo: str, revision: str = "main") -> str:
    """README.md of a repo."""
    content = read_small(served.client(), repo, CARD, quote(revision, safe=""))
    assert content is not None
    return content.decode()


def facts(text: str) -> dict[str, str]:
    """First table of a card."""
    return dict(re.findall(r"^\| ([A-Z][\w ]+) \| (.+) \|$", text, re.MULTILINE))


def serve_line(text: str) -> str:
    """What to type."""
    return re.findall(r"^vllm serve .*$", text, re.MULTILINE)[0]


def kinds(text: str) -> dict[str, list[str]]:
    """Second table of a card: module -> cells."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `model")]
    return {row[0].strip("`"): row[1:] for row in rows}


# ----------------------------------------------------------------------------------------------------- what it says


def test_what_a_card_of_a_repo_says(served: Served, source: Path) -> None:
    """Everything that a reader needs, from the source's repo and from the run; nothing from its text."""
    repo = served.put(source)
    commit = served.client().api.model_info(repo).sha
    content = card_of(f"hf://{repo}", Recipe())
    link = f"{served.hub.endpoint}/{repo}/blob/{commit}/LICENSE.txt"
    assert metadata(content) == {
        "license": "other", "license_name": "tiny-licence", "license_link": link, "language": ["en", "no"],
        "pipeline_tag": "text-generation", "library_name": "transformers", "base_model": repo,
        "base_model_relation": "quantized",
        "tags": ["conversational", "custom tag", "nvfp4", "w4a16", "compressed-tensors", "4-bit", "vllm", "mso_hub"],
    }  # fmt: skip
    said = facts(content)
    assert said["Source"] == f"[{repo}]({served.hub.endpoint}/{repo}) at commit `{commit}`"
    assert (said["Scheme"], said["Layout"]) == ("NVFP4, W4A16", "compressed-tensors")
    assert re.fullmatch(r"mso_hub \d+\.\d+\.\d+", said["Made with"])
    assert re.fullmatch(r"[\d.]+ KB -> [\d.]+ KB \(\d+%\)", said["Size"])
    assert "Activation scale" not in said
    assert serve_line(content) == "vllm serve org/out"
    assert "measured while converting, on the first rows of every weight (up to 262,144 numbers)" in content
    assert "Text of the source" not in content
    assert "temperature" not in content
    assert str(source) not in content


COMMANDS: dict[str, tuple[Recipe, str]] = {
    "default": (Recipe(), "quantize"),
    "all": (
        Recipe(mode="all-linear", layout="modelopt", scale_search="mse", input_scale=0.5),
        "quantize --layout modelopt --all_linear --input_scale 0.5 --scale_search mse",
    ),
    "patterns": (
        Recipe(targets=("re:.*(up|down)_proj", "*.k_proj"), ignore=("lm_head", "it's"), default_ignore=False),
        (
            "quantize --targets 're:.*(up|down)_proj' --targets '*.k_proj' --ignore lm_head "
            "--ignore 'it'\"'\"'s' --no_default_ignore"
        ),
    ),
    "text": (Recipe(text_only=True), "quantize --text_only"),
    "decompress": (Recipe(scheme="bf16"), "decompress"),
    "half": (Recipe(scheme="bf16", dtype="F16", text_only=True), "decompress --dtype fp16 --text_only"),
    "extract": (Recipe(scheme="bf16", text_only=True), "extract-text"),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_line_of_a_recipe(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the default is left out, and the program reads the line back as the same recipe."""
    recipe, words = COMMANDS[kind]
    line = command(recipe, "FOLDER", "./out")
    assert line == f"mso-hub {words} --input_dir FOLDER --output_dir ./out"
    read: list[Recipe] = []
    monkeypatch.setattr("mso_hub.cli.execute", lambda options, recipe: read.append(recipe))
    assert CliRunner().invoke(main, shlex.split(line)[1:]).exit_code == 0
    assert read == [recipe]


def test_the_command_is_in_the_card(served: Served, source: Path) -> None:
    """A repo with its commit, a folder without its path, a branch; what was imported is said beside it."""
    repo = served.put(source)
    commit = served.client().api.model_info(repo).sha
    said = facts(card_of(f"hf://{repo}", Recipe(mode="all-linear"), "hf://org/out@w4%2Fa16"))
    assert said["Command"] == (
        f"`mso-hub quantize --all_linear --input_dir hf://{repo}@{commit} --output_dir hf://org/out@w4%2Fa16`"
    )
    amax = {f"model.layers.{n}.mlp.experts.{e}.{p}_proj": 1344.0
            for n in range(2) for e in range(4) for p in ("gate", "up", "down")}  # fmt: skip
    calibrated = Recipe(input_scale="imported", input_amax=amax, imported_ignore=("lm_head",))
    said = facts(card_of(source, calibrated, "/x/out"))
    assert said["Command"] == (
        "`mso-hub quantize --input_dir FOLDER --output_dir ./out` "
        "(with imported activation scales and an imported exclude list)"
    )
    assert facts(card_of(source, Recipe(dtype="F16")))["Command"].endswith("(with dtype F16)")
    piped = card_of(source, Recipe(ignore=("re:.*mlp.(gate|x)",)))
    assert "--ignore 're:.*mlp.(gate\\|x)' --input_dir" in piped


def test_the_size_is_that_of_the_plan(source: Path) -> None:
    """The same two numbers as in the plan and in the last line of a run."""
    plan = make_plan(source, Recipe())
    share = f"{plan.write_bytes / plan.read_bytes:.0%}"
    said = facts(card_of(source, Recipe()))["Size"]
    assert said == f"{size(plan.read_bytes)} -> {size(plan.write_bytes)} ({share})"


def test_sizes_and_errors_are_those_of_verify(source: Path, tmp_path: Path) -> None:
    """Small weights are measured whole: mean and worst of each kind are what verify finds."""
    convert(source, tmp_path / "out", Recipe(), card=True)
    found = kinds((tmp_path / "out" / CARD).read_text())
    report = verify_checkpoint(tmp_path / "out", source=source)
    assert report.ok, report.problems
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        errors = [e.nmse for e in report.errors if e.name.endswith(f"{leaf}.weight")]
        row = found[f"model.layers.N.mlp.experts.N.{leaf}"]
        assert row == ["nvfp4", "8", "32.8 KB", "9.2 KB", *(f"{100 * v:.4f} %" for v in (sum(errors) / 8, max(errors)))]
    assert len(found) == 3


def test_what_stays_and_why(source: Path) -> None:
    """By reason, most modules first; hints for who converts are left out, patterns cannot break the table."""
    text = card_of(source, Recipe(ignore=("re:.*layers\\.1\\.mlp\\.(experts|x).*",)))
    table = text.partition("Not quantized:")[2]
    assert "| outside the MLP | 8 | `model.layers.N.self_attn.k_proj`," in table
    assert "| router or gate | 1 | `model.layers.N.mlp.gate` |" in table or "| router or gate | 2 |" in table
    assert "| output head | 1 | `lm_head` |" in table
    assert "(experts\\|x\\)" in table
    assert "--all_linear" not in text
    many = by_reason({f"m{i}": f"ignore p{i % 3}" for i in range(7)})
    assert [(kept.reason, kept.count) for kept in many] == [("ignore p0", 3), ("ignore p1", 2), ("ignore p2", 2)]


def test_many_reasons_are_cut_short(source: Path) -> None:
    """A list of a hundred patterns is not for a card."""
    ignore = tuple(f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkvo")
    table = card_of(source, Recipe(mode="all-linear", ignore=ignore)).partition("Not quantized:")[2]
    assert re.search(r"^\| \d+ other reasons \| \d+ \|  \|$", table, re.MULTILINE)
    assert table.count("\n|") == 2 + 8 + 1


@pytest.mark.parametrize(
    ("recipe", "scheme", "scale"),
    [
        (Recipe(), "NVFP4, W4A16", None),
        (Recipe(layout="modelopt"), "NVFP4, W4A16", None),
        (Recipe(input_scale=1.0), "NVFP4, W4A4", "uncalibrated: the constant 1 for every module"),
        (Recipe(input_scale=1 / 3), "NVFP4, W4A4", "uncalibrated: the constant 0.333333 for every module"),
    ],
)
def test_schemes(recipe: Recipe, scheme: str, scale: str | None, source: Path) -> None:
    """In the table and in the tags; a constant is no calibration."""
    text = card_of(source, recipe)
    said = facts(text)
    assert (said["Scheme"], said["Layout"], said.get("Activation scale")) == (scheme, recipe.layout, scale)
    tags = metadata(text)["tags"]
    assert {"nvfp4", scheme[-5:].strip(", ").lower(), recipe.layout, "4-bit", "vllm"} <= set(tags)
    assert {"modelopt", "compressed-tensors"} - {recipe.layout} - set(tags)


def test_imported_activation_scales(source: Path) -> None:
    """They come from somewhere, and the card does not claim to know how good they are."""
    experts = [f"model.layers.{n}.mlp.experts.{e}" for n in range(2) for e in range(4)]
    amax = {f"{e}.{p}_proj": 1344.0 for e in experts for p in ("gate", "up", "down")}
    said = facts(card_of(source, Recipe(input_scale="imported", input_amax=amax)))
    assert said["Activation scale"] == "imported from another checkpoint, one for each module"
    assert said["Scheme"] == "NVFP4, W4A4"


def test_a_mixture_of_formats(source: Path, tmp_path: Path) -> None:
    """Every format with its bits, and errors for each kind of module in each of its formats."""
    rules = (
        Rule(Scheme("fp8_dynamic"), ("re:.*self_attn",)),
        Rule(Scheme("nvfp4", activations=4), ("model.layers.0",)),
        Rule(Scheme("w4a16", group_size=32)),
    )
    convert(source, tmp_path / "out", Recipe(rules=rules), card=True)
    text = (tmp_path / "out" / CARD).read_text()
    scheme = facts(text)["Scheme"].split("; ")
    assert sorted(part.rpartition(", ")[2] for part in scheme) == ["W4A16", "W4A4", "W8A8"]
    assert {"w8a8", "w4a4", "w4a16", "8-bit", "4-bit"} <= set(metadata(text)["tags"])
    found = re.findall(r"^\| `(model\S+)` \| (\w+) \| (\d+) \|.* \| ([\d.]+) % \| ([\d.]+) % \|$", text, re.MULTILINE)
    errors = {(kind, stored): (int(count), float(mean), float(worst)) for kind, stored, count, mean, worst in found}
    report = verify_checkpoint(tmp_path / "out", source=source)
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for layer, stored in enumerate(("nvfp4", "w4a16")):
            inside = re.compile(rf"model\.layers\.{layer}\.mlp\.experts\.\d\.{leaf}\.weight")
            seen = [100 * e.nmse for e in report.errors if inside.fullmatch(e.name)]
            count, *said = errors.pop((f"model.layers.N.mlp.experts.N.{leaf}", stored))
            assert count == 4
            assert said == pytest.approx([sum(seen) / 4, max(seen)], abs=1e-4)
    assert {(stored, count) for (_, stored), (count, *_) in errors.items()} == {("fp8_dynamic", 2)}
    assert len(errors) == 4


def test_a_folder_as_source(source: Path) -> None:
    """Neither config.json nor the source's own base model tell what it is; the user does."""
    data = metadata(card_of(source, Recipe()))
    assert not {"base_model", "base_model_relation", "license_link"} & set(data) - {"license_link"}
    assert data["license_link"] == "LICENSE.txt"
    for given in ("org/base", "hf://org/base@main", "https://huggingface.co/org/base"):
        text = card_of(source, Recipe(), base_model=given)
        data = metadata(text)
        assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
        assert data["license_link"] == f"{constants.ENDPOINT}/org/base/blob/main/LICENSE.txt"
        assert facts(text)["Source"] == "a folder"


def test_a_base_model_beside_a_repo_as_source(served: Served, source: Path) -> None:
    """The commit belongs to the repo that was read, whatever the base model is said to be."""
    repo = served.put(source)
    text = card_of(f"hf://{repo}", Recipe(), base_model="org/base")
    assert metadata(text)["base_model"] == "org/base"
    assert facts(text)["Source"].startswith(f"[{repo}]")


def test_the_licence_file_is_named_where_it_is(source: Path, tmp_path: Path) -> None:
    """The Hub knows LICENSE in the repo itself."""
    folder = tiny_llama(tmp_path / "in", layers=1)
    (folder / CARD).write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    (folder / "LICENSE").write_text("x")
    assert metadata(card_of(folder, Recipe(), base_model="a/b"))["license_link"] == "LICENSE"


# ---------------------------------------------------------------------------------------------------- dense outputs


@pytest.mark.parametrize(("dtype", "label"), [("BF16", "BF16"), ("F16", "FP16"), ("F32", "FP32")])
def test_a_decoded_output(dtype: str, label: str, source: Path, tmp_path: Path) -> None:
    """No relation is claimed: it is no quantization, and nothing was trained; no tag of the packed source stays."""
    kept = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    folder = tiny_llama(tmp_path / "in", layers=1, dtype=kept)
    convert(folder, tmp_path / "packed", Recipe(), card=True)
    text = card_of(tmp_path / "packed", Recipe(scheme="bf16", dtype=dtype), base_model="org/packed")
    data = metadata(text)
    assert data["base_model"] == "org/packed"
    assert "base_model_relation" not in data
    assert data["tags"] == ["vllm", label.lower(), "mso_hub"]
    assert facts(text)["Scheme"] == label
    assert "Layout" not in facts(text)
    assert serve_line(text) == "vllm serve org/out"
    assert "The source was quantized (NVFP4): what that lost is not restored here." in text
    assert "The source was quantized" not in card_of(folder, Recipe())
    assert kinds(text)["model.layers.N.mlp.up_proj"][0] == label
    assert "Not quantized" not in text
    assert "error" not in text


def test_a_language_model_alone(tmp_path: Path) -> None:
    """Tasks and tags that need eyes go."""
    tensors = {
        "language_model.model.embed_tokens.weight": random_tensor(8, 16),
        "language_model.model.layers.0.mlp.up_proj.weight": random_tensor(16, 16),
        "vision_tower.x.weight": random_tensor(4),
    }
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    folder = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    (folder / CARD).write_text("---\npipeline_tag: image-text-to-text\ntags: [Multimodal, chat, vision]\n---\n")
    text = card_of(folder, Recipe(scheme="bf16", text_only=True), base_model="org/seeing")
    data = metadata(text)
    assert (data["pipeline_tag"], data["tags"]) == ("text-generation", ["chat", "bf16", "mso_hub"])
    assert "The language model of [org/seeing]" in text
    assert "base_model_relation" not in data
    assert "Every tensor has the bytes of the source." in text


def test_packed_weights_that_are_decoded_beside_others_that_are_quantized(tmp_path: Path) -> None:
    """One kind of module in two forms: errors stand beside what was quantized, into another layout here."""
    folder = tiny_llama(tmp_path / "in")
    convert(folder, tmp_path / "packed", Recipe())
    text = card_of(tmp_path / "packed", Recipe(layout="modelopt", ignore=("model.layers.1",)))
    rows = re.findall(r"^\| `model\.layers\.N\.mlp\.up_proj` \| (\w+) \| 1 \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["BF16", "nvfp4"]
    assert rows[0][1] == ""
    assert rows[1][1].endswith(" %")


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hf://org/out", "vllm serve org/out"),
        ("hf://org/out@main", "vllm serve org/out"),
        ("hf://org/out@refs/pr/3", "vllm serve org/out"),
        ("hf://org/out@dev", "vllm serve org/out --revision dev"),
        ("hf://org/out@feature%2Fx", "vllm serve org/out --revision feature/x"),
        ("/somewhere/on/this/disk/out", "vllm serve ./out"),
        ("/somewhere/my 'model'", "vllm serve './my '\"'\"'model'\"'\"''"),
    ],
)
def test_the_serve_line(name: str, line: str) -> None:
    """A revision only where readers need one; a folder by its name alone."""
    text = card_of_small(name)
    assert serve_line(text) == line
    assert "/somewhere" not in text


def card_of_small(name: str, config: dict[str, Any] | None = None) -> str:
    """README.md of one quantized matrix under some name."""
    tensors = {"model.layers.0.mlp.up_proj.weight": random_tensor(32, 32)}
    files = checkpoint_files({"model.safetensors": tensors}, {"model_type": "llama"} | (config or {}))
    sink = MemorySink(name)
    convert(MemorySource(files), sink, Recipe(), card=True)
    return sink.files[CARD].decode()


def test_remote_code_is_trusted_only_where_it_is_needed() -> None:
    """config.json says so."""
    text = card_of_small("hf://org/out@dev", {"auto_map": {"AutoModel": "modeling.X"}})
    assert serve_line(text) == "vllm serve org/out --revision dev --trust-remote-code"


@pytest.mark.parametrize("name", ["/x/a: b #c", "/x/*bold*", "/x/```", "/x/[a](b)", "/x/<script>", "/x/a\nb", "/x/---"])
def test_names_that_mean_something_to_yaml_or_markdown(name: str) -> None:
    """They are shown as they are."""
    text = card_of_small(name)
    assert metadata(text)["tags"][-1] == "mso_hub"
    assert text.count("\n---\n") == 1
    assert text.count("\n# ") == 1
    assert "<script>" not in text.replace("'./<script>'", "")


def test_modules_that_mean_something_to_markdown() -> None:
    """A bar in the name of a tensor is no column."""
    tensors = {"model.a|b`c.mlp.up_proj.weight": random_tensor(32, 32)}
    files = checkpoint_files({"model.safetensors": tensors}, {"model_type": "llama"})
    sink = MemorySink("hf://org/out")
    convert(MemorySource(files), sink, Recipe(), card=True)
    assert "| `` model.a\\|b`c.mlp.up_proj `` | nvfp4 | 1 |" in sink.files[CARD].decode()


@pytest.mark.parametrize("name", ["a/b", "hf://a/b", "hf://a/b@dev", "https://huggingface.co/a/b/tree/dev", "a/b@dev"])
def test_a_base_model_in_any_spelling(name: str) -> None:
    assert repo_of(name) == "a/b"


def test_small_words() -> None:
    """What tables are made of."""
    assert target_of("hf://a/b@v1") == ("a/b", "v1")
    assert Stored("int8", 8, 16, "compressed-tensors").label == "INT8 (W8A16, compressed-tensors)"
    assert main_dtype([]) == "BF16"
    assert main_dtype([("F32", 8), ("BF16", 4), ("I64", 99)]) == "F32"
    assert constant_scale(1e-5) == "uncalibrated: the constant 1e-05 for every module"


# ---------------------------------------------------------------------------------------------------- interruptions


class Killed(BaseException):
    """The process ends here."""


def kill_after(shards: int) -> Any:
    """Listener that ends the run when so many shards are stored."""
    done = []

    def listen(event: Event) -> None:
        if isinstance(event, ShardDone):
            done.append(event)
            if len(done) == shards:
                raise Killed

    return listen


class Dying(LocalSink):
    """A folder whose process ends at the very moment in which some shard counts as done."""

    def __init__(self, path: Path, shards: int) -> None:
        super().__init__(path)
        self._left = shards

    @contextmanager
    def open(self, file: str, nbytes: int) -> Iterator[Any]:
        """As ever, until then."""
        with super().open(file, nbytes) as writer:
            yield writer
        self._left -= 1
        if self._left == 0:
            raise Killed


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 4])
def test_the_card_of_a_resumed_run_in_a_folder(shards: int, workers: int, source: Path, tmp_path: Path) -> None:
    """Killed after each shard in turn: byte for byte the card of an uninterrupted run."""
    engine = ThreadEngine(workers, 1 << 20)
    convert(source, tmp_path / "whole" / "out", Recipe(), engine=engine, card=True)
    with pytest.raises(Killed):
        convert(source, Dying(tmp_path / "cut" / "out", shards), Recipe(), engine=engine, card=True)
    assert not (tmp_path / "cut" / "out").exists()
    convert(source, LocalSink(tmp_path / "cut" / "out"), Recipe(), engine=engine, card=True)
    assert (tmp_path / "cut" / "out" / CARD).read_bytes() == (tmp_path / "whole" / "out" / CARD).read_bytes()
    assert verify_checkpoint(tmp_path / "cut" / "out").ok


def test_the_card_of_a_run_that_was_killed_again_and_again(source: Path) -> None:
    """In memory, where a shard at a time gets through."""
    sink = MemorySink("hf://org/out")
    for _ in range(3):
        with pytest.raises(Killed):
            convert(source, sink, Recipe(), card=True, on_event=kill_after(1))
    convert(source, sink, Recipe(), card=True)
    assert sink.files[CARD].decode() == card_of(source, Recipe())


def test_the_card_of_a_resumed_run_in_a_repo(served: Served, source: Path, tmp_path: Path) -> None:
    """The journal of a repo keeps the errors too; what is in the repo is what its manifest says."""
    cards = []
    for name, kill in (("whole", None), ("cut", kill_after(1))):
        where = f"hf://dev/{name}"
        if kill is not None:
            with pytest.raises(Killed):
                convert(source, where, Recipe(), card=True, on_event=kill)
        convert(source, where, Recipe(), card=True, base_model="a/b")
        cards.append(readme(served, f"dev/{name}").replace(name, "NAME"))
        assert verify_checkpoint(where).ok
    assert cards[0] == cards[1]
    assert "mean error" in cards[0]


def test_shards_of_a_run_without_a_card_have_no_errors(source: Path, tmp_path: Path) -> None:
    """A mean over some of the weights would pass for one over all of them."""
    with pytest.raises(Killed):
        convert(source, tmp_path / "out", Recipe(), on_event=kill_after(1))
    convert(source, tmp_path / "out", Recipe(), card=True)
    assert "error" not in (tmp_path / "out" / CARD).read_text()


def test_errors_are_noted_before_the_last_piece_goes_out(source: Path) -> None:
    """Who writes files does it on a thread of its own: the notes must be there when it gets what completes a shard."""
    plan, notes = make_plan(source, Recipe()), dict[str, float]()
    shards = [shard for shard in plan.shards if any(step.unit for step in shard.steps)]
    with closing(open_source(source)) as opened:
        pieces = ThreadEngine(2).run(plan, shards, opened.read, {}, measure=True)
        for piece in note_errors(pieces, notes.__setitem__):
            noted = {json.loads(key)[1] for key in notes}
            last = piece.done and piece.step is piece.shard.steps[-1]
            assert (piece.shard.name in noted) == last
    assert noted == {shard.name for shard in shards}


def test_other_notes_are_no_errors() -> None:
    """A journal holds amaxes of units too, whatever these are called."""
    notes = {
        "model.layers.0.mlp.gate_up_proj": 1.0, '["error"': 2.0, '["error", "a"]': 3.0, '["error", [], {}, 1, []]': 9.0,
        '["error", "s", "k", "f", "x"]': 4.0, '["errors", "t", "k", "f", "worst"]': 9.0,
        '["error", "s", "k", "f", "count"]': 2.0, '["error", "s", "k", "f", "sum"]': 0.5,
        '["error", "s", "k", "f", "worst"]': 0.4, '["error", "t", "k", "f", "count"]': 1.0,
        '["error", "t", "k", "f", "sum"]': 0.1, '["error", "t", "k", "f", "worst"]': 0.1,
        '["error", "t", "k", "g", "count"]': 4.0, '["error", "t", "k", "g", "sum"]': 2.0,
        '["error", "t", "k", "g", "worst"]': 1.5,
    }  # fmt: skip
    assert noted_errors(notes) == {("k", "f"): (3, 0.6 / 3, 0.4), ("k", "g"): (4, 0.5, 1.5)}
    assert noted_errors(dict(reversed(notes.items()))) == noted_errors(notes)


# ------------------------------------------------------------------------------------------------------ on a real Hub


def test_branch_and_pull_request(served: Served, source: Path) -> None:
    """On a branch the serve line names it; a proposal will be on the default branch."""
    api = served.client().api
    api.create_repo("dev/many")
    convert(source, open_sink("hf://dev/many", target=HubTarget(branch="w4/a16")), Recipe(), card=True)
    text = readme(served, "dev/many", "w4/a16")
    assert serve_line(text) == "vllm serve dev/many --revision w4/a16"
    convert(source, open_sink("hf://dev/many", target=HubTarget(create_pr=True, title="T")), Recipe(), card=True)
    text = readme(served, "dev/many", "refs/pr/1")
    assert serve_line(text) == "vllm serve dev/many"


STRANGE = {
    "broken YAML": b"---\nlicense: [mit\n---\ntext",
    "a list": b"---\n- a\n---\n",
    "a key twice": b"---\nlicense: mit\nlicense: apache-2.0\n---\n",
    "tags that are no texts": b"---\ntags: [1, {a: b}, [c], null]\nlicense: {a: b}\n---\n",
    "a megabyte": b"---\nlicense: mit\n---\n" + b"word " * 220_000,
    "Windows": b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\ntext\r\n---\r\n",
    "no front matter": b"# Title\n\n---\n\nlicense: mit\n---\n",
    "no text at all": b"",
    "no UTF-8": b"---\nlicense: \xff\n---\n\xfe",
    "deep nesting": b"---\na: " + b"[" * 50_000 + b"\n---\n",
}


@pytest.mark.parametrize("kind", STRANGE)
def test_the_hub_takes_the_card_whatever_the_source_has(kind: str, served: Served, tmp_path: Path) -> None:
    """A whole run into a repo; its card reads back, and validates with the Hub's own client."""
    folder = tiny_llama(tmp_path / "in", layers=1, shards=1)
    (folder / CARD).write_bytes(STRANGE[kind])
    repo = f"dev/strange-{list(STRANGE).index(kind)}"
    convert(folder, f"hf://{repo}", Recipe(), card=True, base_model="a/b")
    text = readme(served, repo)
    validate(text)
    assert (metadata(text)["base_model"], metadata(text)["base_model_relation"]) == ("a/b", "quantized")
    assert set(metadata(text)) <= {"license", "library_name", "base_model", "base_model_relation", "tags"}
    assert verify_checkpoint(f"hf://{repo}").ok
