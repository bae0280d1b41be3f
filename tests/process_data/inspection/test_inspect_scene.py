import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from process_data.inspection import inspect_scene, inspection_mesh
from process_data.inspection.measure import Inspection, frustum, inspect
from process_data.inspection.picture import HELD_OUT, SPHERE, TRAINING, sphere_outline
from process_data.inspection.viewer import viewer_page
from tests.process_data.inspection.test_conventions import ARC, HEIGHT, LENS, WIDTH, room_scene, written_as
from utils.errors import ExportError
from utils.mesh import read_mesh
from utils.types import ImageStack, Scene, SparsePoints


@pytest.fixture(scope="module")
def scene() -> Scene:
    return room_scene(ARC)


@pytest.fixture(scope="module")
def inspection(scene: Scene) -> Inspection:
    return inspect(scene)


def to_world(scene: Scene, positions: np.ndarray) -> np.ndarray:
    matrix = scene.world_from_scene.numpy()
    return positions @ matrix[:3, :3].T + matrix[:3, 3]


def facts_of(page: str) -> dict[str, object]:
    return json.loads(re.search(r"const facts = (.*);\n", page).group(1))


def test_triangulated_points_lie_on_floor_and_wall(inspection: Inspection) -> None:
    points = to_world(inspection.scene, inspection.points)
    assert len(points) > 200
    distance = np.minimum(np.abs(points[:, 2]), np.abs(points[:, 1] - 1))
    assert np.median(distance) < 0.02
    assert inspection.point_colors.shape == points.shape


@pytest.mark.parametrize("has_lens", [False, True])
def test_right_poses_reproject_where_features_are(inspection: Inspection, has_lens: bool) -> None:
    found = inspect(room_scene(ARC, LENS)) if has_lens else inspection
    errors = np.concatenate([residuals.errors for residuals in found.residuals.values()])
    assert len(errors) > 100
    assert np.median(errors) < 0.5
    assert found.report.fits
    assert not found.warnings


@pytest.mark.parametrize(
    ("axes", "direction", "said"), [("opengl", "c2w", "flipped"), ("opencv", "w2c", "inverted")]
)
def test_wrong_poses_are_warned_of(axes: str, direction: str, said: str) -> None:
    found = inspect(room_scene(written_as(ARC, axes, direction)[:, :3]))
    assert any("DO NOT FIT" in warning and said in warning for warning in found.warnings)


def test_facts_say_what_the_scene_is(inspection: Inspection) -> None:
    text = "\n".join(inspection.facts)
    for part in (
        "8 views: 7 for training, 1 held out",
        f"{WIDTH} x {HEIGHT} px",
        "270.0 px, lens PINHOLE",
        "radius 1.5 world",
    ):
        assert part in text
    assert "poses fit the photos" in text


def test_cameras_inside_the_sphere_and_blind_ones_are_warned_of(scene: Scene) -> None:
    c2w = scene.cameras.c2w.clone()
    c2w[2, :, 3] *= 0.3
    # Half a turn about the camera's y axis: it looks away.
    c2w[4, :, [0, 2]] *= -1
    found = inspect(replace(scene, cameras=replace(scene.cameras, c2w=c2w)))
    assert any(warning.startswith("1 of 8 cameras stand inside the sphere") for warning in found.warnings)
    assert any("do not show" in warning and "4.png" in warning for warning in found.warnings)


def test_sphere_outline_touches_the_sphere() -> None:
    center = np.array([1.0, -2.0, 0.5])
    outline = sphere_outline(center)
    np.testing.assert_allclose(np.linalg.norm(outline, axis=1), 1, atol=1e-12)
    # Lines of sight are tangents.
    np.testing.assert_allclose(((outline - center) * outline).sum(axis=1), 0, atol=1e-12)


def test_frustum_corners_are_the_pictures(scene: Scene) -> None:
    corners = frustum(scene, 1, 0.2)
    c2w = scene.cameras.c2w[1].double().numpy()
    local = (corners - c2w[:, 3]) @ c2w[:, :3]
    np.testing.assert_allclose(local[0], 0, atol=1e-7)
    np.testing.assert_allclose(local[1:, 2], 0.2, rtol=1e-6)
    pixels = local[1:, :2] / local[1:, 2:] * 270 + [WIDTH / 2, HEIGHT / 2]
    np.testing.assert_allclose(pixels, [[0, 0], [WIDTH, 0], [WIDTH, HEIGHT], [0, HEIGHT]], atol=1e-3)


