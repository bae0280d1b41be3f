"""Ray marching against brute force, and dropping what nothing can see."""

import math

import pytest
import torch
from torch import Tensor

from models.marching import drop_hidden, march
from utils.types import Rays, RaySamples


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
    resolution = len(occupied)
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
            scaled = [(x + 1) * resolution / 2 for x in position]
            moves = [float(d) != 0 for d in rays.directions[ray]]
            is_near_border = any(
                abs(x - round(x)) < 1e-5 * resolution for x, m in zip(scaled, moves, strict=True) if m
            )
            if is_near_border or abs(t - float(rays.far[ray])) < 1e-5:
                continue
            x, y, z = (min(max(math.floor(s), 0), resolution - 1) for s in scaled)
            expected = bool(occupied[z, y, x]) and t < float(rays.far[ray])
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
    rays = random_rays(40)
    jitter = torch.rand(40)
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


def test_dropping_against_the_reference() -> None:
    counts = [0, 60, 1, 0, 45, 60, 2, 0]
    middles = [[0.02 * k + (0.5 if k > 20 else 0.0) for k in range(count)] for count in counts]
    samples = samples_along(middles, 0.02)
    for inv_s in (10.0, 64.0, 1000.0, 1e6):
        for _ in range(5):
            # A smooth random walk around the surface.
            sdf = (torch.randn(len(samples)) * 0.02).cumsum(0)
            fast, slow = (drop_hidden(samples, sdf, inv_s, 0.02, 1e-3, name) for name in ("cpu", "reference"))
            assert torch.equal(fast.t_starts, slow.t_starts)
            assert torch.equal(fast.t_ends, slow.t_ends)
            assert torch.equal(fast.ray_indices, slow.ray_indices)
            assert torch.equal(fast.offsets, slow.offsets)


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
