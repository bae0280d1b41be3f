"""Ray marching against brute force, and dropping what nothing can see."""

import math
from dataclasses import fields

import pytest
import torch
from helpers_triton import DEVICE, Kernel, compile_ahead, needs_triton
from helpers_waiting import NoWaiting
from torch import Tensor

from models import marching
from models.opacity import DENSITIES, DensityName
from utils.types import Rays, RaySamples

# An exponential that overflows is meant: its reciprocal is the zero that is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "cuda" else torch.device("cpu")


def moved(samples: RaySamples, device: torch.device | str) -> RaySamples:
    columns = [getattr(samples, field.name) for field in fields(samples)]
    return RaySamples(*[None if column is None else column.to(device) for column in columns])


def march(
    rays: Rays,
    occupied: Tensor,
    step: float | Tensor,
    jitter: Tensor,
    backend: str,
    capacity: int | None = None,
) -> RaySamples:
    """March where the backend's tensors live; all else here is on the CPU."""
    device = device_of(backend)
    width = step.to(device) if isinstance(step, Tensor) else step
    return moved(
        marching.march(rays.to(device), occupied.to(device), width, jitter.to(device), backend, capacity),
        "cpu",
    )


def drop_hidden(
    samples: RaySamples,
    sdf: Tensor,
    sharpness: float | Tensor,
    step: float | Tensor,
    threshold: float,
    backend: str,
    capacity: int | None = None,
    density: DensityName = "neus",
) -> RaySamples:
    device = device_of(backend)
    scalars = [value.to(device) if isinstance(value, Tensor) else value for value in (sharpness, step)]
    return moved(
        marching.drop_hidden(
            *(moved(samples, device), sdf.to(device), *scalars, threshold, density, backend),
            capacity=capacity,
        ),
        "cpu",
    )


def rays_of(origins: Tensor, directions: Tensor, near: Tensor, far: Tensor) -> Rays:
    return Rays(origins, directions, near, far, torch.zeros(len(origins), dtype=torch.int64))


def one_ray(origin: list[float], direction: list[float], near: float, far: float) -> Rays:
    return rays_of(
        torch.tensor([origin]), torch.tensor([direction]), torch.tensor([near]), torch.tensor([far])
    )


def random_rays(count: int) -> Rays:
    """Half start outside the cube, half inside; they end anywhere between a little and far behind it."""
    origins = torch.randn(count, 3) * torch.where(torch.arange(count) % 2 == 0, 1.5, 0.3)[:, None]
    directions = torch.nn.functional.normalize(torch.randn(count, 3), dim=1)
    near = torch.rand(count)
    return rays_of(origins, directions, near, near + 4 * torch.rand(count))


def lattice(rays: Rays, ray: int, step: float, jitter: Tensor) -> list[float]:
    """The ray's lattice positions, in float64."""
    near, far, shift = float(rays.near[ray]), float(rays.far[ray]), float(jitter[ray])
    count = max(0, math.ceil((far - near) / step - shift + 1e-6))
    return [near + (k + shift) * step for k in range(count)]


