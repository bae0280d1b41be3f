"""NeuS: whole pictures of a sphere whose depth and normals are known; versions, queries and building."""

import logging
import math
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from encoder import HashGridConfig, hashgrid
from models import build_model, chunks, compositing, marching, mlp, sdf_network
from models.backends import Backends
from models.background import BackgroundConfig
from models.fields import RadianceConfig, SDFConfig
from models.neus import NeuS, NeuSConfig
from models.occupancy import OccupancyConfig
from models.opacity import DENSITIES, DensityName
from utils.errors import BackendError
from utils.types import Cameras, ImageStack, Progress, Rays, Scene

CPU = Backends.all("cpu")
GRID = HashGridConfig(num_levels=3, log2_table_size=9, base_resolution=4, max_resolution=16)
DONE = Progress(1.0, 1.0, 3.0, {})
GREEN = torch.tensor([0.1, 0.9, 0.3])


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def three_views() -> Scene:
    """Cameras at -3 on each axis, looking at the centre; the unit ball fills their pictures. No masks."""
    axes = torch.eye(3)
    poses = [
        torch.cat([axes[:, [(k + 1) % 3, (k + 2) % 3, k]], -3.0 * axes[:, k : k + 1]], dim=1)
        for k in range(3)
    ]
    size = torch.full((3, 2), 16)
    intrinsics = torch.tensor([[20.0, 0, 8], [0, 20.0, 8], [0, 0, 1]]).repeat(3, 1, 1)
    return Scene(
        name="hand-made",
        cameras=Cameras(torch.stack(poses), intrinsics, size),
        images=ImageStack.from_images([np.zeros((16, 16, 3), np.uint8) for _ in range(3)]),
        image_names=("x", "y", "z"),
        train_indices=(0, 1, 2),
        test_indices=(),
        world_from_scene=torch.eye(4, dtype=torch.float64),
    )


def small_config(
    backend: str = "cpu", background: bool = False, inv_s: float = 100.0, width: int = 16
) -> NeuSConfig:
    return NeuSConfig(
        backend=backend,
        sdf=SDFConfig(GRID, hidden_width=width, feature_width=5),
        radiance=RadianceConfig(hidden_width=16, hidden_layers=1, direction_degree=3),
        background=BackgroundConfig(background, num_samples=4, hash_grid=GRID, hidden_width=8),
        occupancy=OccupancyConfig(resolution=32),
        initial_inv_s=inv_s,
        min_step=0.01,
        max_step=0.02,
    )


def rays_along_z(offsets: Tensor) -> Rays:
    """Parallel rays from z = -3, shifted by (x, y)."""
    count = len(offsets)
    origins = torch.cat([offsets, torch.full((count, 1), -3.0)], dim=1)
    directions = torch.tensor([0.0, 0.0, 1.0]).repeat(count, 1)
    squared = 1 - offsets.square().sum(dim=1)
    half_chord = squared.clamp(min=0).sqrt()
    near = torch.where(squared >= 0, 3 - half_chord, torch.ones(()))
    far = torch.where(squared >= 0, 3 + half_chord, torch.zeros(()))
    return Rays(origins, directions, near, far, torch.zeros(count, dtype=torch.int64))


def random_rays(count: int) -> Rays:
    """Rays from all around, distance 3; some miss the unit sphere."""
    origins = 3 * torch.nn.functional.normalize(torch.randn(count, 3), dim=1)
    targets = torch.randn(count, 3) * 0.5
    directions = torch.nn.functional.normalize(targets - origins, dim=1)
    along = -(origins * directions).sum(dim=1)
    squared = 1 - (origins + along[:, None] * directions).square().sum(dim=1)
    half_chord = squared.clamp(min=0).sqrt()
    near = torch.where(squared >= 0, along - half_chord, torch.ones(()))
    far = torch.where(squared >= 0, along + half_chord, torch.zeros(()))
    return Rays(origins, directions, near, far, torch.zeros(count, dtype=torch.int64))


