"""The original NeRF: whole rays against a second renderer in float64; gradients; what else it promises."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_neus import random_rays, three_views
from torch import Tensor

from models import vanilla_nerf
from models.appearance import AppearanceConfig
from models.backends import Backends
from models.density_surface import dense_cells
from models.vanilla_nerf import NeRFNetwork, VanillaNeRF, VanillaNeRFConfig
from utils.types import Budget, Progress, Rays

DONE = Progress(1.0, 1.0, 0.0, {})
GREEN = torch.tensor([0.1, 0.9, 0.3])
SMALL = VanillaNeRFConfig(
    position_frequencies=3,
    direction_frequencies=2,
    hidden_width=8,
    hidden_layers=4,
    skip=2,
    view_width=6,
    num_coarse=7,
    num_fine=9,
)


def make(config: VanillaNeRFConfig = SMALL, backend: str = "reference") -> VanillaNeRF:
    """A model whose densities differ from place to place."""
    torch.manual_seed(2)
    model = VanillaNeRF(config, three_views(), Backends.all(backend))
    with torch.no_grad():
        for network in (model.coarse, model.fine):
            network.density.weight *= 20
            network.density.bias += 1
    return model


def some_rays(count: int = 12) -> Rays:
    torch.manual_seed(4)
    rays = random_rays(count)
    assert 0 < int((rays.near > rays.far).sum()) < count
    return rays


def in_double(rays: Rays) -> Rays:
    return Rays(
        *(rays.origins.double(), rays.directions.double(), rays.near.double(), rays.far.double()),
        rays.camera_indices,
    )


# A second renderer


def encoded(x: np.ndarray, octaves: int) -> np.ndarray:
    return np.concatenate([x, *(f(2.0**k * x) for k in range(octaves) for f in (np.sin, np.cos))])


def ask(network: NeRFNetwork, position: np.ndarray, direction: np.ndarray) -> tuple[float, np.ndarray]:
    """Density and colour of one sample, layer by layer."""
    weights = {name: value.detach().double().numpy() for name, value in network.named_parameters()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    x = encoded(position, 3)
    h = np.maximum(linear("hidden.0", x), 0)
    h = np.maximum(linear("hidden.1", h), 0)
    h = np.maximum(linear("hidden.2", np.concatenate([x, h])), 0)
    h = np.maximum(linear("hidden.3", h), 0)
    density = np.log1p(np.exp(linear("density", h)[0] - 1))
    seen = np.concatenate([linear("feature", h), encoded(direction, 2)])
    color = linear("color", np.maximum(linear("view", seen), 0))
    return float(density), 1 / (1 + np.exp(-color))


def composite(
    network: NeRFNetwork, origin: np.ndarray, direction: np.ndarray, t: np.ndarray, far: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights, pixel over green, and depth of one ray."""
    light, weights, pixel = 1.0, [], np.zeros(3)
    for k, distance in enumerate(t):
        density, color = ask(network, origin + distance * direction, direction)
        length = (t[k + 1] if k + 1 < len(t) else far) - distance
        alpha = 1 - np.exp(-density * length)
        weights.append(light * alpha)
        pixel = pixel + weights[-1] * color
        light *= 1 - alpha
    return np.array(weights), pixel + light * GREEN.double().numpy(), float(weights @ t)


