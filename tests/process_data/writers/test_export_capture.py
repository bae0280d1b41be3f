"""Writing captures: what the files say by themselves, and that our loaders read the same rays back."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
import torch
import trimesh
from jaxtyping import Float64
from PIL import Image

from process_data.cameras import RayGenerator
from process_data.formats.blender import BlenderConfig, load_blender
from process_data.formats.colmap import ColmapConfig, load_colmap
from process_data.formats.dtu import DTUConfig, load_dtu
from process_data.formats.transforms import TransformsConfig, load_transforms
from process_data.views import View
from process_data.writers import write_capture
from process_data.writers.resample import find_window, lost_share, pinhole_view, resample
from process_data.writers.views import scale_lens, with_two_focals, world_views
from utils.errors import ExportError
from utils.lens import lens_rays, project_to_lens
from utils.types import Cameras, ImageStack, Lens, Scene, SparsePoints

NUM_VIEWS = 5
WIDTH, HEIGHT = 48, 36
RADIUS = 2.5
DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

LENSES = {
    "SIMPLE_RADIAL": Lens("SIMPLE_RADIAL", (45.0, 24.6, 17.5, -0.12), (WIDTH, HEIGHT)),
    "OPENCV": Lens("OPENCV", (45.0, 44.0, 24.6, 17.5, -0.1, 0.03, 0.002, -0.003), (WIDTH, HEIGHT)),
    "OPENCV_FISHEYE": Lens(
        "OPENCV_FISHEYE", (30.0, 31.0, 24.4, 17.7, 0.02, -0.01, 0.0, 0.0), (WIDTH, HEIGHT)
    ),
}


def similarity() -> Float64[np.ndarray, "4 4"]:
    turn = pycolmap.Rotation3d(np.array([0.3, -0.5, 0.8])).matrix()
    matrix = np.eye(4)
    matrix[:3, :3] = RADIUS * turn
    matrix[:3, 3] = (10.0, -20.0, 5.0)
    return matrix


def poses(num_views: int) -> Float64[np.ndarray, "N 3 4"]:
    """Cameras on a circle of radius 3 in scene space, rolled a little, looking near the origin."""
    made = []
    for index in range(num_views):
        angle = 2 * np.pi * index / num_views
        center = np.array([3 * np.cos(angle), 3 * np.sin(angle), 0.4 + 0.1 * index])
        forward = -center / np.linalg.norm(center) + np.array([0.02, 0.01, 0.0]) * index
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0.1, 0.05 * index, 1.0])
        right /= np.linalg.norm(right)
        made.append(np.stack([right, np.cross(forward, right), forward, center], axis=1))
    return np.stack(made)


def colour(directions: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 3"]:
    """A smooth panorama in world directions, 0..255."""
    return 127.5 + 110.0 * np.sin(
        directions @ np.array([[3.0, 1.0, 0.5], [-1.0, 3.0, 2.0], [1.0, -2.0, 3.0]])
    )


def is_object(directions: Float64[np.ndarray, "P 3"], c2w: Float64[np.ndarray, "3 4"]) -> np.ndarray:
    """Foreground: directions less than 0.3 from the optical axis."""
    return np.linalg.norm(directions - c2w[:, 2], axis=1) < 0.3


def grid_pixels(size: tuple[int, int]) -> Float64[np.ndarray, "P 2"]:
    u, v = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    return np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 2)


def world_rays(
    scene: Scene, index: int, pixels: Float64[np.ndarray, "P 2"]
) -> tuple[Float64[np.ndarray, " 3"], Float64[np.ndarray, "P 3"]]:
    """Camera centre and unit directions in the world, worked out from the scene in float64."""
    matrix = scene.world_from_scene.numpy()
    c2w = scene.cameras.c2w[index].double().numpy()
    if scene.cameras.lenses:
        lens = scene.cameras.lenses[index]
        rays = lens_rays(lens, pixels * np.array(lens.size) / scene.cameras.size[index].numpy())
    else:
        inverse = np.linalg.inv(scene.cameras.intrinsics[index].double().numpy())
        rays = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1) @ inverse.T
    directions = rays @ (matrix[:3, :3] @ c2w[:, :3]).T
    return matrix[:3, :3] @ c2w[:, 3] + matrix[:3, 3], directions / np.linalg.norm(
        directions, axis=1, keepdims=True
    )


def make_scene(cameras: Cameras, with_masks: bool = True, test: tuple[int, ...] = (1, 3)) -> Scene:
    """Photographs of the panorama, and 40 points in the unit sphere that every view sees."""
    n = len(cameras)
    matrix = torch.from_numpy(similarity())
    blank = [np.zeros((h, w, 3), np.uint8) for w, h in cameras.size.tolist()]
    positions = np.random.default_rng(0).uniform(-0.25, 0.25, (40, 3))
    pairs = np.array([(point, view) for point in range(40) for view in range(n) if (point + view) % 3])
    bare = Scene(
        name="test",
        cameras=cameras,
        images=ImageStack.from_images(blank),
        image_names=tuple(f"IMG {index}.v2.JPG" for index in range(n)),
        train_indices=tuple(index for index in range(n) if index not in test),
        test_indices=test,
        world_from_scene=matrix,
        points=SparsePoints(
            positions,
            np.random.default_rng(1).integers(0, 256, (40, 3)).astype(np.uint8),
            np.where(np.arange(40) % 4 == 0, np.nan, 0.3 + 0.01 * np.arange(40)),
            pairs,
        ),
    )
    images, masks = [], []
    for index, (width, height) in enumerate(cameras.size.tolist()):
        _, directions = world_rays(bare, index, grid_pixels((width, height)))
        images.append(np.round(colour(directions)).astype(np.uint8).reshape(height, width, 3))
        c2w = world_views(bare)[index].c2w
        masks.append((is_object(directions, c2w) * 255).astype(np.uint8).reshape(height, width, 1))
    return replace(
        bare,
        images=ImageStack.from_images(images),
        masks=ImageStack.from_images(masks) if with_masks else None,
    )


def pinholes(skew: float = 0.0, is_shared: bool = False) -> Cameras:
    """Unequal focal lengths, off-centre principal points and two sizes; or one centred camera for all."""
    c2w = torch.from_numpy(poses(NUM_VIEWS)).float()
    sizes, intrinsics = [], []
    for index in range(NUM_VIEWS):
        scale = 1.0 if is_shared or index % 2 == 0 else 0.5
        k = np.array([[50.0, skew, 22.3], [0.0, 48.0, 19.1], [0.0, 0.0, 1.0]])
        if is_shared:
            k = np.array([[50.0, 0.0, WIDTH / 2], [0.0, 50.0, HEIGHT / 2], [0.0, 0.0, 1.0]])
        intrinsics.append(np.diag([scale, scale, 1.0]) @ k)
        sizes.append([int(WIDTH * scale), int(HEIGHT * scale)])
    return Cameras(
        c2w, torch.from_numpy(np.stack(intrinsics)).float(), torch.tensor(sizes, dtype=torch.int64)
    )


def lens_cameras(lens: Lens, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Cameras:
    c2w = torch.from_numpy(poses(NUM_VIEWS)).float()
    intrinsics = torch.eye(3).repeat(NUM_VIEWS, 1, 1)
    return Cameras(c2w, intrinsics, torch.tensor([size] * NUM_VIEWS, dtype=torch.int64), (lens,) * NUM_VIEWS)


CONFIGS: dict[str, tuple[Any, Callable[[Any], Scene]]] = {
    "neus": (DTUConfig, load_dtu),
    "blender": (BlenderConfig, load_blender),
    "transforms": (TransformsConfig, load_transforms),
    "colmap": (ColmapConfig, load_colmap),
}


def read(kind: str, folder: Path, **options: Any) -> Scene:
    config, load = CONFIGS[kind]
    options = {"apply_mask": True} | options
    if kind != "neus":
        options |= {"region_center": [10.0, -20.0, 5.0], "region_radius": RADIUS}
    return load(config(root_dir=str(folder), **options))


def order_of(back: Scene, scene: Scene, kind: str) -> list[int]:
    """Which view of ``scene`` each view of ``back`` is."""
    if kind == "neus":
        return [int(Path(name).stem) for name in back.image_names]
    stems = [Path(name).stem for name in scene.image_names]
    return [
        stems.index(Path(name).stem.removeprefix("train_").removeprefix("test_")) for name in back.image_names
    ]


def assert_same_rays(back: Scene, scene: Scene, kind: str, tolerance: float = 1e-5) -> None:
    """Rays through a grid of pixels agree in the world to ``tolerance`` of the distance."""
    assert len(back.cameras) == len(scene.cameras)
    for ours, index in enumerate(order_of(back, scene, kind)):
        assert back.cameras.size[ours].tolist() == scene.cameras.size[index].tolist()
        pixels = grid_pixels(tuple(scene.cameras.size[index].tolist()))[::7]
        (center, rays), (true_center, true_rays) = (
            world_rays(back, ours, pixels),
            world_rays(scene, index, pixels),
        )
        np.testing.assert_allclose(center, true_center, atol=tolerance * RADIUS)
        np.testing.assert_allclose(rays, true_rays, atol=tolerance)
        # What training casts: float32, lenses tabulated to a two-hundredth of a pixel.
        cast = RayGenerator.from_cameras(back.cameras).rays(
            torch.full((len(pixels),), ours), torch.from_numpy(pixels).float()
        )
        turn = back.world_from_scene[:3, :3].numpy() / np.cbrt(np.linalg.det(back.world_from_scene[:3, :3]))
        np.testing.assert_allclose(cast.directions.double().numpy() @ turn.T, true_rays, atol=3e-4)


def assert_same_content(back: Scene, scene: Scene, kind: str) -> None:
    """Pixels, masks and, where the format holds it, the split are equal."""
    order = order_of(back, scene, kind)
    for ours, index in enumerate(order):
        assert torch.equal(back.images.image(ours), scene.images.image(index))
        assert back.masks is not None
        assert scene.masks is not None
        assert torch.equal(back.masks.image(ours), scene.masks.image(index))
    if kind in ("blender", "transforms"):
        assert {order[index] for index in back.test_indices} == set(scene.test_indices)
        assert {order[index] for index in back.train_indices} == set(scene.train_indices)


def assert_same_points(back: Scene, scene: Scene, order: list[int]) -> None:
    assert back.points is not None
    assert scene.points is not None
    for axis, positions in zip(back.points.positions, scene.points.positions, strict=True):
        ours = back.world_from_scene.numpy() @ [*axis, 1.0]
        np.testing.assert_allclose(ours, scene.world_from_scene.numpy() @ [*positions, 1.0], atol=1e-9)
    np.testing.assert_array_equal(back.points.colors, scene.points.colors)
    if len(back.points.observations):
        np.testing.assert_allclose(back.points.errors, scene.points.errors)
        seen = {(point, order[view]) for point, view in back.points.observations.tolist()}
        assert seen == {tuple(pair) for pair in scene.points.observations.tolist()}


# ------------------------------------------------------------------------------------ what the files say


def test_neus_matrices_project_as_neus_does(tmp_path: Path) -> None:
    scene = make_scene(pinholes(skew=1.5))
    written = write_capture(scene, tmp_path / "new" / "capture", "neus")
    folder = tmp_path / "new" / "capture"
    assert all(path.is_file() for path in written)
    assert {path.relative_to(folder) for path in folder.rglob("*.*")} == {
        p.relative_to(folder) for p in written
    }
    matrices = np.load(folder / "cameras_sphere.npz")
    assert scene.points is not None
    world = np.concatenate([scene.points.positions, np.ones((40, 1))], axis=1) @ similarity().T
    for index in range(NUM_VIEWS):
        # NeuS exports its mesh as vertices * scale_mat[0, 0] + scale_mat[:3, 3].
        scale_mat = matrices[f"scale_mat_{index}"]
        np.testing.assert_array_equal(scale_mat[:3, :3], scale_mat[0, 0] * np.eye(3))
        np.testing.assert_array_equal(scale_mat[:3, 3], similarity()[:3, 3])
        assert scale_mat[0, 0] == pytest.approx(np.cbrt(np.linalg.det(similarity()[:3, :3])))
        seen = world @ matrices[f"world_mat_{index}"].T
        c2w = scene.cameras.c2w[index].double().numpy()
        in_camera = (scene.points.positions - c2w[:, 3]) @ c2w[:, :3]
        expected = in_camera / in_camera[:, 2:] @ scene.cameras.intrinsics[index].double().numpy().T
        np.testing.assert_allclose(seen[:, :2] / seen[:, 2:3], expected[:, :2] - 0.5, atol=1e-4)
        picture = np.asarray(Image.open(folder / "image" / f"{index:06d}.png"))
        np.testing.assert_array_equal(picture, scene.images.image(index).numpy())
        mask = np.asarray(Image.open(folder / "mask" / f"{index:06d}.png"))
        assert scene.masks is not None
        np.testing.assert_array_equal(mask, scene.masks.image(index)[..., 0].numpy())


def test_blender_frames_are_opengl_poses(tmp_path: Path) -> None:
    scene = make_scene(pinholes(is_shared=True))
    write_capture(scene, tmp_path, "blender")
    train = json.loads((tmp_path / "transforms_train.json").read_text())
    test = json.loads((tmp_path / "transforms_test.json").read_text())
    assert [frame["file_path"] for frame in test["frames"]] == ["./test/IMG 1.v2", "./test/IMG 3.v2"]
    assert len(train["frames"]) == 3
    assert np.tan(train["camera_angle_x"] / 2) == pytest.approx(WIDTH / 2 / 50.0, rel=1e-6)
    # The camera looks along -z of its matrix, and +y of it points up in the picture.
    matrix = np.array(train["frames"][1]["transform_matrix"])
    center, axis = world_rays(scene, 2, np.array([[WIDTH / 2, HEIGHT / 2]]))
    _, upper = world_rays(scene, 2, np.array([[WIDTH / 2, 0.0]]))
    np.testing.assert_allclose(matrix[:3, 3], center, atol=1e-5)
    np.testing.assert_allclose(-matrix[:3, 2], axis[0], atol=1e-6)
    assert upper[0] @ matrix[:3, 1] > 0.3
    rgba = np.asarray(Image.open(tmp_path / "train" / "IMG 2.v2.png"))
    np.testing.assert_array_equal(rgba[..., :3], scene.images.image(2).numpy())
    assert scene.masks is not None
    np.testing.assert_array_equal(rgba[..., 3:], scene.masks.image(2).numpy())


@pytest.mark.parametrize("model", LENSES)
def test_transforms_name_the_lens_as_nerfstudio_does(model: str, tmp_path: Path) -> None:
    scene = make_scene(lens_cameras(LENSES[model]))
    write_capture(scene, tmp_path, "transforms")
    content = json.loads((tmp_path / "transforms.json").read_text())
    fisheye = model == "OPENCV_FISHEYE"
    assert content["camera_model"] == ("OPENCV_FISHEYE" if fisheye else "OPENCV")
    assert content.get("is_fisheye", False) == fisheye
    assert (content["w"], content["h"]) == (WIDTH, HEIGHT)
    assert content["test_filenames"] == content["val_filenames"]
    assert content["test_filenames"] == ["images/IMG 1.v2.png", "images/IMG 3.v2.png"]
    assert len(content["train_filenames"]) == 3
    assert content["frames"][0]["mask_path"] == "masks/IMG 0.v2.png"
    # OpenCV's own formulas, written out.
    frame = content["frames"][2]
    matrix = np.array(frame["transform_matrix"])
    assert scene.points is not None
    homogeneous = np.concatenate([scene.points.positions, np.ones((40, 1))], axis=1)
    world = (homogeneous @ similarity().T)[:, :3]
    x, y, z = ((world - matrix[:3, 3]) @ matrix[:3, :3] @ np.diag([1.0, -1.0, -1.0])).T
    assert (z > 0).all()
    x, y = x / z, y / z
    r = np.hypot(x, y)
    if fisheye:
        theta = np.arctan(r)
        k1, k2, k3, k4 = (content[f"k{i}"] for i in (1, 2, 3, 4))
        factor = theta * (1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8) / r
        x, y = x * factor, y * factor
    else:
        k1, k2, p1, p2 = (content[key] for key in ("k1", "k2", "p1", "p2"))
        radial = 1 + k1 * r**2 + k2 * r**4
        x, y = (
            x * radial + 2 * p1 * x * y + p2 * (r**2 + 2 * x**2),
            y * radial + p1 * (r**2 + 2 * y**2) + 2 * p2 * x * y,
        )
    seen = np.stack([content["fl_x"] * x + content["cx"], content["fl_y"] * y + content["cy"]], axis=1)
    c2w = scene.cameras.c2w[2].double().numpy()
    expected = project_to_lens(LENSES[model], (scene.points.positions - c2w[:, 3]) @ c2w[:, :3])
    np.testing.assert_allclose(seen, expected, atol=1e-4)


def test_transforms_points_are_a_ply_in_the_world(tmp_path: Path) -> None:
    scene = make_scene(pinholes())
    write_capture(scene, tmp_path, "transforms")
    content = json.loads((tmp_path / "transforms.json").read_text())
    assert content["camera_model"] == "PINHOLE"
    assert "fl_x" not in content
    assert content["frames"][1]["w"] == WIDTH // 2
    cloud = trimesh.load(tmp_path / content["ply_file_path"])
    assert scene.points is not None
    homogeneous = np.concatenate([scene.points.positions, np.ones((40, 1))], axis=1)
    np.testing.assert_allclose(cloud.vertices, (homogeneous @ similarity().T)[:, :3], atol=1e-12)
    np.testing.assert_array_equal(cloud.colors[:, :3], scene.points.colors)


@pytest.mark.parametrize("model", [*LENSES, "PINHOLE"])
def test_colmap_reprojects(model: str, tmp_path: Path) -> None:
    scene = make_scene(pinholes() if model == "PINHOLE" else lens_cameras(LENSES[model]))
    write_capture(scene, tmp_path, "colmap")
    found = pycolmap.Reconstruction(tmp_path / "sparse" / "0")
    assert found.is_valid()
    assert found.num_reg_images() == NUM_VIEWS
    assert found.num_cameras() == found.num_rigs() == (2 if model == "PINHOLE" else 1)
    assert {camera.model.name for camera in found.cameras.values()} == {model}
    assert scene.points is not None
    assert found.num_points3D() == 40
    assert found.compute_num_observations() == len(scene.points.observations)
    for image in found.images.values():
        assert (tmp_path / "images" / image.name).is_file()
        assert (tmp_path / "masks" / image.name).is_file()
        assert image.num_points3D == image.num_points2D() > 20
        for point in image.points2D:
            seen = image.project_point(found.point3D(point.point3D_id).xyz)
            np.testing.assert_allclose(seen, point.xy, atol=1e-6)
    errors = np.array([found.point3D(i).error for i in sorted(found.point3D_ids())])
    np.testing.assert_allclose(errors[1], 0.31)
    assert errors[0] == -1.0
    # An independent look at one projection: the scene's own camera.
    index = next(i for i, image in found.images.items() if image.name == "IMG 2.v2.png")
    center, _ = world_rays(scene, 2, np.array([[0.5, 0.5]]))
    np.testing.assert_allclose(found.image(index).projection_center(), center, atol=1e-5)


# --------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", ["neus", "transforms", "colmap"])
def test_pinholes_come_back(kind: str, tmp_path: Path) -> None:
    scene = make_scene(pinholes(skew=1.5 if kind == "neus" else 0.0))
    write_capture(scene, tmp_path / "a", kind)  # type: ignore[arg-type]
    back = read(kind, tmp_path / "a")
    assert_same_rays(back, scene, kind, 2e-6)
    assert_same_content(back, scene, kind)
    order = order_of(back, scene, kind)
    torch.testing.assert_close(back.cameras.intrinsics, scene.cameras.intrinsics[order], rtol=2e-6, atol=2e-5)
    if kind != "neus":
        assert_same_points(back, scene, order)


def test_one_centred_pinhole_comes_back_from_blender(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = make_scene(pinholes(is_shared=True))
    with caplog.at_level(logging.INFO):
        write_capture(scene, tmp_path, "blender")
    assert "resampled" not in caplog.text
    assert "dataset.region_center=[10,-20,5] dataset.region_radius=2.5" in caplog.text
    back = read("blender", tmp_path)
    assert_same_rays(back, scene, "blender", 2e-6)
    assert_same_content(back, scene, "blender")


@pytest.mark.parametrize("kind", ["transforms", "colmap"])
@pytest.mark.parametrize("model", LENSES)
@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (24, 18), (32, 37)])
def test_lenses_come_back(kind: str, model: str, size: tuple[int, int], tmp_path: Path) -> None:
    scene = make_scene(lens_cameras(LENSES[model], size))
    write_capture(scene, tmp_path, kind)  # type: ignore[arg-type]
    back = read(kind, tmp_path)
    assert_same_rays(back, scene, kind, 2e-6)
    assert_same_content(back, scene, kind)
    assert_same_points(back, scene, order_of(back, scene, kind))


def assert_shows_the_same_world(back: Scene, margin: float) -> None:
    """Every pixel has the colour, and the mask, of the direction that its ray goes."""
    assert back.masks is not None
    for index in range(len(back.cameras)):
        size = tuple(back.cameras.size[index].tolist())
        _, directions = world_rays(back, index, grid_pixels(size))
        shown = back.images.image(index).reshape(-1, 3).double().numpy()
        np.testing.assert_allclose(shown, colour(directions), atol=margin)
        mask = back.masks.image(index).reshape(-1).numpy() >= 128
        # Axis of the photograph, which resampling keeps.
        wrong = mask != is_object(directions, world_views(back)[index].c2w)
        assert wrong.mean() < 0.05
        assert 0.05 < mask.mean() < 0.9


@pytest.mark.parametrize("kind", ["neus", "blender"])
@pytest.mark.parametrize("model", LENSES)
def test_lenses_are_resampled_for_pinhole_formats(
    kind: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = make_scene(lens_cameras(LENSES[model]))
    with caplog.at_level(logging.INFO):
        write_capture(scene, tmp_path, kind)  # type: ignore[arg-type]
    assert "5 of 5 pictures: these are resampled to pinholes (the first from 48x36" in caplog.text
    back = read(kind, tmp_path)
    assert not back.cameras.lenses
    # Eight bits, cv2.remap's grid of 1/32 pixel, and the outermost pixels, which have no neighbours outside.
    assert_shows_the_same_world(back, 4.0)
    for ours, index in enumerate(order_of(back, scene, kind)):
        center, _ = world_rays(scene, index, np.array([[1.0, 1.0]]))
        np.testing.assert_allclose(world_rays(back, ours, np.array([[1.0, 1.0]]))[0], center, atol=1e-5)
    if kind == "blender":
        assert len(torch.unique(back.cameras.size, dim=0)) == 1


@pytest.mark.parametrize("kind", ["blender", "transforms", "colmap"])
def test_skew_and_sizes_are_resampled_where_they_must(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = make_scene(pinholes(skew=4.0))
    with caplog.at_level(logging.INFO):
        write_capture(scene, tmp_path, kind)  # type: ignore[arg-type]
    assert "are resampled to pinholes" in caplog.text
    # Blender's format has one size: the small pictures are enlarged, their detail is that of 24 pixels.
    assert_shows_the_same_world(read(kind, tmp_path), 4.0)


def test_chain_returns_to_the_same_rays(tmp_path: Path) -> None:
    scene = make_scene(pinholes())
    here = scene
    for number, kind in enumerate(("neus", "colmap", "transforms", "neus")):
        write_capture(here, tmp_path / str(number), kind)  # type: ignore[arg-type]
        here = read(kind, tmp_path / str(number))
    assert_same_rays(here, scene, "neus", 5e-6)
    assert_same_content(here, scene, "neus")


def test_region_comes_back_from_transforms(tmp_path: Path) -> None:
    write_capture(make_scene(pinholes()), tmp_path, "transforms")
    back = load_transforms(TransformsConfig(root_dir=str(tmp_path)))
    np.testing.assert_allclose(back.world_from_scene[:3, 3], similarity()[:3, 3], atol=1e-9)
    assert np.cbrt(np.linalg.det(back.world_from_scene[:3, :3])) == pytest.approx(RADIUS)


# -------------------------------------------------------------------------------------- lenses and windows


@pytest.mark.parametrize("model", [name for name in pycolmap.CameraModelId.__members__ if name != "INVALID"])
@pytest.mark.parametrize("size", [(24, 18), (37, 32)])
def test_scaled_lenses_see_the_same(model: str, size: tuple[int, int]) -> None:
    camera = pycolmap.Camera.create_from_model_name(1, model, 40.0, WIDTH, HEIGHT)
    params = np.array(camera.params)
    params[camera.extra_params_idxs()] += 0.01
    lens = Lens(model, tuple(params.tolist()), (WIDTH, HEIGHT))
    pixels = grid_pixels((WIDTH, HEIGHT))[::17]
    factor = np.array(size) / np.array([WIDTH, HEIGHT])
    scaled = scale_lens(lens, size)
    assert scaled.size == size
    np.testing.assert_allclose(lens_rays(scaled, pixels * factor), lens_rays(lens, pixels), atol=1e-9)
    np.testing.assert_allclose(lens_rays(with_two_focals(lens), pixels), lens_rays(lens, pixels), atol=1e-9)


def view_of(lens: Lens) -> View:
    return View(Path("a.png"), poses(1)[0], np.eye(3), lens.size, lens)


@pytest.mark.parametrize("k", [-0.2, 0.2])
def test_window_is_all_seen_and_touches_the_border(k: float) -> None:
    lens = Lens("SIMPLE_RADIAL", (300.0, 205.0, 145.0, k), (400, 300))
    view = view_of(lens)
    window = find_window(view)
    border = np.array(
        [
            (window.left + s * (window.right - window.left), y, 1.0)
            for s in np.linspace(0, 1, 50)
            for y in (window.top, window.bottom)
        ]
        + [
            (x, window.top + s * (window.bottom - window.top), 1.0)
            for s in np.linspace(0, 1, 50)
            for x in (window.left, window.right)
        ]
    )
    seen = project_to_lens(lens, border)
    assert (seen >= -0.01).all()
    assert (seen <= np.array([400, 300]) + 0.01).all()
    # Some of it lies on the photograph's border: a larger rectangle would not fit.
    assert np.minimum(seen, np.array([400, 300]) - seen).min() < 0.1
    target = pinhole_view(view)
    assert target.intrinsics[0, 0] == pytest.approx(300.0)
    assert 0.0 < lost_share(view, target) < 0.25


def test_fold_of_the_polynomial_is_left_out() -> None:
    # r (1 - 0.4 r^2) turns back at r = 0.91, which is pixel 50 + 0.61 * 60 = 87 of 100.
    lens = Lens("SIMPLE_RADIAL", (60.0, 50.0, 50.0, -0.4), (100, 100))
    window = find_window(view_of(lens))
    assert np.hypot(window.right, window.bottom) < 0.915
    assert window.right > 0.5


def test_circular_fisheye_is_cut_inside_its_circle() -> None:
    lens = Lens("OPENCV_FISHEYE", (44.0, 44.0, 50.0, 50.0, 0.0, 0.0, 0.0, 0.0), (100, 100))
    # The sides are at 65 degrees, the corners at 92, where a pinhole sees nothing.
    target = pinhole_view(view_of(lens))
    corner = np.linalg.inv(target.intrinsics) @ [0.0, 0.0, 1.0]
    seen = project_to_lens(lens, corner[None])
    assert (seen > -0.01).all()
    assert (seen < 15).all()


def test_shrinking_averages_and_identity_changes_nothing() -> None:
    view = View(Path("a.png"), poses(1)[0], np.array([[50.0, 0, 24], [0, 50, 18], [0, 0, 1]]), (48, 36))
    checks = np.where((np.arange(36)[:, None] + np.arange(48)) % 2, 255, 0).astype(np.uint8)[..., None]
    assert np.array_equal(resample(checks, view, view, is_mask=False), checks)
    third = replace(view, intrinsics=np.array([[50 / 3, 0, 8.0], [0, 50 / 3, 6], [0, 0, 1]]), size=(16, 12))
    small = resample(checks.repeat(3, axis=2), view, third, is_mask=False)
    assert small.shape == (12, 16, 3)
    # Nine of the fine squares, four or five of them white; one read place would give 0 or 255.
    assert 100 < small.min() <= small.max() < 155


@pytest.mark.parametrize("kind", ["neus", "blender"])
def test_too_wide_lenses_are_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    lens = Lens("OPENCV_FISHEYE", (17.0, 17.0, 24.0, 18.0, 0.0, 0.0, 0.0, 0.0), (WIDTH, HEIGHT))
    with pytest.raises(
        ExportError, match=r"spans 16\d degrees, too wide for a pinhole; use --convert colmap"
    ):
        write_capture(make_scene(lens_cameras(lens)), tmp_path / "a", kind)  # type: ignore[arg-type]
    assert not any((tmp_path / "a").iterdir())
    panorama = Lens("EQUIRECTANGULAR", (48.0, 36.0), (WIDTH, HEIGHT))
    with pytest.raises(ExportError, match="spans 360 degrees"):
        write_capture(make_scene(lens_cameras(panorama)), tmp_path / "b", kind)  # type: ignore[arg-type]


def test_lenses_that_transforms_do_not_know(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cameras = lens_cameras(Lens("FOV", (45.0, 44.0, 24.6, 17.5, 0.5), (WIDTH, HEIGHT)))
    with caplog.at_level(logging.INFO):
        write_capture(make_scene(cameras), tmp_path / "fov", "transforms")
    assert "transforms.json cannot describe the cameras of 5 of 5 pictures" in caplog.text
    assert_shows_the_same_world(read("transforms", tmp_path / "fov"), 4.0)
    # One file has one model: the fisheye pictures among others are resampled.
    mixed = (LENSES["OPENCV_FISHEYE"],) * 2 + (LENSES["OPENCV"],) * 3
    with caplog.at_level(logging.INFO):
        write_capture(make_scene(replace(cameras, lenses=mixed)), tmp_path / "mixed", "transforms")
    assert "cannot describe the cameras of 2 of 5 pictures" in caplog.text
    assert_shows_the_same_world(read("transforms", tmp_path / "mixed"), 4.0)


# -------------------------------------------------------------------------------------- folders and names


def test_folder_is_checked(tmp_path: Path) -> None:
    scene = make_scene(pinholes())
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="file: is a file, not a folder; "):
        write_capture(scene, tmp_path / "file", "neus")
    with pytest.raises(ExportError, match=r"cannot be written \(Not a directory\)"):
        write_capture(scene, tmp_path / "file" / "below", "neus")
    with pytest.raises(ExportError, match="is not empty; choose a new folder"):
        write_capture(scene, tmp_path, "colmap")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_that_clash_are_numbered(tmp_path: Path) -> None:
    names = ("a.jpg", "A.png", "b.png", "c.png", "d.png")
    write_capture(replace(make_scene(pinholes()), image_names=names), tmp_path, "colmap")
    found = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert found == ["000000_a.png", "000001_A.png", "000002_b.png", "000003_c.png", "000004_d.png"]


def test_keys_bring_back_the_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("9.jpg", "10.jpg", "1.jpg", "2.jpg", "3.jpg")
    scene = replace(make_scene(pinholes()), image_names=names)
    with caplog.at_level(logging.INFO):
        write_capture(scene, tmp_path / "colmap", "colmap")
    assert "dataset.holdout=[1,4]" in caplog.text
    back = read("colmap", tmp_path / "colmap", holdout=[1, 4])
    assert {back.image_names[index] for index in back.test_indices} == {"10.png", "2.png"}


def test_without_masks_points_and_test_views(tmp_path: Path) -> None:
    scene = replace(make_scene(pinholes(is_shared=True), with_masks=False, test=()), points=None)
    for kind in CONFIGS:
        write_capture(scene, tmp_path / kind, kind)  # type: ignore[arg-type]
        back = read(kind, tmp_path / kind, apply_mask=False)
        assert_same_rays(back, scene, kind, 2e-6)
        assert back.points is None
        assert back.test_indices == ()
    assert Image.open(tmp_path / "blender" / "train" / "IMG 0.v2.png").mode == "RGB"
    assert not (tmp_path / "blender" / "transforms_test.json").exists()
    assert not (tmp_path / "transforms" / "sparse_pc.ply").exists()


# -------------------------------------------------------------------------------------- real captures


@pytest.mark.skipif(
    not (DATA / "dtu_scan65").exists(), reason="no shared/data/dtu_scan65 beside the repository"
)
def test_real_capture_comes_back(tmp_path: Path) -> None:
    scene = load_dtu(
        DTUConfig(root_dir=str(DATA / "dtu_scan65"), img_downscale=16, apply_mask=True, holdout=8)
    )
    for kind in ("transforms", "colmap", "neus"):
        write_capture(scene, tmp_path / kind, kind)  # type: ignore[arg-type]
        back = read(kind, tmp_path / kind)
        assert_same_rays(back, scene, kind, 1e-5)
        assert_same_content(back, scene, kind)