def sphere_model(
    inv_s: float = 400.0, backend: str = "cpu", background: bool = False, density: DensityName = "neus"
) -> NeuS:
    """A model whose network is the sphere of radius 0.5 to within a hundredth.

    4 mean_k relu(w_k x) is |x| for units w_k spread evenly over the sphere; Fibonacci's spiral spreads them.
    """
    config = small_config(backend, background, inv_s, width=256)
    beta = max(1 / inv_s, 2e-4)  # of NeuS it has no effect
    config = replace(config, density=density, initial_beta=beta)
    model = NeuS(config, three_views(), Backends.all(backend))
    k = torch.arange(256) + 0.5
    z = 1 - 2 * k / 256
    angle = k * math.pi * (3 - math.sqrt(5))
    radius = (1 - z**2).sqrt()
    field = model.sdf_field
    with torch.no_grad():
        field.weights[0].zero_()
        field.weights[0][:, :3] = torch.stack([radius * angle.cos(), radius * angle.sin(), z], dim=1)
        field.weights[1][0] = 4 / 256
        field.biases[1][0] = -0.5
    return model


def test_depth_opacity_and_normal_of_a_sphere() -> None:
    model = sphere_model()
    spots = (torch.rand(60, 2) * 2 - 1) * 0.3
    render = model.render(rays_along_z(spots), DONE, GREEN)
    height = (0.25 - spots.square().sum(dim=1)).sqrt()
    torch.testing.assert_close(render.opacity, torch.ones(60), atol=1e-3, rtol=0)
    torch.testing.assert_close(render.depth / render.opacity, 3 - height, atol=0.01, rtol=0)
    expected = torch.cat([spots, -height[:, None]], dim=1) / 0.5
    torch.testing.assert_close(render.normal, expected, atol=0.05, rtol=0)
    assert (render.normal.norm(dim=1) <= 1 + 1e-5).all()


def test_depth_is_where_the_model_itself_is_zero() -> None:
    model = sphere_model(inv_s=1000.0)
    rays = rays_along_z((torch.rand(20, 2) * 2 - 1) * 0.3)
    render = model.render(rays, DONE, GREEN)
    surface = rays.origins + (render.depth / render.opacity)[:, None] * rays.directions
    # The density is narrower than the step of 0.01: what is seen is the middle of the sample that holds it.
    assert model.query_sdf(surface, DONE).abs().max() < 0.003


def test_both_densities_show_the_same_sharp_surface() -> None:
    models = [sphere_model(inv_s=4000.0, density=density) for density in DENSITIES]
    models[1].load_state_dict(models[0].state_dict())
    rays = random_rays(200)
    neus, volsdf = (model.render(rays, DONE, GREEN) for model in models)
    # Where a ray grazes, or passes just beside, a softness of less than a step still tells.
    along = -(rays.origins * rays.directions).sum(dim=1)
    beside = (rays.origins + along[:, None] * rays.directions).norm(dim=1)
    clear = (beside - 0.5).abs() > 0.03
    assert (neus.opacity[clear] > 0.9).sum() > 50
    assert (neus.opacity[clear] < 0.1).sum() > 20
    torch.testing.assert_close(volsdf.opacity[clear], neus.opacity[clear], atol=1e-3, rtol=0)
    torch.testing.assert_close(volsdf.depth[clear], neus.depth[clear], atol=0.015, rtol=0)
    torch.testing.assert_close(volsdf.rgb[clear], neus.rgb[clear], atol=0.02, rtol=0)


def test_versions_render_a_density_alike() -> None:
    rays = random_rays(12)
    models = [sphere_model(inv_s=50.0, backend=name, density="volsdf") for name in ("cpu", "reference")]
    models[1].load_state_dict(models[0].state_dict())
    colors = [model.render(rays, DONE, GREEN).rgb for model in models]
    torch.testing.assert_close(colors[0], colors[1], atol=1e-5, rtol=1e-4)


