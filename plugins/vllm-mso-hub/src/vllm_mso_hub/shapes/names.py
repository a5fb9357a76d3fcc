"""Which checkpoint tensors belong to a parameter, learned from the copies that were seen.

vLLM fuses and renames: q, k and v become qkv_proj, 256 experts become one w13_weight. No table of names is kept here.
A parameter of layer 7 is made of what the same parameter of the other layers was made of, and its scales belong to the
same tensors as its weight.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

_Template = tuple[str, ...]


def split(name: str) -> tuple[_Template, tuple[int, ...]]:
    """A name without its numbers, and the numbers: layers.7.mlp -> (layers, #, mlp) and (7,)."""
    parts = name.split(".")
    return tuple("#" if part.isdigit() else part for part in parts), tuple(int(p) for p in parts if p.isdigit())


def _join(template: _Template, numbers: Iterable[int]) -> str:
    following = iter(numbers)
    return ".".join(str(next(following)) if part == "#" else part for part in template)


class Names:
    """What every parameter was made of, over all ranks: `copies` is parameter -> its checkpoint tensors.

    `experts` is their number in the configuration: an expert that is missing everywhere is known by nothing else.
    """

    def __init__(self, copies: Mapping[str, Iterable[str]], experts: int = 0) -> None:
        self._templates: dict[_Template, set[_Template]] = defaultdict(set)
        self._extra: dict[_Template, set[int]] = defaultdict(set)  # numbers that a tensor has and its parameter has not
        self._modules: dict[str, dict[str, set[str]]] = defaultdict(dict)
        prefixes: Counter[tuple[str, str]] = Counter()
        for parameter, tensors in copies.items():
            template, numbers = split(parameter)
            module, _, leaf = parameter.rpartition(".")
            self._modules[module][leaf] = set(tensors)
            for tensor in tensors:
                of_tensor, found = split(tensor)
                if found[: len(numbers)] == numbers and len(found) <= len(numbers) + 1:
                    self._templates[template].add(of_tensor)
                    self._extra[of_tensor].update(found[len(numbers) :])
                prefixes[_differing_heads(parameter, tensor)] += 1
        for extra in self._extra.values():
            if len(extra) > 1:
                extra.update(range(max(experts, max(extra) + 1)))
        self._heads = [heads for heads, _ in prefixes.most_common()]

    def tensors_of(self, parameter: str) -> list[str]:
        """Names of the checkpoint tensors that should be copied into a parameter, in order of their numbers."""
        template, numbers = split(parameter)
        found = self._like_neighbours(parameter)
        for of_tensor in self._templates.get(template, ()):
            if of_tensor.count("#") == len(numbers):
                found.add(_join(of_tensor, numbers))
            else:
                found.update(_join(of_tensor, (*numbers, extra)) for extra in self._extra[of_tensor])
        return sorted(found or {self._own(parameter)}, key=_natural)

    def _like_neighbours(self, parameter: str) -> set[str]:
        """w13_input_scale, from a neighbour w13_weight made of experts.0.gate_proj.weight: ...gate_proj.input_scale."""
        module, _, leaf = parameter.rpartition(".")
        found = set()
        for neighbour, tensors in self._modules.get(module, {}).items():
            for tensor in tensors:
                stem, _, tail = tensor.rpartition(".")
                start = neighbour.removesuffix(tail)
                if neighbour.endswith(tail) and leaf.startswith(start):
                    found.add(f"{stem}.{leaf[len(start) :]}")
        return found

    def _own(self, parameter: str) -> str:
        """The parameter's own name, with the head that the model's other tensors have in the checkpoint."""
        for of_parameter, of_tensor in self._heads:
            if parameter.startswith(of_parameter):
                return of_tensor + parameter[len(of_parameter) :]
        return parameter


def _differing_heads(parameter: str, tensor: str) -> tuple[str, str]:
    """language_model.model.norm.weight and model.norm.weight -> ("language_model.", "")."""
    ours, theirs = parameter.split("."), tensor.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
