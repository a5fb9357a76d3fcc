"""Where scales can move: from what a linear layer gets into its columns, without a change in what the model computes.

    y = W x = (W diag(s)) (x / s)       x / s comes from dividing the norm, or the rows of the linear layer, before it

The table below says where that may be, by name. It is not believed: a fold counts only when the layer's output with
scales that are powers of two, which lose nothing, is the same bit for bit. So a norm that adds one to its weight, a
router that was forgotten or an activation in between cannot go wrong, they are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ATTENTION_NORMS = ("input_layernorm", "attention_norm", "operator_norm", "ln_1")
MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ffn_norm", "ln_2")
ATTENTION_INPUTS = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa", "wq_a", "in_proj_qkv", "in_proj_z",
     "in_proj_qkvz", "in_proj_ba", "in_proj_a", "in_proj_b")
)  # fmt: skip
MLP_INPUTS = frozenset(
    ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "gate", "router", "shared_expert_gate", "wg")
)
LATENTS = (("q_a_layernorm", "q_b_proj"), ("kv_a_layernorm", "kv_b_proj"))
CHAINS = (("up_proj", "down_proj"), ("w3", "w2"))
"""Linear layers of which the first one's output is multiplied with a gate and enters the second."""
MLP_PARENT = re.compile(r"mlp|feed_forward|block_sparse_moe|ffn")


@dataclass(frozen=True, slots=True)
class Slot:
    """Rows or columns of a stored tensor.

    tensor  its name, as a dense checkpoint calls it
    expert  number of the matrix in a stored 3-D tensor, None for others
    first   first of the rows of a producer
    """

    tensor: str
    expert: int | None = None
    first: int = 0

    @property
    def shown(self) -> str:
        """The linear layer, as a walk calls it."""
        name = self.tensor.removesuffix(".weight")
        return name if self.expert is None else f"{name}[{self.expert}]"


@dataclass(frozen=True, slots=True)
class Fold:
    """A place where scales can move.

    kind       folds of one kind in a layer are proven together
    name       of the fold
    size       scales: columns of the consumers
    producers  1-D tensors, or rows of matrices, that are divided
    consumers  matrices whose columns are multiplied
    norm       are the producers a norm's?
    """

    kind: str
    name: str
    size: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    norm: bool


def find_folds(layer: str, shapes: Mapping[str, tuple[int, ...]], *, norms_only: bool = False) -> list[Fold]:
    """Folds that the names of a decoder layer's tensors suggest.

    layer       stored prefix: `model.layers.3`
    shapes      stored tensor of the layer -> shape, as a dense checkpoint has it
    norms_only  without those between linear layers
    """
    found = [*_norm_folds(layer, shapes), *_latent_folds(shapes)]
    if not norms_only:
        found += [*_value_folds(shapes), *_chain_folds(shapes)]
    return found


def _norm_folds(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    for kind, norms, leaves in (("attention", ATTENTION_NORMS, ATTENTION_INPUTS), ("mlp", MLP_NORMS, MLP_INPUTS)):
        norm = next((f"{layer}.{n}.weight" for n in norms if f"{layer}.{n}.weight" in shapes), None)
        if norm is None or len(shapes[norm]) != 1:
            continue
        size = shapes[norm][0]
        consumers = [
            slot
            for name, shape in shapes.items()
            if _leaf(name) in leaves and (MLP_PARENT.search(_below(layer, name)) is not None) == (kind == "mlp")
            for slot in _columns(name, shape, size)
        ]
        if consumers:
            yield Fold(kind, norm.removesuffix(".weight"), size, _producer(norm, shapes), tuple(consumers), norm=True)


def _latent_folds(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    for name, shape in shapes.items():
        parent, leaf = _parent(name), _leaf(name)
        for norm, consumer in LATENTS:
            target = f"{parent}.{consumer}.weight"
            if leaf == norm and len(shape) == 1 and shapes.get(target, ())[1:] == shape:
                yield Fold(norm, f"{parent}.{norm}", shape[0], _producer(name, shapes), (Slot(target),), norm=True)


def _value_folds(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    """v -> o, where every query head has its own values."""
    for name, shape in shapes.items():
        target = f"{_parent(name)}.o_proj.weight"
        if _leaf(name) == "v_proj" and len(shape) == 2 and shapes.get(target, ())[1:] == shape[:1]:
            producer = _producer(name, shapes)
            yield Fold("values", name.removesuffix(".weight"), shape[0], producer, (Slot(target),), norm=False)


def _chain_folds(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    """up -> down, in every expert."""
    for name, shape in shapes.items():
        for first, second in CHAINS:
            target = f"{_parent(name)}.{second}.weight"
            if _leaf(name) == first and len(shape) == 2 and shapes.get(target, ())[1:] == shape[:1]:
                producer = _producer(name, shapes)
                yield Fold("chain", name.removesuffix(".weight"), shape[0], producer, (Slot(target),), norm=False)
        if _leaf(name) != "gate_up_proj" or len(shape) != 3:
            continue
        down = name.replace("gate_up_proj", "down_proj")
        experts, rows, _ = shape
        if len(shapes.get(down, ())) == 3 and 2 * shapes[down][2] == rows:
            for e in range(experts):
                slots = (Slot(name, e, rows // 2),), (Slot(down, e),)
                yield Fold("chain", f"{name}[{e}]", rows // 2, *slots, norm=False)


def _columns(name: str, shape: tuple[int, ...], size: int) -> list[Slot]:
    """The matrices of a tensor whose columns are as many as the scales; none where that is not plain."""
    if len(shape) == 2 and shape[1] == size:
        return [Slot(name)]
    if len(shape) == 3 and shape[2] == size != shape[1]:
        return [Slot(name, expert) for expert in range(shape[0])]
    return []


def _producer(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Slot, ...]:
    """A weight and its bias."""
    bias = f"{name.removesuffix('.weight')}.bias"
    return (Slot(name), Slot(bias)) if bias in shapes else (Slot(name),)


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _parent(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


def _below(layer: str, name: str) -> str:
    return name.removeprefix(layer)
