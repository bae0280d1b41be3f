"""A corpus of broken captures: each either loads right, or fails with one clear line.

A case is a function that gets the folder of a good capture and breaks one thing. A case that must be refused
states the line that is expected; one that must load returns a function that checks the scene.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from process_data import DATASETS, load_scene
from utils.errors import UserError
from utils.types import Scene

ROOT = Path(__file__).resolve().parents[2]
NUM_VIEWS, WIDTH, HEIGHT, FOCAL = 6, 40, 30, 50.0
Check = Callable[[Scene], None]


# ----------------------------------------------------------------------------------------------------------
# good captures


def pose(index: int) -> np.ndarray:
    """Camera to world (OpenCV) on a spiral of radius 3 around the origin, looking inwards."""
    angle, height = 0.9 * index, 0.3 * index - 0.7
    forward = -np.array([np.sin(angle), height, np.cos(angle)])
    forward /= np.linalg.norm(forward)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    return np.column_stack([right, np.cross(forward, right), forward, -3.0 * forward])


def picture(index: int) -> np.ndarray:
    columns = np.tile(np.arange(WIDTH), (HEIGHT, 1))
    return np.stack([6 * columns, 40 * index + 0 * columns, 0 * columns], axis=-1).astype(np.uint8)


def matte() -> np.ndarray:
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[8:22, 10:30] = 255
    return alpha


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def opengl(index: int) -> list[list[float]]:
    return np.vstack([pose(index) * [1.0, -1.0, -1.0, 1.0], [0, 0, 0, 1]]).tolist()


def make_neus(root: Path) -> None:
    intrinsics = np.array([[FOCAL, 0, WIDTH / 2 - 0.5], [0, FOCAL, HEIGHT / 2 - 0.5], [0, 0, 1]])
    matrices = {}
    for index in range(NUM_VIEWS):
        save(root / "image" / f"{index:03d}.png", picture(index))
        save(root / "mask" / f"{index:03d}.png", matte())
        rotation, center = pose(index)[:, :3].T, pose(index)[:, 3:]
        projection = intrinsics @ np.hstack([rotation, -rotation @ center])
        matrices[f"world_mat_{index}"] = np.vstack([projection, [0, 0, 0, 1]])
        matrices[f"scale_mat_{index}"] = np.eye(4)
    np.savez(root / "cameras_sphere.npz", **matrices)


def make_blender(root: Path) -> None:
    for split in ("train", "test"):
        frames = []
        for index in range(NUM_VIEWS):
            save(root / split / f"r_{index}.png", np.dstack([picture(index), matte()]))
            frames.append({"file_path": f"./{split}/r_{index}", "transform_matrix": opengl(index)})
        angle = 2 * np.arctan(WIDTH / 2 / FOCAL)
        (root / f"transforms_{split}.json").write_text(
            json.dumps({"camera_angle_x": angle, "frames": frames})
        )


def make_transforms(root: Path) -> None:
    frames = []
    for index in range(NUM_VIEWS):
        save(root / "images" / f"{index}.png", picture(index))
        save(root / "masks" / f"{index}.png", matte())
        frames.append({"file_path": f"images/{index}.png", "transform_matrix": opengl(index)})
    content = {
        **{"w": WIDTH, "h": HEIGHT, "fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2},
        "frames": frames,
    }
    (root / "transforms.json").write_text(json.dumps(content))


def make_colmap(root: Path) -> None:
    """COLMAP's text format: poses are world to camera, a quaternion (w first) and a shift."""
    from scipy.spatial.transform import Rotation

    lines = []
    for index in range(NUM_VIEWS):
        save(root / "images" / f"{index}.png", picture(index))
        save(root / "masks" / f"{index}.png", matte())
        rotation = pose(index)[:, :3].T
        x, y, z, w = Rotation.from_matrix(rotation).as_quat()
        shift = " ".join(f"{value:.12g}" for value in -rotation @ pose(index)[:, 3])
        lines += [f"{index + 1} {w} {x} {y} {z} {shift} 1 {index}.png", "20.5 15.5 1"]
    model = root / "sparse" / "0"
    model.mkdir(parents=True)
    (model / "cameras.txt").write_text(
        f"# comment\n1 PINHOLE {WIDTH} {HEIGHT} {FOCAL} {FOCAL} {WIDTH / 2} {HEIGHT / 2}\n"
    )
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    track = " ".join(f"{index + 1} 0" for index in range(NUM_VIEWS))
    (model / "points3D.txt").write_text(f"1 0 0 0 255 0 0 0.5 {track}\n")


