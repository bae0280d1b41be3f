"""The background: contraction of space, distances along rays, and colours that end somewhere."""

import pytest
import torch
from helpers_triton import DEVICE, needs_triton
from torch import Tensor

from encoder import HashGridConfig, encode_spherical_harmonics
from models.backends import Backends
from models.background import Background, BackgroundConfig
from models.contraction import contract
from models.density_field import density_of
from models.proposal import ProposalConfig
from utils.types import Rays

GRID = HashGridConfig(num_levels=2, log2_table_size=8, base_resolution=4, max_resolution=8)


def make_background(
    num_samples: int = 8, far: float = 100.0, backend: str = "cpu", unit: float = 1.0
) -> Background:
    config = BackgroundConfig(True, num_samples=num_samples, far=far, hash_grid=GRID, precision="float32")
    return Background(config, unit, Backends.all(backend))


def with_proposals(unit: float = 1.0) -> Background:
    proposal = ProposalConfig((6, 5), (8, 16), 2, 8, 4, 8, precision="float32")
    config = BackgroundConfig(
        True, sampler="proposal", proposal=proposal, num_samples=8, hash_grid=GRID, precision="float32"
    )
    return Background(config, unit, Backends.all("cpu"))


def rays_of(origins: Tensor, directions: Tensor, near: Tensor, far: Tensor) -> Rays:
    return Rays(origins, directions, near, far, torch.zeros(len(origins), dtype=torch.int64))


def mixed_rays() -> Rays:
    """From (0, 0, -3): through the centre; past the sphere; away from it. From inside: outwards."""
    origins = torch.tensor([[0.0, 0.0, -3.0], [0.0, 2.0, -3.0], [0.0, 0.0, -3.0], [0.0, 0.0, 0.5]])
    directions = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [0.0, 0.0, 1.0]])
    return rays_of(
        origins, directions, torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([4.0, 0.0, 0.0, 0.5])
    )


def even_distances(background: Background, rays: Rays, generator: torch.Generator | None) -> Tensor:
    near = background.start(rays)
    return background.even_intervals(rays, near, torch.full_like(near, background.far), generator).t


