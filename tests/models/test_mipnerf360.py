"""mip-NeRF 360: whole rays against a second renderer in float64, with loops; and what else it promises."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from encoder import icosahedron_directions
from models import unbounded
from models.backends import Backends
from models.contraction import contract
from models.density_surface import dense_cells
from models.integrated_fields import ColorHead, DensityMLP, EncodingConfig, LayersConfig
from models.mipnerf360 import MipNeRF360, MipNeRF360Config, MipProposalConfig, MipRadianceConfig
from systems.histogram_losses import distortion, interlevel
from utils.errors import ConfigError
from utils.ndc import NDC
from utils.types import Budget, Cameras, ImageStack, Progress, Rays, Scene

WHITE = torch.ones(3)
DONE = Progress(1.0, 1.0, 0.0, {})
BOUNDED = {"spacing": "linear", "near": 1.0, "far": 6.0, "opaque_background": False}


def scene(distance: float = 3.0) -> Scene:
    """Cameras on the axes, looking at the centre."""
    axes = torch.eye(3)
    poses = [
        torch.cat([axes[:, [(k + 1) % 3, (k + 2) % 3, k]], -distance * axes[:, k : k + 1]], dim=1)
        for k in range(3)
    ]
    return Scene(
        name="hand-made",
        cameras=Cameras(
            torch.stack(poses),
            torch.tensor([[20.0, 0, 8], [0, 20.0, 8], [0, 0, 1]]).repeat(3, 1, 1),
            torch.full((3, 2), 16),
        ),
        images=ImageStack.from_images([np.zeros((16, 16, 3), np.uint8) for _ in range(3)]),
        image_names=("x", "y", "z"),
        train_indices=(0, 1, 2),
        test_indices=(),
        world_from_scene=torch.eye(4, dtype=torch.float64),
    )


def config(octaves: int = 3, contracted: bool = True, layers: int = 6, **keys: object) -> MipNeRF360Config:
    return MipNeRF360Config(
        encoding=EncodingConfig(octaves, direction_frequencies=2, contracted=contracted),
        proposal=MipProposalConfig(hidden_width=8, hidden_layers=1, num_samples=(6, 7)),
        radiance=MipRadianceConfig(
            hidden_width=8, hidden_layers=layers, num_samples=5, bottleneck_width=4, view_width=6
        ),
        **keys,  # type: ignore[arg-type]
    )


def make(configuration: MipNeRF360Config, backend: str = "reference") -> MipNeRF360:
    """A model whose densities differ enough to matter."""
    torch.manual_seed(3)
    model = MipNeRF360(configuration, scene(), Backends.all(backend))
    with torch.no_grad():
        for network in (model.proposal, model.radiance):
            network.density.weight.mul_(4.0)
            network.density.bias.fill_(0.5)
    return model


def some_rays(count: int = 4, width: float = 0.02, dtype: torch.dtype = torch.float64) -> Rays:
    generator = torch.Generator().manual_seed(5)
    targets, starts = torch.randn(2, count, 3, generator=generator, dtype=torch.float64)
    origins = 3.0 * torch.nn.functional.normalize(starts)
    directions = torch.nn.functional.normalize(0.5 * targets - origins)
    near, far = torch.ones(count, dtype=dtype), torch.zeros(count, dtype=dtype)
    radii = torch.full((count,), width, dtype=dtype)
    indices = torch.zeros(count, dtype=torch.int64)
    return Rays(origins.to(dtype), directions.to(dtype), near, far, indices, radii)


class Plain:
    """The same rendering from the same parameters, written down a second time: one ray, loops, NumPy."""

    def __init__(self, model: MipNeRF360, exponent: float) -> None:
        self.config, self.unit, self.exponent = model.config, model.unit, exponent
        self.state = {name: value.double().numpy() for name, value in model.state_dict().items()}
        self.basis = icosahedron_directions().double().numpy()

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.state[f"{name}.weight"] @ x + self.state[f"{name}.bias"]

    def warp(self, t: float) -> float:
        return t if self.config.spacing == "linear" else 1.0 / t

    def distances(self, s: np.ndarray) -> np.ndarray:
        near, far = self.warp(self.config.near), self.warp(self.config.far)
        return np.array([self.warp(near + x * (far - near)) for x in s])

    def gaussian(self, origin: np.ndarray, d: np.ndarray, radius: float, t0: float, t1: float) -> tuple:
        """Moments of t with density proportional to t^2, and of a disc that grows with t."""
        volume = (t1**3 - t0**3) / 3
        mean, square = (t1**4 - t0**4) / 4 / volume, (t1**5 - t0**5) / 5 / volume
        axis = np.outer(d, d)
        covariance = (square - mean**2) * axis + radius**2 * square / 4 * (np.eye(3) - axis)
        position = origin + mean * d
        if self.config.encoding.contracted:
            at = torch.from_numpy(position)
            jacobian = torch.autograd.functional.jacobian(contract, at).numpy()
            position, covariance = contract(at).numpy(), jacobian @ covariance @ jacobian.T
        return position, covariance

    def density(self, name: str, gaussian: tuple) -> tuple[float, np.ndarray]:
        mean, covariance = gaussian
        sines, cosines = [], []
        for octave in range(self.config.encoding.num_frequencies):
            for p in self.basis:
                damping = np.exp(-0.5 * 4**octave * (p @ covariance @ p))
                sines.append(damping * np.sin(2**octave * (p @ mean)))
                cosines.append(damping * np.cos(2**octave * (p @ mean)))
        encoded = np.array(sines + cosines)
        hidden, layer = encoded, 0
        while f"{name}.layers.{layer}.weight" in self.state:
            hidden = np.maximum(self.linear(f"{name}.layers.{layer}", hidden), 0)
            if layer == 4:
                hidden = np.concatenate([hidden, encoded])
            layer += 1
        return float(np.log1p(np.exp(self.linear(f"{name}.density", hidden)[0] - 1.0))), hidden

    def color(self, features: np.ndarray, d: np.ndarray) -> np.ndarray:
        encoded = [d]
        for octave in range(self.config.encoding.direction_frequencies):
            encoded += [np.sin(2**octave * d), np.cos(2**octave * d)]
        inputs = np.concatenate([self.linear("color.bottleneck", features), *encoded])
        raw = self.linear("color.rgb", np.maximum(self.linear("color.view", inputs), 0))
        return 1.002 / (1 + np.exp(-raw)) - 0.001

    def weights(self, density: list[float], t: np.ndarray) -> np.ndarray:
        light, weights = 1.0, []
        for k, value in enumerate(density):
            is_end = self.config.opaque_background and k == len(density) - 1
            alpha = 1.0 if is_end else 1 - np.exp(-value * (t[k + 1] - t[k]))
            weights.append(light * alpha)
            light *= 1 - alpha
        return np.array(weights)

    def resample(self, s: np.ndarray, weights: np.ndarray, amount: float, count: int) -> np.ndarray:
        """On a fine lattice: the widened density, to a power, and where its shares have passed."""
        per_length = weights / np.diff(s)
        knots = np.unique(np.clip(np.concatenate([s, s[:-1] - amount, s[1:] + amount]), 0, 1))
        mass = []
        for a, b in pairwise(knots):
            middle = (a + b) / 2
            over = (s[:-1] - amount < middle) & (middle < s[1:] + amount)
            mass.append(per_length[over].max(initial=0.0) * (b - a))
        likely = (np.array(mass) / sum(mass)) ** self.exponent
        cumulative = np.concatenate([[0], np.cumsum(likely) / likely.sum()])
        centers = np.interp((np.arange(count) + 0.5) / count, cumulative, knots)
        middles = (centers[1:] + centers[:-1]) / 2
        return np.concatenate(
            [[max(0, 2 * centers[0] - middles[0])], middles, [min(1, 2 * centers[-1] - middles[-1])]]
        )

    def render(self, rays: Rays, ray: int) -> tuple[np.ndarray, float, float, list[np.ndarray]]:
        origin, d = rays.origins[ray].double().numpy() / self.unit, rays.directions[ray].double().numpy()
        radius = float(rays.radii[ray])
        counts = (*self.config.proposal.num_samples, self.config.radiance.num_samples)
        product, found = 1, [np.ones(1)]
        s = np.array([0.0, 1.0])
        for level, count in enumerate(counts):
            amount = 0.5 / product + 0.0025 if level > 0 else 0.0
            s = self.resample(s, found[-1], amount, count)
            product *= count
            t = self.distances(s)
            name = "radiance" if level == len(counts) - 1 else "proposal"
            gaussians = [self.gaussian(origin, d, radius, a, b) for a, b in pairwise(t)]
            answers = [self.density(name, gaussian) for gaussian in gaussians]
            found.append(self.weights([density for density, _ in answers], t))
        weights = found[-1]
        colors = np.array([self.color(features, d) for _, features in answers])
        opacity = weights.sum()
        middles = self.unit * (t[1:] + t[:-1]) / 2
        depth = opacity * np.exp((weights * np.log(middles)).sum() / opacity)
        return weights @ colors + (1 - opacity), depth, opacity, found[1:]


@pytest.mark.parametrize("exponent", [1.0, 0.3])
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"far": 1000.0}, id="unbounded"),
        pytest.param({"far": 1000.0, "unit": 0.5, "near": 1.0}, id="another unit"),
        pytest.param({**BOUNDED, "unit": 1.0, "contracted": False}, id="bounded"),
        pytest.param({"far": 1000.0, "layers": 4}, id="without skip"),
    ],
)
def test_rays_are_rendered_as_a_second_renderer_does(keys: dict[str, object], exponent: float) -> None:
    model = make(config(**keys)).double()  # type: ignore[arg-type]
    rays, progress = some_rays(), replace(DONE, proposal_anneal=exponent)
    with torch.no_grad():
        render = model.render(rays, progress, WHITE.double())
    plain = Plain(model, exponent)
    for ray in range(len(rays)):
        rgb, depth, opacity, weights = plain.render(rays, ray)
        np.testing.assert_allclose(render.rgb[ray].numpy(), rgb, atol=1e-7)
        assert render.depth[ray].item() == pytest.approx(depth, rel=1e-6)
        assert render.opacity[ray].item() == pytest.approx(opacity, abs=1e-8)
        for histogram, expected in zip(render.histograms, weights, strict=True):
            np.testing.assert_allclose(histogram.weights[ray].numpy(), expected, atol=1e-7)
    assert render.weights.std() > 0.05, "the weights differ"


def test_sizes_of_the_paper() -> None:
    model = make(
        MipNeRF360Config(
            proposal=MipProposalConfig(256, 4),
            radiance=MipRadianceConfig(1024, 8, bottleneck_width=256, view_width=128),
        )
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    # 504 inputs; layer 6 of 8 sees them again; 27 numbers of the view direction.
    proposal = 505 * 256 + 3 * 257 * 256 + 257
    radiance = 505 * 1024 + 6 * 1025 * 1024 + (1024 + 504 + 1) * 1024
    color = 1025 * 1 + 1025 * 256 + (256 + 27 + 1) * 128 + 129 * 3
    assert count == proposal + radiance + color


def test_initial_weights_are_he_uniform() -> None:
    network = DensityMLP(EncodingConfig(), LayersConfig(256, 2), "float32")
    for layer in network.layers:
        bound = (6 / layer.in_features) ** 0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert (layer.bias == 0).all()


def test_density_can_be_nothing_and_opaque() -> None:
    network = DensityMLP(EncodingConfig(2), LayersConfig(4, 1), "float32")
    gaussians = make(config())._cubes(torch.zeros(1, 3))
    found = []
    for bias in (-60.0, 0.0, 1000.0):
        with torch.no_grad():
            network.density.weight.zero_()
            network.density.bias.fill_(bias)
        found.append(network(gaussians)[0].item())
    assert found[0] < 1e-6
    assert found[1] == pytest.approx(np.log1p(np.exp(-1.0)))
    assert found[2] == pytest.approx(999.0)


def test_black_and_white_are_within_reach() -> None:
    head = ColorHead(2, 3, 4, 2)
    with torch.no_grad():
        head.rgb.weight.zero_()
        head.rgb.bias.copy_(torch.tensor([-20.0, 0.0, 20.0]))
    rgb = head(torch.zeros(1, 2), torch.tensor([[0.0, 0, 1]]))[0]
    torch.testing.assert_close(rgb, torch.tensor([-0.001, 0.5, 1.001]))


def test_colors_know_their_own_ray() -> None:
    torch.manual_seed(0)
    head = ColorHead(2, 3, 16, 2)
    features, directions = torch.randn(6, 2), torch.nn.functional.normalize(torch.randn(3, 3))
    together = head(features, directions)
    for ray in range(3):
        rows = slice(2 * ray, 2 * ray + 2)
        torch.testing.assert_close(together[rows], head(features[rows], directions[ray : ray + 1]))


def test_unit_holds_all_training_cameras_and_the_unit_sphere() -> None:
    for distance, unit in ((3.0, 3.0), (0.4, 1.0)):
        model = MipNeRF360(config(), scene(distance), Backends.all("reference"))
        assert model.unit == pytest.approx(unit)
    assert make(config(unit=0.25)).unit == 0.25


def test_scene_units_do_not_matter() -> None:
    """A capture twice as large, in units of twice the length, looks the same and is twice as deep."""
    small, large = (make(config(unit=unit, far=100.0)).double() for unit in (1.0, 2.0))
    large.load_state_dict(small.state_dict())
    rays = some_rays()
    with torch.no_grad():
        first = small.render(rays, DONE, WHITE.double())
        second = large.render(replace(rays, origins=2 * rays.origins), DONE, WHITE.double())
    torch.testing.assert_close(second.rgb, first.rgb)
    torch.testing.assert_close(second.depth, 2 * first.depth)
    torch.testing.assert_close(second.positions, 2 * first.positions)


def test_wide_pixels_see_less_detail() -> None:
    model = make(config(octaves=8))
    fine, wide = (some_rays(width=width, dtype=torch.float32) for width in (0.001, 0.2))
    distances = torch.linspace(1.0, 3.0, 65).expand(4, -1)
    spread = []
    for rays in (fine, wide):
        cones = model._cones(rays.origins, rays.directions, rays.radii, distances)
        spread.append(model.radiance(cones)[0].view(4, 64).diff(dim=1).abs().mean().item())
    assert spread[1] < 0.7 * spread[0]


def test_opaque_background_ends_every_ray() -> None:
    rays = some_rays(dtype=torch.float32)
    model = make(config())
    with torch.no_grad():
        model.radiance.density.weight.zero_()
        model.radiance.density.bias.fill_(-100.0)
    closed = model.render(rays, DONE, WHITE)
    torch.testing.assert_close(closed.opacity, torch.ones(4))
    open_model = make(config(**BOUNDED))
    open_model.load_state_dict(model.state_dict())
    empty = open_model.render(rays, DONE, torch.tensor([0.2, 0.4, 0.6]))
    torch.testing.assert_close(empty.rgb, torch.tensor([[0.2, 0.4, 0.6]]).expand(4, 3))
    assert torch.isfinite(empty.depth).all()


def test_gradients_stop_between_levels() -> None:
    """Colours teach the rendered network alone; a proposal's weights teach the proposals alone."""
    model = make(config())
    generator = torch.Generator().manual_seed(0)
    render = model.render(some_rays(dtype=torch.float32), DONE, WHITE, generator)
    render.rgb.sum().backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in model.proposal.parameters())
    assert all(parameter.grad is not None for parameter in model.color.parameters())
    model.zero_grad()
    sum(h.weights[:, ::2].sum() for h in render.histograms[:-1]).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in model.proposal.parameters())
    assert all(parameter.grad is None for parameter in model.radiance.parameters())
    assert not any(histogram.edges.requires_grad for histogram in render.histograms)


