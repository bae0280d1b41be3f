"""The synthetic scenes: exact geometry, honest pictures, and a folder that reads back."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import KDTree

from process_data.cameras import rays_from_pixels
from process_data.formats.dtu import DTUConfig, load_dtu
from process_data.synthetic import (
    SyntheticConfig,
    load_synthetic,
    make_cameras,
    render_views,
    synthetic_world_from_scene,
)
from process_data.synthetic_field import BOXES, SPHERE_RADIUS
from process_data.synthetic_figurine import figurine as figurine_field
from process_data.synthetic_figurine import table
from process_data.synthetic_mesh import SCENES, SceneName, exact_distance, ground_truth_mesh, signed_distance
from process_data.synthetic_render import SURROUNDINGS, shade
from process_data.synthetic_scenes import glossy, niche, room, thin, wall
from process_data.synthetic_shapes import smooth_min
from utils.errors import ConfigError, ExportError
from utils.types import Cameras, Scene, TriangleMesh

ALL_SCENES = sorted(SCENES)
GOLDEN = [
    [
        [255.0, 224.866, 236.1, 255.0],
        [255.0, 176.321, 181.753, 255.0],
        [255.0, 165.405, 191.638, 242.426],
        [255.0, 180.178, 185.072, 255.0],
    ],
    [
        [255.0, 234.926, 231.762, 255.0],
        [255.0, 178.755, 168.23, 255.0],
        [255.0, 191.762, 181.007, 244.997],
        [255.0, 201.126, 191.531, 255.0],
    ],
    [
        [255.0, 240.997, 249.583, 255.0],
        [255.0, 161.475, 159.151, 255.0],
        [255.0, 192.304, 165.078, 255.0],
        [255.0, 229.359, 223.681, 255.0],
    ],
]


@pytest.fixture(scope="module")
def figurine() -> Scene:
    return load_synthetic(SyntheticConfig(num_images=16, image_size=96, holdout=4))


@pytest.fixture(scope="module")
def surface() -> TriangleMesh:
    return ground_truth_mesh("figurine", 192)


def pixels_of(cameras: Cameras, view: int, points: np.ndarray) -> np.ndarray:
    """Continuous pixel coordinates of scene points."""
    c2w, lens = cameras.c2w[view].double().numpy(), cameras.intrinsics[view].double().numpy()
    homogeneous = (points - c2w[:, 3]) @ c2w[:, :3] @ lens.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


# ------------------------------------------------------------------------------------------ distances


def test_distance_at_points_known_by_hand() -> None:
    sphere = signed_distance(np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.3, 0.4]]), "sphere")
    np.testing.assert_allclose(sphere, [-0.5, 0.5, 0.0], atol=1e-15)
    inside_trunk, through_handle, in_handle, in_bowl, between_ears = signed_distance(
        np.array(
            [[0.0, 0.0, -0.1], [0.0, 0.37, 0.10], [0.0, 0.48, 0.10], [0.0, 0.03, 0.45], [0.0, -0.05, 0.7]]
        )
    )
    assert inside_trunk < -0.2
    assert through_handle > 0.02, "the handle's hole is open"
    assert -0.036 <= in_handle < -0.02, "the handle is 0.072 thick"
    assert in_bowl > 0.08, "the jug is hollow"
    assert between_ears > 0.05


@pytest.mark.parametrize("scene", ALL_SCENES)
def test_field_is_lipschitz_so_that_sphere_tracing_is_safe(scene: SceneName) -> None:
    random = np.random.default_rng(0)
    near = ground_truth_mesh(scene, 96).vertices
    start = np.concatenate([random.uniform(-1, 1, (30_000, 3)), near + random.normal(0, 0.01, near.shape)])
    for length in (1e-4, 1e-2):
        end = start + random.normal(0, length, start.shape)
        rise = np.abs(signed_distance(start, scene) - signed_distance(end, scene))
        assert (rise / np.linalg.norm(end - start, axis=1)).max() <= 1.0 + 1e-9


def test_exact_distance_has_unit_slope_and_is_never_below_the_bound(surface: TriangleMesh) -> None:
    random = np.random.default_rng(1)
    points = surface.vertices[random.integers(0, len(surface.vertices), 4000)] + random.normal(
        0, 0.006, (4000, 3)
    )
    exact, bound = exact_distance(points), signed_distance(points)
    assert (np.abs(bound) <= np.abs(exact) + 1e-6).all()
    assert (np.sign(bound) == np.sign(exact)).all()
    slope = np.zeros(len(points))
    for axis in np.eye(3):
        slope += ((exact_distance(points + 5e-4 * axis) - exact_distance(points - 5e-4 * axis)) / 1e-3) ** 2
    # Crevices have no unique nearest point; everywhere else the eikonal equation holds.
    assert np.quantile(np.abs(np.sqrt(slope) - 1.0), 0.98) < 0.01


def test_exact_distance_matches_the_sphere_and_a_dense_search(surface: TriangleMesh) -> None:
    points = np.random.default_rng(2).uniform(-0.9, 0.9, (1000, 3))
    on_sphere = exact_distance(points, "sphere") - (np.linalg.norm(points, axis=1) - SPHERE_RADIUS)
    # A point near the centre is as near to the antipode: the slide may stop early there, by less than a grid
    # cell.
    assert np.quantile(np.abs(on_sphere), 0.95) < 1e-5
    assert np.abs(on_sphere).max() < 1e-3
    dense, _ = KDTree(surface.vertices).query(points)
    exact = np.abs(exact_distance(points))
    # Far away the nearest vertex may lie on a neighbouring bump that is farther by a hair.
    assert (exact <= dense + 1e-3).all()
    assert (dense - exact).max() < 0.01


@pytest.mark.parametrize(
    ("scene", "written"),
    [
        (
            "figurine-table",
            lambda *p: smooth_min.py_func(figurine_field.py_func(*p), table.py_func(*p), 0.02),
        ),
        ("thin", thin.py_func),
        ("glossy", glossy.py_func),
        ("wall", wall.py_func),
        ("niche", niche.py_func),
        ("room", room.py_func),
    ],
)
def test_compiled_kernels_agree_with_the_field_as_written(
    scene: SceneName, written: Callable[..., float]
) -> None:
    """Fails when Numba's cache is older than the fields: delete ``process_data/__pycache__/*.nb*``."""
    points = np.random.default_rng(3).uniform(-0.9, 0.9, (50, 3))
    np.testing.assert_allclose(signed_distance(points, scene), [written(*p) for p in points], atol=1e-12)


