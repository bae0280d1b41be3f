"""transforms.json: what our rays meet is what OpenCV projects there, and bad files get one line."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from process_data.cameras import rays_from_pixels
from process_data.formats.transforms import TransformsConfig, load_transforms
from utils.errors import ConfigError, DataError, UserError
from utils.types import Scene

FOX = Path(__file__).resolve().parents[4] / "shared" / "data" / "fox"
WIDTH, HEIGHT = 101, 77
"""Odd, so that halves and thirds round."""
PINHOLE = {"fl_x": 90.0, "fl_y": 95.0, "cx": 52.25, "cy": 36.75, "w": WIDTH, "h": HEIGHT}
OPENCV = {**PINHOLE, "camera_model": "OPENCV", "k1": -0.12, "k2": 0.03, "p1": 0.004, "p2": -0.003}
FISHEYE = {**PINHOLE, "camera_model": "OPENCV_FISHEYE", "k1": 0.05, "k2": -0.02, "k3": 0.006, "k4": -0.001}
NUM_VIEWS = 4
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def pose(index: int) -> np.ndarray:
    """(4, 4) camera to world, OpenCV axes: on a ring of radius 4, tilted, looking near the origin."""
    angle = 0.8 * index
    center = np.array([4 * np.cos(angle), 4 * np.sin(angle), 1.0 + 0.3 * index])
    forward = np.array([0.1, 0.05 * index, 0.0]) - center
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.1, 0.0, 1.0])
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.column_stack([right, np.cross(forward, right), forward, center])
    return matrix


@dataclass
class Files:
    """A small capture on disk that tests take apart."""

    root: Path
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.root / "transforms.json"

    @property
    def frames(self) -> list[dict[str, Any]]:
        return self.content["frames"]

    def camera(self, camera: dict[str, Any]) -> None:
        """Exchange the shared camera."""
        self.content = {"frames": self.frames, **camera}

    def load(self, **options: Any) -> Scene:
        """Write the file and load it, with the world's axes and origin unless ``options`` say otherwise."""
        self.path.write_text(json.dumps(self.content))
        placed: dict[str, Any] = {"region_center": [0.0, 0.0, 0.0], "region_radius": 2.0, "up": "none"}
        return load_transforms(TransformsConfig(**{"root_dir": str(self.root), **placed, **options}))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path / "scan", {**PINHOLE, "frames": []})
    (made.root / "images").mkdir(parents=True)
    for index in range(NUM_VIEWS):
        picture = np.full((HEIGHT, WIDTH, 3), 40 * index, np.uint8)
        Image.fromarray(picture).save(made.root / "images" / f"{index}.png")
        matrix = (pose(index) @ OPENGL).tolist()
        made.frames.append({"file_path": f"images/{index}.png", "transform_matrix": matrix})
    return made


