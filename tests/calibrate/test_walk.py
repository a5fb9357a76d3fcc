"""A walk goes on after a crash, spills to files, shares work between devices, and lets an observer change things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mso_hub.calibrate.cache import MemoryCache, State, flatten, rebuild
from mso_hub.calibrate.walk import Layer, Memory, Observer, Walk
from mso_hub.errors import MsoError, PlanError, RecipeError, ResumeError
from mso_hub.events import Event, LayerDone
from mso_hub.source import open_source
from tests.calibrate.architectures import quiet_transformers, save, token_ids

BATCHES = [token_ids(2, 12), token_ids(2, 12, 1), token_ids(1, 9, 2)]
THREADED = ["gemma4", "gemma3n", "glm_moe_dsa", "deepseek_v4"]
"""Models that hand more than hidden states from layer to layer."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without transformers' bars."""
    with quiet_transformers():
        yield


class Maxima(Observer):
    """Largest inputs."""

    def __init__(self) -> None:
        self.amax: dict[str, float] = {}
        self.layers: list[str] = []

    def begin_layer(self, layer: Layer) -> None:
        self.layers.append(layer.name)

    def inputs(self, module: str, x: Tensor) -> Tensor:
        self.amax[module] = max(self.amax.get(module, 0.0), float(x.abs().max()))
        return x


def run(walk: Walk, observer: Observer, start: State | None = None) -> list[Tensor]:
    """Final hidden states of all batches."""
    last: dict[int, Tensor] = {}
    walk.run(BATCHES, observer, start=start, logits=last.__setitem__)
    return [last[number].clone() for number in range(len(BATCHES))]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Crash(Maxima):
    """Fails when a layer begins."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._layer = layer

    def begin_layer(self, layer: Layer) -> None:
        super().begin_layer(layer)
        if layer.index == self._layer:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["qwen3_moe", *THREADED])
def test_a_run_goes_on_after_its_last_complete_layer(name: str, tmp_path: Path) -> None:
    source = open_source(save(name, tmp_path / "model"))
    whole = Maxima()
    wanted = run(Walk(source), whole)
    first, second = Crash(2), Maxima()
    with pytest.raises(KeyboardInterrupt):
        run(Walk(source), first, State(tmp_path / "state"))
    state = State(tmp_path / "state")
    assert state.layers_done == 2
    assert same(run(Walk(source), second, state), wanted)
    assert second.layers == whole.layers[2:]
    assert {k: max(first.amax.get(k, 0.0), second.amax.get(k, 0.0)) for k in whole.amax} == whole.amax
    assert [path.name for path in (tmp_path / "state").iterdir() if path.is_dir()] == [f"layer-{len(whole.layers) - 1}"]


KILLED = """
import sys
import os, signal
from mso_hub.calibrate.walk import Observer, State, Walk
from mso_hub.source import open_source
from tests.calibrate.test_walk import BATCHES

class Kill(Observer):
    def begin_layer(self, layer):
        if layer.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

