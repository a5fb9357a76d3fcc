"""The program as a client of a Hub on this machine: real processes, each on a machine of its own, and what they leave.

A Hub is slow to start, so a module shares one per mode and gives every test repos of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import disable_progress_bars

from mso_hub.events import Event
from mso_hub.hub import Client, Patience
from mso_hub.hub.devhub import DevHub, Request
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.sink import HubTarget, open_sink
from mso_hub.source import open_source
from tests.helpers import (
    attention_shapes,
    base_config,
    checkpoint_files,
    in_shards,
    mlp_shapes,
    random_tensor,
    weights,
    write_files,
)
from tests.running import TIMEOUT, paused, sha256

NUMBERS = itertools.count(1)
SECRETS = re.compile(r"hf_[A-Za-z]+_(read|write)|hf_\w{16,}|signature=|Bearer ")
"""What no message, journal, card or commit may hold: tokens, signed URLs."""
BOOKKEEPING = frozenset({".gitattributes", "README.md", "mso_hub.json"})
"""What a repo has and a folder has not, or has in other words."""


@dataclass(frozen=True)
class World:
    """A running Hub, and machines that use it.

    folder  of everything: the server's store, the machines' homes
    """

    hub: DevHub
    folder: Path

    @property
    def xet(self) -> bool:
        """Do large files go to Xet storage?"""
        return self.hub.xet

    @property
    def api(self) -> HfApi:
        """As the default user."""
        return HfApi(self.hub.endpoint, self.hub.token())

    def name(self, kind: str = "out") -> str:
        """A repo that nobody has made yet."""
        return f"dev/{kind}-{next(NUMBERS)}"

    def home(self, machine: str) -> Path:
        """All that a machine may keep."""
        return self.folder / f"machine-{machine}"

    def settings(self, machine: str = "one", **more: str) -> dict[str, str]:
        """Environment of a client process; keywords override, an empty text takes a variable away."""
        home = self.home(machine)
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        foreign = ("HF_", "HUGGING", "MSO_", "XDG_", "LLVM", "COVERAGE")
        found = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        found |= {
            "HF_ENDPOINT": self.hub.endpoint, "HF_TOKEN": self.hub.token(), "HF_HOME": str(home / "hf"),
            "HF_XET_CACHE": str(home / "xet"), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home / "tmp"),
            "HF_HUB_DISABLE_XET": "" if self.xet else "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
            **more,
        }  # fmt: skip
        return {key: value for key, value in found.items() if value}

    def journals(self, repo: str, machine: str = "one") -> list[Path]:
        """Journals of an unfinished output."""
        return sorted(self.home(machine).rglob(f"*{repo.replace('/', '--')}--*.journal"))

    def run(self, verb: str, *words: object, machine: str = "one", **more: str) -> subprocess.CompletedProcess[str]:
        """A command, run to its end; `more` are variables of its environment. Nobody's secrets may appear."""
        done = subprocess.run(
            program(verb, *words), capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=self.home(machine),
            env=self.settings(machine, **more),
        )  # fmt: skip
        require_no_secrets(done.stdout + done.stderr)
        return done

    def convert(
        self, source: object, target: object, *words: object, verb: str = "quantize", machine: str = "one", **more: str
    ) -> list[dict[str, Any]]:
        """A conversion to its good end -> its events."""
        where = ("--input_dir", source, "--output_dir", target, "--progress", "json")
        done = self.run(verb, *where, *words, machine=machine, **more)
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def paused(
        self,
        source: object,
        target: object,
        *words: object,
        machine: str = "one",
        event: str = "ShardDone",
        **more: str,
    ) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """A quantization that was stopped at an event; see `running.paused`."""
        arguments = program("quantize", "--input_dir", source, "--output_dir", target, *words)
        return paused(arguments, event, env=self.settings(machine, **more), cwd=self.home(machine))

    def put(
        self, files: Mapping[str, bytes], repo: str | None = None, *, revision: str = "main", private: bool = False,
        delete: Sequence[str] = (), token: str | None = None,
    ) -> str:  # fmt: skip
        """Somebody's commit of these files, in a new repo where it is not there -> the repo."""
        repo, api = repo or self.name("model"), HfApi(self.hub.endpoint, token or self.hub.token())
        api.create_repo(repo, private=private, exist_ok=True)
        changes: list[Any] = [CommitOperationAdd(path, data) for path, data in files.items()]
        changes += [CommitOperationDelete(path) for path in delete]
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client's own, about its LFS requests and about bare cards
            patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", not self.xet)
            patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            patch.setenv("HF_XET_CACHE", str(self.home("author") / "xet"))
            api.create_commit(repo, changes, commit_message="files", revision=revision)
        return repo

    def head(self, repo: str, revision: str = "main") -> str:
        """Commit of a branch."""
        return str(self.api.model_info(repo, revision=revision).sha)

    def content(self, repo: str, path: str, revision: str = "main") -> bytes:
        """A file as any reader gets it, by plain HTTP."""
        url = f"{self.hub.endpoint}/{repo}/resolve/{revision.replace('/', '%2F')}/{path}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _DropToken())
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.hub.token()}"})  # noqa: S310
        with opener.open(request, timeout=TIMEOUT) as response:
            return bytes(response.read())

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Everything that a reader of a branch sees; {} while there is no repo."""
        if not self.api.repo_exists(repo):
            return {}
        names = self.api.list_repo_files(repo, revision=revision)
        return {name: self.content(repo, name, revision) for name in names}

    def output(self, repo: str, revision: str = "main") -> dict[str, str]:
        """Digest of every file of an output, as `output_of` tells it of a folder; no secret is in its texts."""
        files = self.files(repo, revision)
        for name in BOOKKEEPING & files.keys():
            require_no_secrets(files[name].decode())
        return {name: sha256(data) for name, data in files.items() if name not in BOOKKEEPING}

    def state(self, repo: str) -> Any:
        """What a failed run must leave as it was: branches, pull requests and their commits; None without a repo."""
        if not self.api.repo_exists(repo):
            return None
        refs = self.api.list_repo_refs(repo, include_pull_requests=True)
        return sorted((ref.ref, ref.target_commit) for ref in [*refs.branches, *refs.tags, *(refs.pull_requests or [])])

    def log(self) -> list[Request]:
        """Requests since the last call."""
        return self.hub.log(clear=True)


class _DropToken(urllib.request.HTTPRedirectHandler):
    """Storage refuses a token beside a signature."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> Any:
        """The same request without its headers."""
        return urllib.request.Request(newurl)  # noqa: S310 - the server is ours