def test_beta_has_the_gradient_of_finite_differences() -> None:
    model, rays = sphere_model(inv_s=30.0, density="volsdf"), random_rays(30)
    # The samples hang on beta too, through the step, which is held; pruning would jump.
    model = NeuS(replace(model.config, min_transmittance=0.0, step_per_width=10.0), three_views(), CPU)
    towards = torch.randn(30, 3)

    def total() -> Tensor:
        return (model.render(rays, DONE, GREEN).rgb * towards).sum()

    (gradient,) = torch.autograd.grad(total(), model.variance)
    around = []
    for shift in (1e-3, -2e-3, 1e-3):
        with torch.no_grad():
            model.variance += shift
            around.append(float(total()))
    assert float(gradient) == pytest.approx((around[0] - around[1]) / 2e-3, rel=1e-2)


def test_samples_of_a_sphere() -> None:
    model = sphere_model()
    rays = rays_along_z((torch.rand(20, 2) * 2 - 1) * 0.3)
    samples, num_marched = model.sample(rays, DONE, None)
    render = model.render(rays, DONE, GREEN)
    assert render.num_marched == num_marched
    assert render.sdf.shape == render.weights.shape == (len(samples),)
    distance = samples.positions(rays).norm(dim=1)
    torch.testing.assert_close(render.sdf, distance - 0.5, atol=0.01, rtol=0)
    torch.testing.assert_close(render.gradient.norm(dim=1), torch.ones(len(samples)), atol=0.1, rtol=0)
    # Half of the march is in front of the surface; hardly any of the rest is kept, and no weight is lost.
    assert (distance > 0.45).all()
    assert len(samples) < 0.65 * num_marched
    torch.testing.assert_close(render.opacity, torch.ones(20), atol=2e-3, rtol=0)


def test_rays_beside_the_sphere_show_the_background() -> None:
    model = sphere_model()
    render = model.render(rays_along_z(torch.tensor([[0.6, 0.0], [0.5, 0.5], [0.0, -0.8]])), DONE, GREEN)
    assert (render.opacity < 1e-3).all()
    torch.testing.assert_close(render.rgb, GREEN.expand(3, 3), atol=1e-3, rtol=0)


def test_surface_hides_the_background() -> None:
    model = sphere_model(inv_s=30.0)
    rays = random_rays(40)
    on_green, on_black = (model.render(rays, DONE, color) for color in (GREEN, torch.zeros(3)))
    through = 1 - on_green.opacity[:, None]
    assert through.min() < 0.01
    assert through.max() > 0.99
    torch.testing.assert_close(on_green.rgb - on_black.rgb, through * GREEN, atol=1e-6, rtol=0)
    # What is left over black is the surface's own light.
    assert (on_black.rgb <= on_green.opacity[:, None] + 1e-6).all()


@pytest.mark.parametrize("density", DENSITIES)
def test_dropping_hidden_samples_does_not_change_the_picture(density: DensityName) -> None:
    model = sphere_model(inv_s=64.0, density=density)
    rays = random_rays(40)
    dropped = model.render(rays, DONE, GREEN)
    config = replace(model.config, min_transmittance=0.0)
    complete = NeuS(config, three_views(), CPU)
    complete.load_state_dict(model.state_dict())
    full = complete.render(rays, DONE, GREEN)
    assert len(full.sdf) == full.num_marched == dropped.num_marched
    assert len(dropped.sdf) < 0.8 * len(full.sdf)
    torch.testing.assert_close(dropped.rgb, full.rgb, atol=2e-3, rtol=0)
    torch.testing.assert_close(dropped.opacity, full.opacity, atol=2e-3, rtol=0)


