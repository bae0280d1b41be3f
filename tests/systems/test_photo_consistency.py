"""Photometric consistency against homographies, correlations by other means, and a plane of known texture."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from process_data.cameras import RayGenerator, rays_from_pixels
from process_data.photographs import WindowDrawer
from systems import photo_consistency as term
from utils.photographs import Windows
from utils.types import Batch, Cameras, Field, ImageStack, RenderOutput, Scene

SIZE = (96, 80)
"""Width and height."""
AXIS = torch.nn.functional.normalize(torch.tensor([0.15, -0.1, 1.0], dtype=torch.float64), dim=0)
"""The made plane's normal; it goes through the origin, and the cameras look at it from above."""
EYES = [(0.0, 0.0), (12.0, 5.0), (-14.0, 3.0), (4.0, -17.0), (-6.0, 20.0), (22.0, -9.0)]
"""Degrees by which the cameras stand aside."""


def look_at_origin(eyes: Sequence[tuple[float, float]]) -> Cameras:
    """Cameras of different focal lengths at a distance of 2.5, turned about their axes."""
    poses, intrinsics = [], []
    for number, (first, second) in enumerate(eyes):
        a, b, roll = math.radians(first), math.radians(second), 0.1 * number
        forward = -np.array([math.sin(a) * math.cos(b), math.sin(b), math.cos(a) * math.cos(b)])
        right = np.cross(forward, [math.sin(roll), -math.cos(roll), 0.0])
        right /= np.linalg.norm(right)
        poses.append(np.stack([right, np.cross(forward, right), forward, -2.5 * forward], axis=1))
        intrinsics.append([[150.0 + 9 * number, 0.7, 47.0], [0, 160.0 + 5 * number, 41.0], [0, 0, 1]])
    return Cameras(
        torch.tensor(np.array(poses)).float(),
        torch.tensor(intrinsics),
        torch.tensor([SIZE] * len(eyes)),
    )


def texture(positions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Brightness on the plane, 0..255: no two places within a window's reach look alike."""
    x, y = positions[..., 0], positions[..., 1]
    waves = np.sin(47 * x + 3 * y) + np.sin(39 * y - 9 * x + 1) + np.sin(23 * x + 19 * y + 2)
    return 127.5 + 40.0 * np.asarray(waves)


def plane_scene(eyes: Sequence[tuple[float, float]] = EYES) -> Scene:
    """Photographs of the plane, each pixel by intersecting its ray in double precision."""
    cameras, images = look_at_origin(eyes), []
    columns, rows = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5)
    pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
    for pose, matrix in zip(cameras.c2w.double().numpy(), cameras.intrinsics.double().numpy(), strict=True):
        towards = pixels @ np.linalg.inv(matrix).T @ pose[:, :3].T
        distance = -(pose[:, 3] @ AXIS.numpy()) / (towards @ AXIS.numpy())
        grey = np.round(texture(pose[:, 3] + distance[..., None] * towards))
        images.append(np.repeat(grey[..., None], 3, axis=2).astype(np.uint8))
    return Scene(
        name="plane",
        cameras=cameras,
        images=ImageStack.from_images(images),
        image_names=tuple(str(number) for number in range(len(eyes))),
        train_indices=tuple(range(len(eyes))),
        test_indices=(),
        world_from_scene=torch.eye(4, dtype=torch.float64),
    )


def batch_of(scene: Scene, width: int = 11, num_rays: int = 60) -> Batch:
    """Rays of all views through pixels that are wide inside, with windows."""
    draw = torch.Generator().manual_seed(3)
    views = torch.arange(num_rays) % len(scene.cameras)
    middle = torch.tensor(SIZE) / 2
    pixels = (middle + 36.0 * (torch.rand(num_rays, 2, generator=draw) - 0.5)).floor() + 0.5
    rays = rays_from_pixels(scene.cameras, views, pixels)
    generator = RayGenerator.from_cameras(scene.cameras)
    drawer = WindowDrawer.from_scene(scene, scene.train_indices, "key", num_rays, width, generator)
    return Batch(rays, torch.zeros(num_rays, 3), None, windows=partial(drawer.draw, rays, pixels))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(plane_scene())


def windows_of(batch: Batch) -> Windows:
    assert batch.windows is not None
    return batch.windows()


def on_plane(batch: Batch, axis: Tensor = AXIS, height: float = 0.0) -> Tensor:
    """Where the rays meet the plane axis . x = height, in double precision."""
    origins, directions = batch.rays.origins.double(), batch.rays.directions.double()
    return origins + directions * ((height - origins @ axis) / (directions @ axis))[:, None]


