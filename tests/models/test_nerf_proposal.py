"""NeRF with proposals: pixels against float64 sums, contraction and units, padding, training in small."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_neus import CPU, GREEN, GRID, random_rays, three_views
from torch import Tensor

from models.contraction import camera_radius, contract
from models.density_field import DensityFieldConfig
from models.nerf_proposal import ProposalNeRF, ProposalNeRFConfig
from models.proposal import ProposalConfig
from utils.errors import ConfigError
from utils.ndc import NDC
from utils.types import Budget, Progress

NOW = Progress(0.5, 1.0, 3.0, {})
PROPOSAL = ProposalConfig((10, 8), (8, 16), 2, 8, 4, 8)


def small_model(**changes: object) -> ProposalNeRF:
    torch.manual_seed(3)
    config = ProposalNeRFConfig(
        backend="cpu",
        density_field=DensityFieldConfig(GRID, 16, 1, 5, 16, 1, 3),
        proposal=PROPOSAL,
        num_samples=6,
        far=100.0,
    )
    model = ProposalNeRF(replace(config, **changes), three_views(), CPU)  # type: ignore[arg-type]
    with torch.no_grad():
        model.density_field.grid.table.normal_(0.0, 1.0)
    return model


def test_a_unit_holds_the_cameras() -> None:
    scene = three_views()
    distances = scene.cameras.c2w[:, :, 3].norm(dim=1)
    assert camera_radius(scene) == pytest.approx(float(distances.max()))
    assert small_model().unit == camera_radius(scene)
    assert small_model(unit=1.5).unit == 1.5
    assert small_model(contraction="none").unit == 1.0


@pytest.mark.parametrize("contraction", ["linf", "l2", "none"])
def test_pixels_are_the_sums_of_the_paper(contraction: str) -> None:
    model = small_model(contraction=contraction, unit=2.0)
    rays = random_rays(30)
    with torch.no_grad():
        render = model.render(rays, NOW, GREEN)
    *proposals, last = render.histograms
    assert [len(h.weights[0]) for h in (*proposals, last)] == [10, 8, 6]
    unit = 1.0 if contraction == "none" else 2.0
    near, far = torch.full((30,), 0.05), torch.full((30,), 100.0)
    if contraction == "none":
        near, far = rays.near.clamp(min=0.05), rays.far

    def warp(t: Tensor) -> Tensor:
        return torch.where(t < 1.0, 0.5 * t, 1.0 - 0.5 / t)

    misses = 0
    for ray in range(30):
        origin, direction = rays.origins[ray].double() / unit, rays.directions[ray].double()
        start, end = warp(near[ray].double()), warp(far[ray].double())
        g = start + (end - start) * last.edges[ray].double()
        t = torch.where(g < 0.5, 2.0 * g, 0.5 / (1.0 - g))
        light, color, opacity, log_depth = 1.0, np.zeros(3), 0.0, 0.0
        is_miss = contraction == "none" and bool(near[ray] >= far[ray])
        misses += is_miss
        for i in () if is_miss else range(6):
            ends = origin + t[i : i + 2, None] * direction
            middle = (origin + t[i : i + 2].mean() * direction)[None]
            if contraction != "none":
                ends, middle = contract(ends, contraction), contract(middle, contraction)  # type: ignore[arg-type]
            density, features = model.density_field.density(middle.float())
            rgb = model.density_field.color(features, rays.directions[ray : ray + 1], torch.tensor([0]))
            alpha = 1.0 - np.exp(-float(density.detach()) * float(ends.diff(dim=0).norm()))
            if i == 5 and contraction != "none":
                alpha = 1.0
            color += light * alpha * rgb[0].detach().double().numpy()
            opacity += light * alpha
            log_depth += light * alpha * np.log(float(t[i : i + 2].mean()) * unit)
            light *= 1.0 - alpha
        color += light * GREEN.numpy()
        np.testing.assert_allclose(render.rgb[ray].numpy(), color, atol=1e-4)
        assert float(render.opacity[ray]) == pytest.approx(opacity, abs=1e-4)
        if opacity > 1e-3:
            expected = opacity * np.exp(log_depth / opacity)
            assert float(render.depth[ray]) == pytest.approx(expected, rel=1e-3)
    assert (misses > 0) == (contraction == "none")


def test_every_ray_ends_somewhere() -> None:
    render = small_model().render(random_rays(20), NOW, GREEN, torch.Generator().manual_seed(0))
    torch.testing.assert_close(render.opacity, torch.ones(20))
    other = small_model().render(random_rays(20), NOW, 1.0 - GREEN, torch.Generator().manual_seed(0))
    assert len(render.positions) == len(render.weights) == render.num_samples == 120
    assert render.num_marched == 20 * 24
    assert other.rgb.shape == (20, 3)


def test_positions_are_in_scene_space_and_beyond_the_sphere() -> None:
    rays = random_rays(20)
    render = small_model().render(rays, NOW, GREEN)
    along = render.positions.view(20, 6, 3) - rays.origins[:, None]
    t = (along * rays.directions[:, None]).sum(dim=2)
    torch.testing.assert_close(along, t[..., None] * rays.directions[:, None], atol=1e-3, rtol=1e-4)
    assert (t.diff(dim=1) >= 0).all()
    assert float(render.positions.norm(dim=1).max()) > 5.0


def test_normals_outside_of_training_point_to_where_density_falls() -> None:
    model, rays = small_model(), random_rays(4)
    render = model.render(rays, NOW, GREEN)
    assert float(render.normal.norm(dim=1).max()) > 0.1
    assert (render.normal.norm(dim=1) <= 1 + 1e-5).all()
    trained = model.render(rays, NOW, GREEN, torch.Generator().manual_seed(0))
    assert not trained.normal.any()


def test_queries_count_in_scene_units() -> None:
    model = small_model(unit=4.0)
    positions = torch.rand(50, 3) - 0.5
    density, _ = model.density_field.density(positions / 4.0)
    torch.testing.assert_close(model.query_density(positions), density / 4.0)
    assert model.query_color(positions, torch.nn.functional.normalize(positions, dim=1)).shape == (50, 3)
    surface = model.frozen_at(NOW)
    assert surface.query_sdf(positions).shape == (50,)


def test_gradients_reach_everything_but_not_from_colours_to_proposals() -> None:
    model = small_model()
    rays = random_rays(60)
    model.render(rays, NOW, GREEN, torch.Generator().manual_seed(0)).rgb.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("sampler."), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    groups = model.parameter_groups()
    assert set(groups) == {"grid", "networks"}
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert len(groups["grid"]) == 3


def test_scaled_gradients_leave_the_pixels() -> None:
    rays = random_rays(20)
    plain, scaled = small_model(), small_model(gradient_scaling=2.0)
    pixels = [model.render(rays, NOW, GREEN).rgb for model in (plain, scaled)]
    torch.testing.assert_close(pixels[0], pixels[1])
    for rgb in pixels:
        rgb.square().sum().backward()
    first, second = (model.density_field.grid.table.grad for model in (plain, scaled))
    assert first is not None
    assert second is not None
    assert 0 < float(second.norm()) < float(first.norm())


@pytest.mark.parametrize("num_rays", [20, 7, 0])
def test_padding_has_no_part(num_rays: int) -> None:
    rays = random_rays(20)
    gradients = []
    for few in (True, False):
        model = small_model()
        budget = None if few else Budget(torch.tensor(num_rays), 1000, 1000)
        seen = rays[:num_rays] if few else rays
        render = model.render(seen, NOW, GREEN, None, budget)
        rgb = render.rgb
        if not few:
            assert render.is_served is not None
            assert render.is_served.tolist() == [k < num_rays for k in range(20)]
            assert int(render.num_samples) == 6 * num_rays
            assert int(render.num_marched) == 24 * num_rays
            rgb = torch.where(render.is_served[:, None], rgb, 0.0)
        rgb.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)


def test_warped_scenes_are_not_contracted() -> None:
    scene = three_views()
    warped = replace(
        scene, cameras=replace(scene.cameras, ndc=NDC(torch.eye(4, dtype=torch.float64)[:3], 1.0, 1.0, 1.0))
    )
    config = ProposalNeRFConfig(proposal=PROPOSAL)
    with pytest.raises(ConfigError, match=r"^model\.contraction: nothing lies beyond"):
        ProposalNeRF(config, warped, CPU)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_samples": 1}, "num_samples"),
        ({"unit": 0.5}, "unit"),
        ({"near": 0.0}, "near"),
        ({"near": 5.0, "far": 2.0}, "near"),
        ({"surface_density": 0.0}, "surface_density"),
        ({"gradient_scaling": -1.0}, "gradient_scaling"),
    ],
)
def test_config_out_of_range(change: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{key}"):
        ProposalNeRFConfig(**change)  # type: ignore[arg-type]