def test_poses_learn_from_colors_and_not_from_proposals() -> None:
    model, rays = make(config()), some_rays(dtype=torch.float32)
    rays = replace(rays, origins=rays.origins.requires_grad_())
    render = model.render(rays, DONE, WHITE, torch.Generator().manual_seed(0))
    assert not any(
        torch.autograd.grad(h.weights[:, 0].sum(), rays.origins, allow_unused=True, retain_graph=True)[0]
        is not None
        for h in render.histograms[:-1]
    )
    (slope,) = torch.autograd.grad(render.rgb.sum(), rays.origins)
    assert slope.abs().max() > 1e-4


def test_normals_point_to_where_the_density_falls() -> None:
    model = make(config()).double()
    rays = some_rays()
    with torch.no_grad():
        render = model.render(rays, DONE, WHITE.double())
    edges, _ = model.sample(rays, DONE, None)
    cones = model._cones(rays.origins, rays.directions, rays.radii, model._distances(edges))
    step, slopes = 1e-6, []
    for axis in torch.eye(3, dtype=torch.float64):
        ahead, behind = (
            model.radiance(replace(cones, means=cones.means + sign * step * axis))[0] for sign in (1, -1)
        )
        slopes.append((ahead - behind) / (2 * step))
    normal = -torch.nn.functional.normalize(torch.stack(slopes, dim=1))
    expected = (render.weights[:, None] * normal).view(4, -1, 3).sum(dim=1)
    torch.testing.assert_close(render.normal, expected.detach(), atol=1e-5, rtol=0)
    assert not render.normal.requires_grad
    trained = model.render(rays, DONE, WHITE.double(), torch.Generator().manual_seed(0))
    assert (trained.normal == 0).all(), "training does without"