def assert_marched_like_brute_force(
    samples: RaySamples, rays: Rays, occupied: Tensor, step: float, jitter: Tensor
) -> None:
    """Look every lattice position up; only those within 1e-5 of a cell border (or of the end) may differ."""
    levels = occupied if occupied.dim() == 4 else occupied[None]
    resolution = levels.shape[1]
    assert samples.offsets[0] == 0
    assert samples.offsets[-1] == len(samples)
    assert samples.offsets.shape == (len(rays) + 1,)
    num_sure = 0
    for ray in range(len(rays)):
        first, last = samples.offsets[ray : ray + 2].tolist()
        assert (samples.ray_indices[first:last] == ray).all()
        middles = samples.t_middle[first:last]
        assert (middles.diff() > 0).all()
        ticks = ((middles.double() - rays.near[ray].double()) / step - jitter[ray].double()).tolist()
        found = {round(k) for k in ticks}
        assert len(found) == len(ticks)
        assert all(abs(k - round(k)) < 1e-3 for k in ticks)
        for k, t in enumerate(lattice(rays, ray, step, jitter)):
            position = [
                float(o) + t * float(d) for o, d in zip(rays.origins[ray], rays.directions[ray], strict=True)
            ]
            reach = max(abs(x) for x in position)
            level = sum(reach >= 2**k for k in range(len(levels) - 1))
            scaled = [(x / 2**level + 1) * resolution / 2 for x in position]
            moves = [float(d) != 0 for d in rays.directions[ray]]
            is_near_border = any(
                abs(x - round(x)) < 1e-5 * resolution for x, m in zip(scaled, moves, strict=True) if m
            )
            is_near_face = any(abs(reach - 2**k) < 1e-5 for k in range(len(levels) - 1))
            if is_near_border or is_near_face or abs(t - float(rays.far[ray])) < 1e-5:
                continue
            x, y, z = (min(max(math.floor(s), 0), resolution - 1) for s in scaled)
            expected = bool(levels[level, z, y, x]) and t < float(rays.far[ray])
            assert (k in found) == expected, (ray, k, t, position)
            num_sure += expected
    # The comparison has to be about something: nearly all samples are clear of borders.
    assert num_sure >= 0.9 * len(samples)
    torch.testing.assert_close(
        samples.t_ends - samples.t_starts, torch.full_like(samples.t_ends, step), atol=1e-5, rtol=0
    )


def test_one_ray_by_hand(backend: str) -> None:
    # Cells of 0.5; of the four along the ray the second ([-0.5, 0)) and the last are occupied.
    occupied = torch.zeros(4, 4, 4, dtype=torch.bool)
    occupied[2, 1, 1] = occupied[2, 1, 3] = True
    rays = one_ray([-2.0, -0.25, 0.25], [1.0, 0.0, 0.0], 1.0, 3.0)
    samples = march(rays, occupied, 0.25, torch.tensor([0.5]), backend)
    assert samples.t_starts.tolist() == [1.5, 1.75, 2.5, 2.75]
    assert samples.t_ends.tolist() == [1.75, 2.0, 2.75, 3.0]
    assert samples.offsets.tolist() == [0, 4]
    assert samples.positions(rays)[0].tolist() == [-0.375, -0.25, 0.25]


def test_axes_of_the_grid_are_z_y_x(backend: str) -> None:
    for axis in range(3):
        occupied = torch.zeros(4, 4, 4, dtype=torch.bool)
        # Cell 0 along x, 1 along y, 2 along z, hit along each axis in turn.
        occupied[2, 1, 0] = True
        origin = [-0.75, -0.25, 0.25]
        centre = origin[axis]
        origin[axis] = -1.0
        direction = [float(axis == other) for other in range(3)]
        samples = march(one_ray(origin, direction, 0.0, 2.0), occupied, 0.125, torch.tensor([0.5]), backend)
        assert len(samples) == 4
        assert float(samples.t_middle.mean()) == centre + 1.0


@pytest.mark.parametrize(
    ("resolution", "step", "share"),
    [(8, 0.03, 0.3), (9, 0.05, 0.1), (32, 0.013, 0.05), (32, 0.2, 0.3), (2, 0.02, 0.5), (16, 0.7, 0.6)],
)
def test_against_brute_force(backend: str, resolution: int, step: float, share: float) -> None:
    occupied = torch.rand(resolution, resolution, resolution) < share
    # Triton's interpreter is slow, and rays do not know of one another.
    rays = random_rays(16 if backend == "cuda" else 40)
    jitter = torch.rand(len(rays))
    samples = march(rays, occupied, step, jitter, backend)
    assert len(samples) > 0
    assert_marched_like_brute_force(samples, rays, occupied, step, jitter)


