"""Cards of finished checkpoints, of ours and of others: from what verify finds, and nothing else changes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from huggingface_hub import CommitOperationAdd, constants

from mso_hub import Recipe, convert, verify_checkpoint
from mso_hub.card import CARD
from mso_hub.errors import CheckpointError, HubError, RecipeError, SinkError, VerifyError
from mso_hub.hub.lookup import paths_info, read_small
from mso_hub.pipeline import make_plan
from mso_hub.plan.summary import size
from mso_hub.recard import make_card, publish_card, require_place
from tests.helpers import random_tensor, tensors_of, tiny_llama, tiny_moe, write_checkpoint
from tests.hub.cards import metadata, validate
from tests.hub.serving import Served, serving
from tests.running import digests

OWN = """---
license: apache-2.0
library_name: Model Optimizer
base_model: org/parent
base_model_relation: quantized
tags: [w4a16, custom]
---
# Theirs
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A Hub that everything in this process takes for the one."""
    folder = tmp_path_factory.mktemp("recard")
    with serving(folder, xet=False) as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", served.hub.endpoint)
        patch.setenv("HF_TOKEN", served.hub.token())
        patch.setenv("MSO_HUB_CACHE", str(folder / "cache"))
        yield served


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An expert model with a card."""
    folder = tiny_moe(tmp_path / "in")
    (folder / CARD).write_text("---\nlicense: mit\ntags: [chat]\nbase_model: a/grandparent\n---\n# Original\n")
    return folder


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    """It, quantized into a folder without a card of its own."""
    convert(source, tmp_path / "out", Recipe())
    return tmp_path / "out"


def theirs(folder: Path, bits: int = 4, inputs: dict[str, object] | None = None) -> Path:
    """A checkpoint in INT4 or INT8 that another tool wrote."""
    tensors = {"model.embed_tokens.weight": random_tensor(32, 64), "model.norm.weight": random_tensor(64)}
    for leaf, shape in (("gate", (128, 64)), ("up", (128, 64)), ("down", (64, 128))):
        blocks = random_tensor(*shape, dtype=torch.float32).view(shape[0], -1, 32)
        top = 2 ** (bits - 1) - 1
        scale = (blocks.abs().amax(-1) / top).bfloat16()
        codes = (blocks / scale.float()[..., None]).round().clamp(-top - 1, top).to(torch.int8)
        module = f"model.layers.0.mlp.{leaf}_proj"
        tensors |= {
            f"{module}.weight_packed": pack_to_int32(codes.view(shape), bits), f"{module}.weight_scale": scale,
            f"{module}.weight_shape": torch.tensor(shape, dtype=torch.int32),
        }  # fmt: skip
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group"}
    config = {
        "model_type": "llama", "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        },
    }  # fmt: skip
    return write_checkpoint(folder, {"model.safetensors": tensors}, config)


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_folder_gets_its_card(packed: Path, source: Path) -> None:
    """Licence and tags of the source, errors of all numbers; README.md and its digest change, verify stays content."""
    before = digests(packed)
    card = make_card(packed, source=source, base_model="org/base")
    assert digests(packed) == before
    assert publish_card(card) == str(packed / CARD)
    after = digests(packed)
    assert {name for name in after if after[name] != before.get(name)} == {CARD, "mso_hub.json"}
    assert after.keys() == before.keys()
    report = verify_checkpoint(packed, source=source)
    assert report.ok, report.problems
    text = (packed / CARD).read_text()
    assert metadata(text) == {
        "license": "mit", "library_name": "transformers", "base_model": "org/base",
        "base_model_relation": "quantized",
        "tags": ["chat", "nvfp4", "w4a16", "compressed-tensors", "4-bit", "vllm", "mso_hub"],
    }  # fmt: skip
    assert "measured by `mso-hub verify` on every number." in text
    worst = max(error.nmse for error in report.errors)
    assert f"{100 * worst:.4f} %" in text
    assert "vllm serve ./out" in text


