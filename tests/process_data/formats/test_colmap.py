import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from process_data.cameras import rays_from_pixels
from process_data.formats.colmap import ColmapConfig, load_colmap
from process_data.formats.colmap_model import _places_image
from utils.errors import ConfigError, DataError
from utils.types import Scene

WIDTH, HEIGHT = 61, 43
CENTER, RADIUS = (0.3, -0.2, 5.0), 2.0
"""Of the region that the tests ask for."""
# fmt: off
PARAMS: dict[str, list[float]] = {
    "SIMPLE_PINHOLE": [70, 31, 20],
    "PINHOLE": [70, 75, 31, 20],
    "SIMPLE_RADIAL": [70, 31, 20, 0.1],
    "SIMPLE_RADIAL_FISHEYE": [70, 31, 20, 0.1],
    "RADIAL": [70, 31, 20, 0.1, -0.05],
    "RADIAL_FISHEYE": [70, 31, 20, 0.1, -0.05],
    "OPENCV": [70, 75, 31, 20, 0.1, -0.05, 0.01, -0.02],
    "OPENCV_FISHEYE": [70, 75, 31, 20, 0.1, -0.05, 0.02, -0.01],
    "FULL_OPENCV": [70, 75, 31, 20, 0.1, -0.05, 0.01, -0.02, 0.02, 0.05, -0.02, 0.01],
    "FOV": [70, 75, 31, 20, 0.7],
    "THIN_PRISM_FISHEYE": [70, 75, 31, 20, 0.1, -0.05, 0.01, -0.02, 0.02, -0.01, 0.01, 0.02],
    "RAD_TAN_THIN_PRISM_FISHEYE": [
        70, 75, 31, 20, 0.1, -0.05, 0.02, -0.01, 0.005, 0.001, 0.01, -0.02, 0.01, 0.02, -0.01, 0.01],
    "SIMPLE_DIVISION": [70, 31, 20, -0.1],
    "DIVISION": [70, 75, 31, 20, -0.1],
    "SIMPLE_FISHEYE": [50, 31, 20],
    "FISHEYE": [50, 55, 31, 20],
    "EUCM": [70, 75, 31, 20, 0.5, 1.1],
    "EQUIRECTANGULAR": [WIDTH, HEIGHT],
}
# fmt: on
MODELS = sorted(set(pycolmap.CameraModelId.__members__) - {"INVALID"})


def rotation(x: float, y: float, z: float) -> pycolmap.Rotation3d:
    return pycolmap.Rotation3d(np.array([x, y, z]))


def make_model(
    names: list[str], models: tuple[str, ...] = ("SIMPLE_RADIAL",), size: tuple[int, int] = (WIDTH, HEIGHT)
) -> pycolmap.Reconstruction:
    """Cameras side by side that look at 40 points about (0, 0, 5); the views take turns at the cameras."""
    model = pycolmap.Reconstruction()
    for index, name in enumerate(models):
        params = np.array(PARAMS[name], np.float64)
        if name == "EQUIRECTANGULAR":
            params = np.array(size, np.float64)
        model.add_camera_with_trivial_rig(
            pycolmap.Camera(
                camera_id=index + 1, model=name, width=size[0], height=size[1], params=params.tolist()
            )
        )
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (40, 3)) * [1.0, 0.7, 0.6] + [0, 0, 5]
    for index, name in enumerate(names):
        cam_from_world = pycolmap.Rigid3d(
            rotation(0.02 * index, -0.03 * index, 0.1), np.array([-0.1 * index, 0.05 * index, 0.2])
        )
        camera = model.camera(index % len(models) + 1)
        image = pycolmap.Image(name=name, camera_id=camera.camera_id, image_id=index + 1)
        pixels = np.array([camera.img_from_cam(cam_from_world * point) for point in points])
        image.points2D = pycolmap.Point2DList([pycolmap.Point2D(pixel) for pixel in pixels])
        model.add_image_with_trivial_frame(image, cam_from_world)
    for number, point in enumerate(points):
        track = pycolmap.Track()
        # View i sees all points from number i on.
        for index in range(min(len(names), number + 1)):
            track.add_element(index + 1, number)
        model.add_point3D(point, track, np.array([number, 2, 3], np.uint8))
    model.update_point_3d_errors()
    return model