def test_axis_parallel_rays(backend: str) -> None:
    occupied = torch.rand(8, 8, 8) < 0.3
    axes = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0], [0, 0, 1.0], [0, 0, -1.0]])
    # Some run exactly in the border between two cells, which then counts to the upper one, or along a face.
    across = torch.tensor(
        [[0.1, -0.3, 0.6], [0.25, 0.25, 0.25], [-0.75, 0.5, 0.0], [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]
    )
    directions = axes.repeat_interleave(len(across), dim=0)
    origins = across.repeat(6, 1) * (1 - directions.abs()) - 1.5 * directions
    rays = rays_of(origins, directions, torch.full((30,), 0.1), torch.full((30,), 3.0))
    jitter = torch.rand(30)
    samples = march(rays, occupied, 0.04, jitter, backend)
    assert len(samples) > 100
    assert_marched_like_brute_force(samples, rays, occupied, 0.04, jitter)


def test_almost_axis_parallel_rays(backend: str) -> None:
    occupied = torch.rand(16, 16, 16) < 0.3
    tilts = torch.tensor([1e-4, -1e-4, 1e-8, -1e-8, 1e-12, -1e-12, 1e-30, -0.0])
    directions = torch.nn.functional.normalize(torch.stack([torch.ones(8), tilts, -tilts], dim=1), dim=1)
    origins = torch.tensor([[-1.5, 0.03, 0.47]]).repeat(8, 1)
    rays = rays_of(origins, directions, torch.zeros(8), torch.full((8,), 3.0))
    jitter = torch.rand(8)
    samples = march(rays, occupied, 0.02, jitter, backend)
    assert len(samples) > 50
    assert_marched_like_brute_force(samples, rays, occupied, 0.02, jitter)


def test_rays_that_miss_get_nothing(backend: str) -> None:
    occupied = torch.ones(4, 4, 4, dtype=torch.bool)
    rays = random_rays(6)
    missing = rays_of(rays.origins, rays.directions, torch.ones(6), torch.zeros(6))
    samples = march(missing, occupied, 0.1, torch.rand(6), backend)
    assert len(samples) == 0
    assert samples.offsets.tolist() == [0] * 7
    assert samples.positions(missing).shape == (0, 3)

    # One that hits among them, neither first nor last.
    near, far = torch.ones(6), torch.zeros(6)
    far[3] = 1.45
    mixed = rays_of(rays.origins, rays.directions, near, far)
    samples = march(mixed, occupied, 0.1, torch.full((6,), 0.5), backend)
    assert samples.ray_indices.tolist() == [3] * 4
    assert samples.offsets.tolist() == [0, 0, 0, 0, 4, 4, 4]


def test_no_rays(backend: str) -> None:
    nothing = torch.zeros(0)
    rays = rays_of(torch.zeros(0, 3), torch.zeros(0, 3), nothing, nothing)
    samples = march(rays, torch.ones(4, 4, 4, dtype=torch.bool), 0.1, nothing, backend)
    assert len(samples) == 0
    assert samples.offsets.tolist() == [0]


def test_full_and_empty_grids(backend: str) -> None:
    rays = one_ray([0.1, 0.2, -2.0], [0.0, 0.0, 1.0], 1.0, 3.0)
    jitter = torch.tensor([0.5])
    assert len(march(rays, torch.zeros(8, 8, 8, dtype=torch.bool), 0.01, jitter, backend)) == 0
    samples = march(rays, torch.ones(8, 8, 8, dtype=torch.bool), 0.01, jitter, backend)
    assert len(samples) == 200
    torch.testing.assert_close(samples.t_middle, 1.005 + 0.01 * torch.arange(200))


def test_jitter_shifts_the_lattice(backend: str) -> None:
    occupied = torch.ones(8, 8, 8, dtype=torch.bool)
    rays = one_ray([0.0, 0.0, -2.0], [0.0, 0.0, 1.0], 1.0, 3.0)
    for jitter in (0.0, 0.25, 0.999):
        samples = march(rays, occupied, 0.1, torch.tensor([jitter]), backend)
        assert samples.t_middle[0].item() == pytest.approx(1.0 + 0.1 * jitter)
        assert (samples.t_middle < 3.0).all()
        assert samples.t_middle[-1].item() >= 3.0 - 0.1 - 1e-5


def test_non_contiguous_rays(backend: str) -> None:
    occupied = torch.rand(8, 8, 8) < 0.4
    rays = random_rays(10)
    jitter = torch.rand(10)
    strided = rays_of(
        rays.origins.t().contiguous().t(),
        rays.directions.t().contiguous().t(),
        torch.stack([rays.near, rays.far], dim=1)[:, 0],
        torch.stack([rays.near, rays.far], dim=1)[:, 1],
    )
    assert not strided.near.is_contiguous()
    first = march(rays, occupied, 0.05, jitter, backend)
    second = march(strided, occupied, 0.05, torch.stack([jitter, jitter], dim=1)[:, 0], backend)
    assert torch.equal(first.t_starts, second.t_starts)
    assert torch.equal(first.ray_indices, second.ray_indices)


def samples_along(middles: list[list[float]], step: float) -> RaySamples:
    """One list of distances per ray."""
    flat = torch.tensor([t for ray in middles for t in ray])
    indices = torch.tensor([r for r, ray in enumerate(middles) for _ in ray], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(ray) for ray in middles)]).cumsum(0)
    return RaySamples(flat - step / 2, flat + step / 2, indices, offsets)