@contextmanager
def world(folder: Path, *, xet: bool) -> Iterator[World]:
    """A Hub that ends with the block."""
    disable_progress_bars()
    with DevHub(folder / "hub", xet=xet) as hub:
        yield World(hub, folder)


def program(verb: str, *words: object) -> list[str]:
    """Arguments of a client process."""
    return [sys.executable, "-m", "mso_hub.cli", verb, *map(str, words)]


def require_no_secrets(text: str) -> None:
    """Tokens and signatures stay where they are."""
    assert SECRETS.search(text) is None, text


def output_of(folder: Path) -> dict[str, str]:
    """Digest of every file of an output in a folder, apart from what a repo words differently."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: sha256(path.read_bytes()) for name, path in files.items() if name not in BOOKKEEPING}


def moved(log: Sequence[Request], method: str, repo: str) -> dict[str, int]:
    """File or SHA-256 -> bytes that the storage sent (GET) or took (PUT) for a repo."""
    found: dict[str, int] = {}
    for request in log:
        if request.origin == "storage" and request.method == method and f"/{repo}/" in request.path:
            name = request.path.partition(f"/{repo}/")[2].split("/")[-1 if method == "GET" else 0]
            found[name] = found.get(name, 0) + (request.bytes_out if method == "GET" else request.bytes_in)
    return found


def spans(log: Sequence[Request], repo: str) -> dict[str, list[tuple[int, int]]]:
    """File -> byte ranges that were asked for, from storage and from the Hub itself, sorted."""
    found: dict[str, list[tuple[int, int]]] = {}
    for request in log:
        if request.method == "GET" and request.range and f"/{repo}/" in request.path:
            first, _, last = request.range.removeprefix("bytes=").partition("-")
            found.setdefault(request.path.rpartition("/")[2], []).append((int(first), int(last) + 1))
    return {name: sorted(ranges) for name, ranges in found.items()}


def twice(ranges: Sequence[tuple[int, int]]) -> int:
    """Bytes that more than one of these sorted ranges holds."""
    end = again = 0
    for begin, stop in ranges:
        again += max(0, min(end, stop) - begin)
        end = max(end, stop)
    return again


# --- checkpoints --------------------------------------------------------------------------------------

HIDDEN = 128
COMPANIONS = {
    "README.md": b"---\nlicense: mit\nlanguage:\n- de\n---\n# A model\n",
    "tokenizer.json": b'{"model": {"vocab": {}}}',
    "extra/notes.md": b"carried along",
}


def llama(
    *, layers: int = 3, shards: int = 0, seed: int = 0, hidden: int = HIDDEN, more: bool = True
) -> dict[str, bytes]:
    """A dense Llama: `shards` of whole layers, or (0) layer 0 cut between gate and up, which share a scale.

    The last shard has nothing to quantize; `more` adds a tokenizer that is too large for git, a card and other texts.
    """
    parts: list[dict[str, tuple[int, ...]]] = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        parts.append(attention_shapes(prefix, hidden) | mlp_shapes(f"{prefix}.mlp", hidden, 2 * hidden))
    if not shards:
        names = [name for name in parts[0] if "up_proj" in name or "down_proj" in name]
        parts[1] |= {name: parts[0].pop(name) for name in names}
    last = {"model.embed_tokens": (8 * hidden, hidden), "model.norm": (hidden,), "lm_head": (8 * hidden, hidden)}
    parts.append(last)
    tensors = {
        f"model-{at:05}-of-{len(parts):05}.safetensors": weights(part, torch.bfloat16, seed)
        for at, part in enumerate(parts, 1)
    }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 2 * hidden,
        **base_config(hidden, layers, 8 * hidden, torch.bfloat16),
    }  # fmt: skip
    files = checkpoint_files(tensors, config)
    if more:
        files |= COMPANIONS | {"tokenizer.model": random_bytes(300_000, seed)}
    return files


def packed(*, experts: int = 6, seed: int = 0) -> dict[str, bytes]:
    """A mixture of experts in INT4 groups: one file holds all codes first and all scales behind them.

    The experts' weights are not tiny, so that codes and scales of a weight lie megabytes apart.
    """
    width, hidden = 256, 512
    tensors: dict[str, torch.Tensor] = {}
    for layer, expert in itertools.product(range(2), range(experts)):
        for kind, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            name = f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj"
            weight = random_tensor(*shape, dtype=torch.float32, seed=seed + len(tensors))
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in int4(weight).items()}
    dense = attention_shapes("model.layers.0", 64) | {"model.embed_tokens": (96, 64), "model.norm": (64,)}
    tensors |= weights(dense, torch.bfloat16, seed)
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group", "actorder": None}
    quantized = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}},
    }  # fmt: skip
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "quantization_config": quantized}
    return checkpoint_files(in_shards(dict(sorted(tensors.items())), 2), config)


def int4(weight: torch.Tensor, group: int = 32) -> dict[str, torch.Tensor]:
    """A weight in INT4 as compressed-tensors stores it."""
    blocks = weight.view(weight.shape[0], -1, group)
    scale = (blocks.abs().amax(-1) / 7).bfloat16()
    codes = (blocks / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8)
    return {
        "weight_packed": pack_to_int32(codes.view(weight.shape), 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def multimodal(seed: int = 0) -> dict[str, bytes]:
    """A LLaVA whose first shard is vision alone; the text in the second is renamed, so that no shard stays as it is."""
    text = attention_shapes("language_model.model.layers.0", HIDDEN)
    text |= mlp_shapes("language_model.model.layers.0.mlp", HIDDEN, 2 * HIDDEN)
    text |= {"language_model.model.embed_tokens": (96, HIDDEN), "language_model.model.norm": (HIDDEN,)}
    text["language_model.lm_head"] = (96, HIDDEN)
    vision: dict[str, tuple[int, ...]] = {f"vision_tower.layers.{at}.fc": (HIDDEN, 4 * HIDDEN) for at in range(4)}
    shapes = {"model-00001-of-00002.safetensors": vision, "model-00002-of-00002.safetensors": text}
    inner = base_config(HIDDEN, 1, 96, torch.bfloat16) | {"model_type": "llama", "intermediate_size": 2 * HIDDEN}
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": inner,
        "vision_config": {"model_type": "clip_vision_model"}, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shards = {name: weights(part, torch.bfloat16, seed) for name, part in shapes.items()}
    return checkpoint_files(shards, config) | {"preprocessor_config.json": b"{}", "tokenizer.json": b"{}"}


def random_bytes(nbytes: int, seed: int) -> bytes:
    """Bytes that are no text."""
    return random_tensor(nbytes // 2, seed=seed).view(torch.uint8).numpy().tobytes()


def local_output(files: Mapping[str, bytes], folder: Path, recipe: Recipe | None = None) -> dict[str, str]:
    """What a conversion from folder to folder makes of these files."""
    source = write_files(folder / f"in-{next(NUMBERS)}", files)
    convert(source, folder / f"{source.name}-out", recipe or Recipe())
    return output_of(folder / f"{source.name}-out")


# --- in this process ----------------------------------------------------------------------------------

QUICK = Patience(first=0.01, longest=0.05, total=20.0, silence=2.0)
"""Tests of failures end soon."""


def convert_here(place: World, source: str, target: str, patience: Patience = QUICK, **more: Any) -> list[Event]:
    """A conversion between two repos without a process of its own, and with another patience -> its events."""
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of httpx, about the client's own calls
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", not place.xet)
        patch.setenv("HF_XET_CACHE", str(place.home("here") / "xet"))
        patch.setenv("MSO_HUB_CACHE", str(place.home("here")))
        client = Client(place.hub.endpoint, place.hub.token(), patience=patience, on_event=events.append)
        opened = open_source(source, client=client)
        try:
            convert(
                opened, open_sink(target, client=client, target=HubTarget(**more)), Recipe(), card=True,
                on_event=events.append,
            )  # fmt: skip
        finally:
            opened.close()
    return events