def loss_at(batch: Batch, points: Tensor, normal: Tensor, keep: Tensor | None = None) -> Tensor:
    if keep is None:
        keep = torch.ones(len(points), dtype=torch.bool)
    normal = torch.nn.functional.normalize(normal.expand(len(points), 3), dim=1)
    return term.window_loss(windows_of(batch), batch.rays.origins, points, normal, keep)


# The warp


def homography(cameras: Cameras, here: int, there: int, axis: Tensor, point: Tensor) -> Tensor:
    """H = K' (R - t n^T / d) K^-1 between two cameras, in the first one's axes (Geo-NeuS, equation 13)."""
    first, second = (
        torch.cat([cameras.c2w[view].double(), torch.tensor([[0.0, 0, 0, 1]]).double()])
        for view in (here, there)
    )
    moved = torch.linalg.inv(second) @ first
    normal = first[:3, :3].t() @ axis
    distance = -(normal @ (first[:3, :3].t() @ (point - first[:3, 3])))
    lens = cameras.intrinsics.double()
    return (
        lens[there]
        @ (moved[:3, :3] - torch.outer(moved[:3, 3], normal) / distance)
        @ torch.linalg.inv(lens[here])
    )


def test_the_warp_is_the_homography(batch: Batch) -> None:
    scene, windows = plane_scene(), windows_of(batch)
    axis = torch.nn.functional.normalize(torch.tensor([0.3, 0.2, 1.0]).double(), dim=0)
    points = on_plane(batch, axis, height=0.07)
    normal = axis.expand(len(points), 3)
    found, is_facing = term.intersect_planes(
        batch.rays.origins.double(), windows.directions.double(), points, normal
    )
    assert is_facing.all()
    pixels, is_shown = windows.photographs.project(windows.sources.clamp(min=0), found)
    generator = RayGenerator.from_cameras(scene.cameras)
    steps = range(-5, 6)
    compared = 0
    for ray in range(0, len(points), 13):
        here = int(batch.rays.camera_indices[ray])
        # The ray's pixel, from its direction.
        local = scene.cameras.c2w[here, :, :3].double().t() @ batch.rays.directions[ray].double()
        middle = scene.cameras.intrinsics[here].double() @ (local / local[2])
        window = torch.stack(
            [middle + torch.tensor([float(u), float(v), 0.0]).double() for v in steps for u in steps]
        )
        for slot, there in enumerate(windows.sources[ray].tolist()):
            if there < 0:
                continue
            mapped = window @ homography(scene.cameras, here, there, axis, points[ray]).t()
            expected = (mapped[:, :2] / mapped[:, 2:]).t()
            torch.testing.assert_close(pixels[ray, slot], expected, atol=2e-4, rtol=0)
            width, height = SIZE
            inside = (
                (expected >= 0.5).all(dim=0) & (expected[0] <= width - 0.5) & (expected[1] <= height - 0.5)
            )
            assert torch.equal(is_shown[ray, slot], inside)
            compared += 1
    assert compared > 10
    assert generator.table is None


def test_what_is_behind_or_outside_is_not_shown() -> None:
    photographs = windows_of(batch_of(plane_scene())).photographs
    view = torch.zeros(1, 1, dtype=torch.int64)
    center = photographs.centers[0].double()
    positions = torch.stack([torch.zeros(3).double(), 2 * center, center, torch.tensor([3.0, 0, 0]).double()])
    pixels, is_shown = photographs.project(view, positions[None])
    assert is_shown[0, 0].tolist() == [True, False, False, False]
    assert torch.isfinite(pixels).all()


def test_look_up_is_bilinear_and_keeps_to_its_picture() -> None:
    scene = plane_scene()
    photographs = windows_of(batch_of(scene)).photographs
    draw = torch.Generator().manual_seed(0)
    span = torch.tensor(SIZE).double() - 1.0
    for view in (0, 3, 5):
        picture = scene.images.image(view)[..., 0].double().numpy()
        pixels = 0.5 + torch.rand(50, 2, generator=draw).double() * span
        pixels[0], pixels[1] = torch.tensor([0.5, 0.5]), torch.tensor(SIZE) - 0.5
        found = photographs.look_up(torch.tensor([[view]]), pixels.t()[None, None])[0, 0]
        for (u, v), value in zip((pixels - 0.5).tolist(), found.tolist(), strict=True):
            column, row = min(int(u), SIZE[0] - 2), min(int(v), SIZE[1] - 2)
            a, b = u - column, v - row
            cell = picture[row : row + 2, column : column + 2]
            expected = np.array([1 - b, b]) @ cell @ np.array([1 - a, a]) / 255
            assert value == pytest.approx(expected, abs=1e-9)
    wild = torch.tensor([[[[-1e9, 1e9, torch.nan, torch.inf], [0.0, 5.0, 3.0, torch.nan]]]]).double()
    assert photographs.look_up(torch.tensor([[5]]), wild).shape == (1, 1, 4)