def test_distances_by_hand() -> None:
    # Four bins from 4 to 100, even in 1 / t: 0.25, 0.19, 0.13, 0.07, 0.01.
    distances = even_distances(make_background(num_samples=4), mixed_rays(), None)
    expected = torch.tensor([1 / 0.25, 1 / 0.19, 1 / 0.13, 1 / 0.07, 1 / 0.01])
    torch.testing.assert_close(distances[0], expected)
    # Past the sphere: from the point closest to the centre. Away from it: from close to the camera.
    assert distances[1, 0].item() == pytest.approx(3.0)
    assert distances[2, 0].item() == pytest.approx(0.05)
    assert distances[3, 0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("num_samples", [1, 2, 8, 64])
def test_distances_rise_to_the_far_end(num_samples: int) -> None:
    background = make_background(num_samples)
    rays = mixed_rays()
    for seed in range(20):
        distances = even_distances(background, rays, torch.Generator().manual_seed(seed))
        assert distances.shape == (4, num_samples + 1)
        assert (distances.diff(dim=1) > 0).all()
        plain = even_distances(background, rays, None)
        torch.testing.assert_close(distances[:, [0, -1]], plain[:, [0, -1]])
        torch.testing.assert_close(distances[:, -1], torch.full((4,), 100.0))
        if num_samples > 1:
            assert not torch.equal(distances, plain)


def paint(background: Background, color: list[float]) -> None:
    """Give every sample the same colour, so that only the weights' sum is left to see."""
    last = background.density_field.color_network[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.logit(torch.tensor(color)))


@pytest.mark.parametrize("num_samples", [1, 2, 16])
@pytest.mark.parametrize("density_bias", [-20.0, 0.0, 30.0])
def test_weights_sum_to_one(num_samples: int, density_bias: float) -> None:
    background = make_background(num_samples)
    paint(background, [0.2, 0.5, 0.9])
    last = background.density_field.density_network[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.bias[0] = density_bias
    rgb = background(mixed_rays(), torch.Generator().manual_seed(0)).rgb
    torch.testing.assert_close(rgb, torch.tensor([0.2, 0.5, 0.9]).expand(4, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("unit", [1.0, 3.0])
def test_dense_first_bin_hides_the_rest(unit: float) -> None:
    # Colours differ along the ray; what is behind the first bin must not matter.
    background = make_background(num_samples=4, unit=unit)
    last = background.density_field.density_network[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.bias[0] = 30.0
    rays = mixed_rays()
    edges = even_distances(background, rays, None)
    middle = 0.5 * (edges[:, 0] + edges[:, 1])
    positions = (rays.origins + middle[:, None] * rays.directions) / unit
    raw = background.density_field.density_network(background.density_field.grid(contract(positions), 2.0))
    directions = encode_spherical_harmonics(rays.directions, background.density_field.direction_degree)
    expected = torch.sigmoid(
        background.density_field.color_network(torch.cat([raw[:, 1:], directions], dim=1))
    )
    torch.testing.assert_close(background(rays, None).rgb, expected, atol=1e-5, rtol=0)
    # Whoever meshes it asks in scene space.
    at = rays.origins + middle[:, None] * rays.directions
    torch.testing.assert_close(background.query_color(at, rays.directions), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(background.query_density(at), density_of(raw[:, 0]) / unit)


def test_colours_and_gradients_are_finite_and_reach_everything() -> None:
    background = make_background(16, far=1000.0)
    with torch.no_grad():
        background.density_field.grid.table.uniform_(-1, 1)
    rgb = background(mixed_rays(), torch.Generator().manual_seed(0)).rgb
    assert rgb.shape == (4, 3)
    assert ((rgb > 0) & (rgb < 1)).all()
    (rgb * torch.randn(4, 3)).sum().backward()
    for name, parameter in background.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_checkpoint_keeps_its_unit() -> None:
    trained, other = make_background(unit=3.0), make_background(unit=2.0)
    other.load_state_dict(trained.state_dict())
    rays = mixed_rays()
    assert torch.equal(other(rays, None).rgb, trained(rays, None).rgb)


@pytest.mark.parametrize("seed", [None, 0])
def test_proposals_place_the_samples(seed: int | None) -> None:
    background = with_proposals()
    rays = mixed_rays()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shown = background(rays, generator)
    assert [tuple(h.weights.shape) for h in shown.histograms] == [(4, 6), (4, 5), (4, 8)]
    for histogram in shown.histograms:
        torch.testing.assert_close(histogram.weights.sum(dim=1), torch.ones(4))
    # Where proposals see a wall, most samples go: all of space is thin but for a slab.
    density = background.sampler.fields[1].forward

    def wall(positions: Tensor, count: Tensor | None = None) -> Tensor:
        inside = (positions[:, 2] > 1.6) & (positions[:, 2] < 1.8)
        return 0.0 * density(positions, count) + torch.where(inside, 100.0, 1e-3)

    for field in background.sampler.fields:
        field.forward = wall
    through = rays[:1]
    near, far = background.start(through), torch.full((1,), background.far)
    intervals, _ = background.sampler(through, near, far, 1.0, None)
    height = intervals.positions[:, 2]
    assert float(((height > 1.5) & (height < 1.9)).float().mean()) > 0.7


def test_proposals_leave_the_colours_to_the_field() -> None:
    background = with_proposals()
    with torch.no_grad():
        background.density_field.grid.table.uniform_(-1, 1)
    shown = background(mixed_rays(), torch.Generator().manual_seed(0))
    shown.rgb.square().sum().backward()
    for name, parameter in background.named_parameters():
        assert (parameter.grad is None) == name.startswith("sampler."), name


def test_without_rays() -> None:
    nothing = torch.zeros(0)
    rays = rays_of(torch.zeros(0, 3), torch.zeros(0, 3), nothing, nothing)
    background = make_background()
    rgb = background(rays, None).rgb
    assert rgb.shape == (0, 3)
    rgb.sum().backward()


def colours_and_gradients(
    background: Background, rays: Rays, num_rays: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Colours without jitter, and the derivatives of a function of them in all parameters."""
    rgb = background(rays, None, num_rays).rgb
    if num_rays is not None:
        rgb = torch.where((torch.arange(len(rgb), device=rgb.device) < num_rays)[:, None], rgb, 0.0)
    names, parameters = zip(*background.named_parameters(), strict=True)
    gradients = torch.autograd.grad(rgb.square().sum(), parameters)
    return rgb.detach().cpu(), {n: g.cpu() for n, g in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("num_rays", [None, 3, 0])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=needs_triton)])
def test_versions_agree(backend: str, num_rays: int | None) -> None:
    device = DEVICE if backend == "cuda" else torch.device("cpu")
    fast, slow = make_background(backend=backend), make_background(backend="reference")
    with torch.no_grad():
        fast.density_field.grid.table.uniform_(-0.5, 0.5)
    slow.load_state_dict(fast.state_dict())
    rays = mixed_rays()
    real = None if num_rays is None else torch.tensor(num_rays, device=device)
    rgb, gradients = colours_and_gradients(fast.to(device), rays.to(device), real)
    # The reference gets nothing but the real rays.
    expected, expected_gradients = colours_and_gradients(slow, rays[slice(num_rays)])
    torch.testing.assert_close(rgb[:num_rays], expected, atol=1e-5, rtol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, r"model\.background\.num_samples"),
        ({"num_samples": 1, "sampler": "proposal"}, r"model\.background\.num_samples: must be at least 2"),
        ({"far": 2.0}, r"model\.background\.far: must be above 2"),
        ({"hidden_width": 0}, r"model\.background\.hidden_width: must lie in 1\.\.4096"),
        ({"direction_degree": 9}, r"model\.background\.direction_degree: must lie in 1\.\.5"),
        ({"surface_density": 0.0}, r"model\.background\.surface_density: must lie in"),
    ],
)
def test_config_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackgroundConfig(**change)  # type: ignore[arg-type]