def project(camera: dict[str, Any], c2w: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Continuous pixels by OpenCV's own functions, which put pixel centres at integers."""
    in_camera = (points - c2w[:3, 3]) @ c2w[:3, :3]
    matrix = np.array(
        [[camera["fl_x"], 0, camera["cx"] - 0.5], [0, camera["fl_y"], camera["cy"] - 0.5], [0, 0, 1.0]]
    )
    k1, k2, k3, k4, p1, p2 = (camera.get(key, 0.0) for key in ("k1", "k2", "k3", "k4", "p1", "p2"))
    zero = np.zeros(3)
    if "fisheye" in str(camera.get("camera_model", "")).lower() or camera.get("is_fisheye"):
        seen, _ = cv2.fisheye.projectPoints(
            in_camera[:, None], zero, zero, matrix, np.array([k1, k2, k3, k4])
        )
    else:
        seen, _ = cv2.projectPoints(in_camera, zero, zero, matrix, np.array([k1, k2, p1, p2, k3]))
    return seen.reshape(-1, 2) + 0.5


def ray_errors(scene: Scene, view: int, points: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Angles by which rays through full-size pixels miss world points, in pixels of a focal length of 95."""
    factor = scene.cameras.size[view].double().numpy() / [WIDTH, HEIGHT]
    index = torch.full((len(pixels),), view, dtype=torch.int64)
    rays = rays_from_pixels(scene.cameras, index, torch.from_numpy(pixels * factor).float())
    scene_from_world = np.linalg.inv(scene.world_from_scene.numpy())
    towards = points @ scene_from_world[:3, :3].T + scene_from_world[:3, 3] - rays.origins.double().numpy()
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    sines = np.linalg.norm(np.cross(towards, rays.directions.double().numpy()), axis=1)
    assert (np.sum(towards * rays.directions.double().numpy(), axis=1) > 0).all()
    return 95.0 * np.arcsin(np.clip(sines, 0, 1))


def assert_rays_meet_points(
    scene: Scene, cameras: list[dict[str, Any]], world_from_file: np.ndarray | None = None
) -> None:
    """Check that the ray at each point's pixel passes it, in every view and in all parts of the picture."""
    world_from_file = np.eye(4) if world_from_file is None else world_from_file
    points = np.random.default_rng(1).uniform(-2.2, 2.2, (600, 3))
    for view, camera in enumerate(cameras):
        pixels = project(camera, pose(view), points)
        inside = ((pixels > 0) & (pixels < [WIDTH, HEIGHT])).all(axis=1)
        assert inside.sum() > 100
        assert (np.ptp(pixels[inside], axis=0) > [0.9 * WIDTH, 0.8 * HEIGHT]).all()
        world = points[inside] @ world_from_file[:3, :3].T + world_from_file[:3, 3]
        assert ray_errors(scene, view, world, pixels[inside]).max() < 0.05


CAMERAS = {
    "pinhole": PINHOLE,
    "opencv": OPENCV,
    "k3": {**OPENCV, "k3": 0.02},
    "fisheye": FISHEYE,
    "ngp_fisheye": {**FISHEYE, "camera_model": None, "is_fisheye": True},
}


@pytest.mark.parametrize("downscale", [1, 2, 3])
@pytest.mark.parametrize("name", CAMERAS)
def test_rays_meet_what_opencv_projects(files: Files, name: str, downscale: int) -> None:
    files.camera(CAMERAS[name])
    scene = files.load(img_downscale=downscale)
    assert scene.cameras.size.tolist() == [[round(WIDTH / downscale), round(HEIGHT / downscale)]] * NUM_VIEWS
    assert bool(scene.cameras.lenses) == (name != "pinhole")
    assert_rays_meet_points(scene, [CAMERAS[name]] * NUM_VIEWS)


def test_a_frames_own_camera_goes_first(files: Files) -> None:
    files.content["k1"] = 0.3
    own = [OPENCV, {**PINHOLE, "fl_x": 80.0, "k1": 0.0}, FISHEYE, {"k2": -0.05}]
    for frame, camera in zip(files.frames, own, strict=True):
        frame.update(camera)
    scene = files.load()
    models = ["OPENCV", "PINHOLE", "OPENCV_FISHEYE", "OPENCV"]
    assert [lens.model for lens in scene.cameras.lenses] == models
    assert_rays_meet_points(scene, [{**PINHOLE, "k1": 0.3, **camera} for camera in own])


@pytest.mark.parametrize(
    "camera",
    [
        {"fl_x": 90.0},
        {"fl_y": 90.0},
        {"camera_angle_x": 2 * np.arctan(WIDTH / 2 / 90)},
        {"camera_angle_y": 2 * np.arctan(HEIGHT / 2 / 90), "w": float(WIDTH)},
        {"fl_x": 90.0, "camera_angle_x": 1.0, "h": None},
        {"fl_x": 180.0, "w": 2 * WIDTH, "h": 2 * HEIGHT, "camera_model": "SIMPLE_PINHOLE"},
    ],
)
def test_what_is_left_out_is_filled_in(files: Files, camera: dict[str, Any]) -> None:
    files.camera(camera)
    matrix = files.load().cameras.intrinsics[2]
    np.testing.assert_allclose(matrix, [[90, 0, WIDTH / 2], [0, 90, HEIGHT / 2], [0, 0, 1]], atol=1e-3)


def test_a_far_principal_point_with_a_size(files: Files) -> None:
    files.camera({**PINHOLE, "cx": 12.0, "cy": 70.0, "k5": 0.0, "s1": 0})
    matrix = files.load().cameras.intrinsics[2]
    np.testing.assert_allclose(matrix[:2, 2], [12.0, 70.0])


def test_frame_focal_goes_before_shared_one(files: Files) -> None:
    files.frames[1]["camera_angle_x"] = 2 * np.arctan(WIDTH / 2 / 70)
    focal = files.load().cameras.intrinsics[:, 0, 0].tolist()
    assert focal == pytest.approx([90, 70, 90, 90], rel=1e-5)


def test_panorama(files: Files) -> None:
    files.camera({"camera_model": "EQUIRECTANGULAR"})
    scene = files.load()
    # nerfstudio: the middle looks forward, a quarter of the width on looks to the right, the top looks up.
    pixels = torch.tensor([[0.5, 0.5], [0.75, 0.5], [0.5, 1e-6]]) * scene.cameras.size[1]
    rays = rays_from_pixels(scene.cameras, torch.ones(3, dtype=torch.int64), pixels)
    right, down, forward = pose(1)[:3, :3].T
    np.testing.assert_allclose(rays.directions.numpy(), [forward, right, -down], atol=1e-3)


@pytest.mark.parametrize("convention", ["opengl", "opencv"])
@pytest.mark.parametrize("poses", ["c2w", "w2c"])
def test_other_axes_and_directions(files: Files, convention: str, poses: str) -> None:
    for index, frame in enumerate(files.frames):
        matrix = pose(index) @ (OPENGL if convention == "opengl" else np.eye(4))
        frame["transform_matrix"] = (np.linalg.inv(matrix) if poses == "w2c" else matrix)[:3].tolist()
    assert_rays_meet_points(files.load(convention=convention, poses=poses), [PINHOLE] * NUM_VIEWS)


def hillside(index: int) -> np.ndarray:
    """(4, 4) camera to world, OpenCV axes: a few degrees apart, looking down at the origin."""
    angle = 0.13 * index
    center = np.array([4 * np.cos(angle), 4 * np.sin(angle), 2.5 + 0.3 * (index % 3)])
    forward = np.array([0.2 * (index % 2), 0.1, 0.0]) - center
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.1 * (index % 3), 0.0, 1.0])
    right /= np.linalg.norm(right)
    return np.vstack([np.column_stack([right, np.cross(forward, right), forward, center]), [0, 0, 0, 1.0]])