def test_other_scenes_at_points_known_by_hand() -> None:
    in_rod, between_rods, in_plate = signed_distance(
        np.array([[0.386, 0.0, -0.209], [0.33, 0.19, 0.3], [0.3, 0.1, -0.67]]), "thin"
    )
    assert -0.02 < in_rod < -0.01
    assert between_rods > 0.0, "a gap under the roof"
    assert -0.0101 <= in_plate < -0.009, "the plate is 0.02 thick"
    on_top, in_sphere, in_box = signed_distance(
        np.array([[-0.27, -0.06, 0.235], [-0.27, -0.06, -0.095], [0.33, 0.1, 0.075]]), "glossy"
    )
    np.testing.assert_allclose([on_top, in_sphere, in_box], [0.0, -0.33, 0.0], atol=1e-12)
    flat, curved = (-0.3, 0.32, 0.3), (0.1 + 0.52 * math.cos(0.6), -0.2 + 0.52 * math.sin(0.6), 0.3)
    np.testing.assert_allclose(signed_distance(np.array([flat, curved]), "wall"), -0.03, atol=1e-12)
    bottom, centre = signed_distance(np.array([[0.0, 0.29, 0.0], [0.0, 0.0, 0.0]]), "niche")
    np.testing.assert_allclose([bottom, centre], [0.0, 0.26], atol=1e-12)
    middle, on_wall, behind = signed_distance(
        np.array([[0.0, 0.0, 0.0], [0.55, 0.0, 0.1], [0.0, 0.5, 0.1]]), "room"
    )
    np.testing.assert_allclose([middle, on_wall, behind], [0.38, 0.0, -0.05], atol=1e-12)