def make_colmap_binary(root: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    make_colmap(root)
    model = root / "sparse" / "0"
    reconstruction = pycolmap.Reconstruction(str(model))
    for path in model.glob("*.txt"):
        path.unlink()
    reconstruction.write_binary(str(model))


MAKERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "neus": ("dtu", make_neus),
    "blender": ("blender", make_blender),
    "transforms": ("transforms", make_transforms),
    "colmap": ("colmap", make_colmap),
    "colmap_binary": ("colmap", make_colmap_binary),
}


# ----------------------------------------------------------------------------------------------------------
# what a case looks like


@dataclass(frozen=True)
class Case:
    kind: str
    damage: Callable[[Path], Check | None]
    line: str | None
    """Regular expression of the refusal; ``None``: it loads."""
    options: dict[str, Any]


CASES: list[Any] = []


def case(
    kind: str, line: str | None = None, marks: tuple[Any, ...] = (), **options: Any
) -> Callable[[Callable[[Path], Check | None]], Callable[[Path], Check | None]]:
    """Add a case to the corpus, once for every format that ``kind`` names."""

    def add(damage: Callable[[Path], Check | None]) -> Callable[[Path], Check | None]:
        for one in kind.split():
            name = f"{one}-{damage.__name__}"
            CASES.append(pytest.param(Case(one, damage, line, options), id=name, marks=marks))
        return damage

    return add


def config_of(kind: str, root: Path, **options: Any) -> Any:
    return DATASETS[MAKERS[kind][0]][0](root_dir=str(root), **options)


def assert_good(scene: Scene) -> None:
    """The first camera and its picture are those of the good capture."""
    world_from_scene = scene.world_from_scene.numpy()
    c2w = scene.cameras.c2w[0].double().numpy()
    scale = np.cbrt(np.linalg.det(world_from_scene[:3, :3]))
    np.testing.assert_allclose(world_from_scene[:3, :3] / scale @ c2w[:, :3], pose(0)[:, :3], atol=1e-4)
    np.testing.assert_allclose(
        world_from_scene[:3, :3] @ c2w[:, 3] + world_from_scene[:3, 3], pose(0)[:, 3], atol=1e-4
    )
    expected = [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]
    np.testing.assert_allclose(scene.cameras.intrinsics[0], expected, atol=1e-3)
    assert scene.cameras.size[0].tolist() == [WIDTH, HEIGHT]


def views(number: int) -> Check:
    """The capture is good and has so many views."""

    def check(scene: Scene) -> None:
        assert_good(scene)
        assert len(scene.images) == number

    return check


def pictures_of(root: Path) -> list[Path]:
    folder = next(root / name for name in ("image", "images", "train") if (root / name).is_dir())
    return sorted(folder.iterdir())


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def json_of(root: Path) -> Path:
    return next(
        path for name in ("transforms.json", "transforms_train.json") if (path := root / name).is_file()
    )


