"""GPTQ, AWQ and SmoothQuant as arithmetic, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mso_hub.calibrate.methods.awq import candidates
from mso_hub.calibrate.methods.folds import find_folds
from mso_hub.calibrate.methods.gptq import Hessian, MethodSettings, factor, output_error, quantize
from mso_hub.calibrate.methods.grids import Grid, require_support
from mso_hub.calibrate.methods.scaled import exact_scales
from mso_hub.calibrate.methods.smooth import smoothing
from mso_hub.errors import NonFiniteError, PlanError, RecipeError
from mso_hub.formats import Format, Scheme, build

SCHEMES = [
    Scheme("w4a16", group_size=32),
    Scheme("w4a16", group_size=32, symmetric=False),
    Scheme("w4a16", group_size=0, search="absmax"),
    Scheme("w8a16", group_size=64),
    Scheme("w8a16", group_size=0, symmetric=False),
    Scheme("int8"),
    Scheme("mxfp4"),
    Scheme("nvfp4"),
    Scheme("nvfp4", search="four_over_six"),
]
NAMES = [f"{s.format} {s.group_size} {s.symmetric} {s.search}" for s in SCHEMES]


def form_of(scheme: Scheme, layout: str = "compressed-tensors") -> Format:
    """Its encoder."""
    found = build(scheme, layout)
    assert found is not None
    return found


def weight(rows: int = 64, columns: int = 128, seed: int = 0) -> torch.Tensor:
    """BF16 [rows, columns]."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def inputs(columns: int = 128, count: int = 4096) -> torch.Tensor:
    """Correlated, F32 [count, columns]: sixteen directions and a little noise, columns of different size."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return (mixed + torch.randn(count, columns, generator=generator)) * sizes


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    """H of inputs, added in two parts."""
    found = Hessian(x.shape[-1], x.device)
    found.add(x[:1000])
    found.add(x[1000:].reshape(2, -1, x.shape[-1]))
    return found.mean


def grid_of(form: Format, values: torch.Tensor) -> Grid:
    """Of one weight that is a unit by itself."""
    return Grid.build(form, values, "BF16", float(values.abs().max()))


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_codes_are_stored_as_the_format_stores_them(scheme: Scheme, layout: str) -> None:
    """What the format decodes is what the method thought that its codes stand for, bit for bit."""
    if layout == "modelopt" and scheme.format != "nvfp4":
        pytest.skip("this layout has NVFP4 only")
    form, w = form_of(scheme, layout), weight()
    grid = grid_of(form, w)
    size = w.shape[1] // grid.steps.shape[1]
    steps = grid.steps.repeat_interleave(size, 1)
    zeros = None if grid.zeros is None else grid.zeros.repeat_interleave(size, 1)
    codes, image = grid.nearest(w.float() * 1.2, steps, zeros)
    assert torch.equal(grid.decoded(grid.filled(codes), w.shape[1]), image)


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_without_correlation_codes_are_nearest(scheme: Scheme) -> None:
    """Nothing can be made up for then: GPTQ is rounding to nearest, under the encoder's scales the encoder's image."""
    form, w = form_of(scheme), weight()
    grid = grid_of(form, w)
    settings = MethodSettings()
    codes = quantize(w, factor(torch.eye(128), settings), grid, settings)
    assert torch.equal(grid.decoded(grid.filled(codes), 128), grid.decoded(grid.arrays, 128))


@pytest.mark.parametrize("actorder", ["static", "none"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_correlated_inputs_lose_less(scheme: Scheme, actorder: str) -> None:
    """At the same scales the output's error falls by a third at least."""
    form, w, h = form_of(scheme), weight(), hessian_of(inputs())
    grid, settings = grid_of(form, w), MethodSettings(actorder=actorder)
    codes = quantize(w, factor(h, settings), grid, settings)
    mine = output_error(w, grid.decoded(grid.filled(codes), 128), h)
    assert mine < 0.67 * output_error(w, grid.decoded(grid.arrays, 128), h)