Walk(open_source(sys.argv[1])).run(BATCHES, Kill(), start=State(sys.argv[2]))
"""


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    words = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "state")]
    done = subprocess.run(words, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = State(tmp_path / "state")
    assert state.layers_done == 1
    assert same(run(Walk(open_source(folder)), Observer(), state), run(Walk(open_source(folder)), Observer()))


def test_a_finished_state_only_makes_the_end_again(tmp_path: Path) -> None:
    walk = Walk(open_source(save("llama", tmp_path / "model")))
    wanted = run(walk, Observer(), State(tmp_path / "state"))
    again = Maxima()
    assert same(run(walk, again, State(tmp_path / "state")), wanted)
    assert (again.layers, set(again.amax)) == ([], {"lm_head"})


def test_a_state_of_other_text_is_refused(tmp_path: Path) -> None:
    walk = Walk(open_source(save("llama", tmp_path / "model")))
    walk.run(BATCHES[:1], Observer(), start=State(tmp_path / "state"))
    with pytest.raises(ResumeError, match="another model, text or dtype"):
        walk.run(BATCHES[1:2], Observer(), start=State(tmp_path / "state"))


def test_a_torn_state_says_which_file_is_missing(tmp_path: Path) -> None:
    walk = Walk(open_source(save("llama", tmp_path / "model")))
    with pytest.raises(KeyboardInterrupt):
        run(walk, Crash(1), State(tmp_path / "state"))
    (tmp_path / "state/layer-0/1.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"1\.safetensors: is missing"):
        run(walk, Observer(), State(tmp_path / "state"))


@pytest.mark.parametrize("name", ["qwen3_moe", *THREADED])
def test_outputs_go_to_files_when_memory_is_short(name: str, tmp_path: Path) -> None:
    source = open_source(save(name, tmp_path / "model"))
    wanted = run(Walk(source), Observer())
    least = Walk(source).needs(BATCHES).least
    (tmp_path / "work").mkdir()
    seen: list[int] = []

    class Look(Observer):
        def begin_layer(self, layer: Layer) -> None:
            seen.append(len(list((tmp_path / "work").rglob("*.safetensors"))))

    assert same(run(Walk(source, memory=Memory(cpu=least, work=tmp_path / "work")), Look()), wanted)
    assert set(seen[1:]) == {len(BATCHES)}
    assert not list((tmp_path / "work").iterdir())


def test_batches_share_memory_and_files(tmp_path: Path) -> None:
    """Those that fit stay in memory."""
    cache = MemoryCache(room=1000, work=tmp_path)
    small, large = torch.ones(100), torch.ones(1000)
    for layer in range(3):
        for number, tensor in enumerate((small, large, small)):
            cache.put(number, (tensor + layer, {}))
        cache.turn(layer)
        assert [float(cache.get(number)[0][0]) for number in range(3)] == [1.0 + layer] * 3
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    cache.close()
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_before_anything_is_read(tmp_path: Path) -> None:
    walk = Walk(open_source(save("qwen3_moe", tmp_path)), memory=Memory(cpu=1 << 20))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(PlanError, match=r"max_cpu_memory: decoder layer \d needs [\d,]+ MiB: .* the limit is 1 MiB"):
        run(walk, Observer())


def test_what_experts_take_depends_on_how_they_are_read(tmp_path: Path) -> None:
    source = open_source(save("mixtral", tmp_path))
    one, all_of_them = (Walk(source, experts=mode).needs(BATCHES).layer for mode in ("expert", "stack"))
    expert = 4 * 3 * 48 * 32
    assert all_of_them - one == 2 * 6 * expert - expert


def test_experts_are_kept_as_far_as_memory_goes(tmp_path: Path) -> None:
    """With room for two of twelve experts, those two are read once and the others for every batch."""
    from mso_hub.calibrate.shelf import kept

    reads: list[str] = []

    def read(name: str, row: int | None) -> Tensor:
        reads.append(name)
        return torch.ones(10)

    first = kept(read, 85)
    for _ in range(3):
        assert all(bool((first(name, None) == 1).all()) for name in "abc")
    assert reads == ["a", "b", "c", "c", "c"]
    source = open_source(save("mixtral", tmp_path, torch.bfloat16))
    roomy = Walk(source, memory=Memory(cpu=Walk(source).needs(BATCHES).total + (1 << 20)))
    assert same(run(roomy, Observer()), run(Walk(source), Observer()))


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu one", "no name of a device"), ("cuda:99", "'cuda:99' is not there"), ([], "needs at least one device")],
)
def test_a_device_must_exist(device: str | list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        Walk(open_source(tmp_path), device=device)


def test_two_devices_share_the_batches(tmp_path: Path) -> None:
    source = open_source(save("qwen3_moe", tmp_path, torch.bfloat16))
    alone, shared = Maxima(), Maxima()
    wanted = run(Walk(source), alone)
    assert same(run(Walk(source, device=["cpu", "cpu"]), shared), wanted)
    assert shared.amax == alone.amax
    shared = Maxima()
    assert same(run(Walk(source, device=["cpu", "cpu"], experts="stack"), shared), wanted)
    assert shared.amax == alone.amax


class Double(Observer):
    """Doubles one weight on its way."""

    def __init__(self, module: str) -> None:
        self._module = module

    def weight(self, module: str, w: Tensor) -> Tensor:
        return w * 2 if module == self._module else w


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("qwen3_moe", "model.layers.0.mlp.experts.2.up_proj"),
        ("qwen3_moe", "model.layers.2.self_attn.k_proj"),
        ("gpt2", "transformer.h.1.mlp.c_fc"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.0.w3"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj[3]"),
        ("llama4", "model.layers.0.feed_forward.experts.gate_up_proj[1]"),
    ],
)
@pytest.mark.parametrize("experts", ["expert", "stack"])
def test_a_weight_that_the_observer_replaces_is_as_if_it_were_stored(
    name: str, module: str, experts: str, tmp_path: Path
) -> None:
    folder = save(name, tmp_path)
    before = run(Walk(open_source(folder), experts=experts), Observer())
    changed = run(Walk(open_source(folder), experts=experts), Double(module))
    tensors = load_file(folder / "model.safetensors")
    if "[" in module:
        stem, row = module.removesuffix("]").split("[")
        tensors[stem][int(row)] *= 2
    else:
        tensors[f"{module}.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert same(changed, run(Walk(open_source(folder), experts=experts), Observer()))
    assert not same(changed, before)


class Halve(Observer):
    """Halves what some linears get."""

    def __init__(self, end: str) -> None:
        self._end = end

    def inputs(self, module: str, x: Tensor) -> Tensor:
        return x * 0.5 if module.endswith(self._end) else x


@pytest.mark.parametrize("experts", ["expert", "stack"])
def test_what_the_observer_returns_is_multiplied(experts: str, tmp_path: Path) -> None:
    """Half the input is half the weight, exactly: powers of two. Also for one of two that are fused in memory."""
    folder = save("qwen3_moe", tmp_path)
    halved = run(Walk(open_source(folder), experts=experts), Halve("up_proj"))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t * 0.5 if name.endswith("up_proj.weight") else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert same(halved, run(Walk(open_source(folder), experts=experts), Observer()))


class Rewrite(Observer):
    """Doubles a weight when the layer has been seen, as GPTQ does."""

    changes_weights = True

    def __init__(self) -> None:
        self.seen = 0
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def inputs(self, module: str, x: Tensor) -> Tensor:
        self.seen += x.shape[:-1].numel() if module == "model.layers.1.self_attn.o_proj" else 0
        return x

    def end_layer(self, layer: Layer) -> bool:
        if layer.index != 1:
            return False
        self.before = [layer.forward(number) for number in range(len(BATCHES))]
        (weight,) = layer.linears["model.layers.1.self_attn.o_proj"].parameters()
        weight.data *= 2
        self.after = [layer.forward(number) for number in range(len(BATCHES))]
        return True


@pytest.mark.parametrize("device", ["cpu", ["cpu", "cpu"]])
def test_outputs_are_those_of_the_changed_weights(device: str | list[str], tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path)
    rewrite = Rewrite()
    changed = run(Walk(open_source(folder), device=device), rewrite)
    assert rewrite.seen == sum(batch.numel() for batch in BATCHES)  # once, not in the second pass
    assert not same(rewrite.before, rewrite.after)
    assert same(changed, run(Walk(open_source(folder)), Double("model.layers.1.self_attn.o_proj")))


def test_an_observer_that_changes_weights_must_say_so(tmp_path: Path) -> None:
    class Silent(Observer):
        def end_layer(self, layer: Layer) -> bool:
            return True

    with pytest.raises(PlanError, match="must set changes_weights"):
        run(Walk(open_source(save("llama", tmp_path))), Silent())


def test_inputs_of_a_layer_are_gone_when_it_has_ended(tmp_path: Path) -> None:
    class Late(Observer):
        def end_layer(self, layer: Layer) -> bool:
            layer.forward(0)
            return False

    with pytest.raises(PlanError, match="its inputs are gone"):
        run(Walk(open_source(save("llama", tmp_path))), Late())


def test_events_tell_every_layer(tmp_path: Path) -> None:
    events: list[Event] = []
    run(Walk(open_source(save("llama", tmp_path)), on_event=events.append), Observer())
    found = [(e.index, e.layers, e.tokens) for e in events if isinstance(e, LayerDone)]
    assert found == [(index, 3, 57) for index in range(3)]


def test_the_head_may_be_watched(tmp_path: Path) -> None:
    walk = Walk(open_source(save("llama", tmp_path)))
    hidden = run(walk, Observer())[0]
    (plain,), (double,) = list(walk.head(hidden)), list(walk.head(hidden, Double("lm_head")))
    assert torch.equal(plain * 2, double)
    assert torch.equal(plain, next(walk.head(hidden)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.int32),
            r"batches\[0\]: must be token ids I64 \[rows, length\], got torch.int32",
        ),
        (torch.full((1, 4), 96), r"holds the token id 96, the model's embedding has 96 rows"),
        (torch.zeros(0, 4, dtype=torch.int64), r"got torch.int64 \[0, 4\]"),
    ],
)
def test_token_ids_are_checked(ids: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        Walk(open_source(save("llama", tmp_path))).run([ids], Observer())


def test_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no text"):
        Walk(open_source(save("llama", tmp_path))).run([], Observer())


def test_nests_survive_flattening() -> None:
    tree = (torch.ones(2), [None, 3, "x"], {1: torch.zeros(1), "k": (True,)})
    tensors: list[Tensor] = []
    shape = flatten(tree, tensors)
    again = rebuild(shape, tensors)
    assert again[1:] == tree[1:]
    assert torch.equal(again[0], tree[0])
    with pytest.raises(MsoError, match="hands on a set"):
        flatten({1, 2}, [])
