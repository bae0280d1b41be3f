"""Importance sampling against an inverse CDF by brute force, and against a fine march."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from test_neus import CPU, DONE, GREEN, rays_along_z, sphere_model, three_views
from torch import Tensor

from models.marching.importance import place_by_importance
from models.neus import NeuS
from models.opacity import DENSITIES, DensityName
from utils.types import Budget, RaySamples, RenderOutput

STEP = 0.02


def packed(middles: list[list[float]], served: list[bool] | None = None, padding: int = 0) -> RaySamples:
    """Samples of one step each at these distances along each ray."""
    flat = torch.tensor([middle for ray in middles for middle in ray] + [0.0] * padding)
    is_row = torch.arange(len(flat)) < len(flat) - padding
    counts = torch.tensor([len(ray) for ray in middles])
    indices = torch.repeat_interleave(torch.arange(len(middles)), counts)
    return RaySamples(
        torch.where(is_row, flat - 0.5 * STEP, 0.0),
        torch.where(is_row, flat + 0.5 * STEP, 0.0),
        torch.cat([indices, torch.zeros(padding, dtype=torch.int64)]),
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        None if served is None else torch.tensor(served),
    )


def stretch(first: float, count: int) -> list[float]:
    return [first + (k + 0.5) * STEP for k in range(count)]


def place(
    samples: RaySamples,
    sdf: Tensor,
    count: int,
    *,
    inv_s: float = 50.0,
    jitter: Tensor | None = None,
    density: DensityName = "neus",
    capacity: int | None = None,
) -> RaySamples:
    num_rays = len(samples.offsets) - 1
    jitter = torch.full((num_rays,), 0.5) if jitter is None else jitter
    sharpness = torch.tensor(inv_s)
    return place_by_importance(samples, sdf, sharpness, jitter, count, density, "cpu", capacity)


def of_ray(samples: RaySamples, ray: int) -> list[tuple[float, float]]:
    chosen = slice(int(samples.offsets[ray]), int(samples.offsets[ray + 1]))
    return list(zip(samples.t_starts[chosen].tolist(), samples.t_ends[chosen].tolist(), strict=True))


# Quantiles


def opacity_of_line(t: Tensor, zero: float, slope: float, inv_s: float, start: float) -> Tensor:
    """What a ray from ``start`` has lost at t to NeuS's density of the distances slope (t - zero)."""
    profile = torch.sigmoid(inv_s * slope * (torch.cat([torch.tensor([start]).double(), t]) - zero))
    return 1 - profile[1:] / profile[0]


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("inv_s", [40.0, 3000.0])
def test_edges_are_quantiles(inv_s: float, shift: float) -> None:
    """Two rays onto planes: brute force searches a million distances for where the mass is gathered."""
    lines, num_coarse, count = [(0.71, -1.0), (0.537, -0.4)], 60, 8
    samples = packed([stretch(0.1, num_coarse)] * 2)
    zeros, slopes = (
        torch.tensor(column).repeat_interleave(num_coarse) for column in zip(*lines, strict=True)
    )
    sdf = slopes * (samples.t_middle - zeros)
    placed = place(samples, sdf, count, inv_s=inv_s, jitter=torch.full((2,), shift))
    t = torch.linspace(0.1, 0.1 + num_coarse * STEP, 1_000_001, dtype=torch.float64)
    for ray, (zero, slope) in enumerate(lines):
        mass = opacity_of_line(t, zero, slope, inv_s, 0.1) + 1e-5 * (t - 0.1) / STEP
        shares = (torch.arange(1, count) + shift - 0.5) / count
        expected = t[torch.searchsorted(mass / mass[-1], shares.double())]
        intervals = torch.tensor(of_ray(placed, ray), dtype=torch.float64)
        assert intervals.shape == (count, 2)
        # The halving ends at a step / 2^11; coarse samples touch to within roundings.
        torch.testing.assert_close(intervals[1:, 0], expected, atol=STEP / 2**11 + 1e-6, rtol=0)
        torch.testing.assert_close(intervals[:-1, 1], expected, atol=STEP / 2**11 + 1e-6, rtol=0)


def test_volsdf_edges_hold_equal_shares() -> None:
    """Deep inside, a Laplace density of 1 / beta: intervals end where e^(-t / beta) is 3/4, 2/4, 1/4."""
    samples = packed([stretch(0.0, 30)])
    placed = place(samples, torch.full((30,), -1.0), 4, inv_s=20.0, density="volsdf")
    edges = [end for _, end in of_ray(placed, 0)][:-1]
    assert edges == pytest.approx([-math.log(1 - k / 4) / 20 for k in (1, 2, 3)], abs=2e-4)