def test_the_size_of_a_block_changes_nothing() -> None:
    """It is about speed: codes with blocks of 16, 100 and all columns are the same but for rounding."""
    form, w, h = form_of(Scheme("w4a16", group_size=32)), weight(), hessian_of(inputs())
    grid = grid_of(form, w)
    found = []
    for block in (16, 100, 128):
        settings = MethodSettings(block=block)
        found.append(quantize(w, factor(h, settings), grid, settings))
    assert (found[0] != found[2]).float().mean() < 0.01
    assert (found[1] != found[2]).float().mean() < 0.01


def test_errors_are_those_of_outputs() -> None:
    """Mean over inputs of the squared change of the output."""
    x, w = inputs(), weight()
    q = (w.float() * 1.01).bfloat16()
    there = ((x.double() @ (w.double() - q.double()).T) ** 2).sum(1).mean()
    assert output_error(w, q, hessian_of(x)) == pytest.approx(float(there), rel=1e-4)


def test_columns_that_are_never_used_become_zero() -> None:
    """Their inputs were always zero, so whatever their weights were does not matter, nor disturb the others."""
    x = inputs()
    x[:, 5] = 0
    form, w, settings = form_of(Scheme("w4a16", group_size=32)), weight(), MethodSettings()
    grid = grid_of(form, w)
    found = grid.decoded(grid.filled(quantize(w, factor(hessian_of(x), settings), grid, settings)), 128)
    assert not found[:, 5].any()
    assert found[:, 6].any()


def test_a_hessian_without_enough_inputs_is_damped() -> None:
    """Fewer inputs than columns: only the damping makes it invertible."""
    poor = Hessian(128, torch.device("cpu"))
    poor.add(inputs()[:20])
    assert int(torch.linalg.cholesky_ex(poor.mean)[1])  # not positive definite
    assert torch.isfinite(factor(poor.mean, MethodSettings()).inverse).all()


def test_what_is_not_finite_is_refused() -> None:
    """In inputs, and in weights."""
    broken = Hessian(4, torch.device("cpu"))
    broken.add(torch.tensor([[1.0, float("nan"), 0, 0]]))
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        _ = broken.mean
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        grid_of(form_of(Scheme("w4a16", group_size=32)), torch.full((8, 32), float("inf")))
    with pytest.raises(PlanError, match="cannot hold it"):
        Grid.build(form_of(Scheme("w4a16", group_size=32)), torch.full((8, 32), 1e30), "F16", 0.0)


def test_settings_that_cannot_work_are_refused() -> None:
    """Each with what it must be."""
    with pytest.raises(RecipeError, match="dampening_frac must be"):
        MethodSettings(dampening_frac=0)
    with pytest.raises(RecipeError, match="actorder must be one of static, none, got 'group'"):
        MethodSettings(actorder="group")
    with pytest.raises(RecipeError, match="least_rows must be"):
        MethodSettings(least_rows=0)
    with pytest.raises(RecipeError, match="--method gptq: fp8 has nothing"):
        require_support(form_of(Scheme("fp8")), "gptq")


def test_importance_spends_the_error_where_it_does_not_matter() -> None:
    """The weighted error falls in every format that searches, the plain one rises."""
    x = inputs()
    moment = x.double().square().mean(0).numpy()
    for scheme in (Scheme("w4a16", group_size=32), Scheme("nvfp4"), Scheme("mxfp4")):
        form, w = form_of(scheme), weight(512)
        amax = float(w.abs().max())
        plain, by_moment = grid_of(form, w), Grid.build(form, w, "BF16", amax, moment)
        lost = [(w.double() - g.decoded(g.arrays, 128).double()).square() for g in (plain, by_moment)]
        weighted = [float((part * torch.from_numpy(moment)).sum()) for part in lost]
        assert weighted[1] < weighted[0]
        assert lost[1].sum() > lost[0].sum()


def test_importance_of_ones_is_no_importance() -> None:
    """The same bytes for the floats; integers are fitted on, with no larger error."""
    for scheme in (Scheme("nvfp4"), Scheme("mxfp4")):
        form, w = form_of(scheme), weight()
        amax = float(w.abs().max())
        ones = Grid.build(form, w, "BF16", amax, np.ones(128))
        assert all(np.array_equal(a, b) for a, b in zip(ones.arrays, grid_of(form, w).arrays, strict=True))
    form, w = form_of(Scheme("w4a16", group_size=32)), weight()
    ones = Grid.build(form, w, "BF16", 0.0, np.ones(128))
    plain = grid_of(form, w)
    lost = [(w.double() - g.decoded(g.arrays, 128).double()).square().sum() for g in (ones, plain)]
    assert lost[0] <= lost[1]