def test_the_screen_has_no_texture_and_the_cactus_has() -> None:
    """Colours of ``wall`` as the lamp sees them, within patches of the screen and of the pot."""
    mesh = ground_truth_mesh("wall", 128)
    assert mesh.colors is not None
    x, _, z = mesh.vertices.T
    screen = (mesh.vertices[:, 1] > 0.28) & (mesh.vertices[:, 1] < 0.30) & (z > 0.2) & (x < -0.3)
    pot = (np.hypot(x + 0.06, mesh.vertices[:, 1] + 0.13) < 0.16) & (z > -0.5) & (z < -0.3)
    assert screen.sum() > 200
    assert pot.sum() > 200
    assert mesh.colors[screen].std(axis=0).max() < 4.0
    assert mesh.colors[pot].std(axis=0).min() > 15.0


# ------------------------------------------------------------------------------------------------ mesh


@pytest.mark.parametrize(
    ("scene", "genus", "volume", "radius"),
    [
        ("figurine", 1, 0.3, 0.85),
        ("sphere", 0, 0.3, 0.85),
        ("figurine-table", 1, 0.3, 0.97),
        ("thin", 56, 0.07, 0.87),
        ("glossy", 0, 0.35, 0.85),
        ("wall", 0, 0.15, 0.95),
        ("niche", 0, 0.5, 0.95),
        # What is solid is outside: faces look inwards, and the volume counts as negative.
        ("room", 0, -0.76, 0.82),
    ],
)
def test_mesh_is_one_watertight_surface_of_the_designed_genus(
    scene: SceneName, genus: int, volume: float, radius: float
) -> None:
    mesh = ground_truth_mesh(scene, 128)
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert shape.is_watertight
    assert shape.is_winding_consistent
    assert shape.euler_number == 2 - 2 * genus
    assert shape.body_count == 1
    assert shape.volume > volume
    assert np.abs(signed_distance(mesh.vertices, scene)).max() < 1e-6
    assert np.linalg.norm(mesh.vertices, axis=1).max() < radius
    lowest, highest = BOXES[SCENES[scene]]
    assert (mesh.vertices > lowest).all(), "rays start at this box"
    assert (mesh.vertices < highest).all()
    # The normals are the field's; the faces agree with them, apart from creases.
    assert mesh.normals is not None
    agreement = np.einsum("vc,vc->v", shape.vertex_normals, mesh.normals)
    creased = {"thin": 0.10, "room": 0.05}.get(scene, 0.01)
    assert np.quantile(agreement, creased) > 0.94


def test_sphere_mesh_has_the_sphere_s_measures() -> None:
    mesh = ground_truth_mesh("sphere", 64)
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert shape.volume == pytest.approx(4 / 3 * math.pi * SPHERE_RADIUS**3, rel=5e-3)
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), SPHERE_RADIUS, atol=1e-12)
    assert mesh.normals is not None
    np.testing.assert_allclose(mesh.normals, mesh.vertices / SPHERE_RADIUS, atol=3e-5)


def test_mesh_refuses_a_resolution_without_cells() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        ground_truth_mesh("sphere", 0)


# -------------------------------------------------------------------------------------------- pictures