@pytest.mark.parametrize("threshold", [1e-2, 1e-3, 0.3])
def test_hidden_half_of_a_plane(backend: str, threshold: float) -> None:
    # Head-on, the transmittance telescopes: T_i = F(inv_s (sdf_i + step / 2)) / F(inv_s (sdf_0 + step / 2)).
    step, inv_s = 0.01, 200.0
    middles = [0.005 + step * k for k in range(100)]
    samples = samples_along([middles], step)
    sdf = 0.5 - samples.t_middle
    edges = sdf.double() + step / 2
    transmittance = torch.sigmoid(edges * inv_s) / torch.sigmoid(edges[0] * inv_s)
    expected = transmittance > threshold
    visible = drop_hidden(samples, sdf, inv_s, step, threshold, backend)
    assert torch.equal(visible.t_middle, samples.t_middle[expected])
    assert visible.offsets.tolist() == [0, int(expected.sum())]
    # All of the front is kept, and the first ten hundredths behind the surface at most.
    assert 50 <= len(visible) <= 55


def test_threshold_zero_keeps_all_that_light_reaches(backend: str) -> None:
    samples = samples_along([[0.1 * k for k in range(10)]], 0.1)
    visible = drop_hidden(samples, 0.45 - samples.t_middle, 10.0, 0.1, 0.0, backend)
    assert torch.equal(visible.t_starts, samples.t_starts)
    assert torch.equal(visible.t_ends, samples.t_ends)


def test_nothing_is_in_front_of_the_first_sample(backend: str) -> None:
    # On each ray the first is kept whatever the threshold, and nothing that is far from the surface hides.
    samples = samples_along([[0.1, 0.2, 0.3], [0.1]], 0.1)
    visible = drop_hidden(samples, torch.tensor([9.0, -9.0, 0.0, 0.0]), 100.0, 0.1, 0.999, backend)
    assert visible.offsets.tolist() == [0, 2, 3]


def test_surfaces_seen_from_behind_hide_nothing(backend: str) -> None:
    samples = samples_along([[0.1 * k for k in range(10)]], 0.1)
    visible = drop_hidden(samples, samples.t_middle - 0.45, 1000.0, 0.1, 1e-3, backend)
    assert len(visible) == 10


