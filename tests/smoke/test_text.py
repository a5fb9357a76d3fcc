"""A report as a person reads it: a line for each world, then every problem of each."""

from __future__ import annotations

from mso_hub.smoke.report import Problem, Refusal, ShapeReport, World
from mso_hub.smoke.text import first_problems, shape_text

LOST = Problem(
    "partial", "a.k_proj.weight_scale", "a.qkv_proj.weight_scale", (0, 1), "8,192 elements", "6,144", "Lost."
)
WHOLE = Problem("config", "", "", (0, 1, 2, 3), "", "", "4 heads cannot be divided by 8.")
ODD = Problem("load", "b.weight", "", (0, 2), "x", "y", "Odd.")
WORLDS = (
    World(tp=1, pp=1, ep=False, seconds=1.0, rank_bytes=(1536,), problems=()),
    World(tp=2, pp=1, ep=False, seconds=1.0, rank_bytes=(1000, 2000), problems=(LOST, ODD)),
    World(tp=8, pp=2, ep=True, seconds=1.0, rank_bytes=(), problems=(WHOLE,)),
)


def report(worlds: tuple[World, ...] = WORLDS, refused: Refusal | None = None) -> ShapeReport:
    return ShapeReport("org/x", 1234, "/py", "0.32.0", "2.13", "LlamaForCausalLM", 17.2, 6 * 10**8, worlds, refused)


def test_every_problem_has_its_tensor_ranks_and_sizes() -> None:
    assert shape_text(report()).splitlines() == [
        "org/x: LlamaForCausalLM, 1,234 tensors, asked vLLM 0.32.0 in 17 s",
        "tp 1            1.5 KB a rank            ok",
        "tp 2            1.0 KB to 2.0 KB a rank  2 problems",
        "tp 8, pp 2, ep                           1 problem",
        "",
        "PROBLEM tp 2, ranks 0-1: a.k_proj.weight_scale",
        "    expected 8,192 elements, found 6,144",
        "    Lost.",
        "PROBLEM tp 2, ranks 0 2: b.weight",
        "    expected x, found y",
        "    Odd.",
        "PROBLEM tp 8, pp 2, ep, ranks 0-3: config",
        "    4 heads cannot be divided by 8.",
    ]


def test_problems_that_differ_in_numbers_alone_are_told_once() -> None:
    """A bad export repeats itself in every layer, and at every size."""
    many = tuple(
        Problem("missing", f"layers.{n}.up.weight_scale", "", (0,), "128 elements", "0", f"{n} is lost.")
        for n in range(90)
    )
    worlds = tuple(World(tp=tp, pp=1, ep=False, seconds=1.0, rank_bytes=(1,), problems=many) for tp in (1, 2))
    assert shape_text(report(worlds)).splitlines()[4:] == [
        "PROBLEM tp 1, rank 0: layers.0.up.weight_scale",
        "    expected 128 elements, found 0",
        "    0 is lost.",
        "    and 179 more like it, of tp 1, tp 2 (all of them: --json)",
    ]


def test_a_proof_without_problems_is_as_short_as_its_worlds() -> None:
    assert shape_text(report(WORLDS[:1])).splitlines()[1:] == ["tp 1  1.5 KB a rank  ok"]
    assert report(WORLDS[:1]).ok
    assert not report().ok


def test_a_refusal_is_the_problem() -> None:
    refused = report((), Refusal("architecture", "vLLM has no XForCausalLM."))
    assert shape_text(refused).endswith("\nPROBLEM vLLM has no XForCausalLM.")
    assert first_problems(refused, 1) == ["vLLM has no XForCausalLM."]


def test_the_first_problems_say_how_many_there_are_more() -> None:
    assert first_problems(report(), 3) == [
        "tp 2: Lost.",
        "tp 2: Odd.",
        "tp 8, pp 2, ep: 4 heads cannot be divided by 8.",
    ]
    assert first_problems(report(), 1) == ["tp 2: Lost.", "and 2 more"]