def test_traced_depth_and_silhouette_match_the_analytic_sphere() -> None:
    cameras = make_cameras(SyntheticConfig(scene="sphere", num_images=3, image_size=40))
    rgb, alpha, depth = render_views("sphere", cameras)
    column, row = np.meshgrid(np.arange(40), np.arange(40))
    centres = torch.tensor(np.stack([column, row], -1).reshape(-1, 2) + 0.5, dtype=torch.float32)
    for view in range(3):
        rays = rays_from_pixels(cameras, torch.full((1600,), view), centres)
        origin, direction = rays.origins.double().numpy(), rays.directions.double().numpy()
        middle = -(origin * direction).sum(1)
        inside = SPHERE_RADIUS**2 - ((origin**2).sum(1) - middle**2)
        expected = np.where(inside > 0, middle - np.sqrt(np.maximum(inside, 0)), 0.0).reshape(40, 40)
        apart = np.abs(np.sqrt((origin**2).sum(1) - middle**2).reshape(40, 40) - SPHERE_RADIUS)
        clear = apart > 0.003
        # The tracer stops within 1e-4 of the surface, along the normal; grazing rays meet it at an angle.
        np.testing.assert_allclose(depth[view][clear], expected[clear], atol=2e-3)
        steep = clear & (expected > 0) & (apart > 0.1)
        np.testing.assert_allclose(depth[view][steep], expected[steep], atol=3e-4)
        pixel = 2.85 * 2 * math.tan(math.radians(18.5)) / 40
        whole = apart > pixel
        np.testing.assert_array_equal(alpha[view][whole], (expected > 0)[whole].astype(np.float32))
        assert ((alpha[view] > 0) & (alpha[view] < 1)).any(), "edges are soft"
        np.testing.assert_array_equal(rgb[view][whole & (expected == 0)], 1.0)


def test_surface_points_project_into_the_masks_and_cover_them(figurine: Scene, surface: TriangleMesh) -> None:
    assert figurine.masks is not None
    for view in range(len(figurine.cameras)):
        mask = figurine.masks.image(view).numpy()[..., 0] > 0
        assert mask[1:-1, 1:-1].sum() == mask.sum(), "the object stays clear of the frame"
        assert mask.mean() > 0.15
        column, row = np.floor(pixels_of(figurine.cameras, view, surface.vertices)).astype(int).T
        covered = np.zeros_like(mask)
        covered[row, column] = True
        grown = np.zeros_like(mask)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                grown |= np.roll(mask, (dy, dx), (0, 1))
        assert not (covered & ~grown).any()
        assert (mask & ~covered).mean() < 1e-3