def test_a_gap_is_no_slope(backend: str) -> None:
    # The second part starts inside the object: across the gap the distance falls, within the part it rises.
    samples = samples_along([[0.0, 0.1, 1.0, 1.1, 1.2]], 0.1)
    sdf = torch.tensor([0.4, 0.4, -0.2, -0.1, 0.0])
    assert len(drop_hidden(samples, sdf, 100.0, 0.1, 1e-3, backend)) == 5
    # A sample on its own is taken head-on: from 0.05 to -0.05 at 100 leaves e^-5 of the light.
    lonely = samples_along([[0.0, 0.5, 1.0]], 0.1)
    sdf = torch.tensor([0.5, 0.0, 0.5])
    assert len(drop_hidden(lonely, sdf, 100.0, 0.1, 0.006, backend)) == 3
    assert len(drop_hidden(lonely, sdf, 100.0, 0.1, 0.007, backend)) == 2


def assert_equal(first: RaySamples, second: RaySamples) -> None:
    for field in fields(RaySamples):
        left, right = getattr(first, field.name), getattr(second, field.name)
        assert (left is None) == (right is None), field.name
        assert left is None or torch.equal(left, right), field.name


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("sharpness", [10.0, 64.0, 1000.0, 1e6])
def test_dropping_against_the_reference(backend: str, sharpness: float, density: DensityName) -> None:
    # Rays longer than a block of the CUDA kernel, and one that ends where a block ends.
    counts = [0, 60, 1, 0, 65, 150, 2, 64, 0]
    middles = [[0.02 * k + (0.5 if k > 20 else 0.0) for k in range(count)] for count in counts]
    samples = samples_along(middles, 0.02)
    for _ in range(3):
        # A smooth random walk around the surface.
        sdf = (torch.randn(len(samples)) * 0.02).cumsum(0)
        expected = drop_hidden(samples, sdf, sharpness, 0.02, 1e-3, "reference", density=density)
        assert len(expected) > 10
        assert_equal(drop_hidden(samples, sdf, sharpness, 0.02, 1e-3, backend, density=density), expected)


@pytest.mark.parametrize("sharpness", [20.0, 150.0, 1e4])
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.3])
def test_a_density_keeps_just_what_its_own_opacities_let_see(
    backend: str, sharpness: float, threshold: float
) -> None:
    # VolSDF's opacities depend on distances alone: what is dropped is known exactly, gaps or not.
    counts = [70, 0, 1, 130]
    samples = samples_along([[0.02 * k + 0.5 * (k > 30) for k in range(count)] for count in counts], 0.02)
    sdf = 0.3 + (torch.randn(len(samples)) * 0.06).cumsum(0)
    scaled = sharpness * sdf.double()
    profile = torch.where(scaled > 0, 0.5 * torch.exp(-scaled.abs()), 1 - 0.5 * torch.exp(-scaled.abs()))
    light = torch.exp(-sharpness * 0.02 * profile)
    expected = []
    for first, last in zip(samples.offsets[:-1], samples.offsets[1:], strict=True):
        in_front = torch.cat([torch.ones(1), light[first:last].cumprod(0)])[: last - first]
        expected.append(in_front > threshold)
    keep = torch.cat(expected)
    visible = drop_hidden(samples, sdf, sharpness, 0.02, threshold, backend, density="volsdf")
    assert torch.equal(visible.t_middle, samples.t_middle[keep])
    assert torch.equal(visible.ray_indices, samples.ray_indices[keep])


def test_a_density_hides_from_behind_too(backend: str) -> None:
    # The ray starts inside and leaves: to NeuS that is transparent, a medium is opaque from both sides.
    samples = samples_along([[0.1 * k for k in range(10)]], 0.1)
    sdf = samples.t_middle - 0.45
    assert len(drop_hidden(samples, sdf, 1000.0, 0.1, 1e-3, backend, density="volsdf")) == 1


def test_what_is_left_is_packed(backend: str) -> None:
    samples = samples_along([[0.0, 0.1, 0.2], [], [0.0], [0.0, 0.1, 0.2, 0.3]], 0.1)
    sdf = torch.tensor([0.1, 0.0, -0.1, 0.5, 0.0, -0.1, -0.2, -0.3])
    visible = drop_hidden(samples, sdf, 200.0, 0.1, 1e-3, backend)
    counts = torch.bincount(visible.ray_indices, minlength=4)
    assert counts.tolist() == [2, 0, 1, 1]
    assert torch.equal(visible.offsets, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))