@pytest.mark.parametrize("density", DENSITIES)
def test_samples_gather_at_a_sharp_plane(density: DensityName) -> None:
    """A density twenty times thinner than a step, wherever in its step the plane lies."""
    inv_s, zeros = 1000.0, [0.5 + part * STEP for part in (0.0, 0.17, 0.5, 0.83)]
    samples = packed([stretch(0.0, 50)] * 4)
    sdf = torch.tensor(zeros).repeat_interleave(50) - samples.t_middle
    placed = place(samples, sdf, 16, inv_s=inv_s, density=density)
    away = (placed.t_middle.view(4, 16) - torch.tensor(zeros)[:, None]).abs() * inv_s
    if density == "neus":
        assert (away[:, 1:-1] < 5).all()
        assert (away < 25).all()
    else:  # VolSDF's light may go on behind the plane: its coarse opacity is that of the sample's middle.
        assert (away < 2 * STEP * inv_s).all()


# Gaps and tails


def test_no_interval_crosses_a_gap() -> None:
    """Two sheets of glass with skipped cells between and around them, at every jitter."""
    stretches = [(0.1, 4), (0.5, 7), (0.9, 6), (1.4, 3)]
    num_rays = 40
    samples = packed([[t for start in stretches for t in stretch(*start)]] * num_rays)
    sdf = torch.tensor([0.2] * 4 + [0.04, 0.02, 0.01, 0.005, 0.01, 0.02, 0.04] * 1 + [0.02, 0.0, -0.02] * 2)
    sdf = torch.cat([sdf, torch.tensor([-0.3] * 3)]).repeat(num_rays)
    placed = place(samples, sdf, 9, jitter=torch.linspace(0, 0.99, num_rays))
    assert placed.offsets.diff().tolist() == [9] * num_rays
    for ray in range(num_rays):
        intervals = of_ray(placed, ray)
        for start, end in intervals:
            assert any(s - 1e-5 <= start <= end <= s + n * STEP + 1e-5 for s, n in stretches), (start, end)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(intervals))


@pytest.mark.parametrize("inv_s", [20.0, 100.0])
def test_tails_end_where_the_light_does(inv_s: float) -> None:
    """A wide density with much empty space on both sides: nothing far longer than it is wide."""
    samples = packed([stretch(0.0, 100)])
    middles = samples.t_middle
    # A ray past the middle of a ball: falling up to 1.2, and rising from there on.
    placed = place(samples, (middles - 1.2).abs() - 0.2, 8, inv_s=inv_s)
    intervals = of_ray(placed, 0)
    assert all(end - start <= max(2 * STEP, 6 / inv_s) + 1e-5 for start, end in intervals)
    assert intervals[-1][1] <= 1.2 + STEP
    assert all(1.0 - 12 / inv_s < start < 1.2 for start, _ in intervals)


def test_rays_without_a_surface_are_covered() -> None:
    samples = packed([stretch(0.0, 64)])
    placed = place(samples, torch.full((64,), 1.0), 16, inv_s=1000.0)
    middles = placed.t_middle
    # Equal parts of the ray, one sample somewhere in each.
    parts = (middles / (64 * STEP / 16)).long()
    assert parts.tolist() == list(range(16))


# Packing


def test_rays_without_samples_stay_without() -> None:
    samples = packed([[], stretch(0.3, 20), [], stretch(0.1, 30), []])
    sdf = 0.5 - samples.t_middle
    placed = place(samples, sdf, 5)
    assert placed.is_served is None
    assert placed.offsets.tolist() == [0, 0, 5, 5, 10, 10]
    assert placed.ray_indices.tolist() == [1] * 5 + [3] * 5
    for ray, middles in ((1, stretch(0.3, 20)), (3, stretch(0.1, 30))):
        alone = packed([middles])
        expected = place(alone, 0.5 - alone.t_middle, 5)
        torch.testing.assert_close(torch.tensor(of_ray(placed, ray)), torch.tensor(of_ray(expected, 0)))
    empty = packed([[], []])
    assert len(place(empty, torch.zeros(0), 5)) == 0


@pytest.mark.parametrize(
    ("capacity", "offsets", "is_served"),
    [
        (17, [0, 0, 5, 10, 10], [True, True, True, False]),
        (10, [0, 0, 5, 10, 10], [True, True, True, False]),
        (9, [0, 0, 5, 5, 5], [True, True, False, False]),
        (3, [0, 0, 0, 0, 0], [True, False, False, False]),
    ],
)
def test_a_fixed_capacity(capacity: int, offsets: list[int], is_served: list[bool]) -> None:
    """The last ray has not been served by the march; of the others only those that fit are."""
    rays = [[], stretch(0.3, 20), stretch(0.1, 30), []]
    samples = packed(rays, [True, True, True, False], padding=7)
    sdf = torch.where(torch.arange(57) < 50, 0.5 - samples.t_middle, 0.0)
    placed = place(samples, sdf, 5, capacity=capacity)
    assert len(placed) == capacity
    assert placed.offsets.tolist() == offsets
    assert placed.is_served is not None
    assert placed.is_served.tolist() == is_served
    filled = offsets[-1]
    free = place(packed(rays), sdf[:50], 5)
    for column in fields(RaySamples)[:3]:
        values = getattr(placed, column.name)
        assert torch.equal(values[:filled], getattr(free, column.name)[:filled])
        assert not values[filled:].any()