@pytest.mark.parametrize("density", DENSITIES)
def test_occupancy_follows_the_surface_and_does_not_change_the_picture(density: DensityName) -> None:
    model = sphere_model(inv_s=100.0, density=density)
    spots = torch.rand(60, 2) * 1.4 - 0.7
    # Where a ray grazes the sphere, light that passes far from it counts, too.
    spots = spots[(spots.norm(dim=1) - 0.5).abs() > 0.06]
    before = model.render(rays_along_z(spots), DONE, GREEN)
    draw = torch.Generator().manual_seed(0)
    for _ in range(8):
        model.update_occupancy(DONE, draw)
    size = 32
    occupied = model.occupancy.occupied
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    distance = torch.stack([x, y, z]).norm(dim=0)
    half_diagonal = math.sqrt(3) / size
    # Presence falls to the threshold 0.01 at |sdf| = 6 / inv_s = 0.06 (VolSDF: 4.6 beta) and half a diagonal,
    # half a diagonal from the cell's centre; the network is off by up to 0.01.
    far_away = (distance - 0.5).abs() > 2 * half_diagonal + 0.07
    assert not occupied[far_away].any()
    assert occupied[(distance - 0.5).abs() < 0.2 / size].all()
    after = model.render(rays_along_z(spots), DONE, GREEN)
    assert after.num_marched < 0.4 * before.num_marched
    torch.testing.assert_close(after.opacity, before.opacity, atol=0.02, rtol=0)
    torch.testing.assert_close(after.rgb, before.rgb, atol=0.02, rtol=0)


def test_a_density_thinner_than_a_cell_is_not_overlooked() -> None:
    """At inv_s = 1e4 the density is a hundred times thinner than a cell, which is looked at in one point."""
    model, size, draw = sphere_model(inv_s=1e4), 32, torch.Generator().manual_seed(0)
    nodes = torch.linspace(-1, 1, size + 1)
    z, y, x = torch.meshgrid(nodes, nodes, nodes, indexing="ij")
    distance = (torch.stack([x, y, z]).norm(dim=0) - 0.5)[None, None]
    highest = torch.nn.functional.max_pool3d(distance, 2, 1)[0, 0]
    lowest = -torch.nn.functional.max_pool3d(-distance, 2, 1)[0, 0]
    crossed = (lowest < 0) & (highest > 0)
    assert crossed.sum() > 1000
    model.update_occupancy(DONE, draw)
    # Where the surface passes a cell's middle, every point of it is near enough; the network is a bit off.
    near = torch.maximum(highest, -lowest) < math.sqrt(3) / size - 0.003
    assert (crossed & near).sum() > 100
    assert model.occupancy.occupied[crossed & near].all()
    # Where it cuts off a corner the random point may lie too far away, though not again and again.
    for _ in range(7):
        model.update_occupancy(DONE, draw)
    assert model.occupancy.occupied[crossed & near].all()
    assert model.occupancy.occupied[crossed].float().mean() > 0.99
    assert model.occupancy.share < 0.2


def test_only_observable_cells_are_marched() -> None:
    model = NeuS(small_config(), three_views(), CPU)
    model.occupancy.occupied.zero_()
    render = model.render(random_rays(10), DONE, GREEN)
    assert render.num_marched == 0
    assert torch.equal(render.rgb, GREEN.expand(10, 3))