@pytest.fixture
def ground(files: Files) -> Files:
    """Pictures of a textured ground, so that features can be matched; poses are still to be written."""
    texture = np.random.default_rng(3).integers(0, 256, (90, 90, 3), np.uint8)
    texture = cv2.resize(texture, (1080, 1080), interpolation=cv2.INTER_CUBIC)
    ground_from_texture = np.array([[1 / 90, 0, -6], [0, 1 / 90, -6], [0, 0, 1.0]])
    intrinsics = np.array([[270.0, 0, 120], [0, 270.0, 90], [0, 0, 1]])
    files.camera({"fl_x": 270.0, "fl_y": 270.0, "cx": 120.0, "cy": 90.0, "w": 240, "h": 180})
    files.frames.clear()
    for index in range(7):
        camera_from_world = np.linalg.inv(hillside(index))
        # Points (x, y, 0) of the ground; warpPerspective has pixel centres at whole numbers.
        homography = intrinsics @ camera_from_world[:3, [0, 1, 3]] @ ground_from_texture
        centers = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1.0]])
        picture = cv2.warpPerspective(texture, centers @ homography, (240, 180), flags=cv2.INTER_AREA)
        Image.fromarray(picture).save(files.root / "images" / f"{index}.png")
        files.frames.append({"file_path": f"images/{index}.png"})
    return files


@pytest.mark.parametrize("convention", ["opengl", "opencv"])
@pytest.mark.parametrize("poses", ["c2w", "w2c"])
def test_photographs_show_the_convention(
    ground: Files, convention: str, poses: str, caplog: pytest.LogCaptureFixture
) -> None:
    for index, frame in enumerate(ground.frames):
        matrix = hillside(index) @ (OPENGL if convention == "opengl" else np.eye(4))
        frame["transform_matrix"] = (np.linalg.inv(matrix) if poses == "w2c" else matrix).tolist()
    with caplog.at_level(logging.INFO):
        scene = ground.load(convention="auto")
    assert "poses read as  rays that meet" in caplog.text
    c2w = np.stack([hillside(index)[:3] for index in range(7)])
    c2w[:, :, 3] /= 2.0
    np.testing.assert_allclose(scene.cameras.c2w, c2w, atol=1e-6)