def with_points_and_masks(scene: Scene) -> Scene:
    """Sparse points on the floor, seen by the first two views, and a mask of the left half."""
    number = np.random.default_rng(0)
    world = np.column_stack([number.uniform(-0.8, 0.8, (40, 2)), np.zeros(40)])
    matrix = np.linalg.inv(scene.world_from_scene.numpy())
    positions = world @ matrix[:3, :3].T + matrix[:3, 3]
    seen = np.stack(np.meshgrid(np.arange(40), [0, 1], indexing="ij"), -1).reshape(-1, 2).astype(np.int64)
    errors = np.full(40, np.nan)
    errors[:20] = 0.75
    points = SparsePoints(positions, np.full((40, 3), 200, np.uint8), errors, seen)
    mask = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    mask[:, : WIDTH // 2] = 255
    return replace(scene, points=points, masks=ImageStack.from_images([mask] * len(ARC)))


def test_all_three_files_are_written(scene: Scene, tmp_path: Path) -> None:
    paths = inspect_scene(with_points_and_masks(scene), tmp_path / "new" / "inspect")
    assert [path.name for path in paths] == ["inspect.png", "inspect.html", "inspect.ply"]
    picture = np.array(Image.open(paths[0])).astype(int)
    assert picture.shape[1] == 1800
    for color in (TRAINING, HELD_OUT, SPHERE, (255, 214, 10)):
        assert (np.abs(picture - color).max(axis=2) < 24).sum() > 50
    mesh = read_mesh(paths[2])
    assert mesh.colors is not None
    is_sphere = (mesh.colors == SPHERE).all(axis=1)
    center = scene.world_from_scene[:3, 3].numpy()
    # The unit sphere in the world, drawn as thin tubes.
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices[is_sphere] - center, axis=1), 1.5, atol=0.01)


def test_the_captures_own_points_are_preferred(scene: Scene) -> None:
    found = inspect(with_points_and_masks(scene))
    assert len(found.points) == 40
    assert any("40 points of the capture" in fact for fact in found.facts)
    assert any("by the file: median 0.75 px" in fact for fact in found.facts)


def test_the_page_needs_no_network_and_holds_the_data(inspection: Inspection) -> None:
    page = viewer_page(inspection)
    assert not re.search(r"https?://|src=|@import|url\(", page)
    facts = facts_of(page)
    assert facts["names"] == list(inspection.scene.image_names)
    assert facts["heldOut"] == [True] + [False] * 7
    corners = np.frombuffer(base64.b64decode(facts["corners"]), "<f4").reshape(8, 5, 3)
    np.testing.assert_allclose(corners[:, 0], inspection.scene.cameras.c2w[:, :, 3].numpy(), atol=1e-6)
    points = np.frombuffer(base64.b64decode(facts["points"]), "<f4").reshape(-1, 3)
    np.testing.assert_allclose(points, inspection.points, rtol=1e-5, atol=1e-6)


def test_names_cannot_break_the_page(inspection: Inspection) -> None:
    names = ("</script><b>.png", *inspection.scene.image_names[1:])
    page = viewer_page(replace(inspection, scene=replace(inspection.scene, image_names=names, name="a<b")))
    assert page.count("</script>") == 1
    assert facts_of(page)["names"][0] == names[0]
    assert "<title>a&lt;b" in page


def test_a_page_of_many_views_stays_small(scene: Scene, inspection: Inspection) -> None:
    number = 300
    chosen = [view % 8 for view in range(number)]
    cameras = replace(
        scene.cameras,
        c2w=scene.cameras.c2w[chosen],
        intrinsics=scene.cameras.intrinsics[chosen],
        size=scene.cameras.size[chosen],
    )
    images = ImageStack(scene.images.pixels.repeat(38, 1)[: number * WIDTH * HEIGHT], cameras.size,
                        torch.arange(number) * WIDTH * HEIGHT)  # fmt: skip
    names = tuple(f"{view}.png" for view in range(number))
    many = replace(
        scene,
        cameras=cameras,
        images=images,
        image_names=names,
        train_indices=tuple(range(number)),
        test_indices=(),
    )
    points = np.random.default_rng(0).normal(size=(100000, 3))
    found = replace(inspection, scene=many, points=points, point_colors=np.zeros((100000, 3), np.uint8))
    assert len(viewer_page(found)) < 10e6
    assert len(inspection_mesh(found).vertices) < 4 * 20000 + 300 * 100 + 5000


def test_a_folder_that_cannot_be_written_is_named(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ExportError, match="taken"):
        inspect_scene(scene, tmp_path / "taken")


def test_a_single_plain_view_can_be_drawn(scene: Scene, tmp_path: Path) -> None:
    cameras = replace(scene.cameras[:1], c2w=scene.cameras.c2w[:1], intrinsics=scene.cameras.intrinsics[:1])
    images = ImageStack.from_images([np.full((HEIGHT, WIDTH, 3), 90, np.uint8)])
    single = replace(
        scene, cameras=cameras, images=images, image_names=("0.png",), train_indices=(0,), test_indices=()
    )
    paths = inspect_scene(single, tmp_path)
    assert all(path.stat().st_size > 0 for path in paths)
    assert any("not enough matches" in warning for warning in inspect(single).warnings)