@pytest.mark.parametrize("background", [False, True])
def test_rays_that_all_miss(backend: str, background: bool) -> None:
    model = NeuS(small_config(backend, background), three_views(), Backends.all(backend))
    rays = rays_along_z(torch.tensor([[1.5, 0.0], [0.0, -1.2], [1.0, 1.0]]))
    render = model.render(rays, DONE, GREEN, torch.Generator().manual_seed(0))
    assert render.num_marched == 0
    assert render.sdf.shape == render.weights.shape == (0,)
    assert render.gradient.shape == (0, 3)
    assert not render.opacity.any()
    assert not render.depth.any()
    assert not render.normal.any()
    if not background:
        assert torch.equal(render.rgb, GREEN.expand(3, 3))
    loss = (
        render.rgb.square().sum() + (render.gradient.norm(dim=1) - 1).square().sum() + render.sdf.abs().sum()
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert background == any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("background", [False, True])
def test_no_rays_at_all(backend: str, background: bool) -> None:
    model = NeuS(small_config(backend, background), three_views(), Backends.all(backend))
    render = model.render(rays_along_z(torch.zeros(0, 2)), DONE, GREEN)
    assert render.rgb.shape == (0, 3)
    assert render.opacity.shape == render.depth.shape == (0,)


@pytest.mark.parametrize("cos_anneal", [0.0, 1.0])
@pytest.mark.parametrize("background", [False, True])
def test_versions_render_and_learn_alike(background: bool, cos_anneal: float) -> None:
    fast = NeuS(small_config("cpu", background), three_views(), CPU)
    slow = NeuS(small_config("reference", background), three_views(), Backends.all("reference"))
    with torch.no_grad():
        fast.sdf_field.grid.table.uniform_(-0.02, 0.02)
        fast.sdf_field.weights[0].add_(torch.randn_like(fast.sdf_field.weights[0]) * 0.1)
    slow.load_state_dict(fast.state_dict())
    rays, truth = random_rays(24), torch.rand(24, 3)
    progress = Progress(0.5, cos_anneal, 2.5, {}, learns_from_geometry=True)
    renders, gradients = [], []
    for model in (fast, slow):
        render = model.render(rays, progress, GREEN, torch.Generator().manual_seed(5))
        loss = (render.rgb - truth).square().mean() + 0.1 * (render.gradient.norm(dim=1) - 1).square().mean()
        loss = loss + 0.1 * render.opacity.square().mean() + 0.01 * torch.exp(-20 * render.sdf.abs()).mean()
        loss = loss + 0.1 * render.depth.square().mean() + 0.1 * (render.normal - 0.3).square().mean()
        loss.backward()
        renders.append(render)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert renders[0].num_marched == renders[1].num_marched > 500
    assert renders[0].opacity.max() > 0.9
    for name in ("rgb", "opacity", "depth", "normal", "sdf", "gradient", "weights"):
        torch.testing.assert_close(
            getattr(renders[0], name), getattr(renders[1], name), atol=1e-4, rtol=1e-4, msg=name
        )
    for name, expected in gradients[1].items():
        # Only the largest numbers are compared: a corner's weight of 1e-8 may round to zero in one version.
        actual = gradients[0][name]
        assert actual is not None, name
        assert expected is not None, name
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_depth_and_normal_have_a_gradient_when_they_are_learned_from() -> None:
    """A sphere of radius r - b, seen along z beside its centre by s: depth 3 - sqrt((r - b)^2 - s^2)."""
    model, spots = sphere_model(inv_s=100.0), (torch.rand(200, 2) * 2 - 1) * 0.25
    learned = Progress(1.0, 1.0, 3.0, {}, learns_from_geometry=True)
    shift = model.sdf_field.biases[-1]
    plain = model.render(rays_along_z(spots), DONE, GREEN)
    assert not plain.depth.requires_grad
    assert not plain.normal.requires_grad
    render = model.render(rays_along_z(spots), learned, GREEN)
    assert torch.equal(render.depth, plain.depth)
    assert torch.equal(render.normal, plain.normal)
    found = torch.autograd.grad((render.depth / render.opacity).mean(), shift, retain_graph=True)[0][0]
    expected = (0.5 / (0.25 - spots.square().sum(dim=1)).sqrt()).mean()
    assert float(found) == pytest.approx(float(expected), rel=0.05)
    # The normal there is (s, -sqrt(...)) / (r - b), its x thus s_x / (r - b).
    weight = spots[:, 0]
    found = torch.autograd.grad((weight * render.normal[:, 0]).sum(), shift)[0][0]
    assert float(found) == pytest.approx(float((weight.square() / 0.25).sum()), rel=0.1)
    with torch.no_grad():
        assert not model.render(rays_along_z(spots), learned, GREEN).depth.requires_grad


def test_samples_are_where_the_field_was_asked() -> None:
    model = sphere_model()
    render = model.render(random_rays(20), DONE, GREEN)
    sdf, gradient = model.query_field(render.positions, DONE)
    torch.testing.assert_close(sdf, render.sdf)
    torch.testing.assert_close(gradient, render.gradient)
    torch.testing.assert_close(sdf.detach(), model.query_sdf(render.positions, DONE), atol=1e-5, rtol=0)
    (sdf.square().sum() + gradient.sum()).backward()
    assert model.sdf_field.weights[0].grad is not None
    assert model.sdf_field.weights[0].grad.any()


def test_every_parameter_learns() -> None:
    model = NeuS(small_config(background=True), three_views(), CPU)
    with torch.no_grad():
        # The first layer starts blind to the grid, which therefore learns from the second step on.
        model.sdf_field.weights[0].add_(torch.randn_like(model.sdf_field.weights[0]) * 0.1)
    render = model.render(
        random_rays(60), Progress(0.0, 0.0, 3.0, {}), GREEN, torch.Generator().manual_seed(0)
    )
    (render.rgb.sum() + render.gradient.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_rendering_is_repeatable_and_jitter_is_drawn() -> None:
    model = NeuS(small_config(), three_views(), CPU)
    rays = random_rays(20)
    first, second = (model.render(rays, DONE, GREEN, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.rgb, second.rgb)
    assert torch.equal(first.depth, second.depth)
    other = model.render(rays, DONE, GREEN, torch.Generator().manual_seed(2))
    assert not torch.equal(first.depth, other.depth)
    still = [model.render(rays, DONE, GREEN).depth for _ in range(2)]
    assert torch.equal(still[0], still[1])


def test_rays_do_not_see_one_another() -> None:
    model = NeuS(small_config(), three_views(), CPU)
    rays = random_rays(20)
    together = model.render(rays, DONE, GREEN)
    parts = [model.render(rays[slice(k, k + 7)], DONE, GREEN) for k in range(0, 20, 7)]
    torch.testing.assert_close(torch.cat([part.rgb for part in parts]), together.rgb)
    torch.testing.assert_close(torch.cat([part.depth for part in parts]), together.depth)


def test_sharpness_and_step() -> None:
    model = NeuS(small_config(inv_s=64.0), three_views(), CPU)
    assert model.inv_s(DONE).item() == pytest.approx(64.0, rel=1e-4)
    for inv_s, step in ((10.0, 0.02), (64.0, 1 / 64), (80.0, 0.0125), (1e4, 0.01)):
        with torch.no_grad():
            model.variance.fill_(math.log(inv_s) / 10)
        assert model.step_size(DONE) == pytest.approx(step, rel=1e-3)
    with torch.no_grad():
        model.variance.fill_(50.0)
    assert model.inv_s(DONE).item() == pytest.approx(1e6)
    with torch.no_grad():
        model.variance.fill_(math.nan)
    assert model.step_size(DONE) == model.config.min_step


def test_a_prescribed_sharpness_is_not_learned() -> None:
    model = sphere_model(inv_s=20.0)
    prescribed = replace(DONE, inv_s=640.0)
    assert model.inv_s(prescribed).item() == 640.0
    assert model.scalars(prescribed) == {"inv_s": 640.0, "occupied": model.occupancy.share}
    rays = random_rays(20)
    sharp = model.render(rays, prescribed, GREEN)
    sharp.rgb.sum().backward()
    assert model.variance.grad is None
    learned = sphere_model(inv_s=640.0).render(rays, DONE, GREEN)
    torch.testing.assert_close(sharp.opacity, learned.opacity, atol=1e-4, rtol=0)


def test_sharpness_of_a_density_is_one_over_beta() -> None:
    model = sphere_model(inv_s=20.0, density="volsdf")
    assert model.inv_s(DONE).item() == pytest.approx(20.0, rel=1e-5)
    assert model.scalars(DONE) == pytest.approx(
        {"inv_s": 20.0, "beta": 0.05, "occupied": model.occupancy.share}, rel=1e-5
    )
    with torch.no_grad():
        model.variance.fill_(50.0)
    assert model.scalars(DONE)["beta"] == pytest.approx(1e-4)
    assert list(sphere_model().scalars(DONE)) == ["inv_s", "occupied"]


def test_parameter_groups_hold_each_parameter_once() -> None:
    model = NeuS(small_config(background=True), three_views(), CPU)
    groups = model.parameter_groups()
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert groups["variance"] == [model.variance]
    assert model.background is not None
    assert [id(p) for p in groups["grid"]] == [id(model.sdf_field.grid.table)]
    assert [id(p) for p in groups["background"]] == [id(p) for p in model.background.parameters()]
    assert "background" not in NeuS(small_config(), three_views(), CPU).parameter_groups()


def test_queries_agree_with_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NeuS(small_config(), three_views(), CPU)
    positions = torch.rand(50, 3) * 1.2 - 0.6
    directions = torch.nn.functional.normalize(torch.randn(50, 3), dim=1)
    outputs, gradient = model.sdf_field(positions, 3.0)
    normal = torch.nn.functional.normalize(gradient, dim=1)
    expected = model.radiance(outputs, directions, torch.arange(50), normal)
    # In one piece and in pieces of seven.
    for chunk in (2**17, 7):
        monkeypatch.setitem(chunks._CHUNK, "cpu", chunk)
        surface = model.frozen_at(DONE)
        sdf, slopes = surface.query_sdf(positions), surface.query_gradient(positions)
        rgb = surface.query_color(positions, directions)
        assert not any(tensor.requires_grad for tensor in (sdf, slopes, rgb))
        torch.testing.assert_close(sdf, outputs[:, 0].detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(slopes, gradient.detach())
        torch.testing.assert_close(rgb, expected.detach())
    assert model.query_sdf(positions[:0], DONE).shape == (0,)
    assert surface.device.type == "cpu"


def test_closed_levels_do_not_show() -> None:
    model = NeuS(small_config(), three_views(), CPU)
    with torch.no_grad():
        model.sdf_field.grid.table.uniform_(-1, 1)
        model.sdf_field.weights[0].normal_(0, 0.3)
    positions = torch.rand(20, 3) - 0.5
    sdf = [model.query_sdf(positions, Progress(0.0, 0.0, levels, {})) for levels in (1.0, 1.001, 2.0)]
    assert (sdf[0] - sdf[1]).abs().max() < 1e-2
    assert (sdf[0] - sdf[2]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("requested", "expected"), [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")]
)
def test_build_chooses_and_says_so(requested: str, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = build_model(small_config(requested), three_views(), torch.device("cpu"))
    assert isinstance(model, NeuS)
    assert model.backends == Backends.all(expected)
    assert model.sdf_field.backend == model.sdf_field.grid.backend == expected
    lines = [record.getMessage() for record in caplog.records]
    for operation in ("hash grid", "sdf network", "network", "marching", "compositing"):
        assert any(line.startswith(f"{operation}: backend {expected} (") for line in lines)


@pytest.mark.parametrize("operation", [compositing, hashgrid, marching, mlp, sdf_network])
def test_versions_say_where_they_run(operation: ModuleType) -> None:
    checks = operation.IMPLEMENTATIONS
    assert list(checks) == ["cpu", "cuda", "reference"]
    for name, device, says in [
        ("cpu", "cpu", "None"),
        ("cpu", "cuda", "--device cpu"),
        ("reference", "cuda", "None"),
    ]:
        assert says in str(checks[name](torch.device(device)))


def test_build_refuses_unknown_and_unusable_backends() -> None:
    for name, message in (
        ("refrence", "model.backend: 'refrence' is not understood; give auto, one of"),
        ("cpu+nerfacc", r"'cpu\+nerfacc' is not understood; .*nerfacc\+tinycudann"),
        ("nerfacc", "nerfacc"),
        ("tinycudann", "tinycudann"),
    ):
        with pytest.raises(BackendError, match=message):
            build_model(small_config(name), three_views(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_step": 0.1}, r"model\.min_step: must lie in \(0, max_step = 0\.0136\], got 0\.1"),
        ({"initial_inv_s": 0.0}, r"model\.initial_inv_s"),
        ({"initial_beta": 0.0}, r"model\.initial_beta: must lie in \(0\.0001, 10\], got 0\.0"),
        ({"min_transmittance": 1.0}, r"model\.min_transmittance"),
        ({"importance": -1}, r"model\.importance: must lie in 0\.\.1024, got -1"),
    ],
)
def test_config_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuSConfig(**change)  # type: ignore[arg-type]
