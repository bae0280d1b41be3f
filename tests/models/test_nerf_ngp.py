"""NeRF on a hash grid: pixels against float64 sums by hand, hidden samples, queries, padding, the surface."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_neus import CPU, GREEN, GRID, random_rays, three_views
from torch import Tensor

from models.appearance import AppearanceConfig
from models.background import BackgroundConfig
from models.density_field import DensityFieldConfig, density_of
from models.density_surface import DensitySurface, dense_cells, density_normals
from models.marching.transmittance import drop_dark
from models.nerf_ngp import NGP, NGPConfig
from models.occupancy import OccupancyConfig
from utils.extraction import extract_surface
from utils.ndc import NDC
from utils.types import Budget, Progress, RaySamples

NOW = Progress(0.5, 1.0, 3.0, {})


def small_config(**changes: object) -> NGPConfig:
    config = NGPConfig(
        backend="cpu",
        density_field=DensityFieldConfig(GRID, 16, 1, 5, 16, 1, 3),
        background=BackgroundConfig(False, num_samples=4, hash_grid=GRID, hidden_width=8),
        occupancy=OccupancyConfig(resolution=32, below_mean=True),
        step=0.05,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def small_model(**changes: object) -> NGP:
    torch.manual_seed(3)
    model = NGP(small_config(**changes), three_views(), CPU)
    # Densities that vary, and are high enough to hide something.
    with torch.no_grad():
        model.density_field.grid.table.normal_(0.0, 1.0)
        model.density_field.density_network[-1].bias[0] = 3.0  # type: ignore[index,operator]
    return model


class Ball:
    """A radiance field of known density: 100 inside of a sphere, falling to nothing around it."""

    device = torch.device("cpu")

    def query_density(self, positions: Tensor) -> Tensor:
        return 100.0 * torch.sigmoid((0.5 - positions.norm(dim=1)) * 60.0)

    def query_color(self, positions: Tensor, directions: Tensor) -> Tensor:
        return 0.5 + 0.5 * directions


def test_pixels_are_the_sums_of_the_paper() -> None:
    model = small_model(min_transmittance=0.0)
    rays = random_rays(40)
    with torch.no_grad():
        render = model.render(rays, NOW, GREEN)
    samples, _ = model.sample(rays, None)
    assert len(samples) > 300
    density, features = model.density_field.density(samples.positions(rays))
    rgb = model.density_field.color(features, rays.directions, samples.ray_indices)
    density, rgb = density.detach().double().numpy(), rgb.detach().double().numpy()
    for ray in range(40):
        light, color, depth = 1.0, np.zeros(3), 0.0
        for i in range(int(samples.offsets[ray]), int(samples.offsets[ray + 1])):
            alpha = 1.0 - np.exp(-density[i] * float(samples.t_ends[i] - samples.t_starts[i]))
            color += light * alpha * rgb[i]
            depth += light * alpha * float(samples.t_middle[i])
            light *= 1.0 - alpha
        color += light * GREEN.numpy()
        np.testing.assert_allclose(render.rgb[ray].numpy(), color, atol=2e-5)
        assert float(render.opacity[ray]) == pytest.approx(1.0 - light, abs=2e-5)
        assert float(render.depth[ray]) == pytest.approx(depth, abs=1e-4)


def test_dropping_what_is_hidden_changes_pixels_by_less_than_its_light() -> None:
    model, rays = small_model(min_transmittance=0.01), random_rays(60)
    everything = small_model(min_transmittance=0.0)
    render, full = model.render(rays, NOW, GREEN), everything.render(rays, NOW, GREEN)
    assert len(render.weights) < 0.9 * len(full.weights)
    assert render.num_marched == len(full.weights)
    torch.testing.assert_close(render.rgb, full.rgb, atol=0.011, rtol=0)


def test_dark_samples_are_those_behind_the_threshold() -> None:
    alpha = torch.tensor([0.5, 0.9, 0.9, 0.1, 0.0, 0.99, 0.99, 0.99])
    middle = torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4])
    offsets = torch.tensor([0, 4, 8, 8])
    rays = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    samples = RaySamples(middle - 0.5, middle + 0.5, rays, offsets)
    # In front of them: 1, 0.5, 0.05, 0.005; 1, 1, 0.01, 0.0001.
    kept = drop_dark(samples, alpha, 0.02, "cpu")
    assert kept.t_middle.tolist() == [1, 2, 3, 1, 2]
    assert kept.offsets.tolist() == [0, 3, 5, 5]
    padded = drop_dark(samples, alpha, 0.02, "cpu", capacity=4)
    assert padded.offsets.tolist() == [0, 3, 3, 3]
    assert padded.is_served is not None
    assert padded.is_served.tolist() == [True, False, False]
    # What is not a number stays on its ray.
    alpha[1] = float("nan")
    assert drop_dark(samples, alpha, 0.02, "cpu").t_middle[-2:].tolist() == [1, 2]


def test_fixed_buffers_show_the_same() -> None:
    model, rays = small_model(), random_rays(30)
    plain = model.render(rays, NOW, GREEN)
    budget = Budget(torch.tensor(20), 4000, 2000)
    padded = model.render(rays, NOW, GREEN, None, budget)
    assert padded.is_served is not None
    assert padded.is_served.tolist() == [True] * 20 + [False] * 10
    torch.testing.assert_close(padded.rgb[:20], plain.rgb[:20])
    gradients = []
    for render, rows in ((plain, slice(20)), (padded, slice(20))):
        model.zero_grad()
        render.rgb[rows].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for before, after in zip(*gradients, strict=True):
        torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-3)


def test_gradients_reach_every_parameter_and_agree_with_differences() -> None:
    background = BackgroundConfig(True, num_samples=4, hash_grid=GRID)
    # Dropping what is hidden is a matter of yes or no, which has no slope.
    model, rays = small_model(min_transmittance=0.0, background=background), random_rays(30)

    def loss() -> Tensor:
        return model.render(rays, NOW, GREEN).rgb.square().sum()

    loss().backward()
    groups = model.parameter_groups()
    assert sorted(groups) == ["background", "grid", "networks"]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0, name
    bias = model.density_field.density_network[-1].bias  # type: ignore[union-attr,index]
    expected, step = float(bias.grad[0]), 1e-2  # type: ignore[union-attr,index]
    with torch.no_grad():
        bias[0] += step  # type: ignore[operator,index]
        above = float(loss())
        bias[0] -= 2 * step  # type: ignore[operator,index]
        below = float(loss())
    assert expected == pytest.approx((above - below) / (2 * step), rel=0.03)


def test_the_occupancy_starts_open_and_closes_what_is_empty() -> None:
    model = small_model()
    with torch.no_grad():
        for parameter in model.density_field.parameters():
            parameter.zero_()
    before = model.occupancy.share
    generator = torch.Generator().manual_seed(0)
    # exp(-1) everywhere: less than the threshold makes of a step, yet nothing may close.
    for _ in range(20):
        model.update_occupancy(NOW, generator)
    assert model.occupancy.share == before
    model.density_field.density_network[-1].bias.data[0] = 4.0  # type: ignore[union-attr,index]
    model.density_field.grid.table.data[:] = 0.0
    model.density_field.density_network[0].weight.data[0, 0] = 1.0  # type: ignore[union-attr,index]
    model.density_field.density_network[-1].weight.data[0, 0] = -40.0  # type: ignore[union-attr,index]
    for _ in range(60):
        model.update_occupancy(NOW, generator)
    # Density e^(3 - 40 x) for x > 0: half of the cells are empty.
    assert 0.4 * before < model.occupancy.share < 0.75 * before


def test_densities_start_low_and_never_overflow() -> None:
    values = density_of(torch.tensor([0.0, 1.0, 100.0, -100.0]))
    assert values.tolist() == pytest.approx([np.exp(-1), 1.0, np.exp(15), 0.0], rel=1e-5)


def test_the_surface_of_a_density_is_its_level_set() -> None:
    grid = torch.stack(torch.meshgrid(*[torch.arange(32)] * 3, indexing="ij"), dim=-1)
    inside = ((grid.float() + 0.5) / 16 - 1).norm(dim=-1) < 0.7
    surface = DensitySurface(Ball(), 50.0, inside)
    points = torch.rand(500, 3) * 2 - 1
    assert torch.equal(surface.query_sdf(points) < 0, points.norm(dim=1) < 0.5)
    # What is said of empty space may not be further away than the surface is.
    far = points.norm(dim=1) > 0.9
    value = surface.query_sdf(points)[far]
    assert (value > 0.02).any()
    assert (value <= points[far].norm(dim=1) - 0.5 + 0.002).all()
    mesh = extract_surface(surface.query_sdf, 96)
    radii = np.linalg.norm(mesh.vertices, axis=1)
    assert np.abs(radii - 0.5).max() < 0.004
    normals = surface.query_gradient(torch.from_numpy(mesh.vertices).float())
    outward = torch.from_numpy(mesh.vertices / radii[:, None]).float()
    assert float((normals * outward).sum(dim=1).min()) > 0.999
    assert surface.query_color(points, -normals[:500]).shape == (500, 3)


class FarBall(Ball):
    """The same around x = 2."""

    def query_density(self, positions: Tensor) -> Tensor:
        return super().query_density(positions - torch.tensor([2.0, 0.0, 0.0]))


def test_surroundings_are_found_in_a_larger_cube() -> None:
    model = FarBall()
    assert not dense_cells(model, 5.0).any()
    cells = dense_cells(model, 5.0, 3.0)
    assert 0.0 < float(cells.float().mean()) < 0.02
    surface = DensitySurface(model, 50.0, cells, 3.0)
    mesh = extract_surface(surface.query_sdf, 96, 3.0, clip_to_sphere=False)
    radii = np.linalg.norm(mesh.vertices - [2.0, 0.0, 0.0], axis=1)
    assert np.abs(radii - 0.5).max() < 0.02
    assert _volume(mesh.vertices, mesh.faces) == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.06)


def test_a_finer_lattice_does_not_pass_over_the_surface() -> None:
    mesh = extract_surface(DensitySurface(Ball(), 50.0, None).query_sdf, 64)
    assert 4 / 3 * np.pi * 0.5**3 == pytest.approx(_volume(mesh.vertices, mesh.faces), rel=0.02)


def _volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return float((np.cross(a, b) * c).sum() / 6)


def test_normals_point_to_where_the_density_falls() -> None:
    # Neither so deep nor so far out that the density is flat in single precision.
    points = torch.nn.functional.normalize(torch.randn(100, 3), dim=1) * (0.42 + 0.2 * torch.rand(100, 1))
    normals = density_normals(Ball().query_density, points)
    torch.testing.assert_close(normals, torch.nn.functional.normalize(points, dim=1), atol=1e-3, rtol=0)
    assert density_normals(lambda at: 0.0 * at.sum(dim=1), points).abs().max() == 0


def test_rendered_normals_outside_of_training_only() -> None:
    model, rays = small_model(), random_rays(30)
    assert float(model.render(rays, NOW, GREEN, torch.Generator().manual_seed(0)).normal.abs().max()) == 0
    normal = model.render(rays, NOW, GREEN).normal
    assert 0.1 < float(normal.norm(dim=1).max()) <= 1.0 + 1e-5


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"model\.step: must lie in 1e-5\.\.1, got 0.0"):
        NGPConfig(step=0.0)
    with pytest.raises(ValueError, match=r"model\.surface_density"):
        NGPConfig(surface_density=-1.0)
    with pytest.raises(ValueError, match=r"model\.density_field\.color_layers: must lie in 1\.\.16, got 0"):
        DensityFieldConfig(color_layers=0)
    scene = three_views()
    warped = replace(scene, cameras=replace(scene.cameras, ndc=NDC.__new__(NDC)))
    with pytest.raises(Exception, match=r"model\.background\.enabled"):
        NGP(small_config(background=BackgroundConfig(True)), warped, CPU)


@pytest.mark.parametrize("mode", ["embedding", "exposure"])
def test_images_may_differ_in_light(mode: str) -> None:
    appearance = AppearanceConfig(mode, 4)  # type: ignore[arg-type]
    background = BackgroundConfig(True, num_samples=4, hash_grid=GRID)
    model = small_model(appearance=appearance, background=background)
    rays = random_rays(30)
    module = model.embedding or model.exposure
    assert module is not None
    assert module.per_image.shape == (3, 4 if mode == "embedding" else 6)
    assert any(p is module.per_image for p in model.parameter_groups()["networks"])
    with torch.no_grad():
        module.per_image.copy_(torch.randn(module.per_image.shape))
    first, second, none = (
        model.render(replace(rays, camera_indices=torch.full((30,), view)), NOW, GREEN) for view in (0, 1, -1)
    )
    assert float((first.rgb - second.rgb).abs().max()) > 0.05
    torch.testing.assert_close(first.weights, second.weights)
    # Of no image: what the mesh shows, and a video.
    points = torch.rand(20, 3) - 0.5
    assert model.query_color(points, rays.directions[:20]).shape == (20, 3)
    none.rgb.sum().backward()
    assert torch.isfinite(none.rgb).all()


def test_gradients_get_fainter_near_the_camera() -> None:
    rays = random_rays(30)
    values = []
    for reach in (0.0, 6.0):
        model = small_model(gradient_scaling=reach, min_transmittance=0.0)
        render = model.render(rays, NOW, GREEN)
        render.rgb.square().sum().backward()
        values.append((render.rgb.detach(), float(model.density_field.grid.table.grad.norm())))  # type: ignore[union-attr]
    torch.testing.assert_close(values[0][0], values[1][0], rtol=0, atol=0)
    # The unit sphere lies 2 to 4 before cameras at 3: between a ninth and four ninths of the gradients.
    assert 0.1 * values[0][1] < values[1][1] < 0.5 * values[0][1]