def test_the_rest_of_the_manifest_stays(packed: Path, source: Path) -> None:
    """A later conversion into the same place still finds its job finished."""
    before = json.loads((packed / "mso_hub.json").read_text())
    publish_card(make_card(packed))
    after = json.loads((packed / "mso_hub.json").read_text())
    assert after["files"].pop(CARD) != before["files"].pop(CARD)
    assert after == before
    convert(source, packed, Recipe())


def test_the_second_time_changes_nothing(packed: Path, source: Path) -> None:
    """The card is a function of the checkpoint; without the source it keeps what it knows of it."""
    publish_card(make_card(packed, source=source, base_model="org/base"))
    assert not make_card(packed, source=source, base_model="org/base").changed
    alone = make_card(packed)
    assert alone.changed
    data = metadata(alone.content.decode())
    assert data == metadata((packed / CARD).read_text())
    publish_card(alone)
    assert not make_card(packed).changed
    assert "error" not in alone.content.decode()
    assert "before" not in alone.content.decode()


def test_the_card_of_a_conversion_differs_by_its_measurement_alone(source: Path, tmp_path: Path) -> None:
    """Both ways to the card say the same in the same words, W4A4 included."""
    convert(source, tmp_path / "out", Recipe(input_scale=0.5, mode="all-linear"), card=True, base_model="org/base")
    ours = (tmp_path / "out" / CARD).read_text().splitlines()
    again = make_card(tmp_path / "out", source=source, base_model="org/base").content.decode().splitlines()
    assert len(ours) == len(again)
    differ = [line for line, other in zip(ours, again, strict=True) if line != other]
    assert all(line.startswith("Errors are") for line in differ), differ
    assert "| Activation scale | uncalibrated: the constant 0.5 for every module |" in ours


def test_a_card_that_was_edited_is_replaced_on_request_alone(packed: Path) -> None:
    """verify does not mind what publishers do every day, and nothing of it gets lost by accident."""
    (packed / CARD).write_text("by hand")
    assert verify_checkpoint(packed).ok
    card = make_card(packed)
    with pytest.raises(SinkError, match=r"has a README\.md that mso_hub did not write \(or that was edited since\)"):
        require_place(packed)
    with pytest.raises(SinkError, match=r"print the card with --output -, or replace it with --fresh"):
        publish_card(card)
    assert (packed / CARD).read_text() == "by hand"
    require_place(packed, fresh=True)
    publish_card(card, fresh=True)
    assert verify_checkpoint(packed).hashed == len(digests(packed)) - 1
    (packed / CARD).unlink()
    assert verify_checkpoint(packed).ok
    require_place(packed)
    publish_card(make_card(packed))
    assert verify_checkpoint(packed).ok


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"files": []}', '{"files": {"README.md": 1}}'])
def test_a_broken_manifest_vouches_for_no_card(manifest: str, packed: Path) -> None:
    """Whatever it says."""
    (packed / "mso_hub.json").write_text(manifest)
    with pytest.raises(SinkError, match="that mso_hub did not write"):
        require_place(packed)


def test_sizes_are_those_of_the_plan(packed: Path, source: Path) -> None:
    """Shards, index and config."""
    plan = make_plan(source, Recipe())
    assert f"| Size | {size(plan.write_bytes)} |" in make_card(packed).content.decode()
    both = f"| Size | {size(plan.read_bytes)} -> {size(plan.write_bytes)} ("
    assert both in make_card(packed, source=source).content.decode()


RECIPE = {"scheme": "nvfp4", "mode": "all-linear", "ignore": ["a b"], "targets": [], "default_ignore": True}


@pytest.mark.parametrize(
    ("said", "cell"),
    [
        (RECIPE, "`mso-hub quantize --all_linear --ignore 'a b' --input_dir FOLDER --output_dir ./out`"),
        (RECIPE | {"imported_ignore": 3}, "(with an imported exclude list)"),
        (RECIPE | {"of_a_later_version": 1}, "--output_dir ./out`"),
        (RECIPE | {"mode": "unheard of"}, None),
        (RECIPE | {"targets": 5}, None),
        (RECIPE | {"input_scale": "x"}, None),
        ({"scheme": "unheard of"}, None),
        ({"scheme": []}, None),
        ([], None),
        (None, None),
    ],
)
def test_the_command_of_the_manifest(said: object, cell: str | None, packed: Path) -> None:
    """As far as mso_hub.json has it; a card does without what cannot be read."""
    path = packed / "mso_hub.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": said}))
    rows = [line for line in make_card(packed).content.decode().splitlines() if line.startswith("| Command |")]
    assert len(rows) == (cell is not None)
    assert (cell or "") in "".join(rows)