def test_padding_belongs_to_no_ray() -> None:
    """Padding lies on ray 0 at distance 0, where a ray with a sample at its very start would take it in."""
    rays = [[0.5 * STEP]]
    placed = place(packed(rays, [True], padding=3), torch.tensor([0.01, 0.0, 0.0, 0.0]), 2, capacity=4)
    expected = place(packed(rays), torch.tensor([0.01]), 2)
    assert of_ray(placed, 0) == of_ray(expected, 0)
    assert placed.offsets.tolist() == [0, 2]


@pytest.mark.parametrize("poison", ["sdf", "inv_s"])
def test_bad_numbers_do_not_spread(poison: str) -> None:
    samples = packed([stretch(0.3, 20)] * 3)
    sdf = 0.5 - samples.t_middle
    good = place(samples, sdf, 5)
    if poison == "sdf":
        sdf[23] = math.nan
    placed = place(samples, sdf, 5, inv_s=math.nan if poison == "inv_s" else 50.0)
    assert placed.t_middle.isfinite().all()
    assert (placed.t_starts >= 0.3 - 1e-5).all()
    assert (placed.t_ends <= 0.7 + 1e-5).all()
    if poison == "sdf":
        for ray in (0, 2):
            assert of_ray(placed, ray) == of_ray(good, ray)


# In the model


def with_importance(model: NeuS, count: int) -> NeuS:
    changed = NeuS(replace(model.config, importance=count), three_views(), CPU)
    changed.load_state_dict(model.state_dict())
    return changed


def finely(model: NeuS, spots: Tensor) -> RenderOutput:
    fine = NeuS(replace(model.config, min_step=0.002, max_step=0.002), three_views(), CPU)
    fine.load_state_dict(model.state_dict())
    return fine.render(rays_along_z(spots), DONE, GREEN)


@pytest.mark.parametrize("inv_s", [40.0, 400.0])
@torch.no_grad()
def test_a_sphere_looks_as_in_a_fine_march(inv_s: float) -> None:
    model = sphere_model(inv_s=inv_s)
    spots = torch.rand(40, 2) * 1.4 - 0.7
    exact = finely(model, spots)
    render = with_importance(model, 16).render(rays_along_z(spots), DONE, GREEN)
    assert len(render.sdf) == 16 * 40
    assert int(render.num_marched) > 40 * 16
    torch.testing.assert_close(render.opacity, exact.opacity, atol=0.03, rtol=0)
    assert (render.opacity - exact.opacity).abs().mean() < 0.006
    hit = spots.norm(dim=1) < 0.4
    assert hit.sum() > 5
    depth, expected = (r.depth[hit] / r.opacity[hit] for r in (render, exact))
    torch.testing.assert_close(depth, expected, atol=0.15 / inv_s + 1e-3, rtol=0)
    torch.testing.assert_close(render.rgb[hit], exact.rgb[hit], atol=0.02, rtol=0)


def test_gradients_reach_every_parameter_and_beside_them_none() -> None:
    model = with_importance(sphere_model(inv_s=100.0), 8)
    with torch.no_grad():
        model.sdf_field.weights[0].add_(torch.randn_like(model.sdf_field.weights[0]) * 0.05)
    rays = rays_along_z((torch.rand(12, 2) * 2 - 1) * 0.4)
    samples, _ = model.sample(rays, DONE, torch.Generator().manual_seed(0))
    assert not samples.t_starts.requires_grad
    render = model.render(rays, DONE, GREEN, torch.Generator().manual_seed(0))
    assert torch.equal(render.positions, samples.positions(rays))
    (render.rgb.sum() + render.gradient.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_jitter_is_drawn_in_training_alone() -> None:
    model = with_importance(sphere_model(), 6)
    rays = rays_along_z((torch.rand(5, 2) * 2 - 1) * 0.3)

    def placed(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return model.sample(rays, DONE, generator)[0].t_middle

    assert torch.equal(placed(3), placed(3))
    assert not torch.equal(placed(3), placed(4))
    assert torch.equal(placed(None), placed(None))


@torch.no_grad()
def test_a_budget_serves_whole_rays() -> None:
    model = with_importance(sphere_model(), 6)
    rays = rays_along_z((torch.rand(9, 2) * 2 - 1) * 0.3)
    packed_render = model.render(rays, DONE, GREEN)
    render = model.render(rays, DONE, GREEN, None, Budget(torch.tensor(8), marched=3000, rendered=33))
    assert render.is_served is not None
    assert render.is_served.tolist() == [True] * 5 + [False] * 4
    assert int(render.num_samples) == 30
    torch.testing.assert_close(render.rgb[:5], packed_render.rgb[:5], atol=1e-5, rtol=0)


def test_the_march_is_a_coarse_one() -> None:
    model = sphere_model(inv_s=4000.0)
    assert model.step_size(DONE) == pytest.approx(model.config.min_step)
    assert with_importance(model, 4).step_size(DONE) == pytest.approx(model.config.max_step)