def test_every_part_of_the_surface_is_seen(surface: TriangleMesh) -> None:
    """From the default views: at least three of them see nearly every surface point."""
    cameras = make_cameras(SyntheticConfig(image_size=64))
    _, _, depth = render_views("figurine", cameras)
    points = surface.vertices[:: len(surface.vertices) // 4000]
    seen = np.zeros(len(points), dtype=int)
    for view in range(len(cameras)):
        column, row = np.floor(pixels_of(cameras, view, points)).astype(int).T
        away = np.linalg.norm(points - cameras.c2w[view, :, 3].double().numpy(), axis=1)
        seen += np.abs(depth[view][row, column] - away) < 0.06
    assert (seen >= 3).mean() > 0.99


def test_the_hole_shows_the_background(figurine: Scene) -> None:
    """A camera that looks through the handle sees white inside the ring and object all around it."""
    cameras = Cameras(
        torch.tensor([[[0.0, 0.0, -1.0, 2.8], [1.0, 0.0, 0.0, 0.37], [0.0, -1.0, 0.0, 0.10]]]),
        torch.tensor([[[200.0, 0.0, 40.5], [0.0, 200.0, 40.5], [0.0, 0.0, 1.0]]]),
        torch.tensor([[81, 81]]),
    )
    rgb, alpha, _ = render_views("figurine", cameras)
    assert alpha[0, 40, 40] == 0.0
    np.testing.assert_array_equal(rgb[0, 40, 40], 1.0)
    assert alpha[0, 40, :40].max() == 1.0
    assert alpha[0, 40, 41:].max() == 1.0


def test_colours_are_varied_in_range_and_nearly_alike_from_everywhere(surface: TriangleMesh) -> None:
    assert surface.colors is not None
    colors = surface.colors / 255.0
    assert colors.std(axis=0).min() > 0.1
    assert (colors > 0.99).any(axis=1).mean() < 0.02, "hardly anything is overexposed"
    assert (colors.mean(axis=1) < 0.02).mean() < 0.02
    cameras = make_cameras(SyntheticConfig(num_images=12, image_size=112))
    rgb, _, depth = render_views("figurine", cameras)
    sums, counts = np.zeros((len(colors), 3)), np.zeros(len(colors))
    worst = np.zeros(len(colors))
    for view in range(12):
        column, row = np.floor(pixels_of(cameras, view, surface.vertices)).astype(int).T
        away = np.linalg.norm(surface.vertices - cameras.c2w[view, :, 3].double().numpy(), axis=1)
        seen = np.abs(depth[view][row, column] - away) < 0.01
        seen_color = rgb[view][row, column]
        sums[seen] += seen_color[seen]
        counts[seen] += 1
        worst[seen] = np.maximum(worst[seen], np.abs(seen_color - colors)[seen].max(axis=1))
    several = counts >= 2
    assert np.abs(sums[several] / counts[several, None] - colors[several]).mean() < 0.03
    assert np.median(worst[several]) < 0.06


def test_glossy_mirrors_what_lies_along_the_reflected_direction() -> None:
    """Two points of the sphere whose reflected directions agree look alike, though their normals differ."""
    centre, radius = np.array([-0.27, -0.06, -0.095]), 0.33

    def seen(normal: np.ndarray, view: np.ndarray) -> np.ndarray:
        point = centre + radius * normal
        return np.array(shade(SCENES["glossy"], *point, *view))

    up, window = np.array([0.0, 0.0, 1.0]), np.radians([-110.0, 35.0])
    towards = np.array(
        [
            math.cos(window[0]) * math.cos(window[1]),
            math.sin(window[0]) * math.cos(window[1]),
            math.sin(window[1]),
        ]
    )
    normal = (up + towards) / np.linalg.norm(up + towards)
    assert seen(normal, up).min() > 0.85, "the window's image, seen from above"
    tilted = normal + 0.75 * np.cross(normal, towards)
    tilted /= np.linalg.norm(tilted)
    assert seen(tilted, up).max() < 0.7, "and beside it the dim studio"
    view = 2.0 * (tilted @ towards) * tilted - towards
    assert seen(tilted, view).min() > 0.85, "which shows the window from elsewhere"


def test_cameras_of_the_wall_stand_before_it() -> None:
    centres = make_cameras(SyntheticConfig(scene="wall")).c2w[:, :, 3].double()
    azimuth = torch.rad2deg(torch.atan2(centres[:, 0], -centres[:, 1]))
    assert azimuth.abs().max() <= 55.0
    assert azimuth.min() < -45.0
    assert azimuth.max() > 45.0


def test_backgrounds() -> None:
    choices: tuple[tuple[Literal["white", "black"], int], ...] = (("white", 255), ("black", 0))
    for background, value in choices:
        scene = load_synthetic(
            SyntheticConfig(scene="sphere", num_images=2, image_size=16, holdout=0, background=background)
        )
        assert scene.images.image(0)[0, 0].tolist() == [value] * 3
    table = load_synthetic(
        SyntheticConfig(scene="figurine-table", num_images=2, image_size=32, holdout=0, apply_mask=False)
    )
    assert table.masks is None
    corner = torch.stack([table.images.image(view)[0, 0] for view in range(2)])
    assert not torch.equal(corner[0], corner[1]), "the surroundings change with the direction"


def test_surroundings_are_at_a_distance() -> None:
    target = SURROUNDINGS * torch.tensor([0.64, -0.48, 0.6], dtype=torch.float64)
    starts = torch.tensor([[0.5, -1.2, 2.4], [2.0, -2.0, 0.3], [1.7, 0.4, 1.0]], dtype=torch.float64)
    lens = torch.tensor([[2e4, 0, 2.5], [0, 2e4, 2.5], [0, 0, 1]])

    def colors_along(ways: torch.Tensor) -> np.ndarray:
        forward = torch.nn.functional.normalize(ways, dim=1)
        right = torch.linalg.cross(forward, torch.tensor([[0.0, 0, 1]], dtype=torch.float64).expand(3, 3))
        right = torch.nn.functional.normalize(right, dim=1)
        c2w = torch.stack([right, torch.linalg.cross(forward, right), forward, starts], dim=2)
        cameras = Cameras(c2w.float(), lens.expand(3, 3, 3), torch.tensor([[5, 5]] * 3))
        rgb, alpha, _ = render_views("figurine-table", cameras)
        assert alpha.max() == 0
        return rgb[:, 2, 2]

    # One place on the ball looks the same from everywhere; one direction does not.
    here = colors_along(target - starts)
    np.testing.assert_allclose(here, here[[0, 0, 0]], atol=1e-4)
    parallel = colors_along((target - starts)[[0, 0, 0]])
    assert np.abs(parallel[1:] - parallel[0]).max(axis=1).min() > 0.02


# ----------------------------------------------------------------------------------------------- scene


def test_same_config_gives_the_same_bytes_and_another_seed_other_views(figurine: Scene) -> None:
    config = SyntheticConfig(num_images=16, image_size=96, holdout=4)
    again = load_synthetic(config)
    assert torch.equal(again.images.pixels, figurine.images.pixels)
    assert torch.equal(again.cameras.c2w, figurine.cameras.c2w)
    assert again.masks is not None
    assert figurine.masks is not None
    assert torch.equal(again.masks.pixels, figurine.masks.pixels)
    other = make_cameras(SyntheticConfig(num_images=16, image_size=96, seed=1))
    assert not torch.allclose(other.c2w, figurine.cameras.c2w)


def test_cameras_are_rigid_and_held_out_views_lie_among_the_others() -> None:
    cameras = make_cameras(SyntheticConfig())
    rotation = cameras.c2w[:, :, :3].double()
    torch.testing.assert_close(
        rotation @ rotation.mT, torch.eye(3).double().expand(64, 3, 3), atol=1e-6, rtol=0
    )
    assert (torch.linalg.det(rotation) > 0).all()
    centres = cameras.c2w[:, :, 3]
    assert ((centres.norm(dim=1) > 2.7) & (centres.norm(dim=1) < 3.0)).all()
    assert (rotation[:, 2, 1] < 0).all(), "the image's y axis points down"
    direction = torch.nn.functional.normalize(centres, dim=1)
    test = list(range(0, 64, 8))
    train = [index for index in range(64) if index % 8]
    nearest = torch.rad2deg(torch.acos((direction[test] @ direction[train].T).clamp(-1, 1))).min(dim=1).values
    assert nearest.max() < 30.0
    assert direction[test, 2].max() < direction[train, 2].max()
    assert direction[test, 2].min() > direction[train, 2].min()


def test_reference_mesh_is_in_world_coordinates(figurine: Scene) -> None:
    assert figurine.train_indices == tuple(index for index in range(16) if index % 4)
    assert figurine.test_indices == (0, 4, 8, 12)
    reference = figurine.reference_mesh
    assert reference is not None
    assert reference.normals is not None
    scene_from_world = torch.linalg.inv(figurine.world_from_scene).numpy()
    vertices = reference.vertices @ scene_from_world[:3, :3].T + scene_from_world[:3, 3]
    assert np.abs(signed_distance(vertices)).max() < 1e-9
    assert np.abs(signed_distance(reference.vertices)).max() > 0.5, "world and scene differ"
    matrix = synthetic_world_from_scene().numpy()
    np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, 2.5**2 * np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix[:3, :3]) > 0
    step = reference.vertices + 0.01 * reference.normals
    stepped = step @ scene_from_world[:3, :3].T + scene_from_world[:3, 3]
    assert (signed_distance(stepped) > 0).mean() > 0.99