def test_dropping_from_nothing(backend: str) -> None:
    samples = samples_along([[], []], 0.1)
    visible = drop_hidden(samples, torch.zeros(0), 100.0, 0.1, 1e-3, backend)
    assert len(visible) == 0
    assert visible.offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("resolution", "num_levels"), [(8, 3), (6, 2), (8, 1)])
def test_levels_against_brute_force(backend: str, resolution: int, num_levels: int) -> None:
    occupied = torch.rand(num_levels, resolution, resolution, resolution) < 0.3
    rays = random_rays(24)
    # From inside as well as from beyond the coarsest level, and out again.
    rays = rays_of(3 * rays.origins, rays.directions, rays.near, 3 * rays.far)
    jitter = torch.rand(24)
    samples = march(rays, occupied, 0.09, jitter, backend)
    assert len(samples) > 0
    assert_marched_like_brute_force(samples, rays, occupied, 0.09, jitter)


def test_levels_by_hand(backend: str) -> None:
    # Level 1 is full, level 0 is empty but for [0, 0.5) along the ray, and hides what level 1 says there.
    occupied = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    occupied[1] = True
    occupied[0, 2, 2, 2] = True
    rays = one_ray([-2.0, 0.25, 0.25], [1.0, 0.0, 0.0], 0.0, 4.0)
    samples = march(rays, occupied, 0.25, torch.tensor([0.5]), backend)
    x = samples.positions(rays)[:, 0]
    left = [-1.875, -1.625, -1.375, -1.125]
    assert x.tolist() == [*left, 0.125, 0.375, *[-value for value in reversed(left)]]


def test_one_level_may_come_without_its_axis(backend: str) -> None:
    occupied = torch.rand(8, 8, 8) < 0.4
    rays, jitter = random_rays(10), torch.rand(10)
    first = march(rays, occupied, 0.1, jitter, backend)
    assert_equal(first, march(rays, occupied[None], 0.1, jitter, backend))


@pytest.mark.parametrize("num_levels", [1, 2])
def test_marching_against_the_reference(backend: str, num_levels: int) -> None:
    # With a power of two of cells every version rounds alike: not a bit may differ.
    occupied = torch.rand(num_levels, 16, 16, 16) < 0.2
    rays, jitter = random_rays(32), torch.rand(32)
    expected = march(rays, occupied, 0.021, jitter, "reference")
    assert len(expected) > 200
    assert_equal(march(rays, occupied, 0.021, jitter, backend), expected)


def test_step_may_be_a_tensor(backend: str) -> None:
    occupied = torch.rand(8, 8, 8) < 0.4
    rays, jitter = random_rays(10), torch.rand(10)
    samples = march(rays, occupied, 0.06, jitter, backend)
    assert_equal(march(rays, occupied, torch.tensor(0.06), jitter, backend), samples)

    sdf = 0.2 - (samples.positions(rays)).norm(dim=1)
    visible = drop_hidden(samples, sdf, 50.0, 0.06, 1e-3, backend)
    assert 0 < len(visible) < len(samples)
    scalars = torch.tensor(50.0), torch.tensor(0.06)
    assert_equal(drop_hidden(samples, sdf, *scalars, 1e-3, backend), visible)


def test_rays_that_are_not_numbers_get_nothing(backend: str) -> None:
    occupied = torch.ones(4, 4, 4, dtype=torch.bool)
    rays = random_rays(6)
    jitter = torch.full((6,), 0.5)
    expected = march(rays, occupied, 0.1, jitter, backend).offsets.diff()
    rays.origins[0, 1] = rays.directions[2, 2] = rays.near[3] = rays.far[4] = jitter[5] = math.nan
    counts = march(rays, occupied, 0.1, jitter, backend).offsets.diff()
    assert counts[1] == expected[1] > 0
    assert counts.tolist() == [0, counts[1], 0, 0, 0, 0]