def test_budget_says_which_rays_count() -> None:
    model, rays = make(config(), "cpu"), some_rays(dtype=torch.float32)
    budget = Budget(torch.tensor(3), 1000, 1000)
    with torch.no_grad():
        limited, free = (
            model.render(rays, DONE, WHITE, torch.Generator().manual_seed(1), b) for b in (budget, None)
        )
    assert limited.is_served is not None
    assert limited.is_sample is not None
    assert limited.is_served.tolist() == [True, True, True, False]
    assert limited.is_sample.view(4, 5).sum(dim=1).tolist() == [5, 5, 5, 0]
    assert (int(limited.num_samples), int(limited.num_rays)) == (15, 3)
    assert (int(limited.num_marched), free.num_marched) == (3 * 18, 4 * 18)
    assert free.is_served is None
    torch.testing.assert_close(limited.rgb, free.rgb)


@pytest.mark.parametrize("generator", [None, 3])
def test_rays_without_any_width_and_no_rays_at_all(generator: int | None) -> None:
    model, rays = make(config(octaves=12)), some_rays(dtype=torch.float32)
    draws = None if generator is None else torch.Generator().manual_seed(generator)
    render = model.render(replace(rays, radii=None), DONE, WHITE, draws)
    assert torch.isfinite(render.rgb).all()
    none = model.render(rays[:0], DONE, WHITE, draws)
    assert none.rgb.shape == (0, 3)