def drawn(edges: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Where even shares of the weights have passed."""
    mass = weights + 1e-5
    share = np.concatenate([[0], np.cumsum(mass)]) / mass.sum()
    return np.interp((np.arange(count) + 0.5) / count, share, edges)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_pixels_against_a_second_renderer(backend: str) -> None:
    model, rays = make(backend=backend), some_rays()
    render = model.render(rays, DONE, GREEN)
    assert render.rgb_coarse is not None
    opacities = []
    for row in range(len(rays)):
        origin, direction = rays.origins[row].double().numpy(), rays.directions[row].double().numpy()
        near, far = float(rays.near[row]), max(float(rays.far[row]), float(rays.near[row]))
        t = near + (np.arange(7) + 0.5) / 7 * (far - near)
        weights, coarse, _ = composite(model.coarse, origin, direction, t, far)
        middles = (t[1:] + t[:-1]) / 2
        t = np.sort(np.concatenate([t, drawn(middles, weights[1:-1], 9)]))
        weights, fine, depth = composite(model.fine, origin, direction, t, far)
        np.testing.assert_allclose(render.rgb_coarse[row].detach(), coarse, atol=2e-5)
        np.testing.assert_allclose(render.rgb[row].detach(), fine, atol=2e-5)
        assert float(render.depth[row]) == pytest.approx(depth, abs=1e-4)
        assert float(render.opacity[row].detach()) == pytest.approx(weights.sum(), abs=1e-5)
        opacities.append(weights.sum())
    assert max(opacities) > 0.5
    missed = rays.near > rays.far
    assert torch.equal(render.rgb[missed], GREEN.expand(int(missed.sum()), 3))


def test_fine_samples_are_where_the_coarse_network_is_dense() -> None:
    model = make(replace(SMALL, num_coarse=64, num_fine=128))
    with torch.no_grad():
        for parameter in model.coarse.parameters():
            parameter.zero_()

    def shell(positions: Tensor) -> tuple[Tensor, Tensor]:
        return 400.0 * ((positions.norm(dim=1) - 0.5).abs() < 0.02) - 50.0, torch.zeros(len(positions), 8)

    model.coarse.geometry = shell  # type: ignore[method-assign]
    rays = some_rays(40)
    hits = rays.near < rays.far
    through = hits & (torch.linalg.cross(rays.origins, rays.directions).norm(dim=1) < 0.4)
    assert int(through.sum()) > 3
    render = model.render(rays, DONE, GREEN, torch.Generator().manual_seed(0))
    t = (render.positions.view(40, 192, 3) - rays.origins[:, None]).norm(dim=2)
    assert (t.diff(dim=1) > -1e-5).all()
    radius = render.positions.view(40, 192, 3)[through].norm(dim=2)
    # 64 are even; the rest beside the shell's front, to within the distance between two coarse samples.
    assert ((radius - 0.5).abs() < 0.06).sum(dim=1).min() > 100


# Gradients


def test_gradients_against_finite_differences() -> None:
    """Each network learns from its own picture; samples are placed without a gradient."""
    model, rays = make().double(), in_double(some_rays())
    target = torch.rand(12, 3).double()
    green = GREEN.double()

    def losses() -> tuple[Tensor, Tensor]:
        render = model.render(rays, DONE, green)
        assert render.rgb_coarse is not None
        return (render.rgb_coarse - target).square().sum(), (render.rgb - target).square().sum()

    coarse, fine = losses()
    assert not any(g is not None for g in grads_of(fine, model.coarse))
    for index, (network, loss) in enumerate(((model.coarse, coarse), (model.fine, fine))):
        found = grads_of(loss, network)
        for parameter, gradient in zip(network.parameters(), found, strict=True):
            assert gradient is not None
            at = int(gradient.abs().argmax())
            difference = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[at] += step
                    difference.append(float(losses()[index].detach()))
                    parameter.view(-1)[at] -= step
            expected = (difference[0] - difference[1]) / 2e-6
            assert float(gradient.view(-1)[at]) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def grads_of(loss: Tensor, network: NeRFNetwork) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True))


def test_rays_have_gradients_for_refined_cameras() -> None:
    rays = some_rays()
    origins, directions = rays.origins.requires_grad_(), rays.directions.requires_grad_()
    render = make().render(rays, DONE, GREEN, torch.Generator().manual_seed(0))
    render.rgb.sum().backward()
    for tensor in (origins, directions):
        assert tensor.grad is not None
        assert bool((tensor.grad[rays.near < rays.far] != 0).any(dim=1).all())


# The network


def test_the_papers_network_has_its_parameters() -> None:
    network = NeRFNetwork(VanillaNeRFConfig())
    shapes = [tuple(layer.weight.shape) for layer in network.hidden]
    assert shapes == [(256, 63), *[(256, 256)] * 4, (256, 319), (256, 256), (256, 256)]
    assert network.view.weight.shape == (128, 283)
    # As many as the authors' code has for one network.
    assert sum(parameter.numel() for parameter in network.parameters()) == 595_844


def test_density_starts_alive_everywhere() -> None:
    model = VanillaNeRF(VanillaNeRFConfig(hidden_width=32), three_views(), Backends.all("reference"))
    positions = (torch.rand(500, 3) - 0.5).requires_grad_()
    density = model.query_density(positions)
    assert 0.05 < float(density.detach().min()) <= float(density.detach().max()) < 5
    by_hand = model.density_of(torch.tensor([1.0, -50.0]))
    torch.testing.assert_close(by_hand[0], torch.tensor(2.0).log())
    relu = make(replace(SMALL, activation="relu"))
    assert relu.density_of(torch.tensor([-2.0, 3.0])).tolist() == [0.0, 3.0]


def test_noise_is_for_training_alone() -> None:
    model, rays = make(replace(SMALL, density_noise=1.0)), some_rays()
    first, second = (model.render(rays, DONE, GREEN).rgb for _ in range(2))
    assert torch.equal(first, second)
    noisy, quiet = (
        VanillaNeRF.render(m, rays, DONE, GREEN, torch.Generator().manual_seed(0)).rgb
        for m in (model, make())
    )
    assert not torch.equal(noisy, quiet)


# The rest of what a model is asked


def test_a_budget_serves_the_first_rays_and_changes_no_number() -> None:
    model, rays = make(backend="cpu"), some_rays()
    plain = model.render(rays, DONE, GREEN)
    budget = Budget(torch.tensor(5), marched=1000, rendered=1000)
    served = model.render(rays, DONE, GREEN, None, budget)
    assert served.is_served is not None
    assert served.is_served.tolist() == [True] * 5 + [False] * 7
    torch.testing.assert_close(served.rgb[:5], plain.rgb[:5])
    assert (int(served.num_samples), int(served.num_rays)) == (5 * 16, 5)
    assert (int(served.num_marched), plain.num_marched) == (5 * 23, 12 * 23)


def test_surface_is_where_the_density_passes_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    def ball(model: VanillaNeRF, at: Tensor) -> Tensor:
        return 20 * torch.sigmoid((0.5 - at.norm(dim=1)) / 0.05)

    monkeypatch.setattr(VanillaNeRF, "query_density", ball)
    monkeypatch.setattr(vanilla_nerf, "dense_cells", partial(dense_cells, size=32))
    surface = make().frozen_at(DONE)
    positions = torch.randn(200, 3) * 0.4
    assert torch.equal(surface.query_sdf(positions) < 0, positions.norm(dim=1) < 0.5)
    towards = torch.nn.functional.normalize(positions, dim=1)
    torch.testing.assert_close(surface.query_gradient(0.5 * towards), towards, atol=1e-4, rtol=0)
    colors = surface.query_color(0.5 * towards, -towards)
    assert ((colors > 0) & (colors < 1)).all()


@pytest.mark.parametrize("mode", ["embedding", "exposure"])
def test_images_may_differ(mode: str) -> None:
    model = make(replace(SMALL, appearance=AppearanceConfig(mode, 3)))
    with torch.no_grad():
        (model.embedding or model.exposure).per_image[1] += 2.0
    rays = some_rays()
    shown = [
        model.render(replace(rays, camera_indices=torch.full((12,), view)), DONE, GREEN) for view in (0, 1)
    ]
    assert float((shown[0].rgb - shown[1].rgb).detach().abs().max()) > 0.01
    assert torch.equal(shown[0].opacity, shown[1].opacity)
    assert len(model.parameter_groups()["networks"]) == len(list(model.parameters()))


def test_gradients_near_the_camera_can_be_scaled() -> None:
    rays, found = some_rays(), []
    for reach in (0.0, 10.0):
        model = make(replace(SMALL, gradient_scaling=reach))
        model.render(rays, DONE, GREEN).rgb.sum().backward()
        found.append(model.fine.density.weight.grad)
    assert 0.03 < float(found[1].norm() / found[0].norm()) < 0.2


def test_bad_sizes_are_named() -> None:
    for key, value in (("skip", 8), ("num_coarse", 3), ("hidden_layers", 0), ("density_noise", -1.0)):
        with pytest.raises(ValueError, match=rf"model\.{key}: must lie in"):
            replace(VanillaNeRFConfig(), **{key: value})