def full_rays(*counts: int) -> tuple[Rays, Tensor, Tensor]:
    """Rays with so many samples each in a full grid, at a step of 0.25; -1 for a ray that misses."""
    rays = random_rays(len(counts))
    far = torch.tensor([0.25 * count if count >= 0 else -1.0 for count in counts])
    rays = rays_of(rays.origins, rays.directions, torch.zeros(len(counts)), far)
    return rays, torch.ones(4, 4, 4, dtype=torch.bool), torch.full((len(counts),), 0.5)


@pytest.mark.parametrize(
    ("capacity", "offsets", "served"),
    [
        (9, [0, 2, 2, 5, 5, 9, 9], 6),
        (20, [0, 2, 2, 5, 5, 9, 9], 6),
        (8, [0, 2, 2, 5, 5, 5, 5], 4),
        (5, [0, 2, 2, 5, 5, 5, 5], 4),
        (4, [0, 2, 2, 2, 2, 2, 2], 2),
        (1, [0, 0, 0, 0, 0, 0, 0], 0),
    ],
)
def test_capacity_by_hand(backend: str, capacity: int, offsets: list[int], served: int) -> None:
    rays, occupied, jitter = full_rays(2, 0, 3, -1, 4, 0)
    exact = march(rays, occupied, 0.25, jitter, backend)
    samples = march(rays, occupied, 0.25, jitter, backend, capacity)
    assert len(samples) == capacity
    assert samples.offsets.tolist() == offsets
    assert samples.is_served is not None
    assert samples.is_served.tolist() == [ray < served for ray in range(6)]
    count = int(samples.count)
    assert torch.equal(samples.t_starts[:count], exact.t_starts[:count])
    assert torch.equal(samples.t_ends[:count], exact.t_ends[:count])
    assert torch.equal(samples.ray_indices[:count], exact.ray_indices[:count])
    assert not samples.t_starts[count:].any()
    assert not samples.t_ends[count:].any()
    assert not samples.ray_indices[count:].any()


def test_capacity_without_rays_or_samples(backend: str) -> None:
    for rays, occupied, jitter in (full_rays(), full_rays(0, -1)):
        samples = march(rays, occupied, 0.25, jitter, backend, 3)
        assert samples.t_middle.tolist() == [0.0] * 3
        assert samples.offsets.tolist() == [0] * (len(rays) + 1)
        assert samples.is_served is not None
        assert samples.is_served.all()


@pytest.mark.parametrize("capacity", [300, 40])
def test_capacity_against_the_reference(backend: str, capacity: int) -> None:
    occupied = torch.rand(2, 8, 8, 8) < 0.3
    rays, jitter = random_rays(20), torch.rand(20)
    expected = march(rays, occupied, 0.07, jitter, "reference", capacity)
    assert 0 < int(expected.count) < capacity
    samples = march(rays, occupied, 0.07, jitter, backend, capacity)
    assert_equal(samples, expected)
    sdf = torch.where(expected.is_sample, 0.3 - expected.positions(rays).norm(dim=1), math.nan)
    for room in (None, 3, 30, 300):
        slow = drop_hidden(expected, sdf, 100.0, 0.07, 1e-3, "reference", room)
        assert_equal(drop_hidden(samples, sdf, 100.0, 0.07, 1e-3, backend, room), slow)


