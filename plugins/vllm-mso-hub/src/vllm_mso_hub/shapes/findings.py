"""What the ranks of one world did -> what is wrong, one Problem per finding, with the checkpoint tensor's name.

Nothing is reported twice: a tensor that vLLM refused is the finding, and the parameter that it left unwritten is not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_mso_hub.job import Header, Problem
from vllm_mso_hub.shapes.names import Names, split
from vllm_mso_hub.shapes.rank import Parameter, Rank
from vllm_mso_hub.track import Reads, read_elements


@dataclass(frozen=True, slots=True)
class Facts:
    """What the findings are read from.

    headers       of the checkpoint, by name
    experts       routed experts of a layer, 0 for a dense model
    may_be_left   whether a healthy model leaves this tensor unread
    """

    tp: int
    ranks: Sequence[Rank]
    headers: Mapping[str, Header]
    experts: int
    reads: Reads
    may_be_left: Callable[[str], bool]


def problems_of(facts: Facts) -> list[Problem]:
    """All findings of a world, those of several ranks as one, in the order of the checkpoint."""
    found = [*_failed(facts), *_refused(facts)]
    if not any(rank.failed or rank.aborted for rank in facts.ranks):
        found += _unwritten(facts, Names(_copies(facts.ranks), facts.experts))
        known = {problem.tensor for problem in found}
        found += [problem for problem in (*_unread(facts), *_changed(facts)) if problem.tensor not in known]
    order = {name: place for place, name in enumerate(facts.headers)}
    return sorted(_merged(found), key=lambda problem: order.get(problem.tensor, len(order)))


def _merged(problems: Iterable[Problem]) -> list[Problem]:
    merged: dict[Problem, set[int]] = defaultdict(set)
    for problem in problems:
        merged[replace(problem, ranks=())].update(problem.ranks)
    return [replace(problem, ranks=tuple(sorted(ranks))) for problem, ranks in merged.items()]


def _copies(ranks: Iterable[Rank]) -> dict[str, set[str]]:
    copies: dict[str, set[str]] = defaultdict(set)
    for rank in ranks:
        for name, parameter in rank.parameters.items():
            copies[name].update(parameter.sources)
    return copies


def _failed(facts: Facts) -> Iterable[Problem]:
    for rank in facts.ranks:
        if rank.failed is not None:
            kind, text = rank.failed
            yield Problem(kind, "", "", (rank.rank,), "a model", text, f"vLLM cannot build the model: {text}")


def _refused(facts: Facts) -> Iterable[Problem]:
    """One problem per tensor, with the words of the first rank: what differs on the others are offsets."""
    ranks: dict[str, list[int]] = defaultdict(list)
    texts: dict[str, str] = {}
    for rank in facts.ranks:
        for tensor, text in rank.refused.items():
            ranks[tensor].append(rank.rank)
            texts.setdefault(tensor, text)
    alike = _alike(facts) if texts else {}
    for tensor, text in texts.items():
        header = facts.headers.get(tensor)
        if header is None:
            message = f"vLLM stops while it loads the checkpoint: {text}"
            yield Problem("load", "", "", tuple(ranks[tensor]), "a checkpoint that vLLM loads", text, message)
            continue
        others = alike[split(tensor)[0]] - Counter([_stored(header)])
        usual = others.most_common(1)[0][0] if others else _stored(header)
        expected = "a tensor that vLLM loads" if usual == _stored(header) else f"{usual}, as in other layers"
        message = f"vLLM does not load {tensor} ({_stored(header)}, expected {expected}): {text}"
        yield Problem("load", tensor, "", tuple(ranks[tensor]), expected, _stored(header), message)


def _alike(facts: Facts) -> dict[tuple[str, ...], Counter[str]]:
    """How tensors with the same name but for its numbers are stored, and how many of them."""
    alike: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for name, header in facts.headers.items():
        alike[split(name)[0]][_stored(header)] += 1
    return alike


def _stored(header: Header) -> str:
    return f"{header.dtype} {list(header.shape)}"


def _unwritten(facts: Facts, names: Names) -> Iterable[Problem]:
    refused = {tensor for rank in facts.ranks for tensor in rank.refused}
    for rank in facts.ranks:
        for name, parameter in rank.parameters.items():
            if parameter.optional or (parameter.written >= parameter.numel and parameter.numel):
                continue
            wanted = names.tensors_of(name)
            if parameter.numel == 0:
                yield from _empty(facts, rank, name, parameter, wanted)
            elif not _explained(name, wanted, refused):
                yield from _incomplete(facts, rank, name, parameter, wanted)


def _explained(parameter: str, wanted: Iterable[str], refused: set[str]) -> bool:
    """Whether a refused tensor is why: one that belongs to the parameter, or one of the same layer if none is known."""
    if refused.intersection(wanted):
        return True
    _, numbers = split(parameter)
    known = [tensor for tensor in refused if tensor.rpartition(".")[2] == parameter.rpartition(".")[2]]
    return any(split(tensor)[1][: len(numbers)] == numbers for tensor in known)


def _empty(facts: Facts, rank: Rank, name: str, parameter: Parameter, wanted: Iterable[str]) -> Iterable[Problem]:
    for tensor in wanted:
        header = facts.headers.get(tensor)
        if header is not None and 0 not in header.shape:
            shape = list(header.shape)
            yield Problem(
                "empty",
                tensor,
                name,
                (rank.rank,),
                "at least one group per rank",
                f"shape {list(parameter.shape)}",
                f"{tensor} {shape} has no group left for a rank at tensor-parallel size {facts.tp}: a group is larger "
                "than the rank's share of the columns; use a smaller tensor-parallel size or a smaller group size",
            )


def _incomplete(facts: Facts, rank: Rank, name: str, parameter: Parameter, wanted: list[str]) -> Iterable[Problem]:
    kind = "partial" if parameter.written else "missing"
    expected, found = f"{_elements(parameter.numel)} written", f"{parameter.written:,}"
    missing = [tensor for tensor in wanted if tensor not in facts.headers]
    for tensor in missing:
        message = (
            f"{tensor} is missing: {found} of the {parameter.numel:,} elements of vLLM's {name} are written, and vLLM "
            "serves the rest as it happens to be"
        )
        yield Problem(kind, tensor, name, (rank.rank,), expected, found, message)
    short = _short(parameter)
    for tensor, (filled, usual) in short.items():
        shape = list(facts.headers[tensor].shape)
        message = f"{tensor} {shape} is too small: it fills {filled:,} of the {usual:,} elements it has in {name}"
        yield Problem("partial", tensor, name, (rank.rank,), f"{_elements(usual)} written", f"{filled:,}", message)
    if not missing and not short:
        tensor = next(iter(parameter.sources), wanted[0])
        message = f"{name} {list(parameter.shape)} is not filled by {tensor}: {found} of {parameter.numel:,} elements"
        yield Problem(kind, tensor, name, (rank.rank,), expected, found, message)


def _short(parameter: Parameter) -> dict[str, tuple[int, int]]:
    """Tensors that fill less of a parameter than others of their kind: tensor -> (elements, elements of the others)."""
    usual: dict[tuple[str, ...], int] = {}
    for tensor, filled in parameter.sources.items():
        template, _ = split(tensor)
        usual[template] = max(usual.get(template, 0), filled)
    return {
        tensor: (filled, usual[split(tensor)[0]])
        for tensor, filled in parameter.sources.items()
        if filled < usual[split(tensor)[0]]
    }


def _unread(facts: Facts) -> Iterable[Problem]:
    ranks = tuple(rank.rank for rank in facts.ranks)
    for name, header in facts.headers.items():
        if 0 in header.shape:
            continue
        numel = _numel(header)
        read = read_elements(facts.reads.get(name, {}), numel)
        if read == numel:
            continue
        shape = list(header.shape)
        if read:
            fits = _fits(header, facts.tp)
            message = f"vLLM reads only {read:,} of the {numel:,} elements of {name} {shape}: {fits}"
            yield Problem("unread", name, "", ranks, f"{_elements(numel)} read", f"{read:,}", message)
        elif not facts.may_be_left(name):
            message = f"vLLM never reads {name} {shape}: nothing of the model is made of it"
            yield Problem("ignored", name, "", ranks, f"{_elements(numel)} read", "0", message)


def _fits(header: Header, tp: int) -> str:
    uneven = [size for size in header.shape if size > 1 and size % tp]
    if tp == 1 or not uneven:
        return "it is larger than the parameter it is copied into"
    sizes = [str(n) for n in range(1, tp) if all(size % n == 0 for size in uneven)]
    return f"{uneven[-1]} does not divide by {tp} ranks; sizes that fit are {', '.join(sizes)}"


def _elements(count: int) -> str:
    return f"{count:,} element{'' if count == 1 else 's'}"


def _numel(header: Header) -> int:
    numel = 1
    for size in header.shape:
        numel *= size
    return numel


def _changed(facts: Facts) -> Iterable[Problem]:
    for rank in facts.ranks:
        for cast in rank.casts:
            if cast.tensor.endswith((".weight_shape", ".g_idx")):
                continue
            stored, wanted = str(cast.stored).removeprefix("torch."), str(cast.wanted).removeprefix("torch.")
            message = (
                f"{cast.tensor} is stored as {stored} but vLLM's {cast.parameter} is {wanted}, and vLLM converts the "
                "values without a word: either the tensor or quantization_config is wrong about how it is stored"
            )
            yield Problem("cast", cast.tensor, cast.parameter, (rank.rank,), wanted, stored, message)
        for copy in rank.broadcasts:
            stored, filled = str(list(copy.stored)), str(list(copy.filled))
            message = f"{copy.tensor} {stored} is repeated to fill {filled} of {copy.parameter}"
            yield Problem("broadcast", copy.tensor, copy.parameter, (rank.rank,), filled, stored, message)