def test_imported_activation_scales_are_seen_in_the_weights(source: Path, tmp_path: Path) -> None:
    """The manifest's recipe does not hold them."""
    experts = [f"model.layers.{n}.mlp.experts.{e}" for n in range(2) for e in range(4)]
    amax = {f"{e}.{p}_proj": 1344.0 for e in experts for p in ("gate", "up", "down")}
    convert(source, tmp_path / "out", Recipe(input_scale="imported", input_amax=amax))
    path = tmp_path / "out" / "mso_hub.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": {"scheme": "nvfp4"}}))
    assert "./out` (with imported activation scales) |" in make_card(tmp_path / "out").content.decode()


def test_a_base_model_is_never_guessed(packed: Path) -> None:
    """The card that came along speaks about the source, and so does its base model."""
    assert (packed / CARD).read_text().startswith("---\nlicense: mit")
    data = metadata(make_card(packed).content.decode())
    assert "base_model" not in data
    assert data["license"] == "mit"


def test_a_decoded_folder(packed: Path, tmp_path: Path) -> None:
    """No relation, and the errors of rounding."""
    convert(packed, tmp_path / "dense", Recipe(scheme="bf16"))
    text = make_card(tmp_path / "dense", source=packed, base_model="org/packed").content.decode()
    data = metadata(text)
    assert "base_model_relation" not in data
    assert data["tags"] == ["chat", "bf16", "mso_hub"]
    assert "The source was quantized (NVFP4): what that lost is not restored here." in text
    alone = make_card(tmp_path / "dense").content.decode()
    assert "The source was quantized (packed weights): what that lost is not restored here." in alone
    assert re.search(r"experts\.N\.up_proj` \| BF16 \| 8 \|", text)
    assert "Not quantized" not in text


# ----------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize(
    ("bits", "inputs", "short"), [(4, None, "W4A16"), (8, None, "W8A16"), (4, {"num_bits": 8, "dynamic": True}, "W4A8")]
)
def test_a_checkpoint_of_others(bits: int, inputs: dict[str, object] | None, short: str, tmp_path: Path) -> None:
    """Label and tags are right, what its own card says is kept, and this tool does not claim to have made it."""
    folder = theirs(tmp_path / "in", bits, inputs)
    (folder / CARD).write_text(OWN)
    before = digests(folder)
    with pytest.raises(SinkError, match="that mso_hub did not write"):
        publish_card(make_card(folder))
    assert digests(folder) == before
    assert publish_card(make_card(folder), fresh=True) == str(folder / CARD)
    assert {n: d for n, d in digests(folder).items() if n != CARD} == {n: d for n, d in before.items() if n != CARD}
    text = (folder / CARD).read_text()
    assert metadata(text) == {
        "license": "apache-2.0", "library_name": "Model Optimizer", "base_model": "org/parent",
        "base_model_relation": "quantized", "tags": list(dict.fromkeys([
            *(["w4a16"] if short != "W4A16" else []), "custom", f"int{bits}", short.lower(), "compressed-tensors",
            f"{bits}-bit", "vllm"])),
    }  # fmt: skip
    assert f"| Scheme | INT{bits}, {short} |" in text
    assert f"stored as INT{bits} ({short}, compressed-tensors)" in text
    assert "## How it is stored" in text
    assert "Made with" not in text
    assert "not trained any further" not in text
    assert "Card written with" in text
    assert not make_card(folder).changed