def test_density_counts_in_scene_units() -> None:
    model = make(config(unit=4.0))
    positions = torch.randn(10, 3)
    density = model.query_density(positions)
    inside, _ = model.radiance(model._cubes(positions))
    torch.testing.assert_close(density, inside / 4)
    # Pixels 1 / 20 wide at distance 1, from a distance of 3, and a cube's variance of side^2 / 12.
    side = 3 / 20 / 4
    torch.testing.assert_close(model._cubes(positions).covariances[0], side**2 / 12 * torch.eye(3))
    directions = torch.nn.functional.normalize(torch.randn(10, 3))
    colors = model.query_color(positions, directions)
    assert ((colors >= 0) & (colors <= 1)).all()


def test_surface_is_where_the_density_passes_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unbounded, "dense_cells", partial(dense_cells, size=32))
    positions = torch.randn(201, 3) * 0.4

    def ball(model: MipNeRF360, at: Tensor) -> Tensor:
        """Dense within 0.3 of (0.2, 0, -0.1), with a soft border as wide as a cell."""
        gap = (at - torch.tensor([0.2, 0.0, -0.1])).norm(dim=1) - 0.3
        return 20 * torch.sigmoid(-gap / 0.06)

    monkeypatch.setattr(MipNeRF360, "query_density", ball)
    model = make(config(surface_density=10.0))
    gap = (positions - torch.tensor([0.2, 0.0, -0.1])).norm(dim=1) - 0.3
    sdf = model.frozen_at(DONE).query_sdf(positions)
    assert torch.equal(sdf < 0, gap < 0)
    assert 10 < (gap < 0).sum() < 190
    # Far from it the distance is known, so that nobody looks there twice.
    is_far = gap > 0.4
    assert is_far.sum() > 10
    assert (sdf[is_far] > 0.02).all()
    assert (sdf <= gap.clamp(min=0.002)).all()