def test_write_to_names_a_folder_or_says_why_not(tmp_path: Path) -> None:
    """What the writer makes of a scene is the business of test_export_capture."""
    small: dict[str, Any] = {"scene": "sphere", "num_images": 3, "image_size": 16, "holdout": 2}
    scene = load_synthetic(SyntheticConfig(**small, write_to=str(tmp_path / "new")))
    back = load_dtu(DTUConfig(root_dir=str(tmp_path / "new"), apply_mask=True, holdout=2))
    assert torch.equal(back.images.pixels, scene.images.pixels)
    # NeuS's region has no rotation: the scene's axes differ, the sphere and the cameras in the world agree.
    torch.testing.assert_close(back.world_from_scene[:, 3], scene.world_from_scene[:, 3])
    torch.testing.assert_close(back.world_from_scene[:3, :3].det(), scene.world_from_scene[:3, :3].det())
    in_world = [part.world_from_scene[:3, :3] @ part.cameras.c2w.double() for part in (back, scene)]
    torch.testing.assert_close(*in_world, atol=1e-5, rtol=0)
    assert back.image_names == scene.image_names
    load_synthetic(SyntheticConfig(**small, apply_mask=False, write_to=str(tmp_path / "bare")))
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["cameras_sphere.npz", "image"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file.*: cannot be written .*; check free space and permissions"):
        load_synthetic(SyntheticConfig(**small, write_to=str(tmp_path / "file")))


# ---------------------------------------------------------------------------------------------- extras


def test_figurine_keeps_its_pictures(figurine: Scene) -> None:
    """Means of 24 x 24 pixels of three views, noted in 2026: what was trained on them stays comparable."""
    found = [
        figurine.images.image(view).float().view(4, 24, 4, 24, 3).mean(dim=(1, 3, 4)).tolist()
        for view in (0, 5, 10)
    ]
    np.testing.assert_allclose(found, GOLDEN, atol=0.01)


def test_extras_change_nothing_else_and_are_absent_by_default() -> None:
    small: dict[str, Any] = {"scene": "niche", "num_images": 6, "image_size": 64, "holdout": 0}
    plain = load_synthetic(SyntheticConfig(**small))
    assert plain.depths is None
    assert plain.normals is None
    assert plain.points is None
    full = load_synthetic(SyntheticConfig(**small, depths="monocular", normals=True, num_points=50))
    assert torch.equal(full.images.pixels, plain.images.pixels)
    assert torch.equal(full.cameras.c2w, plain.cameras.c2w)
    noisy = load_synthetic(SyntheticConfig(**small, noise=0.05))
    assert noisy.masks is not None
    assert plain.masks is not None
    assert torch.equal(noisy.masks.pixels, plain.masks.pixels)
    change = (noisy.images.pixels.float() - plain.images.pixels.float()) / 255.0
    inside = ((plain.images.pixels > 50) & (plain.images.pixels < 205)).all(dim=1)
    assert change[inside].std() == pytest.approx(0.05, rel=0.05)
    assert change[inside].mean().abs() < 0.005


def test_depths_and_normals_of_the_sphere_are_analytic() -> None:
    config = SyntheticConfig(
        scene="sphere", num_images=3, image_size=48, holdout=0, depths="sensor", normals=True
    )
    scene = load_synthetic(config)
    assert scene.depths is not None
    assert scene.normals is not None
    for view in range(3):
        c2w, lens = (
            scene.cameras.c2w[view].double().numpy(),
            scene.cameras.intrinsics[view].double().numpy(),
        )
        depth = scene.depths.image(view)[..., 0].double().numpy() / 2.5
        normal = scene.normals.image(view).double().numpy()
        row, column = np.nonzero(depth)
        assert 100 < len(row) < 48 * 48
        local = np.stack([column + 0.5, row + 0.5, np.ones(len(row))], 1) @ np.linalg.inv(lens).T
        points = (local * depth[row, column, None]) @ c2w[:, :3].T + c2w[:, 3]
        away = np.linalg.norm(points, axis=1)
        facing = -normal[row, column, 2]
        # Half precision: 0.001 of the depth in scene units; oblique rays stop early, see _trace.
        assert np.abs(away - SPHERE_RADIUS)[facing > 0.3].max() < 2e-3
        expected = (points / away[:, None]) @ c2w[:, :3]
        assert np.abs(normal[row, column] - expected)[facing > 0.3].max() < 6e-3
        assert (normal[depth == 0.0] == 0.0).all()


def test_monocular_depth_is_affine_in_the_true_one_up_to_a_slight_bend() -> None:
    small: dict[str, Any] = {"scene": "wall", "num_images": 6, "image_size": 64, "holdout": 0}
    exact = load_synthetic(SyntheticConfig(**small, depths="sensor")).depths
    scene = load_synthetic(SyntheticConfig(**small, depths="monocular"))
    assert exact is not None
    assert scene.depths is not None
    scales = []
    for view in range(6):
        true, seen = (maps.image(view)[..., 0].double().numpy().ravel() for maps in (exact, scene.depths))
        assert ((true > 0) == (seen > 0)).all()
        true, seen = true[true > 0], seen[seen > 0]
        (scale, _), rest, *_ = np.linalg.lstsq(np.c_[true, np.ones(len(true))], seen, rcond=None)
        assert 0.45 < scale < 2.2
        assert 0.001 < math.sqrt(rest[0] / len(true)) / scale < 0.06
        scales.append(scale)
    assert np.std(scales) > 0.1


@pytest.mark.parametrize("name", ["niche", "wall"])
def test_points_lie_on_textured_surface_where_their_views_see_them(name: SceneName) -> None:
    config = SyntheticConfig(scene=name, num_images=24, image_size=128, holdout=0, num_points=400)
    scene = load_synthetic(config)
    points = scene.points
    assert points is not None
    assert len(points) == 400
    away = np.abs(exact_distance(points.positions, name))
    assert np.median(away) < 0.004
    assert away.max() < 0.05
    assert np.median(away) > 1e-4, "they are not exact"
    assert 0.1 < points.errors.mean() < 0.45
    assert (np.bincount(points.observations[:, 0], minlength=400) >= 3).all()
    assert (np.diff(points.observations[:, 0]) >= 0).all()
    _, _, depth = render_views(name, scene.cameras)
    for view in range(24):
        seen = points.positions[points.observations[points.observations[:, 1] == view, 0]]
        column, row = np.floor(pixels_of(scene.cameras, view, seen)).astype(int).T
        distance = np.linalg.norm(seen - scene.cameras.c2w[view, :, 3].double().numpy(), axis=1)
        # Nothing stands before a point: some pixel about it is as far away.
        around = [
            depth[view][(row + dy).clip(0, 127), (column + dx).clip(0, 127)]
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
        ]
        assert (np.abs(np.array(around) - distance).min(axis=0) < 0.05).all()
    if name == "wall":
        on_screen = (points.positions[:, 1] > 0.27) & (points.positions[:, 2] > -0.4)
        assert on_screen.sum() == 0, "nothing to find on the plain screen"
    again = load_synthetic(config).points
    assert again is not None
    np.testing.assert_array_equal(again.positions, points.positions)


def test_without_texture_there_are_fewer_points() -> None:
    config = SyntheticConfig(scene="sphere", num_images=4, image_size=32, num_points=500, holdout=0)
    points = load_synthetic(config).points
    assert points is not None
    assert len(points) < 100


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("noise", -0.1),
        ("num_points", -1),
        ("num_images", 1),
        ("image_size", 8),
        ("fov", 0.0),
        ("seed", -1),
        ("test_steps", 0),
    ],
)
def test_config_refuses_values_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^dataset\.{key}: must be .*, got {value}$"):
        SyntheticConfig(**{key: value})


def test_holdout_that_does_not_fit_is_the_user_s_error() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.holdout"):
        load_synthetic(SyntheticConfig(scene="sphere", num_images=2, image_size=16, holdout=[5]))
