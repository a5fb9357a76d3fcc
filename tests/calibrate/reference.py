"""The whole model under transformers, watched from outside: what a walk must reproduce bit for bit.

Nothing of mso_hub is used. Hidden states come from forward hooks. What each stored matrix is multiplied with comes from
torch itself: every product of a forward is seen, and its weight is recognised by its bytes among the stored tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.helpers import tensors_of

PRODUCTS = {F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, torch.addmm, torch.mm}


@dataclass(slots=True)
class Truth:
    """What the whole model does with some batches.

    hidden  for each batch the output of every decoder layer
    logits  for each batch
    amax    stored module name -> largest magnitude that its matrix is multiplied with
    tokens  stored module name -> rows that it is multiplied with
    """

    hidden: list[list[Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    amax: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


def fingerprint(matrix: Tensor) -> bytes:
    """Of shape and bytes."""
    data = matrix.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(f"{list(matrix.shape)}".encode() + data).digest()


def stored_matrices(folder: Path) -> dict[bytes, str]:
    """Fingerprint of every stored matrix, and of every row of a stored 3-D tensor, both ways round -> module name."""
    found: dict[bytes, str] = {}
    for name, tensor in tensors_of(folder).items():
        module = name.removesuffix(".weight")
        matrices = {module: tensor} if tensor.dim() == 2 else {}
        if tensor.dim() == 3:
            matrices = {f"{module}[{row}]": tensor[row] for row in range(len(tensor))}
        for key, matrix in matrices.items():
            found[fingerprint(matrix)] = found[fingerprint(matrix.T)] = key
            if len(matrix) % 2 == 0:  # DeepSeek-V4 multiplies groups of channels with groups of rows
                found |= {fingerprint(half.T): key for half in matrix.chunk(2)}
    return found


class Products(TorchFunctionMode):
    """Sees every product and tells (module name, left side) of those with a stored matrix."""

    def __init__(self, stored: dict[bytes, str], seen: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._stored, self._seen = stored, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            left, right = (args[1], args[2]) if func is torch.addmm else args[:2]
            for x, matrix in self._pairs(left, right):
                for part in self._parts(matrix):
                    if part in self._stored:
                        self._seen(self._stored[part], x)
        return func(*args, **(kwargs or {}))

    def _pairs(self, left: Tensor, right: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        if right.dim() == 2:
            yield left, right
        elif right.dim() == 3 and left.dim() == 3:
            yield from zip(left, right, strict=True)

    def _parts(self, matrix: Tensor) -> Iterable[bytes]:
        """A matrix, or the two that lie in it one after the other."""
        yield fingerprint(matrix)
        for dim in (0, 1):
            if matrix.shape[dim] % 2 == 0:
                yield from (fingerprint(half) for half in matrix.chunk(2, dim))


def layers_of(model: Any) -> nn.ModuleList:
    """The list of decoder layers: the longest path that ends in `layers` or `h`, below the language model."""
    count = model.config.get_text_config().num_hidden_layers
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    name = next(n for n in lists if n.rpartition(".")[2] in ("layers", "h") and "vision" not in n)
    return lists[name]


def run_whole(folder: Path, cls: str, batches: list[Tensor], dtype: torch.dtype, attention: str | None) -> Truth:
    """Load the checkpoint as anybody would and run it."""
    import transformers

    more = {} if attention is None else {"attn_implementation": attention}
    load = getattr(transformers, cls).from_pretrained
    model = load(folder, dtype=dtype, experts_implementation="eager", **more).eval()
    for parameter in model.parameters():
        # A loaded parameter may lie anywhere in a mapped file; MKL's last bits depend on the alignment of what it gets.
        parameter.data = parameter.data.clone()
    truth = Truth()

    def seen(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[rows.abs().amax(-1) > 0]  # Llama-4 multiplies every token with every expert, most of them as zeros
        if len(rows):
            truth.amax[name] = max(truth.amax.get(name, 0.0), float(rows.abs().max()))
            truth.tokens[name] = truth.tokens.get(name, 0) + len(rows)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        truth.hidden[-1].append((output[0] if isinstance(output, tuple) else output).clone())

    for layer in layers_of(model):
        layer.register_forward_hook(keep)
    with torch.no_grad(), Products(stored_matrices(folder), seen):
        for batch in batches:
            truth.hidden.append([])
            truth.logits.append(model(input_ids=batch, use_cache=False).logits)
    return truth