def save_pictures(folder: Path, names: list[str], size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size[1], size[0], 3), index, np.uint8)).save(folder / name)


def write(model: pycolmap.Reconstruction, folder: Path, kind: str = "bin") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (model.write_binary if kind == "bin" else model.write_text)(folder)


def config(root: Path, **options: object) -> ColmapConfig:
    region = {"region_center": list(CENTER), "region_radius": RADIUS, "up": "none"}
    return ColmapConfig(root_dir=str(root), **{**region, **options})


NAMES = ["1.png", "2.png", "10.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three views in binary files."""
    save_pictures(tmp_path / "images", NAMES)
    write(make_model(NAMES), tmp_path / "sparse" / "0")
    return tmp_path


def miss_in_pixels(scene: Scene, model: pycolmap.Reconstruction) -> float:
    """Largest distance between a point's pixel and where the ray through that pixel passes the point."""
    world_from_scene = scene.world_from_scene.numpy()
    worst = 0.0
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        view = scene.image_names.index(Path(image.name).name)
        cam_from_world = image.cam_from_world()
        points = np.array([model.point3D(p.point3D_id).xyz for p in image.points2D if p.has_point3D()])
        pixels = image.camera.img_from_cam(cam_from_world * points)
        factor = scene.cameras.size[view].numpy() / [image.camera.width, image.camera.height]
        rays = rays_from_pixels(
            scene.cameras, torch.full((len(pixels),), view), torch.from_numpy(pixels * factor).float()
        )
        origins = rays.origins.double().numpy() @ world_from_scene[:3, :3].T + world_from_scene[:3, 3]
        directions = rays.directions.double().numpy() @ world_from_scene[:3, :3].T
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        closest = origins + directions * ((points - origins) * directions).sum(axis=1, keepdims=True)
        hit = image.camera.img_from_cam(cam_from_world * closest)
        assert len(points) > 5
        worst = max(worst, float(np.linalg.norm((hit - pixels) * factor, axis=1).max()))
    return worst


def test_every_camera_model_is_tested() -> None:
    assert set(PARAMS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_rays_pass_through_the_points_that_the_pixels_show(tmp_path: Path, name: str) -> None:
    # A panorama's pixels cover as much as they do in the others.
    size = (401, 199) if name == "EQUIRECTANGULAR" else (WIDTH, HEIGHT)
    model = make_model(NAMES, (name,), size)
    save_pictures(tmp_path / "images", NAMES, size)
    write(model, tmp_path / "sparse" / "0")
    for downscale in (1, 2, 3):
        scene = load_colmap(config(tmp_path, img_downscale=downscale))
        assert scene.cameras.size[0].tolist() == [round(x / downscale) for x in size]
        assert miss_in_pixels(scene, model) < 0.05
        assert bool(scene.cameras.lenses) == (name not in ("SIMPLE_PINHOLE", "PINHOLE"))


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_mixed_cameras_and_points(tmp_path: Path, kind: str) -> None:
    save_pictures(tmp_path / "images", NAMES)
    model = make_model(NAMES, ("PINHOLE", "OPENCV"))
    write(model, tmp_path / "sparse" / "0", kind)
    scene = load_colmap(config(tmp_path))
    assert scene.image_names == ("1.png", "2.png", "10.png")
    assert [int(scene.images.image(view)[0, 0, 0]) for view in range(3)] == [0, 1, 2]
    assert [lens.model for lens in scene.cameras.lenses] == ["PINHOLE", "OPENCV", "PINHOLE"]
    assert miss_in_pixels(scene, model) < 0.05
    assert scene.points is not None
    world = scene.points.positions * RADIUS + CENTER
    np.testing.assert_allclose(world, [model.point3D(i).xyz for i in sorted(model.point3D_ids())], atol=1e-9)
    assert scene.points.colors[:, 0].tolist() == list(range(40))
    assert np.all(scene.points.errors < 1e-6)
    seen = [scene.points.observations[scene.points.observations[:, 1] == view, 0] for view in range(3)]
    assert [points.tolist() for points in seen] == [list(range(view, 40)) for view in range(3)]
    assert (np.diff(scene.points.observations[:, 0]) >= 0).all()


def test_a_case_by_hand(tmp_path: Path) -> None:
    """A camera at (0, 0, -4) that looks along +z: world to camera is a shift by +4."""
    save_pictures(tmp_path / "images", ["a.png"])
    folder = tmp_path / "sparse"
    folder.mkdir()
    (folder / "cameras.txt").write_text("1 PINHOLE 61 43 70 75 31 20\n")
    (folder / "images.txt").write_text("1 1 0 0 0 0 0 4 1 a.png\n31.0 20.0 7\n")
    (folder / "points3D.txt").write_text("7 0 0 0 10 20 30 -1 1 0\n")
    scene = load_colmap(config(tmp_path, region_center=[0, 0, 0]))
    np.testing.assert_allclose(scene.cameras.c2w[0], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -4 / RADIUS]])
    np.testing.assert_allclose(scene.cameras.intrinsics[0], [[70, 0, 31], [0, 75, 20], [0, 0, 1]])
    assert scene.points is not None
    assert np.isnan(scene.points.errors).tolist() == [True]
    assert scene.points.observations.tolist() == [[0, 0]]


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_rigs(tmp_path: Path, kind: str) -> None:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_cameras_per_rig, options.num_frames_per_rig = 1, 2, 3
    options.num_points3D, options.camera_width, options.camera_height = 30, WIDTH, HEIGHT
    options.camera_params = [70.0, 31.0, 20.0, 0.1]
    options.sensor_from_rig_translation_stddev, options.sensor_from_rig_rotation_stddev = 0.3, 5.0
    model = pycolmap.synthesize_dataset(options)
    save_pictures(tmp_path / "images", [image.name for image in model.images.values()])
    write(model, tmp_path / "sparse" / "0", kind)
    scene = load_colmap(config(tmp_path))
    assert len(scene.cameras) == 6
    for image in model.images.values():
        centre = scene.cameras.c2w[scene.image_names.index(image.name), :, 3].numpy() * RADIUS + CENTER
        np.testing.assert_allclose(centre, image.projection_center(), atol=1e-5)
    assert miss_in_pixels(scene, model) < 0.05