def test_a_dense_checkpoint_of_others(tmp_path: Path) -> None:
    """What its own card says about it stays."""
    folder = tiny_llama(tmp_path / "in", dtype=torch.float16)
    (folder / CARD).write_text(OWN.replace("quantized", "finetune"))
    data = metadata(make_card(folder).content.decode())
    assert (data["base_model"], data["base_model_relation"]) == ("org/parent", "finetune")
    assert data["tags"] == ["w4a16", "custom", "fp16"]


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_broken_checkpoint_gets_no_card(packed: Path, source: Path) -> None:
    """Nor does one that is far from its source."""
    other = tiny_moe(packed.parent / "other", seed=1)
    with pytest.raises(VerifyError, match=r"must be without problems to get a card, found \d+ problems, the first: "):
        make_card(packed, source=other)
    config = packed / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(VerifyError, match=r"found 1 problem: config\.json: had .*`mso-hub verify` lists all there are"):
        make_card(packed, source=source)


def test_what_is_not_there_or_is_no_repo(packed: Path) -> None:
    """One error each."""
    with pytest.raises(CheckpointError, match="found nothing there"):
        make_card(packed, source=packed.parent / "missing")
    with pytest.raises(CheckpointError, match="found nothing there"):
        make_card(packed.parent / "missing")
    for name in ("my model", "a/b/c", "/x/y", "a"):
        with pytest.raises(RecipeError, match="base_model: must be the id of a repo"):
            make_card(packed, base_model=name)


def test_a_folder_that_cannot_be_written(packed: Path) -> None:
    """A name that is taken by a folder: the old card stays, and no partial file."""
    card = make_card(packed)
    (packed / CARD).unlink()
    (packed / CARD / "x").mkdir(parents=True)
    names = sorted(path.name for path in packed.iterdir())
    with pytest.raises(SinkError, match=r"README\.md: cannot be written: Is a directory"):
        publish_card(card)
    assert sorted(path.name for path in packed.iterdir()) == names


# ------------------------------------------------------------------------------------------------------------ repos


def test_a_repo_gets_its_card(served: Served, source: Path, tmp_path: Path) -> None:
    """One commit on the head that was verified: two files, and everything else keeps its content."""
    origin = served.put(source)
    convert(f"hf://{origin}", "hf://dev/card", Recipe())
    client = served.client()
    names = client.api.list_repo_files("dev/card")
    before = paths_info(client, "dev/card", names, "main")
    require_place("hf://dev/card")
    card = make_card("hf://dev/card", source=f"hf://{origin}")
    assert len(client.api.list_repo_commits("dev/card")) == 2
    url = publish_card(card)
    newest, parent = client.api.list_repo_commits("dev/card")[:2]
    assert (url, parent.commit_id) == (f"{served.hub.endpoint}/dev/card/commit/{newest.commit_id}", card.commit)
    after = paths_info(client, "dev/card", client.api.list_repo_files("dev/card"), "main")
    assert {name for name in after if after[name] != before.get(name)} == {CARD, "mso_hub.json"}
    assert after.keys() == before.keys()
    assert verify_checkpoint("hf://dev/card", source=source).ok
    text = (read_small(client, "dev/card", CARD, "main") or b"").decode()
    validate(text)
    assert (metadata(text)["base_model"], metadata(text)["license"]) == (origin, "mit")
    commit = client.api.model_info(origin).sha
    assert f"[{origin}]({served.hub.endpoint}/{origin}) at commit `{commit}`" in text
    assert f"measured by `mso-hub verify` on every number of {origin}." in text
    assert "vllm serve dev/card\n" in text
    again = make_card("hf://dev/card", source=f"hf://{origin}")
    assert not again.changed
    publish_card(again)
    assert client.api.list_repo_commits("dev/card")[0].commit_id == newest.commit_id


def test_the_source_of_the_manifest_is_the_default(served: Served, source: Path) -> None:
    """A card keeps its table without --source; where the source is gone, that is an error and nothing is lost."""
    origin = served.put(source)
    convert(f"hf://{origin}", "hf://dev/default", Recipe(), card=True)
    commit = served.client().api.model_info(origin).sha
    card = make_card("hf://dev/default")
    assert card.content == make_card("hf://dev/default", source=f"hf://{origin}@{commit}").content
    assert "mean error" in card.content.decode()
    served.client().api.delete_repo(origin)
    with pytest.raises(HubError, match=rf"hf://{origin}@{commit}: mso_hub\.json says .* give a copy .*--source WHERE"):
        make_card("hf://dev/default")
    assert "mean error" in make_card("hf://dev/default", source=source).content.decode()


