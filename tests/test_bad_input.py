"""Input that is broken and places that cannot be written: one message, exit code 2, and nothing has happened.

Every case starts from a good checkpoint, spoils one thing in it, and runs the real program.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import INDEX, random_tensor, tensors_of, tiny_llama, tiny_moe, write_checkpoint
from tests.running import command, digests, listing, paused, proceed, run, small_disk

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MODULE = "model.layers.1.mlp.up_proj"
UP = f"{MODULE}.weight"
Change = Callable[[Path], object]


# --- how to spoil a checkpoint ----------------------------------------------------------------------


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a shard."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_header(path: Path, content: Mapping[str, Any] | str, data: bytes) -> None:
    """Write a shard whose header says what it likes."""
    text = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(change: Callable[[dict[str, Any]], object], name: str = UP) -> Change:
    """Change what the header says of one tensor."""

    def spoil(folder: Path) -> None:
        content, data = header(folder / SECOND)
        change(content[name])
        put_header(folder / SECOND, content, data)

    return spoil


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change one tensor of the second shard."""

    def spoil(folder: Path) -> None:
        shard = tensors_of_file(folder / SECOND)
        shard[name] = change(shard[name])
        save_file(shard, folder / SECOND)

    return spoil


def tensors_of_file(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one shard."""
    content, _ = header(path)
    return {name: value for name, value in tensors_of(path.parent).items() if name in content}


def index(change: Callable[[dict[str, str]], object]) -> Change:
    """Change the weight_map."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return spoil


def number(value: float) -> Change:
    """One number of an MLP weight is not finite."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[7, 11] = value
        return weight

    return tensor(UP, change)


def overlap(folder: Path) -> None:
    """The second tensor in the file begins where the first one does."""
    content, data = header(folder / SECOND)
    by_place = sorted((v["data_offsets"][0], k) for k, v in content.items() if k != "__metadata__")
    begin, end = content[by_place[1][1]]["data_offsets"]
    content[by_place[1][1]]["data_offsets"] = [begin - 2, end - 2]
    put_header(folder / SECOND, content, data)


def hole(folder: Path) -> None:
    """Bytes that belong to no tensor."""
    content, data = header(folder / SECOND)
    last = max((v["data_offsets"][0], k) for k, v in content.items() if k != "__metadata__")[1]
    content[last]["data_offsets"] = [at + 8 for at in content[last]["data_offsets"]]
    put_header(folder / SECOND, content, data + bytes(8))


def duplicate_key(folder: Path) -> None:
    """The header names one tensor twice."""
    content, data = header(folder / SECOND)
    text = json.dumps(content)
    put_header(folder / SECOND, text[:-1] + f', "{UP}": {json.dumps(content[UP])}}}', data)


def duplicate_tensor(folder: Path) -> None:
    """A third shard, in the index, has a tensor of the second."""
    save_file({UP: random_tensor(128, 64), "other": torch.ones(8)}, folder / "more.safetensors")
    index(lambda weight_map: weight_map.update({"other": "more.safetensors"}))(folder)


def stale_shard(folder: Path) -> None:
    """A forgotten file, which the index does not list, has a tensor of the second shard."""
    save_file({UP: random_tensor(128, 64)}, folder / "old.safetensors")


def long_header(folder: Path) -> None:
    """The header is longer than the file."""
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes((len(raw) + 1).to_bytes(8, "little") + raw[8:])


def huge_header(folder: Path) -> None:
    """The length field asks for two exabytes."""
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes((2 << 60).to_bytes(8, "little") + raw[8:])


def truncated(folder: Path) -> None:
    """A download that was cut."""
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(raw[:-1000])


def bitsandbytes(folder: Path) -> None:
    """A checkpoint as bitsandbytes saves it: INT8 codes beside the largest magnitude of each row."""
    shard = tensors_of_file(folder / SECOND)
    shard[UP] = shard[UP].to(torch.int8)
    shard[f"{MODULE}.SCB"] = torch.ones(128)
    save_file(shard, folder / SECOND)
    index(lambda weight_map: weight_map.update({f"{MODULE}.SCB": SECOND}))(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))


def emptied(folder: Path) -> None:
    """Nothing is left."""
    for path in folder.iterdir():
        path.unlink()


def only_pickles(folder: Path) -> None:
    """An old repo without safetensors."""
    emptied(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def became_a_file(folder: Path) -> None:
    """Somebody gave a shard instead of its folder."""
    shutil.rmtree(folder)
    folder.write_bytes(b"x" * 100)


def deep_json(file: str) -> Change:
    """JSON that overflows a recursive parser."""
    return lambda folder: (folder / file).write_bytes(b'{"a":' * 100_000)


def deep_header(folder: Path) -> None:
    """The same in a header."""
    put_header(folder / SECOND, '{"a":' * 100_000, b"")


CASES: dict[str, tuple[Change, list[str]]] = {
    "truncated shard": (truncated, [SECOND, "the tensors end at byte", "the file has", "fetch it again"]),
    "header longer than the file": (long_header, [SECOND, "the header needs", "the file has", "fetch it again"]),
    "header of two exabytes": (huge_header, [SECOND, "at most 100,000,000 bytes", "2,305,843,009,213,693,952"]),
    "shard of three bytes": (
        lambda folder: (folder / SECOND).write_bytes(b"abc"),
        [SECOND, "at least 8 bytes", "got 3", "fetch it again"],
    ),
    "empty shard": (lambda folder: (folder / SECOND).write_bytes(b""), [SECOND, "at least 8 bytes", "got 0"]),
    "header that is no JSON": (
        lambda folder: put_header(folder / SECOND, "{not json", b""),
        [SECOND, "not valid JSON", "fetch it again"],
    ),
    "header that is a list": (
        lambda folder: put_header(folder / SECOND, "[]", b""),
        [SECOND, "must be a JSON object", "got list"],
    ),
    "header nested too deep": (deep_header, [SECOND, "not valid JSON"]),
    "overlapping offsets": (overlap, [SECOND, "overlaps the tensor before it", "expected", "fetch it again"]),
    "a hole": (hole, [SECOND, "leaves a hole before it", "expected"]),
    "missing offsets": (
        entry(lambda e: e.pop("data_offsets")),
        [SECOND, UP, "needs data_offsets [begin, end]", "got None", "fetch it again"],
    ),
    "negative offsets": (entry(lambda e: e.update(data_offsets=[-2, 5])), [SECOND, UP, "got [-2, 5]"]),
    "offsets that do not fit the shape": (
        entry(lambda e: e.update(shape=[128, 65])),
        [SECOND, UP, "[128, 65]", "span 16,384 bytes"],
    ),
    "negative shape": (entry(lambda e: e.update(shape=[-128, -64])), [SECOND, UP, "sizes >= 0", "[-128, -64]"]),
    "a shape that no array can have": (
        entry(lambda e: e.update(shape=[128, 64] + [1] * 70)),
        [SECOND, UP, "up to 32 sizes"],
    ),
    "unknown dtype": (entry(lambda e: e.update(dtype="F12")), [SECOND, UP, "'F12'", "BF16", "newer"]),
    "dtype that is a list": (entry(lambda e: e.update(dtype=["BF16"])), [SECOND, UP, "dtype"]),
    "duplicate names in a header": (duplicate_key, [SECOND, UP, "appears twice", "fetch it again"]),
    "a tensor in two shards": (duplicate_tensor, [UP, SECOND, "more.safetensors", "remove the file that is stale"]),
    "a tensor in a shard and in a file beside": (stale_shard, [UP, SECOND, "old.safetensors", "remove the file"]),
    "a tensor that no shard holds": (
        index(lambda weight_map: weight_map.update({"model.ghost.weight": SECOND})),
        [INDEX, "'model.ghost.weight'", "no shard holds it", "does not fit the shards"],
    ),
    "a tensor in another shard than the index says": (
        index(lambda weight_map: weight_map.update({UP: FIRST})),
        [INDEX, UP, FIRST, SECOND],
    ),
    "a shard that is not there": (
        index(lambda weight_map: weight_map.update({UP: "model-00009.safetensors"})),
        [INDEX, "model-00009.safetensors", "download it again"],
    ),
    "../ in the weight map": (
        index(lambda weight_map: weight_map.update({UP: "../secret.safetensors"})),
        [INDEX, "'../secret.safetensors'", "relative path inside the repo"],
    ),
    "an absolute path in the weight map": (
        index(lambda weight_map: weight_map.update({UP: "/etc/passwd"})),
        [INDEX, "'/etc/passwd'", "relative path inside the repo"],
    ),
    "a weight map that is none": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": [1]}'),
        [INDEX, "needs a weight_map", "[1]"],
    ),
    "an index nested too deep": (deep_json(INDEX), [INDEX, "not valid JSON"]),
    "last dimension not divisible by 16": (
        tensor(UP, lambda weight: weight[:, :40].contiguous()),
        ["nothing was written", UP, "multiple of 16", "[128, 40]", "`ignore`"],
    ),
    "integer weights": (
        tensor(UP, lambda weight: weight.to(torch.int8)),
        ["nothing was written", UP, "BF16, F16, F32", "got I8"],
    ),
    "NaN weights": (number(float("nan")), [UP, "must be finite", "found nan at row 7, column 11", "`ignore`"]),
    "Inf weights": (number(float("-inf")), [UP, "must be finite", "found -inf at row 7, column 11", "`ignore`"]),
    "quantized without a decoder": (
        bitsandbytes,
        ["already quantized in a format without a decoder", UP, "I8", "[128, 64]", f"{MODULE}.SCB", "mso-hub formats"],
    ),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ["config.json", "there is none"]),
    "a config that is no UTF-8": (
        lambda folder: (folder / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}'),
        ["config.json", "not valid JSON", "fetch it again"],
    ),
    "a config that is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ["config.json", "must hold a JSON object", "found list"],
    ),
    "a config nested too deep": (deep_json("config.json"), ["config.json", "not valid JSON"]),
    "a broken link": (
        lambda folder: (folder / "tokenizer.json").symlink_to("../blobs/gone"),
        ["tokenizer.json", "'../blobs/gone'", "does not exist"],
    ),
    "an empty folder": (emptied, ["needs at least one .safetensors file", "found 0 other files"]),
    "no safetensors": (only_pickles, ["needs at least one .safetensors file", "found 1 other files", "convert .bin"]),
    "a file instead of a folder": (became_a_file, ["must be a folder with safetensors files", "found a file"]),
    "a missing folder": (shutil.rmtree, ["must be a folder with safetensors files", "found nothing"]),
}


def check(arguments: list[str], words: list[str], **settings: Any) -> None:
    """Exit code 2, one message with these words, and nothing that only a programmer understands."""
    done = run([*arguments, "--progress", "none"], **settings)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("mso-hub: ")
    assert done.stderr.count("mso-hub: ") == 1
    missing = [word for word in words if word not in done.stderr]
    assert not missing, done.stderr


def content(path: Path) -> dict[str, str] | bytes:
    """What lies there, to be compared later."""
    return path.read_bytes() if path.is_file() else digests(path)


@pytest.mark.parametrize("case", CASES)
def test_broken_input(tmp_path: Path, case: str) -> None:
    """One message that names the thing, the limit, what was found and the way out; no output, the input as it was."""
    change, words = CASES[case]
    source = tiny_llama(tmp_path / "in")
    assert sorted(path.name for path in source.glob("*.safetensors")) == [FIRST, SECOND]
    change(source)
    before = content(tmp_path)
    check(command("quantize", source, tmp_path / "out"), words)
    after = content(tmp_path)
    assert isinstance(after, dict)
    # A shard completed before the bad one may wait under its hidden name; it is not published.
    assert {name: kind for name, kind in after.items() if ".mso-" not in name} == before


def test_the_checkpoint_that_is_spoiled_is_good(tmp_path: Path) -> None:
    """Otherwise every case above could fail for a reason of its own."""
    done = run(command("quantize", tiny_llama(tmp_path / "in"), tmp_path / "out", "--quiet"))
    assert (done.returncode, done.stderr) == (0, "")


def test_all_problems_of_a_plan_come_in_one_message(tmp_path: Path) -> None:
    """Whoever repairs a recipe should not have to run it once for each mistake."""
    source = tiny_llama(tmp_path / "in")
    tensor(UP, lambda weight: weight[:, :40].contiguous())(source)
    program = command("quantize", source, tmp_path / "out", "--ignore", "nothing.like.it", "--ignore", "nor.this")
    check(program, ["nothing was written", "[128, 40]", "'nothing.like.it'", "'nor.this'"])


def test_an_early_error_does_not_block_the_way_out_that_it_names(tmp_path: Path) -> None:
    """NaN in the first shard: adding the tensor to `ignore` must work without --fresh, nothing was complete."""
    source = tiny_llama(tmp_path / "in", layers=1, shards=1)
    shard = tensors_of(source)
    gate, up = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up"))
    shard[gate][0, 0] = float("nan")
    save_file(shard, source / "model.safetensors")
    check(command("quantize", source, tmp_path / "out"), [gate, "`ignore`"])
    assert listing(tmp_path) == ["in"]
    done = run(command("quantize", source, tmp_path / "out", "--quiet", "--ignore", gate, "--ignore", up))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_message_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    """With the progress bar, which is the default: before it appears the message is alone, later it comes below."""
    missing = run(command("quantize", tmp_path / "nowhere", tmp_path / "out"))
    assert missing.stderr.startswith("mso-hub: ")
    assert missing.stderr.count("\n") == 1
    source = tiny_llama(tmp_path / "in")
    number(float("nan"))(source)
    later = run(command("quantize", source, tmp_path / "out"))
    assert (missing.returncode, later.returncode) == (2, 2)
    assert [line for line in later.stderr.split("\n") if line.startswith("mso-hub: ")] == [
        later.stderr.rstrip("\n").split("\n")[-1]
    ]


# --- where the output lies --------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["in", "in/out", "in/deep/er/out", ".", "link"])
def test_output_and_input_in_one_another(tmp_path: Path, place: str) -> None:
    """The same folder, output inside input, input inside output, also through a link."""
    source = tiny_llama(tmp_path / "top" / "in")
    (tmp_path / "top" / "link").symlink_to(source / "out")
    before = digests(tmp_path)
    words = ["input and output must be separate folders", str(source), "choose an output beside it"]
    check(command("quantize", source, tmp_path / "top" / place), words)
    assert digests(tmp_path) == before


def test_an_output_folder_with_other_files(tmp_path: Path) -> None:
    """Whatever lies there is the user's, with --fresh too."""
    source = tiny_llama(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = digests(tmp_path)
    for more in ([], ["--fresh"], ["--no-resume"]):
        words = [str(tmp_path / "out"), "new or empty folder", "choose another folder"]
        check(command("quantize", source, tmp_path / "out", *more), words)
        assert digests(tmp_path) == before


@pytest.mark.parametrize("place", ["/proc/no/out", "/proc/out", "/dev/null/out"])
def test_an_output_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    """Not even root may write there."""
    source = tiny_llama(tmp_path / "in")
    before = digests(tmp_path)
    check(command("quantize", source, Path(place)), ["cannot be written", "choose another folder"])
    assert digests(tmp_path) == before


def test_a_read_only_disk(tmp_path: Path) -> None:
    """A real file system, mounted read-only."""
    source = tiny_llama(tmp_path / "in")
    with small_disk(tmp_path / "disk", 1 << 20, "ro") as disk:
        check(command("quantize", source, disk / "out"), [str(disk), "Read-only file system", "choose another folder"])


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    """A real file system of 1 MiB: refused before the first byte."""
    source = tiny_llama(tmp_path / "in")
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        words = [str(disk / "out"), "bytes of free space", "the disk has", "choose another disk"]
        check(command("quantize", source, disk / "out"), words)
        assert listing(disk) == []


def test_another_job_over_a_finished_one(tmp_path: Path) -> None:
    """Other settings over a finished checkpoint: refused, and replaced where the user says --fresh."""
    source, out = tiny_llama(tmp_path / "in"), tmp_path / "out"
    assert run(command("quantize", source, out, "--quiet")).returncode == 0
    before = digests(tmp_path)
    words = [str(out), "finished run with another source or other settings", "--fresh"]
    check(command("quantize", source, out, "--all_linear"), words)
    assert digests(tmp_path) == before
    assert run(command("quantize", source, out, "--quiet", "--all_linear", "--fresh")).returncode == 0
    assert digests(out) != before


# --- things that happen during the run --------------------------------------------------------------


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """A download that is restarted under our feet: the message names the file and how much of it is left."""
    source = tiny_moe(tmp_path / "in", layers=6, experts=16, shards=6)
    last = source / "model-00006-of-00006.safetensors"
    with paused(command("quantize", source, tmp_path / "out")) as process:
        os.truncate(last, 20_000)
        before = digests(source)
        code, events, messages = proceed(process)
    assert code == 2
    assert messages.startswith(f"mso-hub: {last}: wanted bytes [")
    assert "the file ends at 20,000" in messages
    assert "start again" in messages
    assert messages.count("\n") == 1
    assert "Published" not in [event["event"] for event in events]
    assert not (tmp_path / "out").exists()
    assert digests(source) == before


def test_a_carried_file_that_goes_away_during_the_run(tmp_path: Path) -> None:
    """Files beside the weights are copied last; one that is gone by then is named."""
    source = tiny_moe(tmp_path / "in", layers=6, experts=16, shards=6)
    (source / "tokenizer.json").write_text("{}")
    with paused(command("quantize", source, tmp_path / "out")) as process:
        (source / "tokenizer.json").unlink()
        code, _, messages = proceed(process)
    assert code == 2
    assert messages.startswith(f"mso-hub: {source / 'tokenizer.json'}: cannot be read: No such file")
    assert not (tmp_path / "out").exists()


# --- names that come from strangers -----------------------------------------------------------------


def test_a_file_whose_name_is_no_utf8_is_carried_along_or_named(tmp_path: Path) -> None:
    """File names are bytes on Linux; a strange one must not end in a traceback."""
    source = tiny_llama(tmp_path / "in")
    strange = os.fsencode(source) + b"/caf\xe9.txt"
    with open(strange, "wb") as file:  # noqa: PTH123 - a name of bytes
        file.write(b"x")
    done = run([*command("quantize", source, tmp_path / "out"), "--progress", "none"])
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 2)
    assert (tmp_path / "out").exists() == (done.returncode == 0)


def test_a_tensor_name_that_is_no_unicode(tmp_path: Path) -> None:
    """JSON can spell half a surrogate pair, UTF-8 cannot."""
    source = tiny_llama(tmp_path / "in")
    found, data = header(source / SECOND)
    found["model.\ud800.weight"] = found.pop("model.norm.weight")
    put_header(source / SECOND, found, data)
    index(lambda weight_map: weight_map.update({"model.\ud800.weight": weight_map.pop("model.norm.weight")}))(source)
    check(command("quantize", source, tmp_path / "out"), [SECOND, "ud800"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [[10**30, 0], [0, 2**63]])
def test_a_tensor_without_elements_and_with_an_impossible_shape(tmp_path: Path, shape: list[int]) -> None:
    """Zero bytes fit any offsets, but no array has such a dimension."""
    source = write_checkpoint(
        tmp_path / "in", {"model.safetensors": {UP: random_tensor(32, 32)}}, {"model_type": "llama"}
    )
    found, data = header(source / "model.safetensors")
    end = len(data)
    found["nothing"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end]}
    put_header(source / "model.safetensors", found, data)
    check(command("quantize", source, tmp_path / "out"), ["model.safetensors", "'nothing'"])
    assert not (tmp_path / "out").exists()