def test_half_precision_is_close_and_learns() -> None:
    models = [make(config(precision=precision)) for precision in ("float32", "bfloat16")]
    rays, gradients = some_rays(dtype=torch.float32), []
    renders = []
    for model in models:
        render = model.render(rays, DONE, WHITE, torch.Generator().manual_seed(0))
        (render.rgb - 0.2).square().sum().backward()
        renders.append(render.rgb.detach())
        gradients.append(model.color.rgb.weight.grad)
    torch.testing.assert_close(renders[1], renders[0], atol=0.05, rtol=0)
    assert not torch.equal(renders[1], renders[0])
    assert torch.isfinite(gradients[1]).all()  # type: ignore[arg-type]


def test_warped_scenes_are_refused() -> None:
    warp = NDC(torch.eye(4, dtype=torch.float64)[:3], 1.0, 1.0, 1.0)
    one = scene()
    with pytest.raises(ConfigError, match=r"^dataset\.ndc: .*; set it to false"):
        MipNeRF360(config(), replace(one, cameras=replace(one.cameras, ndc=warp)), Backends.all("reference"))


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (MipNeRF360Config, {"near": 0.0}, "model.near"),
        (MipNeRF360Config, {"near": 5.0, "far": 2.0}, "model.near"),
        (MipNeRF360Config, {"unit": -1.0}, "model.unit"),
        (MipNeRF360Config, {"dilation_bias": 2.0}, "model.dilation_bias"),
        (MipProposalConfig, {"num_samples": ()}, "model.proposal.num_samples"),
        (MipProposalConfig, {"hidden_layers": 0}, "model.proposal.hidden_layers"),
        (MipRadianceConfig, {"num_samples": 1}, "model.radiance.num_samples"),
        (MipRadianceConfig, {"hidden_width": 0}, "model.radiance.hidden_width"),
        (EncodingConfig, {"num_frequencies": 0}, "model.encoding.num_frequencies"),
    ],
)
def test_impossible_numbers_are_refused(kind: type, keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.") + ":"):
        kind(**keys)


def fitted(model: MipNeRF360, steps: int) -> tuple[float, float]:
    """PSNR before and after some steps on a ball, red in front of blue, seen from everywhere."""

    def batch(seed: int) -> tuple[Rays, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        starts, towards = torch.randn(2, 128, 3, generator=generator)
        origins = 3 * torch.nn.functional.normalize(starts)
        directions = torch.nn.functional.normalize(0.6 * towards - origins)
        closest = origins - (origins * directions).sum(dim=1, keepdim=True) * directions
        is_ball = closest.norm(dim=1, keepdim=True) < 0.7
        rgb = torch.where(is_ball, torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.8]))
        one = torch.ones(128)
        return Rays(origins, directions, one, one, torch.zeros(128, dtype=torch.int64), 0.01 * one), rgb

    def psnr() -> float:
        rays, rgb = batch(999)
        with torch.no_grad():
            error = (model.render(rays, DONE, WHITE).rgb - rgb).square().mean()
        return float(-10 * error.log10())

    before = psnr()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(steps):
        rays, rgb = batch(step)
        render = model.render(rays, DONE, WHITE, torch.Generator().manual_seed(step))
        *proposals, last = render.histograms
        loss = ((render.rgb - rgb).square() + 1e-6).sqrt().mean() + 0.01 * distortion(last)
        loss = loss + sum(interlevel(outer, last) for outer in proposals)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, psnr()


def test_a_few_steps_learn() -> None:
    torch.manual_seed(0)
    small = MipNeRF360Config(
        encoding=EncodingConfig(4),
        proposal=MipProposalConfig(32, 1, num_samples=(16, 16)),
        radiance=MipRadianceConfig(32, 2, num_samples=12, bottleneck_width=16, view_width=16),
    )
    before, after = fitted(MipNeRF360(small, scene(), Backends.all("reference")), 40)
    assert after > before + 6
    assert after > 16