@pytest.mark.parametrize("bad", [np.ones(127), -np.ones(128), np.full(128, np.nan)], ids=["short", "negative", "nan"])
def test_what_is_no_importance_is_refused(bad: NDArray[np.float64]) -> None:
    """The message says what it must be."""
    for scheme in (Scheme("w4a16", group_size=32), Scheme("nvfp4"), Scheme("mxfp4")):
        with pytest.raises(PlanError, match="importance must be 128 finite numbers >= 0"):
            Grid.build(form_of(scheme), weight(), "BF16", 3.0, bad)


def test_awq_tries_no_scale_first() -> None:
    """So that nothing gets worse; every candidate is positive and its ends are each other's reciprocals."""
    found = candidates(torch.rand(64).double() * 10, torch.rand(64).double())
    assert torch.equal(found[0], torch.ones(64).double())
    assert len(found) == 40
    for scales in found:
        assert (scales > 0).all()
        assert float(scales.max() * scales.min()) == pytest.approx(1)


def test_smoothquant_takes_the_outlier_out_of_the_activations() -> None:
    """With alpha 0.5 both sides get the same largest magnitude in every column."""
    a, m = torch.tensor([100.0, 1.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    scales = torch.from_numpy(smoothing(a, m, 0.5))
    assert scales.tolist() == [10, 1, 1, 1]
    assert torch.allclose((a / scales)[:2], (m * scales)[:2])
    assert smoothing(a, m, 1.0)[0] == 100


def test_a_norm_is_divided_without_rounding() -> None:
    """The scale is taken from what the norm's dtype can hold, so the consumers make up for all of it."""
    norm = np.array([1.5, -0.75, 2.0, 0.0], np.float32)
    scales = exact_scales(norm, np.array([1.37, 0.611, 1e-3, 3.0], np.float32), "BF16")
    assert np.allclose(scales[:3], [1.37, 0.611, 1e-3], rtol=2**-8)
    assert scales[3] == 1
    there = torch.from_numpy(norm / scales).bfloat16().float().numpy()
    assert np.allclose(there * scales, norm, rtol=2**-22)


def test_folds_are_found_by_name_and_shape() -> None:
    """Grouped query attention has fewer values than outputs, so nothing moves there."""
    layer = "model.layers.0"
    shapes = {
        f"{layer}.input_layernorm.weight": (64,), f"{layer}.post_attention_layernorm.weight": (64,),
        f"{layer}.self_attn.q_proj.weight": (64, 64), f"{layer}.self_attn.k_proj.weight": (32, 64),
        f"{layer}.self_attn.v_proj.weight": (32, 64), f"{layer}.self_attn.o_proj.weight": (64, 64),
        f"{layer}.mlp.gate.weight": (4, 64), f"{layer}.mlp.experts.gate_up_proj": (4, 48, 64),
        f"{layer}.mlp.experts.down_proj": (4, 64, 24),
    }  # fmt: skip
    found = {fold.name: fold for fold in find_folds(layer, shapes)}
    assert [s.tensor.rsplit(".", 2)[1] for s in found[f"{layer}.input_layernorm"].consumers] == [
        "q_proj", "k_proj", "v_proj",
    ]  # fmt: skip
    mlp = found[f"{layer}.post_attention_layernorm"].consumers
    assert len(mlp) == 5
    assert mlp[1].shown == f"{layer}.mlp.experts.gate_up_proj[0]"
    chain = found[f"{layer}.mlp.experts.gate_up_proj[3]"]
    assert (chain.producers[0].first, chain.size) == (24, 24)
    assert not any(fold.kind == "values" for fold in found.values())
    shapes[f"{layer}.self_attn.v_proj.weight"] = (64, 64)
    assert any(fold.kind == "values" for fold in find_folds(layer, shapes))
    assert not any(fold.kind == "values" for fold in find_folds(layer, shapes, norms_only=True))