# Correlation


def test_ncc_by_numpy() -> None:
    draw = np.random.default_rng(0)
    first = draw.random((7, 25))
    second = 0.6 * first[:, None] * draw.choice([-1, 1], (7, 4, 1)) + 0.4 * draw.random((7, 4, 25))
    second[2, 1] = 0.3
    first[5] = 0.7 + 1e-3 * draw.random(25)
    found, is_textured = term.ncc(torch.tensor(first), torch.tensor(second))
    for row in range(7):
        for source in range(4):
            is_flat = row == 5 or (row, source) == (2, 1)
            assert bool(is_textured[row, source]) != is_flat
            if not is_flat:
                expected = np.corrcoef(first[row], second[row, source])[0, 1]
                assert float(found[row, source]) == pytest.approx(expected, abs=1e-12)
    assert torch.isfinite(found).all()


def test_brightness_and_contrast_do_not_matter() -> None:
    first = torch.rand(3, 9).double()
    found, _ = term.ncc(first, torch.stack([0.5 * first + 0.2, -first, first], dim=1))
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0, 1.0]]).double().expand(3, 3))


def test_mean_of_the_best() -> None:
    values = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.4, 0.6], [0.7, 0.7, 0.7, 0.7]])
    is_valid = torch.tensor([[True, False, True, True], [False, False, True, False], [False] * 4])
    found = term.mean_of_best(values, is_valid, num_best=2)
    assert float(found) == pytest.approx(((0.3 + 0.5) / 2 + 0.4) / 2)
    assert float(term.mean_of_best(values, torch.zeros_like(is_valid))) == 0.0
    assert float(term.mean_of_best(values[:1, :2], is_valid[:1, :2])) == pytest.approx(0.5)


# The whole term, on a plane whose photographs are known


def test_true_geometry_costs_nothing_and_other_geometry_does(batch: Batch) -> None:
    assert float(loss_at(batch, on_plane(batch), AXIS)) < 0.001
    shifted = [float(loss_at(batch, on_plane(batch, height=h), AXIS)) for h in (0.01, 0.03, 0.06)]
    assert 0.003 < shifted[0] < shifted[1] < shifted[2]
    below = [float(loss_at(batch, on_plane(batch, height=-h), AXIS)) for h in (0.01, 0.03, 0.06)]
    assert 0.003 < below[0] < below[1] < below[2]
    tilt = torch.tensor([1.0, 0.4, 0.0]).double()
    tilted = [float(loss_at(batch, on_plane(batch), AXIS + t * tilt)) for t in (0.0, 0.2, 0.5, 0.9)]
    assert tilted[0] < tilted[1] < tilted[2] < tilted[3]
    assert tilted[3] > 10 * tilted[0]


def test_loss_by_a_slow_loop(batch: Batch) -> None:
    """Window by window and source by source, at a wrong plane and with rays left out."""
    windows, points = windows_of(batch), on_plane(batch, height=0.02)
    keep = torch.arange(len(points)) % 3 > 0
    per_ray = []
    for ray in torch.where(keep)[0].tolist():
        origin = batch.rays.origins[ray].double().numpy()
        towards = windows.directions[ray].double().numpy()
        axis = AXIS.numpy()
        distance = (points[ray].numpy() - origin) @ axis / (towards @ axis)
        positions = torch.tensor(origin + distance[:, None] * towards)[None]
        costs = []
        for source in windows.sources[ray].tolist():
            if source < 0:
                continue
            view = torch.tensor([[source]])
            pixels, is_shown = windows.photographs.project(view, positions)
            if is_shown.all():
                seen = windows.photographs.look_up(view, pixels)[0, 0].numpy()
                costs.append(1 - np.corrcoef(windows.grey[ray].double().numpy(), seen)[0, 1])
        if costs:
            per_ray.append(np.mean(sorted(costs)[:4]))
    assert len(per_ray) > 20
    found = loss_at(batch, points, AXIS, keep)
    assert float(found) == pytest.approx(np.mean(per_ray), rel=1e-5)


