"""The region is found on captures made of exact geometry, in any world frame."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from process_data.geometry import enclosing_ball, nearest_to_lines, up_axis
from process_data.normalize import find_world_from_scene
from process_data.synthetic import ground_truth_mesh
from process_data.views import Capture, View
from utils.errors import ConfigError, DataError
from utils.images import read_mask
from utils.types import ImageStack, Lens, SparsePoints

DTU = Path(__file__).resolve().parents[3] / "shared" / "data" / "dtu_scan65"
SIZE = (160, 120)
SEEDS = [0, 1, 2]


# ----------------------------------------------------------------------------------------------------
# captures


@dataclass
class Sample:
    """A capture and the surface that its region should hold, made with z up, then moved at random."""

    capture: Capture
    masks: ImageStack | None
    surface: np.ndarray
    world: np.ndarray
    """Similarity from the frame in which it was made, and in which the surface is, to the world."""


@cache
def figurine() -> tuple[np.ndarray, np.ndarray]:
    mesh = ground_truth_mesh("figurine", 80)
    assert mesh.normals is not None
    return mesh.vertices, mesh.normals.astype(np.float64)


def looking_at(centers: np.ndarray, targets: np.ndarray, roll: np.ndarray | float = 0.0) -> np.ndarray:
    forward = targets - centers
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    down = np.cross(forward, right)
    cos, sin = np.cos(roll) * np.ones((len(centers), 1)), np.sin(roll) * np.ones((len(centers), 1))
    return np.stack([cos * right + sin * down, cos * down - sin * right, forward, centers], axis=2)


def on_sphere(azimuth: np.ndarray, elevation: np.ndarray, distance: np.ndarray | float) -> np.ndarray:
    azimuth, elevation = np.radians(azimuth), np.radians(elevation)
    direction = [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    return np.stack(direction, axis=-1) * np.asarray(distance)[..., None]


def similarity(seed: int) -> np.ndarray:
    if seed == 0:
        return np.eye(4)
    random = np.random.default_rng(100 + seed)
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * 10.0 ** random.uniform(-2, 2)
    matrix[:3, 3] = random.normal(size=3) * 30.0
    return matrix


def carry(matrix: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return positions @ matrix[:3, :3].T + matrix[:3, 3]


def sphere_of(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    return matrix[:3, 3], float(np.cbrt(np.linalg.det(matrix[:3, :3])))


def views_of(
    c2w: np.ndarray, fov: float = 40.0, lens: bool = False, size: tuple[int, int] = SIZE
) -> tuple[View, ...]:
    """Views whose shorter side spans ``fov`` degrees."""
    width, height = size
    focal = 0.5 * min(size) / np.tan(np.radians(fov / 2))
    k = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    bent = Lens("SIMPLE_RADIAL", (focal, width / 2, height / 2, 0.1), size) if lens else None
    return tuple(
        View(Path(f"/capture/images/{index:03d}.jpg"), pose, k, size, bent) for index, pose in enumerate(c2w)
    )


def sparse(positions: np.ndarray, random: np.random.Generator, num_views: int) -> SparsePoints:
    n = len(positions)
    tracks = random.integers(3, 6, n)
    tracks[: n // 50] = 2
    pairs = np.column_stack([np.repeat(np.arange(n), tracks), random.integers(0, num_views, tracks.sum())])
    return SparsePoints(
        positions, np.zeros((n, 3), np.uint8), random.uniform(0.3, 1.2, n), pairs.astype(np.int64)
    )


def moved(views: Sequence[View], points: SparsePoints | None, world: np.ndarray, **rest: Any) -> Capture:
    rotation = world[:3, :3] / np.cbrt(np.linalg.det(world[:3, :3]))
    poses = [
        np.column_stack([rotation @ view.c2w[:, :3], carry(world, view.c2w[None, :, 3])[0]]) for view in views
    ]
    return Capture(
        Path("/capture"),
        tuple(replace(view, c2w=pose) for view, pose in zip(views, poses, strict=True)),
        points if points is None else replace(points, positions=carry(world, points.positions)),
        **rest,
    )


def masks_of(views: Sequence[View], surface: np.ndarray) -> ImageStack:
    pictures = []
    for view in views:
        assert view.size is not None
        mask = np.zeros((view.size[1], view.size[0]), np.uint8)
        pixels = np.nan_to_num(view.project(surface), nan=-1.0)
        shown = ((pixels >= 0) & (pixels < view.size)).all(axis=1)
        column, row = pixels[shown].astype(int).T
        mask[row, column] = 255
        pictures.append(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))[..., None])
    return ImageStack.from_images(pictures)


def ring(seed: int, num: int = 30, elevation: float = 25.0, distance: float = 3.2) -> np.ndarray:
    random = np.random.default_rng(seed)
    centers = on_sphere(np.arange(num) * 360.0 / num, np.full(num, elevation), distance)
    return looking_at(centers, random.normal(0, 0.02, (num, 3)))


def turntable(seed: int, world: int | None = None, lens: bool = False) -> Sample:
    """A ring of cameras, aimed a little off, with masks."""
    views = views_of(ring(seed), lens=lens)
    surface, _ = figurine()
    placed = similarity(seed if world is None else world)
    return Sample(moved(views, None, placed), masks_of(views, surface), surface, placed)


def handheld(seed: int, world: int | None = None, arc: float = 360.0) -> Sample:
    """Cameras on a band of a hemisphere, held by hand, points on the figurine, its table and a wall."""
    random = np.random.default_rng(seed)
    n = 45
    azimuth = -90.0 + np.linspace(-arc / 2, arc / 2, n, endpoint=arc < 360)
    centers = on_sphere(azimuth, random.uniform(10, 55, n), random.uniform(2.7, 3.5, n))
    c2w = looking_at(centers, random.normal(0, 0.08, (n, 3)), random.normal(0, np.radians(4), (n, 1)))
    vertices, normals = figurine()
    # Only what some camera sees from within 75 degrees has points.
    directions = centers[:, None] - vertices[None]
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    seen = ((directions * normals).sum(axis=2) > np.cos(np.radians(75))).sum(axis=0) >= 3
    on_figurine = vertices[seen][random.integers(0, seen.sum(), 2500)]
    table = np.column_stack([random.uniform(-2, 2, (1000, 2)), np.full(1000, -0.75)])
    wall = np.column_stack([random.uniform(-4, 4, 800), np.full(800, 4.0), random.uniform(-1, 3, 800)])
    outliers = random.normal(0, 20.0, (230, 3))
    positions = np.concatenate([on_figurine, table, wall]) + random.normal(0, 0.008, (4300, 3))
    positions = random.permutation(np.concatenate([positions, outliers]))
    placed = similarity(seed if world is None else world)
    views = views_of(c2w, 42.0)
    return Sample(moved(views, sparse(positions, random, n), placed), None, vertices, placed)


def front(seed: int, world: int | None = None) -> Sample:
    return handheld(seed, world, arc=150.0)


def room(seed: int, world: int | None = None) -> Sample:
    """A box of 6 x 4 x 3 metres, seen from its inside."""
    random = np.random.default_rng(seed)
    half = np.array([3.0, 2.0, 1.5])
    n = 50
    centers = random.uniform(-1, 1, (n, 3)) * [1.8, 1.0, 0.3]
    yaw, pitch = random.uniform(0, 2 * np.pi, n), random.normal(0, 0.15, n)
    aims = np.stack([np.cos(yaw), np.sin(yaw), pitch], axis=1)
    c2w = looking_at(centers, centers + aims, random.normal(0, np.radians(3), (n, 1)))

    def walls(number: int) -> np.ndarray:
        areas = np.repeat([half[1] * half[2], half[0] * half[2], half[0] * half[1]], 2)
        side = random.choice(6, number, p=areas / areas.sum())
        positions = random.uniform(-1, 1, (number, 3)) * half
        positions[np.arange(number), side // 2] = (side % 2 * 2 - 1) * half[side // 2]
        return positions

    noisy = walls(3800) + random.normal(0, 0.02, (3800, 3))
    positions = random.permutation(np.concatenate([noisy, random.normal(0, 15.0, (200, 3))]))
    placed = similarity(seed if world is None else world)
    capture = moved(views_of(c2w, 60.0), sparse(positions, random, n), placed)
    return Sample(capture, None, walls(20_000), placed)


SAMPLES = {"turntable": turntable, "handheld": handheld, "front": front, "room": room}


def find(sample: Sample, **options: Any) -> np.ndarray:
    return find_world_from_scene(sample.capture, sample.masks, **options)


# ----------------------------------------------------------------------------------------------------
# quality


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "method"),
    [("turntable", "masks"), ("handheld", "points"), ("front", "points"), ("room", "cameras")],
)
def test_region_holds_the_surface_and_little_more(
    name: str, method: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    sample = SAMPLES[name](seed)
    with caplog.at_level(logging.INFO):
        matrix = find(sample)
    assert caplog.messages[-1].startswith(f"region: {method}, centre [")
    assert "dataset.region_scale" in caplog.messages[-1]
    surface = carry(sample.world, sample.surface)
    center, radius = sphere_of(matrix)
    inside = (np.linalg.norm(surface - center, axis=1) <= radius).mean()
    _, true_radius = enclosing_ball(surface)
    assert inside >= 0.99
    assert radius <= 2.0 * true_radius
    # A similarity with z up.
    rotation = matrix[:3, :3] / radius
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) > 0
    true_up = sample.world[:3, 2] / np.linalg.norm(sample.world[:3, 2])
    assert np.degrees(np.arccos(min(1.0, rotation[:, 2] @ true_up))) < 2.5


def test_turntable_and_lens_are_snug() -> None:
    for lens in (False, True):
        sample = turntable(1, lens=lens)
        center, radius = sphere_of(find(sample))
        surface = carry(sample.world, sample.surface)
        true_center, true_radius = enclosing_ball(surface)
        assert np.linalg.norm(surface - center, axis=1).max() <= radius
        assert radius < 1.15 * true_radius
        assert np.linalg.norm(center - true_center) < 0.08 * true_radius


@pytest.mark.parametrize("name", SAMPLES)
def test_a_moved_world_gives_the_same_scene(name: str) -> None:
    still, turned = SAMPLES[name](1, 0), SAMPLES[name](1, 2)
    expected = turned.world @ find(still)
    center, radius = sphere_of(expected)
    found = find(turned)
    np.testing.assert_allclose(found[:3, 3], center, atol=1e-6 * radius)
    np.testing.assert_allclose(found[:3, :3], expected[:3, :3], atol=1e-6 * radius)


def test_cameras_without_points_give_a_ball_that_none_is_in() -> None:
    for seed in SEEDS:
        sample = handheld(seed)
        bare = replace(sample.capture, points=None)
        center, radius = sphere_of(find_world_from_scene(bare, None))
        surface = carry(sample.world, sample.surface)
        assert (np.linalg.norm(surface - center, axis=1) <= radius).mean() >= 0.99
        assert radius <= 2.3 * enclosing_ball(surface)[1]
        assert all(np.linalg.norm(view.c2w[:, 3] - center) > radius for view in bare.views)


def test_room_without_points_holds_the_cameras() -> None:
    sample = room(1)
    center, radius = sphere_of(find_world_from_scene(replace(sample.capture, points=None), None))
    surface = carry(sample.world, sample.surface)
    assert 0.6 < radius / enclosing_ball(surface)[1] < 2.0
    assert all(np.linalg.norm(view.c2w[:, 3] - center) < radius for view in sample.capture.views)


def test_forward_facing_cameras_take_the_points() -> None:
    random = np.random.default_rng(0)
    centers = np.column_stack(
        [random.uniform(-0.5, 0.5, 12), np.full(12, -4.0), random.uniform(-0.3, 0.3, 12)]
    )
    views = views_of(looking_at(centers, centers + np.array([0, 1.0, 0])))
    points = sparse(random.uniform(-0.8, 0.8, (800, 3)), random, 12)
    center, radius = sphere_of(find_world_from_scene(moved(views, points, np.eye(4)), None))
    assert np.linalg.norm(center) < 0.3
    assert 0.9 < radius < 1.8


# ----------------------------------------------------------------------------------------------------
# masks


def test_a_few_bad_masks_do_no_harm_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    sample = turntable(0)
    assert sample.masks is not None
    _, good = sphere_of(find(sample))
    assert "show something else" not in caplog.text
    pictures = [sample.masks.image(index).numpy().copy() for index in range(30)]
    pictures[3][:] = 0
    pictures[11] = 255 - pictures[11]
    pictures[17] = np.roll(pictures[17], 45, axis=1)
    center, radius = sphere_of(find_world_from_scene(sample.capture, ImageStack.from_images(pictures)))
    assert (np.linalg.norm(sample.surface - center, axis=1) <= radius).mean() >= 0.99
    assert radius < 1.25 * good
    line = next(message for message in caplog.messages if "show something else" in message)
    # The black mask says nothing and is left out; the inverted and the shifted one are odd.
    names = [sample.capture.views[index].image_path.name for index in (11, 17)]
    assert line.startswith("2 of 29 masks show something else than the others do")
    assert all(name in line for name in names)


def test_frames_may_cut_the_object() -> None:
    surface, _ = figurine()
    views = views_of(ring(0), 40.0)
    views = tuple(
        replace(near, image_path=view.image_path) if index % 2 else view
        for index, (view, near) in enumerate(zip(views, views_of(ring(0), 18.0), strict=True))
    )
    masks = masks_of(views, surface)
    assert masks.image(1)[0].any()
    center, radius = sphere_of(find_world_from_scene(moved(views, None, np.eye(4)), masks))
    assert (np.linalg.norm(surface - center, axis=1) <= radius).mean() >= 0.99
    assert radius < 1.3 * enclosing_ball(surface)[1]


def test_masks_of_other_views_are_refused() -> None:
    sample = turntable(0)
    assert sample.masks is not None
    # Every mask shows something in another corner.
    pictures = [np.zeros((SIZE[1], SIZE[0], 1), np.uint8) for _ in range(30)]
    for index, picture in enumerate(pictures):
        row, column = (index % 4 // 2) * 90, (index % 2) * 130
        picture[row : row + 20, column : column + 20] = 255
    with pytest.raises(DataError, match=r"^/capture: the masks' visual hull is empty.*dataset\.region"):
        find_world_from_scene(sample.capture, ImageStack.from_images(pictures))


@pytest.mark.skipif(not DTU.exists(), reason="no real capture in shared/data/dtu_scan65")
def test_masks_find_the_sphere_that_dtu_names() -> None:
    from process_data.cameras import decompose_projection

    cameras = np.load(DTU / "cameras_sphere.npz")
    views = []
    for index in range(49):
        k, c2w = decompose_projection(cameras[f"world_mat_{index}"][:3].astype(np.float64))
        k[:2, 2] += 0.5
        views.append(View(DTU / "image" / f"{index:06d}.png", c2w, k, (800, 600)))
    masks = ImageStack.from_images([read_mask(path)[..., None] for path in sorted((DTU / "mask").iterdir())])
    center, radius = sphere_of(find_world_from_scene(Capture(DTU, tuple(views)), masks))
    given_center, given_radius = sphere_of(cameras["scale_mat_0"].astype(np.float64))
    assert np.linalg.norm(center - given_center) < 0.12 * given_radius
    assert 0.9 < radius / given_radius < 1.15


# ----------------------------------------------------------------------------------------------------
# by hand


def test_one_key_overrides() -> None:
    sample = handheld(1)
    center, radius = sphere_of(find(sample))
    found = sphere_of(find(sample, scale=1.5))
    np.testing.assert_allclose(found[0], center)
    assert found[1] == pytest.approx(1.5 * radius)
    found = sphere_of(find(sample, radius=7.0))
    np.testing.assert_allclose(found[0], center)
    assert found[1] == pytest.approx(7.0)
    found = sphere_of(find(sample, center=[1, 2, 3]))
    np.testing.assert_allclose(found[0], [1, 2, 3])
    assert found[1] == pytest.approx(radius)
    found = sphere_of(find(sample, method="cameras"))
    assert found[1] > 2 * radius


def test_region_by_hand_needs_nothing_else() -> None:
    capture = moved(views_of(ring(0)[:1]), None, np.eye(4))
    matrix = find_world_from_scene(capture, None, center=(1.0, 2.0, 3.0), radius=2.0, scale=0.5, up="none")
    np.testing.assert_allclose(matrix, [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])


def test_given_region_is_used_as_it_is() -> None:
    given = similarity(5)
    capture = moved(views_of(ring(0)), None, np.eye(4), world_from_scene=given)
    for method in ("auto", "given"):
        np.testing.assert_allclose(find_world_from_scene(capture, None, method=method), given, rtol=1e-12)
    level = find_world_from_scene(capture, None, up="z", scale=2.0)
    np.testing.assert_allclose(level[:3, :3], np.eye(3) * 2.0 * sphere_of(given)[1], atol=1e-9)
    np.testing.assert_allclose(level[:3, 3], given[:3, 3])
    # Another method keeps the format's axes.
    turned = find_world_from_scene(capture, None, method="lookat")
    np.testing.assert_allclose(turned[:3, :3] / sphere_of(turned)[1], given[:3, :3] / sphere_of(given)[1])


# ----------------------------------------------------------------------------------------------------
# up


@pytest.mark.parametrize(
    ("up", "axis"),
    [
        ("x", [1, 0, 0]),
        ("y", [0, 1, 0]),
        ("z", [0, 0, 1]),
        ("-x", [-1, 0, 0]),
        ("-y", [0, -1, 0]),
        ("-z", [0, 0, -1]),
    ],
)
def test_named_axis_becomes_z(up: Any, axis: list[int]) -> None:
    matrix = find_world_from_scene(moved(views_of(ring(0)), None, np.eye(4)), None, up=up)
    rotation = matrix[:3, :3] / sphere_of(matrix)[1]
    np.testing.assert_allclose(rotation[:, 2], axis, atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    if up == "z":
        np.testing.assert_allclose(rotation, np.eye(3), atol=1e-12)


def test_up_of_the_format_counts_before_the_cameras() -> None:
    capture = moved(views_of(ring(0)), None, np.eye(4), up=np.array([0.0, 3.0, 0.0]))
    matrix = find_world_from_scene(capture, None)
    np.testing.assert_allclose(matrix[:3, 2] / sphere_of(matrix)[1], [0, 1, 0], atol=1e-12)
    wrong = replace(capture, up=np.zeros(3))
    with pytest.raises(DataError, match=r"is no direction; set dataset\.up"):
        find_world_from_scene(wrong, None)


def test_first_camera_looks_along_y() -> None:
    sample = turntable(2)
    matrix = find(sample)
    forward = matrix[:3, :3].T @ sample.capture.views[0].c2w[:, 2]
    assert abs(forward[0]) < 0.02 * forward[1]


def degrees_from_z(c2w: np.ndarray) -> float:
    return float(np.degrees(np.arccos(np.clip(up_axis(c2w)[2], -1, 1))))


def test_up_of_awkward_cameras() -> None:
    level = ring(0)
    assert degrees_from_z(level) < 0.1
    portrait = level.copy()
    portrait[::4, :, 0], portrait[::4, :, 1] = level[::4, :, 1], -level[::4, :, 0]
    assert degrees_from_z(portrait) < 0.5
    # A drone that looks straight down and turns round between its lanes.
    random = np.random.default_rng(0)
    centers = np.column_stack([random.uniform(-5, 5, (24, 2)), np.full(24, 10.0)])
    down = looking_at(centers, centers + random.normal(0, 0.01, (24, 3)) - [0, 1e-3, 1.0])
    down[::2, :, :2] *= -1
    assert degrees_from_z(down) < 3


# ----------------------------------------------------------------------------------------------------
# geometry


def test_nearest_to_lines_by_hand() -> None:
    origins = np.array([[-1.0, 0, 0], [0, -2, 0], [0, 0, 5], [40, 0, 3]])
    directions = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, -1], [0, 1, 0]])
    # The fourth line misses; the mean of squares would be pulled away by 10.
    assert np.linalg.norm(nearest_to_lines(origins, directions, np.zeros(3) + 0.1)) < 0.1


def test_enclosing_ball_by_hand() -> None:
    cube = np.stack(np.meshgrid([0.0, 2], [0, 2], [0, 2]), axis=-1).reshape(-1, 3)
    center, radius = enclosing_ball(np.concatenate([cube, np.full((50, 3), 0.3)]))
    np.testing.assert_allclose(center, 1, atol=0.02)
    assert radius == pytest.approx(np.sqrt(3), rel=0.01)


# ----------------------------------------------------------------------------------------------------
# refusals


def capture_with(c2w: np.ndarray, points: np.ndarray | None = None, **rest: Any) -> Capture:
    random = np.random.default_rng(0)
    return moved(
        views_of(c2w), None if points is None else sparse(points, random, len(c2w)), np.eye(4), **rest
    )


def parallel() -> np.ndarray:
    centers = np.column_stack([np.linspace(-1, 1, 8), np.zeros((8, 2))])
    return looking_at(centers, centers + np.array([0, 1.0, 0]))


def at_one_place() -> np.ndarray:
    centers = np.tile([[1.0, 2.0, 3.0]], (8, 1))
    return looking_at(centers, centers + on_sphere(np.arange(8) * 45.0, np.zeros(8), 1.0))


@pytest.mark.parametrize(
    ("c2w", "points", "options", "kind", "line"),
    [
        (ring(0)[:1], None, {}, DataError, "1 view.*dataset.region_center"),
        (at_one_place(), None, {}, DataError, "all cameras stand at one place.*dataset.region_center"),
        (parallel(), None, {}, DataError, "look at no common point.*dataset.region"),
        (parallel(), None, {"method": "lookat"}, DataError, "look at no common point"),
        (
            ring(0),
            None,
            {"method": "points"},
            ConfigError,
            "dataset.region: points, but this capture has none",
        ),
        (ring(0), None, {"method": "masks"}, ConfigError, "dataset.region: masks.*dataset.apply_mask=true"),
        (ring(0), None, {"method": "given"}, ConfigError, "dataset.region: given.*region=auto"),
        (ring(0), np.zeros((9, 3)), {"method": "points"}, DataError, "9 of 9 sparse points.*dataset.region"),
        (ring(0), np.full((90, 3), 99.0), {"method": "points"}, DataError, "0 of 90 sparse points"),
        (ring(0), np.full((90, 3), np.nan), {"method": "points"}, DataError, "0 of 90 sparse points"),
        (ring(0), np.zeros((90, 3)), {}, DataError, "radius found is 0.*dataset.region_radius"),
        (ring(0), None, {"radius": 0.0}, ConfigError, "dataset.region_radius: 0.0 is not above 0"),
        (ring(0), None, {"radius": np.nan}, ConfigError, "dataset.region_radius: nan"),
        (ring(0), None, {"center": [0, np.nan, 0]}, ConfigError, "dataset.region_center: .*no point"),
        (ring(0), None, {"scale": -1.0}, ConfigError, "dataset.region_scale: -1.0"),
        (
            ring(0) * [1, 1, 1, np.nan],
            None,
            {},
            DataError,
            "000.jpg: its pose holds values that are not finite",
        ),
    ],
)
def test_refusals_name_the_key(
    c2w: np.ndarray, points: np.ndarray | None, options: dict[str, Any], kind: type[Exception], line: str
) -> None:
    with pytest.raises(kind, match=line) as caught:
        find_world_from_scene(capture_with(c2w, points), None, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "matrix", [np.eye(4) * np.nan, np.zeros((4, 4)), np.diag([1.0, 1, -1, 1]), np.diag([1.0, 2, 1, 1])]
)
def test_given_region_must_be_a_similarity(matrix: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"the region it names .*dataset\.region"):
        find_world_from_scene(capture_with(ring(0), world_from_scene=matrix), None)


def test_too_few_points_leave_it_to_the_axes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        find_world_from_scene(capture_with(ring(0), np.full((90, 3), 99.0)), None)
    assert caplog.messages[-1].startswith("region: lookat")
    assert "30 of 30 cameras outside it" in caplog.messages[-1]