@pytest.mark.parametrize(
    "place", ["sparse/0", "sparse", "colmap/sparse/0", "colmap/sparse", ".", "elsewhere/m"]
)
def test_places_of_the_model(tmp_path: Path, place: str) -> None:
    save_pictures(tmp_path / "images", NAMES)
    write(make_model(NAMES), tmp_path / place)
    model_dir = place if place == "elsewhere/m" else None
    assert len(load_colmap(config(tmp_path, model_dir=model_dir)).cameras) == 3


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_names_with_folders_spaces_and_other_alphabets(tmp_path: Path, kind: str) -> None:
    names = ["left/1.png", "left/10.png", "left/2.png", "right/1.png", "right/2.png", "größe.png", "写真.png"]
    # COLMAP's text files separate by spaces, and it reads a name up to the first.
    names += ["a photo.png"] if kind == "bin" else []
    save_pictures(tmp_path / "images", names)
    write(make_model(names), tmp_path / "sparse" / "0", kind)
    (tmp_path / "images" / "right" / "1.png").rename(tmp_path / "images" / "right" / "1.PNG")
    scene = load_colmap(config(tmp_path))
    assert len(scene.cameras) == len(names)
    numbers = [n for n in scene.image_names if n.startswith("images_left")]
    assert numbers == ["images_left_1.png", "images_left_2.png", "images_left_10.png"]
    # The grey value says which photo a picture is, and the pose which photo the camera is for.
    shades = [int(scene.images.image(view)[0, 0, 0]) for view in range(len(names))]
    poses = {index: make_model(names).image(index + 1).projection_center() for index in range(len(names))}
    for view, shade in enumerate(shades):
        np.testing.assert_allclose(
            scene.cameras.c2w[view, :, 3] * RADIUS + torch.tensor(CENTER), poses[shade], atol=1e-5
        )


def test_names_that_count_from_the_capture(tmp_path: Path) -> None:
    names = [f"images/{name}" for name in NAMES]
    save_pictures(tmp_path, names)
    write(make_model(names), tmp_path / "sparse" / "0")
    assert load_colmap(config(tmp_path)).image_names == tuple(NAMES)