def test_gradients_agree_with_finite_differences(batch: Batch) -> None:
    """In depth and normal, through plane, projection, picture and correlation."""
    windows = windows_of(batch)
    start = on_plane(batch, height=0.013)[:12]
    origins, along = batch.rays.origins[:12].double(), batch.rays.directions[:12].double()
    some = Windows(
        windows.directions[:12].double(),
        windows.grey[:12].double(),
        windows.is_whole[:12],
        windows.sources[:12],
        windows.photographs,
    )

    def loss(shift: Tensor, tilt: Tensor) -> Tensor:
        normal = torch.nn.functional.normalize(AXIS + tilt, dim=1)
        return term.window_loss(
            some, origins, start + shift[:, None] * along, normal, torch.ones(12, dtype=torch.bool)
        )

    shift, tilt = torch.zeros(12).double(), 0.03 * torch.randn(12, 3).double()
    shift.requires_grad_()
    tilt.requires_grad_()
    # A texel's border within a step would be a kink of the bilinear picture.
    assert torch.autograd.gradcheck(loss, (shift, tilt), eps=1e-8, atol=1e-5, rtol=1e-3)
    loss(shift, tilt).backward()
    assert shift.grad is not None
    assert tilt.grad is not None
    assert (shift.grad != 0).sum() > 6
    assert (tilt.grad != 0).any(dim=1).sum() > 6