def test_photographs_without_features_show_nothing(files: Files) -> None:
    with pytest.raises(
        DataError, match=r"transforms\.json: the convention .*; set dataset\.convention by hand"
    ):
        files.load(convention="auto")


def test_scaled_world_to_camera(files: Files) -> None:
    for index, frame in enumerate(files.frames):
        matrix = np.linalg.inv(pose(index) @ OPENGL)
        matrix[:3] *= 1.7
        frame["transform_matrix"] = matrix.tolist()
    assert_rays_meet_points(files.load(poses="w2c"), [PINHOLE] * NUM_VIEWS)


@pytest.mark.parametrize("rows", [3, 4])
def test_applied_transform_and_scale_are_undone(files: Files, rows: int) -> None:
    # nerfstudio's turn from COLMAP's axes, with a shift and its scale on top.
    applied = np.array([[0.0, 0, 1, 0.5], [1, 0, 0, -1], [0, 1, 0, 2], [0, 0, 0, 1]])
    files.content.update(applied_transform=applied[:rows].tolist(), applied_scale=0.25)
    in_file = np.array([[1.0, 0, 0], [0, 2, 0], [np.nan, 0, 0], [0, 0, 3]])
    colors = np.array([[255, 0, 0], [0, 255, 0], [9, 9, 9], [0, 0, 255]], np.uint8)
    trimesh.PointCloud(in_file, colors).export(files.root / "sparse_pc.ply")
    files.content["ply_file_path"] = "sparse_pc.ply"
    scene = files.load(region_center=[10.0, 0.0, 0.0], region_radius=20.0)
    world_from_file = np.linalg.inv(applied) @ np.diag([4.0, 4.0, 4.0, 1.0])
    assert_rays_meet_points(scene, [PINHOLE] * NUM_VIEWS, world_from_file)
    assert scene.points is not None
    expected = in_file[[0, 1, 3]] @ world_from_file[:3, :3].T + world_from_file[:3, 3]
    np.testing.assert_allclose(scene.points.positions * 20 + [10, 0, 0], expected, atol=1e-4)
    assert scene.points.colors.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert np.isnan(scene.points.errors).all()
    assert scene.points.observations.shape == (0, 2)


# ----------------------------------------------------------------------------------------------------------
# region


def given(files: Files, **options: Any) -> tuple[np.ndarray, float]:
    """Centre and radius of the region, as the format gives it."""
    scene = files.load(**{"region": "given", "region_center": None, "region_radius": None, **options})
    matrix = scene.world_from_scene.numpy()
    return matrix[:3, 3], float(np.cbrt(np.linalg.det(matrix[:3, :3])))


def test_region_of_the_file(files: Files) -> None:
    files.content["aabb"] = [[-1, -2, -3], [3, 2, 1]]
    center, radius = given(files)
    np.testing.assert_allclose(center, [1, 0, -1], atol=1e-9)
    assert radius == pytest.approx(np.sqrt(12))
    files.content.update(applied_scale=0.5)
    center, radius = given(files)
    np.testing.assert_allclose(center, [2, 0, -2], atol=1e-9)
    assert radius == pytest.approx(2 * np.sqrt(12))


def test_region_in_the_unit_cube_of_instant_ngp(files: Files) -> None:
    # ngp = cycled (0.5 p + 0.5): the point (1, -1, 0.5) goes to (1, 0, 0.75), then to (y, z, x).
    files.content.update(scale=0.5, render_aabb=[[0.0, 0.5, 0.9], [0.0, 1.0, 1.1]])
    center, radius = given(files)
    np.testing.assert_allclose(center, [1.0, -1.0, 0.5], atol=1e-9)
    assert radius == pytest.approx(np.hypot(1.0, 0.4) / 2)