def test_dropping_into_a_capacity_by_hand(backend: str) -> None:
    # What test_what_is_left_is_packed keeps, 2, 0, 1 and 1 samples, with less and less room.
    samples = samples_along([[0.0, 0.1, 0.2], [], [0.0], [0.0, 0.1, 0.2, 0.3]], 0.1)
    sdf = torch.tensor([0.1, 0.0, -0.1, 0.5, 0.0, -0.1, -0.2, -0.3])
    exact = drop_hidden(samples, sdf, 200.0, 0.1, 1e-3, backend)
    for capacity, count, served in ((6, 4, 4), (4, 4, 4), (3, 3, 3), (2, 2, 2), (1, 0, 0)):
        visible = drop_hidden(samples, sdf, 200.0, 0.1, 1e-3, backend, capacity)
        assert len(visible) == capacity
        assert visible.is_served is not None
        assert visible.is_served.tolist() == [ray < served for ray in range(4)]
        assert torch.equal(visible.offsets, exact.offsets.clamp(max=count))
        assert torch.equal(visible.t_starts[:count], exact.t_starts[:count])
        assert torch.equal(visible.t_ends[:count], exact.t_ends[:count])
        assert torch.equal(visible.ray_indices[:count], exact.ray_indices[:count])
        assert not visible.t_ends[count:].any()


def test_a_ray_that_was_not_served_stays_so(backend: str) -> None:
    rays, occupied, jitter = full_rays(3, 4, 5)
    samples = march(rays, occupied, 0.25, jitter, backend, 8)
    for room in (None, 100):
        visible = drop_hidden(samples, torch.ones(8), 10.0, 0.25, 1e-3, backend, room)
        assert visible.is_served is not None
        assert visible.is_served.tolist() == [True, True, False]
        assert visible.offsets.tolist() == [0, 3, 7, 7]


@needs_triton
def test_cuda_with_a_capacity_never_waits_for_the_device() -> None:
    rays, occupied, jitter = full_rays(3, 4, 5)
    rays, occupied, jitter = rays.to(DEVICE), occupied.to(DEVICE), jitter.to(DEVICE)
    step = torch.tensor(0.25, device=DEVICE)
    with pytest.raises(AssertionError), NoWaiting():
        marching.march(rays, occupied, step, jitter, "cuda")
    with NoWaiting():
        samples = marching.march(rays, occupied, step, jitter, "cuda", 10)
        sdf = torch.ones(10, device=DEVICE)
        for density in DENSITIES:
            marching.drop_hidden(samples, sdf, 4 * step, step, 1e-3, density, "cuda", 9)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int) -> None:
    module, pointers = "models.marching.cuda", {"near": "*fp32", "far": "*fp32", "jitter": "*fp32"}
    pointers |= {"origins": "*fp32", "directions": "*fp32", "occupied": "*u8", "step": "*fp32"}
    sizes = ("NUM_LEVELS", "RESOLUTION", "WRITES", "BLOCK")
    columns = {"t_starts": "*fp32", "t_ends": "*fp32", "ray_indices": "*i64"}
    kernels = []
    for num_levels in (1, 3):
        constants = dict(zip(sizes, (num_levels, 128, False, 64), strict=True))
        signature = pointers | {"offsets": "*i64"} | dict.fromkeys(sizes, "constexpr")
        counting = signature | dict.fromkeys(columns, "constexpr"), constants | dict.fromkeys(columns)
        writing = signature | columns, constants | {"WRITES": True}
        kernels += [Kernel(module, "_march_kernel", *types, num_warps=1) for types in (counting, writing)]
    signature = {"sdf": "*fp32", "middles": "*fp32", "offsets": "*i64", "sharpness": "*fp32"}
    signature |= {"step": "*fp32", "threshold": "fp32", "keep": "*u8"}
    signature |= {"IS_LAPLACE": "constexpr", "BLOCK": "constexpr"}
    for is_laplace in (False, True):
        constants = {"IS_LAPLACE": is_laplace, "BLOCK": 64}
        kernels.append(Kernel(module, "_visible_kernel", signature, constants, num_warps=1))
    for result in compile_ahead(kernels, capability):
        assert not result["error"]
        assert result["spilled"] == 0
        # More would leave less than the 32 programs of one warp that fit into a multiprocessor.
        assert 0 < int(result["registers"]) <= 64