def test_descent_finds_the_plane() -> None:
    batch = batch_of(plane_scene(), width=7, num_rays=24)
    height = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    tilt = torch.tensor([0.1, -0.1, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([height, tilt], lr=3e-3)
    for _ in range(45):
        axis = torch.nn.functional.normalize(AXIS + tilt, dim=0)
        origins, along = batch.rays.origins.double(), batch.rays.directions.double()
        points = origins + along * ((height - origins @ axis) / (along @ axis))[:, None]
        optimizer.zero_grad()
        loss_at(batch, points, axis).backward()
        optimizer.step()
    assert abs(float(height.detach())) < 0.003
    found = torch.nn.functional.normalize(AXIS + tilt.detach(), dim=0)
    assert float(found @ AXIS) > math.cos(math.radians(1.5))


def test_windows_and_sources_that_do_not_count(batch: Batch) -> None:
    windows, points = windows_of(batch), on_plane(batch, height=0.02)
    nothing = torch.zeros(len(points), dtype=torch.bool)
    assert float(loss_at(batch, points, AXIS, nothing)) == 0.0
    assert float(loss_at(batch, points, -AXIS)) == 0.0, "seen from behind"
    for changed in (
        {"is_whole": nothing},
        {"sources": torch.full_like(windows.sources, -1)},
        {"grey": torch.full_like(windows.grey, 0.4)},
    ):
        empty = Windows(**{**vars(windows), **changed})
        loss = term.window_loss(empty, batch.rays.origins, points, AXIS.expand(len(points), 3), ~nothing)
        assert float(loss) == 0.0


@pytest.mark.parametrize("at", [0.0, 3.0, -3.0, 1e6], ids=str)
def test_gradients_stay_finite_where_nothing_is_seen(batch: Batch, at: float) -> None:
    points = (batch.rays.origins + at * batch.rays.directions).requires_grad_()
    normal = torch.nn.functional.normalize(torch.randn(len(points), 3), dim=1).requires_grad_()
    loss = loss_at(batch, points, normal)
    loss.backward()
    assert points.grad is not None
    assert normal.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(points.grad).all()
    assert torch.isfinite(normal.grad).all()


# The surface's points


def sphere(radius: Tensor, middle: Tensor) -> Field:
    def field(positions: Tensor) -> tuple[Tensor, Tensor]:
        away = positions - middle
        distance = away.norm(dim=1)
        # Stretched, as fields are in the middle of training.
        return 1.3 * (distance - radius), 1.3 * away / distance[:, None]

    return field


def test_surface_points_move_as_the_surface_does() -> None:
    """Against the ray's exact intersection with a sphere: value, and derivative in radius and centre."""
    draw = torch.Generator().manual_seed(1)
    origins = torch.nn.functional.normalize(torch.randn(40, 3, generator=draw).double(), dim=1) * 2.5
    towards = 0.3 * torch.randn(40, 3, generator=draw).double() - origins
    directions = torch.nn.functional.normalize(towards, dim=1)
    radius, middle = torch.tensor(0.5).double(), torch.tensor([0.1, 0.0, -0.05]).double()

    def exact(radius: Tensor, middle: Tensor) -> Tensor:
        relative = origins - middle
        along = -(relative * directions).sum(dim=1)
        squared = radius**2 - (relative + along[:, None] * directions).square().sum(dim=1)
        depth = along - squared.clamp(min=1e-12).sqrt()
        return origins + depth[:, None] * directions

    truth = exact(radius, middle)
    is_hit = ((truth - middle).norm(dim=1) - radius).abs() < 1e-6
    depth = (truth - origins).norm(dim=1) + 0.01 * torch.randn(40, generator=draw).double()
    is_hit[3] = False
    steepness = -((truth - middle) / radius * directions).sum(dim=1)

    def found(radius: Tensor, middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return term.surface_points(origins, directions, depth, is_hit, sphere(radius, middle))

    points, normal, keep = found(radius, middle)
    assert not keep[3]
    assert torch.equal(keep, is_hit & (steepness > term._STEEPEST))
    assert 10 < int(keep.sum()) < 40
    torch.testing.assert_close(points[keep], truth[keep], atol=1e-6, rtol=0)
    torch.testing.assert_close(normal[keep], (truth[keep] - middle) / radius, atol=1e-3, rtol=0)
    weights = torch.randn(40, 3, generator=draw).double() * keep[:, None]
    inputs = (radius.clone().requires_grad_(), middle.clone().requires_grad_())
    derived = torch.autograd.grad((weights * found(*inputs)[0]).sum(), inputs)
    expected = torch.autograd.grad((weights * exact(*inputs)).sum(), inputs)
    for mine, theirs in zip(derived, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_rays_whose_newton_steps_do_not_land_do_not_count() -> None:
    origins, directions = torch.tensor([[0.0, 0.0, 2.0]] * 3), torch.tensor([[0.0, 0.0, -1.0]] * 3)
    field = sphere(torch.tensor(0.5), torch.zeros(3))
    depth = torch.tensor([1.52, 1.1, 2.45])
    points, _, keep = term.surface_points(origins, directions, depth, torch.ones(3, dtype=torch.bool), field)
    # The second starts too far in front; the third would land on the far side, from behind.
    assert keep.tolist() == [True, False, False]
    assert float(points[0, 2]) == pytest.approx(0.5, abs=1e-5)


def render_of(batch: Batch, points: Tensor) -> RenderOutput:
    """Whatever shows the points, but for an opacity of 0.8."""
    rows = len(points)
    distance = (points - batch.rays.origins).norm(dim=1).float()
    empty = torch.zeros(0)
    return RenderOutput(
        *(torch.zeros(rows, 3), torch.full((rows,), 0.8), 0.8 * distance, torch.zeros(rows, 3)),
        *(torch.zeros(0, 3), empty, 0),
    )


@pytest.mark.parametrize("hidden", ["nothing", "opacity", "mask", "is_served"])
def test_only_rays_that_show_the_surface_count(batch: Batch, hidden: str) -> None:
    rows, height = len(batch.rays), 0.02

    def field(positions: Tensor) -> tuple[Tensor, Tensor]:
        axis = AXIS.to(positions.dtype)
        return positions @ axis - height, axis.expand(len(positions), 3)

    # Rendered a little beside the field's zero level, which is what counts.
    render = render_of(batch, on_plane(batch, height=height + 0.004))
    half = torch.arange(rows) % 2 == 0
    changed = {"opacity": torch.where(half, 0.8, 0.3), "is_served": half}
    if hidden in changed:
        render = RenderOutput(**{**vars(render), hidden: changed[hidden]})
    if hidden == "mask":
        batch = Batch(**{**vars(batch), "mask": half.float()})
    found = term.photo_consistency(render, batch, windows_of(batch), field)
    keep = torch.ones_like(half) if hidden == "nothing" else half
    expected = loss_at(batch, on_plane(batch, height=height).float(), AXIS.float(), keep)
    assert float(found) == pytest.approx(float(expected), rel=1e-3)
    assert float(found) > 0.02


def test_fewer_windows_than_rays(batch: Batch) -> None:
    scene = plane_scene()
    few = batch_of(scene, num_rays=60)
    windows = windows_of(few)
    cut = Windows(
        *(windows.directions[:9], windows.grey[:9], windows.is_whole[:9], windows.sources[:9]),
        windows.photographs,
    )

    def field(positions: Tensor) -> tuple[Tensor, Tensor]:
        return positions @ AXIS.float() - 0.02, AXIS.float().expand(len(positions), 3)

    found = term.photo_consistency(render_of(few, on_plane(few, height=0.02)), few, cut, field)
    expected = loss_at(few, on_plane(few, height=0.02), AXIS, torch.arange(60) < 9)
    assert float(found) == pytest.approx(float(expected), rel=1e-3)