def test_unit_cube_only_on_request(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    files.content["aabb_scale"] = 4
    with pytest.raises(UserError, match=r"dataset\.region"):
        given(files)
    with caplog.at_level(logging.INFO):
        center, radius = given(files, use_aabb=True)
    assert "unit cube of instant-ngp" in caplog.text
    np.testing.assert_allclose(center, 0.0, atol=1e-9)
    assert radius == pytest.approx(4 * 0.5 / 0.33), "the box is aabb_scale times the cube"
    for bad in (0, -1, "4"):
        files.content["aabb_scale"] = bad
        with pytest.raises(DataError, match=r"transforms\.json: aabb_scale is .*; write a"):
            given(files, use_aabb=True)
    del files.content["aabb_scale"]
    files.content.update(scale=1.0, offset=[0.5, 0.0, 1.0])
    center, radius = given(files, use_aabb=True)
    np.testing.assert_allclose(center, [0, 0.5, -0.5], atol=1e-9)
    assert radius == pytest.approx(0.5)


def test_up_of_instant_ngp(files: Files) -> None:
    files.content["up"] = [0.0, -3.0, 0.0]
    scene = files.load(up="auto")
    rotation = scene.world_from_scene[:3, :3].numpy() / 2.0
    np.testing.assert_allclose(rotation[:, 2], [0, -1, 0], atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
# photographs


def test_order_is_natural_and_photographs_count_once(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    (files.root / "images" / "3.png").rename(files.root / "images" / "10.png")
    files.frames[3]["file_path"] = "images/10.png"
    files.content["frames"] = [files.frames[index] for index in (3, 2, 0, 1)]
    again = {"file_path": "./images/../images/2.png", "transform_matrix": np.eye(4).tolist()}
    files.frames.append(again)
    scene = files.load()
    assert scene.image_names == ("0.png", "1.png", "2.png", "10.png")
    assert [int(scene.images.image(view)[0, 0, 0]) for view in range(4)] == [0, 40, 80, 120]
    assert_rays_meet_points(scene, [PINHOLE] * NUM_VIEWS)
    assert "1 photographs are listed twice" in caplog.text


@pytest.mark.parametrize("pattern", ["①{:02d}.png", "1²{}.png", "٣{}.png"])
def test_digits_that_are_no_decimals(files: Files, pattern: str) -> None:
    for index, frame in enumerate(files.frames):
        name = "images/" + pattern.format(index)
        (files.root / frame["file_path"]).rename(files.root / name)
        frame["file_path"] = name
    assert files.load().image_names == tuple(pattern.format(index) for index in range(NUM_VIEWS))


def test_names_of_other_systems(files: Files) -> None:
    names = [
        "./images\\0",
        str(files.root / "images" / "1.png"),
        "C:\\Users\\me\\images\\2.PNG",
        "/elsewhere/scan/images/3.jpg",
    ]
    for frame, name in zip(files.frames, names, strict=True):
        frame["file_path"] = name
    assert files.load().image_names == ("0.png", "1.png", "2.png", "3.png")


def test_missing_photographs_are_skipped_with_one_line(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    (files.root / "images" / "0.png").unlink()
    (files.root / "images" / "2.png").unlink()
    scene = files.load()
    assert scene.image_names == ("1.png", "3.png")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "2 of 4 photographs do not exist and are skipped, first images/0.png" in warnings[0]
    np.testing.assert_allclose(scene.cameras.c2w[1, :, 3], pose(3)[:3, 3] / 2.0, atol=1e-5)


def test_the_file_itself_with_a_byte_order_mark(files: Files) -> None:
    files.load()
    other = files.root / "Other.JSON"
    for encoding in ("utf-8-sig", "utf-16"):
        other.write_text(files.path.read_text(), encoding=encoding)
        assert len(files.load(root_dir=str(other)).images) == NUM_VIEWS


def test_splits(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    scene = files.load()
    assert (scene.train_indices, scene.test_indices) == ((0, 1, 2, 3), ())
    names = [frame["file_path"] for frame in files.frames]
    files.content.update(train_filenames=names[:2], val_filenames=names[2:3])
    with caplog.at_level(logging.INFO):
        scene = files.load()
    assert scene.image_names == ("0.png", "1.png", "2.png")
    assert (scene.train_indices, scene.test_indices) == ((0, 1), (2,))
    assert "1 of 4 photographs are left out" in caplog.text
    files.content["test_filenames"] = ["./" + names[3], names[0]]
    scene = files.load()
    assert scene.image_names == ("0.png", "1.png", "3.png")
    assert (scene.train_indices, scene.test_indices) == ((1,), (0, 2))
    assert "listed for training and for measuring" in caplog.text
    del files.content["train_filenames"], files.content["val_filenames"]
    assert files.load().train_indices == (1, 2)
    assert files.load(holdout=2).test_indices == (0, 2)
    with pytest.raises(ConfigError, match=r"dataset\.holdout"):
        files.load(holdout=[9])


def save_mask(path: Path, columns: int) -> None:
    path.parent.mkdir(exist_ok=True)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, :columns] = 255
    Image.fromarray(mask).save(path)


def test_masks(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(NUM_VIEWS):
        save_mask(files.root / "masks" / f"{index}.png", 10 + index)
    save_mask(files.root / "mine" / "x.png", 50)
    files.frames[1]["mask_path"] = "mine\\x.png"
    save_mask(files.root / "images" / "dynamic_mask_2.png", 90)
    assert files.load().masks is None
    assert caplog.text.count("moving things") == 1
    scene = files.load(apply_mask=True)
    assert scene.masks is not None
    assert [int(scene.masks.image(view)[0].sum()) // 255 for view in range(4)] == [10, 50, 12, 13]
    files.frames[1]["mask_path"] = "mine/gone.png"
    with pytest.raises(DataError, match=r"mine/gone\.png: no such file"):
        files.load(apply_mask=True)
    assert files.load().masks is None


def test_depth_maps(files: Files) -> None:
    for index, frame in enumerate(files.frames):
        np.save(files.root / f"{index}.npy", np.full((HEIGHT, WIDTH), 1.0 + index, np.float32))
        frame["depth_file_path"] = f"{index}.npy"
    scene = files.load(use_priors=True)
    assert scene.depths is not None
    assert [float(scene.depths.image(view)[5, 5, 0]) for view in range(4)] == [1, 2, 3, 4]
    for frame in files.frames:
        frame["depth_file_path"] = "depth/1.png"
    with pytest.raises(DataError, match=r"depth/1\.png: not a readable picture; "):
        files.load(use_priors=True)
    assert files.load().depths is None
    (files.root / "depth").mkdir()
    cv2.imwrite(str(files.root / "depth" / "1.png"), np.full((HEIGHT, WIDTH), 1500, np.uint16))
    scene = files.load(depth_unit=0.002, use_priors=True)
    assert scene.depths is not None
    assert float(scene.depths.image(2)[5, 5, 0]) == 3.0


def test_missing_and_empty_points(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    files.content["ply_file_path"] = "sparse_pc.ply"
    assert files.load().points is None
    assert "sparse_pc.ply, which does not exist" in caplog.text


# ----------------------------------------------------------------------------------------------------------
# bad input


def set_pose(change: Callable[[np.ndarray], Any]) -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        files.frames[2]["transform_matrix"] = change(pose(2) @ OPENGL)

    return apply


def set_top(**entries: Any) -> Callable[[Files], None]:
    return lambda files: files.content.update(entries)


def set_frame(**entries: Any) -> Callable[[Files], None]:
    return lambda files: files.frames[2].update(entries)


def spoil(matrix: np.ndarray) -> list[list[float]]:
    matrix[1, 3] = np.nan
    return matrix.tolist()


BAD = {
    "nan_pose": (set_pose(spoil), "frame images/2.png: the pose holds values that are not finite"),
    "singular": (
        set_pose(lambda m: (m * [[0], [0], [0], [1]]).tolist()),
        "images/2.png: the pose is singular",
    ),
    "mirrored": (
        set_pose(lambda m: (m @ np.diag([-1, 1, 1, 1])).tolist()),
        "images/2.png: the pose is mirrored",
    ),
    "two_rows": (set_pose(lambda m: m[:2].tolist()), r"images/2.png: the pose has shape \(2, 4\)"),
    "words": (set_pose(lambda m: "identity"), "images/2.png: the pose is not a matrix of numbers"),
    "no_pose": (
        lambda f: f.frames[2].pop("transform_matrix"),
        r"images/2.png has no pose \(transform_matrix\)",
    ),
    "no_frames": (lambda f: f.content.pop("frames"), "has no frames"),
    "empty_frames": (set_top(frames=[]), "has no frames"),
    "frames_object": (set_top(frames={"0": {}}), "frames is not a list"),
    "frame_text": (set_top(frames=["images/0.png"]), r"frames\[0\] names no photograph"),
    "no_file_path": (set_frame(file_path=None), r"frames\[2\] names no photograph"),
    "no_photos": (
        lambda f: [frame.update(file_path="gone/" + frame["file_path"]) for frame in f.frames],
        "none of the 4 photographs that it lists exists, first gone/images/0.png",
    ),
    "no_focal": (lambda f: f.camera({"cx": 50.0}), "frame images/0.png: no focal length"),
    "negative_focal": (set_frame(fl_x=-90.0), "frame images/2.png: its parameters .* are absurd"),
    "huge_focal": (set_frame(fl_x=1e9), "frame images/2.png: its parameters .* are absurd"),
    "focal_text": (set_frame(fl_x="90"), "frame images/2.png: fl_x is '90', not a number"),
    "focal_nan": (set_top(fl_x=float("nan")), "frame images/0.png: fl_x is nan"),
    "focal_digits": (set_top(fl_x=10**400), "frame images/0.png: fl_x is 1000"),
    "angle": (lambda f: f.camera({"camera_angle_x": 39.6}), "camera_angle_x is 39.6; write radians"),
    "zero_size": (set_top(w=0), "w x h is 0 x 77"),
    "other_shape": (set_top(w=77, h=101), "0.png: 101x77 pixels, but its camera is for 77x101"),
    "k1": (set_top(k1=1e6), "are absurd"),
    "k4": (set_top(k4=0.1), "camera model OPENCV has no k4, but k4 is 0.1"),
    **{
        f"foreign_{key}": (set_top(**{key: 0.1}), f"camera model OPENCV has no {key}, but {key} is 0.1")
        for key in ("k5", "k6", "p3", "p4", "s1", "s2", "s3", "s4", "b1", "b2")
    },
    "fisheye_k5": (set_frame(is_fisheye=True, k5=0.1), "images/2.png: camera model OPENCV_FISHEYE has no k5"),
    "other_cx": (
        lambda f: f.camera({"fl_x": 90.0, "cx": 12.0, "cy": 36.0}),
        "frame images/0.png: cx is 12, but the picture is 101x77: .*; add w and h",
    ),
    "other_cy": (
        lambda f: f.camera({"fl_x": 90.0, "w": WIDTH, "cx": 12.0, "cy": 150.0}),
        "frame images/0.png: cy is 150, but the picture is 101x77: .*; add w and h",
    ),
    "fisheye_p1": (set_top(is_fisheye=True, p1=0.1), "camera model OPENCV_FISHEYE has no p1"),
    "model": (set_top(camera_model="FISHEYE624"), "camera model FISHEYE624 is not supported"),
    "ftheta": (set_top(ftheta_p0=1.0), "camera model ftheta_p0 is not supported"),
    "applied": (
        set_top(applied_transform=np.zeros((3, 4)).tolist()),
        "applied_transform: the pose is singular",
    ),
    "applied_scale": (set_top(applied_scale=0), "applied_scale is 0; write a factor above 0"),
    "aabb": (set_top(aabb=[1, 2]), "aabb has shape"),
    "flat_aabb": (set_top(aabb=[[1, 2, 3], [1, 2, 3]]), "aabb is empty"),
    "scale": (set_top(scale=-1, use_aabb=True), "scale is -1"),
    "up": (set_top(up=[0, 0, 0]), "up is zero"),
    "list": (set_top(train_filenames="images/0.png"), "train_filenames is not a list"),
    "all_held_out": (set_top(train_filenames=[]), "no photograph is left to train on"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_entries_get_one_line(files: Files, case: str) -> None:
    spoil_files, line = BAD[case]
    spoil_files(files)
    with pytest.raises(DataError, match=line) as caught:
        files.load()
    assert "\n" not in str(caught.value)
    assert "transforms.json" in str(caught.value) or case == "other_shape"
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"fl_x": 1,\n "frames": [{"file_path"', r"not valid JSON at line 2 column \d+ \("),
        (b"", "not valid JSON at line 1 column 1"),
        (b"[1, 2]", "holds no JSON object with frames"),
        (b'{"a": "\xff\xfe\xfa"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_json(files: Files, content: bytes, line: str) -> None:
    files.path.write_bytes(content)
    with pytest.raises(DataError, match=r"transforms\.json: " + line):
        load_transforms(TransformsConfig(root_dir=str(files.root)))


def test_bad_points(files: Files) -> None:
    (files.root / "sparse_pc.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 3\nproper")
    files.content["ply_file_path"] = "sparse_pc.ply"
    with pytest.raises(DataError, match=r"sparse_pc\.ply: not a readable PLY file"):
        files.load()
    files.content["ply_file_path"] = "x" * 300 + ".ply"
    with pytest.raises(
        DataError, match=r"transforms\.json: ply_file_path 'x{80}' cannot be looked up.*; corr"
    ):
        files.load()


def test_bad_picture(files: Files) -> None:
    files.camera({"fl_x": 90.0})
    (files.root / "images" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"images/1\.png: not a readable picture"):
        files.load()


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root_dir: not given"):
        load_transforms(TransformsConfig())
    with pytest.raises(DataError, match="no such folder"):
        load_transforms(TransformsConfig(root_dir=str(tmp_path / "gone.json")))
    (tmp_path / "transforms_train.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"no such file \(the folder has transforms_train\.json\); .*dataset\.name=blender"
    ):
        load_transforms(TransformsConfig(root_dir=str(tmp_path)))


# ----------------------------------------------------------------------------------------------------------
# a real capture


@pytest.mark.skipif(not FOX.exists(), reason=f"no real capture in {FOX}")
def test_fox_is_consistent_with_its_photographs(caplog: pytest.LogCaptureFixture) -> None:
    scene = load_transforms(TransformsConfig(root_dir=str(FOX), img_downscale=2))
    assert len(scene.images) == 50
    assert "17 of 67 photographs do not exist" in caplog.text
    assert epipolar_error(scene, 0, 4) < 0.7


@pytest.mark.skipif(not FOX.exists(), reason=f"no real capture in {FOX}")
@pytest.mark.parametrize("convention", ["opengl", "opencv"])
@pytest.mark.parametrize("poses", ["c2w", "w2c"])
def test_photographs_of_the_fox_show_the_convention(tmp_path: Path, convention: str, poses: str) -> None:
    """Some of the capture's frames, written in each convention beside a link to its photographs."""
    content = json.loads((FOX / "transforms.json").read_text())
    content["frames"] = content["frames"][:14]
    for name in ("known", "searched"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images").symlink_to(FOX / "images")
    (tmp_path / "known" / "transforms.json").write_text(json.dumps(content))
    for frame in content["frames"]:
        matrix = np.array(frame["transform_matrix"])
        matrix = matrix if convention == "opengl" else matrix @ OPENGL
        frame["transform_matrix"] = (np.linalg.inv(matrix) if poses == "w2c" else matrix).tolist()
    (tmp_path / "searched" / "transforms.json").write_text(json.dumps(content))
    known, searched = (
        load_transforms(TransformsConfig(root_dir=str(tmp_path / name), img_downscale=8, convention=choice))
        for name, choice in (("known", "opengl"), ("searched", "auto"))
    )
    assert searched.image_names == known.image_names
    torch.testing.assert_close(searched.cameras.c2w, known.cameras.c2w, atol=1e-5, rtol=0)
    torch.testing.assert_close(searched.world_from_scene, known.world_from_scene, atol=1e-6, rtol=0)


def epipolar_error(scene: Scene, first: int, second: int) -> float:
    """Median distance of matched features from the plane through both camera centres, in training pixels."""
    sift = cv2.SIFT_create(nfeatures=1500)
    keys, descriptors = zip(
        *(
            sift.detectAndCompute(cv2.cvtColor(scene.images.image(view).numpy(), cv2.COLOR_RGB2GRAY), None)
            for view in (first, second)
        ),
        strict=True,
    )
    pairs = cv2.BFMatcher().knnMatch(*descriptors, k=2)
    matches = [best for best, next_best in pairs if best.distance < 0.7 * next_best.distance]
    assert len(matches) > 50
    # OpenCV's features have pixel centres at integers.
    pixels = [
        torch.tensor([keys[0][match.queryIdx].pt for match in matches]) + 0.5,
        torch.tensor([keys[1][match.trainIdx].pt for match in matches]) + 0.5,
    ]
    rays = [
        rays_from_pixels(scene.cameras, torch.full((len(matches),), view), pixel)
        for view, pixel in zip((first, second), pixels, strict=True)
    ]
    baseline = (rays[1].origins - rays[0].origins).double().numpy()
    normal = np.cross(baseline, rays[0].directions.double().numpy())
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    sines = np.abs(np.sum(normal * rays[1].directions.double().numpy(), axis=1))
    return float(np.median(sines) * scene.cameras.intrinsics[second, 0, 0].item())