def test_smaller_copies_stand_for_a_downscale(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = (WIDTH // 2, HEIGHT // 2)
    save_pictures(root / "images_2", [name.replace(".png", ".jpg") for name in NAMES], small)
    for options in ({"img_downscale": 2}, {"images_dir": "images_2"}):
        scene = load_colmap(config(root, **options))
        assert scene.image_names[0] == "1.jpg"
        assert scene.cameras.size[0].tolist() == list(small)
        assert miss_in_pixels(scene, renamed(make_model(NAMES), ".jpg")) < 0.05
    assert load_colmap(config(root, img_downscale=3)).image_names[0] == "1.png"
    smaller = load_colmap(config(root, images_dir="images_2", img_downscale=2))
    assert smaller.cameras.size[0].tolist() == [15, 10]
    shutil.rmtree(root / "images")
    with pytest.raises(DataError, match=r"images: no such folder; set dataset\.img_downscale=2"):
        load_colmap(config(root))
    with pytest.raises(ConfigError, match=r"dataset\.images_dir: .*images_3 is no folder"):
        load_colmap(config(root, images_dir="images_3"))


def renamed(model: pycolmap.Reconstruction, suffix: str) -> pycolmap.Reconstruction:
    for image in model.images.values():
        image.name = str(Path(image.name).with_suffix(suffix))
    return model


@pytest.mark.parametrize("pattern", ["{}.png", "{}.png.png", "{}_mask.png"])
def test_masks(root: Path, pattern: str) -> None:
    save_pictures(root / "images_2", [name.replace(".png", ".jpg") for name in NAMES], (30, 22))
    (root / "masks").mkdir()
    for index, name in enumerate(NAMES):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, : 10 * (index + 1)] = 255
        Image.fromarray(mask).save(root / "masks" / pattern.format(Path(name).stem))
    assert load_colmap(config(root)).masks is None
    scene = load_colmap(config(root, apply_mask=True))
    assert scene.masks is not None
    assert [int((scene.masks.image(view)[0] > 0).sum()) for view in range(3)] == [10, 20, 30]
    # Full-size masks, named after full-size pictures, serve the smaller copies too.
    halves = load_colmap(config(root, apply_mask=True, img_downscale=2)).masks
    assert halves is not None
    assert [int((halves.image(view)[0] > 0).sum()) for view in range(3)] == [5, 10, 15]


def test_the_largest_of_several_models(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = ["1.png", "2.png", "10.png", "11.png"]
    save_pictures(root / "images", more)
    shutil.rmtree(root / "sparse" / "0")
    write(make_model(["1.png", "12.png", "13.png"]), root / "sparse" / "0")
    write(make_model(more), root / "sparse" / "1", "txt")
    scene = load_colmap(config(root))
    assert scene.image_names == tuple(more)
    assert (
        "2 models: 1 with 4 photos is used, 2 photos that only the others place are left out" in caplog.text
    )
    chosen = load_colmap(config(root, model_dir="sparse/0"))
    assert chosen.image_names == ("1.png",)


def test_photos_without_pose_and_poses_without_photo(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "images" / "2.png").unlink()
    save_pictures(root / "images", ["new.png", "more/new.png"])
    with caplog.at_level(logging.INFO):
        scene = load_colmap(config(root))
    assert scene.image_names == ("1.png", "10.png")
    assert "1 of 3 photos of the model are not in" in caplog.text
    assert "2 photos of" in caplog.text
    assert scene.points is not None
    assert set(scene.points.observations[:, 1].tolist()) == {0, 1}
    np.testing.assert_array_equal(
        scene.points.observations[scene.points.observations[:, 1] == 1, 0], range(2, 40)
    )
    for name in ("1.png", "10.png"):
        (root / "images" / name).unlink()
    with pytest.raises(DataError, match=r"1\.png: no such picture, and none of the model's 3 photos"):
        load_colmap(config(root))


def test_a_model_without_points_or_rigs(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = root / "sparse" / "0"
    for part in ("rigs", "frames"):
        (folder / f"{part}.bin").unlink()
    assert miss_in_pixels(load_colmap(config(root)), make_model(NAMES)) < 0.05
    (folder / "points3D.bin").write_bytes(struct.pack("<Q", 0))
    model = pycolmap.Reconstruction()
    model.add_camera_with_trivial_rig(make_model(NAMES).camera(1))
    model.add_image_with_trivial_frame(
        pycolmap.Image(name="1.png", camera_id=1, image_id=1), pycolmap.Rigid3d()
    )
    write(model, folder)
    assert load_colmap(config(root)).points is None
    assert "points3D.bin holds no points" in caplog.text


# ----------------------------------------------------------------------------------------------------------
# broken input


@pytest.mark.parametrize("part", ["cameras", "images", "points3D", "rigs", "frames"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5, 0.77, 0.999])
def test_binary_files_that_were_cut_off(root: Path, part: str, share: float) -> None:
    path = root / "sparse" / "0" / f"{part}.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        DataError, match=rf"{part}\.bin: ends too early, after \d+ bytes: .*; write the model again"
    ):
        load_colmap(config(root))


@pytest.mark.parametrize("part", ["cameras", "images", "points3D", "rigs", "frames"])
def test_binary_files_of_garbage(root: Path, part: str) -> None:
    (root / "sparse" / "0" / f"{part}.bin").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(DataError, match=rf"{part}\.bin: .*; write the model again"):
        load_colmap(config(root))


@pytest.mark.parametrize("part", ["cameras", "images", "points3D", "rigs", "frames"])
@pytest.mark.parametrize("content", ["# nothing\n", "garbage in a line\n", "1 2 3\n", "1 SIMPLE_RADIAL 61"])
def test_text_files_of_garbage(tmp_path: Path, part: str, content: str) -> None:
    save_pictures(tmp_path / "images", NAMES)
    write(make_model(NAMES), tmp_path / "sparse" / "0", "txt")
    (tmp_path / "sparse" / "0" / f"{part}.txt").write_text(content)
    if (part, content) == ("points3D", "# nothing\n"):
        # That is how a model without points looks.
        assert load_colmap(config(tmp_path)).points is None
        return
    # A file without lines is only missed by the others.
    what = r"sparse/0: COLMAP cannot read" if content.startswith("#") else rf"{part}\.txt: line 1 is not"
    with pytest.raises(DataError, match=f"{what}.*; write the model again"):
        load_colmap(config(tmp_path))


def test_text_files_without_empty_lines(tmp_path: Path) -> None:
    save_pictures(tmp_path / "images", NAMES)
    folder = tmp_path / "sparse" / "0"
    folder.mkdir(parents=True)
    # As programs that write poses only do.
    (folder / "cameras.txt").write_text(f"1 PINHOLE {WIDTH} {HEIGHT} 70 75 31 20\n")
    (folder / "points3D.txt").touch()
    lines = [f"{index} 1 0 0 0 {index} 0 0 1 {name}" for index, name in enumerate(NAMES, start=1)]
    (folder / "images.txt").write_text("\n\n".join(lines) + "\n\n")
    assert len(load_colmap(config(tmp_path)).images) == 3
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DataError, match=r"images\.txt: 3 lines place photographs, but 1 can be read; write two"
    ):
        load_colmap(config(tmp_path))


@pytest.mark.parametrize(
    ("line", "places"),
    [
        ("1 1 0 0 0 0.5 -1e-3 2 1 a b.jpg\n", True),
        ("1 1 0 0 0 0.5 -1e-3 2 1 0001", True),
        ("# 1 1 0 0 0 0.5 -1e-3 2 1 a.jpg", False),
        ("\n", False),
        ("20 15 -1 30 25 7 1 2 3 4 5 6", False),
        ("20.5 15.5 1", False),
    ],
)
def test_lines_that_place_a_photo(line: str, places: bool) -> None:
    assert _places_image(line) == places


def test_a_photo_that_is_placed_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pictures(tmp_path / "images", NAMES)
    model = make_model(NAMES)
    folder = tmp_path / "sparse" / "0"
    write(model, folder, "txt")
    expected = load_colmap(config(tmp_path))
    path = folder / "images.txt"
    path.write_text(path.read_text().replace(" 10.png", " 2.png"))
    scene = load_colmap(config(tmp_path))
    assert scene.image_names == ("1.png", "2.png")
    assert torch.equal(scene.cameras.c2w, expected.cameras.c2w[:2]), "the first counts"
    assert "images.txt: 1 photos are placed twice, the first counts: 2.png" in caplog.text
    assert scene.points is not None
    assert set(scene.points.observations[:, 1].tolist()) == {0, 1}


def overwrite(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


NAN = struct.pack("<d", float("nan"))


@pytest.mark.parametrize(
    ("part", "offset", "value", "what"),
    [
        # After the count: id, model, width, height, f, cx, cy, k.
        ("cameras", 12, struct.pack("<i", 99), r"cameras\.bin: camera 1 has unknown model number 99"),
        ("cameras", 32, NAN, r"cameras\.bin: camera 1: .*not finite"),
        ("cameras", 32, struct.pack("<d", 0.0), r"cameras\.bin: camera 1: .*absurd"),
        ("cameras", 16, struct.pack("<Q", 0), r"cameras\.bin: camera 1: its picture has 0 x 43 pixels"),
        ("cameras", 0, struct.pack("<Q", 0), r"sparse/0: COLMAP cannot read"),
        ("cameras", 0, struct.pack("<Q", 2**60), r"cameras\.bin: ends too early"),
        # After the count: frame, rig, quaternion, shift.
        ("frames", 16, NAN, r"frames\.bin: photo .*\.png: the pose holds values that are not finite"),
        ("frames", 48, NAN, r"frames\.bin: photo .*\.png: the pose holds values that are not finite"),
        ("frames", 16, bytes(32), r"frames\.bin: photo .*\.png: the rotation is no unit"),
        # After the count: id, quaternion, shift, camera, name.
        ("images", 76, b"\xff", r"images\.bin: a photo's name is not UTF-8"),
        # After the count: id, position.
        ("points3D", 16, NAN, r"points3D\.bin: 1 points are not finite"),
    ],
)
def test_bad_values_are_named(root: Path, part: str, offset: int, value: bytes, what: str) -> None:
    overwrite(root / "sparse" / "0" / f"{part}.bin", offset, value)
    with pytest.raises(DataError, match=f"{what}.*; "):
        load_colmap(config(root))


def test_nan_in_a_pose_without_frames(root: Path) -> None:
    folder = root / "sparse" / "0"
    for part in ("rigs", "frames"):
        (folder / f"{part}.bin").unlink()
    overwrite(folder / "images.bin", 12, NAN)
    with pytest.raises(
        DataError, match=r"images\.bin: photo .*\.png: the pose holds values that are not finite"
    ):
        load_colmap(config(root))


def test_a_model_that_places_nothing(root: Path) -> None:
    write(pycolmap.Reconstruction(), root / "sparse" / "0")
    with pytest.raises(DataError, match=r"images\.bin: places no photographs"):
        load_colmap(config(root))


def remove_model(root: Path) -> None:
    shutil.rmtree(root / "sparse")


def remove_points(root: Path) -> None:
    (root / "sparse" / "0" / "points3D.bin").unlink()


def turn_picture(root: Path) -> None:
    save_pictures(root / "images", ["2.png"], (HEIGHT, WIDTH))


def break_picture(root: Path) -> None:
    (root / "images" / "2.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (remove_model, "holds no COLMAP model; run COLMAP, or set dataset.model_dir; expected are"),
        (remove_points, r"points3D\.bin: no such file; a model needs all of cameras, images, points3D"),
        (turn_picture, r"2\.png: 43x61 pixels, but its camera is for 61x43"),
        (break_picture, r"2\.png: the file is empty"),
    ],
)
def test_missing_and_wrong_files(root: Path, change: Callable[[Path], None], what: str) -> None:
    change(root)
    with pytest.raises(DataError, match=what):
        load_colmap(config(root))


def test_wrong_keys(root: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root_dir: not given; .*expected are images/"):
        load_colmap(ColmapConfig())
    with pytest.raises(ConfigError, match=r"dataset\.model_dir: .*nowhere holds no COLMAP model"):
        load_colmap(config(root, model_dir="nowhere"))


# ----------------------------------------------------------------------------------------------------------
# real captures


@pytest.mark.parametrize(("name", "num_views"), [("alexander", 53), ("bonsai", 40)])
def test_real_captures(shared_data: Path, name: str, num_views: int) -> None:
    scene = load_colmap(config(shared_data / name, img_downscale=8))
    model = pycolmap.Reconstruction(shared_data / name / "sparse" / "0")
    assert len(scene.cameras) == num_views
    assert scene.points is not None
    assert len(scene.points) == model.num_points3D()
    assert float(np.mean(scene.points.errors)) == pytest.approx(
        model.compute_mean_reprojection_error(), rel=0.2
    )
    assert miss_in_pixels(scene, model) < 0.02
