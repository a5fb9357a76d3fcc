"""What a plan changes, by kind of module: layer and expert numbers become N."""

from __future__ import annotations

from dataclasses import dataclass

from mso_hub.plan.planner import Plan


@dataclass(frozen=True, slots=True)
class Change:
    """Weights of one kind that get another form.

    kind           `model.layers.N.mlp.up_proj`
    becomes        scheme or dtype
    before, after  bytes
    """

    kind: str
    becomes: str
    count: int
    before: int
    after: int


def size(nbytes: float) -> str:
    """1536 -> `1.5 KB`, decimal units."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def kind_of(module: str) -> str:
    """`model.layers.3.mlp.experts.17.up_proj` -> `model.layers.N.mlp.experts.N.up_proj`."""
    return ".".join("N" if part.isdigit() else part for part in module.split("."))


def changes(plan: Plan) -> list[Change]:
    """One entry for each kind of module and each form that it gets, sorted."""
    found: dict[tuple[str, str], list[int]] = {}
    for step in (step for shard in plan.shards for step in shard.steps):
        if step.unit is None and step.weight.decoder is None:
            continue
        becomes = plan.recipe.scheme if step.unit else step.outputs[0].dtype
        row = found.setdefault((kind_of(step.weight.module), becomes), [0, 0, 0])
        row[0] += 1
        row[1] += step.weight.nbytes
        row[2] += sum(info.nbytes for info in step.outputs)
    return [Change(kind, becomes, *row) for (kind, becomes), row in sorted(found.items())]