def test_a_source_in_a_folder_of_a_repo_has_to_be_given(served: Served, source: Path) -> None:
    """mso_hub.json names the repo alone: the message names what it was compared with, and the way out."""
    files = {f"sub/{path.name}": path.read_bytes() for path in source.iterdir()}
    other = tiny_moe(source.parent / "other", seed=1)
    origin = served.put({path.name: path.read_bytes() for path in other.iterdir()} | files)
    convert(f"hf://{origin}@main/sub", "hf://dev/below", Recipe(), card=True)
    text = (read_small(served.client(), "dev/below", CARD, "main") or b"").decode()
    commit = served.client().api.model_info(origin).sha
    assert f"--input_dir hf://{origin}@{commit}/sub --output_dir hf://dev/below`" in text
    with pytest.raises(VerifyError, match=rf"; it was compared with hf://{origin}.*, give another one with --source"):
        make_card("hf://dev/below")
    assert "mean error" in make_card("hf://dev/below", source=f"hf://{origin}@main/sub").content.decode()


def test_a_hand_written_card_of_a_repo_stays(served: Served, source: Path) -> None:
    """The website's editor makes a commit; ours would undo it."""
    api = served.client().api
    convert(source, "hf://dev/edited", Recipe(), card=True)
    require_place("hf://dev/edited")
    api.create_commit(
        "dev/edited", [CommitOperationAdd(CARD, b"---\nlicense: mit\n---\n# By hand")], commit_message="edit"
    )
    assert verify_checkpoint("hf://dev/edited").ok
    with pytest.raises(SinkError, match=r"hf://dev/edited: has a README\.md that mso_hub did not write"):
        require_place("hf://dev/edited")
    with pytest.raises(SinkError, match="--fresh"):
        publish_card(make_card("hf://dev/edited"))
    assert api.list_repo_commits("dev/edited")[0].title == "edit"
    publish_card(make_card("hf://dev/edited"), fresh=True)
    require_place("hf://dev/edited")


def test_a_branch_gets_its_card(served: Served, source: Path) -> None:
    """And the default branch does not."""
    api = served.client().api
    convert(source, "hf://dev/branches", Recipe())
    head = api.model_info("dev/branches").sha
    api.create_branch("dev/branches", branch="dev/x")
    publish_card(make_card("hf://dev/branches@dev%2Fx"))
    assert api.model_info("dev/branches").sha == head
    text = (read_small(served.client(), "dev/branches", CARD, "dev%2Fx") or b"").decode()
    assert "vllm serve dev/branches --revision dev/x\n" in text


def test_a_repo_that_moves_meanwhile(served: Served, source: Path) -> None:
    """What was verified is no longer what the card would stand on."""
    convert(source, "hf://dev/moving", Recipe())
    card = make_card("hf://dev/moving")
    api = served.client().api
    api.create_commit("dev/moving", [CommitOperationAdd("x.txt", b"x")], commit_message="quick")
    with pytest.raises(HubError, match=r"somebody committed there since .* run the same command again"):
        publish_card(card)
    assert api.list_repo_commits("dev/moving")[0].title == "quick"
    publish_card(make_card("hf://dev/moving"))


def test_a_place_where_nothing_can_be_committed(served: Served, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the weights are read."""
    repo = served.put(source)
    commit = served.client().api.model_info(repo).sha
    with pytest.raises(HubError, match="a commit needs a branch"):
        require_place(f"hf://{repo}@{commit}")
    with pytest.raises(RecipeError, match="must be a whole repo"):
        require_place(f"hf://{repo}/sub")
    monkeypatch.setenv("HF_TOKEN", served.hub.token("read"))
    with pytest.raises(HubError, match="needs a token with write permission"):
        require_place(f"hf://{repo}")


def test_the_weights_are_not_touched(packed: Path, source: Path) -> None:
    """Of a folder, once more by their numbers."""
    before = tensors_of(packed)
    publish_card(make_card(packed, source=source))
    after = tensors_of(packed)
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before)