def edit_npz(root: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = root / "cameras_sphere.npz"
    with np.load(path) as archive:
        matrices = dict(archive)
    change(matrices)
    np.savez(path, **matrices)


def edit_text(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def set_matrix(root: Path, value: Any) -> None:
    edit_json(json_of(root), lambda content: content["frames"][2].__setitem__("transform_matrix", value))


EVERY = "neus blender transforms colmap"
JSON = "blender transforms"


# ----------------------------------------------------------------------------------------------------------
# nothing broken, and folders


@case(EVERY + " colmap_binary")
def nothing(root: Path) -> Check:
    return assert_good


@case(EVERY, "no such folder|no such file")
def missing_folder(root: Path) -> None:
    shutil.rmtree(root)


@case(EVERY, "no such|holds no|no model|not found|nothing|expected")
def empty_folder(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


@case("neus transforms colmap", r"holds no pictures|no such (picture|file)|no picture|not found|none of")
def folder_of_pictures_is_empty(root: Path) -> None:
    for path in pictures_of(root):
        path.unlink()


@case(EVERY)
def symlinked_folder(root: Path) -> Check:
    shutil.move(root, root.parent / "real")
    root.symlink_to(root.parent / "real")
    return views(NUM_VIEWS) if not (root / "transforms_test.json").exists() else assert_good


@case("neus", "denied")
def unreadable_picture(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    pictures_of(root)[1].chmod(0)


# ----------------------------------------------------------------------------------------------------------
# pictures


@case(EVERY, r"\.png: the file is empty \(0 bytes\); copy it again")
def zero_bytes(root: Path) -> None:
    pictures_of(root)[2].write_bytes(b"")


@case(EVERY, r"\.png: not a readable picture .*; copy it again")
def text_named_png(root: Path) -> None:
    pictures_of(root)[2].write_text("this is not a picture")


@case(EVERY, r"\.png: not a readable picture .*; copy it again")
def truncated_png(root: Path) -> None:
    path = pictures_of(root)[2]
    path.write_bytes(path.read_bytes()[:-40])


def replace_first(root: Path, suffix: str, pixels: Any, **options: Any) -> Path:
    """Replace the first picture by one with another suffix (all loaders find it by its stem)."""
    first = pictures_of(root)[0]
    first.unlink()
    made = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    made.save(first.with_suffix(suffix), **options)
    return first.with_suffix(suffix)


@case("neus transforms colmap", r"\.jpg: not a readable picture .*truncated.*; copy it again")
def truncated_jpeg(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = replace_first(root, ".jpg", noise, quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def first_is(red: int, green: int, blue: int, tolerance: int = 0) -> Check:
    def check(scene: Scene) -> None:
        assert_good(scene)
        middle = scene.images.image(0)[HEIGHT // 2, WIDTH // 2].int().tolist()
        assert np.abs(np.array(middle) - (red, green, blue)).max() <= tolerance, middle

    return check


@case("neus transforms colmap")
def sixteen_bit_grey(root: Path) -> Check:
    replace_first(root, ".png", np.full((HEIGHT, WIDTH), 100 * 257, np.uint16))
    return first_is(100, 100, 100)


@case("neus transforms colmap")
def eight_bit_grey(root: Path) -> Check:
    replace_first(root, ".png", np.full((HEIGHT, WIDTH), 77, np.uint8))
    return first_is(77, 77, 77)


@case("neus transforms colmap")
def palette(root: Path) -> Check:
    replace_first(
        root, ".png", Image.fromarray(np.full((HEIGHT, WIDTH, 3), (10, 200, 30), np.uint8)).quantize(8)
    )
    return first_is(10, 200, 30)


@case("neus transforms colmap")
def cmyk_jpeg(root: Path) -> Check:
    flat = Image.fromarray(np.full((HEIGHT, WIDTH, 3), (200, 60, 30), np.uint8)).convert("CMYK")
    replace_first(root, ".jpg", flat, quality=95)
    return first_is(200, 60, 30, tolerance=6)


@case("neus transforms colmap")
def tiff_of_several_pages(root: Path) -> Check:
    pages = [Image.fromarray(np.full((HEIGHT, WIDTH, 3), value, np.uint8)) for value in (50, 90)]
    replace_first(root, ".tif", pages[0], save_all=True, append_images=pages[1:])
    return first_is(50, 50, 50)


@case("neus", "6 world_mat_i for 5 pictures")
@case("transforms colmap")
def animated_gif(root: Path) -> Check | None:
    """GIF is no format of photographs: the view is missing."""
    replace_first(root, ".gif", picture(0))

    def check(scene: Scene) -> None:
        assert len(scene.images) == NUM_VIEWS - 1

    return check


@case("neus transforms colmap")
def extension_in_another_case(root: Path) -> Check:
    for path in pictures_of(root):
        path.rename(path.with_suffix(".PNG"))
    return views(NUM_VIEWS)


@case("neus transforms colmap")
def hidden_files(root: Path) -> Check:
    (pictures_of(root)[0].parent / "._000.png").write_bytes(b"left by macOS")
    (pictures_of(root)[0].parent / ".DS_Store").write_bytes(b"left by macOS")
    return views(NUM_VIEWS)


@case("neus transforms colmap")
def folder_named_like_a_picture(root: Path) -> Check:
    (pictures_of(root)[0].parent / "a.jpg").mkdir()
    return views(NUM_VIEWS)


@case("neus", r"middle of 000\.png, which has 1x1")
@case(
    "transforms colmap",
    r"images/0\.png: 1x1 pixels, but its camera is for 40x30; ",
)
def one_pixel(root: Path) -> None:
    replace_first(root, ".png", np.zeros((1, 1, 3), np.uint8))


@case("neus", r"middle of 000\.png, which has 12x9.*first two rows of world_mat_i")
def cameras_for_another_resolution(root: Path) -> None:
    for index, path in enumerate(pictures_of(root)):
        Image.fromarray(picture(index)).resize((12, 9)).save(path)


@case("transforms colmap")
def pictures_resized_alike(root: Path) -> Check:
    for index, path in enumerate(pictures_of(root)):
        Image.fromarray(picture(index)).resize((WIDTH // 2, HEIGHT // 2)).save(path)

    def check(scene: Scene) -> None:
        assert scene.cameras.size[0].tolist() == [WIDTH // 2, HEIGHT // 2]
        np.testing.assert_allclose(scene.cameras.intrinsics[0, 0], [FOCAL / 2, 0, WIDTH / 4], atol=1e-3)

    return check


@case("transforms colmap", r"images/3\.png: 20x15 pixels, but its camera is for 40x30; resize all")
def one_picture_resized(root: Path) -> None:
    Image.fromarray(picture(3)).resize((20, 15)).save(root / "images" / "3.png")


@case("transforms colmap", r"30x40 pixels, but its camera is for 40x30; .*EXIF")
def turned_picture(root: Path) -> None:
    Image.fromarray(picture(1)).transpose(Image.Transpose.ROTATE_90).save(root / "images" / "1.png")


@case("neus")
def spaces_and_umlauts_in_names(root: Path) -> Check:
    for path in pictures_of(root):
        path.rename(path.with_name(f"Mädchen am Fluß {path.stem} 北.png"))
    return views(NUM_VIEWS)


@case("transforms")
def spaces_and_umlauts_in_json(root: Path) -> Check:
    def rename(content: dict[str, Any]) -> None:
        for frame in content["frames"]:
            old = root / frame["file_path"]
            frame["file_path"] = f"images/Mädchen am Fluß {old.stem} 北.png"
            old.rename(root / frame["file_path"])

    edit_json(root / "transforms.json", rename)
    return views(NUM_VIEWS)


@case("colmap", r"images/Mädchen: no such picture.*; ")
@case("colmap_binary")
def spaces_in_colmap(root: Path) -> Check:
    """COLMAP's text format ends a name at the first space, its binary format does not."""
    pycolmap = pytest.importorskip("pycolmap")
    model = root / "sparse" / "0"
    reconstruction = pycolmap.Reconstruction(str(model))
    for image in reconstruction.images.values():
        old, image.name = image.name, f"Mädchen am Fluß {image.name}"
        (root / "images" / old).rename(root / "images" / image.name)
    is_text = (model / "images.txt").is_file()
    for path in model.iterdir():
        path.unlink()
    (reconstruction.write_text if is_text else reconstruction.write_binary)(str(model))
    return views(NUM_VIEWS)


# ----------------------------------------------------------------------------------------------------------
# masks


def mask_of(root: Path) -> Path:
    return sorted(next(root / name for name in ("mask", "masks") if (root / name).is_dir()).iterdir())[2]


@case("neus transforms colmap", r"\.png: 4x5 pixels, but .* has 40x30; give the mask", apply_mask=True)
def mask_of_another_size(root: Path) -> None:
    save(mask_of(root), np.full((5, 4), 255, np.uint8))


@case("neus transforms colmap", r"white everywhere.*; 255 marks", apply_mask=True)
def all_white_masks(root: Path) -> None:
    for path in mask_of(root).parent.iterdir():
        save(path, np.full((HEIGHT, WIDTH), 255, np.uint8))


@case("neus transforms colmap", r"black everywhere.*; 255 marks", apply_mask=True)
def all_black_masks(root: Path) -> None:
    for path in mask_of(root).parent.iterdir():
        save(path, np.zeros((HEIGHT, WIDTH), np.uint8))


@case("neus transforms colmap", r"none for image/002\.png|2\.png: has no mask \(1 of 6", apply_mask=True)
def one_mask_missing(root: Path) -> None:
    mask_of(root).unlink()


@case("neus transforms colmap", r"has no mask \(6 of 6 .*apply_mask=false", apply_mask=True)
def all_masks_missing(root: Path) -> None:
    shutil.rmtree(mask_of(root).parent)


@case("blender", r"has no mask .*apply_mask=false")
def blender_pictures_without_alpha(root: Path) -> None:
    for path in pictures_of(root):
        save(path, picture(0))


# ----------------------------------------------------------------------------------------------------------
# poses and cameras: NeuS


@case("neus", r"cameras_sphere\.npz: not a readable \.npz file.*; copy it again")
def npz_is_text(root: Path) -> None:
    (root / "cameras_sphere.npz").write_text("not an archive")


@case("neus", r"cameras_sphere\.npz: not a readable \.npz file.*; copy it again")
def npz_is_truncated(root: Path) -> None:
    path = root / "cameras_sphere.npz"
    path.write_bytes(path.read_bytes()[:700])


@case("neus", r"cameras_sphere\.npz: no such camera file; check dataset\.render_cameras_name")
def npz_is_missing(root: Path) -> None:
    (root / "cameras_sphere.npz").unlink()


@case("neus", r"cameras_sphere\.npz: 5 world_mat_i for 6 pictures.*; ")
def npz_key_missing(root: Path) -> None:
    edit_npz(root, lambda matrices: matrices.pop("world_mat_3"))


@case("neus", r"6 world_mat_i for 5 pictures in .*/image; matrices belong")
def mismatched_counts(root: Path) -> None:
    pictures_of(root)[5].unlink()


@case("neus", "world_mat_2 holds values that are not finite; ")
def nan_matrix(root: Path) -> None:
    edit_npz(root, lambda matrices: matrices["world_mat_2"].__setitem__((0, 0), np.nan))


@case("neus", "world_mat_2: the projection matrix is singular; ")
def singular_matrix(root: Path) -> None:
    edit_npz(root, lambda matrices: matrices["world_mat_2"].__setitem__(1, matrices["world_mat_2"][0]))


@case("neus", "world_mat_2: the camera looks away from the unit sphere; the matrix is mirrored")
def mirrored_matrix(root: Path) -> None:
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    intrinsics = np.array([[FOCAL, 0, 19.5], [0, FOCAL, 14.5], [0, 0, 1]])
    world_to_camera = flip @ np.linalg.inv(np.vstack([pose(2), [0, 0, 0, 1]]))
    mirrored = np.vstack([intrinsics @ world_to_camera[:3], [0, 0, 0, 1]])
    edit_npz(root, lambda matrices: matrices.update(world_mat_2=mirrored))


# ----------------------------------------------------------------------------------------------------------
# poses and cameras: JSON


@case(JSON, r"transforms\w*\.json: not .*JSON.*line \d+.*; ")
def truncated_json(root: Path) -> None:
    path = json_of(root)
    path.write_text(path.read_text()[:200])


@case(JSON, r"transforms\w*\.json: .*; ")
def json_is_a_list(root: Path) -> None:
    json_of(root).write_text("[1, 2, 3]")


@case(JSON, r"transforms\w*\.json: .*; ")
def json_is_binary(root: Path) -> None:
    json_of(root).write_bytes(bytes(range(256)))


@case(JSON, r"transforms\w*\.json: .*; ")
def json_nested_beyond_measure(root: Path) -> None:
    json_of(root).write_text("[" * 100000)


@case(JSON, r"transforms\w*\.json: .*frames.*; ")
def frames_empty(root: Path) -> None:
    edit_json(json_of(root), lambda content: content.update(frames=[]))


@case(JSON, r"transforms\w*\.json: .*frames.*; ")
def frames_missing(root: Path) -> None:
    edit_json(json_of(root), lambda content: content.pop("frames"))


@case(JSON, r"transforms\w*\.json: .*; ")
def frames_of_numbers(root: Path) -> None:
    edit_json(json_of(root), lambda content: content.update(frames=[1, None, "a"]))


@case(JSON, r"transforms\w*\.json: .*transform_matrix.*; ")
def frame_without_matrix(root: Path) -> None:
    edit_json(json_of(root), lambda content: content["frames"][2].pop("transform_matrix"))


@case(JSON, r"transforms\w*\.json: .*file_path.*; ")
def frame_without_path(root: Path) -> None:
    edit_json(json_of(root), lambda content: content["frames"][2].pop("file_path"))


@case(JSON, r"transforms\w*\.json: .*; ")
def frame_with_a_number_for_a_path(root: Path) -> None:
    edit_json(json_of(root), lambda content: content["frames"][2].update(file_path=7))


@case(JSON, r"transforms\w*\.json: .*not finite; ")
def nan_pose(root: Path) -> None:
    set_matrix(root, [[float("nan")] * 4] * 4)


@case(JSON, r"transforms\w*\.json: .*singular; ")
def singular_pose(root: Path) -> None:
    set_matrix(root, np.diag([0.0, 0, 0, 1]).tolist())


@case(JSON, r"transforms\w*\.json: .*mirrored \(its rotation has determinant -1\); ")
def mirrored_pose(root: Path) -> None:
    set_matrix(root, (np.diag([1.0, 1, -1, 1]) @ np.array(opengl(2))).tolist())


@case(JSON, r"transforms\w*\.json: .*(shape|not a matrix).*; ")
def pose_of_wrong_shape(root: Path) -> None:
    set_matrix(root, [[1.0, 2.0], [3.0]])


@case(JSON, r"transforms\w*\.json: .*; ")
def pose_of_words(root: Path) -> None:
    set_matrix(root, [["a"] * 4] * 4)


@case("transforms")
def absolute_path(root: Path) -> Check:
    def change(content: dict[str, Any]) -> None:
        for frame in content["frames"]:
            frame["file_path"] = str(root / frame["file_path"])

    edit_json(json_of(root), change)
    return views(NUM_VIEWS)


@case("transforms")
def windows_path(root: Path) -> Check:
    def change(content: dict[str, Any]) -> None:
        for frame in content["frames"]:
            frame["file_path"] = ".\\" + frame["file_path"].replace("/", "\\")

    edit_json(json_of(root), change)
    return views(NUM_VIEWS)


@case("transforms")
def duplicate_frames(root: Path) -> Check:
    edit_json(json_of(root), lambda content: content["frames"].append(content["frames"][1]))
    return views(NUM_VIEWS)


@case("transforms", r"(transforms\.json|dataset\.\w+|root|capture).*: .*; ")
def all_poses_equal(root: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for frame in content["frames"]:
            frame["transform_matrix"] = content["frames"][0]["transform_matrix"]

    edit_json(json_of(root), change)


@case("transforms", r"transforms\.json: .*(fl_x|focal|camera_angle_x).*; ")
def no_focal_length(root: Path) -> None:
    edit_json(json_of(root), lambda content: [content.pop(key) for key in ("fl_x", "fl_y")])


def change_focal(root: Path, value: Any) -> None:
    edit_json(json_of(root), lambda content: content.update(fl_x=value, fl_y=value))


@case("transforms", r"transforms\.json: .*; ")
def huge_focal(root: Path) -> None:
    change_focal(root, 1e9)


@case("transforms", r"transforms\.json: .*; ")
def negative_focal(root: Path) -> None:
    change_focal(root, -50.0)


@case("transforms", r"transforms\.json: .*; ")
def nan_focal(root: Path) -> None:
    change_focal(root, float("nan"))


@case("transforms", r"transforms\.json: .*; ")
def focal_is_a_word(root: Path) -> None:
    change_focal(root, "fifty")


@case("blender", r"transforms_train\.json: .*camera_angle_x.*; ")
def absurd_angle(root: Path) -> None:
    edit_json(json_of(root), lambda content: content.update(camera_angle_x=7.0))


@case("transforms", r"transforms\.json: .*(camera_model|camera model|FISHBOWL).*; ")
def unknown_camera_model(root: Path) -> None:
    edit_json(json_of(root), lambda content: content.update(camera_model="FISHBOWL"))


@case("transforms", r"transforms\.json: .*; ")
def size_is_nonsense(root: Path) -> None:
    edit_json(json_of(root), lambda content: content.update(w="wide", h=-3))


# ----------------------------------------------------------------------------------------------------------
# poses and cameras: COLMAP


def model_file(root: Path, name: str) -> Path:
    return root / "sparse" / "0" / name


@case("colmap_binary", r"images\.bin: .*; ")
def images_bin_truncated(root: Path) -> None:
    path = model_file(root, "images.bin")
    path.write_bytes(path.read_bytes()[:-30])


@case("colmap_binary", r"cameras\.bin: .*; ")
def cameras_bin_is_text(root: Path) -> None:
    model_file(root, "cameras.bin").write_text("not a model")


@case("colmap_binary", r"points3D\.bin: .*; ")
def points_bin_with_an_absurd_count(root: Path) -> None:
    path = model_file(root, "points3D.bin")
    path.write_bytes(b"\xff" * 7 + b"\x0f" + path.read_bytes()[8:])


@case("colmap colmap_binary", r"points3D.*; |sparse.*points3D")
def points_missing(root: Path) -> None:
    for name in ("points3D.txt", "points3D.bin"):
        model_file(root, name).unlink(missing_ok=True)


@case("colmap", r"cameras.*; ")
def cameras_missing(root: Path) -> None:
    model_file(root, "cameras.txt").unlink()


@case("colmap", r"sparse/0.*; ")
def no_image_placed(root: Path) -> None:
    model_file(root, "images.txt").write_text("# nothing\n")


@case("colmap", r"sparse/0.*: .*(FISHBOWL|Camera model does not exist).*; ")
def colmap_camera_model_unknown(root: Path) -> None:
    edit_text(model_file(root, "cameras.txt"), "PINHOLE", "FISHBOWL")


@case("colmap", r"sparse/0.*: .*; ")
def colmap_too_few_parameters(root: Path) -> None:
    edit_text(model_file(root, "cameras.txt"), "PINHOLE", "OPENCV")


@case("colmap", r"(cameras\.txt|camera 1).*; ")
def colmap_negative_focal(root: Path) -> None:
    edit_text(model_file(root, "cameras.txt"), "50.0 50.0", "-50.0 50.0")


@case("colmap", r"(cameras\.txt|camera 1).*; ")
def colmap_huge_focal(root: Path) -> None:
    edit_text(model_file(root, "cameras.txt"), "50.0 50.0", "1e12 1e12")


@case("colmap", r"sparse/0.*: .*; ")
def colmap_pose_is_nan(root: Path) -> None:
    lines = model_file(root, "images.txt").read_text().splitlines()
    fields = lines[4].split()
    fields[5] = "nan"
    lines[4] = " ".join(fields)
    model_file(root, "images.txt").write_text("\n".join(lines) + "\n")


@case("colmap", r"sparse/0.*: .*; ")
def colmap_line_of_words(root: Path) -> None:
    edit_text(model_file(root, "images.txt"), "20.5 15.5 1", "these are words")


@case("colmap", r"sparse/0.*: .*; ")
def colmap_image_of_an_unknown_camera(root: Path) -> None:
    edit_text(model_file(root, "images.txt"), " 1 2.png", " 9 2.png")


@case("colmap colmap_binary")
def colmap_picture_missing(root: Path) -> Check:
    """COLMAP placed it, but it was deleted since: the others are used."""
    (root / "images" / "5.png").unlink()
    return views(NUM_VIEWS - 1)


# ----------------------------------------------------------------------------------------------------------
# running the corpus


@pytest.mark.parametrize("broken", CASES)
def test_loads_right_or_fails_with_one_line(
    broken: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "capture"
    MAKERS[broken.kind][1](root)
    check = broken.damage(root)
    config = config_of(broken.kind, root, **broken.options)
    if broken.line is None:
        assert check is not None
        check(load_scene(config))
        return
    with pytest.raises(UserError) as caught:
        load_scene(config)
    line = str(caught.value)
    assert re.search(broken.line, line), line
    where, _, remedy = line.partition("; ")
    assert where.startswith((str(tmp_path), "dataset.", "/")), f"names no file or key: {line}"
    assert len(remedy) > 8, f"says no remedy: {line}"
    assert "\n" not in line
    assert len(line) < 600
    assert capfd.readouterr().err == "", "nothing is printed beside the line"


def test_corpus_is_large_enough() -> None:
    assert len({param.values[0].damage for param in CASES}) >= 35


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (zero_bytes, "002.png: the file is empty (0 bytes); copy it again"),
        (nan_matrix, "cameras_sphere.npz: world_mat_2 holds values that are not finite; "),
    ],
)
def test_command_line_says_it_in_one_line(tmp_path: Path, damage: Callable[[Path], None], what: str) -> None:
    root = tmp_path / "capture"
    make_neus(root)
    damage(root)
    command = [
        *(sys.executable, "run.py", "--config", "confs/neus-dtu.yaml", "--train", "--device", "cpu"),
        *("--outputs_dir", str(tmp_path / "outputs"), f"dataset.root_dir={root}"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("run.py: ")]
    assert len(lines) == 1, result.stderr
    assert what in lines[0]
    assert "Traceback" not in result.stderr + result.stdout
